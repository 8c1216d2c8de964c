"""One rank's averages, and what moves them. No communication."""

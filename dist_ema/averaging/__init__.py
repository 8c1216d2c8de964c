"""One rank's averages, and what moves them. An update communicates nothing."""

"""Work that is done whole or not at all, whatever a signal handler raises meanwhile. No communication."""

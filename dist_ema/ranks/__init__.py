"""Every collective of the package, and the waiting of ranks for one another."""

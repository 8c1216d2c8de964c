"""Who holds what over all ranks, and whether those that should hold the same do."""

"""Short pieces on their way from the ranks that have them to the ranks that write their pages."""

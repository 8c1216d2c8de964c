"""What the ranks write into the store that they share: their agreements, and their signs of life."""

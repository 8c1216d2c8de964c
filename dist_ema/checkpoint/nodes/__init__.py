"""Nodes that may not share a disk: who sees what rank 0 has put there, and where it lies after a restart."""

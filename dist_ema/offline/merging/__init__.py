"""Merging saved weights into one model folder."""

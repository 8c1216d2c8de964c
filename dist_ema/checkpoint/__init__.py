"""Saving and loading by all ranks together."""

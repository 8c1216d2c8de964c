"""Tracks of a run that the checkpoint does not have, and the other way round."""

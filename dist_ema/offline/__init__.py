"""Work on saved averages without the run: one process, no process group, no model."""

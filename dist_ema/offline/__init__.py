"""What is done with saved averages without the run: one process, no process group, no model."""

"""Which snapshots of the live weights are written, and which are kept."""

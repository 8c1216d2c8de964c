"""The averages and the live model: swaps, teachers, state dicts, distances and replicas."""

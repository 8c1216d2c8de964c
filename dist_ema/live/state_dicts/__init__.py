"""The averages as state dicts: whole, laid out like the model, for torch's DCP, and of one process."""

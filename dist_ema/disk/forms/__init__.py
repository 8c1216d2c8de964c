"""The forms of a model folder: which files the library of a model expects, and what it wants beside the weights."""

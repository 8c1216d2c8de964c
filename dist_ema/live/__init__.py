"""The averages and the live model: in, out, beside it, and how far apart."""

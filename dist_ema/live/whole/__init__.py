"""The average as a stream of whole tensors, in bounded memory."""

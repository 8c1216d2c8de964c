"""The average elsewhere: in another module, or as a stream of whole tensors."""

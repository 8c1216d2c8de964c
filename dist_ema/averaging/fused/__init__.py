"""Updates on a GPU in one kernel, which reads every live value once."""

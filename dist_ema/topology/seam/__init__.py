"""The interface of a layout, and the arithmetic of runs and meshes. No communication."""

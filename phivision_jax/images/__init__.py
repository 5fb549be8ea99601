"""Images on the host: from a file to the patches and grids that a ``Batch`` holds (NumPy and Pillow only)."""

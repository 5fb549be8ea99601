"""The data engine: records, the plan of what is in which row, and the batches made from both (NumPy, no models)."""

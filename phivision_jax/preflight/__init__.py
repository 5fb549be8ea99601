"""What a run needs and costs on a TPU slice that is not here: its name, the arithmetic of a step, what devices send."""

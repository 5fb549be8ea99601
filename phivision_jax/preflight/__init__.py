"""Compile a step for TPU slices that are not at hand: memory, collectives, products, and a modelled time."""

"""Modelled times of steps on chips that are not at hand. Frozen: tested, and extended no further."""

"""The published benchmarks, one module each, named as in ``--benchmarks``; ``registry`` finds them."""

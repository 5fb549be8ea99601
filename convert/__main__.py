"""``python -m convert``: the same command as ``phivision convert``."""

import sys

from phivision_jax.cli.main import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])

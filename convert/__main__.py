"""``python -m convert``: the same command as ``phivision convert``."""

from phivision_jax.cli.convert import main

if __name__ == "__main__":
    main()

"""``python -m phivision_jax.cli``: the command ``phivision``."""

from phivision_jax.cli.main import main

if __name__ == "__main__":
    main()

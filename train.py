"""Train Phi-4-reasoning-vision; the same as ``phivision train``.

python train.py --config=configs/tiny.py --run=runs/tiny
python train.py --config=configs/finetune.py --help                    # every field of a configuration
"""

import sys

from phivision_jax.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])

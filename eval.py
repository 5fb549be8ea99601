"""Score a model on benchmarks or on a dataset; the same as ``phivision eval``.

python eval.py runs/tiny --data=data/easy_vqa/test --out=runs/tiny/eval
"""

import sys

from phivision_jax.cli.main import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])

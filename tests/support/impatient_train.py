"""train.py that gives a bucket up after IMPATIENT seconds, and sends its log as often."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from absl import app

import train
from phivision_jax.training import run_directory

run_directory.PATIENCE_S = run_directory.PUSH_S = float(os.environ["IMPATIENT"])
app.run(train.main, flags_parser=train.parse_flags)

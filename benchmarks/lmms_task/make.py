"""Write the dataset of ``shapes.yaml``: ``python make.py RECORDS OUT``, in lmms-eval's environment.

RECORDS is a JSON list of objects with a question, its answer, and the paths of its images.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Image, Sequence, Value


def main(records: str, out: str) -> None:
    rows = json.loads(Path(records).read_text())
    columns = {"question": Value("string"), "answer": Value("string"), "images": Sequence(Image())}
    data = {name: [row[name] for row in rows] for name in columns}
    DatasetDict({"test": Dataset.from_dict(data, features=Features(columns))}).save_to_disk(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

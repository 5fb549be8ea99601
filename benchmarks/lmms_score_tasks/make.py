"""Write both data sets, as parquet and for lmms-eval: ``python make.py ROWS OUT``, in lmms-eval's environment.

ROWS is a JSON file {NAME: list of rows}; the column "image" has paths.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import Dataset, DatasetDict, Image


def main(rows: str, out: str) -> None:
    for name, found in json.loads(Path(rows).read_text()).items():
        # Bytes, as on the hub: of paths, parquet would have the paths.
        given = [row | {"image": {"bytes": Path(row["image"]).read_bytes(), "path": None}} for row in found]
        data = Dataset.from_list(given).cast_column("image", Image())
        DatasetDict({"test": data}).save_to_disk(f"{out}/{name}_data")
        split = "val" if name == "mmstar" else "test"
        data.to_parquet(f"{out}/parquet/{name}/{split}-00000-of-00001.parquet")


if __name__ == "__main__":
    main(*sys.argv[1:])

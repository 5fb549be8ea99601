"""Several hosts train as one does: real processes, rows that hold very different numbers of target tokens."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from phivision_jax.config import DecoderConfig, ModelConfig
from phivision_jax.data.records import Record
from phivision_jax.data.store.importing import write_dataset
from phivision_jax.processor import Processor
from tests.training.test_train import SMALL, finish, losses

STEPS = 3
# A row is one example: T fits the longest, and two of the shortest do not fit beside it.
ROWS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uneven")
    decoder = DecoderConfig(vocab_size=512, bos_token_id=507, eos_token_id=508, pad_token_id=509)

    def record(i: int) -> Record:
        question, answer = ("x" * 90, "y") if i % 4 else ("x", "a b c d e f g h " * 6)
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        return Record(str(i), "made", (), messages, "nothink", "general", {})

    write_dataset(
        folder / "train",
        [record(i) for i in range(ROWS * STEPS)],
        Processor.small(ModelConfig(decoder=decoder)),
        progress=False,
    )
    return folder


def trained(data: Path, run: Path, processes: int) -> dict[int, float]:
    small = [word for word in SMALL if not word.startswith(("--config.data.batch_rows", "--config.eval_"))]
    words = [sys.executable, "train.py", "--config=configs/tiny.py", *small, f"--run={run}"]
    words += [f"--config.data.path={data}/train", "--config.data.eval_path=", f"--config.data.batch_rows={ROWS}"]
    several = [sys.executable, "-m", "phivision_jax.distributed.launch", f"--processes={processes}", "--"]
    finish(words if processes == 1 else [*several, *words])
    return losses(run)


@pytest.mark.parametrize("hosts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_hosts_take_the_mean_of_all_target_tokens(data, tmp_path, hosts):
    one, several = (trained(data, tmp_path / str(processes), processes) for processes in (1, hosts))
    assert len(one) == STEPS
    # A host's rows hold from a few to a hundred target tokens: a mean of the hosts' means would be far off.
    first = [
        json.loads((tmp_path / str(hosts) / f"records_{i}.jsonl").read_text().split("\n")[0]) for i in range(hosts)
    ]
    long = [sum(int(record) % 4 == 0 for row in line["ids"] for record in row) for line in first]
    assert len(set(long)) > 1
    assert abs(several[1] - one[1]) <= 1e-6
    np.testing.assert_allclose(list(several.values()), list(one.values()), rtol=1e-6)  # after updates, too

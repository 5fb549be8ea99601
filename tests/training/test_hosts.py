"""Several hosts train as one does: real processes, rows with very different numbers of target tokens."""

import sys
from pathlib import Path

import numpy as np
import pytest

from phivision_jax.config import DecoderConfig, ModelConfig
from phivision_jax.data.records import Record
from phivision_jax.processor import Processor
from tests.support.datasets import write_dataset
from tests.support.launched import under_launcher
from tests.support.runs import SMALL, finish, losses, records

STEPS = 3
# A row is one example: it fits the longest, and not two of the shortest.
ROWS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uneven")
    decoder = DecoderConfig(vocab_size=512, bos_token_id=507, eos_token_id=508, pad_token_id=509)

    def record(i: int) -> Record:
        question, answer = ("x" * 90, "y") if i % 4 else ("x", "a b c d e f g h " * 6)
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        return Record(str(i), "synthetic", (), messages, "nothink", "general", {})

    write_dataset(
        folder / "train",
        [record(i) for i in range(ROWS * STEPS)],
        Processor.small(ModelConfig(decoder=decoder)),
    )
    return folder


def trained(data: Path, run: Path, processes: int) -> dict[int, float]:
    small = [word for word in SMALL if not word.startswith(("--config.data.batch_rows", "--config.eval_"))]
    words = [sys.executable, "train.py", *small, f"--run={run}"]
    words += [f"--config.data.path={data}/train", "--config.data.eval_path=", f"--config.data.batch_rows={ROWS}"]
    finish(words if processes == 1 else under_launcher(words, processes))
    return losses(run)


@pytest.mark.parametrize("hosts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_hosts_average_over_all_target_tokens(data, tmp_path, hosts):
    one, several = (trained(data, tmp_path / str(processes), processes) for processes in (1, hosts))
    assert len(one) == STEPS
    # A host's rows have from a few to a hundred target tokens: a mean of the hosts' means would differ a lot.
    first = [records(tmp_path / str(hosts), i)[1] for i in range(hosts)]
    long = [sum(int(record) % 4 == 0 for row in ids for record in row) for ids in first]
    assert len(set(long)) > 1
    assert abs(several[1] - one[1]) <= 1e-6
    np.testing.assert_allclose(list(several.values()), list(one.values()), rtol=1e-6)  # after updates, too

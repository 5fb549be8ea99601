"""The cache of replies: several processes, kills, and files that cannot be used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from phivision_jax.evaluation.reply_cache import ReplyCache, cache_key, default_directory
from tests.support.generation import reply
from tests.support.paths import ROOT

WRITER = """
import sys
from pathlib import Path
from phivision_jax.evaluation.reply_cache import ReplyCache
from tests.support.generation import reply
cache = ReplyCache(Path(sys.argv[1]))
for i in range(300):
    cache.put(f"{sys.argv[2]}-{i}", reply([i], f"answer {i}", "hm", "think"))
cache.close()
"""


def test_reply_comes_back_as_it_was(tmp_path):
    cache, kept = ReplyCache(tmp_path / "a"), reply([1, 2], "ü\n<b>", "hm", "think", prompt_tokens=7)
    cache.put("k", kept)
    for _ in range(2):  # before it is written, and after
        found = cache.get("k")
        assert found is not None and vars(found) == vars(kept) | {"ids": ()}
        cache.close()
        cache = ReplyCache(tmp_path / "a")
    assert cache.get("other") is None
    cache.close()


def test_several_processes_write_at_the_same_time(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, name], cwd=ROOT) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    cache = ReplyCache(tmp_path)
    assert all(cache.get(f"{name}-{i}").answer == f"answer {i}" for name in "abc" for i in range(300))
    cache.close()


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to be read as one" * 50, None])
def test_cache_that_cannot_be_used_is_reported_once(tmp_path, content):
    (tmp_path / "replies.sqlite").write_bytes(content) if content else (tmp_path / "replies.sqlite").mkdir()
    logged: list[str] = []
    cache = ReplyCache(tmp_path, logged.append)
    cache.put("k", reply([1], "a"))
    for _ in range(100):
        cache.put("l", reply([1], "a"))
        cache.get("m")
    cache.close()
    assert len(logged) == 1 and "replies are not cached" in logged[0]


def test_reply_of_another_version_is_asked_again(tmp_path):
    cache = ReplyCache(tmp_path)
    cache._connection.execute("INSERT INTO replies VALUES ('k', '{\"answer\": 1}')")
    assert cache.get("k") is None
    cache.close()


def test_keys(monkeypatch):
    keys = {cache_key(model, mode, print_) for model in "ab" for mode in ("auto", "think") for print_ in "cd"}
    assert len(keys) == 8
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(default_directory()) == "/x/phivision_jax/replies"

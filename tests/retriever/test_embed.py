"""Embeddings: planned in batches, made by one process or several, kept when a worker or the whole build is killed."""

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.contract.config import Config, show_config
from services.retriever.batches import Plan
from services.retriever.build import build_index
from services.retriever.corpus import Corpus
from services.retriever.encoder import describe_encoder
from services.retriever.errors import IndexMismatch, RetrieverError
from services.retriever.hashing import HashingEncoder
from services.retriever.workers import encode_in_workers
from tests.retriever.conftest import load, make_config, passage, query, until, with_settings, write_corpus


@pytest.fixture
def built(tmp_path: Path) -> Config:
    config = make_config(tmp_path, rows=70)
    build_index(config)
    return config


def write_lengths(path: Path, lengths: np.ndarray) -> Corpus:
    return Corpus.open(write_corpus(path, [{"id": str(n), "contents": "x" * int(size)} for n, size in enumerate(lengths)]))


def test_plan_covers_every_row_once_and_is_repeatable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.retriever.batches.WINDOW_ROWS", 256)
    lengths = np.random.default_rng(0).integers(10, 1000, 777)
    corpus = write_lengths(tmp_path / "corpus.jsonl", lengths)
    plan, again = Plan(corpus), Plan(corpus)
    rows = [plan.rows(batch) for batch in range(plan.batches)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(777))
    assert all(np.array_equal(again.rows(batch), rows[batch]) for batch in reversed(range(plan.batches)))
    spread = [int(lengths[batch].max() - lengths[batch].min()) for batch in rows]
    assert max(spread[:-1]) < 350  # of 990, were they not sorted; the last window has 9 rows


@pytest.mark.parametrize("together", [1, 3])
def test_tasks_are_the_batches_that_are_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr("services.retriever.batches.WINDOW_ROWS", 256)
    plan = Plan(write_lengths(tmp_path / "corpus.jsonl", np.full(777, 20)))
    done = np.zeros(13, bool)
    done[[0, 5, 12]] = True
    tasks = list(plan.tasks(done, together))
    assert sorted(sum(tasks, [])) == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert all(len(task) <= together for task in tasks)
    assert len({batch // 4 for batch in tasks[0]}) == 1  # of one window


def test_kill_while_encoding_leaves_nothing_whole_and_is_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build_index(make_config(tmp_path, rows=70))
    config = make_config(tmp_path, rows=20_000, index_checkpoint_s=0)
    kill_after_batches(config, 5)
    assert not (config.data.index_folder / "manifest.json").exists()
    assert not (config.data.index_folder / "index.faiss").exists()
    with pytest.raises(IndexMismatch, match="no whole index"):
        load(config)
    done = batches_done(config)
    with caplog.at_level(logging.INFO):
        build_index(with_settings(config, index_checkpoint_s=10))
    assert f"resuming the embeddings: {done} of 313 batches were done" in caplog.text
    stored = np.load(config.data.index_folder / "embeddings.npy")
    assert np.array_equal(stored, HashingEncoder().encode([passage(n)["contents"] for n in range(20_000)], "passage"))
    assert load(config).answer([(query(77) + " m12345", 1)])


def kill_after_batches(config: Config, batches: int) -> None:
    """Start the real command and SIGKILL it in the middle of encoding."""
    path = config.data.directory / "run.toml"
    path.write_text(show_config(config))
    command = [sys.executable, "-m", "services.retriever", "index", "build", "--config", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (config.data.index_folder / "embeddings.npy.part").exists() or batches_done(config) < batches:
        assert process.poll() is None, "the build ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def batches_done(config: Config) -> int:
    path = config.data.index_folder / "embeddings.json"
    return json.loads(path.read_text())["batches_done"] if path.exists() else 0


# -- several workers ---------------------------------------------------------------------------------------------------


def test_workers_make_the_same_embeddings(built: Config, tmp_path: Path) -> None:
    several = make_config(tmp_path / "several", rows=70, index_workers=2, index_threads=2)
    build_index(several)
    assert np.array_equal(
        np.load(several.data.index_folder / "embeddings.npy"), np.load(built.data.index_folder / "embeddings.npy")
    )


def test_killed_worker_stops_the_build_and_what_was_done_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(tmp_path, rows=20_000, index_workers=2, index_checkpoint_s=0)

    def kill_one() -> None:
        until(lambda: batches_done(config) > 5)
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(RetrieverError, match=r"encoder-\d ended with exit code -9 .*run the build again"):
        build_index(config)
    killer.join()
    assert not multiprocessing.active_children()
    done = batches_done(config)
    assert 5 < done < 313
    with caplog.at_level(logging.INFO):
        build_index(with_settings(config, index_workers=1, index_checkpoint_s=10))
    assert f"resuming the embeddings: {done} of 313 batches were done" in caplog.text
    stored = np.load(config.data.index_folder / "embeddings.npy")
    assert np.array_equal(stored, HashingEncoder().encode([passage(n)["contents"] for n in range(20_000)], "passage"))


def test_workers_end_when_the_builder_is_killed(tmp_path: Path) -> None:
    config = make_config(tmp_path, rows=20_000, index_workers=2, index_checkpoint_s=0)
    kill_after_batches(config, 5)
    mark = str(config.data.directory).encode()
    until(lambda: not [p for p in Path("/proc").glob("[0-9]*/maps") if mark in maps(p)])


def maps(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


def test_what_a_worker_says_reaches_the_builder(tmp_path: Path) -> None:
    config = make_config(tmp_path, rows=70, index_workers=2)
    corpus = Corpus.open(config.data.corpus_path)
    wrong = replace(describe_encoder(config, "passage"), dimension=8)
    part = tmp_path / "part.npy"
    np.save(part, np.zeros((70, 8), np.float32))
    with pytest.raises(RetrieverError, match=r"encoder-\d: .*the model gives 1024 numbers, its config.json says 8"):
        list(encode_in_workers(iter([[0], [1]]), 2, corpus.path, wrong, part, 1))


@pytest.mark.parametrize("name", ["embeddings.npy", "embeddings.npy.part"])
def test_truncated_embeddings_are_named_with_the_mend(built: Config, name: str) -> None:
    folder = built.data.index_folder
    (folder / "manifest.json").unlink()
    content = (folder / "embeddings.npy").read_bytes()
    (folder / "embeddings.npy").unlink()
    (folder / name).write_bytes(content[:-100])
    with pytest.raises(RetrieverError, match=rf"{name}: not whole .*; remove it, and it is encoded again"):
        build_index(built)

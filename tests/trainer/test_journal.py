"""The journal and those who listen to it: what a resumed run keeps, in the file, in TensorBoard, in W&B and for Prometheus."""

from __future__ import annotations

import json
import logging
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from services.contract.config import Config, ConfigError
from services.trainer.monitoring.exporter import Exporter
from services.trainer.monitoring.journal import Journal
from services.trainer.monitoring.loggers import TensorBoard, open_listeners
from tests.conftest import free_port


def written(folder: Path, steps: int = 3) -> tuple[Journal, int]:
    """A warm start of two steps and some of GRPO; the checkpoint, whose length is returned, was made after the second of them."""
    journal, length = Journal(folder, 0), 0
    for step in (1, 2):
        journal.record("warm_start", step, {"warm_start/loss": 1.0 / step})
    journal.record("evaluation", 0, {"label": "warm", "eval/exact_match": 0.25})
    for step in range(1, steps + 1):
        journal.record("grpo", step, grpo_row(step))
        length = journal.length() if step == 2 else length
    journal.record("warning", steps, {"sign": "format", "text": "look"})
    journal.record("evaluation", steps, {"label": "grpo", "eval/exact_match": 0.5})
    return journal, length


def grpo_row(step: int) -> dict[str, Any]:
    return {"reward/mean": step / 10, "reward/groups": 4.0, "search/model_tokens_total": 100.0, "staleness/histogram": [3, 1]}


def test_a_resumed_journal_drops_what_the_checkpoint_does_not_contain(tmp_path: Path) -> None:
    _, length = written(tmp_path)
    resumed = Journal(tmp_path, length)
    assert [row["step"] for row in resumed.rows("grpo")] == [1, 2] == [row["step"] for row in resumed.steps]
    assert [row["step"] for row in resumed.rows("warm_start")] == [1, 2]
    assert resumed.rows("warning") == [] and [row["label"] for row in resumed.rows("evaluation")] == ["warm"]
    assert all(json.loads(line) for line in resumed.path.read_text().splitlines())


@pytest.mark.parametrize("length", [None, 10_000])
def test_a_row_that_a_crash_tore_is_dropped(tmp_path: Path, length: int | None) -> None:
    journal = Journal(tmp_path, 0)
    journal.record("grpo", 1, {"reward/mean": 0.1})
    with journal.path.open("a") as file:
        file.write('{"kind": "grpo", "st')
    assert [row["step"] for row in Journal(tmp_path, length).rows("grpo")] == [1]


def test_a_journal_that_lost_rows_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Journal(tmp_path, 0).record("grpo", 1, {"reward/mean": 0.1})
    Journal(tmp_path, 10_000)
    assert "metrics.jsonl is shorter than when the checkpoint was made: rows are missing" in caplog.text


def test_a_run_without_a_checkpoint_begins_its_journal_anew(tmp_path: Path) -> None:
    Journal(tmp_path, 0).record("evaluation", 0, {"label": "start"})
    assert Journal(tmp_path, 0).path.read_bytes() == b""


def test_a_listener_that_fails_does_not_stop_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        def record(self, row: dict[str, Any]) -> None:
            raise RuntimeError("no connection")

        def end(self) -> None: ...

    journal = Journal(tmp_path, 0)
    journal.listeners.append(Failing())
    journal.record("grpo", 1, {"reward/mean": 0.5})
    assert "Failing could not be told of step 1" in caplog.text and len(journal.rows("grpo")) == 1


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder))
    board.Reload()
    return {tag: [(e.step, round(e.value, 3)) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_tensorboard_has_every_step_once_after_a_crash_and_keeps_the_warm_start(tmp_path: Path) -> None:
    journal, length = written(tmp_path)
    board = TensorBoard(tmp_path / "tensorboard", [])
    for row in journal.rows():
        board.record(row)  # and then a crash: never closed
    resumed = Journal(tmp_path, length)
    again = TensorBoard(tmp_path / "tensorboard", resumed.rows())
    resumed.listeners.append(again)
    resumed.record("grpo", 3, {"reward/mean": 0.9})
    resumed.end()
    shown = scalars(tmp_path / "tensorboard")
    assert shown["reward/mean"] == [(1, 0.1), (2, 0.2), (3, 0.9)]
    assert shown["warm_start/loss"] == [(1, 1.0), (2, 0.5)]
    assert shown["eval/exact_match"] == [(0, 0.25)]


def metrics(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        lines = reply.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def test_prometheus_reads_the_last_figures_and_counts(tmp_path: Path) -> None:
    (journal, _), port = written(tmp_path, steps=1), free_port()
    exporter = Exporter("127.0.0.1", port, {"reward/mean": 0.1})
    journal.listeners.append(exporter)
    try:
        journal.record("grpo", 2, grpo_row(2))
        journal.record("grpo", 3, grpo_row(3))
        journal.record("warning", 3, {"sign": "format", "text": "look"})
        journal.record("evaluation", 3, {"label": "step3", "eval/f1": 0.5, "eval/capital/f1": 0.75})
        journal.end()
        found = metrics(port)
    finally:
        exporter.stop()
    assert found["forage_trainer_reward_mean"] == 0.3 and found["forage_trainer_step"] == 3
    assert found["forage_trainer_steps_total"] == 2 and found["forage_trainer_groups_total"] == 8
    assert found["forage_trainer_tokens_total"] == 200 and found['forage_trainer_warnings_total{sign="format"}'] == 1
    assert found['forage_trainer_eval_f1{source="all"}'] == 0.5 and found['forage_trainer_eval_f1{source="capital"}'] == 0.75


def test_a_port_that_is_taken_is_told_with_its_key() -> None:
    port = free_port()
    first = Exporter("127.0.0.1", port, {})
    try:
        with pytest.raises(ConfigError, match=r"set trainer\.metrics_port to a free port"):
            Exporter("127.0.0.1", port, {})
    finally:
        first.stop()


def wandb_config(folder: Path) -> Config:
    return Config.model_validate({"run": {"name": "test", "directory": str(folder), "wandb": True}})


def test_without_the_package_a_run_that_asks_for_wandb_stops_with_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    config = wandb_config(tmp_path)
    with pytest.raises(ConfigError, match=r"pip install 'forage\[wandb\]'\), or set run.wandb to false"):
        open_listeners(config, Journal(config.run.folder, 0))


def test_a_wandb_that_wants_a_login_stops_the_run_with_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra `wandb` is not installed")

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("no API key configured")

    monkeypatch.setattr(wandb, "init", refuse)  # the real one would ask the network
    config = wandb_config(tmp_path)
    with pytest.raises(ConfigError, match="no API key configured.*WANDB_MODE=offline"):
        open_listeners(config, Journal(config.run.folder, 0))


def test_wandb_is_not_imported_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = Config.model_validate({"run": {"name": "test", "directory": str(tmp_path)}})
    journal = Journal(config.run.folder, 0)
    open_listeners(config, journal)
    journal.end()
    assert [type(listener).__name__ for listener in journal.listeners] == ["TensorBoard"]


def wandb_records(path: Path) -> bytes:
    """The records of an offline run, one after the other.

    The file is a header of 7 bytes and LevelDB's log format: blocks of 32 KiB, in which a record is cut into pieces, each with a
    checksum (4 bytes), a length (2) and a type (1).
    """
    data, at, records = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size = int.from_bytes(data[at + 4 : at + 6], "little")
        records += data[at + 7 : at + 7 + size]
        at += 7 + size
    return records


def test_wandb_gets_every_figure_once_in_one_run_that_a_resume_goes_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = wandb_config(tmp_path)
    with caplog.at_level(logging.WARNING):
        journal = Journal(config.run.folder, 0)
        open_listeners(config, journal)
        journal.record("warm_start", 1, {"warm_start/loss": 1.5})
        journal.record("grpo", 1, {"reward/mean": 0.125})
        journal.record("grpo", 2, {"reward/mean": 0.25})
        journal.record("evaluation", 1, {"label": "step1", "eval/f1": 0.5})  # gathered after the step it was fed at
        journal.end()
    (first,) = (config.run.folder / "wandb").glob("offline-run-*/*.wandb")
    kept = wandb_records(first)
    assert all(word in kept for word in (b"warm_start/loss", b"reward/mean", b"0.125", b"0.25", b"eval/f1", b"eval/step"))
    assert "monotonically" not in caplog.text, "no report was refused for going backwards"
    name = (config.run.folder / "wandb.id").read_text()
    resumed = Journal(config.run.folder, None)
    open_listeners(config, resumed)
    resumed.end()
    assert name == (config.run.folder / "wandb.id").read_text() and first.stem == f"run-{name}"

"""What a run's folder tells to those outside: journal, checkpoints, heartbeats; whole, torn or not there."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from services.contract.config import Config
from services.contract.weights import publish
from services.suite.attention import file_attention
from services.suite.redis_address import address_file
from services.suite.run_files import TAIL_BYTES, Part, read_parts, read_progress
from tests.suite.conftest import configure


@pytest.fixture
def here(tmp_path: Path) -> Config:
    """A run that has only a folder."""
    config = configure(tmp_path, "redis://127.0.0.1:1/0", FORAGE_TRAINER__STEPS="9")
    config.run.folder.mkdir(parents=True)
    return config


def write_journal(config: Config, *lines: str) -> None:
    (config.run.folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def row(kind: str, step: int, **values: object) -> str:
    return json.dumps({"kind": kind, "step": step, **values})


def test_the_last_row_of_each_kind_and_the_rewards_are_kept(here: Config) -> None:
    write_journal(
        here,
        row("evaluation", 0, label="start", **{"eval/exact_match": 0.1}),
        row("warm_start", 1, **{"warm_start/loss": 2.0}),
        row("warm_start", 2, **{"warm_start/loss": 1.0}),
        row("grpo", 1, **{"reward/mean": 0.25}),
        row("grpo", 2, **{"reward/mean": 0.5}),
    )
    progress = read_progress(here, [])
    assert progress.step and progress.step["step"] == 2
    assert progress.warm_start and progress.warm_start["warm_start/loss"] == 1.0
    assert [e["label"] for e in progress.evaluations] == ["start"]
    assert progress.rewards == [0.25, 0.5] and progress.steps == 9
    assert progress.written_s is not None and progress.written_s < 60 and progress.problem is None


def test_a_run_without_a_folder_has_nothing_to_tell(tmp_path: Path) -> None:
    progress = read_progress(configure(tmp_path, "redis://127.0.0.1:1/0"), [])
    assert (progress.stage, progress.step, progress.written_s, progress.problem) == (None, None, None, None)


def test_a_line_that_is_torn_or_no_row_is_left_out_and_said(here: Config) -> None:
    write_journal(here, row("grpo", 1, **{"reward/mean": 0.5}), '{"kind": "grpo", "st', "[1]", '{"kind": 3}')
    progress = read_progress(here, [])
    assert progress.step and progress.step["step"] == 1
    assert progress.problem and "3 torn line(s) left out" in progress.problem


def test_a_figure_that_is_no_number_stays_visible_and_the_json_stays_valid(here: Config) -> None:
    write_journal(here, '{"kind": "grpo", "step": 1, "reward/mean": NaN, "objective/grad_norm": Infinity}')
    progress = read_progress(here, [])
    assert progress.step and (progress.step["reward/mean"], progress.step["objective/grad_norm"]) == ("NaN", "Infinity")
    assert progress.rewards == []


def test_of_a_long_journal_the_end_is_read_and_no_line_by_half(here: Config) -> None:
    lines = [row("grpo", step, **{"reward/mean": 0.5, "filling": "x" * 500}) for step in range(2 * TAIL_BYTES // 500)]
    write_journal(here, *lines)
    progress = read_progress(here, [])
    assert progress.step and progress.step["step"] == len(lines) - 1
    assert progress.problem is None


def test_a_sign_of_collapse_is_told_while_it_shows(here: Config) -> None:
    told = row("warning", 2, sign="format", text="reward/format is 0.7"), row("warning", 2, sign="gradient", text="a spike")
    write_journal(here, row("grpo", 2), *told, row("grpo", 3, **{"warnings/format": 1.0, "warnings/gradient": 0.0}))
    progress = read_progress(here, [])
    assert progress.warnings == ["step 2: reward/format is 0.7"]
    assert list(file_attention(progress, [])) == progress.warnings


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_journal_that_may_not_be_read_is_said(here: Config) -> None:
    write_journal(here, row("grpo", 1, **{"reward/mean": 0.5}))
    (here.run.folder / "metrics.jsonl").chmod(0)
    assert "cannot be read" in (read_progress(here, []).problem or "")


def test_a_journal_that_is_a_folder_is_said(here: Config) -> None:
    (here.run.folder / "metrics.jsonl").mkdir()
    assert "cannot be read" in (read_progress(here, []).problem or "")


def test_the_stage_is_the_trainers_word_else_the_newest_checkpoints(here: Config) -> None:
    def write(folder: Path) -> None:
        (folder / "ledger.json").write_text(json.dumps({"stage": "warm_start"}))

    publish(here.run.folder / "checkpoints", 1, 0, write)
    progress = read_progress(here, [])
    assert (progress.stage, progress.stage_from) == ("warm_start", "its last checkpoint")
    progress = read_progress(here, [Part("trainer", "ready: grpo", 1.0)])
    assert (progress.stage, progress.stage_from) == ("grpo", "its heartbeat")


def test_heartbeats_are_read_while_the_local_suite_runs(here: Config) -> None:
    suite = address_file(here).parent
    suite.mkdir()
    (suite / "trainer.heartbeat").write_text("ready: grpo")
    os.utime(suite / "trainer.heartbeat", (time.time() - 100, time.time() - 100))
    assert read_parts(here) == [], "the suite that wrote it has ended"
    address_file(here).write_text("redis://127.0.0.1:1/0")
    (part,) = read_parts(here)
    assert (part.name, part.state) == ("trainer", "ready: grpo") and 99 < part.age_s < 160

"""Checkpoints are whole or not used, and what they list as consumed stays consumed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.ledger import Checkpoints, Ledger, Stage


def state(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_text(text)
    return folder


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    (tmp_path / "checkpoints").mkdir()
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def test_a_fresh_run_has_no_checkpoint(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest() is None


def test_state_and_ledger_come_back_together(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.save(Ledger(stage="grpo", step=7, version=9, next_index=3, consumed_beyond=[5]), state(tmp_path / "s", "seven"))
    path, ledger = checkpoints.latest()
    assert (ledger.stage, ledger.step, ledger.version, ledger.consumed_beyond) == ("grpo", 7, 9, [5])
    assert (path / "model.bin").read_text() == "seven"


def test_the_last_two_are_kept(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for step in range(4):
        checkpoints.save(Ledger(step=step), state(tmp_path / "s", str(step)))
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["v000003", "v000004"]


@pytest.mark.parametrize("damage", ["altered", "short", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over(checkpoints: Checkpoints, tmp_path: Path, damage: str) -> None:
    checkpoints.save(Ledger(step=1), state(tmp_path / "s", "good"))
    path = checkpoints.save(Ledger(step=2), state(tmp_path / "s", "newer"))
    model = path / "model.bin"
    match damage:
        case "altered":
            model.write_text("newxr")
        case "short":
            model.write_text("new")
        case "missing":
            model.unlink()
        case "no manifest":
            (path / "manifest.json").unlink()
    assert checkpoints.latest()[1].step == 1


@pytest.mark.parametrize(
    ("stage", "step", "goes_on"),
    [
        ("evaluate_start", 0, "evaluate_start"),
        ("warm_start", 0, "warm_start"),
        ("evaluate_warm", 0, "evaluate_warm"),
        ("grpo", 3, "grpo"),
        ("evaluate_final", 3, "grpo"),
        ("evaluate_final", 5, "evaluate_final"),
        ("done", 3, "grpo"),
        ("done", 5, "done"),
        ("done", 9, "done"),
    ],
)
def test_a_run_whose_steps_were_raised_goes_on_where_it_ended(stage: Stage, step: int, goes_on: Stage) -> None:
    ledger = Ledger(stage=stage, step=step)
    assert ledger.reopen(steps=5) == (stage != goes_on)
    assert (ledger.stage, ledger.step) == (goes_on, step)


def test_a_ledger_written_before_there_were_references_is_read() -> None:
    old = msgspec.json.encode({"stage": "grpo", "step": 3, "version": 4, "next_index": 9})
    assert msgspec.json.decode(old, type=Ledger).reference_step == 0


@given(st.permutations(range(12)))
def test_consuming_in_any_order_moves_the_cursor_to_the_first_gap(order: list[int]) -> None:
    ledger = Ledger()
    for position, index in enumerate(order):
        ledger.consume([index])
        consumed = set(order[: position + 1])
        first_gap = next(i for i in range(13) if i not in consumed)
        assert ledger.next_index == first_gap
        assert all(ledger.is_consumed(i) == (i in consumed) for i in range(12))
        assert len(ledger.consumed_beyond) == len(consumed) - first_gap

"""Checkpoints are whole or not used; which are kept, and which make room on a full disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.contract.config.trainer import TrainerConfig
from services.contract.weights import WeightsError
from services.trainer.durable.checkpoints import Checkpoints
from services.trainer.durable.ledger import Ledger


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


DAMAGES = ["altered", "short", "missing", "no ledger", "torn manifest", "no manifest"]


def damage(checkpoint: Path, how: str) -> None:
    model, manifest = checkpoint / "model.bin", checkpoint / "manifest.json"
    match how:
        case "altered":
            model.write_bytes(bytes([model.read_bytes()[0] ^ 1]) + model.read_bytes()[1:])
        case "short":
            model.write_bytes(model.read_bytes()[:-1])
        case "missing":
            model.unlink()
        case "no ledger":
            (checkpoint / "ledger.json").unlink()
        case "torn manifest":
            manifest.write_bytes(manifest.read_bytes()[:40])
        case "no manifest":
            manifest.unlink()


def saved(checkpoints: Checkpoints, tmp_path: Path, *steps: int) -> list[Path]:
    return [checkpoints.save(Ledger(step=step), state(tmp_path / "s", f"step {step}")) for step in steps]


def steps_of(checkpoints: Checkpoints) -> list[int]:
    return [ledger.step for ledger in checkpoints.ledgers().values()]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_the_run_saves_again(checkpoints: Checkpoints, tmp_path: Path, how: str) -> None:
    damage(saved(checkpoints, tmp_path, 1, 2)[1], how)
    found = checkpoints.latest()
    assert found and found[1].step == 1
    saved(checkpoints, tmp_path, 2)
    found = checkpoints.latest()
    assert found and found[1].step == 2
    assert steps_of(checkpoints) == [1, 2], "the damaged one counts for nothing and is gone"


@pytest.mark.parametrize("how", DAMAGES[:-1])
def test_with_damaged_ones_only_a_person_must_say_whether_to_begin_anew(checkpoints: Checkpoints, tmp_path: Path, how: str) -> None:
    for path in saved(checkpoints, tmp_path, 1, 2):
        damage(path, how)
    with pytest.raises(WeightsError, match="none of 2 checkpoints in .* is whole: mend one, or move them away to begin anew"):
        checkpoints.latest()


def test_the_only_whole_one_outlives_a_newer_damaged_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    (whole,) = saved(checkpoints, tmp_path, 1)
    newer = tmp_path / "checkpoints" / "v000002"
    newer.mkdir()
    (newer / "manifest.json").write_text("{")
    assert checkpoints.latest() is not None
    with pytest.raises(FileNotFoundError):
        checkpoints.save(Ledger(step=2), tmp_path / "no such state")
    assert whole.exists(), "nothing is deleted before a newer one is whole"


def test_every_so_many_steps_one_is_kept_for_ever(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, keep_every=4)
    saved(checkpoints, tmp_path, 0, 2, 4, 6, 8, 8, 10, 12, 13)
    assert steps_of(checkpoints) == [4, 8, 12, 13]


def test_a_full_disk_gets_what_is_older_than_the_newest_whole_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=4, keep_every=2)
    *_, newest = saved(checkpoints, tmp_path, 1, 2, 3, 5)
    damage(newest, "short")
    assert checkpoints.make_room()
    assert steps_of(checkpoints) == [2, 3], "step 2's is kept for ever"
    assert not checkpoints.make_room(), "there is no more to give"


def test_a_full_disk_gets_nothing_while_none_is_whole(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for path in saved(checkpoints, tmp_path, 1, 2):
        damage(path, "short")
    assert not checkpoints.make_room()
    assert len(list(checkpoints.folder.iterdir())) == 2


def test_steps_that_are_never_saved_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match="keep_every 6 is no multiple of checkpoint_every 4: change one"):
        TrainerConfig(checkpoint_every=4, keep_every=6)
    assert TrainerConfig(checkpoint_every=4, keep_every=8).keep_every == 8

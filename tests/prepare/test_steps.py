"""What is made, skipped and made again; and what an interruption leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.prepare.errors import PrepareError
from services.prepare.steps import Step, manifest_path, run_step, why_remake


def file_step(path: Path, text: str = "content", **inputs: object) -> Step:
    return Step("file", path, inputs, lambda out: void(out.write_text(text)))


def folder_step(path: Path, **inputs: object) -> Step:
    def make(out: Path) -> None:
        out.mkdir()
        (out / "a").write_text("first")
        (out / "b").write_text("second")

    return Step("folder", path, inputs, make)


def void(_: object) -> None:
    pass


@pytest.fixture(params=[file_step, folder_step], ids=["file", "folder"])
def step(request: pytest.FixtureRequest, tmp_path: Path) -> Step:
    return request.param(tmp_path / "output", setting=1)


def test_a_whole_output_is_skipped(step: Step) -> None:
    assert run_step(step) is True
    assert run_step(step) is False


def test_changed_settings_are_named_and_remade(step: Step) -> None:
    run_step(step)
    changed = Step(step.name, step.output, {"setting": 2}, step.make)
    assert "setting" in (why_remake(changed) or "")
    assert run_step(changed) is True
    assert why_remake(changed) is None


def test_an_output_without_its_manifest_is_remade(step: Step) -> None:
    run_step(step)
    manifest_path(step.output).unlink()
    assert why_remake(step) == "it was not finished"
    assert run_step(step) is True


def test_an_unreadable_manifest_is_remade(step: Step) -> None:
    run_step(step)
    manifest_path(step.output).write_text("{")
    assert run_step(step) is True


@pytest.mark.parametrize("damage", ["truncate", "change", "delete"])
def test_a_damaged_file_is_remade(step: Step, damage: str) -> None:
    run_step(step)
    victim = step.output / "b" if step.output.is_dir() else step.output
    before = victim.read_text()
    if damage == "delete":
        victim.unlink()
    else:
        victim.write_text(before[:-1] if damage == "truncate" else "x" * len(before))
    assert run_step(step) is True
    assert victim.read_text() == before


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        out.write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        run_step(Step("file", tmp_path / "output", {}, fail))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_remake_keeps_the_old_output(tmp_path: Path) -> None:
    good = file_step(tmp_path / "output", setting=1)
    run_step(good)

    def fail(out: Path) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        run_step(Step("file", good.output, {"setting": 2}, fail))
    assert why_remake(good) is None


def test_a_temporary_of_a_killed_run_is_cleared(step: Step) -> None:
    step.temporary.mkdir()
    (step.temporary / "half").write_text("half")
    run_step(step)
    assert not step.temporary.exists()
    assert not (step.output / "half").exists()


def test_a_disk_error_is_told_with_name_and_mend(tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file where a folder should be")
    with pytest.raises(PrepareError, match="file: .*blocked/output could not be made.*start again"):
        run_step(file_step(tmp_path / "blocked" / "output"))


def test_the_manifest_describes_every_file(tmp_path: Path) -> None:
    step = folder_step(tmp_path / "output")
    run_step(step)
    files = json.loads(manifest_path(step.output).read_text())["files"]
    assert {name: entry["bytes"] for name, entry in files.items()} == {"a": 5, "b": 6}

"""A full disk is waited for, and what is written lies there whole or not at all."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.contract.weights import NoSpace
from services.trainer.durable import room
from services.trainer.durable.room import copy_durably, full_disk_told, pause, when_there_is_room, write_durably
from services.trainer.monitoring.journal import Journal
from services.trainer.ranks import StopRequested

# TensorBoard writes in a thread, which ends with the full disk's error before the trainer hears of it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def test_it_is_tried_until_there_is_room() -> None:
    told: list[str] = []

    def write() -> str:
        if len(told) < 2:
            raise NoSpace("full: free some space")
        return "written"

    assert when_there_is_room(write, told.append) == "written"
    assert told[1].startswith("full: free some space; waiting for room (try 2 of 10)")


def test_a_disk_that_stays_full_is_one_clear_error() -> None:
    told: list[str] = []

    def write() -> None:
        raise NoSpace("full: free some space")

    with pytest.raises(NoSpace, match="full: free some space"):
        when_there_is_room(write, told.append)
    assert len(told) == room.TRIES - 1


def test_only_a_full_disk_is_waited_for(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), full_disk_told(tmp_path):
        raise PermissionError(errno.EACCES, "not yours")


def test_a_stop_ends_the_wait() -> None:
    def stop() -> None:
        raise StopRequested

    with pytest.raises(StopRequested):
        pause(stop)


def test_a_file_and_a_folder_replace_what_was_there(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for text in ("old", "new"):
        write_durably(source / "a", text)
        copy_durably(source, target)
    assert (target / "a").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A real volume of 64 KiB with one block left."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("mounting a small volume needs root")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def test_half_a_file_or_folder_is_no_file_or_folder(full_disk: Path, tmp_path: Path) -> None:
    write_durably(full_disk / "kept", "old")
    with pytest.raises(NoSpace, match="kept is full: free some space"):
        write_durably(full_disk / "kept", "x" * 100_000)
    assert (full_disk / "kept").read_text() == "old"
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_text("x" * 100_000)
    with pytest.raises(NoSpace):
        copy_durably(tmp_path / "source", full_disk / "copy")
    assert [path.name for path in full_disk.iterdir()] == ["kept"], "what was written by halves holds no space"


def test_a_row_that_does_not_fit_leaves_no_half_row(full_disk: Path) -> None:
    journal = Journal(full_disk, 0)
    journal.record("grpo", 1, {"reward/mean": 0.1})
    before = journal.path.read_bytes()
    with pytest.raises(NoSpace, match="metrics.jsonl is full"):
        journal.record("grpo", 2, {"text": "x" * 100_000})
    assert journal.path.read_bytes() == before

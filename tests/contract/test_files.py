"""A file is the old one or the new one, never half of either; a lock has one holder and goes with its process."""

from __future__ import annotations

import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from services.contract.files import CHUNK_BYTES, file_digest, hold_lock, replace_file

KILLED_BEFORE_THE_RENAME = """
import os, sys
from pathlib import Path
from services.contract import files
files.move_into_place = lambda *paths: os._exit(9)
files.replace_file(Path(sys.argv[1]), b"new")
"""

HOLDS_A_LOCK = """
import sys
from pathlib import Path
from services.contract.files import hold_lock
held = hold_lock(Path(sys.argv[1]))
print("held", flush=True)
input()
"""


def test_a_digest_is_of_every_chunk_and_tells_how_far_it_is(tmp_path: Path) -> None:
    content, told = b"ab" * CHUNK_BYTES, []
    (tmp_path / "a").write_bytes(content + b"c")
    assert file_digest(tmp_path / "a", told.append) == sha256(content + b"c").hexdigest()
    assert told == [CHUNK_BYTES, CHUNK_BYTES, 1]


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    for content in (b"old and longer", b"new"):
        replace_file(tmp_path / "a", content)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"new"}


def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path: Path) -> None:
    replace_file(tmp_path / "a", b"old")
    command = [sys.executable, "-c", KILLED_BEFORE_THE_RENAME, str(tmp_path / "a")]
    assert subprocess.run(command).returncode == 9
    assert (tmp_path / "a").read_bytes() == b"old"
    replace_file(tmp_path / "a", b"newer")
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "what the killed one left is cleared by the next"


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()  # a file cannot take a folder's name
    with pytest.raises(OSError):
        replace_file(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_lock_is_refused_while_it_is_held(tmp_path: Path) -> None:
    with hold_lock(tmp_path / "lock"), pytest.raises(BlockingIOError):
        hold_lock(tmp_path / "lock")
    hold_lock(tmp_path / "lock").close()


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS_A_LOCK, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError):
            hold_lock(tmp_path / "lock")
        holder.kill()
        hold_lock(tmp_path / "lock", wait=True).close()

"""A full disk is told about and waited for: somebody may free it, and the run keeps what it has learned.

| what is written                        | a full disk                                                                        |
|----------------------------------------|------------------------------------------------------------------------------------|
| a policy version (publishing/)         | waited for; older versions that no engine reads are deleted first                  |
| a checkpoint                           | waited for; older ones are deleted first, if the newest is whole                   |
| the journal, transcripts, a reference, | waited for; half a row or half a folder is taken back first                        |
| the answers of an evaluation           |                                                                                    |
| TensorBoard and other listeners        | told about; the journal has the figures                                            |

Who waits too long ends with one clear error; the next start goes on from the last checkpoint.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from services.contract.config import ConfigError
from services.contract.files import move_into_place, replace_file, sync
from services.contract.weights import NoSpace

T = TypeVar("T")
Patiently = Callable[[Callable[[], object]], object]
"""Runs what it is given until the disk has room for it."""
TRIES, WAIT_S = 10, 30.0


def when_there_is_room(work: Callable[[], T], wait: Callable[[str], object]) -> T:
    """Run `work`; while it raises NoSpace, `wait` with a word on what is wrong, and run it again, TRIES times in all.

    All ranks may run this together when `work` and `wait` end on all of them alike.
    """
    for attempt in range(1, TRIES):
        try:
            return work()
        except NoSpace as error:
            wait(f"{error}; waiting for room (try {attempt} of {TRIES})")
    return work()


def pause(check_stop: Callable[[], object]) -> None:
    """WAIT_S seconds, left by what `check_stop` raises."""
    deadline = time.monotonic() + WAIT_S
    while (left := deadline - time.monotonic()) > 0:
        check_stop()
        time.sleep(min(left, 1.0))


@contextmanager
def full_disk_told(path: Path, take_back: Callable[[], object] = lambda: None) -> Iterator[None]:
    """A disk that fills up inside raises NoSpace, once `take_back` has removed what was written by halves."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        take_back()
        raise NoSpace(f"the disk of {path} is full: free some space") from error


def write_durably(path: Path, text: str) -> None:
    """The whole file or none of it, in place of what was there. Raises NoSpace."""
    with full_disk_told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())


def copy_durably(source: Path, target: Path) -> None:
    """The files of a folder, all or none of them, in place of what was there; a manifest comes along.

    Raises NoSpace, and ConfigError when there is nothing to copy.
    """
    if not source.exists():
        raise ConfigError(
            f"the policy {source} is gone, and {target.name} must be a copy of it: put it back, or start the trainer again, which "
            "publishes its weights anew"
        )
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    with full_disk_told(target, take_back=lambda: shutil.rmtree(temporary, ignore_errors=True)):
        _copy_files(source, temporary)
    shutil.rmtree(target, ignore_errors=True)
    move_into_place(temporary, target)


def _copy_files(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file():
            shutil.copyfile(path, target / path.name)
            sync(target / path.name)

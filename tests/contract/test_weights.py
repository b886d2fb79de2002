"""A policy version is on the volume whole or not at all, whatever kills the writer; a damaged one is named."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from services.contract.weights import (
    MANIFEST,
    NoSpace,
    WeightsError,
    collect_garbage,
    publish,
    published_versions,
    read_manifest,
    verify,
    version_folder,
)
from tests.torn_weights import change_manifest


def write_model(folder: Path, size: int = 1000) -> None:
    (folder / "model.safetensors").write_bytes(b"w" * size)
    (folder / "config.json").write_text('{"hidden_size": 8}')


def publish_several(root: Path, *versions: int) -> None:
    for version in versions:
        publish(root, version, version - 1, write_model)


def test_a_published_version_is_whole_and_says_what_it_is(tmp_path: Path) -> None:
    path = publish(tmp_path, 7, 6, write_model)
    assert path == version_folder(tmp_path, 7) == tmp_path / "v000007"
    manifest = verify(path)
    assert (manifest.version, manifest.parent) == (7, 6)
    assert {name: entry.bytes for name, entry in manifest.files.items()} == {"model.safetensors": 1000, "config.json": 18}
    assert all(manifest.files[name].blake3 == blake3((path / name).read_bytes()).hexdigest() for name in manifest.files)
    assert published_versions(tmp_path) == [7]
    assert [path.name for path in tmp_path.iterdir()] == ["v000007"], "nothing else is left"


def test_versions_are_listed_by_number_and_nothing_else_is(tmp_path: Path) -> None:
    publish_several(tmp_path, 10, 9, 1_000_000)
    for name in (".writing-v000011", "v12", "v000013x", "notes"):
        (tmp_path / name).mkdir()
    assert published_versions(tmp_path) == [9, 10, 1_000_000]
    assert published_versions(tmp_path / "nowhere") == []


def test_a_version_is_never_written_twice(tmp_path: Path) -> None:
    publish(tmp_path, 1, 0, write_model)
    with pytest.raises(WeightsError, match="exists already.*higher number"):
        publish(tmp_path, 1, 0, lambda folder: write_model(folder, 5))
    assert verify(version_folder(tmp_path, 1)).files["model.safetensors"].bytes == 1000


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write_model(folder)
        raise RuntimeError("no such tensor")

    with pytest.raises(RuntimeError, match="no such tensor"):
        publish(tmp_path, 1, 0, fail)
    assert list(tmp_path.iterdir()) == []


def alter(folder: Path) -> None:
    body = bytearray((folder / "model.safetensors").read_bytes())
    body[500] ^= 1
    (folder / "model.safetensors").write_bytes(body)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "one bit": (alter, "model.safetensors does not have the digest"),
    "a short file": (
        lambda f: os.truncate(f / "model.safetensors", 999),
        "model.safetensors has 999 bytes, the manifest says 1000",
    ),
    "a missing file": (lambda f: (f / "config.json").unlink(), "config.json is missing from version 1"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "has no manifest.json"),
    "a torn manifest": (lambda f: os.truncate(f / MANIFEST, 20), "manifest.json cannot be read"),
    "an empty manifest": (lambda f: (f / MANIFEST).write_text("{}"), "manifest.json cannot be read"),
    "no digest": (
        change_manifest(lambda manifest: manifest["files"]["model.safetensors"].pop("blake3")),
        "model.safetensors does not have the digest",
    ),
    "no folder": (shutil.rmtree, "has no manifest.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_named(tmp_path: Path, name: str) -> None:
    folder = publish(tmp_path, 1, 0, write_model)
    damage, told = DAMAGES[name]
    damage(folder)
    with pytest.raises(WeightsError, match=re.escape(told)):
        verify(folder)


def test_a_manifest_of_before_is_held_against_its_sha256(tmp_path: Path) -> None:
    folder = publish(tmp_path, 1, 0, write_model)

    def as_before(manifest: dict) -> None:
        for name, entry in manifest["files"].items():
            entry["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            del entry["blake3"]

    change_manifest(as_before)(folder)
    assert verify(folder).version == 1
    alter(folder)
    with pytest.raises(WeightsError, match="does not have the digest"):
        verify(folder)


# Each child publishes and is killed at its n-th file operation; one child a line, until one comes through.
KILLED_WRITERS = """
import os, signal, sys
from pathlib import Path
from services.contract.weights import publish
from tests.contract.test_weights import write_model

def kill_at(number):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event == "open" or event.startswith(("os.", "shutil.")):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

for number in range(1, 200):
    child = os.fork()
    if child == 0:
        kill_at(number)
        publish(Path(sys.argv[1]) / str(number), 1, 0, write_model)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(number, os.waitstatus_to_exitcode(status), flush=True)
    if status == 0:
        break
"""


def test_a_writer_killed_at_any_file_operation_leaves_no_version_or_a_whole_one(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED_WRITERS, str(tmp_path)], capture_output=True, text=True, timeout=60)
    codes = [int(line.split()[1]) for line in ended.stdout.splitlines()]
    assert codes[-1] == 0 and set(codes[:-1]) == {-9}, ended.stderr
    assert len(codes) > 12, "the kills should cover every step of a publish"
    outcomes = set()
    for number in range(1, len(codes) + 1):
        root = tmp_path / str(number)
        versions = published_versions(root)
        outcomes.add((bool(versions), root.exists() and any(path.name.startswith(".writing") for path in root.iterdir())))
        if versions:
            verify(version_folder(root, 1))
        else:
            collect_garbage(root, keep_last=2, in_use=[])
            assert not root.exists() or list(root.iterdir()) == [], "what the writer left is cleaned up"
            verify(publish(root, 1, 0, write_model))
    assert outcomes == {(False, False), (False, True), (True, False)}, "before the first file, in the middle, after the rename"


def test_a_writer_that_follows_a_killed_one_writes_afresh(tmp_path: Path) -> None:
    left = tmp_path / ".writing-v000001"
    left.mkdir()
    (left / "stale.safetensors").write_bytes(b"old")
    folder = publish(tmp_path, 1, 0, write_model)
    assert "stale.safetensors" not in verify(folder).files and not left.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB. Needs the right to mount; elsewhere these tests are skipped, by name."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a full disk cannot be made without the right to mount: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_publishes_nothing_and_is_told(small_disk: Path) -> None:
    publish(small_disk, 1, 0, write_model)
    free = shutil.disk_usage(small_disk).free
    with pytest.raises(NoSpace, match="filled up while version 2 was written; nothing was published"):
        publish(small_disk, 2, 1, lambda folder: write_model(folder, 2 << 20))
    assert published_versions(small_disk) == [1] and [p.name for p in small_disk.iterdir()] == ["v000001"]
    assert shutil.disk_usage(small_disk).free == free
    verify(publish(small_disk, 2, 1, write_model))


def test_a_disk_filled_to_the_last_page_has_no_room_for_a_manifest(small_disk: Path) -> None:
    def fill(folder: Path) -> None:
        write_model(folder, shutil.disk_usage(small_disk).free - 3 * 4096)
        (folder / "last").write_bytes(b"x" * shutil.disk_usage(small_disk).free)

    with pytest.raises(NoSpace):
        publish(small_disk, 1, 0, fill)
    assert list(small_disk.iterdir()) == []


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(NoSpace, match="version 1 needs 1000000000.00 GB: free some space"):
        publish(tmp_path, 1, 0, write_model, bytes_needed=10**18)
    assert list(tmp_path.iterdir()) == []


def test_old_versions_are_deleted_but_for_the_last_and_those_in_use(tmp_path: Path) -> None:
    publish_several(tmp_path, 1, 2, 3, 4, 5, 6)
    assert collect_garbage(tmp_path, keep_last=2, in_use=[2, 99]) == [1, 3, 4]
    assert published_versions(tmp_path) == [2, 5, 6]
    for version in (2, 5, 6):
        verify(version_folder(tmp_path, version))
    assert collect_garbage(tmp_path, keep_last=2, in_use=[2]) == []
    assert collect_garbage(tmp_path, keep_last=2, in_use=[]) == [2]


def test_half_a_deletion_is_no_version_and_is_finished_later(tmp_path: Path) -> None:
    publish_several(tmp_path, 1, 2, 3)
    (version_folder(tmp_path, 1) / MANIFEST).unlink()
    assert published_versions(tmp_path) == [2, 3]
    assert collect_garbage(tmp_path, keep_last=2, in_use=[1]) == []
    assert not version_folder(tmp_path, 1).exists()


def test_garbage_of_others_is_left_alone(tmp_path: Path) -> None:
    publish_several(tmp_path, 1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.txt").write_text("mine")
    collect_garbage(tmp_path, keep_last=2, in_use=[])
    assert {path.name for path in tmp_path.iterdir()} == {"v000001", "notes", "readme.txt"}


def test_a_manifest_can_be_read_without_reading_the_weights(tmp_path: Path) -> None:
    folder = publish(tmp_path, 3, 2, write_model)
    (folder / "model.safetensors").unlink()
    assert read_manifest(folder).version == 3

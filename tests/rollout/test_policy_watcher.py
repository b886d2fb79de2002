"""Which version an engine is given: never a damaged one. The files and Redis are real, the engine only notes what it would load."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from services.contract import weights
from services.contract.policy import EngineReport, PolicyBoard, PolicyVersion
from services.rollout.policy_watcher import PolicyWatcher
from services.rollout.tasks import run_in
from services.rollout.version_files import VersionFiles
from tests.rollout.conftest import RUN, make_config
from tests.torn_weights import change_manifest

pytestmark = pytest.mark.asyncio
SHARDS = ("model-00001.safetensors", "model-00002.safetensors")


class EngineStandIn:
    """Notes the folders and versions that it is told to load."""

    def __init__(self) -> None:
        self.name, self.url, self.version = "e", "http://e", 0
        self.loaded: list[tuple[str, int]] = []

    async def update(self, model: str, version: int) -> None:
        self.loaded.append((model, version))


class Setting:
    def __init__(self, client: redis.Redis, folder: Path) -> None:
        model = folder / "model"
        model.mkdir()
        self.config = make_config(model, folder)
        self.board, self.engine = PolicyBoard(client, RUN), EngineStandIn()
        files = VersionFiles(self.config)
        self.watcher = PolicyWatcher(files, self.board, self.engine, "w", run_in(ThreadPoolExecutor(2)))  # type: ignore[arg-type]

    def publish(self, version: int) -> PolicyVersion:
        path = weights.publish(self.config.weights_folder, version, version - 1, write_shards)
        return PolicyVersion(version, str(path))

    def report(self) -> EngineReport:
        (report,) = self.board.live_engines()
        return report


@pytest.fixture
def setting(redis_client: redis.Redis, tmp_path: Path) -> Setting:
    return Setting(redis_client, tmp_path)


def write_shards(folder: Path) -> None:
    for number, name in enumerate(SHARDS):
        (folder / name).write_bytes(bytes([number]) * 1000)


def flip(folder: Path) -> None:
    body = bytearray((folder / SHARDS[1]).read_bytes())
    body[500] ^= 1
    (folder / SHARDS[1]).write_bytes(body)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped byte": (flip, "does not have the digest of the manifest"),
    "a truncated shard": (lambda f: os.truncate(f / SHARDS[0], 999), "has 999 bytes, the manifest says 1000"),
    "a missing shard": (lambda f: (f / SHARDS[0]).unlink(), f"{SHARDS[0]} is missing from version 1"),
    "a shard in place of the other": (lambda f: shutil.copyfile(f / SHARDS[0], f / SHARDS[1]), "does not have the digest"),
    "another digest in the manifest": (
        change_manifest(lambda m: m["files"][SHARDS[0]].update(blake3="0" * 64)),
        "does not have the digest of the manifest",
    ),
    "the manifest of another version": (change_manifest(lambda m: m.update(version=7)), "calls itself version 7, the board says 1"),
    "a torn manifest": (lambda f: os.truncate(f / weights.MANIFEST, 40), "manifest.json cannot be read"),
    "no manifest": (lambda f: (f / weights.MANIFEST).unlink(), "has no manifest.json"),
    "no folder": (shutil.rmtree, "has no manifest.json"),
}


@pytest.mark.parametrize("phase", ["staged", "current"])
@pytest.mark.parametrize("name", DAMAGES)
async def test_a_damaged_version_is_never_loaded_and_the_reason_is_told(setting: Setting, name: str, phase: str) -> None:
    damage, reason = DAMAGES[name]
    policy = setting.publish(1)
    damage(Path(policy.path))
    await setting.watcher.serves(0)
    (setting.board.stage if phase == "staged" else setting.board.commit)(policy)
    await setting.watcher.follow()
    assert setting.engine.loaded == []
    report = setting.report()
    assert reason in report.trouble and report.trouble.startswith("version 1: ")
    assert (report.version, report.staged) == (0, 0)
    assert report.state == ("ready" if phase == "staged" else "stale"), "it goes on serving the version before"


async def test_a_folder_that_vanishes_while_it_is_read_is_not_loaded(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = setting.publish(1)
    digest = weights.file_digest

    def vanish(path: Path, **kind: Any) -> str:
        found = digest(path, **kind)
        shutil.rmtree(path.parent, ignore_errors=True)
        return found

    monkeypatch.setattr(weights, "file_digest", vanish)
    await setting.watcher.serves(0)
    setting.board.commit(policy)
    await setting.watcher.follow()
    assert setting.engine.loaded == [] and "is missing from version 1" in setting.report().trouble


async def test_a_version_that_is_whole_again_is_loaded_and_the_trouble_is_over(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.rollout.policy_watcher.FIRST_RETRY_S", 0.05)
    monkeypatch.setattr(setting.watcher, "_retry_s", 0.05)
    policy = setting.publish(1)
    file = Path(policy.path) / SHARDS[1]
    whole = file.read_bytes()
    flip(Path(policy.path))
    setting.board.commit(policy)
    await setting.watcher.serves(0)
    await setting.watcher.follow()
    assert setting.engine.loaded == []
    file.write_bytes(whole)
    await asyncio.sleep(0.1)
    await setting.watcher.follow()
    assert setting.engine.loaded == [(policy.path, 1)]
    assert (setting.report().trouble, setting.report().version) == ("", 1)


async def test_while_a_version_is_verified_it_counts_as_read(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = setting.publish(1)
    seen: list[list[int]] = []
    verify = weights.verify

    def watched(folder: Path) -> weights.Manifest:
        seen.append(setting.report().reading)
        return verify(folder)

    monkeypatch.setattr(weights, "verify", watched)
    await setting.watcher.serves(0)
    setting.board.stage(policy)
    await setting.watcher.follow()
    assert seen == [[0, 1]]


async def test_what_a_starting_engine_reads_is_held_until_it_serves_or_is_lost(setting: Setting) -> None:
    """The trainer may publish twice in the half minute that a start takes, and keeps two versions."""
    setting.board.commit(setting.publish(2))
    await setting.watcher.starting_policy()
    assert setting.report().reading == [2]
    await setting.watcher.lost()
    assert setting.report().reading == []
    await setting.watcher.starting_policy()
    setting.board.commit(setting.publish(3))
    await setting.watcher.serves(2)
    await setting.watcher.follow()
    assert setting.report().reading == [3]


async def test_a_pushed_version_that_is_not_on_the_volume_leaves_a_late_engine_stale(setting: Setting) -> None:
    setting.publish(2)
    setting.board.commit(PolicyVersion(5, str(weights.version_folder(setting.config.weights_folder, 5)), pushed=True))
    path, version = await setting.watcher.starting_policy()
    assert (path.name, version) == ("v000002", 2), "it starts with the newest there is"
    await setting.watcher.serves(2)
    setting.engine.has_served = not_served  # type: ignore[attr-defined]
    await setting.watcher.follow()
    assert setting.report().state == "stale" and not setting.watcher.caught_up
    setting.publish(5)
    await setting.watcher.follow()
    assert setting.report().version == 5 and setting.watcher.caught_up


async def not_served(version: int) -> bool:
    return False


async def test_a_version_that_never_became_current_is_no_starting_policy(setting: Setting) -> None:
    setting.publish(2)
    setting.publish(6)
    setting.board.commit(PolicyVersion(5, "weights/v000005", pushed=True))
    assert (await setting.watcher.starting_policy())[1] == 2

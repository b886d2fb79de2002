"""A policy version goes out: written whole, verified by live engines, made current; a full disk publishes nothing."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import torch
from safetensors.torch import load_file, save_file

from services.contract.config import Config
from services.contract.policy import EngineReport, PolicyBoard, PolicyVersion
from services.contract.weights import NoSpace, verify, version_folder
from services.trainer.durable import room
from services.trainer.publishing import hf_folder
from services.trainer.publishing.hf_folder import write_hf_folder
from services.trainer.publishing.publish import Publisher

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


def make_publisher(redis_client: redis.Redis, model: Path, weights: Path, grace_s: float = 5) -> Publisher:
    sections = {"model": {"path": model}, "weights": {"directory": weights, "staging_grace_s": grace_s}}
    return Publisher(Config.model_validate(sections), PolicyBoard(redis_client, "quickstart"), check_stop=lambda: None)


def export() -> Iterator[tuple[str, torch.Tensor]]:
    return iter(TENSORS.items())


def test_a_published_version_is_a_whole_model_folder_and_current(redis_client: redis.Redis, model: Path, tmp_path: Path) -> None:
    publisher = make_publisher(redis_client, model, tmp_path / "w")
    publisher.publish(1, 0, export)
    path = version_folder(publisher.root, 1)
    verify(path)
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "manifest.json", "model.safetensors", "tokenizer.json"]
    assert all(torch.equal(load_file(path / "model.safetensors")[n], t) for n, t in TENSORS.items())
    assert publisher.board.current() == PolicyVersion(1, str(path)) and publisher.serves(1)


def test_large_models_are_written_in_shards_with_an_index(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_folder, "SHARD_BYTES", 20)
    target = tmp_path / "out"
    target.mkdir()
    write_hf_folder(target, model, export(), "float32")
    assert {p.name for p in target.glob("*.safetensors*")} == {
        "model-00001.safetensors",
        "model-00002.safetensors",
        "model.safetensors.index.json",
    }


def test_current_waits_for_every_live_engine_to_verify(redis_client: redis.Redis, model: Path, tmp_path: Path) -> None:
    publisher = make_publisher(redis_client, model, tmp_path / "w")
    board = publisher.board
    board.report(EngineReport("e1", "http://e1", "ready", version=0))
    thread = threading.Thread(target=publisher.publish, args=(1, 0, export))
    thread.start()
    time.sleep(1)
    assert board.staged().version == 1 and board.current() is None
    board.report(EngineReport("e1", "http://e1", "ready", version=0, staged=1))
    thread.join(5)
    assert board.current().version == 1


def test_a_laggard_does_not_hold_up_the_run_beyond_the_grace(redis_client: redis.Redis, model: Path, tmp_path: Path) -> None:
    publisher = make_publisher(redis_client, model, tmp_path / "w", grace_s=0.5)
    publisher.board.report(EngineReport("slow", "http://e", "ready", version=0))
    publisher.publish(1, 0, export)
    assert publisher.board.current().version == 1


def test_version_numbers_only_rise_even_past_a_lost_checkpoint(redis_client: redis.Redis, model: Path, tmp_path: Path) -> None:
    publisher = make_publisher(redis_client, model, tmp_path / "w")
    publisher.publish(7, 6, export)
    redis_client.flushall()
    assert publisher.next_version() == 8
    shutil.rmtree(publisher.root)
    publisher.board.commit(PolicyVersion(9, "gone"))
    assert publisher.next_version() == 10 and not publisher.serves(9)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real volume of 64 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("mounting a small volume needs root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_is_waited_for_and_the_version_goes_out_when_there_is_room(
    redis_client: redis.Redis, model: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(room, "WAIT_S", 0.3)
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 60_000)
    (model / "tokenizer.json").write_text("x" * 30_000)
    publisher = make_publisher(redis_client, model, small_disk)
    threading.Timer(0.8, ballast.unlink).start()
    publisher.publish(1, 0, export)
    path = version_folder(publisher.root, 1)
    verify(path)
    assert "nothing was published" in caplog.text or "free some space" in caplog.text


def test_a_disk_that_stays_full_is_one_clear_error_and_leaves_nothing(
    redis_client: redis.Redis, model: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "WAIT_S", 0.01)
    (model / "tokenizer.json").write_text("x" * 90_000)
    publisher = make_publisher(redis_client, model, small_disk)
    with pytest.raises(NoSpace, match="filled up while version 1 was written"):
        publisher.publish(1, 0, export)
    assert list(publisher.root.iterdir()) == [] and publisher.board.current() is None

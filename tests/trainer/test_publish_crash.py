"""A trainer that dies between the rename and the commit, and what the next one makes of it; versions that engines hold."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import torch

from services.contract.config import Config
from services.contract.policy import EngineReport, PolicyBoard, PolicyVersion
from services.contract.weights import published_versions, verify, version_folder
from services.trainer.publishing.publish import Publisher
from tests.reward.conftest import wait_until

RUN = "quickstart"
KILLED_TRAINER = """
import os, signal, sys
import redis
from services.contract.policy import PolicyBoard
from services.trainer.publishing.publish import Publisher
from tests.trainer.test_publish_crash import RUN, export, make_config

model, port, moment = sys.argv[1:]
board = PolicyBoard(redis.Redis(port=int(port)), RUN)
setattr(board, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
from pathlib import Path
Publisher(make_config(Path(model)), board, lambda: None).publish(1, 0, export)
"""


def make_config(model: Path) -> Config:
    return Config.model_validate({"model": {"path": model}, "weights": {"directory": model.parent / "w", "staging_grace_s": 0.1}})


def export() -> Iterator[tuple[str, torch.Tensor]]:
    return iter([("a.weight", torch.arange(6.0))])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def publisher(redis_client: redis.Redis, model: Path) -> Publisher:
    publisher = Publisher(make_config(model), PolicyBoard(redis_client, RUN), lambda: None)
    publisher.announce_start()
    return publisher


@pytest.mark.parametrize(("moment", "staged"), [("stage", 0), ("commit", 1)])
def test_a_trainer_killed_before_the_commit_leaves_the_former_version_current(
    publisher: Publisher, redis_client: redis.Redis, model: Path, moment: str, staged: int
) -> None:
    port = str(redis_client.connection_pool.connection_kwargs["port"])
    ended = subprocess.run([sys.executable, "-c", KILLED_TRAINER, str(model), port, moment], timeout=240)
    assert ended.returncode == -signal.SIGKILL
    assert publisher.board.current() == PolicyVersion(0, str(model)), "engines go on with what they have"
    assert publisher.board.staged().version == staged  # type: ignore[union-attr]
    assert published_versions(publisher.root) == [1] and not publisher.serves(1)
    number = publisher.next_version()
    publisher.publish(number, 0, export)
    assert number == 2 and publisher.serves(2), "its number is not used for other weights"
    for version in (3, 4):
        publisher.publish(version, version - 1, export)
    assert published_versions(publisher.root) == [3, 4], "the orphan is garbage like any other"


def test_an_engine_holds_the_version_it_serves_and_the_one_it_reads_for_as_long_as_it_lives(publisher: Publisher) -> None:
    publisher.publish(1, 0, export)
    publisher.board.report(EngineReport("e", "http://e", "paused", version=1, staged=99, reading=[1, 2]))
    for version in (2, 3, 4, 5):
        publisher.publish(version, version - 1, export)
    assert published_versions(publisher.root) == [1, 2, 4, 5]
    publisher.board.client.pexpire(publisher.board.keys.engine_alive("e"), 50)  # the server's own expiry, only sooner
    wait_until(lambda: not publisher.board.live_engines(), 5)
    publisher.publish(6, 5, export)
    assert published_versions(publisher.root) == [5, 6], "a dead reader holds nothing"


def test_an_engine_that_has_moved_on_lets_go_of_the_version_before(publisher: Publisher) -> None:
    for version, served in ((1, 0), (2, 1), (3, 2), (4, 3)):
        publisher.board.report(EngineReport("e", "http://e", "ready", version=served, staged=99, reading=[served]))
        publisher.publish(version, version - 1, export)
    assert published_versions(publisher.root) == [3, 4]


def test_a_current_version_that_was_damaged_on_the_volume_is_published_anew(
    publisher: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    publisher.publish(1, 0, export)
    file = version_folder(publisher.root, 1) / "model.safetensors"
    body = bytearray(file.read_bytes())
    body[-1] ^= 1
    file.write_bytes(body)
    assert not publisher.serves(1)
    assert "version 1 is published anew under the next number" in caplog.text
    publisher.publish(publisher.next_version(), 1, export)
    verify(version_folder(publisher.root, 2))


def test_the_reason_why_an_engine_does_not_stage_is_told_in_the_trainers_log(
    publisher: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    publisher.board.report(EngineReport("e", "http://e", "ready", version=0, trouble="version 1: manifest.json cannot be read"))
    publisher.publish(1, 0, export)
    assert "engine e cannot use version 1: manifest.json cannot be read" in caplog.text
    assert "version 1 goes current although e did not verify it in time" in caplog.text

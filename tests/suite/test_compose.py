"""The composed suite with a Docker engine: up, ready, curl, two steps, a rollout container killed, down, up, resumed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.conftest import free_port


def docker_engine_is_up() -> bool:
    return bool(shutil.which("docker")) and subprocess.run(["docker", "info"], capture_output=True).returncode == 0


pytestmark = [pytest.mark.timeout(3000), pytest.mark.skipif(not docker_engine_is_up(), reason="needs a Docker engine")]


class Compose:
    """One project of its own, with ports of its own, on the smoke configuration."""

    def __init__(self) -> None:
        self.port = free_port()
        self.project = f"forage-test-{self.port}"
        self.environment = os.environ | {
            "FORAGE_CONFIG": "configs/smoke.toml",
            "FORAGE_RETRIEVER_PORT": str(self.port),
            "FORAGE_REDIS_PORT": str(free_port()),
        }

    def __call__(self, *arguments: str, check: bool = True, timeout: float = 1800) -> str:
        command = ["docker", "compose", "-p", self.project, *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)
        assert not check or done.returncode == 0, (
            f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}\n{self.logs()[-6000:]}"
        )
        return done.stdout

    def logs(self, service: str | None = None) -> str:
        command = ["docker", "compose", "-p", self.project, "logs", "--no-color", *([service] if service else [])]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60).stdout

    def wait_for_log(self, service: str, text: str, timeout_s: float = 600) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.logs(service):
            assert time.monotonic() < deadline, f"no {text!r} from {service}:\n{self.logs()[-6000:]}"
            time.sleep(2)

    def container(self, service: str) -> str:
        return self("ps", "-q", service).split()[0]


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    suite = Compose()
    suite("build")
    try:
        yield suite
    finally:
        suite("down", "-v", "--timeout", "5", check=False)


def test_up_wait_returns_when_all_is_ready_and_retrieve_answers(compose: Compose) -> None:
    compose("up", "-d", "--wait", "--wait-timeout", "900")
    states = [json.loads(line) for line in compose("ps", "--format", "json").splitlines()]
    assert {s["Service"] for s in states} == {"redis", "retriever", "rollout", "reward", "trainer"}
    assert {s["Health"] for s in states} == {"healthy"}
    reply = httpx.post(f"http://127.0.0.1:{compose.port}/retrieve", json={"queries": ["capital of Kenya"], "topk": 1})
    assert set(reply.json()["result"][0][0]) == {"id", "contents"}


def test_a_killed_rollout_container_is_replaced_and_the_run_resumes_after_down_and_up(compose: Compose) -> None:
    compose.wait_for_log("trainer", "warm start")
    subprocess.run(["docker", "kill", compose.container("rollout")], check=True, capture_output=True)
    compose("up", "-d", "--no-recreate")
    compose.wait_for_log("trainer", "step 1/2")
    compose("down", "--timeout", "60")
    compose("up", "-d", "--wait", "--wait-timeout", "900")
    compose.wait_for_log("trainer", "final model")
    log = compose.logs("trainer")
    assert "resumed from" in log and "warm start → GRPO" in log
    assert "step 1/2" not in log, "the first step was not trained again"


def test_up_wait_fails_when_a_service_cannot_start(compose: Compose) -> None:
    broken = ["docker", "compose", "-p", compose.project, "up", "-d", "--wait", "--wait-timeout", "300", "trainer"]
    compose("rm", "-sf", "trainer")
    done = subprocess.run(
        [*broken[:4], "-f", "docker-compose.yml", "-f", "tests/suite/broken-trainer.yml", *broken[4:]],
        env=compose.environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode != 0
    assert "trainer.stepz: unknown key" in compose.logs("trainer")

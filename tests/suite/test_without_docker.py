"""The suite end to end as local processes: the smoke run with every real component, its files, its restart, its manners."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import free_port

SMOKE = "configs/smoke.toml"
pytestmark = pytest.mark.timeout(900)


class Suite:
    """`forage up` on the smoke configuration, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log.txt"
        self.process: subprocess.Popen | None = None
        self.environment = os.environ | {
            "FORAGE_RUN__DIRECTORY": str(folder / "runs"),
            "FORAGE_DATA__DIRECTORY": str(folder / "data"),
            "FORAGE_WEIGHTS__DIRECTORY": str(folder / "weights"),
            "FORAGE_RETRIEVER__PORT": str(self.port),
            "FORAGE_RETRIEVER__URL": self.url,
        }

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "smoke"

    def start(self, *arguments: str, **settings: str) -> None:
        command = [sys.executable, "-m", "services.suite", "up", "--config", SMOKE, *arguments]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=self.environment | settings, stdout=log, stderr=log, start_new_session=True
            )

    def forage(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Another `forage` command, as from another terminal."""
        command = [sys.executable, "-m", "services.suite", *arguments, "--config", SMOKE]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True)

    def wait(self, timeout_s: float = 600) -> int:
        assert self.process
        return self.process.wait(timeout_s)

    def wait_for_text(self, text: str, timeout_s: float = 400) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.text():
            assert self.process and self.process.poll() is None, f"the suite ended before {text!r}:\n{self.text()[-4000:]}"
            assert time.monotonic() < deadline, f"no {text!r} in {timeout_s} s:\n{self.text()[-4000:]}"
            time.sleep(0.5)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def descendants(self) -> list[psutil.Process]:
        assert self.process
        return psutil.Process(self.process.pid).children(recursive=True)

    def find(self, module: str) -> psutil.Process:
        return next(p for p in self.descendants() if f"services.{module}" in " ".join(p.cmdline()))

    def rows(self, kind: str) -> list[dict]:
        rows = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if row["kind"] == kind]

    def kill(self) -> None:
        if self.process and self.process.poll() is None:
            for process in [*self.descendants(), psutil.Process(self.process.pid)]:
                process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    """A whole smoke run with two rollout workers, during which /retrieve was asked both ways."""
    suite = Suite(tmp_path_factory.mktemp("smoke"))
    suite.start("--rollout", "2")
    try:
        suite.wait_for_text("all services are ready")
        suite.answers = [  # type: ignore[attr-defined]
            httpx.post(f"{suite.url}/retrieve", json={"queries": ["capital"], "topk": 2, "return_scores": scored}).json()
            for scored in (True, False)
        ]
        suite.status = suite.forage("status", "--json")  # type: ignore[attr-defined]
        assert suite.wait() == 0, suite.text()[-4000:]
        yield suite
    finally:
        suite.kill()


def test_the_run_ends_with_a_table_of_three_evaluations(finished: Suite) -> None:
    table = (finished.run / "results.md").read_text()
    assert table.startswith("start → warm start → GRPO")
    assert table.strip() in finished.text()


def test_every_step_left_a_row_with_the_figures_that_are_promised(finished: Suite) -> None:
    steps = finished.rows("grpo")
    assert [row["step"] for row in steps] == [1, 2]
    wanted = {"reward/mean", "reward/exact_match", "search/per_episode", "search/response_tokens", "mismatch/abs", "mismatch/k3"}
    wanted |= {"staleness/mean", "staleness/version", "objective/grad_norm", "warnings/showing"}
    assert wanted | {f"time/{name}" for name in ("rollout_s", "train_s", "publish_s", "tokens_per_s")} <= set(steps[0])
    assert list((finished.run / "tensorboard").glob("events.*"))


def test_trainer_and_engine_agree_on_log_probs_at_every_step(finished: Suite) -> None:
    assert all(row["mismatch/abs"] < 1e-3 for row in finished.rows("grpo"))


def test_the_engine_used_every_new_version(finished: Suite) -> None:
    assert all(row["staleness/mean"] == 0 for row in finished.rows("grpo"))
    versions = [row["staleness/version"] for row in finished.rows("grpo")]
    assert versions == [2, 3], "1 is the warm start; each step publishes the next"
    lines = (finished.run / "transcripts" / "step000002.jsonl").read_text().splitlines()
    assert {v for line in lines for v in json.loads(line)["versions"]} == {2}


def test_the_final_model_is_loaded_by_transformers_and_differs_from_the_start(finished: Suite) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = AutoModelForCausalLM.from_pretrained(finished.folder / "data" / "models" / "policy")
    final = AutoModelForCausalLM.from_pretrained(finished.run / "final")
    assert AutoTokenizer.from_pretrained(finished.run / "final").chat_template
    named = {"_name_or_path": None}
    assert start.config.to_dict() | named == final.config.to_dict() | named
    changed = [not torch.equal(a, b) for a, b in zip(start.parameters(), final.parameters(), strict=True)]
    assert all(changed)


def test_retrieve_answered_in_both_shapes(finished: Suite) -> None:
    scored, bare = finished.answers  # type: ignore[attr-defined]
    assert [set(item) for item in scored["result"][0]] == [{"document", "score"}] * 2
    assert [item["document"] for item in scored["result"][0]] == bare["result"][0]
    assert set(bare["result"][0][0]) == {"id", "contents"}


def test_status_found_the_suite_while_it_ran(finished: Suite) -> None:
    seen = json.loads(finished.status.stdout)  # type: ignore[attr-defined]
    assert seen["redis"]["balanced"] and seen["redis"]["accounts"]["fed"] > 0
    assert len(seen["redis"]["engines"]) == 2
    assert {part["name"] for part in seen["parts"]} == {"reward", "rollout-1", "rollout-2", "trainer"}


def test_trajectory_shows_an_episode_of_a_run_that_has_ended(finished: Suite) -> None:
    listed = json.loads(finished.forage("trajectory", "--json", "-n", "3").stdout)
    shown = finished.forage("trajectory", listed[0]["id"])
    assert len(listed) == 3 and shown.returncode == 0
    assert listed[0]["question"] in shown.stdout and "not kept" in shown.stdout


def test_the_finished_run_is_evaluated_by_services_started_for_it_and_leaves_its_answers(finished: Suite) -> None:
    out = finished.folder / "eval"
    done = finished.forage("eval", "--model", "smoke", "--limit", "2", "--out", str(out))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result = json.loads((out / "results.json").read_text())
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert result["whole"]["questions"] == len(answers) == 2 and result["lost"] == 0
    assert all(answer["response"] for answer in answers)
    assert (out / "results.md").read_text().strip() in done.stdout


def test_both_workers_played(finished: Suite) -> None:
    import re

    workers = set(re.findall(r'"worker": "([^"]+)"', "".join(p.read_text() for p in finished.run.rglob("*.jsonl"))))
    assert len(workers) == 2, workers


def test_nothing_is_left_running(finished: Suite) -> None:
    left = [p for p in psutil.process_iter(["cmdline"]) if str(finished.folder) in " ".join(p.info["cmdline"] or [])]
    assert left == []


def test_a_finished_run_started_again_prints_its_table_and_trains_nothing(finished: Suite) -> None:
    before = (finished.run / "metrics.jsonl").read_text()
    finished.log.write_text("")
    finished.start()
    assert finished.wait() == 0
    assert "start → warm start → GRPO" in finished.text()
    assert (finished.run / "metrics.jsonl").read_text() == before


def test_worker_trainer_and_redis_killed_in_the_middle_and_ctrl_c_lose_nothing(tmp_path: Path) -> None:
    suite = Suite(tmp_path)
    more = {"FORAGE_TRAINER__STEPS": "4", "FORAGE_TRAINER__WARM_START__EPOCHS": "0", "FORAGE_WEIGHTS__TRANSPORT": "collective"}
    try:
        suite.start(**more)
        suite.wait_for_text("step 1/4")
        assert "pushed: engines 1," in suite.text(), "the volume would have hidden a push that never works"
        suite.find("rollout").send_signal(signal.SIGKILL)
        suite.wait_for_text("step 2/4")
        suite.find("trainer").send_signal(signal.SIGKILL)
        suite.wait_for_text("resumed from")
        next(p for p in suite.descendants() if p.name() in ("redis-server", "valkey-server")).send_signal(signal.SIGKILL)
        suite.wait_for_text("step 3/4")
        os.kill(suite.process.pid, signal.SIGINT)  # type: ignore[union-attr]
        assert suite.wait(120) == 0
        suite.start(**more)
        assert suite.wait() == 0, suite.text()[-4000:]
    finally:
        suite.kill()
    assert [row["step"] for row in suite.rows("grpo")] == [1, 2, 3, 4]
    trained = [json.loads(line)["id"] for p in sorted((suite.run / "transcripts").iterdir()) for line in p.read_text().splitlines()]
    assert len(trained) == len(set(trained)) == 4 * 4 * 4
    groups = sorted({i.split("/")[0] for i in trained})
    assert groups == [f"t{n:08d}" for n in range(16)], "no question was skipped"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FORAGE_TRAINER__STEPZ": "3"}, "trainer.stepz: unknown key"),
        ({"FORAGE_MODEL__SOURCE": "folder", "FORAGE_MODEL__PATH": "nowhere"}, "nowhere"),
        ({"FORAGE_RETRIEVER__TOPK": "1000"}, "retriever.topk 1000 is above retriever.max_topk"),
    ],
)
def test_a_bad_configuration_stops_the_start_with_its_reason(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    suite = Suite(tmp_path)
    suite.start(**settings)
    try:
        assert suite.wait(120) in (1, 2)
        assert message in suite.text()
    finally:
        suite.kill()


def test_config_show_prints_toml_that_can_be_read_back_and_no_secret() -> None:
    command = [sys.executable, "-m", "services.suite", "config", "show", "--config", SMOKE]
    shown = subprocess.run(
        command, env=os.environ | {"FORAGE_REDIS__PASSWORD": "hunter2"}, capture_output=True, text=True, check=True
    )
    assert tomllib.loads(shown.stdout)["run"]["name"] == "smoke"
    assert "hunter2" not in shown.stdout

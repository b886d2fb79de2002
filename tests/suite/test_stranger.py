"""The reference recipe from an empty folder to an exported model, by the commands of docs/recipe.md, word for word.

They are typed in a copy of this tree that has neither data nor runs, with what the page exports for a CPU, and with the
repositories of `small_wiki` on a hub of their own. Two things are not the page's: sizes are those of a miniature, and three names
get `@main`, since the catalogue knows the digests of the real files. Left out of a stranger's path are the installation, for which
`FORAGE_VENV` names the interpreter of these tests, and BM25.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import free_port
from tests.prepare.hub_server import HubServer, running_hub
from tests.suite.doc_pages import Page
from tests.suite.small_wiki import PASSAGES, TEST_SOURCES, TRAIN_SOURCES, fill

pytestmark = pytest.mark.timeout(1800)
RUN = "qwen2.5-3b"
CONFIG = f"configs/{RUN}.toml"
LINES = [line for block in Page.read(Path("docs/recipe.md")).blocks("bash") for line in block.splitlines()]
COMMANDS = [shlex.split(line, comments=True) for line in LINES if line.startswith("./forage ")]
ON_A_CPU = dict(word.split("=", 1) for line in LINES if line.startswith("export ") for word in shlex.split(line)[1:])
NEEDED = ["forage", "requirements.lock", "pyproject.toml", "services", "configs"]
IN_MINIATURE = {
    "MODEL__MAX_CONTEXT": "768",
    "ROLLOUT__MAX_TURN_TOKENS": "24",
    "ROLLOUT__MAX_OBSERVATION_TOKENS": "256",
    "ROLLOUT__MAX_RESPONSE_TOKENS": "384",
    "ROLLOUT__CONCURRENCY": "16",
    "ROLLOUT__ENGINE__MAX_TOTAL_TOKENS": "8192",
    "ROLLOUT__ENGINE__THREADS": "1",
    "RETRIEVER__THREADS": "1",
    "TRAINER__THREADS": "1",
    "TRAINER__STEPS": "2",
    "TRAINER__GROUPS_PER_STEP": "4",
    "TRAINER__SAMPLES_PER_PROMPT": "4",
    "TRAINER__EVAL_QUESTIONS": "7",
    "TRAINER__CHECKPOINT_EVERY": "1",
}
DIGESTS_ARE_PINNED = ("wiki-18-e5", "nq-hotpotqa", "e5-base-v2")
"""The catalogue knows the digests of these; of another revision it knows none (docs/data.md)."""

DATA_FILES = {"wiki-18.jsonl.gz", "part_aa", "part_ab", "train.parquet", "test.parquet"}
MODEL_FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
MODEL_FILES |= {"model.safetensors", "model.safetensors.index.json", *(f"model-0000{n}-of-00002.safetensors" for n in (1, 2))}


class Stranger:
    """A copy of the tree and a terminal in it."""

    def __init__(self, home: Path, hub: HubServer) -> None:
        self.home, self.hub = home, hub
        for name in NEEDED:
            copy = shutil.copytree if Path(name).is_dir() else shutil.copy2
            copy(name, home / name)
        self._choose_revisions()
        url = f"http://127.0.0.1:{(port := free_port())}"
        ours = ("HF_", "FORAGE_", "PYTHONPATH")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self.environment |= ON_A_CPU | {f"FORAGE_{name}": value for name, value in IN_MINIATURE.items()}
        self.environment |= {"FORAGE_RETRIEVER__PORT": str(port), "FORAGE_RETRIEVER__URL": url, "HF_ENDPOINT": hub.url}
        self.environment["FORAGE_VENV"] = str(self._interpreter())
        self.told: dict[str, str] = {}
        self.requests: dict[str, int] = {}
        """What each command printed, and how many requests the hub had seen when it had ended."""

    def _choose_revisions(self) -> None:
        text = (self.home / CONFIG).read_text()
        for name in DIGESTS_ARE_PINNED:
            text = text.replace(f'"hub:{name}"', f'"hub:{name}@main"')
        (self.home / CONFIG).write_text(text)

    def _interpreter(self) -> Path:
        """What the launcher takes for an environment that it has installed already."""
        venv = self.home / ".venv"
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (venv / "bin" / "python").chmod(0o755)
        shutil.copy2(self.home / "requirements.lock", venv / "installed.lock")
        return venv

    def types(self, words: list[str]) -> None:
        """A command, to its end."""
        process = subprocess.Popen(
            words, cwd=self.home, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            output, _ = process.communicate(timeout=1200)
        finally:
            stop(process)
        assert process.returncode == 0, f"{shlex.join(words)}: exit code {process.returncode}\n{output[-6000:]}"
        self.told[words[1]], self.requests[words[1]] = output, len(self.hub.seen)

    def lines(self, path: str) -> list[dict]:
        return [json.loads(line) for line in (self.home / path).read_text().splitlines()]


def stop(process: subprocess.Popen[str]) -> None:
    """With all that it started."""
    if process.poll() is None:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.kill()
        process.wait()


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stranger]:
    """All commands of the page, one after the other."""
    with running_hub() as hub:
        fill(hub, tmp_path_factory.mktemp("hub"))
        stranger = Stranger(tmp_path_factory.mktemp("stranger"), hub)
        for words in COMMANDS:
            stranger.types(words)
        yield stranger


def test_the_page_goes_from_prepare_to_export(stranger: Stranger) -> None:
    assert list(stranger.told) == ["prepare", "data", "up", "eval", "export"]


def test_prepare_brings_what_the_recipe_names_and_nothing_else(stranger: Stranger) -> None:
    hub = stranger.home / "var" / "data" / "hub"
    assert all((hub / name).exists() for name in ("wiki-18", "qwen2.5-3b", *(f"{name}@main" for name in DIGESTS_ARE_PINNED)))
    downloaded = {Path(seen.path).name for seen in stranger.hub.requests("/resolve/")}
    assert downloaded == DATA_FILES | MODEL_FILES
    assert "all is there" in stranger.told["prepare"]


def test_every_source_of_the_questions_is_counted(stranger: Stranger) -> None:
    train, held_out = (stranger.lines(f"var/data/questions/{name}.jsonl") for name in ("train", "eval"))
    assert {row["source"] for row in train} == set(TRAIN_SOURCES) and len(train) == 16
    assert {row["source"] for row in held_out} == set(TEST_SOURCES) and len(held_out) == 21
    assert "train_questions: 16 questions" in stranger.told["data"] and "eval_questions: 21 questions" in stranger.told["data"]


def test_the_published_index_was_adopted_and_not_built(stranger: Stranger) -> None:
    index = stranger.home / "var" / "data" / "index"
    manifest = json.loads((index / "manifest.json").read_text())
    assert manifest["imported"] and (index / "index.faiss").samefile(stranger.home / "var/data/hub/wiki-18-e5@main")
    assert "index imported: 60 passages" in stranger.told["up"]


def test_two_steps_are_trained_on_episodes_that_searched(stranger: Stranger) -> None:
    steps = [row for row in stranger.lines(f"var/runs/{RUN}/metrics.jsonl") if row["kind"] == "grpo"]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row["search/per_episode"] > 0.5 and row["mismatch/abs"] < 1e-3 for row in steps)
    assert any(row["reward/mean"] > 0 for row in steps)


def evaluation(stranger: Stranger, mode: str = "search") -> Path:
    (folder,) = (stranger.home / "var" / "evals").iterdir()
    return folder / mode


def test_the_model_is_scored_on_all_seven_sources(stranger: Stranger) -> None:
    result = json.loads((evaluation(stranger) / "results.json").read_text())
    assert {name: kind["questions"] for name, kind in result["by_source"].items()} == dict.fromkeys(TEST_SOURCES, 3)
    assert result["lost"] == 0 and result["whole"]["figures"]["searches"] > 0.5
    assert (evaluation(stranger) / "results.md").read_text().strip() in stranger.told["eval"]


def test_its_baselines_stand_beside_it_in_one_table_with_what_was_published(stranger: Stranger) -> None:
    made = evaluation(stranger).parent
    table = json.loads((made / "table.json").read_text())
    assert [row["job"]["mode"] for row in table["rows"]] == ["direct", "rag", "search"]
    assert table["sets"] == ["nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle"]
    assert [row["average"]["questions"] for row in table["rows"]] == [21, 21, 21] and [row["lost"] for row in table["rows"]] == [
        0,
        0,
        0,
    ]
    searches = [row["average"]["figures"]["searches"] for row in table["rows"]]
    assert searches[:2] == [0, 0] and searches[2] > 0.5
    printed = (made / "table.md").read_text().strip()
    assert "*Search-R1 3B base, GRPO*" in printed and printed in stranger.told["eval"]
    assert (made / "table.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_policy_was_shown_comes_out_of_the_corpus(stranger: Stranger) -> None:
    texts = [passage["contents"].split("\n")[1] for passage in PASSAGES]
    answers = (evaluation(stranger) / "answers.jsonl").read_text().splitlines()
    shown = [sum(text in line for text in texts) for line in answers]
    assert len(shown) == 21 and set(shown) <= {0, 3} and 3 in shown, "topk = 3"


def test_the_exported_folder_is_loaded_by_transformers_and_has_learned(stranger: Stranger) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = AutoModelForCausalLM.from_pretrained(stranger.home / "var" / "data" / "hub" / RUN)
    model = AutoModelForCausalLM.from_pretrained(stranger.home / "my-model")
    assert model.config.model_type == "qwen2" and AutoTokenizer.from_pretrained(stranger.home / "my-model").chat_template
    changed = [not torch.equal(a, b) for a, b in zip(start.parameters(), model.parameters(), strict=True)]
    assert any(changed)


def test_only_the_first_prepare_asks_the_hub(stranger: Stranger) -> None:
    assert stranger.requests["prepare"] == stranger.requests["export"] == len(stranger.hub.seen) > 0


def test_the_last_words_of_a_run_are_its_own(stranger: Stranger) -> None:
    assert "leaked" not in stranger.told["up"] + stranger.told["eval"], "bindings of libraries count what they leak at an exit"


def test_nothing_is_left_running(stranger: Stranger) -> None:
    left = [p for p in psutil.process_iter(["cmdline"]) if str(stranger.home) in " ".join(p.info["cmdline"] or [])]
    assert left == []

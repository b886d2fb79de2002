"""`forage prepare` on a configuration of names, as a process of its own, with HF_ENDPOINT naming a hub on this machine."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from services.contract.config import load_config
from services.retriever.corpus import Corpus
from tests.prepare.hub_server import Fault, HubServer, running_hub
from tests.prepare.test_question_files import SEARCH_R1_ROW

RUN = """
[model]
source = "folder"
path = "hub:owner/tiny"

[data]
source = "folder"
directory = "{directory}"
corpus = "hub:wiki-18@main"
mix = {{ nq = 2, hotpotqa = 1 }}

[[data.train_questions]]
path = "hub:nq-hotpotqa@main"
split = "train"

[[data.eval_questions]]
path = "hub:nq-hotpotqa@main"
split = "test"

[retriever]
encoder_family = "hashing"

[trainer.warm_start]
epochs = 0
"""
CORPUS, QUESTIONS = "datasets/PeterJinGo/wiki-18-corpus", "datasets/PeterJinGo/nq_hotpotqa_train"
PASSAGES = "".join(json.dumps({"id": str(n), "contents": f'"T{n}"\nText number {n}.'}) + "\n" for n in range(500))


def tar_gz(text: str) -> bytes:
    """One file in folders, as wiki-18 is published."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        member = tarfile.TarInfo("data00/dump.jsonl")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


def parquet(*sources: str) -> bytes:
    rows = [SEARCH_R1_ROW | {"data_source": source, "question": f"{source}?"} for source in sources]
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


@pytest.fixture
def hub(prepared: Path) -> Iterator[HubServer]:
    """The repositories that RUN names, of their real names; the model is the one of `prepared`."""
    model = {path.name: path.read_bytes() for path in (prepared / "models" / "policy").iterdir() if path.name != "manifest.json"}
    with running_hub() as server:
        server.add("owner/tiny", model)
        server.add(CORPUS, {"wiki-18.jsonl.gz": tar_gz(PASSAGES)})
        server.add(QUESTIONS, {"train.parquet": parquet("nq", "hotpotqa"), "test.parquet": parquet("nq", "popqa")})
        yield server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(directory=tmp_path / "data"))
    return path


def start(run: Path, hub: HubServer, *command: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "FORAGE_"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    line = [sys.executable, "-m", "services.suite", *command, "-c", str(run)]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    return output


def test_a_configuration_of_names_becomes_files_that_the_services_read(run: Path, hub: HubServer) -> None:
    output = finish(start(run, hub, "prepare"))
    config = load_config(run, {})
    assert "to download, with room to unpack: owner/tiny" in output
    assert json.loads((config.model_path / "config.json").read_text())["model_type"] == "llama"
    train = [json.loads(line) for line in config.data.train_path.read_text().splitlines()]
    assert [(row["source"], row["golden_answers"]) for row in train] == [("nq", ["Ann"]), ("hotpotqa", ["Ann"])]
    assert train[0]["prompt"] == SEARCH_R1_ROW["prompt"]
    assert len(Corpus.open(config.data.corpus_path)) == 500
    asked = len(hub.seen)
    assert "downloading" not in finish(start(run, hub, "prepare"))
    assert len(hub.seen) == asked, "a prepared machine asks nobody"
    checked = finish(start(run, hub, "data", "check"))
    assert "train_questions and eval_questions have 1 questions in common" in checked


def test_a_killed_prepare_goes_on_where_it_was(run: Path, hub: HubServer) -> None:
    rows = [{"id": str(n), "contents": f'"T"\n{os.urandom(1000).hex()}'} for n in range(400)]
    content = tar_gz("".join(json.dumps(row) + "\n" for row in rows))  # more than 400,000 bytes, since it is noise
    hub.add(CORPUS, {"wiki-18.jsonl.gz": content})
    hub.faults.append(Fault("/cdn/datasets/PeterJinGo/wiki-18", stall_after=150_000, stall_s=60))
    process = start(run, hub, "prepare")
    journal = run.parent / "data" / "hub" / ".wiki-18@main.partial.journal.json"
    deadline = time.monotonic() + 200
    while not (journal.exists() and "[150000]" in journal.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finish(start(run, hub, "prepare"))
    assert (run.parent / "data" / "hub" / "wiki-18@main").read_bytes() == content
    assert hub.requests("/cdn/datasets/PeterJinGo/wiki-18")[-1].range == f"bytes=150000-{len(content) - 1}"

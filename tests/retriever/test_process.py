"""The two commands as a person runs them: processes, signals, exit codes and what is printed."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.retriever.conftest import make_config, passage, query

COMMAND = [sys.executable, "-m", "services.retriever"]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    make_config(tmp_path / "data")
    path = tmp_path / "run.toml"
    path.write_text(f'[data]\ndirectory = "{tmp_path / "data"}"\n[retriever]\nencoder_family = "hashing"\nport = 0\n')
    return path


@pytest.fixture
def indexed_file(config_file: Path) -> Path:
    assert run("index build", config_file).returncode == 0
    return config_file


def run(command: str, config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *command.split(), "--config", str(config), *arguments], capture_output=True, text=True, timeout=60
    )


class Serving:
    def __init__(self, config: Path) -> None:
        command = [*COMMAND, "serve", "--config", str(config)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout
        match = re.search(r"http://[\d.:]+", self.process.stdout.readline())
        assert match
        self.url = match[0]

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 60
        while httpx.get(f"{self.url}/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def serving(indexed_file: Path) -> Iterator[Serving]:
    started = Serving(indexed_file)
    yield started
    started.process.kill()
    started.process.communicate()


def test_index_shows_a_bar_and_the_second_run_one_line(config_file: Path) -> None:
    first, second = run("index build", config_file), run("index build", config_file)
    assert "encoding passages" in first.stdout
    assert "100/100" in first.stdout
    assert len(second.stdout.splitlines()) == 1
    assert "nothing to do" in second.stdout


def test_check_says_whole_or_names_the_field_with_exit_code_1(indexed_file: Path) -> None:
    whole = run("index check", indexed_file)
    assert whole.returncode == 0
    assert "whole, of this corpus and this encoder" in whole.stdout
    (indexed_file.parent / "data" / "index" / "index.faiss").write_bytes(b"short")
    broken = run("index check", indexed_file)
    assert broken.returncode == 1
    assert "index_bytes is " in broken.stderr
    assert f"Rebuild it: python -m services.retriever index build --config {indexed_file}" in broken.stderr


def test_check_looks_at_bm25_too(config_file: Path) -> None:
    config_file.write_text(config_file.read_text() + 'backends = ["bm25"]\n')
    missing = run("index check", config_file)
    assert missing.returncode == 1
    assert "no whole BM25 index here" in missing.stderr
    assert run("index build", config_file).returncode == 0
    whole = run("index check", config_file)
    assert whole.returncode == 0
    assert "BM25: undamaged, of this corpus; sampled documents are its passages (100)" in whole.stdout


def test_forage_index_import_passes_through_to_the_retriever(indexed_file: Path) -> None:
    folder = indexed_file.parent / "data" / "index"
    content = (folder / "index.faiss").read_bytes()
    parts = [indexed_file.parent / name for name in ("part_aa", "part_ab")]
    parts[0].write_bytes(content[:1000])
    parts[1].write_bytes(content[1000:])
    for path in folder.iterdir():
        path.unlink()
    command = [sys.executable, "-m", "services.suite", "index", "import", *map(str, parts), "--config", str(indexed_file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "index imported: 100 passages" in done.stdout
    assert (folder / "index.faiss").read_bytes() == content


def test_stop_under_load_answers_or_says_503_and_exits_clean(serving: Serving) -> None:
    serving.wait_ready()
    seen: list[int] = []
    stopped = threading.Event()

    def client(number: int) -> None:
        with httpx.Client(base_url=serving.url, timeout=30) as http:
            for turn in range(10_000):
                try:
                    answer = http.post("/retrieve", json={"queries": [f"{query(number)} turn {turn}"], "topk": 1})
                except httpx.TransportError:
                    assert stopped.is_set()  # the port is closed; before that every request has an answer
                    return
                seen.append(answer.status_code)
                if answer.status_code == 200:
                    assert answer.json()["result"] == [[passage(number)]]

    clients = [threading.Thread(target=client, args=(number,)) for number in range(16)]
    for thread in clients:
        thread.start()
    while len(seen) < 200:
        time.sleep(0.01)
    stopped.set()
    serving.process.send_signal(signal.SIGTERM)
    for thread in clients:
        thread.join(30)
    assert serving.process.wait(20) == 0
    assert set(seen) <= {200, 503}


def test_stop_while_idle_exits_clean(serving: Serving) -> None:
    serving.wait_ready()
    serving.process.send_signal(signal.SIGINT)
    assert serving.process.wait(20) == 0


def test_serve_refuses_an_index_of_another_corpus_and_names_the_command(indexed_file: Path) -> None:
    with (indexed_file.parent / "data" / "corpus.jsonl").open("a") as corpus:
        corpus.write('{"id": "new", "contents": "one more"}\n')
    refused = run("serve", indexed_file)
    assert refused.returncode == 1
    assert "rows is 100 in the index, 101 now" in refused.stderr
    assert f"python -m services.retriever index build --config {indexed_file}" in refused.stderr
    assert "Traceback" not in refused.stdout + refused.stderr


def test_serve_without_an_index_names_the_command(config_file: Path) -> None:
    refused = run("serve", config_file)
    assert refused.returncode == 1
    assert f"Build it: python -m services.retriever index build --config {config_file}" in refused.stderr


def test_taken_port_is_named(indexed_file: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = run("serve", indexed_file, "--port", str(port))
    assert refused.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in refused.stderr


def test_unknown_key_is_named(config_file: Path) -> None:
    config_file.write_text(config_file.read_text() + "topkk = 3\n")
    refused = run("index build", config_file)
    assert refused.returncode == 1
    assert "retriever.topkk: unknown key" in refused.stderr

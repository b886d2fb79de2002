"""The SGLang server as a child process: its command line, its log, its end.

Nothing is left behind: the server dies with this worker (`launch_sglang.py` asks the kernel for that, SGLang's children ask
the same of the server), and `stop` ends whatever is still in its process group. `spawn` must be called from the main thread:
the kernel ties the child's life to the thread that started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from services.contract.config import Config, EngineConfig

LAUNCHER = Path(__file__).with_name("launch_sglang.py")
TAIL_LINES = 30
CHILDREN_GRACE_S = 3.0
RESERVED = 8
"""Positions that SGLang keeps for itself in every request; without them the last tokens of a full episode would be refused."""

NO_CRASH_DUMPS = {"SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0"}
"""With them a server whose scheduler has died stays for 65 seconds, silent, with its port open and every request hanging."""

CPU_OPTIONS = [
    *("--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--disable-overlap-schedule", "--disable-cuda-graph", "--sleep-on-idle"),
]


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def usable_context(config: Config) -> int:
    """Tokens of prompt and response that the engine can hold: model.max_context, or less if the model or its KV cache is small."""
    model = json.loads((config.model_path / "config.json").read_text())
    positions = model.get("max_position_embeddings", config.model.max_context + RESERVED)
    cache = positions if config.rollout.engine.urls else config.rollout.engine.max_total_tokens
    return min(config.model.max_context, positions - RESERVED, cache - RESERVED)


def command_line(config: Config, model: str, version: int, port: int) -> list[str]:
    """The server's arguments. Sampling defaults are SGLang's own, not those of the model's generation_config."""
    engine = config.rollout.engine
    options = {
        "--model-path": model,
        "--weight-version": version,
        "--host": engine.host,
        "--port": port,
        "--device": engine.device,
        "--dtype": engine.dtype,
        "--tp-size": engine.tensor_parallel,
        "--context-length": usable_context(config) + RESERVED,
        "--max-total-tokens": engine.max_total_tokens,
        "--max-running-requests": 1 + (engine.max_running_requests or config.rollout.concurrency),  # one for health checks
        "--random-seed": int.from_bytes(os.urandom(3), "big"),  # two engines must not draw the same samples
        "--log-level": engine.log_level,
        "--log-level-http": "warning",
    }
    if engine.chunked_prefill_tokens:
        options["--chunked-prefill-size"] = engine.chunked_prefill_tokens
    flat = [str(part) for pair in options.items() for part in pair]
    on_cpu = CPU_OPTIONS if engine.device == "cpu" else []
    return [engine.python or sys.executable, "-P", str(LAUNCHER), *flat, "--skip-server-warmup", *on_cpu, *engine.extra_args]


def environment(engine: EngineConfig) -> dict[str, str]:
    """The server's environment."""
    values = NO_CRASH_DUMPS | dict(os.environ) | {"FORAGE_ENGINE_PARENT": str(os.getpid())}
    values.pop("SGLANG_RETURN_ORIGINAL_LOGPROB", None)  # log-probs without the temperature would not be those of the tokens
    if engine.device == "cpu":
        # waiting threads must sleep: spinning ones would take the core from the trainer on the same machine
        values |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": str(engine.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    return values


class EngineProcess:
    """A running server and its log file."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self._process, self.url, self.log = process, url, log

    @classmethod
    def spawn(cls, config: Config, model: str, version: int, log: Path) -> EngineProcess:
        engine = config.rollout.engine
        port = engine.port or free_port(engine.host)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                command_line(config, model, version, port),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(engine),
                start_new_session=True,
            )
        return cls(process, f"http://{engine.host}:{port}", log)

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def tail(self) -> str:
        """The last lines of its log, for a person who must find out what went wrong."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        return ""

    def memory_bytes(self) -> int:
        """What the whole process group holds, shared pages counted once."""
        return sum(_proportional_memory(pid) for pid in _group_members(self.pid))

    def stop(self) -> None:
        """End the server at once: it holds no state. Its children follow it; those that do not within seconds are killed."""
        self._process.kill()
        self._process.wait()
        deadline = time.monotonic() + CHILDREN_GRACE_S  # lets Python's resource tracker remove semaphores
        while _group_members(self.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def _group_members(group: int) -> list[int]:
    """Processes of a group that still run; one that has ended but was not yet reaped does not count."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, process_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(process_group) == group and state != "Z":
                    members.append(int(entry.name))
    return members


def _proportional_memory(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0

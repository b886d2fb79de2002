"""Wall-clock and peak memory of a whole run, against the budgets that the project sets itself.

    python -m benchmarks.suite --config configs/smoke.toml            start it as local processes, measure it
    python -m benchmarks.suite --config … --composed                  start it as containers (Linux, as root: reads their memory)

Memory is the proportional set size (PSS): pages that services share are counted once. Prints each service's peak, the peak of
their sum, and both figures as a ratio to the budget.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import psutil

from services.contract.config import load_config

BUDGETS = {"quickstart": (75 * 60.0, 14.0), "smoke": (5 * 60.0, 14.0)}
"""Seconds and GiB, by the name of the run."""
SAMPLE_S = 5.0


def service_of(process: psutil.Process) -> str | None:
    """The service that a process belongs to: that of its nearest ancestor started as `python -m services.<name>`."""
    for candidate in (process, *process.parents()):
        words = candidate.cmdline()
        modules = [word.removeprefix("services.").split(".")[0] for word in words if word.startswith("services.")]
        if modules:
            return modules[0]
        if words and Path(words[0]).name in {"redis-server", "valkey-server"}:
            return "redis"
    return None


def sample() -> dict[str, float]:
    """GiB by service, now, of every process of the suite on this machine, in a container or not."""
    found: dict[str, float] = defaultdict(float)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if service := service_of(process):
                found[service] += process.memory_full_info().pss / 2**30
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/smoke.toml")
    parser.add_argument("--composed", action="store_true", help="run the suite with docker compose, from images already built")
    arguments = parser.parse_args()
    if sample():
        raise SystemExit("services of a suite already run on this machine: they would be counted too; stop them first")
    suite = Composed(arguments.config) if arguments.composed else Local(arguments.config)
    started, peaks, peak = time.time(), defaultdict(float), 0.0
    while suite.runs():
        now = sample()
        peak = max(peak, sum(now.values()))
        for name, gibibytes in now.items():
            peaks[name] = max(peaks[name], gibibytes)
        time.sleep(SAMPLE_S)
    report(arguments.config, time.time() - started, peak, peaks)
    sys.exit(suite.stop())


class Local:
    """The suite as processes of this one: it ends by itself."""

    def __init__(self, config: str) -> None:
        self.process = subprocess.Popen([sys.executable, "-m", "services.suite", "up", "--config", config])

    def runs(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> int:
        return self.process.wait()


class Composed:
    """The suite as containers. They stay up behind a finished run, so its end is its final table."""

    COMPOSE = ("docker", "compose")

    def __init__(self, config: str) -> None:
        self.environment = {**os.environ, "FORAGE_CONFIG": config}
        self.table = Path("/runs", load_config(config).run.name, "results.md")
        self.compose("up", "--detach", "--no-build", check=True)
        self.log = subprocess.Popen([*self.COMPOSE, "logs", "--follow", "--no-log-prefix", "trainer"], env=self.environment)

    def compose(self, *words: str, check: bool = False) -> int:
        return subprocess.run([*self.COMPOSE, *words], env=self.environment, check=check).returncode

    def runs(self) -> bool:
        return self.log.poll() is None and self.compose("exec", "-T", "trainer", "test", "-e", str(self.table)) != 0

    def stop(self) -> int:
        died = self.log.poll() is not None
        self.log.terminate()
        self.compose("stop")
        return int(died)


def report(config: str, seconds: float, peak: float, peaks: dict[str, float]) -> None:
    seconds_budget, memory_budget = BUDGETS.get(load_config(config).run.name, BUDGETS["quickstart"])
    for name, gibibytes in sorted(peaks.items(), key=lambda item: -item[1]):
        print(f"{name:<12} peak {gibibytes:5.2f} GiB")
    print(f"wall clock   {seconds / 60:5.1f} min   {seconds / seconds_budget:.2f} × the budget of {seconds_budget / 60:.0f} min")
    print(f"all together {peak:5.2f} GiB   {peak / memory_budget:.2f} × the budget of {memory_budget:.0f} GiB")


if __name__ == "__main__":
    main()

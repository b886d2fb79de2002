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
    started, peaks, peak = time.time(), defaultdict(float), 0.0
    suite = Composed(arguments.config) if arguments.composed else Local(arguments.config)
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
        self.up = subprocess.Popen([*self.COMPOSE, "up", "--no-build"], env=self.environment)

    def runs(self) -> bool:
        return self.up.poll() is None and not self._finished()

    def _finished(self) -> bool:
        look = [*self.COMPOSE, "exec", "-T", "trainer", "test", "-e", str(self.table)]
        return subprocess.run(look, env=self.environment, stderr=subprocess.DEVNULL).returncode == 0

    def stop(self) -> int:
        died = self.up.poll() is not None
        subprocess.run([*self.COMPOSE, "stop"], env=self.environment)
        self.up.wait()
        return int(died)


def report(config: str, seconds: float, peak: float, peaks: dict[str, float]) -> None:
    seconds_budget, memory_budget = BUDGETS.get(load_config(config).run.name, BUDGETS["quickstart"])
    for name, gibibytes in sorted(peaks.items(), key=lambda item: -item[1]):
        print(f"{name:<12} peak {gibibytes:5.2f} GiB")
    print(f"wall clock   {seconds / 60:5.1f} min   {seconds / seconds_budget:.2f} × the budget of {seconds_budget / 60:.0f} min")
    print(f"all together {peak:5.2f} GiB   {peak / memory_budget:.2f} × the budget of {memory_budget:.0f} GiB")


if __name__ == "__main__":
    main()

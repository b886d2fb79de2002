"""Wall-clock and peak memory of a whole run as local processes, against the budgets that the project sets itself.

    python -m benchmarks.suite --config configs/smoke.toml            start it, measure it
    python -m benchmarks.suite --config … --attach PID                measure one that `forage up` is already running

Memory is the proportional set size (PSS): pages that services share are counted once. Prints each service's peak, the peak of
their sum, and both figures as a ratio to the budget.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections import defaultdict

import psutil

BUDGETS = {"quickstart": (75 * 60.0, 14.0), "smoke": (5 * 60.0, 14.0)}
"""Seconds and GiB, by the name of the run."""
SAMPLE_S = 4.0


def service_of(process: psutil.Process) -> str:
    """The service that a process belongs to: that of its nearest ancestor started as `python -m services.<name>`."""
    for candidate in (process, *process.parents()):
        words = candidate.cmdline()
        modules = [word.removeprefix("services.") for word in words if word.startswith("services.")]
        if modules:
            return modules[0]
        if words and words[0].endswith("-server") or "redis" in candidate.name() or "valkey" in candidate.name():
            return "redis"
    return "other"


def sample(root: psutil.Process) -> dict[str, float]:
    """GiB by service, now."""
    found: dict[str, float] = defaultdict(float)
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                found[service_of(process)] += process.memory_full_info().pss / 2**30
    return found


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/smoke.toml")
    parser.add_argument("--attach", type=int, help="process id of a running `forage up`")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "services.suite", "up", "--config", arguments.config]
    root = psutil.Process(arguments.attach or subprocess.Popen(command).pid)
    started, peaks, peak = root.create_time(), defaultdict(float), 0.0
    while alive(root):
        now = sample(root)
        peak = max(peak, sum(now.values()))
        for name, gibibytes in now.items():
            peaks[name] = max(peaks[name], gibibytes)
        time.sleep(SAMPLE_S)
    report(arguments.config, time.time() - started, peak, peaks)


def report(config: str, seconds: float, peak: float, peaks: dict[str, float]) -> None:
    from services.contract.config import load_config

    seconds_budget, memory_budget = BUDGETS.get(load_config(config).run.name, BUDGETS["quickstart"])
    for name, gibibytes in sorted(peaks.items(), key=lambda item: -item[1]):
        print(f"{name:<12} peak {gibibytes:5.2f} GiB")
    print(f"wall clock   {seconds / 60:5.1f} min   {seconds / seconds_budget:.2f} × the budget of {seconds_budget / 60:.0f} min")
    print(f"all together {peak:5.2f} GiB   {peak / memory_budget:.2f} × the budget of {memory_budget:.0f} GiB")


if __name__ == "__main__":
    main()

"""Runs a plan: starts each service when what it waits for is ready, restarts what fails, stops everything, leaves nothing behind.

Every service is a process group of its own. Stopping sends SIGTERM in reverse order of the plan (the trainer saves first),
waits the service's grace, then kills the group. A supervisor killed with -9 takes its services with it (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from services.suite.plan import Service

logger = logging.getLogger("suite")

POLL_S = 0.3
RESTARTS = 3
RESTART_WAIT_S = 2.0
LASTED_S = 600.0
"""A service that ran for so long is not in a crash loop: its failures are counted from the beginning again."""
_PR_SET_PDEATHSIG = 1


class SuiteFailed(Exception):
    """A service failed too often. The message names it and its exit code."""


class Supervisor:
    def __init__(self, plan: list[Service], environment: dict[str, str], on_ready: Callable[[], None] | None = None) -> None:
        self.plan, self.environment, self.on_ready = plan, environment, on_ready
        self.processes: dict[str, subprocess.Popen] = {}
        self._ready: set[str] = set()
        self._failures: dict[str, int] = {}
        self._started: dict[str, float] = {}
        self._stop = threading.Event()

    def request_stop(self) -> None:
        self._stop.set()

    def run(self) -> None:
        """Until the final service is done or a stop is requested. Raises SuiteFailed."""
        try:
            while not self._stop.is_set():
                if self._advance():
                    return
                self._stop.wait(POLL_S)
        finally:
            self.stop_all()

    def _advance(self) -> bool:
        """Look at every service once; True when the final one is done."""
        for service in self.plan:
            process = self.processes.get(service.name)
            if process is None:
                if service.name not in self._ready and self._ready.issuperset(service.after):
                    self._start(service)
            elif (code := process.poll()) is None:
                self._note_ready(service)
            elif code == 0 and service.final:
                return True
            elif code == 0 and service.one_shot:
                self._mark_ready(service.name)
            else:
                self._failed(service, code)
        return False

    def _start(self, service: Service) -> None:
        heartbeat = service.environment.get("FORAGE_HEARTBEAT_FILE")
        if heartbeat:
            Path(heartbeat).unlink(missing_ok=True)  # an old one would call the new process ready
        self._started[service.name] = time.monotonic()
        self.processes[service.name] = subprocess.Popen(
            service.command,
            env=self.environment | service.environment,
            start_new_session=True,
            preexec_fn=_die_with_parent,
            stdin=subprocess.DEVNULL,
        )

    def _note_ready(self, service: Service) -> None:
        if service.one_shot or service.name in self._ready or service.is_ready is None:
            return
        if service.is_ready():
            logger.info("%s is ready", service.name)
            self._mark_ready(service.name)

    def _mark_ready(self, name: str) -> None:
        if name in self._ready:
            return
        self._ready.add(name)
        if self.on_ready and self._ready.issuperset(s.name for s in self.plan):
            self.on_ready()

    def _failed(self, service: Service, code: int) -> None:
        lasted = time.monotonic() - self._started[service.name] > LASTED_S
        failures = self._failures[service.name] = 1 if lasted else self._failures.get(service.name, 0) + 1
        self._ready.discard(service.name)
        kill_group(self.processes.pop(service.name))
        if code == 2 or failures > RESTARTS:  # 2: its configuration cannot be used; another start would say the same
            raise SuiteFailed(f"{service.name} {_ending(code)}" + (f" {failures} times" if failures > 1 else ""))
        logger.warning("%s %s: starting it again (%d of %d)", service.name, _ending(code), failures, RESTARTS)
        self._stop.wait(RESTART_WAIT_S)

    def stop_all(self) -> None:
        """SIGTERM in reverse order, so that whoever depends on a service is gone before it; then SIGKILL."""
        for service in reversed(self.plan):
            process = self.processes.pop(service.name, None)
            if process is None:
                continue
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(service.grace_s)
            kill_group(process)


def kill_group(process: subprocess.Popen) -> None:
    """Kill the process and whatever it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

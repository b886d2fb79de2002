"""Several machines on one: network namespaces on a bridge, each with an address, a host name, an /etc/hosts and a /tmp of its own.

What they share is the disk outside /tmp, and in /tmp the folders that are named: as machines share a file system. Nothing of it
touches the network of the machine underneath; it is gone when its processes are.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NETWORK = "10.99.0"
NOBODY = "02:00:00:00:00:ff"
"""A hardware address that no machine has."""
WHILE_THE_TESTS_LIVE = ["setpriv", "--pdeathsig", "KILL"]
"""Before a command: it is killed when the process that runs the tests ends, however that ends."""
BOOT = """set -e
hostname "$NAME"
ip link set lo up
mount --bind "$HOSTS" /etc/hosts
mount --rbind /tmp /mnt
mount -t tmpfs tmpfs /tmp
for folder in $SHARED; do mkdir -p "/tmp/$folder"; mount --rbind "/mnt/$folder" "/tmp/$folder"; done
echo up
exec sleep infinity
"""
SWITCH = "set -e; ip link add br0 type bridge; ip link set br0 up; ip link set lo up; echo up; exec sleep infinity"


def refusal() -> str:
    """Why this machine cannot play several; empty where it can."""
    missing = [tool for tool in ("ip", "unshare", "nsenter", "setpriv", "mount") if not shutil.which(tool)]
    if missing:
        return f"needs {', '.join(missing)}"
    try_all = ["unshare", "--net", "--uts", "--mount", "ip", "link", "add", "br0", "type", "bridge"]
    tried = subprocess.run(try_all, capture_output=True, text=True)
    return f"the kernel lets this user make no networks: {tried.stderr.strip()}" if tried.returncode else ""


class Process:
    """A program on one of the machines, its output in a file."""

    def __init__(self, name: str, command: list[str], log: Path, heartbeat: Path, environment: dict[str, str]) -> None:
        self.name, self.log, self.heartbeat = name, log, heartbeat
        heartbeat.unlink(missing_ok=True)
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)

    @property
    def ready(self) -> bool:
        from services.contract.telemetry import check_heartbeat

        assert self.process.poll() is None, f"{self.name} has ended:\n{self.text()[-4000:]}"
        try:
            return check_heartbeat(self.heartbeat, 60).startswith("ready")
        except RuntimeError:
            return False

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout_s: float) -> int:
        """Its exit code. Raises AssertionError with its output when it does not end."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end:\n{self.text()[-4000:]}") from None


class Machine:
    def __init__(self, lan: Lan, name: str, number: int) -> None:
        self.lan, self.name, self.address = lan, name, f"{NETWORK}.{number}"
        self._started: list[Process] = []
        environment = os.environ | {"NAME": name, "HOSTS": str(lan.hosts), "SHARED": " ".join(lan.shared_in_tmp)}
        self._holder = _hold(["--net", "--uts", "--mount"], BOOT, environment)
        lan.switch("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(self._holder.pid))
        lan.switch("ip", "link", "set", name, "master", "br0", "up")
        self.add_address(self.address)
        self("ip", "link", "set", "eth0", "up")

    def __call__(self, *command: str, timeout: float = 60) -> str:
        """Run a command on it and return what it said."""
        return subprocess.run(_enter(self._holder, *command), check=True, capture_output=True, text=True, timeout=timeout).stdout

    def add_address(self, address: str) -> None:
        self("ip", "address", "add", f"{address}/24", "dev", "eth0")

    def start(self, name: str, *command: str, **environment: str) -> Process:
        """Start a program on it. `python` is the one that runs the tests."""
        program, *rest = command
        program = sys.executable if program == "python" else program
        clean = {key: value for key, value in os.environ.items() if not key.startswith("FORAGE_")}
        heartbeat = self.lan.folder / f"{name}.heartbeat"
        values = clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FORAGE_HEARTBEAT_FILE": str(heartbeat)} | environment
        entered = _enter(self._holder, program, *rest)
        self._started.append(Process(name, entered, self.lan.folder / "logs" / f"{name}.log", heartbeat, values))
        return self._started[-1]

    def lose_power(self) -> None:
        """Everything that runs on it is gone at once."""
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for started in self._started:
            started.process.wait(20)
        self._started.clear()

    def _pids(self) -> Iterator[int]:
        home = _network_of(self._holder.pid)
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self._holder.pid and _network_of(int(entry.name)) == home:
                yield int(entry.name)

    @contextlib.contextmanager
    def unplugged(self) -> Iterator[None]:
        """Its cable is out of the switch: nobody is told, connections just fall silent."""
        self.lan.switch("ip", "link", "set", self.name, "down")
        try:
            yield
        finally:
            self.lan.switch("ip", "link", "set", self.name, "up")

    def close(self) -> None:
        self.lose_power()
        self._holder.kill()
        self._holder.wait()


class Lan:
    """The machines of these names, each able to reach all others by name."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self.hosts = folder / "hosts"
        known = [f"{NETWORK}.{number} {name}" for number, name in enumerate(names, 1)]
        self.hosts.write_text("\n".join(["127.0.0.1 localhost", *known]) + "\n")
        shared = {path.resolve() for path in (folder, ROOT, Path(sys.prefix))}
        self.shared_in_tmp = [str(path.relative_to("/tmp")) for path in shared if path.is_relative_to("/tmp")]
        self._switch = _hold(["--net"], SWITCH, dict(os.environ))
        self.machines = {name: Machine(self, name, number) for number, name in enumerate(names, 1)}

    def __getitem__(self, name: str) -> Machine:
        return self.machines[name]

    def switch(self, *command: str) -> None:
        subprocess.run(_enter(self._switch, *command, mount=False), check=True, capture_output=True, timeout=20)

    @contextlib.contextmanager
    def cut(self, one: str, other: str) -> Iterator[None]:
        """The way between two machines is broken: what either sends the other reaches nobody. All else goes on."""
        pairs = [(self[one], self[other]), (self[other], self[one])]
        for here, there in pairs:
            here("ip", "neighbour", "replace", there.address, "lladdr", NOBODY, "nud", "permanent", "dev", "eth0")
        try:
            yield
        finally:
            for here, there in pairs:
                here("ip", "neighbour", "del", there.address, "dev", "eth0")

    def until(self, holds: Callable[[], Any], what: str, timeout_s: float = 900) -> Any:
        """Wait for something to become true and return it; the end of every log is shown when it does not."""
        deadline = time.monotonic() + timeout_s
        while not (result := holds()):
            if time.monotonic() > deadline:
                logs = "".join(f"\n--- {log.name}\n{log.read_text()[-2000:]}" for log in (self.folder / "logs").glob("*.log"))
                raise AssertionError(f"waited {timeout_s:.0f} s in vain: {what}{logs}")
            time.sleep(0.1)
        return result

    def close(self) -> None:
        for machine in self.machines.values():
            machine.close()
        self._switch.kill()
        self._switch.wait()


def _hold(spaces: list[str], script: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A process that keeps namespaces alive. Raises AssertionError when it cannot set them up."""
    command = [*WHILE_THE_TESTS_LIVE, "unshare", *spaces, "sh", "-c", script]
    holder = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert holder.stdout
    said = holder.stdout.readline()
    assert said == b"up\n", f"no machine: {said.decode()}"
    return holder


def _enter(holder: subprocess.Popen[bytes], *command: str, mount: bool = True) -> list[str]:
    spaces = ["--net", "--uts", "--mount", f"--wd={ROOT}"] if mount else ["--net"]
    return [*WHILE_THE_TESTS_LIVE, "nsenter", f"--target={holder.pid}", *spaces, "--", *command]


def _network_of(pid: int) -> str:
    try:
        return str((Path("/proc") / str(pid) / "ns/net").readlink())
    except OSError:
        return ""

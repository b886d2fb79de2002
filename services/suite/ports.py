"""What two suites of local processes on one machine must not share: a folder, and ports."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import IO

from services.contract.config import Config, ConfigError
from services.contract.files import hold_lock


def hold_folder(folder: Path) -> IO[str]:
    """The folder is this suite's until the file that comes back is closed. Raises ConfigError when another suite has it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return hold_lock(folder / "lock")
    except BlockingIOError:
        message = f"a suite is already running on {folder.parent}: stop it, or give this run another name (run.name)"
        raise ConfigError(message) from None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refuse_taken_port(config: Config) -> None:
    """Raises ConfigError when the retriever could not listen."""
    host, port = config.retriever.host, config.retriever.port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            where = "set FORAGE_RETRIEVER__PORT and FORAGE_RETRIEVER__URL to another"
            raise ConfigError(f"the retriever's port {port} cannot be used ({error.strerror}): {where}") from None

"""What a person watching sees: one line a fact, a bar with an ETA on long work; and heartbeat files for health checks."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from types import TracebackType

BAR_WIDTH = 24
QUIET_LIBRARIES = ("httpx", "httpcore", "urllib3", "faiss", "transformers", "filelock", "asyncio", "megatron", "torch")


def configure_logging(service: str) -> logging.Logger:
    """Log to stdout as ``20:14:03 trainer  message``; FORAGE_LOG_LEVEL sets the level. Returns the service's logger."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {service:<9} %(levelmark)s%(message)s", "%H:%M:%S"))
    handler.addFilter(_mark_level)
    logging.basicConfig(level=os.environ.get("FORAGE_LOG_LEVEL", "INFO").upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    for name in QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    return logging.getLogger(service)


def _mark_level(record: logging.LogRecord) -> bool:
    record.levelmark = "" if record.levelno <= logging.INFO else f"{record.levelname}: "
    return True


class Progress:
    """A bar with rate and ETA: drawn in place on a terminal, a line every few seconds in a log.

    >>> with Progress("embedding passages", total=4800, unit="passages") as bar:
    ...     bar.advance(64)

    done: how many of `total` an earlier process left done; rate and ETA are those of the rest.
    """

    def __init__(self, label: str, total: int, unit: str = "", every_s: float = 5.0, done: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self._before, self._shown = done, done, -1
        self._terminal = sys.stdout.isatty()
        self._every_s = 0.2 if self._terminal else every_s
        self._started = self._drawn = time.monotonic()
        self._logger = logging.getLogger("progress")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._shown != self.done:
            self._draw()
        if self._terminal:
            print(flush=True)

    def advance(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if now - self._drawn >= self._every_s:
            self._drawn = now
            self._draw()

    def line(self) -> str:
        """The bar as text, for a log line or a /ready answer."""
        elapsed = time.monotonic() - self._started
        rate = (self.done - self._before) / elapsed if elapsed > 0 else 0.0
        share = self.done / self.total if self.total else 1.0
        filled = int(BAR_WIDTH * min(share, 1.0))
        bar = "█" * filled + "·" * (BAR_WIDTH - filled)
        left = (self.total - self.done) / rate if rate else 0.0
        ending = f"in {format_seconds(elapsed)}" if self.done >= self.total else f"ETA {format_seconds(left) if rate else '?'}"
        return f"{self.label} {bar} {self.done:,}/{self.total:,} {self.unit} {rate:.1f}/s {ending}"

    def _draw(self) -> None:
        self._shown = self.done
        if self._terminal:
            print(f"\r\x1b[2K{self.line()}", end="", flush=True)
        else:
            self._logger.info(self.line())


def format_seconds(seconds: float) -> str:
    """90 -> '1m30s'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


class Heartbeat:
    """A file whose age tells a health check whether the loop that owns it still turns.

    The file's text is the state in words. `python -m services.contract.telemetry FILE MAX_AGE_S` is the check.
    """

    def __init__(self, path: Path | str | None) -> None:
        self.path = Path(path) if path else None

    @classmethod
    def from_environment(cls) -> Heartbeat:
        """FORAGE_HEARTBEAT_FILE names the file; without it nothing is written."""
        return cls(os.environ.get("FORAGE_HEARTBEAT_FILE"))

    def beat(self, state: str) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(state)
        temporary.replace(self.path)


def check_heartbeat(path: Path, max_age_s: float) -> str:
    """The state in words. Raises RuntimeError when the file is missing, too old, or says that the service is not ready."""
    if not path.exists():
        raise RuntimeError(f"{path}: no heartbeat yet")
    age = time.time() - path.stat().st_mtime
    state = path.read_text()
    if age > max_age_s:
        raise RuntimeError(f"last heartbeat {age:.0f} s ago ({state})")
    if state.startswith("starting"):
        raise RuntimeError(state)
    return state


def main() -> None:
    path, max_age_s = Path(sys.argv[1]), float(sys.argv[2])
    try:
        print(check_heartbeat(path, max_age_s))
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

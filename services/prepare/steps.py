"""An output is whole or absent: made under a temporary name, synced, renamed; its manifest comes last.

| found at start                                    | what happens                               |
|---------------------------------------------------|--------------------------------------------|
| manifest, same fingerprint, files as it says      | the step is skipped                        |
| no manifest (a run was cut off before it)         | made again                                 |
| fingerprint differs (settings, packages, code)    | made again                                 |
| a file is missing, truncated or changed           | made again                                 |
| a temporary left behind by a killed run           | removed, then as above; of a download: it  |
|                                                   | goes on there                              |

A file `x` has the manifest `x.manifest.json`; a folder holds its own `manifest.json`. Digests are compared for files of
up to 64 MiB, sizes for all. Two `prepare` processes at once on the same folder are not provided for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from services.contract.files import file_digest, move_into_place, replace_file, sync
from services.contract.telemetry import format_seconds
from services.prepare.errors import PrepareError

logger = logging.getLogger("prepare")

DIGEST_UP_TO = 64 << 20
"""Bytes. Larger files are checked by size alone, so that a start stays quick."""
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Step:
    """One output and how to make it. `make` writes a file or a folder at the path it is given."""

    name: str
    output: Path
    inputs: Mapping[str, Any]
    """All that decides the output's bytes: settings, package versions, code. JSON values."""
    make: Callable[[Path], Mapping[str, str] | None]
    """It may return the SHA-256 of files that it has read itself, by their name in the output, so that they are not read again."""
    resumable: bool = False
    """What an earlier try left under the temporary name is kept, for `make` to go on with."""

    @property
    def temporary(self) -> Path:
        return self.output.with_name(f".{self.output.name}.partial")

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()


def run_step(step: Step) -> bool:
    """Make the output unless it is there and whole. Returns whether it was made."""
    reason = why_remake(step)
    if reason is None:
        logger.info("%s: already there (%s), skipped", step.name, step.output)
        return False
    logger.info("%s: making %s (%s)", step.name, step.output, reason)
    started = time.monotonic()
    try:
        step.output.parent.mkdir(parents=True, exist_ok=True)
        if not step.resumable:
            _remove(step.temporary)
        digests = step.make(step.temporary)
        _publish(step, digests or {})
    except OSError as error:
        raise PrepareError(f"{step.name}: {step.output} could not be made: {error}; mend that and start again") from error
    finally:
        if not step.resumable:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                _remove(step.temporary)
    logger.info("%s: done in %s", step.name, format_seconds(time.monotonic() - started))
    return True


def why_remake(step: Step) -> str | None:
    """The reason in words, or None when the output is whole."""
    if not step.output.exists():
        return "not there yet"
    try:
        manifest = json.loads(manifest_path(step.output).read_text())
        if manifest["fingerprint"] != step.fingerprint:
            return "settings, packages or code have changed: " + _changes(manifest["inputs"], step.inputs)
        return _broken_file(step.output, manifest["files"])
    except FileNotFoundError:
        return "it was not finished"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"


def manifest_path(output: Path) -> Path:
    return output / MANIFEST if output.is_dir() else output.with_name(f"{output.name}.{MANIFEST}")


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return ", ".join(key for key in sorted({*before, *now}) if before.get(key) != now.get(key))


def _broken_file(output: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    for name, expected in files.items():
        path = output / name if output.is_dir() else output
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size} bytes instead of {expected['bytes']}"
        if size <= DIGEST_UP_TO and file_digest(path) != expected["sha256"]:
            return f"{name} was changed"
    return None


def _publish(step: Step, digests: Mapping[str, str]) -> None:
    """The old output loses its manifest first: at no moment does a manifest stand beside a file it does not describe."""
    made = step.temporary
    manifest_path(step.output).unlink(missing_ok=True)
    files = describe(made, step.output.name, digests)
    manifest = json.dumps({"fingerprint": step.fingerprint, "inputs": dict(step.inputs), "files": files}, indent=1).encode()
    if made.is_dir():
        replace_file(made / MANIFEST, manifest)
        _remove(step.output)
        move_into_place(made, step.output)
    else:
        move_into_place(made, step.output)
        replace_file(manifest_path(step.output), manifest)


def describe(made: Path, name: str, digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Bytes and digest (computed unless it is in `digests`) of a file, or of every file in a folder; each is synced first."""
    paths = {str(p.relative_to(made)): p for p in sorted(made.rglob("*")) if p.is_file()} if made.is_dir() else {name: made}
    for path in paths.values():
        sync(path)
    return {key: {"bytes": path.stat().st_size, "sha256": digests.get(key) or file_digest(path)} for key, path in paths.items()}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def code_digest(*modules: str) -> str:
    """Digest of this service's modules that decide an output: change the wording of a passage and it is made again."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / f"{module}.py").read_bytes() for module in modules)).hexdigest()[:16]


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        raise PrepareError(f"the package {name} is not installed: pip install 'forage[prepare]'") from None

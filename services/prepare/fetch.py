"""Downloads what the configuration names with `hub:NAME`, each into one output at `<data.directory>/hub/NAME`.

Nothing is asked of the hub for what is already here and whole: a prepared machine starts without a network. What is missing is
planned first, all of it, so that a disk that is too small is told before the first byte.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO

from services.contract.config import Config, hub_name
from services.contract.files import hold_lock
from services.prepare.catalogue import GB, Entry, Kind, find_entry, require_kind
from services.prepare.errors import PrepareError
from services.prepare.hub import Patience, RemoteFile, remote_files
from services.prepare.models import check_model_folder
from services.prepare.steps import Step, run_step, why_remake
from services.prepare.transfer import Placed, Transfer, place_joined

logger = logging.getLogger("prepare")

SPARE_BYTES = 1 << 30
"""Left free besides what is downloaded and unpacked."""


class Fetch:
    """One name of the catalogue on its way to its output."""

    def __init__(self, entry: Entry, output: Path, patience: Patience) -> None:
        self.entry, self.output, self.patience = entry, output, patience
        inputs = {"repo": entry.repo, "revision": entry.revision, "files": list(entry.files)}
        self.step = Step(f"hub:{entry.name}", output, inputs, self._make, resumable=True)

    @cached_property
    def transfer(self) -> Transfer:
        """What the hub has and what of it is here already; asks the hub, once."""
        temporary = self.step.temporary
        temporary.parent.mkdir(parents=True, exist_ok=True)
        placed = place(self.entry, remote_files(self.entry, self.patience), temporary)
        return Transfer(placed, temporary.with_name(f"{temporary.name}.journal.json"), self.patience)

    @property
    def bytes_needed(self) -> int:
        """Still to download, and to unpack afterwards."""
        return self.transfer.missing + round(self.transfer.size * self.entry.growth)

    def run(self) -> None:
        """The output is here and whole. Raises PrepareError."""
        if run_step(self.step):
            self.transfer.forget()

    def _make(self, temporary: Path) -> Mapping[str, str]:
        digests = self.transfer.run(self.entry.name)
        if self.entry.is_one_file:
            return {self.output.name: digests[temporary]}
        for path in temporary.rglob("*"):
            if path.is_file() and path not in digests:
                path.unlink()  # of a try that was made when the repository had other files
        if self.entry.kind == "model":
            check_model_folder(temporary, f"hub:{self.entry.name}")
        return {str(path.relative_to(temporary)): digest for path, digest in digests.items()}


def fetch(config: Config, patience: Patience | None = None) -> None:
    """Everything that `config` names by `hub:` is here and whole afterwards. Raises PrepareError."""
    folder = config.data.directory / "hub"
    missing = [each for each in planned(config, patience or Patience()) if why_remake(each.step)]
    if not missing:
        return
    with _sole_downloader(folder):
        _need_room(folder, missing)
        for each in missing:
            each.run()


def planned(config: Config, patience: Patience) -> list[Fetch]:
    """All that the configuration names, here already or not."""
    entries = named_entries(config).items()
    return [Fetch(entry, config.data.hub_path(name), patience) for name, entry in entries]


def named_entries(config: Config) -> dict[str, Entry]:
    """What the configuration names, by its name. Raises PrepareError for an unknown name or one of the wrong kind."""
    found: dict[str, Entry] = {}
    for key, path, kind in _places(config):
        if name := hub_name(path):
            found[name] = require_kind(find_entry(name, key), kind, key)
    return found


def _places(config: Config) -> Iterator[tuple[str, Path | None, Kind]]:
    data, retriever = config.data, config.retriever
    yield "model.path", config.model.path, "model"
    yield "retriever.encoder", retriever.encoder, "model"
    yield "retriever.passage_encoder", retriever.passage_encoder, "model"
    yield "retriever.rerank.model", retriever.rerank.model, "model"
    yield "data.corpus", data.corpus, "corpus"
    yield "data.index", data.index, "index"
    yield "retriever.bm25.index", retriever.bm25.index, "bm25"
    for key in ("train_questions", "eval_questions"):
        for file in data.question_files(key):
            yield f"data.{key}", file.path, "questions"


def place(entry: Entry, files: Sequence[RemoteFile], temporary: Path) -> list[Placed]:
    """Into one file, or into a folder: by the names of its repository, without the folder that a Lucene index lies in."""
    if entry.is_one_file:
        return place_joined(files, temporary)
    return [Placed(file, temporary / (Path(file.name).name if entry.kind == "bm25" else file.name)) for file in files]


def _need_room(folder: Path, missing: Sequence[Fetch]) -> None:
    """Raises PrepareError, with the bill, when the disk cannot hold what is still missing."""
    free = shutil.disk_usage(folder).free
    bill = {each.entry.name: each.bytes_needed for each in missing}
    needed = sum(bill.values())
    parts = ", ".join(f"{name} {size / GB:.1f} GB" for name, size in bill.items())
    logger.info("to download, with room to unpack: %s; %.1f GB are free at %s", parts, free / GB, folder)
    if needed + SPARE_BYTES > free:
        raise PrepareError(
            f"{folder}: {needed / GB:.1f} GB are needed, and {SPARE_BYTES / GB:.1f} GB to spare, but {free / GB:.1f} GB are free "
            f"({parts}); free some, or set data.directory to a larger disk"
        )


def _sole_downloader(folder: Path) -> IO[str]:
    """Held until it is closed. Raises PrepareError when another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return hold_lock(folder / ".lock")
    except BlockingIOError:
        raise PrepareError(f"{folder}: another process downloads here; wait for it or stop it") from None

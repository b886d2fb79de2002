"""Downloads files by HTTP ranges, several at once, into their places: a part of a joined file straight to its offset in it.

| what happens                                | then                                                                     |
|---------------------------------------------|--------------------------------------------------------------------------|
| the line breaks, stalls, 429, 5xx           | that range goes on at its next byte, after a pause                       |
| the process is killed                       | the next start goes on where the journal (written every second) says     |
| the hub has another file under the name now | that file starts over; the others go on                                  |
| fewer or more bytes than the hub had said   | PrepareError                                                             |
| all bytes are there, the digest is another  | PrepareError; that file alone starts over next time                      |
| the disk is full                            | OSError, told by the step; everything stays for the next start           |

The journal `<target>.journal.json` says of every range how many of its bytes are in the file. A byte is written before it is
counted, so a killed process loses at most the second since the last journal; after a power cut the digest decides.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from services.contract.telemetry import Progress
from services.prepare import hub
from services.prepare.errors import PrepareError
from services.prepare.hub import GIT_SHA1, Patience, RemoteFile

RANGE_BYTES = 64 << 20
CHUNK_BYTES = 1 << 20
CONNECTIONS = 8
JOURNAL_EVERY_S = 1.0


@dataclass(frozen=True)
class Placed:
    """A remote file and where its bytes belong."""

    remote: RemoteFile
    path: Path
    offset: int = 0
    """In `path`, whose other bytes are other parts'."""


def place_joined(files: Sequence[RemoteFile], path: Path) -> list[Placed]:
    """One after another in one file."""
    offset, placed = 0, []
    for file in files:
        placed.append(Placed(file, path, offset))
        offset += file.size
    return placed


class _Known(msgspec.Struct):
    """A file of the journal: which one it is, and how many bytes of each of its ranges are there."""

    size: int
    digest: str
    """Where the hub tells none: the address, which holds the commit."""
    range_bytes: int
    done: list[int]


class Transfer:
    """`run()` brings every file; `missing` tells beforehand how many bytes that is. `journal` lies on the target's disk."""

    def __init__(self, files: Sequence[Placed], journal: Path, patience: Patience, range_bytes: int = RANGE_BYTES) -> None:
        self.files, self.patience, self.range_bytes = files, patience, range_bytes
        self._journal, self._lock, self._stop = journal, threading.Lock(), threading.Event()
        before = _read_journal(journal)
        self._known = {file.remote.name: self._take_up(file, before.get(file.remote.name)) for file in files}

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(known.size for known in self._known.values())

    @property
    def missing(self) -> int:
        """Bytes that are not here yet."""
        return sum(known.size - sum(known.done) for known in self._known.values())

    def run(self, label: str) -> dict[Path, str]:
        """Everything is there and is what the hub says: SHA-256 of every file written. Raises PrepareError, OSError.

        The journal stays until `forget`, so that whoever is killed before the files have their final place verifies them again
        and downloads nothing.
        """
        self._make_room()
        try:
            self._download(label)
        finally:
            self._write_journal()
        return self._verify(label)

    def forget(self) -> None:
        """What came has its final place: the journal has done its work."""
        self._journal.unlink(missing_ok=True)

    # -- bringing ------------------------------------------------------------------------------------------------------

    def _download(self, label: str) -> None:
        ranges = [(file, index) for file in self.files for index in range(len(self._known[file.remote.name].done))]
        start = self.missing
        if not start:
            return
        with ThreadPoolExecutor(CONNECTIONS) as pool, Progress(f"downloading {label}", start, "bytes") as bar:
            futures = [pool.submit(self._bring, file, index) for file, index in ranges]
            try:
                self._watch(futures, bar, start)
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _watch(self, futures: Iterable[Future[None]], bar: Progress, start: int) -> None:
        """Until all are done or one has failed: draw the bar, keep the journal."""
        left = set(futures)
        while left:
            done, left = wait(left, JOURNAL_EVERY_S, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            self._write_journal()
            bar.advance(start - self.missing - bar.done)

    def _bring(self, file: Placed, index: int) -> None:
        """One range, to its last byte."""
        failures, known = 0, self._known[file.remote.name]
        length = min(self.range_bytes, known.size - index * self.range_bytes)
        while known.done[index] < length and not self._stop.is_set():
            before = known.done[index]
            try:
                self._ask(file, index, length)
            except (HfHubHTTPError, httpx.TransportError) as error:
                failures = 1 if known.done[index] > before else failures + 1
                what = f"{file.remote.name} at byte {index * self.range_bytes + known.done[index]:,}"
                if not hub.may_pass(error) or failures >= self.patience.tries:
                    mend = "start again: it goes on from there" if hub.may_pass(error) else "mend HF_TOKEN or HF_ENDPOINT"
                    raise PrepareError(f"{what} of {file.remote.url}: {hub.short(error)}; {mend}") from error
                hub.wait(error, failures, self.patience, what, self._stop.wait)

    def _ask(self, file: Placed, index: int, length: int) -> None:
        """As many bytes of the range as this connection brings."""
        known, begin = self._known[file.remote.name], index * self.range_bytes
        first, last = begin + known.done[index], begin + length - 1
        headers = build_hf_headers() | {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", file.remote.url, headers=headers, timeout=self.patience.stall_s) as response:
            hf_raise_for_status(response)
            skip = _bytes_before(response, file.remote, first)
            with file.path.open("r+b") as out:
                for chunk in response.iter_bytes():  # as it comes: a larger piece would be lost with the line
                    wanted = chunk[skip : skip + length - known.done[index]]
                    skip = max(skip - len(chunk), 0)
                    _write_at(out.fileno(), wanted, file.offset + begin + known.done[index])
                    known.done[index] += len(wanted)
                    if known.done[index] == length or self._stop.is_set():
                        return
        raise httpx.RemoteProtocolError("the answer ended early")

    # -- knowing what is there -----------------------------------------------------------------------------------------

    def _take_up(self, file: Placed, before: _Known | None) -> _Known:
        """What the journal says of this very file, if the bytes can still be there; else nothing."""
        remote = file.remote
        fresh = _Known(remote.size, remote.digest or remote.url, self.range_bytes, [0] * -(-remote.size // self.range_bytes))
        same = before and (before.size, before.digest, before.range_bytes) == (fresh.size, fresh.digest, fresh.range_bytes)
        there = file.path.is_file() and file.path.stat().st_size >= file.offset + remote.size
        return before if before and same and there and len(before.done) == len(fresh.done) else fresh

    def _make_room(self) -> None:
        """Files of their full length, so that every range can be written where it belongs. Unwritten parts take no disk."""
        sizes: dict[Path, int] = {}
        for file in self.files:
            sizes[file.path] = max(sizes.get(file.path, 0), file.offset + file.remote.size)
        for path, size in sizes.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as out:
                out.truncate(size)

    def _write_journal(self) -> None:
        with self._lock:
            temporary = self._journal.with_name(self._journal.name + ".tmp")
            temporary.write_bytes(msgspec.json.encode(self._known))
            temporary.replace(self._journal)

    def _verify(self, label: str) -> dict[Path, str]:
        """One pass over what was written. Parts of one file are read in their order, so that its own digest comes out too."""
        wholes: dict[Path, hashlib._Hash] = {}
        files_at = Counter(file.path for file in self.files)
        with Progress(f"verifying {label}", self.size, "bytes") as bar:
            for file in self.files:
                whole = wholes.setdefault(file.path, hashlib.sha256())
                alone = files_at[file.path] == 1 and not GIT_SHA1.fullmatch(file.remote.digest)
                part = whole if alone else _hasher(file.remote)
                _feed({whole, part}, file, bar)
                if file.remote.digest and part.hexdigest() != file.remote.digest:
                    self._start_over(file)
        return {path: whole.hexdigest() for path, whole in wholes.items()}

    def _start_over(self, file: Placed) -> None:
        self._known[file.remote.name].done = [0] * len(self._known[file.remote.name].done)
        self._write_journal()
        raise PrepareError(
            f"{file.remote.url}: what came has another digest than the hub says ({file.remote.digest[:12]}…); start again: only "
            "this file is downloaded anew. If it stays so, a proxy or mirror on the way changes it: mend HF_ENDPOINT"
        )


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    """All of it: the system may take a part only, when the disk is nearly full."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _bytes_before(response: httpx.Response, remote: RemoteFile, first: int) -> int:
    """How many bytes of the answer come before byte `first`: none of a range, `first` of a server that sends the whole file."""
    if response.status_code != 206:
        if first >= RANGE_BYTES:
            raise PrepareError(f"{remote.url}: the server sends whole files only (no ranges); mend HF_ENDPOINT")
        told = response.headers.get("Content-Length")
        _compare_size(remote, None if told is None else int(told))
        return first
    span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    _compare_size(remote, int(total) if total.isdigit() else None)
    if span.partition("-")[0] != str(first):
        raise PrepareError(
            f"{remote.url}: asked for byte {first}, the server sends {span or 'it does not say what'}; mend HF_ENDPOINT"
        )
    return 0


def _compare_size(remote: RemoteFile, told: int | None) -> None:
    if told is not None and told != remote.size:
        raise PrepareError(
            f"{remote.url}: the hub says {remote.size:,} bytes, its file server {told:,}; try again, or mend HF_ENDPOINT"
        )


def _hasher(remote: RemoteFile) -> hashlib._Hash:
    if GIT_SHA1.fullmatch(remote.digest):
        return hashlib.sha1(f"blob {remote.size}\0".encode(), usedforsecurity=False)
    return hashlib.sha256()


def _feed(hashers: Collection[hashlib._Hash], file: Placed, bar: Progress) -> None:
    left = file.remote.size
    with file.path.open("rb") as source:
        source.seek(file.offset)
        while left and (chunk := source.read(min(left, 4 * CHUNK_BYTES))):
            for hasher in hashers:
                hasher.update(chunk)
            left -= len(chunk)
            bar.advance(len(chunk))


def _read_journal(path: Path) -> Mapping[str, _Known]:
    """Empty when there is none, or none that can be read."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(path.read_bytes(), type=dict[str, _Known])
    return {}

"""What a hub holds of a catalogue entry, asked by `huggingface_hub`: which files, how large, with which digest.

`HF_ENDPOINT` (a mirror), `HF_TOKEN` and the token files, `HF_HUB_OFFLINE`, proxies and `HF_HUB_DOWNLOAD_TIMEOUT` count as they do
everywhere with that library. Xet is not used: every byte comes by HTTP ranges, which all mirrors speak and which can be resumed.

| the hub answers                    | what happens                                                       |
|------------------------------------|--------------------------------------------------------------------|
| 401, 403, a gated repository       | PrepareError: set HF_TOKEN, ask for access                         |
| 404 for repository, revision, file | PrepareError: what is not there, and the mend                      |
| 429, 5xx, nothing, a broken line   | tried again with growing pauses, `Retry-After` kept; then the same |
| HF_HUB_OFFLINE is set              | PrepareError: give a folder instead of the name                    |
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import httpx
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from services.prepare.catalogue import Entry
from services.prepare.errors import PrepareError

logger = logging.getLogger("prepare")

Result = TypeVar("Result")
SHA256, GIT_SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
HEADS_AT_ONCE = 8


@dataclass(frozen=True)
class Patience:
    """How long a hub that does not answer is asked again."""

    tries: int = 8
    """In a row, without one byte between them."""
    first_pause_s: float = 1.0
    longest_pause_s: float = 60.0
    stall_s: float = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    """A connection that brings nothing for so long is given up and made anew."""

    def pause_s(self, failures: int, asked: float | None) -> float:
        """Before the next try, after so many failures in a row; `asked`: the hub's Retry-After."""
        grown = min(self.first_pause_s * 2 ** (failures - 1), self.longest_pause_s)
        return max(grown, min(asked or 0.0, 10 * self.longest_pause_s))


@dataclass(frozen=True)
class RemoteFile:
    """One file at one commit."""

    name: str
    """Its path in the repository."""
    url: str
    size: int
    """Bytes."""
    digest: str
    """SHA-256 (64 hex digits) of large files, git's SHA-1 of the blob (40) of small ones, "" where the hub tells neither."""


def remote_files(entry: Entry, patience: Patience) -> list[RemoteFile]:
    """The files of `entry`, in its order, at the commit that its revision is now. Raises PrepareError."""
    api = HfApi(endpoint=constants.ENDPOINT)
    ask = api.model_info if entry.repo_type == "model" else api.dataset_info
    try:
        info = patiently(lambda: ask(entry.repo, revision=entry.revision), patience, entry.repo)
        names = _matching(entry, [sibling.rfilename for sibling in info.siblings or []])
        commit = info.sha or entry.revision
        with ThreadPoolExecutor(HEADS_AT_ONCE) as pool:
            files = list(pool.map(lambda name: _remote_file(entry, name, commit, patience), names))
    except (OfflineModeIsEnabled, HfHubHTTPError, httpx.HTTPError) as error:
        raise PrepareError(explain(error, entry)) from error
    for file in files:
        _compare_with_known(entry, file)
    return files


def patiently(ask: Callable[[], Result], patience: Patience, what: str) -> Result:
    """`ask()`, again while the failure is one that passes."""
    failures = 0
    while True:
        try:
            return ask()
        except (HfHubHTTPError, httpx.TransportError) as error:
            failures += 1
            if not may_pass(error) or failures >= patience.tries:
                raise
            wait(error, failures, patience, what)


def may_pass(error: Exception) -> bool:
    """Whether it makes sense to ask again."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)


def wait(error: Exception, failures: int, patience: Patience, what: str, pause: Callable[[float], object] = time.sleep) -> None:
    seconds = patience.pause_s(failures, _retry_after(error))
    logger.warning("%s: %s; trying again in %.1f s", what, short(error), seconds)
    pause(seconds)


def short(error: Exception) -> str:
    """The failure in one line."""
    if isinstance(error, HfHubHTTPError):
        return f"HTTP {error.response.status_code}"
    return f"{type(error).__name__}{f' ({error})' if str(error) else ''}".splitlines()[0]


def explain(error: Exception, entry: Entry) -> str:
    """The failure with its mend."""
    where = f"hub:{entry.name} ({entry.repo} @ {entry.revision} on {constants.ENDPOINT})"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{where}: HF_HUB_OFFLINE is set, so nothing is downloaded; unset it, or give a folder's path instead of the name"
    if isinstance(error, GatedRepoError):
        return f"{where}: its owner grants access one by one; ask for it on the repository's page and set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"{where}: there is no such revision; hub:{entry.name.partition('@')[0]}@main takes the newest"
    if isinstance(error, EntryNotFoundError):
        return f"{where}: {_url(error)} is not there; is HF_ENDPOINT a whole mirror?"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
        return (
            f"{where}: not there, or not for everyone (HTTP {status}); mend the name, or set HF_TOKEN to a token that may read it"
        )
    mend = (
        "try again later: what is here stays and is gone on with"
        if may_pass(error)
        else "mend HF_ENDPOINT, or give a folder's path"
    )
    return f"{where}: {short(error)}; {mend}"


def _url(error: Exception) -> str:
    response = getattr(error, "response", None)
    return str(response.request.url) if response is not None else "a file"


def _retry_after(error: Exception) -> float | None:
    value = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(value) if value.isdigit() else None


def _matching(entry: Entry, held: Sequence[str]) -> list[str]:
    """Those of the repository's files that the entry is made of, in the entry's order."""
    found: list[str] = []
    for pattern in entry.files:
        matches = sorted(name for name in held if fnmatchcase(name, pattern) and name.count("/") == pattern.count("/"))
        if not matches and (entry.kind != "model" or "*" not in pattern):
            held_ones = ", ".join(sorted(held)[:8]) or "nothing"
            raise PrepareError(f"hub:{entry.name}: {entry.repo} @ {entry.revision} holds no {pattern} (but {held_ones})")
        found += [name for name in matches if name not in found]
    if not found:
        raise PrepareError(f"hub:{entry.name}: {entry.repo} @ {entry.revision} holds no model; mend the name")
    return found


def _remote_file(entry: Entry, name: str, commit: str, patience: Patience) -> RemoteFile:
    url = hf_hub_url(entry.repo, name, repo_type=entry.repo_type, revision=commit, endpoint=constants.ENDPOINT)
    found = patiently(lambda: get_hf_file_metadata(url, token=None, endpoint=constants.ENDPOINT), patience, name)
    if found.size is None:
        raise PrepareError(f"hub:{entry.name}: {constants.ENDPOINT} does not tell the size of {name}; mend HF_ENDPOINT")
    etag = (found.etag or "").lower()
    told = etag if SHA256.fullmatch(etag) or GIT_SHA1.fullmatch(etag) else ""
    return RemoteFile(name, url, found.size, told or entry.sha256.get(name, ""))


def _compare_with_known(entry: Entry, file: RemoteFile) -> None:
    known = entry.sha256.get(file.name)
    if known and SHA256.fullmatch(file.digest) and known != file.digest:
        raise PrepareError(
            f"hub:{entry.name}: {constants.ENDPOINT} has {file.name} with the digest {file.digest[:12]}…, the catalogue knows "
            f"{known[:12]}… for this revision: something on the way changes files. hub:{entry.name}@main takes it as it is"
        )

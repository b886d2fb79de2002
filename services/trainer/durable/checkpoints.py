"""The checkpoints of one run: folders `v000001`, `v000002` … of the learner's state and the ledger.

A checkpoint is published like a policy version: files and folder synced, the manifest with every file's size and digest last, one
rename, the parent synced (contract/weights.py).

| what is found at the start                               | what is done                                                   |
|----------------------------------------------------------|----------------------------------------------------------------|
| the newest is whole                                      | it is used                                                     |
| a file of it is missing, short or altered                | told about; the one before it is used                          |
| its manifest is missing: half a deletion, or a person    | it is none                                                     |
| there are some, none of them whole                       | the start is refused: a person must say whether to begin anew  |
| there is none                                            | a fresh run                                                    |

| which are kept                        | how long                                                                          |
|---------------------------------------|-----------------------------------------------------------------------------------|
| the last `trainer.keep_checkpoints`   | until as many newer ones are there; on a full disk until one whole newer one is   |
| every `trainer.keep_every`-th step's  | for ever                                                                          |
| damaged ones                          | until a newer one is whole                                                        |
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from services.contract.weights import MANIFEST, WeightsError, collect_garbage, publish, published_versions, verify, version_folder
from services.trainer.durable.ledger import Ledger

logger = logging.getLogger("trainer")

LEDGER_FILE = "ledger.json"


class Checkpoints:
    """Numbered by a serial that only rises. Only the lead calls its methods."""

    def __init__(self, folder: Path, keep: int, keep_every: int = 0) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self._damaged: set[int] = set()

    def save(self, ledger: Ledger, move_state_in: Path) -> Path:
        """Publish the state that lies in `move_state_in` together with the ledger; what is moved is gone if that fails.

        Raises NoSpace.
        """
        collect_garbage(self.folder, 1, in_use=published_versions(self.folder))  # half a deletion may have the next number
        serial = (published_versions(self.folder) or [0])[-1] + 1

        def write(folder: Path) -> None:
            for path in sorted(move_state_in.iterdir()):
                path.rename(folder / path.name)
            (folder / LEDGER_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(ledger)))

        path = publish(self.folder, serial, serial - 1, write)
        self._forget_damaged()
        self._collect_garbage(self.keep)
        return path

    def latest(self) -> tuple[Path, Ledger] | None:
        """The newest checkpoint that is whole; a damaged one is told about and passed over.

        Raises WeightsError when there are checkpoints and none is whole.
        """
        if (found := self._newest_whole()) is None and (count := len(published_versions(self.folder))):
            raise WeightsError(f"none of {count} checkpoints in {self.folder} is whole: mend one, or move them away to begin anew")
        return found

    def _newest_whole(self) -> tuple[Path, Ledger] | None:
        for serial in reversed(published_versions(self.folder)):
            path = version_folder(self.folder, serial)
            try:
                verify(path)
                return path, _read_ledger(path)
            except (WeightsError, OSError, msgspec.DecodeError) as error:
                logger.warning("checkpoint %s is damaged (%s): using the one before it", path.name, error)
                self._damaged.add(serial)
        return None

    def make_room(self) -> bool:
        """Delete what is older than the newest whole checkpoint; with none, nothing. Returns whether anything was deleted."""
        if self._newest_whole() is None:
            return False
        self._forget_damaged()
        return bool(self._collect_garbage(1))

    def ledgers(self) -> dict[int, Ledger]:
        """By serial, of all that are there and can be read."""
        found: dict[int, Ledger] = {}
        for serial in published_versions(self.folder):
            try:
                found[serial] = _read_ledger(version_folder(self.folder, serial))
            except (OSError, msgspec.DecodeError):
                continue  # damaged: it is told about when somebody wants to use it
        return found

    def _collect_garbage(self, keep: int) -> list[int]:
        return collect_garbage(self.folder, keep, in_use=self._kept_for_ever())

    def _kept_for_ever(self) -> set[int]:
        if not self.keep_every:
            return set()
        newest_of_step = {ledger.step: serial for serial, ledger in self.ledgers().items() if ledger.step % self.keep_every == 0}
        return {serial for step, serial in newest_of_step.items() if step}

    def _forget_damaged(self) -> None:
        """There is a whole one: take away the manifests of the damaged, which makes them garbage."""
        for serial in self._damaged:
            (version_folder(self.folder, serial) / MANIFEST).unlink(missing_ok=True)
        self._damaged.clear()


def _read_ledger(checkpoint: Path) -> Ledger:
    return msgspec.json.decode((checkpoint / LEDGER_FILE).read_bytes(), type=Ledger)

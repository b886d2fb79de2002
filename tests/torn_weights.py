"""Damage to a published version."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from services.contract.weights import MANIFEST


def change_manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """What makes `change` to the manifest of a version's folder."""

    def changed(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return changed

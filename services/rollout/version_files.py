"""The folders of published versions, as a worker sees them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from services.contract import weights
from services.contract.config import Config
from services.contract.policy import PolicyVersion

VERIFIED_KEPT = 3


class VersionFiles:
    """The folders of published versions as this worker sees them, each verified once however many engines load it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._verified: dict[int, tuple[Path, int]] = {}
        self._one_at_a_time = asyncio.Lock()

    def local(self, policy: PolicyVersion) -> Path:
        """The trainer may see the volume, or the starting model, at another path than this worker does."""
        published = weights.version_folder(self.config.weights_folder, policy.version)
        path = Path(policy.path)
        if path.name == published.name:
            return published
        return path if path.is_dir() or policy.version > 0 else self.config.model_path

    def is_absent(self, policy: PolicyVersion) -> bool:
        """It was pushed, and has not been written to the volume."""
        return policy.pushed and not weights.is_published(self.config.weights_folder, policy.version)

    def newest(self, at_most: int) -> PolicyVersion:
        """The newest version on the volume that is not above `at_most`, or the starting model."""
        root = self.config.weights_folder
        versions = [version for version in weights.published_versions(root) if version <= at_most]
        if not versions:
            return PolicyVersion(0, str(self.config.model_path))
        return PolicyVersion(versions[-1], str(weights.version_folder(root, versions[-1])))

    async def verify(self, policy: PolicyVersion) -> Path:
        """Its folder here, every digest checked, once for each manifest. Raises WeightsError, OSError."""
        path = self.local(policy)
        if path.parent != self.config.weights_folder:
            if not path.is_dir():
                raise weights.WeightsError(f"{path} is not a folder that this worker sees: mount it, or set model.path")
            return path
        async with self._one_at_a_time:
            stamp = (path, _modified(path / weights.MANIFEST))
            if self._verified.get(policy.version) != stamp:
                manifest = await asyncio.to_thread(weights.verify, path)
                if manifest.version != policy.version:
                    raise weights.WeightsError(f"{path} calls itself version {manifest.version}, the board says {policy.version}")
                kept = sorted(self._verified)[-VERIFIED_KEPT:]
                self._verified = {version: self._verified[version] for version in kept} | {policy.version: stamp}
        return path


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return -1

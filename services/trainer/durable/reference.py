"""Where the reference policy lies: `<run folder>/reference`, later ones as `reference-000010` after the step they are of.

| what happens                            | which reference a resumed run finds                                          |
|-----------------------------------------|------------------------------------------------------------------------------|
| no step of GRPO yet                     | `reference`, written (again) as GRPO begins; without a warm start the starting model |
| steps, nothing refreshed yet            | the same                                                                     |
| kl_coef was 0 when GRPO began           | none after a warm start: what GRPO began with is gone, so the run is refused |
| crash after the folder, before the checkpoint | the one before: the ledger does not know the new one, which is written again |
| refreshed and checkpointed              | the one that the checkpoint's ledger names                                   |
| the newest checkpoint is damaged        | that of the one before it: every kept checkpoint keeps its reference         |
| its folder is gone, or a file altered   | none: the run is refused, since another one would change what is learned     |
"""

from __future__ import annotations

import shutil
from collections.abc import Container
from pathlib import Path

from services.contract.config import ConfigError
from services.contract.weights import MANIFEST, WeightsError, verify

MEND = "put that policy there as a Hugging Face folder, set kl_coef = 0, or start the run under another run.name"


def reference_folder(run_folder: Path, step: int) -> Path:
    return run_folder / (f"reference-{step:06d}" if step else "reference")


def refresh_is_due(step: int, reference_step: int, every: int) -> bool:
    """Whether the policy becomes its own reference after `step`. every: `reference_every`; 0 never refreshes."""
    return every > 0 and step - reference_step >= every


def kept_reference(run_folder: Path, step: int, started_from: Path | None) -> Path:
    """The folder to load. started_from: the starting model when GRPO began with it; None after a warm start.

    Raises ConfigError when the reference is gone, damaged, or was never kept.
    """
    folder = reference_folder(run_folder, step)
    if folder.exists():
        return _undamaged(folder)
    if step == 0 and started_from is not None:
        return started_from
    never = ", or was never kept because trainer.objective.kl_coef was 0 when GRPO began" if step == 0 else ""
    raise ConfigError(f"the reference policy {folder} is gone{never}: {MEND}")


def _undamaged(folder: Path) -> Path:
    """A person may put a folder there that has no manifest."""
    try:
        if (folder / MANIFEST).exists():
            verify(folder)
    except WeightsError as error:
        raise ConfigError(f"the reference policy is damaged: {error}; {MEND}") from None
    return folder


def forget_references(run_folder: Path, steps: Container[int]) -> None:
    """Remove all refreshed references but those of these steps."""
    for folder in run_folder.glob("reference-*"):
        if int(folder.name.rpartition("-")[2]) not in steps:
            shutil.rmtree(folder)

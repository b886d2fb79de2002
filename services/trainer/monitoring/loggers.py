"""Who else gets a run's figures: TensorBoard always, Weights & Biases and Prometheus when asked for.

| to                | asked for by           | after a crash and a resume                                                        |
|-------------------|------------------------|-----------------------------------------------------------------------------------|
| TensorBoard       | always                 | written anew from `metrics.jsonl`: no step twice, none torn                       |
| Weights & Biases  | run.wandb              | the same W&B run goes on; it keeps its first report of a step and ignores a second |
| Prometheus        | trainer.metrics_port   | gauges go on from `metrics.jsonl`; counters begin at 0, as Prometheus expects     |
"""

from __future__ import annotations

import logging
import secrets
import shutil
from pathlib import Path
from typing import Any

from services.contract.config import Config, ConfigError, dump_config
from services.trainer.monitoring.journal import Journal, Row, last_values, numbers

logger = logging.getLogger("trainer")


def open_listeners(config: Config, journal: Journal) -> None:
    """Attach everything that the configuration asks for. Raises ConfigError when it cannot be had."""
    rows = journal.rows()
    journal.listeners.append(TensorBoard(config.run.folder / "tensorboard", rows))
    if config.run.wandb:
        journal.listeners.append(WeightsAndBiases(config, rows))
    if config.trainer.metrics_port:
        from services.trainer.monitoring.exporter import Exporter

        journal.listeners.append(Exporter(config.trainer.metrics_host, config.trainer.metrics_port, last_values(rows)))


class TensorBoard:
    """Scalars under the figures' own names. A folder of an earlier process is replaced by what the journal holds.

    A TensorBoard that is looking at the folder meanwhile forgets what it had read: the new file begins with a restart at step 0.
    """

    def __init__(self, folder: Path, rows: list[Row]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        self._board = SummaryWriter(str(folder), purge_step=0)
        for row in rows:
            self._add(row)
        self._board.flush()

    def record(self, row: Row) -> None:
        self._add(row)
        self._board.flush()

    def end(self) -> None:
        self._board.close()

    def _add(self, row: Row) -> None:
        for name, value in numbers(row).items():
            self._board.add_scalar(name, value, row["step"], walltime=row.get("at"))


class WeightsAndBiases:
    """One W&B run for one run of ours, however often it is resumed: its id lies in the run's folder.

    W&B counts steps upwards only. Its step is the warm start's steps and GRPO's together; an evaluation that was gathered later
    than it was fed is reported where it was gathered, its own step beside it as `eval/step`.
    """

    def __init__(self, config: Config, rows: list[Row]) -> None:
        wandb = import_wandb()
        self._warm = self._last = 0
        for row in rows:
            self._position(row)
        try:
            self._run: Any = wandb.init(
                project=config.run.wandb_project,
                name=config.run.name,
                id=_kept_id(config.run.folder / "wandb.id"),
                resume="allow",
                dir=str(config.run.folder),
                config=dump_config(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            mend = "set WANDB_API_KEY, or WANDB_MODE=offline, or run.wandb to false"
            raise ConfigError(f"W&B does not take the run ({error}): {mend}") from error

    def record(self, row: Row) -> None:
        if not (values := numbers(row)):
            return
        own = {"eval/step": row["step"]} if row["kind"] == "evaluation" else {}
        self._run.log(values | own, step=self._position(row))

    def end(self) -> None:
        self._run.finish()

    def _position(self, row: Row) -> int:
        if row["kind"] == "warm_start":
            self._warm = max(self._warm, row["step"])
            place = row["step"]
        else:
            place = self._warm + row["step"]
        self._last = max(self._last, place) if row["kind"] == "evaluation" else place
        return self._last


def import_wandb() -> Any:
    """The package, imported only here. Raises ConfigError when it is not installed."""
    try:
        import wandb  # pyright: ignore[reportMissingImports] - an optional extra
    except ImportError as error:
        raise ConfigError(
            f"run.wandb is true, but the package wandb cannot be imported ({error}): "
            "install it (pip install 'forage[wandb]'), or set run.wandb to false"
        ) from None
    return wandb


def _kept_id(path: Path) -> str:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(8))
    return path.read_text().strip()

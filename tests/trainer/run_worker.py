"""Whole runs of the trainer, one after another in one process: what each left behind, or why it refused.

    RANK=0 WORLD_SIZE=1 … python -m tests.trainer.run_worker JOB RESULT

A process of its own, so that Megatron and what a CPU needs for it never enter the test process. Redis, the volume and the learner
are real; who answers the groups is the test's.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402

from services.contract.config import Config, ConfigError  # noqa: E402
from services.trainer.main import train  # noqa: E402
from services.trainer.megatron import distributed  # noqa: E402
from services.trainer.run import Run  # noqa: E402


def report(config: Config) -> dict[str, Any]:
    try:
        run = Run(config)
        train(run)
    except ConfigError as error:
        return {"refused": str(error)}
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"rows": [row for row in rows if row["kind"] == "grpo"], "stage": run.ledger.stage}
    found["folders"] = sorted(path.name for path in run.folder.iterdir())
    if run.critic:
        found["critic_steps"] = sorted({int(s["step"]) for s in run.critic.optimizer.state_dict()["optimizer"]["param_groups"]})
    return found | {"final": _final_without_a_version(run)}


def _final_without_a_version(run: Run) -> str:
    """What is said to the final model when the version that it is a copy of is gone."""
    shutil.rmtree(run.config.weights_folder)
    try:
        run.write_final_model()
    except ConfigError as error:
        return str(error)
    return "written"


def main() -> None:
    job: dict[str, dict[str, Any]] = torch.load(sys.argv[1], weights_only=False)
    configs = {name: Config.model_validate(values) for name, values in job.items()}
    distributed.init(next(iter(configs.values())))
    torch.save({name: report(config) for name, config in configs.items()}, sys.argv[2])
    distributed.shutdown()


if __name__ == "__main__":
    main()

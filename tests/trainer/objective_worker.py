"""One real optimizer step, or several, for every objective: what the learner reports, and the gradient of the last step.

    RANK=0 WORLD_SIZE=1 … python -m tests.trainer.objective_worker JOB RESULT

A process of its own, so that Megatron and what a CPU needs for it never enter the test process.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402

from services.contract.config import Config  # noqa: E402
from services.trainer.feeding.collect import CompleteGroup  # noqa: E402
from services.trainer.learning_rate import Rates  # noqa: E402
from services.trainer.megatron import distributed  # noqa: E402
from services.trainer.megatron.learner import Learner  # noqa: E402
from services.trainer.update import update  # noqa: E402


def report(config: Config, model: Path, reference: Path, groups: list[CompleteGroup], rate: float) -> dict[str, Any]:
    learner = Learner(config, model)
    if config.trainer.objective.kl_coef:
        learner.set_reference(reference)
    figures = update(learner, groups, config.trainer.objective, Rates(rate), seed="0/1")
    with torch.no_grad():
        for parameter in learner.policy.parameters():
            parameter.copy_(parameter.main_grad)
    return {"figures": figures, "gradient": {name: tensor.clone() for name, tensor in learner.export()}}


def main() -> None:
    job: dict[str, Any] = torch.load(sys.argv[1], weights_only=False)
    configs = {name: Config.model_validate({"trainer": job["trainer"] | {"objective": o}}) for name, o in job["objectives"].items()}
    distributed.init(next(iter(configs.values())))
    found = {name: report(c, job["model"], job["reference"], job["groups"], job["rate"]) for name, c in configs.items()}
    torch.save(found, sys.argv[2])
    distributed.shutdown()


if __name__ == "__main__":
    main()

"""One rank of the learner's tests: does everything that a layout is tested for, and rank 0 writes down what came out.

    RANK=0 WORLD_SIZE=2 … python -m tests.trainer.learner_worker JOB RESULT

Run as a process of its own, so that Megatron and what a CPU needs for it never enter the test process.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from services.contract.config import Config  # noqa: E402
from services.trainer.megatron import distributed  # noqa: E402
from services.trainer.megatron.batching import Row  # noqa: E402
from tests.trainer import critic_reports, learner_reports, option_reports, toy_reports  # noqa: E402
from tests.trainer.plain_torch import TRAINER  # noqa: E402
from tests.trainer.tiny_models import group_of  # noqa: E402


def main() -> None:
    job: dict[str, Any] = torch.load(sys.argv[1], weights_only=False)
    values = {"threads": 1, "max_tokens_per_microbatch": 64, **TRAINER, **job["trainer"]}
    config = Config.model_validate({"trainer": values})
    distributed.init(config)
    result = reports(job, config, values, [Row(**row) for row in job["rows"]])
    if dist.get_rank() == 0:
        torch.save(result, sys.argv[2])
    distributed.shutdown()


def reports(job: dict[str, Any], config: Config, values: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """What the job asks for, by name; see the functions called for what is in each."""
    first, scratch = job["models"][0], job["scratch"]
    groups = [group_of(f"t{n}", [row]) for n, row in enumerate(job["rewarded"])]
    result: dict[str, Any] = {"models": {}, "resume": {}, "critic": {}}
    for folder in job["models"] if "models" in job["asked"] else ():
        result["models"][folder.name] = learner_reports.model(config, folder, rows)
        result["resume"][folder.name] = learner_reports.resume(config, folder, rows, scratch)
        result["critic"][folder.name] = critic_reports.critic(config, folder, groups, scratch)
    if "crossed" in job["asked"]:
        result["crossed"] = {name: learner_reports.crossed(config, first, rows, path) for name, path in job["foreign"].items()}
        foreign = job["foreign_critics"].items()
        result["critic_crossed"] = {name: critic_reports.crossed(config, first, groups, path) for name, path in foreign}
    if "invariance" in job["asked"]:
        result["invariance"] = option_reports.invariance(values, first, rows)
    if "options" in job["asked"]:
        result["options"] = option_reports.options(values, first, rows, scratch)
    if "head" in job["asked"]:
        result["head"] = option_reports.head()
    if "toy" in job["asked"]:
        result["toy"] = toy_reports.toy(values, first)
    if "errors" in job["asked"]:
        result["errors"] = option_reports.errors(config, first, rows, scratch)
    return result


if __name__ == "__main__":
    main()

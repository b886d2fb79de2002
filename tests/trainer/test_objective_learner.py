"""Every objective through the real learner: loss and gradient of an optimizer step against plain torch."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from services.trainer.feeding.collect import CompleteGroup
from tests.conftest import free_port
from tests.trainer.plain_objectives import FAMILIES, Groups, Rollout
from tests.trainer.plain_torch import response_logprobs
from tests.trainer.tiny_models import VOCAB, group_of, load_plain, save_tiny

ROOT = Path(__file__).parents[2]
GROUPS, SAMPLES = 3, 4
ADAM = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "clip_grad": 1e6}
TRAINER = {"groups_per_step": GROUPS, "samples_per_prompt": SAMPLES, "threads": 1, "max_tokens_per_microbatch": 64, **ADAM}
RATE = 1e-3


class Sampled:
    """Three groups of four rollouts, "sampled" by an engine that disagrees with the model by a tenth of a nat or so."""

    def __init__(self, folder: Path) -> None:
        draw = random.Random(5)
        self.model_folder, self.reference_folder = save_tiny("llama-tied", folder / "model"), folder / "reference"
        moved = load_plain(self.model_folder)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        moved.save_pretrained(self.reference_folder)
        model, self.reference = load_plain(self.model_folder), load_plain(self.reference_folder)
        self.rows = [[sample(draw, model) for _ in range(SAMPLES)] for _ in range(GROUPS)]

    @property
    def groups(self) -> list[CompleteGroup]:
        return [group_of(f"t{g}", rows) for g, rows in enumerate(self.rows)]

    def rollouts(self, model: torch.nn.Module) -> Groups:
        return [[rollout(model, self.reference, row) for row in rows] for rows in self.rows]


def sample(draw: random.Random, model: torch.nn.Module) -> dict[str, Any]:
    mask = [1] * draw.randint(2, 5) + [0] * draw.randint(1, 6) + [1] * draw.randint(1, 5)
    prompt = draw.randint(2, 6)
    row = {"token_ids": [draw.randrange(VOCAB) for _ in range(prompt + len(mask))], "prompt_length": prompt, "loss_mask": mask}
    row |= {"temperature": draw.choice([0.7, 1.0]), "reward": draw.choice([0.0, 0.2, 1.0])}
    with torch.no_grad():
        logprobs = response_logprobs(model, row)
    row["engine_logprobs"] = [(float(p) + draw.gauss(0, 0.12)) * own for p, own in zip(logprobs, mask, strict=True)]
    return row


def rollout(model: torch.nn.Module, reference: torch.nn.Module, row: dict[str, Any]) -> Rollout:
    own = torch.tensor(row["loss_mask"]).bool()
    with torch.no_grad():
        held = response_logprobs(reference, row)[own]
    distribution = response_distribution(model, row)[own]
    entropy = -(distribution.exp() * distribution).sum(-1)
    places = [place for place, mine in enumerate(row["loss_mask"]) if mine]
    engine = torch.tensor(row["engine_logprobs"])[own]
    return Rollout(response_logprobs(model, row)[own], engine, held, places, row["reward"], entropy=entropy)


def response_distribution(model: torch.nn.Module, row: dict[str, Any]) -> torch.Tensor:
    """[response length, vocabulary] log-probs."""
    logits = model(input_ids=torch.tensor(row["token_ids"])[None]).logits[0, row["prompt_length"] - 1 : -1]
    return torch.log_softmax(logits / row["temperature"], -1)


def example_in_the_docs() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "objectives.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


def start(scratch: Path, sampled: Sampled) -> dict[str, Any]:
    """All families in one process, after each other."""
    (scratch / "my_objective.py").write_text(example_in_the_docs())
    job = {"trainer": TRAINER, "rate": RATE, "groups": sampled.groups, "objectives": {n: o for n, (o, _) in FAMILIES.items()}}
    torch.save(job | {"model": sampled.model_folder, "reference": sampled.reference_folder}, scratch / "job.pt")
    address = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    address |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(scratch)}
    command = [sys.executable, "-m", "tests.trainer.objective_worker", str(scratch / "job.pt"), str(scratch / "result.pt")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | address, text=True, capture_output=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return torch.load(scratch / "result.pt", weights_only=False)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Sampled:
    return Sampled(tmp_path_factory.mktemp("sampled"))


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, sampled: Sampled) -> dict[str, Any]:
    return start(tmp_path_factory.mktemp("objectives"), sampled)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradient(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 2e-5) -> None:
    assert found.keys() == wanted.keys()
    wrong = torch.cat([(found[name] - wanted[name]).flatten() for name in wanted]).norm()
    assert wrong <= tolerance * torch.cat([g.flatten() for g in wanted.values()]).norm()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "several steps"])
def test_a_step_is_that_of_plain_torch(family: str, reports: dict[str, Any], sampled: Sampled) -> None:
    model = load_plain(sampled.model_folder)
    loss = FAMILIES[family][1](sampled.rollouts(model))
    loss.backward()
    assert reports[family]["figures"]["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    assert_same_gradient(reports[family]["gradient"], gradients(model))


@pytest.mark.timeout(900)
def test_the_examples_are_no_trivial_ones(reports: dict[str, Any]) -> None:
    """Clips clip, rejections reject, corrections correct; otherwise the families would agree with anything."""
    figures = {family: report["figures"] for family, report in reports.items()}
    assert all(0 < figures[family]["clip_fraction"] < 1 for family in ("gspo", "cispo", "dual clip", "unbiased KL"))
    assert 0 < figures["mis"]["rejected_fraction"] < 1
    assert 0 < figures["rloo with icepop"]["importance_clip_fraction"] < 1
    assert len({f"{f['grad_norm']:.4g}" for f in figures.values()}) == len(figures)


@pytest.mark.timeout(900)
def test_several_steps_go_through_the_batch_twice_in_parts_of_whole_groups(reports: dict[str, Any], sampled: Sampled) -> None:
    report, model = reports["several steps"], load_plain(sampled.model_folder)
    with torch.no_grad():
        before = [[r.new for r in group] for group in sampled.rollouts(model)]
    optimizer, losses = adamw(model), []
    for epoch in range(2):
        for place in random.Random(f"0/1/{epoch}").sample(range(GROUPS), GROUPS):
            optimizer.zero_grad()
            group = sampled.rollouts(model)[place]
            for one, old in zip(group, before[place], strict=True):
                one.old = old
            loss = FAMILIES["several steps"][1]([group])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert report["figures"]["optimizer_steps"] == len(losses) == 6
    assert report["figures"]["loss"] == pytest.approx(sum(losses) / 6, rel=1e-4, abs=1e-6)
    assert report["figures"]["rows"] == 2 * GROUPS * SAMPLES
    assert report["figures"]["policy_kl"] != 0
    assert_same_gradient(report["gradient"], gradients(model), tolerance=2e-3)


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    """As the learner's; norms do not decay."""
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1]}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE, betas=(ADAM["beta1"], ADAM["beta2"]), weight_decay=ADAM["weight_decay"])

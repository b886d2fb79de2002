"""The docs say what is there: links lead somewhere, commands parse, keys, values, variables and files exist. Nothing is started."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.suite.doc_claims import (
    broken_commands,
    broken_links,
    missing_files,
    unbalanced,
    unknown_addresses,
    unknown_keys,
    unknown_variables,
)
from tests.suite.doc_commands import complaint
from tests.suite.doc_pages import Page, slug

PAGES = sorted([Path("README.md"), Path("benchmarks/README.md"), *Path("docs").rglob("*.md"), *Path("docker").rglob("*.md")])
CHECKS = [broken_links, missing_files, broken_commands, unknown_keys, unknown_addresses, unbalanced]
COMMENTED = [*sorted(Path("configs").glob("*.toml")), *sorted(Path().glob("docker-compose*.yml")), Path(".env.example")]


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_what_a_page_names_is_there(path: Path) -> None:
    page = Page.read(path)
    problems = [f"{check.__name__}: {problem}" for check in CHECKS for problem in check(page)]
    problems += [f"variables: {problem}" for problem in unknown_variables(page.text)]
    assert not problems, f"{path}:\n" + "\n".join(problems)


@pytest.mark.parametrize("path", COMMENTED, ids=str)
def test_what_a_comment_names_is_there(path: Path) -> None:
    comments = "\n".join(re.findall(r"#\s(.*)", path.read_text()))
    named = re.findall(r"\b(?:docs|configs|services|scripts|tests)/[\w./-]*\w", comments)
    commands = re.findall(r"\./forage [^;,()`\n]*|docker compose -f [^;,()`\n]*", comments)
    missing = [name for name in named if not Path(name).exists()]
    assert missing == [] and [problem for line in commands if (problem := complaint(line))] == []
    assert unknown_variables(comments) == []


def test_every_page_of_the_docs_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [Path("README.md")]
    while waiting:
        page = Page.read(waiting.pop())
        reached.add(page.path)
        linked = [(page.path.parent / link.partition("#")[0]).resolve().relative_to(Path.cwd()) for link in relative(page)]
        waiting += [path for path in linked if path.suffix == ".md" and path not in reached]
    assert set(Path("docs").rglob("*.md")) <= reached


def relative(page: Page) -> list[str]:
    return [link for link in page.links if not link.startswith(("http", "#"))]


BROKEN: list[tuple[Callable[[Page], list[str]], str, str]] = [
    (broken_links, "[x](nowhere.md)", "nowhere.md: there is no such file"),
    (broken_links, "[x](retriever.md#no-such-heading)", "there is no such heading"),
    (broken_links, "# One\n[x](#two)", "#two: there is no such heading"),
    (missing_files, "`services/rollout/nobody.py`", "there is no such file"),
    (missing_files, "`tests/nothing_*/x.py`", "there is no such file"),
    (broken_commands, "`./forage upp`", "upp is none of"),
    (broken_commands, "```bash\n./forage eval --modle x\n```", "--modle"),
    (broken_commands, "```bash\n./forage eval --limit many\n```", "many"),
    (broken_commands, "```bash\n./forage export quickstart\n```", "to"),
    (broken_commands, "```bash\nforgae up\n```", "forgae is no program"),
    (broken_commands, "```bash\n./forage up  # or: ./forage statsu\n```", "statsu is none of"),
    (broken_commands, "```bash\n./forage index rebuild -c configs/mine.toml\n```", "rebuild is none of"),
    (broken_commands, "```bash\n./forage data check --file x\n```", "--file"),
    (broken_commands, "`./forage up -c configs/gone.toml`", "there is no configs/gone.toml"),
    (broken_commands, "`FORAGE_CONFIG=configs/gone.toml docker compose up`", "there is no configs/gone.toml"),
    (broken_commands, "`docker compose logs -f nobody`", "no service nobody"),
    (broken_commands, "`docker compose -f docker-compose.tpu.yml up`", "there is no docker-compose.tpu.yml"),
    (broken_commands, "`docker compose --profile plots up`", "no service has the profile plots"),
    (broken_commands, "`docker compose up --scale rollouts=2`", "no service rollouts"),
    (broken_commands, "`docker compose up --detached`", "--detached is no option"),
    (broken_commands, "`docker compose run --rm forage stat`", "stat is none of"),
    (broken_commands, "`… prepare asets`", "asets is none of"),
    (broken_commands, "`docker compose cp nobody:/runs .`", "no service nobody"),
    (broken_commands, "`docker compose exec reward python -m services.nobody`", "there is no module services.nobody"),
    (broken_commands, "`python -m benchmarks.nothing`", "there is no module benchmarks.nothing"),
    (broken_commands, "`python -m benchmarks.suite --configs x`", "--configs is none of"),
    (broken_commands, "`python -m benchmarks.publish volum --model DIR`", "volum is nothing"),
    (broken_commands, "`python -m services.rollout --port 1`", "--port is none of"),
    (broken_commands, "`celery -A services.reward.celery_app inspect pong`", "pong"),
    (broken_commands, "```bash\ntorchrun --nnodes=2 -m services.trainr\n```", "no module services.trainr"),
    (broken_commands, "`curl localhost:8001/retrieve`", "port 8000"),
    (broken_commands, "`curl localhost:8000/retreive`", "no /retreive"),
    (broken_commands, """```bash\ncurl localhost:8000/retrieve -d '{"query": "x"}'\n```""", "refuses the body"),
    (broken_commands, """```bash\ncurl localhost:8000/retrieve -d '{"queries": ["x"], "top": 2}'\n```""", "ignores top"),
    (broken_commands, "`pip install 'forage[plotz]'`", "no extra"),
    (unknown_keys, "`trainer.eval_evry`", "no such key"),
    (unknown_keys, "`rollout.engine.url`", "no such key"),
    (unknown_keys, "`[reward] max_trys`", "no such key"),
    (unknown_keys, "`[trianer]`", "no such key"),
    (unknown_keys, "`max_staleness_ = 0`", "no such key"),
    (unknown_keys, '`weights.transport = "pigeon"`', "no such value"),
    (unknown_keys, '`importance = "tiss"`', "no such value"),
    (unknown_keys, "```toml\n[trainer.objectiv]\nadvantage = 1\n```", "trainer.objectiv: no such key"),
    (unknown_keys, '```toml\n[[data.train_questions]]\npaths = "x"\n```', "data.train_questions"),
    (unknown_keys, "```toml\n[rollout]\nmax_turns = 0\n```", "rollout.max_turns = 0: no such value"),
    (unknown_keys, "| key of `[trainer]` | default |\n|---|---|\n| `eval_question` | 200 |", "no such key"),
    (unknown_addresses, "`GET /health2`", "the retriever has none"),
    (unbalanced, "one ` too many", "one ` too many"),
    (lambda page: unknown_variables(page.text), "FORAGE_TRAINER__STEPZ=1", "FORAGE_TRAINER__STEPZ: nothing reads it"),
    (lambda page: unknown_variables(page.text), "`HF_TOKENS`", "HF_TOKENS: nothing reads it"),
    (lambda page: unknown_variables(page.text), "`FORAGE_CONFIGS`", "FORAGE_CONFIGS: nothing reads it"),
]


@pytest.mark.parametrize(("check", "text", "message"), BROKEN, ids=[text.replace("\n", " ") for _, text, _ in BROKEN])
def test_what_is_not_there_is_found(check: Callable[[Page], list[str]], text: str, message: str) -> None:
    problems = check(Page(Path("docs/new.md"), text))
    assert len(problems) == 1 and message in problems[0], problems


def test_what_other_projects_call_their_own_is_left_alone() -> None:
    table = "| verl | here |\n|---|---|\n| `rollout.n` | `trainer.samples_per_prompt` |"
    assert unknown_keys(Page(Path("docs/new.md"), table)) == []
    assert unknown_keys(Page(Path("docs/new.md"), table.replace("here", "ours"))) == ["rollout.n: no such key"]


def test_anchors_are_githubs() -> None:
    assert slug(" The engine's mismatch: `tis`, and *why*") == "the-engines-mismatch-tis-and-why"

"""A status as a person reads it: lines that wrap on a narrow terminal, tables without frames. Pure: a status in, a drawing out."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from services.contract.telemetry import format_seconds
from services.suite.facts import Facts, facts_table
from services.suite.observe import DeadReason, Engine, Event, Queues, Snapshot
from services.suite.run_files import Part, Progress
from services.suite.text import cell, one_line

NONE = "–"
BARS = "▁▂▃▄▅▆▇█"
STATE_STYLES = {"ready": "green", "paused": "cyan", "loading": "yellow", "stale": "red", "gone": "red"}
STEP_FIGURES = {
    "reward/mean": ("reward", "{:.3f}"),
    "reward/exact_match": ("EM", "{:.3f}"),
    "reward/format": ("format", "{:.2f}"),
    "search/per_episode": ("searches", "{:.2f}"),
    "search/response_tokens": ("tokens", "{:.0f}"),
    "staleness/mean": ("stale", "{:.1f}"),
    "objective/grad_norm": ("grad", "{:.2f}"),
    "time/rollout_s": ("rollout s", "{:.0f}"),
    "time/train_s": ("train s", "{:.0f}"),
    "time/publish_s": ("publish s", "{:.1f}"),
    "time/tokens_per_s": ("tokens/s", "{:.0f}"),
}
"""Of a step's row in the journal: its name here and how it is written."""


class Status(msgspec.Struct, frozen=True):
    """All that one look has found."""

    run: str
    time: float
    """Seconds since the epoch, where forage runs."""
    redis_url: str
    redis: Snapshot | None
    problem: str | None
    """Why `redis` is None."""
    trainer: Progress
    parts: list[Part]
    attention: list[str]


def render(status: Status) -> RenderableType:
    """The most important first: a terminal that is too low loses the end."""
    seen, parts = status.redis, status.parts
    blocks: list[RenderableType] = [_head(status)]
    blocks += [Text(f"! {one_line(sentence)}", style="bold yellow") for sentence in status.attention]
    rows = (_redis_facts(seen) if seen else []) + _trainer_facts(status.trainer)
    blocks.append(facts_table((name, Facts(facts)) for name, facts in rows))
    if seen:
        blocks += [_engines(seen.engines)] if seen.engines else []
        blocks += [_dead(seen.dead)] if seen.dead else []
    blocks += [_parts(parts)] if parts else []
    if seen and seen.events:
        blocks.append(_events(seen.events))
    return Group(*blocks)


def _head(status: Status) -> Text:
    head = Text.assemble((one_line(status.run), "bold"), f"  {time.strftime('%H:%M:%S', time.localtime(status.time))}  ")
    if status.redis is None:
        return head.append(one_line(status.problem or ""), style="bold red")
    seen = status.redis
    head.append(f"policy version {_version(seen.current)}")
    if seen.staged is not None and seen.staged != seen.current:
        head.append(f", {seen.staged} staged", style="cyan")
    server = seen.server
    return head.append(
        f"  {one_line(status.redis_url)} {server.memory_bytes / 2**20:.1f} MiB, {server.clients} clients", style="dim"
    )


def _redis_facts(seen: Snapshot) -> list[tuple[str, list[str]]]:
    a, queues, speed = seen.accounts, seen.queues, seen.speed
    states = [f"{a.waiting} waiting", f"{a.leased} leased", f"{a.ungraded} ungraded", f"{a.graded_waiting} graded"]
    states += [f"{a.collected} collected", f"{a.released} released", f"{a.dead} dead", f"= {a.fed} fed"]
    return [
        ("groups", states if seen.balanced else [*states, "(does not add up)"]),
        ("oldest", _ages(queues)),
        ("grading", [f"{queues.grading} in the queue", f"{queues.in_hand} in hand"]),
        ("last minute", [f"{speed.tokens_per_s:.0f} tokens/s", f"{speed.trajectories} trajectories graded"]),
    ]


def _ages(queues: Queues) -> list[str]:
    lease = f"leased {_age(queues.leased_s)}"
    if queues.leased_s is not None:
        lease += f" since fed, by {queues.leased_by}"
    silence = [] if queues.silent_s is None else [f"longest silence of a lease {_age(queues.silent_s)}"]
    ages = [f"waiting {_age(queues.waiting_s)}", lease, f"ungraded {_age(queues.ungraded_s)}", f"graded {_age(queues.graded_s)}"]
    return ages + silence


def _trainer_facts(progress: Progress) -> list[tuple[str, list[str]]]:
    if progress.stage is None and progress.written_s is None:
        return [("trainer", [f"nothing in {progress.folder} yet"])]
    stage = f"{progress.stage} (by {progress.stage_from})" if progress.stage else "stage unknown: no checkpoint yet"
    rows = [("trainer", [stage, f"journal written {_age(progress.written_s)} ago"])]
    if progress.step:
        rows.append((f"step {progress.step.get('step')}/{progress.steps}", _step_figures(progress.step)))
        if len(progress.rewards) > 1:
            rows.append(("rewards", [sparkline(progress.rewards)]))
    elif row := progress.warm_start:
        figures = [f"{name} {_number(row, f'warm_start/{name}', '{:.3f}')}" for name in ("loss", "grad_norm")]
        rows.append((f"warm start {row.get('step')}", figures))
    if progress.evaluations:
        scores = [f"{e.get('label')} {_number(e, 'eval/exact_match', '{:.1%}')}" for e in progress.evaluations]
        rows.append(("held-out EM", [" → ".join(scores)]))
    return rows


def _step_figures(row: dict[str, Any]) -> list[str]:
    return [f"{title} {_number(row, name, form)}" for name, (title, form) in STEP_FIGURES.items() if name in row]


def sparkline(values: list[float]) -> str:
    """Bars from the lowest to the highest value, with both as numbers."""
    if not values:
        return NONE
    low, high = min(values), max(values)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return f"{low:.3f} {''.join(BARS[int((value - low) / step)] for value in values)} {high:.3f}"


def _table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def _engines(engines: list[Engine]) -> Table:
    table = _table("engine", "state", "version", "groups", "tokens/s", "reported", numbers=("version", "groups", "tokens/s"))
    for engine in engines:
        state = "gone" if engine.reported_s is None else engine.state
        staged = f" ({engine.staged} staged)" if engine.staged > engine.version else ""
        reported = "too long ago" if engine.reported_s is None else f"{_age(engine.reported_s)} ago"
        figures = [f"{_version(engine.version)}{staged}", str(engine.groups), f"{engine.tokens_per_s:.0f}", reported]
        table.add_row(cell(engine.engine_id), cell(state, STATE_STYLES.get(state, "")), *map(cell, figures))
    return table


def _dead(dead: list[DeadReason]) -> Table:
    table = _table("dead", "last", "group", "reason", numbers=("dead",))
    for reason in dead:
        table.add_row(cell(reason.count), cell(f"{_age(reason.age_s)} ago"), cell(reason.latest), cell(reason.reason, "red"))
    return table


def _parts(parts: list[Part]) -> Table:
    table = _table("part", "heartbeat", "says")
    for part in parts:
        style = "yellow" if part.state.startswith("starting") else ""
        table.add_row(cell(part.name), cell(f"{_age(part.age_s)} ago"), cell(part.state, style))
    return table


def _events(events: list[Event]) -> Table:
    table = _table("ago", "event", numbers=("ago",))
    for event in events:
        table.add_row(cell(_age(event.age_s), "dim"), cell(event.text))
    return table


def _number(row: dict[str, Any], name: str, form: str) -> str:
    value = row.get(name)
    return form.format(value) if isinstance(value, (int, float)) else NONE if value is None else str(value)


def _age(seconds: float | None) -> str:
    return NONE if seconds is None else format_seconds(seconds)


def _version(version: int | None) -> str:
    return NONE if version is None or version < 0 else str(version)

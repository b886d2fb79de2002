"""Episodes as a person reads them. Pure: episodes in, drawings out; their texts are others' and go through `text.visible`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from services.suite.episodes import Episode, Logprobs, Token, Turn
from services.suite.facts import Facts, facts_table
from services.suite.text import cell, one_line, visible

NONE = "–"
BLOCK_STYLES = {"think": "italic dim", "search": "bold cyan", "answer": "bold green"}
SHOWN_STYLE = "yellow"
_BLOCK = re.compile(rf"<({'|'.join(BLOCK_STYLES)})>.*?</\1>", re.DOTALL)


def render_list(episodes: list[Episode]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False, expand=True)
    table.add_column("trajectory", overflow="fold", no_wrap=True)
    for number in ("reward", "searches"):
        table.add_column(number, justify="right", no_wrap=True, min_width=8)
    table.add_column("ended", no_wrap=True)
    table.add_column("kept in", no_wrap=True)
    for text in ("answer", "question"):
        table.add_column(text, no_wrap=True, overflow="ellipsis", ratio=1)
    for episode in episodes:
        kept = "Redis" if episode.kept == "whole" else Path(episode.place).stem
        facts = [cell(episode.stop_reason), cell(kept, "dim"), cell(episode.answer or NONE), cell(episode.question, "dim")]
        table.add_row(cell(episode.id), _reward(episode.reward), cell(episode.searches), *facts)
    return table


def render_episode(episode: Episode) -> RenderableType:
    blocks: list[RenderableType] = [facts_table(_facts(episode))]
    for number, turn in enumerate(episode.turns, 1):
        blocks += _turn(number, turn)
    if episode.tokens:
        blocks += [_heading("tokens"), _tokens(episode.tokens)]
    return Group(*blocks)


# -- the head ----------------------------------------------------------------------------------------------------------


def _facts(episode: Episode) -> list[tuple[str, Facts | Text]]:
    parts = "  ".join(f"{name} {value:g}" for name, value in episode.parts.items())
    ended = [f"{episode.stop_reason} ({episode.status})" if episode.status else episode.stop_reason]
    ended += [f"worker {episode.worker or NONE}", *([f"attempt {episode.attempt}"] if episode.attempt else [])]
    facts: list[tuple[str, Facts | Text]] = [
        ("trajectory", cell(episode.id, "bold")),
        ("from", cell(episode.place)),
        ("question", cell(f"{episode.question}  ({episode.source})")),
        ("golden", cell(" | ".join(episode.golden_answers) or NONE)),
        ("answer", cell(NONE if episode.answer is None else episode.answer, BLOCK_STYLES["answer"])),
        ("reward", _reward(episode.reward).append(f"  {one_line(parts)}", style="default")),
        ("ended", Facts(ended)),
        ("versions", cell(", ".join(map(str, episode.versions)) or NONE)),
    ]
    facts += [(name, Facts(measures)) for name, measures in _measures(episode)]
    if episode.missing:
        facts.append(("not kept", cell("; ".join(episode.missing), "dim")))
    return facts


def _measures(episode: Episode) -> list[tuple[str, list[str]]]:
    """What only a whole trajectory has."""
    found: list[tuple[str, list[str]]] = []
    if episode.response_tokens is not None:
        own = episode.logprobs.tokens if episode.logprobs else 0
        response = f"response {episode.response_tokens} (own {own}, shown {episode.response_tokens - own})"
        found.append(("tokens", [f"prompt {episode.prompt_tokens}", response]))
    if episode.logprobs:
        at = [f"at temperature {episode.temperature:g}"] if episode.temperature is not None else []
        found.append(("log-probs", [_logprobs(episode.logprobs), f"perplexity {episode.logprobs.perplexity:.3g}", *at]))
    if episode.timings:
        found.append(("timings", [f"{name.removesuffix('_s')} {value:.2f} s" for name, value in episode.timings.items()]))
    return found


def _reward(reward: float | None) -> Text:
    if reward is None:
        return Text("ungraded", style="yellow")
    return Text(f"{reward:.3f}", style="bold green" if reward > 0 else "red")


def _logprobs(logprobs: Logprobs) -> str:
    return f"mean {logprobs.mean:.3f}  lowest {logprobs.lowest:.3f}"


def _heading(text: str) -> Text:
    return cell(f"── {text} ──", "dim")


# -- the turns ---------------------------------------------------------------------------------------------------------


def _turn(number: int, turn: Turn) -> list[RenderableType]:
    own = turn.kind == "model"
    facts = [f"{number} {'policy' if own else 'shown'}"]
    facts += [f"{turn.tokens} tokens"] if turn.tokens is not None else []
    facts += [_versions(turn)] if turn.versions else []
    facts += [_logprobs(turn.logprobs)] if turn.logprobs else []
    facts += [f'search "{turn.query}"'] if turn.query is not None else []
    facts += [f"{turn.latency_s:.2f} s"] if turn.latency_s else []
    blocks: list[RenderableType] = [_heading("  ".join(facts))]
    if turn.passages:
        blocks.append(cell("passages  " + "  ".join(f"{p.id} ({p.score:.3f})" for p in turn.passages), SHOWN_STYLE))
    return [*blocks, written(turn.text) if own else Text(visible(turn.text.strip()), style=SHOWN_STYLE)]


def _versions(turn: Turn) -> str:
    """`version 4`, or `version 4 (12 tokens), 5 (30 tokens)`."""
    versions = turn.versions or []
    if len({v.version for v in versions}) == 1:
        return f"version {versions[0].version}"
    return "version " + ", ".join(f"{v.version} ({v.end - v.start} tokens)" for v in versions)


def written(text: str) -> Text:
    """What the policy wrote, each whole block in its colour."""
    drawn = Text(visible(text.strip()))
    for match in _BLOCK.finditer(drawn.plain):
        drawn.stylize(BLOCK_STYLES[match[1]], *match.span())
    return drawn


# -- the tokens --------------------------------------------------------------------------------------------------------


def _tokens(tokens: list[Token]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for number in ("place", "id", "log-prob", "version"):
        table.add_column(number, justify="right")
    table.add_column("text", overflow="fold")
    for token in tokens:
        style = "" if token.kind == "model" else SHOWN_STYLE
        logprob = NONE if token.logprob is None else f"{token.logprob:.4f}"
        version = NONE if token.version is None else str(token.version)
        text = "" if token.text is None else json.dumps(token.text, ensure_ascii=False)  # quotes show where spaces are
        table.add_row(*(cell(value, style) for value in (token.place, token.id, logprob, version, text)))
    return table

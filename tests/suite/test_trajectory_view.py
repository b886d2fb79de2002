"""How an episode looks: every figure that is kept, and no text of policy or corpus that steers the terminal."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from services.contract.messages import PassageRef, Span, VersionSpan
from services.suite.episodes import Episode, TranscriptRow, TranscriptTurn, from_trajectory, from_transcript, tokens_of
from services.suite.trajectory_view import BLOCK_STYLES, render_episode, render_list, written
from tests.factories import make_trajectory
from tests.suite.conftest import drawn

HOSTILE = "\x1b[2J\x1b]0;title\x07\x1b]8;;http://x\x1b\\ [bold red]markup[/] \r\x08\x9b31m \u202eabc :smile:"


def make_episode(text: str = "<think>hm</think><search>capital of France</search>", **changes: Any) -> Episode:
    spans = [
        Span("model", 0, 2, text, [VersionSpan(3, 0, 1), VersionSpan(4, 1, 2)], latency_s=1.25),
        Span("observation", 2, 5, "<information>Doc 1</information>", query="capital", passages=[PassageRef("p7", 0.875)]),
        Span("model", 5, 7, "<answer>Paris</answer>", [VersionSpan(4, 5, 7)]),
    ]
    fields: dict[str, Any] = {"spans": spans, "reward": 1.0, "reward_parts": {"exact_match": 1.0}, "timings": {"total_s": 2.5}}
    return from_trajectory(make_trajectory(**(fields | {"worker": "w1"} | changes)), "Redis at redis://x")


def test_all_that_is_kept_of_an_episode_is_shown() -> None:
    text = drawn(render_episode(make_episode()), 160)
    for fact in ("t0/0", "Redis at redis://x", "What is the capital of France?", "1.000  exact_match 1", "answered (completed)"):
        assert fact in text
    for fact in ("prompt 3", "response 7 (own 4, shown 3)", "mean -0.469  lowest -1.000", "perplexity 1.6", "total 2.50 s"):
        assert fact in text
    for fact in ("3 (1 tokens), 4 (1 tokens)", "version 4", 'search "capital"', "p7 (0.875)", "1.25 s", "<think>hm</think>"):
        assert fact in text


def test_an_ungraded_episode_says_so() -> None:
    assert "ungraded" in drawn(render_episode(make_episode(reward=None)))


def test_what_a_transcript_lacks_is_said() -> None:
    row = TranscriptRow("t0/0", response=[TranscriptTurn("model", "<answer>x</answer>")])
    text = drawn(render_episode(from_transcript(row, "step000001.jsonl")), 200)
    assert "not kept" in text and "tokens and log-probs" in text and "<answer>x</answer>" in text


def test_blocks_have_their_colours_and_what_is_broken_has_none() -> None:
    text = written("<think>a</think> plain <search>b</search><answer>c")
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles == {"<think>a</think>": BLOCK_STYLES["think"], "<search>b</search>": BLOCK_STYLES["search"]}


def test_colours_reach_the_terminal() -> None:
    assert "\x1b[1;36m<search>" in drawn(render_episode(make_episode("<search>b</search>")), colours=True)


def test_every_token_is_a_line() -> None:
    trajectory = make_trajectory(versions=(3, 3, 4, 4))
    episode = msgspec.structs.replace(make_episode(), tokens=tokens_of(trajectory, ["a", " b", "\n", "\x1b", "e", "f", "g"]))
    lines = [line.split() for line in drawn(render_episode(episode)).splitlines()]
    assert ["0", "10", "-0.5000", "3", '"a"'] in lines
    assert ["2", "20", "–", "–", '"\\n"'] in lines and ["6", "13", "-0.1250", "4", '"g"'] in lines
    assert ["3", "21", "–", "–", '"\\u001b"'] in lines


@pytest.mark.parametrize("field", ["question", "source", "answer", "worker", "stop_reason", "id", "group_id"])
def test_no_field_reaches_the_terminal_as_a_command(field: str) -> None:
    check_harmless(make_episode(**{field: HOSTILE}))


def test_no_text_of_policy_or_corpus_reaches_the_terminal_as_a_command() -> None:
    shown = Span("observation", 2, 5, HOSTILE, query=HOSTILE, passages=[PassageRef(HOSTILE, 1.0)])
    spans = [*make_trajectory().spans[:1], shown, *make_trajectory().spans[2:]]
    check_harmless(make_episode(spans=spans, golden_answers=[HOSTILE], reward_parts={HOSTILE: 1.0}, timings={HOSTILE: 1.0}))
    check_harmless(make_episode(f"<think>{HOSTILE}</think>"))


def check_harmless(episode: Episode) -> None:
    for what in (render_episode(episode), render_list([episode])):
        coloured = drawn(what, 300, colours=True)
        left = re.sub(r"\x1b\[[0-9;]*m", "", coloured)  # rich's own colours
        assert not {c for c in left if ord(c) < 32 or 127 <= ord(c) < 160 or c == "\u202e"} - {"\n"}
        assert "\x1b[31m" not in coloured or "markup" not in coloured.partition("\x1b[31m")[2][:20]


def test_markup_and_emoji_codes_are_shown_as_they_are() -> None:
    text = drawn(render_episode(make_episode(f"<think>{HOSTILE}</think>")), 200)
    assert "[bold red]markup[/]" in text and ":smile:" in text


@pytest.mark.parametrize("width", [40, 80])
def test_nothing_is_wider_than_the_terminal(width: int) -> None:
    for what in (
        render_episode(make_episode("<search>" + "long " * 60 + "x" * 200 + "</search>")),
        render_list([make_episode()] * 3),
    ):
        assert max(map(len, drawn(what, width).splitlines())) <= width


def test_the_list_has_id_reward_and_stop_reason() -> None:
    lines = drawn(render_list([make_episode(), make_episode(id="t9/1", reward=None)]), 160).splitlines()
    assert "t0/0" in lines[1] and "1.000" in lines[1] and "answered" in lines[1]
    assert "t9/1" in lines[2] and "ungraded" in lines[2]

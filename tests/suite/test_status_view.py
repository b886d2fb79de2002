"""How a status looks: on wide and narrow terminals, with hostile text in it; and which sentences ask for attention."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contract.accounts import Accounts
from services.contract.config import Config
from services.suite.attention import file_attention, redis_attention
from services.suite.observe import DeadReason, Engine, Event, Queues, Server, Snapshot
from services.suite.run_files import Part, Progress
from services.suite.speed import Speed
from services.suite.status_view import Status, render, sparkline
from services.suite.text import one_line, visible
from tests.suite.conftest import drawn

ACCOUNTS = Accounts(fed=20, waiting=2, leased=3, dead=1, ungraded=4, graded_waiting=0, collected=5, released=5)
QUEUES = Queues(12.0, 70.0, "worker-1", 2.0, "worker-2", 3.0, None, grading=7, in_hand=1)
ENGINE = Engine("worker-1", "ready", 4, 5, "http://x", 1, 1.0, groups=3, tokens_per_s=42.0)
SNAPSHOT = Snapshot(
    server=Server(3 << 20, 0, 9, writes_ok=True),
    accounts=ACCOUNTS,
    balanced=True,
    current=4,
    staged=5,
    engines=[ENGINE],
    queues=QUEUES,
    speed=Speed(30, 42.0, {"worker-1": 42.0}),
    dead=[DeadReason(1, "the retriever is away", "t7", 90.0)],
    events=[Event(5.0, "group t7 given up")],
    unreadable=0,
)
PROGRESS = Progress(
    folder="runs/test",
    stage="grpo",
    stage_from="its heartbeat",
    steps=14,
    step={"step": 5, "reward/mean": 0.203, "reward/exact_match": 0.2, "time/tokens_per_s": 17.0},
    warm_start=None,
    evaluations=[{"label": "start", "eval/exact_match": 0.4}, {"label": "warm", "eval/exact_match": 0.5}],
    rewards=[0.1, 0.2, 0.203],
    written_s=31.0,
    problem=None,
)


def make_status(**changes: Any) -> Status:
    base = Status("test", 0.0, "redis://x", SNAPSHOT, None, PROGRESS, [Part("trainer", "ready: grpo", 1.0)], ["look here"])
    return msgspec.structs.replace(base, **changes)


def shown(status: Status, width: int = 120) -> str:
    return drawn(render(status), width)


def test_everything_that_was_seen_is_on_the_table() -> None:
    text = shown(make_status(), 200)
    for fact in ("2 waiting", "3 leased", "4 ungraded", "= 20 fed", "waiting 12s", "7 in the queue"):
        assert fact in text
    for fact in (
        "42 tokens/s",
        "policy version 4, 5 staged",
        "4 (5 staged)",
        "step 5/14",
        "reward 0.203",
        "grpo (by its heartbeat)",
    ):
        assert fact in text
    for fact in (
        "grpo (by its heartbeat)",
        "start 40.0% → warm 50.0%",
        "the retriever is away",
        "group t7 given up",
        "! look here",
        "ready: grpo",
    ):
        assert fact in text


@pytest.mark.parametrize("width", [20, 40, 60, 80])
def test_no_line_is_longer_than_a_narrow_terminal(width: int) -> None:
    assert max(map(len, shown(make_status(), width).splitlines())) <= width


def test_on_forty_columns_figures_are_still_whole() -> None:
    text = shown(make_status(), 40)
    for fact in ("2 waiting", "ungraded 3s", "reward 0.203", "worker-1"):
        assert fact in text


def test_without_redis_the_trainer_is_still_shown() -> None:
    text = shown(make_status(redis=None, problem="Redis cannot be reached"))
    assert "Redis cannot be reached" in text and "step 5/14" in text


def test_a_run_that_has_nothing_yet_says_so() -> None:
    nothing = Progress("runs/test", None, "", 14, None, None, [], [], None, None)
    assert "nothing in runs/test yet" in shown(make_status(trainer=nothing, parts=[], attention=[]))


def test_figures_of_another_kind_do_not_break_the_table() -> None:
    odd = msgspec.structs.replace(PROGRESS, step={"step": None, "reward/mean": "NaN", "reward/exact_match": [1]}, evaluations=[{}])
    assert "reward NaN" in shown(make_status(trainer=odd))


HOSTILE = "\x1b[2J\x1b]0;title\x07 [red]markup[/red] \r\x08\x9b31m \u202eabc\nnext"


def test_no_text_of_others_reaches_the_terminal_as_a_command() -> None:
    dead, event = DeadReason(1, HOSTILE, HOSTILE, 1.0), Event(1.0, HOSTILE)
    engine = msgspec.structs.replace(ENGINE, engine_id=HOSTILE, state=HOSTILE)
    queues = msgspec.structs.replace(QUEUES, leased_by=HOSTILE, silent_by=HOSTILE)
    seen = msgspec.structs.replace(SNAPSHOT, dead=[dead], events=[event], engines=[engine], queues=queues)
    progress = msgspec.structs.replace(PROGRESS, stage=HOSTILE, step={"step": HOSTILE, "reward": HOSTILE})
    text = drawn(render(make_status(redis=seen, trainer=progress, parts=[Part(HOSTILE, HOSTILE, 1.0)], attention=[HOSTILE])), 400)
    assert not {c for c in text if ord(c) < 32 or 127 <= ord(c) < 160 or c == "\u202e"} - {"\n"}
    assert "[red]markup[/red]" in text and "␛[2J" in text


@given(st.text())
def test_visible_text_holds_nothing_that_a_terminal_acts_on(text: str) -> None:
    safe = visible(text)
    assert not any(c != "\n" and (ord(c) < 32 or 127 <= ord(c) < 160) for c in safe)
    assert not set("\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029") & set(safe)
    safe.encode("utf-8")
    assert "\n" not in one_line(text)


@given(st.text("abc ÄÖ漢字\n<>/[]{}"))
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize(
    ("values", "bars"),
    [([], "–"), ([0.5], "0.500 ▁ 0.500"), ([0.0, 0.5, 1.0], "0.000 ▁▄█ 1.000"), ([1.0, 1.0], "1.000 ▁▁ 1.000")],
)
def test_a_sparkline_goes_from_the_lowest_to_the_highest(values: list[float], bars: str) -> None:
    assert sparkline(values) == bars


# -- attention ---------------------------------------------------------------------------------------------------------

CALM = msgspec.structs.replace(SNAPSHOT, dead=[])


def sentences(**changes: Any) -> list[str]:
    return list(redis_attention(Config(), msgspec.structs.replace(CALM, **changes)))


def test_a_run_that_goes_well_asks_for_nothing() -> None:
    assert sentences() == []
    assert list(file_attention(PROGRESS, [Part("trainer", "ready", 1.0)])) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"balanced": False}, "the accounts do not add up"),
        ({"engines": []}, "2 group(s) wait and no engine is alive"),
        ({"engines": [ENGINE, msgspec.structs.replace(ENGINE, engine_id="e2", reported_s=None)]}, "e2 has fallen silent"),
        ({"engines": [msgspec.structs.replace(ENGINE, state="stale")]}, "cannot load version 4"),
        ({"queues": msgspec.structs.replace(QUEUES, silent_s=61.0)}, "worker worker-2 has shown no sign of life for 1m01s"),
        ({"queues": msgspec.structs.replace(QUEUES, ungraded_s=61.0)}, "waited 1m01s to be graded"),
        ({"dead": SNAPSHOT.dead}, "1 group(s) given up, the last 1m30s ago: the retriever is away"),
        ({"server": Server(1, 0, 1, writes_ok=False)}, "could not write its append-only file"),
        ({"server": Server(95, 100, 1, writes_ok=True)}, "uses 95% of its memory"),
        ({"unreadable": 3}, "3 record(s) in Redis cannot be read"),
    ],
)
def test_what_is_wrong_is_said_alone(changes: dict[str, Any], sentence: str) -> None:
    (said,) = sentences(**changes)
    assert sentence in said


def test_a_loading_engine_is_alive() -> None:
    assert sentences(engines=[msgspec.structs.replace(ENGINE, state="loading", version=-1)]) == []


def test_an_old_heartbeat_and_a_damaged_journal_are_said() -> None:
    damaged = msgspec.structs.replace(PROGRESS, problem="metrics.jsonl: 1 torn line(s) left out")
    said = list(file_attention(damaged, [Part("trainer", "ready: grpo", 1000.0), Part("reward", "ready", 1.0)]))
    assert said == ["metrics.jsonl: 1 torn line(s) left out", "trainer gave its last heartbeat 16m40s ago (ready: grpo)"]

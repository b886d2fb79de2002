"""What a person watching sees, and what a health check is told."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from services.contract.telemetry import Heartbeat, Progress, check_heartbeat, configure_logging, format_seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (90, "1m30s"), (3599, "59m59s"), (3600, "1h00m"), (90_000, "25h00m")],
)
def test_seconds_are_written_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_bar_shows_share_count_rate_and_time_left() -> None:
    bar = Progress("embedding", total=4800, unit="passages")
    bar._started -= 10
    bar.advance(1200)
    match = re.fullmatch(r"embedding (█+·+) 1,200/4,800 passages (\d+\.\d)/s ETA 30s", bar.line())
    assert match and match[1].count("█") * 3 == match[1].count("·")
    assert 115 < float(match[2]) <= 120


def test_a_bar_that_has_not_moved_promises_nothing() -> None:
    assert Progress("embedding", total=10).line().endswith("0/10  0.0/s ETA ?")


def test_a_bar_that_goes_on_reckons_with_its_own_speed() -> None:
    bar = Progress("evaluating", total=216, unit="questions", done=200)
    assert bar.line().endswith("200/216 questions 0.0/s ETA ?")
    bar._started -= 10
    bar.advance(10)
    assert bar.line().endswith("210/216 questions 1.0/s ETA 6s")


@pytest.mark.parametrize(("total", "done"), [(10, 10), (10, 12), (0, 0)])
def test_a_finished_bar_says_how_long_it_took(total: int, done: int) -> None:
    bar = Progress("embedding", total)
    bar._started -= 65
    bar.advance(done)
    assert bar.line().endswith("in 1m05s") and "·" not in bar.line()


def test_in_a_log_a_bar_is_a_line_now_and_then_and_one_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="progress"), Progress("x", total=100, every_s=0.05) as bar:
        for _ in range(100):
            bar.advance()
            time.sleep(0.002)
    lines = [record.message for record in caplog.records]
    assert 2 <= len(lines) <= 8
    assert "100/100" in lines[-1] and "in " in lines[-1]


def test_a_log_line_names_the_service_and_marks_only_trouble() -> None:
    script = (
        "from services.contract.telemetry import configure_logging as c\nlog = c('trainer')\nlog.info('fine')\nlog.error('bad')"
    )
    lines = subprocess.check_output([sys.executable, "-c", script], text=True).splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d trainer   fine", lines[0])
    assert re.fullmatch(r"\d\d:\d\d:\d\d trainer   ERROR: bad", lines[1])


def test_chatty_libraries_are_quiet() -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        configure_logging("x")
        assert logging.getLogger("httpx").level == logging.WARNING
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def check(path: Path, max_age_s: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.contract.telemetry", str(path), str(max_age_s)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_check_passes_on_a_fresh_heartbeat(tmp_path: Path) -> None:
    Heartbeat(tmp_path / "beat").beat("step 3 of 20")
    checked = check(tmp_path / "beat", 60)
    assert (checked.returncode, checked.stdout) == (0, "step 3 of 20\n")


def test_the_check_fails_without_a_heartbeat(tmp_path: Path) -> None:
    checked = check(tmp_path / "beat", 60)
    assert checked.returncode == 1 and "no heartbeat yet" in checked.stderr


def test_the_check_fails_while_the_service_is_starting(tmp_path: Path) -> None:
    Heartbeat(tmp_path / "beat").beat("starting: loading the model")
    checked = check(tmp_path / "beat", 60)
    assert (checked.returncode, checked.stderr) == (1, "starting: loading the model\n")


def test_the_check_fails_when_the_heartbeat_is_old(tmp_path: Path) -> None:
    Heartbeat(tmp_path / "beat").beat("step 3 of 20")
    past = time.time() - 100
    os.utime(tmp_path / "beat", (past, past))
    checked = check(tmp_path / "beat", 60)
    assert checked.returncode == 1 and re.search(r"last heartbeat 1\d\d s ago \(step 3 of 20\)", checked.stderr)


def test_a_beat_makes_its_folder_and_leaves_one_file(tmp_path: Path) -> None:
    Heartbeat(tmp_path / "run" / "a.beat").beat("ready")
    Heartbeat(tmp_path / "run" / "a.other").beat("ready")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["a.beat", "a.other"]


def test_no_file_asked_for_writes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORAGE_HEARTBEAT_FILE", raising=False)
    Heartbeat.from_environment().beat("ready")
    assert list(tmp_path.iterdir()) == []


def test_a_check_never_sees_half_a_beat(tmp_path: Path) -> None:
    heartbeat, done = Heartbeat(tmp_path / "beat"), threading.Event()
    heartbeat.beat("ready" * 200)
    writer = threading.Thread(target=lambda: [heartbeat.beat("ready" * 200) for _ in range(60)] and done.set())
    writer.start()
    while not done.is_set():
        assert check_heartbeat(tmp_path / "beat", 60) == "ready" * 200
    writer.join()

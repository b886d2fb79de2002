"""`forage trajectory`: finding an episode in Redis or in the trainer's transcripts, and what is told when it cannot be found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from services.contract.config import Config
from services.contract.groups import GroupStore
from services.contract.messages import Trajectory
from services.suite import trajectory as commands
from services.suite.catalogue import COMPARED, NotFound, near, resolve
from services.suite.trajectory import find
from services.trainer.feeding.collect import CompleteGroup
from services.trainer.monitoring.transcripts import write_transcripts
from tests.factories import grade, make_group, make_trajectory
from tests.suite.conftest import configure


def put(store: GroupStore, *trajectories: Trajectory, reward: float | None = 1.0) -> None:
    for trajectory in trajectories:
        store.store(trajectory)
        if reward is not None:
            grade(store, trajectory.id, reward, exact_match=reward)


def write(config: Config, name: str, *trajectories: Trajectory, age_s: float = 0.0) -> Path:
    """A transcript by the trainer's own writer."""
    path = config.run.folder / name
    write_transcripts(path, [CompleteGroup("t0", list(trajectories), [])])
    os.utime(path, (time.time() - age_s, time.time() - age_s))
    return path


def test_an_episode_in_redis_is_shown_whole(config: Config, store: GroupStore) -> None:
    put(store, make_trajectory("t0", 0, versions=(3, 3, 4, 4), timings={"total_s": 1.5}, worker="w1"), reward=0.5)
    episode = find(config, "t0/0", with_tokens=False)
    assert (episode.kept, episode.reward, episode.stop_reason, episode.worker) == ("whole", 0.5, "answered", "w1")
    assert episode.versions == [3, 4] and episode.missing == [] and episode.tokens == []
    assert (episode.prompt_tokens, episode.response_tokens, episode.timings) == (3, 7, {"total_s": 1.5})
    assert episode.logprobs and episode.logprobs.tokens == 4
    assert episode.logprobs.mean == pytest.approx(-1.875 / 4) and episode.logprobs.lowest == -1.0
    search, passages, answer = episode.turns
    assert search.logprobs and search.logprobs.mean == pytest.approx(-0.375)
    assert (passages.kind, passages.query, passages.tokens, passages.logprobs) == ("observation", "capital of France", 3, None)
    assert [(v.version, v.start, v.end) for v in answer.versions or []] == [(4, 5, 6), (4, 6, 7)]


def test_an_episode_that_was_released_comes_from_the_transcripts_which_say_what_they_lack(
    config: Config, store: GroupStore
) -> None:
    graded = msgspec.structs.replace(make_trajectory(), reward=1.0, reward_parts={"exact_match": 1.0, "searches": 1.0})
    path = write(config, "transcripts/step000001.jsonl", graded)
    episode = find(config, "t0/0", with_tokens=False)
    assert (episode.kept, episode.place, episode.reward, episode.searches) == ("transcript", str(path), 1.0, 1)
    assert [turn.text for turn in episode.turns] == [span.text for span in graded.spans]
    assert "tokens and log-probs" in episode.missing and episode.logprobs is None


def test_evaluations_are_found_too(config: Config, store: GroupStore) -> None:
    write(config, "evaluations/start-step000000.jsonl", make_trajectory("e-start-v0-00001"))
    assert find(config, "e-start-v0-00001/0", with_tokens=False).kept == "transcript"


def test_redis_wins_over_a_transcript_and_the_newest_file_over_older_ones(config: Config, store: GroupStore) -> None:
    write(config, "transcripts/step000001.jsonl", make_trajectory(answer="old"), age_s=100)
    newest = write(config, "transcripts/step000002.jsonl", make_trajectory(answer="new"), age_s=50)
    found = find(config, "t0/0", with_tokens=False)
    assert (found.place, found.answer) == (str(newest), "new")
    put(store, make_trajectory(answer="again"))
    assert find(config, "t0/0", with_tokens=False).kept == "whole"


def test_every_token_has_its_log_prob_and_version(config: Config, store: GroupStore) -> None:
    put(store, make_trajectory(versions=(3, 3, 4, 5)))
    tokens = find(config, "t0/0", with_tokens=True).tokens
    assert [token.id for token in tokens] == [10, 11, 20, 21, 22, 12, 13]
    assert [token.version for token in tokens] == [3, 3, None, None, None, 4, 5]
    assert [token.logprob for token in tokens] == [-0.5, -0.25, None, None, None, -1.0, -0.125]


def test_tokens_have_their_text_where_the_tokenizer_is_at_hand(tmp_path: Path, store: GroupStore, redis_url: str) -> None:
    from tests.rollout.tiny_model import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    config = configure(tmp_path, redis_url, FORAGE_MODEL__SOURCE="folder", FORAGE_MODEL__PATH=str(tmp_path / "model"))
    put(store, make_trajectory())
    texts = [token.text for token in find(config, "t0/0", with_tokens=True).tokens]
    assert texts == [tokenizer.decode([i]) for i in [10, 11, 20, 21, 22, 12, 13]]


def test_without_a_tokenizer_the_tokens_have_no_text_and_one_line_says_so(
    config: Config, store: GroupStore, capsys: pytest.CaptureFixture[str]
) -> None:
    put(store, make_trajectory())
    assert {token.text for token in find(config, "t0/0", with_tokens=True).tokens} == {None}
    assert "no tokenizer at" in capsys.readouterr().err


def test_tokens_of_a_released_episode_are_refused_with_the_reason(config: Config, store: GroupStore) -> None:
    write(config, "transcripts/step000001.jsonl", make_trajectory())
    with pytest.raises(NotFound, match="t0/0 was released: transcripts keep no tokens"):
        find(config, "t0/0", with_tokens=True)


# -- ids ---------------------------------------------------------------------------------------------------------------


def test_a_beginning_is_enough_where_it_is_the_only_one(config: Config, store: GroupStore) -> None:
    put(store, make_trajectory("t7", 0))
    write(config, "transcripts/step000001.jsonl", make_trajectory("t6", 1))
    assert find(config, "t7", with_tokens=False).id == "t7/0"
    assert find(config, "t6", with_tokens=False).id == "t6/1"


def test_a_beginning_is_looked_for_in_both_places(config: Config, store: GroupStore) -> None:
    put(store, make_trajectory("t7", 0))
    write(config, "transcripts/step000001.jsonl", make_trajectory("t7", 1))
    with pytest.raises(NotFound, match=r"t7 is the beginning of 2 trajectories: t7/0, t7/1"):
        find(config, "t7", with_tokens=False)


def test_a_whole_id_is_itself_even_where_others_begin_so() -> None:
    assert resolve("t0/1", ["t0/10", "t0/1", "t0/11"]) == "t0/1"


def test_of_many_that_begin_so_a_few_are_named() -> None:
    with pytest.raises(NotFound, match=r"t is the beginning of 30 trajectories: t00/0, .*, t07/0 and 22 more"):
        resolve("t", [f"t{i:02d}/0" for i in range(30)])


def test_a_wrong_id_is_an_error_that_names_what_is_near(config: Config, store: GroupStore) -> None:
    put(store, make_trajectory("t00000012", 3))
    with pytest.raises(NotFound, match="no trajectory t00000021/3 in Redis or in the trainer's transcripts; near it: t00000012/3"):
        find(config, "t00000021/3", with_tokens=False)


def test_where_nothing_is_near_the_list_is_named(config: Config, store: GroupStore) -> None:
    with pytest.raises(NotFound, match="`forage trajectory` lists the latest"):
        find(config, "nonsense", with_tokens=False)


def test_near_ones_are_found_among_very_many() -> None:
    ids = [f"t{i:08d}/0" for i in range(3 * COMPARED)]
    assert "t00005999/0" in near("t00005999/1", ids)


@pytest.mark.parametrize("pattern", ["*", "t?", "[t]0", "t0/*", "\\", "t0/0\n"])
def test_characters_of_redis_patterns_stand_for_themselves(config: Config, store: GroupStore, pattern: str) -> None:
    put(store, make_trajectory("t0", 0))
    with pytest.raises(NotFound):
        find(config, pattern, with_tokens=False)


# -- what is odd -------------------------------------------------------------------------------------------------------


def test_a_line_that_is_being_written_is_passed_over(config: Config, store: GroupStore) -> None:
    path = write(config, "transcripts/step000001.jsonl", make_trajectory("t0", 0), make_trajectory("t0", 1))
    path.write_bytes(path.read_bytes()[:-40])
    assert find(config, "t0/0", with_tokens=False).id == "t0/0"
    with pytest.raises(NotFound):
        find(config, "t0/1", with_tokens=False)


def test_a_body_that_cannot_be_read_is_said(config: Config, store: GroupStore) -> None:
    store.client.set(store.keys.trajectory("t0/0"), b"\xc1")
    with pytest.raises(NotFound, match="t0/0 is in Redis .* cannot read it"):
        find(config, "t0/0", with_tokens=False)


def test_without_redis_the_transcripts_are_looked_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure(tmp_path, "redis://127.0.0.1:1/0")
    write(config, "transcripts/step000001.jsonl", make_trajectory())
    assert find(config, "t0", with_tokens=False).kept == "transcript"
    assert "cannot be reached" in capsys.readouterr().err


# -- the list ----------------------------------------------------------------------------------------------------------


def listed(config: Config, capsys: pytest.CaptureFixture[str], count: int = 20) -> list[str]:
    capsys.readouterr()
    commands.list_latest(config, count, as_json=True)
    return [episode["id"] for episode in json.loads(capsys.readouterr().out)]


def test_the_latest_are_listed_ungraded_ones_first_then_the_transcripts(
    config: Config, store: GroupStore, capsys: pytest.CaptureFixture[str]
) -> None:
    write(config, "transcripts/step000001.jsonl", make_trajectory("t0", 0), make_trajectory("t0", 1), age_s=100)
    write(config, "evaluations/warm-step000000.jsonl", make_trajectory("e-warm", 0), age_s=50)
    put(store, make_trajectory("t1", 0), make_trajectory("t1", 1))
    put(store, make_trajectory("t1", 2), reward=None)
    assert listed(config, capsys) == ["t1/2", "t1/1", "t1/0", "e-warm/0", "t0/1", "t0/0"]
    assert listed(config, capsys, 4) == ["t1/2", "t1/1", "t1/0", "e-warm/0"]
    assert listed(config, capsys, 1) == ["t1/2"]


def test_an_id_in_both_places_is_listed_once(config: Config, store: GroupStore, capsys: pytest.CaptureFixture[str]) -> None:
    put(store, make_trajectory("t0", 0))
    write(config, "transcripts/step000001.jsonl", make_trajectory("t0", 0), make_trajectory("t0", 1))
    assert listed(config, capsys) == ["t0/0", "t0/1"]
    assert listed(config, capsys, 2) == ["t0/0", "t0/1"]


def test_nothing_to_list_is_said(config: Config, store: GroupStore, capsys: pytest.CaptureFixture[str]) -> None:
    commands.list_latest(config, 5, as_json=False)
    assert "run test has no trajectory yet" in capsys.readouterr().err


# -- the command -------------------------------------------------------------------------------------------------------


def run(config: Config, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.suite", "trajectory", *arguments, "--config", "configs/smoke.toml"]
    environment = os.environ | {"FORAGE_RUN__DIRECTORY": str(config.run.directory), "FORAGE_RUN__NAME": "test"}
    return subprocess.run(command, env=environment | {"FORAGE_REDIS__URL": config.redis.url}, capture_output=True, text=True)


def test_the_command_lists_shows_and_refuses(config: Config, store: GroupStore) -> None:
    store.feed(make_group("t0"))
    put(store, make_trajectory("t0", 0))
    assert "t0/0" in run(config).stdout
    shown = run(config, "t0")
    assert shown.returncode == 0 and "capital of France" in shown.stdout and "\x1b" not in shown.stdout
    assert json.loads(run(config, "t0", "--tokens", "--json").stdout)["tokens"][0]["logprob"] == -0.5
    wrong = run(config, "t9/\x1b[31m")
    assert wrong.returncode == 1 and wrong.stdout == "" and "no trajectory t9/␛[31m" in wrong.stderr

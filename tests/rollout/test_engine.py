"""The real SGLang on a CPU: tokens in and out, log-probs, stops, versions, the swap under running requests."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.contract.codec import Codec
from services.contract.config.rollout import EngineConfig
from services.rollout.engine import EngineLoad, EngineRefused
from services.rollout.engine_process import command_line, environment, usable_context
from services.rollout.failures import EngineError, EngineStartError
from services.rollout.generation import ABORTED, Generation, read_answer
from services.rollout.own_engine import OwnEngine
from tests.factories import make_sampling
from tests.rollout.conftest import make_config
from tests.rollout.tiny_model import QUESTION, RUNS_ON, TURNS, make_variant, reference_logprobs

pytestmark = pytest.mark.asyncio(loop_scope="session")
TOLERANCE = 1e-3


def ids_of(codec: Codec, question: str = QUESTION) -> list[int]:
    return codec.prompt([{"role": "user", "content": question}])


def far(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
async def test_logprobs_are_those_of_the_temperature_scaled_distribution(
    served: OwnEngine, codec: Codec, tiny_model: Path, temperature: float
) -> None:
    prompt = list(range(10, 40))  # nothing it has learned: the distribution is broad
    turn = await served.generate(prompt, make_sampling(temperature=temperature), 24)
    assert far(turn.logprobs, reference_logprobs(tiny_model, prompt, turn.ids, temperature)) < TOLERANCE
    if temperature != 1.0:
        assert far(turn.logprobs, reference_logprobs(tiny_model, prompt, turn.ids, 1.0)) > TOLERANCE


async def test_top_p_does_not_change_the_logprobs(served: OwnEngine, tiny_model: Path) -> None:
    prompt = list(range(10, 40))
    turn = await served.generate(prompt, make_sampling(top_p=0.6), 24)
    assert far(turn.logprobs, reference_logprobs(tiny_model, prompt, turn.ids, 1.0)) < TOLERANCE


async def test_greedy_among_sampled_requests_keeps_its_tokens_and_logprobs(
    served: OwnEngine, codec: Codec, tiny_model: Path
) -> None:
    prompt = list(range(10, 40))
    alone = await served.generate(prompt, make_sampling(temperature=0.0), 24)
    others = [served.generate(prompt, make_sampling(temperature=1.3), 24) for _ in range(3)]
    together, *_ = await asyncio.gather(served.generate(prompt, make_sampling(temperature=0.0), 24), *others)
    assert together.ids == alone.ids
    assert far(together.logprobs, reference_logprobs(tiny_model, prompt, together.ids, 1.0)) < TOLERANCE


async def test_a_turn_ends_with_the_closing_tag_and_keeps_its_tokens(served: OwnEngine, codec: Codec) -> None:
    turn = await served.generate(ids_of(codec), make_sampling(temperature=0.0), 40)
    assert codec.decode(turn.ids) == TURNS[0] and turn.finish == "stop"
    assert len(turn.logprobs) == len(turn.ids) and all(logprob <= 0 for logprob in turn.logprobs)


async def test_a_tag_that_closes_inside_a_token_ends_the_turn_with_that_token(served: OwnEngine, codec: Codec) -> None:
    turn = await served.generate(ids_of(codec, RUNS_ON), make_sampling(temperature=0.0), 40)
    assert codec.decode(turn.ids) == "<search>capital of Spain</search></" and turn.finish == "stop"
    assert codec.decode(turn.ids[-1:]) == "></"


async def test_a_turn_at_its_limit_finishes_with_length(served: OwnEngine, codec: Codec) -> None:
    turn = await served.generate(ids_of(codec), make_sampling(), 3)
    assert (turn.finish, len(turn.ids)) == ("length", 3)


async def test_the_last_token_of_a_full_context_can_be_sampled(served: OwnEngine, codec: Codec) -> None:
    prompt = ([10, 20, 30, 40] * 200)[: usable_context(served.run_config) - 4]
    turn = await served.generate(prompt, make_sampling(), 4)
    assert len(turn.ids) == 4


async def test_a_request_beyond_the_context_is_refused_as_ours(served: OwnEngine) -> None:
    with pytest.raises(EngineRefused, match="context length"):
        await served.generate([10] * 600, make_sampling(), 4)


async def update_under_load(served: OwnEngine, model: Path, mode: str) -> list[Generation]:
    """Eight long turns, in the middle of which the engine goes from version 0 to 7. Returns them."""
    prompt, sampling = list(range(10, 40)), make_sampling(temperature=5.0)  # so random that few turns stop by themselves
    turns = [asyncio.create_task(served.generate(prompt, sampling, 400)) for _ in range(8)]
    await until_decoding(served, 3)  # some may have stopped already
    usual, served.config = served.config, served.config.model_copy(update={"update_mode": mode})
    try:
        await served.update(str(model), 7)
    finally:
        served.config = usual
    after = await served.generate(prompt, sampling, 8)
    assert {span.version for span in after.versions} == {7}
    return await asyncio.gather(*turns)


async def until_decoding(served: OwnEngine, requests: int) -> EngineLoad:
    async with asyncio.timeout(60):
        while (load := await served.load_figures()) is None or load.running < requests:
            await asyncio.sleep(0.02)
    return load


async def test_in_place_running_turns_go_on_with_the_new_policys_logprobs_on_the_whole_prefix(
    served: OwnEngine, tiny_model: Path, tmp_path: Path
) -> None:
    make_variant(tiny_model, tmp_path, scale=0.6)
    split = [turn for turn in await update_under_load(served, tmp_path, "in_place") if len(turn.versions) == 2]
    assert split
    for turn in split:
        old, new = turn.versions
        assert (old.version, new.version, old.end) == (0, 7, new.start)
        before = reference_logprobs(tiny_model, list(range(10, 40)), turn.ids, 5.0)
        since = reference_logprobs(tmp_path, list(range(10, 40)), turn.ids, 5.0)
        assert far(turn.logprobs[: old.end], before[: old.end]) < TOLERANCE
        assert far(turn.logprobs[new.start :], since[new.start :]) < TOLERANCE  # no KV of the old policy was left
        assert far(before[new.start :], since[new.start :]) > 10 * TOLERANCE


async def test_draining_lets_running_turns_finish_under_the_old_policy(served: OwnEngine, tiny_model: Path, tmp_path: Path) -> None:
    make_variant(tiny_model, tmp_path, scale=0.6)
    turns = await update_under_load(served, tmp_path, "drain")
    assert [{span.version for span in turn.versions} for turn in turns] == [{0}] * 8
    for turn in turns[:2]:
        assert far(turn.logprobs, reference_logprobs(tiny_model, list(range(10, 40)), turn.ids, 5.0)) < TOLERANCE


async def test_aborting_breaks_running_turns_off(served: OwnEngine, tiny_model: Path, tmp_path: Path) -> None:
    make_variant(tiny_model, tmp_path, scale=0.6)
    turns = await update_under_load(served, tmp_path, "abort")
    assert ABORTED in turns
    assert all(turn == ABORTED or {span.version for span in turn.versions} == {0} for turn in turns)


async def test_sglangs_own_in_place_pause_would_keep_the_old_policys_kv(
    served: OwnEngine, tiny_model: Path, tmp_path: Path
) -> None:
    """Why `in_place` here is SGLang's `retract`: with its `in_place` the flush of the cache fails, and so does the load."""
    make_variant(tiny_model, tmp_path, scale=0.6)
    turns = [asyncio.create_task(served.generate(list(range(10, 40)), make_sampling(temperature=5.0), 400)) for _ in range(8)]
    await until_decoding(served, 3)  # some may have stopped already
    await served._post("/pause_generation", {"mode": "in_place"}, 30)
    with pytest.raises(EngineError, match="cache was not flushed"):
        await served.load(str(tmp_path), 7)
    await served.resume()
    await asyncio.gather(*turns)
    await served.update(str(tiny_model), 0)


async def test_it_tells_its_load_while_it_decodes(served: OwnEngine) -> None:
    turns = [asyncio.create_task(served.generate(list(range(10, 40)), make_sampling(temperature=5.0), 200)) for _ in range(3)]
    load = await until_decoding(served, 1)
    assert load.queued == 0 and 0 < load.kv_use < 1
    await asyncio.gather(*turns)


async def test_a_version_that_does_not_load_is_told(served: OwnEngine, tmp_path: Path) -> None:
    await served.pause()
    with pytest.raises(EngineError, match="did not load|answered 400"):
        await served.load(str(tmp_path), 8)
    await served.resume()
    assert await served.reported_version() == "0"


async def test_health_is_a_real_generation(served: OwnEngine) -> None:
    assert await served.health(30)
    await served.pause()
    assert not await served.health(0.5)
    await served.resume()
    assert await served.health(30)


async def test_an_engine_that_cannot_start_says_why_and_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'No module named sglang' >&2\nexit 3\n")
    broken.chmod(0o755)
    config = make_config(tiny_model, tmp_path, engine={"python": str(broken), "max_total_tokens": 8192})
    engine = OwnEngine(config, tmp_path / "engine.log")
    with pytest.raises(EngineStartError, match="(?s)ended with code 3.*No module named sglang"):
        await engine.start(str(tiny_model), 0)
    assert not engine.running


async def test_an_engine_that_stays_silent_is_given_up_and_ended(tiny_model: Path, tmp_path: Path) -> None:
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\necho loading; echo $$ > " + str(tmp_path / "pid") + "; exec sleep 600\n")
    silent.chmod(0o755)
    config = make_config(tiny_model, tmp_path, engine={"python": str(silent), "start_timeout_s": 1})
    with pytest.raises(EngineStartError, match="(?s)not answered within 1s .*start_timeout_s.*loading"):
        await OwnEngine(config, tmp_path / "engine.log").start(str(tiny_model), 0)
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


async def test_a_request_to_a_stopped_engine_is_an_engine_error(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="not running"):
        await OwnEngine(make_config(tiny_model, tmp_path), tmp_path / "log").generate([1], make_sampling(), 1)


META = b'"meta_info": {"finish_reason": {"type": "stop"}, "weight_version": "%s", "output_token_logprobs": %s%s}'


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<html>", "cannot be read"),
        (b'{"output_ids": [5], "meta_info": {"finish_reason": {"type": "stop"}, "weight_version": "3"}}', "cannot be read"),
        (b'{"output_ids": [5], ' + META % (b"default", b"[[-1, 5, null]]", b"") + b"}", "'default' wrote a turn"),
        (b'{"output_ids": [5], ' + META % (b"3", b"[[null, 5, null]]", b"") + b"}", "cannot be read"),
        (b'{"output_ids": [5, 6], ' + META % (b"3", b"[[-1, 5, null]]", b"") + b"}", "1 log-probs that do not belong"),
        (b'{"output_ids": [5], ' + META % (b"3", b"[[-1, 6, null]]", b"") + b"}", "do not belong"),
        (
            b'{"output_ids": [5], '
            + META % (b"3", b"[[-1, 5, null]]", b', "weight_versions": [{"version": "3", "start": 0, "end": 2}]')
            + b"}",
            "does not cover",
        ),
    ],
)
async def test_an_answer_whose_parts_do_not_fit_is_refused(body: bytes, reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        read_answer(body)


async def test_an_answer_without_spans_takes_its_single_version() -> None:
    turn = read_answer(b'{"output_ids": [5], ' + META % (b"3", b"[[-1, 5, null]]", b"") + b"}")
    assert turn.versions[0].version == 3 and turn.versions[0].end == 1


async def test_nothing_of_a_turn_that_was_broken_off_is_used() -> None:
    """A queued request that is aborted comes back without any log-probs."""
    assert read_answer(b'{"output_ids": [], "meta_info": {"finish_reason": {"type": "abort"}, "weight_version": "3"}}') == ABORTED
    aborted = META.replace(b"stop", b"abort") % (b"3", b"[[-1, 5, null]]", b"")
    assert read_answer(b'{"output_ids": [5], ' + aborted + b"}") == ABORTED


async def test_a_gpu_gets_no_cpu_options(tiny_model: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model, tmp_path, engine={"device": "cuda", "dtype": "bfloat16", "tensor_parallel": 2})
    line = command_line(config, str(tiny_model), 3, 1234)
    assert "torch_native" not in line and "--disable-overlap-schedule" not in line
    assert line[line.index("--tp-size") + 1] == "2" and line[line.index("--weight-version") + 1] == "3"


async def test_an_engine_of_ours_reports_log_probs_with_the_temperature_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
    assert "SGLANG_RETURN_ORIGINAL_LOGPROB" not in environment(EngineConfig())

"""The real SGLang on a CPU: tokens in and out, log-probs, stops, versions, the swap under running requests."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.contract.codec import Codec
from services.rollout.engine import Engine, EngineRefused, read_answer
from services.rollout.engine_process import command_line, usable_context
from services.rollout.failures import EngineError, EngineStartError
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
    served: Engine, codec: Codec, tiny_model: Path, temperature: float
) -> None:
    prompt = list(range(10, 40))  # nothing it has learned: the distribution is broad
    turn = await served.generate(prompt, make_sampling(temperature=temperature), 24)
    assert far(turn.logprobs, reference_logprobs(tiny_model, prompt, turn.ids, temperature)) < TOLERANCE
    if temperature != 1.0:
        assert far(turn.logprobs, reference_logprobs(tiny_model, prompt, turn.ids, 1.0)) > TOLERANCE


async def test_top_p_does_not_change_the_logprobs(served: Engine, tiny_model: Path) -> None:
    prompt = list(range(10, 40))
    turn = await served.generate(prompt, make_sampling(top_p=0.6), 24)
    assert far(turn.logprobs, reference_logprobs(tiny_model, prompt, turn.ids, 1.0)) < TOLERANCE


async def test_greedy_among_sampled_requests_keeps_its_tokens_and_logprobs(served: Engine, codec: Codec, tiny_model: Path) -> None:
    prompt = list(range(10, 40))
    alone = await served.generate(prompt, make_sampling(temperature=0.0), 24)
    others = [served.generate(prompt, make_sampling(temperature=1.3), 24) for _ in range(3)]
    together, *_ = await asyncio.gather(served.generate(prompt, make_sampling(temperature=0.0), 24), *others)
    assert together.ids == alone.ids
    assert far(together.logprobs, reference_logprobs(tiny_model, prompt, together.ids, 1.0)) < TOLERANCE


async def test_a_turn_ends_with_the_closing_tag_and_keeps_its_tokens(served: Engine, codec: Codec) -> None:
    turn = await served.generate(ids_of(codec), make_sampling(temperature=0.0), 40)
    assert codec.decode(turn.ids) == TURNS[0] and turn.finish == "stop"
    assert len(turn.logprobs) == len(turn.ids) and all(logprob <= 0 for logprob in turn.logprobs)


async def test_a_tag_that_closes_inside_a_token_ends_the_turn_with_that_token(served: Engine, codec: Codec) -> None:
    turn = await served.generate(ids_of(codec, RUNS_ON), make_sampling(temperature=0.0), 40)
    assert codec.decode(turn.ids) == "<search>capital of Spain</search></" and turn.finish == "stop"
    assert codec.decode(turn.ids[-1:]) == "></"


async def test_a_turn_at_its_limit_finishes_with_length(served: Engine, codec: Codec) -> None:
    turn = await served.generate(ids_of(codec), make_sampling(), 3)
    assert (turn.finish, len(turn.ids)) == ("length", 3)


async def test_the_last_token_of_a_full_context_can_be_sampled(served: Engine, codec: Codec) -> None:
    prompt = ([10, 20, 30, 40] * 200)[: usable_context(served.config) - 4]
    turn = await served.generate(prompt, make_sampling(), 4)
    assert len(turn.ids) == 4


async def test_a_request_beyond_the_context_is_refused_as_ours(served: Engine) -> None:
    with pytest.raises(EngineRefused, match="context length"):
        await served.generate([10] * 600, make_sampling(), 4)


async def test_a_new_version_is_loaded_under_running_requests_and_none_is_lost(
    served: Engine, tiny_model: Path, tmp_path: Path
) -> None:
    make_variant(tiny_model, tmp_path, scale=0.6)
    prompt, sampling = list(range(10, 40)), make_sampling(temperature=5.0)  # so random that few turns stop by themselves
    turns = [asyncio.create_task(served.generate(prompt, sampling, 400)) for _ in range(8)]
    await asyncio.sleep(0.5)
    await served.pause()
    await served.load(str(tmp_path), 7)
    await served.resume()
    results = await asyncio.gather(*turns)
    after = await served.generate(prompt, sampling, 8)

    assert {span.version for span in after.versions} == {7}
    split = [turn for turn in results if len(turn.versions) == 2]
    assert split, [turn.versions for turn in results]
    for turn in split:
        old, new = turn.versions
        assert (old.version, new.version, old.end) == (0, 7, new.start)
        before = reference_logprobs(tiny_model, prompt, turn.ids, 5.0)
        since = reference_logprobs(tmp_path, prompt, turn.ids, 5.0)
        assert far(turn.logprobs[: old.end], before[: old.end]) < TOLERANCE
        assert far(turn.logprobs[new.start :], since[new.start :]) < TOLERANCE  # no KV of the old policy was left
        assert far(before[new.start :], since[new.start :]) > 10 * TOLERANCE


async def test_a_version_that_does_not_load_is_told(served: Engine, tmp_path: Path) -> None:
    await served.pause()
    with pytest.raises(EngineError, match="did not load|answered 400"):
        await served.load(str(tmp_path), 8)
    await served.resume()
    assert await served.reported_version() == "0"


async def test_health_is_a_real_generation(served: Engine) -> None:
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
    engine = Engine(config, tmp_path / "engine.log")
    with pytest.raises(EngineStartError, match="(?s)ended with code 3.*No module named sglang"):
        await engine.start(str(tiny_model), 0)
    assert not engine.running


async def test_an_engine_that_stays_silent_is_given_up_and_ended(tiny_model: Path, tmp_path: Path) -> None:
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\necho loading; echo $$ > " + str(tmp_path / "pid") + "; exec sleep 600\n")
    silent.chmod(0o755)
    config = make_config(tiny_model, tmp_path, engine={"python": str(silent), "start_timeout_s": 1})
    with pytest.raises(EngineStartError, match="(?s)not answered within 1s .*start_timeout_s.*loading"):
        await Engine(config, tmp_path / "engine.log").start(str(tiny_model), 0)
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


async def test_a_request_to_a_stopped_engine_is_an_engine_error(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="not running"):
        await Engine(make_config(tiny_model, tmp_path), tmp_path / "log").generate([1], make_sampling(), 1)


META = b'"meta_info": {"finish_reason": {"type": "stop"}, "weight_version": "%s", "output_token_logprobs": %s%s}'


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<html>", "cannot be read"),
        (b'{"output_ids": [5], "meta_info": {"finish_reason": {"type": "stop"}, "weight_version": "3"}}', "cannot be read"),
        (b'{"output_ids": [5], ' + META % (b"default", b"[[-1, 5, null]]", b"") + b"}", "cannot be read"),
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


async def test_a_gpu_gets_no_cpu_options(tiny_model: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model, tmp_path, engine={"device": "cuda", "dtype": "bfloat16", "tensor_parallel": 2})
    line = command_line(config, str(tiny_model), 3, 1234)
    assert "torch_native" not in line and "--disable-overlap-schedule" not in line
    assert line[line.index("--tp-size") + 1] == "2" and line[line.index("--weight-version") + 1] == "3"

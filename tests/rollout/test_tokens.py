"""Prompts and observations as ids: what fits, where it is cut, what is refused."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.contract.codec import Codec
from services.contract.transcript import SEARCH_R1, Layout, observation
from services.rollout.tokens import fit_observation, prompt_ids
from tests.factories import make_group, make_sampling
from tests.rollout.tiny_model import PASSAGES

CLOSE = "</information>\n\n"
LONG = '"France"\n' + "The capital is Paris. " * 60
JAPANESE = '"東京"\n' + "東京は日本の首都である。" * 40


def fit(codec: Codec, contents: list[str], limit: int, layout: Layout = SEARCH_R1) -> tuple[list[int], int]:
    return fit_observation(contents, layout, codec.encode, limit)


def test_an_observation_is_cut_at_a_passage_and_keeps_its_closing_tag(smollm2_codec: Codec) -> None:
    whole = smollm2_codec.encode(observation(PASSAGES))
    ids, shown = fit(smollm2_codec, PASSAGES, len(whole) - 1)
    assert shown == 1 and smollm2_codec.decode(ids) == observation(PASSAGES[:1])
    assert fit(smollm2_codec, PASSAGES, len(whole)) == (whole, 2)


def test_one_passage_that_is_too_long_is_cut_between_words(smollm2_codec: Codec) -> None:
    ids, shown = fit(smollm2_codec, [LONG], 60)
    text = smollm2_codec.decode(ids)
    assert shown == 1 and 50 < len(ids) <= 60
    assert text.endswith(CLOSE) and text.removesuffix(CLOSE).split()[-1] in ("The", "capital", "is", "Paris.")


def test_a_script_without_spaces_is_cut_between_characters(smollm2_codec: Codec) -> None:
    ids, shown = fit(smollm2_codec, [JAPANESE], 100)
    text = smollm2_codec.decode(ids)
    assert shown == 1 and 90 < len(ids) <= 100
    assert text.endswith(CLOSE) and "東京は日本" in text and "\ufffd" not in text


@pytest.mark.parametrize("limit", [17, 18, 20, 40, 80])
def test_what_has_no_spaces_is_shown_as_far_as_it_fits(smollm2_codec: Codec, limit: int) -> None:
    passage = "ab" * 300
    ids, shown = fit(smollm2_codec, [passage], limit)
    text = smollm2_codec.decode(ids).partition("Title: ")[2].partition(")")[0]
    assert shown == 1 and passage.startswith(text) and len(ids) <= limit
    assert len(smollm2_codec.encode(observation([passage[: len(text) + 1]]))) > limit, "one character more would not fit"


def test_a_word_that_ends_where_the_limit_is_stays(smollm2_codec: Codec) -> None:
    words = '"France"\nThe capital is Paris.'
    limit = len(smollm2_codec.encode(observation([words])))
    ids, _ = fit(smollm2_codec, [words + " " + "It lies on the Seine. " * 20], limit)
    assert smollm2_codec.decode(ids) == observation([words])


def test_when_not_a_character_fits_the_empty_observation_stands(smollm2_codec: Codec) -> None:
    assert fit(smollm2_codec, [LONG], 1) == (smollm2_codec.encode(observation([])), 0)


def test_a_custom_layout_keeps_its_end_too(smollm2_codec: Codec) -> None:
    layout = Layout("* {text}\n", "\nFOUND\n{passages}\nEND OF WHAT WAS FOUND\n")
    ids, shown = fit(smollm2_codec, [LONG], 40, layout)
    assert shown == 1 and len(ids) <= 40 and smollm2_codec.decode(ids).endswith("\nEND OF WHAT WAS FOUND\n")


@given(st.lists(st.text(max_size=80) | st.just(LONG) | st.just(JAPANESE), max_size=4), st.integers(12, 150))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_passages_fit_into_any_limit_that_the_empty_observation_fits(
    smollm2_codec: Codec, contents: list[str], limit: int
) -> None:
    ids, shown = fit(smollm2_codec, contents, limit)
    assert len(ids) <= limit and 0 <= shown <= len(contents)
    text = smollm2_codec.decode(ids)
    assert text.startswith("\n\n<information>") and text.endswith(CLOSE)


def test_a_prompt_as_long_as_the_context_is_refused(smollm2_codec: Codec) -> None:
    group = make_group()
    length = len(prompt_ids(group, smollm2_codec, 1000))
    with pytest.raises(ValueError, match=f"capital:1 has {length} tokens"):
        prompt_ids(group, smollm2_codec, length)


def test_a_budget_too_small_for_any_passage_is_refused(smollm2_codec: Codec) -> None:
    empty = len(smollm2_codec.encode(observation([])))
    with pytest.raises(ValueError, match=f"has {empty} tokens before it shows a passage.*raise rollout.max_observation_tokens"):
        prompt_ids(make_group(sampling=make_sampling(max_observation_tokens=empty)), smollm2_codec, 1000)


def test_a_plain_prompt_is_encoded_as_it_is(smollm2_codec: Codec) -> None:
    assert smollm2_codec.decode(prompt_ids(make_group(prompt="What is the capital"), smollm2_codec, 100)) == "What is the capital"

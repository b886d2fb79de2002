"""Places, cleaned fields and facts."""

from __future__ import annotations

import pytest

from services.prepare import facts
from services.prepare.factbook import Place, clean, load_places
from services.prepare.facts import Fact
from services.prepare.passages import MAX_CHARS, Passage, shorten


def holding(path: str, text: str) -> Place:
    return Place("xx", "Testland", {path: text})


def test_markup_and_entities_are_removed() -> None:
    assert clean("Mal&eacute;<br><br> <em>x</em>&nbsp; &ldquo;y&rdquo;") == 'Malé; x "y"'


def test_the_limit_takes_the_first_places_in_a_fixed_order(places: list[Place]) -> None:
    assert load_places(5) == places[:5]
    assert [p.name for p in places] == sorted((p.name for p in places), key=lambda n: n.replace("ô", "o"))


def test_names_and_slugs_are_unique(places: list[Place]) -> None:
    assert len({p.name for p in places}) == len({p.slug for p in places}) == len(places) > 200


@pytest.mark.parametrize(
    ("text", "value", "aliases"),
    [
        ("Ouagadougou", "Ouagadougou", ()),
        ("Kyiv (Kiev is the transliteration from Russian)", "Kyiv", ()),
        ("Pristina (Prishtine, Prishtina)", "Pristina", ("Prishtine", "Prishtina")),
        ("Chisinau in Romanian (Kishinev in Russian)", "Chisinau", ("Kishinev",)),
    ],
)
def test_capital(text: str, value: str, aliases: tuple[str, ...]) -> None:
    assert facts.capital(holding("Government|Capital|name", text)) == Fact(value, aliases)


@pytest.mark.parametrize("text", ["Porto-Novo (constitutional capital); Cotonou (seat)", "Gitega, Bujumbura", ""])
def test_two_capitals_or_none_are_no_fact(text: str) -> None:
    assert facts.capital(holding("Government|Capital|name", text)) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Tena Kourou 749 m", "Tena Kourou"),
        ("Kilimanjaro (highest point in Africa) 5,895 m", "Kilimanjaro"),
        ("Nevado Ojos del Salado 6,893 m (highest volcano in the world)", "Nevado Ojos del Salado"),
        ("Mont Blanc 4,810", "Mont Blanc"),
        ("Chott Melrhir -40 m", "Chott Melrhir"),
    ],
)
def test_points_lose_their_height(text: str, value: str) -> None:
    fact = facts.highest_point(holding("Geography|Elevation|highest point", text))
    assert fact and fact.value == value


@pytest.mark.parametrize("text", ["unnamed elevation 80 m", "200 m NNW of lighthouse 85 m", "8th tee, golf course 5 m", "Tahat"])
def test_descriptions_are_no_names(text: str) -> None:
    assert facts.highest_point(holding("Geography|Elevation|highest point", text)) is None


def test_a_date_is_accepted_in_both_orders() -> None:
    fact = facts.holiday_date(holding("Government|National holiday", "Republic Day, 11 December (1958)"))
    assert fact and fact.answers == ["11 December", "December 11", "11 December 1958", "December 11, 1958"]


def test_two_holidays_are_no_fact() -> None:
    assert facts.holiday_date(holding("Government|National holiday", "A, 5 July (1962); B, 1 November (1954)")) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Prime Minister Sifi GHRIEB (since 28 August 2025)", "Sifi GHRIEB"),
        ("Transition Prime Minister Abdoulaye MAIGA (since 2024)", "Abdoulaye MAIGA"),
        ("President of the Swiss Confederation Guy PARMELIN (since 2026)", None),
        ("Council of five; chair Jane DOE (since 2020)", None),
    ],
)
def test_a_leader_is_the_name_without_the_office(text: str, value: str | None) -> None:
    fact = facts.head_of_government(holding("Government|Executive branch|head of government", text))
    assert (fact.value if fact else None) == value


def test_quantities_are_accepted_with_and_without_unit() -> None:
    fact = facts.land_area(holding("Geography|Area|land", "273,800 sq km"))
    assert fact and fact.answers == ["273,800 sq km", "273,800 square kilometers", "273,800"]


def test_accents_are_optional_in_an_answer() -> None:
    assert Fact("Malé").answers == ["Malé", "Male"]


def test_passages_are_short_and_in_wiki_form(passages: list[Passage]) -> None:
    assert 2500 < len(passages) < 4500
    assert len({p.id for p in passages}) == len(passages)
    assert all(len(p.text) <= MAX_CHARS for p in passages)
    title, _, text = passages[0].contents.partition("\n")
    assert title == '"Afghanistan: Capital"'
    assert text.startswith("The capital of Afghanistan is Kabul.")


def test_a_long_text_is_cut_at_a_clause() -> None:
    assert shorten("one two; three four five six seven", 24) == "one two; three four..."
    assert shorten("aaaa bbbb cccc dddd; eeee ffff", 24) == "aaaa bbbb cccc dddd..."
    assert shorten("short", 24) == "short"

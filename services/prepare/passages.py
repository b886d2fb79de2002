"""The corpus: one short passage per place and topic, facts first, comment after, cut to a bound.

Short passages matter here: on a CPU every token that is shown to the policy is paid for in generation and in training.
Several topics hold more than one candidate for an answer (two extremes, two leaders, three areas), so that finding the
passage is not yet knowing the answer. Contents have the form of wiki-18: a title in double quotes, a newline, the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.prepare.factbook import Place

MAX_CHARS = 260
"""Of a passage's text, title not counted."""
LIST_CHARS = 90
"""Of a list of shares: digits cost a token each."""
CUT_BACK_TO = 0.6
"""A text that is too long ends at its last clause within this share of the bound, else at a word."""


@dataclass(frozen=True)
class Passage:
    id: str
    place: str
    """The place's code."""
    topic: str
    title: str
    text: str

    @property
    def contents(self) -> str:
        return f'"{self.title}"\n{self.text}'


def build_passages(places: Sequence[Place]) -> list[Passage]:
    """Every topic of every place about which the Factbook says something, in a fixed order."""
    return [passage for place in places for passage in place_passages(place)]


def place_passages(place: Place) -> Iterator[Passage]:
    for topic, write in TOPICS.items():
        if text := shorten(_sentence(write(place))):
            yield Passage(passage_id(place, topic), place.code, topic, f"{place.name}: {topic}", text)


def passage_id(place: Place, topic: str) -> str:
    return f"{place.slug}/{re.sub(r'[^a-z]+', '-', topic.lower())}"


def write_corpus(passages: Sequence[Passage], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for passage in passages:
            file.write(json.dumps({"id": passage.id, "contents": passage.contents}, ensure_ascii=False) + "\n")


def shorten(text: str, limit: int = MAX_CHARS) -> str:
    """Cut at the end of a clause if one is near enough, else at a word; a cut text ends in "..."."""
    if len(text) <= limit:
        return text
    head = text[: limit - 3]
    clause = max(head.rfind(mark) for mark in ("; ", ". ", ", "))
    end = clause if clause >= CUT_BACK_TO * limit else head.rfind(" ")
    return head[:end].rstrip(" ,;.(") + "..."


def _sentence(parts: Sequence[str]) -> str:
    """The parts that hold something, each closed with a full stop."""
    return " ".join(part if part.endswith((".", "!", "?")) else part + "." for part in parts if part)


def _say(template: str, *values: str) -> str:
    """The template filled in, or "" when a value is missing."""
    return template.format(*values) if all(values) else ""


def _capital(place: Place) -> list[str]:
    get = place.get
    return [
        _say("The capital of {} is {}", place.phrase, get("Government|Capital|name")),
        _say("Time: {}", get("Government|Capital|time difference").partition(" (")[0]),
        _say("Name: {}", get("Government|Capital|etymology")),
    ]


def _elevation(place: Place) -> list[str]:
    base = "Geography|Elevation|"
    return [
        _say("{} is the highest point of {}", place.get(base + "highest point"), place.phrase),
        _say("{} is the lowest point", place.get(base + "lowest point")),
        _say("Mean elevation: {}", place.get(base + "mean elevation")),
    ]


def _area(place: Place) -> list[str]:
    base = "Geography|Area|"
    return [
        _say("Total area of {}: {}", place.phrase, place.get(base + "total")),
        _say("Land: {}", place.get(base + "land")),
        _say("Water: {}", place.get(base + "water")),
        _say("Comparison: {}", place.get("Geography|Area - comparative")),
    ]


def _borders(place: Place) -> list[str]:
    return [
        _say("Coastline of {}: {}", place.phrase, place.get("Geography|Coastline")),
        _say("Land boundaries: {} in total", place.get("Geography|Land boundaries|total")),
        _say("Border countries: {}", place.get("Geography|Land boundaries|border countries")),
    ]


def _holiday(place: Place) -> list[str]:
    return [_say("National holiday of {}: {}", place.phrase, place.get("Government|National holiday"))]


def _independence(place: Place) -> list[str]:
    return [
        _say("Former name of {}: {}", place.phrase, place.get("Government|Country name|former")),
        _say("Independence of {}: {}", place.phrase, place.get("Government|Independence")),
        _say("Full name: {}", place.get("Government|Country name|conventional long form")),
    ]


def _currency(place: Place) -> list[str]:
    rates = ((year, place.get(f"Economy|Exchange rates|Exchange rates {year}")) for year in range(2024, 2019, -1))
    rate = next((f"{text.partition(' (')[0]} per US dollar in {year}" for year, text in rates if text), "")
    currency = place.get("Economy|Exchange rates|Currency").partition(" per US dollar")[0]
    return [_say("Currency of {}: {}", place.phrase, currency), _say("Exchange rate: {}", rate)]


def _codes(place: Place) -> list[str]:
    return [
        _say("Internet country code of {}: {}", place.phrase, place.get("Communications|Internet country code")),
        _say("Civil aircraft prefix: {}", place.get("Transportation|Civil aircraft registration country code prefix")),
        _say("Internet users: {}", place.get("Communications|Internet users|percent of population")),
    ]


def _symbols(place: Place) -> list[str]:
    return [
        _say("National symbol of {}: {}", place.phrase, place.get("Government|National symbol(s)")),
        _say("National colors: {}", place.get("Government|National color(s)")),
    ]


def _anthem(place: Place) -> list[str]:
    base = "Government|National anthem(s)|"
    lyrics, _, music = place.get(base + "lyrics/music").partition("/")
    authors = f"Words by {lyrics.strip()}, music by {music.strip()}" if music else _say("Words and music by {}", lyrics)
    return [
        _say("{} is the national anthem of {}", place.get(base + "title"), place.phrase),
        authors,
        _say("History: {}", place.get(base + "history")),
    ]


def _ports(place: Place) -> list[str]:
    return [
        _say("Key ports of {}: {}", place.phrase, place.get("Transportation|Ports|key ports")),
        _say("Number of ports: {}", place.get("Transportation|Ports|total ports")),
    ]


def _leaders(place: Place) -> list[str]:
    base = "Government|Executive branch|"
    return [
        _say("Chief of state of {}: {}", place.phrase, place.get(base + "chief of state")),
        _say("Head of government: {}", place.get(base + "head of government")),
    ]


def _people(place: Place) -> list[str]:
    base = "People and Society|"
    return [
        _say("Population of {}: {}", place.phrase, place.get(base + "Population|total")),
        _say("Median age: {}", place.get(base + "Median age|total")),
        _say("Life expectancy: {}", place.get(base + "Life expectancy at birth|total population")),
        _say("Nationality: {}", place.get(base + "Nationality|noun")),
    ]


def _exports(place: Place) -> list[str]:
    return [
        _say("Exports of {}: {}", place.phrase, place.get("Economy|Exports - commodities")),
        _say("Export partners: {}", place.get("Economy|Exports - partners")),
    ]


def _imports(place: Place) -> list[str]:
    return [
        _say("Imports of {}: {}", place.phrase, place.get("Economy|Imports - commodities")),
        _say("Import partners: {}", place.get("Economy|Imports - partners")),
    ]


def _products(place: Place) -> list[str]:
    return [
        _say("Industries of {}: {}", place.phrase, place.get("Economy|Industries")),
        _say("Agriculture: {}", place.get("Economy|Agricultural products")),
    ]


def _land(place: Place) -> list[str]:
    return [
        _say("Location of {}: {}", place.phrase, place.get("Geography|Location")),
        _say("Climate: {}", place.get("Geography|Climate")),
        _say("Terrain: {}", place.get("Geography|Terrain")),
    ]


def _languages(place: Place) -> list[str]:
    languages = place.get("People and Society|Languages|Languages") or place.get("People and Society|Languages")
    return [
        _say("Languages of {}: {}", place.phrase, shorten(languages, LIST_CHARS)),
        _say("Religions: {}", shorten(place.get("People and Society|Religions"), LIST_CHARS)),
    ]


TOPICS: dict[str, Callable[[Place], list[str]]] = {
    "Capital": _capital,
    "Elevation": _elevation,
    "Area": _area,
    "Coastline and borders": _borders,
    "National holiday": _holiday,
    "Names and independence": _independence,
    "Currency": _currency,
    "Internet and aircraft codes": _codes,
    "National symbols": _symbols,
    "National anthem": _anthem,
    "Ports": _ports,
    "Leaders": _leaders,
    "Population": _people,
    "Exports": _exports,
    "Imports": _imports,
    "Industry and farming": _products,
    "Location and climate": _land,
    "Languages and religions": _languages,
}
"""What is written about each place, in corpus order."""

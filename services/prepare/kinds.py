"""What is asked: properties of a place, ways to describe a place, and which are put together.

To add a kind: a reader in `facts`, its passage in `passages`, and an entry here; then `python -m services.prepare recall`
tells whether a good query finds its passage. A kind under 0.85 asks for the impossible: change its wording or leave it out.
Several kinds ask for one of two or three like values in the same passage, so that copying at random does not pay.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.prepare import facts
from services.prepare.facts import Reader


@dataclass(frozen=True)
class Property:
    """What may be asked about a place. `{place}` takes its name or a description of it."""

    name: str
    topic: str
    read: Reader
    phrasings: tuple[str, ...]
    query: str
    """A good query for it."""


@dataclass(frozen=True)
class Description:
    """A way to point at a place without naming it; `{value}` is the describing fact."""

    name: str
    topic: str
    read: Reader
    phrasings: tuple[str, ...]
    query: str


CAPITAL = Property(
    "capital",
    "Capital",
    facts.capital,
    ("What is the capital of {place}?", "Which city is the capital of {place}?", "Name the capital city of {place}."),
    "{place} capital",
)
HIGHEST_POINT = Property(
    "highest_point",
    "Elevation",
    facts.highest_point,
    ("What is the highest point of {place}?", "What is the name of the highest elevation in {place}?"),
    "{place} highest point",
)
LOWEST_POINT = Property(
    "lowest_point",
    "Elevation",
    facts.lowest_point,
    ("What is the lowest point of {place}?", "What is the name of the lowest elevation in {place}?"),
    "{place} lowest point",
)
HOLIDAY_DATE = Property(
    "holiday_date",
    "National holiday",
    facts.holiday_date,
    ("On what date is the national holiday of {place}?", "On which day falls the national holiday of {place}?"),
    "{place} national holiday",
)
CURRENCY_CODE = Property(
    "currency_code",
    "Currency",
    facts.currency_code,
    ("What is the currency code of {place}?", "Which three-letter currency code is used in {place}?"),
    "{place} currency",
)
AIRCRAFT_PREFIX = Property(
    "aircraft_prefix",
    "Internet and aircraft codes",
    facts.aircraft_prefix,
    (
        "What is the civil aircraft registration prefix of {place}?",
        "Which prefix belongs to civil aircraft of {place}?",
    ),
    "{place} civil aircraft prefix",
)
LAND_AREA = Property(
    "land_area",
    "Area",
    facts.land_area,
    ("What is the land area of {place}?", "How much land area, without water, has {place}?"),
    "{place} land area",
)
HEAD_OF_GOVERNMENT = Property(
    "head_of_government",
    "Leaders",
    facts.head_of_government,
    ("Who is the head of government of {place}?", "Who leads the government of {place}?"),
    "{place} head of government",
)
BORDER = Property(
    "border_length",
    "Coastline and borders",
    lambda place: None,
    ("How long is the border between {place} and {other}?", "What is the length of the border of {place} with {other}?"),
    "{place} {other} border",
)
BY_HIGHEST_POINT = Description(
    "highest_point",
    "Elevation",
    facts.highest_point,
    ("the country whose highest point is {value}", "the country where {value} is the highest point"),
    "{value} highest point",
)
BY_CAPITAL = Description(
    "capital",
    "Capital",
    facts.capital,
    ("the country whose capital is {value}", "the country that is governed from {value}"),
    "{value} capital",
)
BY_ANTHEM = Description(
    "anthem",
    "National anthem",
    facts.anthem_title,
    ('the country whose national anthem is "{value}"', 'the country that sings "{value}" as its national anthem'),
    'national anthem "{value}"',
)
BY_FORMER_NAME = Description(
    "former_name",
    "Names and independence",
    facts.former_name,
    ("the country once called {value}", "the country that was formerly named {value}"),
    "former name {value}",
)

PROPERTIES = (
    CAPITAL,
    HIGHEST_POINT,
    LOWEST_POINT,
    HOLIDAY_DATE,
    CURRENCY_CODE,
    AIRCRAFT_PREFIX,
    LAND_AREA,
    HEAD_OF_GOVERNMENT,
)
"""Asked in one hop. BORDER, which names two places, is asked as well."""

TWO_HOP = (
    (BY_HIGHEST_POINT, CAPITAL),
    (BY_ANTHEM, CAPITAL),
    (BY_FORMER_NAME, CAPITAL),
    (BY_HIGHEST_POINT, CURRENCY_CODE),
    (BY_CAPITAL, CURRENCY_CODE),
    (BY_CAPITAL, HOLIDAY_DATE),
    (BY_CAPITAL, HIGHEST_POINT),
    (BY_CAPITAL, HEAD_OF_GOVERNMENT),
    (BY_ANTHEM, LAND_AREA),
)
"""(how the place is described, what is asked about it): never from the same passage."""

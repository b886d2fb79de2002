"""How right an answer is: exact match, sub-match and F1 after normalisation, as Search-R1 and SQuAD have them.

One difference: where nothing is left of an answer or a gold after normalisation ("the", "!!!", ""), it matches nothing, not even
another of which nothing is left. Otherwise a policy would be paid for answering nothing to a question whose gold is broken.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


@lru_cache(maxsize=1024)
def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, words apart by one space.

    Punctuation is removed before articles are, so "a-b" becomes the word "ab" and keeps its "a". Accents and other scripts
    stay as they are: no Unicode normal form is applied. Cached, since the samples of a group share golds and passages.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, golden_answers: Iterable[str]) -> float:
    """1 if the normalised answer equals a normalised gold, else 0."""
    return _best(answer, golden_answers, lambda found, gold: float(found == gold))


def sub_match(text: str, golden_answers: Iterable[str]) -> float:
    """1 if a normalised gold stands somewhere in the normalised text, else 0.

    Letter by letter, as in Search-R1: "atre" stands in "theatre". So it works for scripts that put no space between words.
    """
    return _best(text, golden_answers, lambda found, gold: float(gold in found))


def f1(answer: str, golden_answers: Iterable[str]) -> float:
    """The harmonic mean of precision and recall over words, as in SQuAD's evaluation; the best over all golds, 0 to 1."""
    return _best(answer, golden_answers, _token_f1)


def _token_f1(found: str, gold: str) -> float:
    """Of two normalised texts; a word that stands twice in both counts twice."""
    found_words, gold_words = found.split(), gold.split()
    common = (Counter(found_words) & Counter(gold_words)).total()
    return 2 * common / (len(found_words) + len(gold_words))


def _best(text: str, golden_answers: Iterable[str], score: Callable[[str, str], float]) -> float:
    found = normalise(text)
    golds = (normalise(gold) for gold in golden_answers) if found else ()
    return max((score(found, gold) for gold in golds if gold), default=0.0)

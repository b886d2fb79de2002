"""Whether an answer is right: exact match after normalisation, as Search-R1 and the question-answering sets before it have it.

One difference: an answer of which nothing is left after normalisation ("the", "!!!", "") never matches, not even a gold of
which nothing is left either. Otherwise a policy would be paid for answering nothing to a question whose gold is broken.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, words apart by one space.

    Punctuation is removed before articles are, so "a-b" becomes the word "ab" and keeps its "a". Accents and other scripts
    stay as they are: no Unicode normal form is applied.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, golden_answers: Iterable[str]) -> bool:
    """Whether the normalised answer equals a normalised gold. Never true for an answer that normalises to nothing."""
    wanted = normalise(answer)
    return bool(wanted) and any(normalise(gold) == wanted for gold in golden_answers)

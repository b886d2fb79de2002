"""How often a good query finds its gold passage, by kind and hop, asked of the running retriever.

What a perfect searcher could reach: a kind with a low figure here cannot be learned, whatever the policy does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from services.contract.telemetry import Progress
from services.prepare.demonstrations import Retrieve
from services.prepare.questions import FactQuestion

BATCH = 32


def measure_recall(questions: Sequence[FactQuestion], retrieve: Retrieve) -> dict[tuple[str, int], tuple[int, int]]:
    """(kind, hop) -> (questions whose gold passage was found, questions)."""
    queries = sorted({hop.query for question in questions for hop in question.hops})
    found: dict[str, set[str]] = {}
    with Progress("asking the retriever", total=len(queries), unit="queries") as bar:
        for start in range(0, len(queries), BATCH):
            part = queries[start : start + BATCH]
            found.update((query, {str(p.id) for p in passages}) for query, passages in zip(part, retrieve(part), strict=True))
            bar.advance(len(part))
    hits: dict[tuple[str, int], list[bool]] = defaultdict(list)
    for question in questions:
        for number, hop in enumerate(question.hops, 1):
            hits[question.question.source, number].append(hop.passage in found[hop.query])
    return {key: (sum(values), len(values)) for key, values in hits.items()}


def table(recall: dict[tuple[str, int], tuple[int, int]], topk: int) -> str:
    lines = [f"{'kind':<44} {'hop':>3} {'questions':>9}  recall@{topk}"]
    lines += [f"{kind:<44} {hop:>3} {total:>9}  {hit / total:.3f}" for (kind, hop), (hit, total) in recall.items()]
    return "\n".join(lines)

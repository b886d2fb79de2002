"""Why the retriever cannot start, build or answer. Every message says what, where and the mend."""

from __future__ import annotations


class RetrieverError(Exception):
    """The service cannot be used as it is configured; the message is meant for a person."""


class CorpusError(RetrieverError):
    """A line of the corpus is not a passage."""


class IndexMismatch(RetrieverError):
    """The index is missing, broken, or was built from another corpus, encoder or setting."""


class NotReady(Exception):
    """Still loading, failed to load, or shutting down: HTTP 503."""


class QueueFull(Exception):
    """More queries wait than `retriever.queue_size`: HTTP 503."""


class DeadlinePassed(Exception):
    """The request's `deadline_ms` ran out before its answer was there: HTTP 504."""


class BackendFailure(Exception):
    """Encoding, searching, reranking or a web provider failed: HTTP 502, never an empty list."""

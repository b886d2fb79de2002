"""Who encodes: the building process itself, or several processes, each with a part of the cores or a GPU of its own.

A worker has its own corpus map, model and map of the embeddings file; only batch numbers travel.

| what happens             | the building process                         | the workers                               |
|--------------------------|----------------------------------------------|-------------------------------------------|
| a batch is finished      | marks it, sends another                      | answered with its number                  |
| a batch fails            | RetrieverError with the worker's message     | sent the message and ended                |
| a worker is killed       | RetrieverError naming how it ended           | the others are ended                      |
| the builder is killed    |                                              | see their pipe closed, and end            |

Finished batches are marked in every case: the next build goes on from there.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from services.retriever.batches import Encoding
from services.retriever.corpus import Corpus
from services.retriever.encoder import load_encoder
from services.retriever.errors import RetrieverError
from services.retriever.families import EncoderDescription

WAITING = 2
"""Tasks a worker has in hand, so that it never waits for the next."""


def encode_here(
    tasks: Iterator[list[int]], corpus: Corpus, description: EncoderDescription, part: Path, threads: int
) -> Iterator[list[int]]:
    """Yields each task when its vectors are in `part`."""
    vectors = np.lib.format.open_memmap(part, mode="r+")
    encoding = Encoding(corpus, load_encoder(description, threads), vectors, description.folder)
    for task in tasks:
        encoding.run(task)
        yield task


@dataclass(frozen=True)
class Job:
    """What a worker needs to begin."""

    corpus: Path
    description: EncoderDescription
    part: Path
    threads: int


def encode_in_workers(
    tasks: Iterator[list[int]], count: int, corpus: Path, description: EncoderDescription, part: Path, threads: int
) -> Iterator[list[int]]:
    """The same by `count` processes that share `threads`; in the order in which they finish."""
    context = multiprocessing.get_context("spawn")  # torch and FAISS do not survive a fork
    workers: dict[Connection, BaseProcess] = {}
    try:
        for number in range(count):
            job = Job(corpus, _with_device(description, number), part, max(threads // count, 1))
            here, there = context.Pipe()
            workers[here] = process = context.Process(target=_work, args=(there, job), name=f"encoder-{number}", daemon=True)
            process.start()
            there.close()  # the worker has its own: when it dies, the pipe is closed
        yield from _hand_out(tasks, workers)
    finally:
        for connection, process in workers.items():
            connection.close()
            process.terminate()
            process.join()


def _with_device(description: EncoderDescription, number: int) -> EncoderDescription:
    if description.device == "cpu":
        return description
    import torch

    return replace(description, device=f"cuda:{number % max(torch.cuda.device_count(), 1)}")


def _hand_out(tasks: Iterator[list[int]], workers: dict[Connection, BaseProcess]) -> Iterator[list[int]]:
    running = 0
    for connection in [*workers] * WAITING:
        running += _send_next(connection, tasks)
    while running:
        for connection in wait([*workers]):
            assert isinstance(connection, Connection)
            task = _answer(connection, workers[connection])
            running += _send_next(connection, tasks) - 1
            yield task


def _send_next(connection: Connection, tasks: Iterator[list[int]]) -> int:
    """How many tasks were sent: 1, or 0 when none is left."""
    if (task := next(tasks, None)) is None:
        return 0
    with suppress(OSError):  # dead: the next look at its pipe tells how
        connection.send(task)
    return 1


def _answer(connection: Connection, process: BaseProcess) -> list[int]:
    try:
        answer = connection.recv()
    except (EOFError, OSError):
        process.join(5)
        raise RetrieverError(
            f"{process.name} ended with exit code {process.exitcode} (-9: killed, perhaps for its memory; then lower "
            "retriever.index_workers); run the build again, it goes on from the last checkpoint"
        ) from None
    if isinstance(answer, str):
        raise RetrieverError(f"{process.name}: {answer}")
    return answer


def _work(connection: Connection, job: Job) -> None:
    """One worker's life: tasks in, their numbers out, until the pipe is closed."""
    try:
        vectors = np.lib.format.open_memmap(job.part, mode="r+")
        encoder = load_encoder(job.description, job.threads)
        encoding = Encoding(Corpus.open(job.corpus), encoder, vectors, job.description.folder)
        while True:
            task = connection.recv()
            encoding.run(task)
            connection.send(task)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the builder is done, or dead
    except Exception as error:  # whatever it was, the builder must say it
        connection.send(str(error) or repr(error))

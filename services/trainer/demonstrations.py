"""Demonstrations become rows for the learner: tokenized piece by piece, as an episode would have made them."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec

from services.contract.codec import Codec
from services.contract.config import Config, ConfigError
from services.contract.messages import Demonstration
from services.contract.transcript import build_prompt
from services.trainer.megatron.batching import Row


def read_demonstrations(path: Path) -> list[Demonstration]:
    """Raises ConfigError naming file, line and fault."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist: run `prepare demonstrations`, or set trainer.warm_start.epochs = 0")
    decode = msgspec.json.Decoder(Demonstration).decode
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            found.append(decode(line))
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}, line {number}: {error}; correct the line or take it out") from None
    return found


def demonstration_row(config: Config, codec: Codec, demonstration: Demonstration) -> Row:
    """The prompt and the segments as tokens; only the model's segments are learned."""
    data = config.data
    prompt = codec.prompt(build_prompt(demonstration.question, data.instruction, data.system, data.chat_template))
    response: list[int] = []
    mask: list[int] = []
    for segment in demonstration.segments:
        ids = codec.encode(segment.text)
        response += ids
        mask += [int(segment.kind == "model")] * len(ids)
    room = config.model.max_context - len(prompt)
    return Row(token_ids=prompt + response[:room], prompt_length=len(prompt), loss_mask=mask[:room])


def batches(rows: list[Row], batch_size: int, epochs: int, seed: int) -> list[list[Row]]:
    """All batches of the warm start, in order; every epoch is a shuffle of its own, short remainders are left out."""
    found: list[list[Row]] = []
    for epoch in range(epochs):
        order = random.Random(f"{seed}/warm/{epoch}").sample(rows, len(rows))
        full = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        found += [batch for batch in full if len(batch) == batch_size or len(rows) < batch_size]
    return found

"""A small cross-encoder for the quality table of `benchmarks.retriever`, where no published one can be fetched.

    python -m benchmarks.train_reranker --corpus C.jsonl --questions TRAIN.jsonl --out FOLDER [--count 3000]

Starts from the encoder (MiniLM) and learns, for each training question, to tell its gold passage from passages that the hybrid
backend ranks high (softmax over one positive and `NEGATIVES` hard negatives). The questions must not be those it is measured on.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.retriever import ask_all, minilm, prepared, read_questions
from benchmarks.retriever_servers import ours

NEGATIVES, DEPTH, BATCH, MAX_TOKENS, RATE = 2, 20, 8, 192, 5e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("var/bench"))
    parser.add_argument("--encoder", type=Path, default=minilm())
    parser.add_argument("--count", type=int, default=3000, help="training questions")
    parser.set_defaults(runtime="onnx")
    arguments = parser.parse_args()
    train(arguments, examples(arguments))


def examples(arguments: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """(question, [gold passage, hard negatives...]) for each question whose gold is not all that was found."""
    questions = read_questions(arguments.questions)[: arguments.count]
    with arguments.corpus.open() as file:
        contents = {row["id"]: row["contents"] for row in map(json.loads, file)}
    with ours(prepared(arguments, backends=["hybrid"]), arguments.folder / "ours.log") as forage:
        found = ask_all(forage, questions, DEPTH)
    chance, made = random.Random(0), []
    for row, ids in zip(questions, found, strict=True):
        wrong = [i for i in ids if i != row["gold_passage_id"]]
        chosen = [row["gold_passage_id"], *chance.sample(wrong, NEGATIVES)]
        made.append((row["question"], [contents[i] for i in chosen]))
    return made


def train(arguments: argparse.Namespace, data: list[tuple[str, list[str]]]) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.encoder)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.encoder, num_labels=1).train()
    optimizer, steps = torch.optim.AdamW(model.parameters(), lr=RATE), -(-len(data) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / steps))
    started, losses = time.monotonic(), []
    for step in range(1, steps + 1):
        batch = data[(step - 1) * BATCH : step * BATCH]
        queries = [question for question, passages in batch for _ in passages]
        texts = [text for _, passages in batch for text in passages]
        tokens = tokenizer(queries, texts, padding=True, truncation="only_second", max_length=MAX_TOKENS, return_tensors="pt")
        logits = model(**tokens).logits.view(len(batch), 1 + NEGATIVES)
        loss = torch.nn.functional.cross_entropy(logits, torch.zeros(len(batch), dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps:
            recent = sum(losses[-20:]) / len(losses[-20:])
            print(f"step {step}/{steps}  loss {recent:.3f}  {time.monotonic() - started:.0f} s", flush=True)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"saved {arguments.out}")


if __name__ == "__main__":
    main()

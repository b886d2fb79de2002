"""A real Llama of two layers that has learned two episodes by heart: one search and the answer, and one with odd tokens.

It is made and trained on the spot, with a byte-pair tokenizer of its own, so that real SGLang plays real episodes in tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from services.contract import transcript

QUESTION = "What is the capital of France?"
QUERY, ANSWER = "capital of France", "Paris"
PASSAGES = ['"France"\nThe capital is Paris.', '"Paris"\nA city in France.']
TURNS = [f"<search>{QUERY}</search>", f"<answer>{ANSWER}</answer>"]
RUNS_ON = "What is the capital of Spain?"
"""After this question the model closes its search in the middle of a token: "></" ends the tag and begins another."""
RUN_ON_TEXT = "<search>capital of Spain</search></search>"
SPECIAL = ["<|pad|>", "<|start|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
VOCABULARY = 320
STEPS = 300


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([QUESTION, RUNS_ON, *TURNS, RUN_ON_TEXT, transcript.observation(PASSAGES)] * 5, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    wrapped.chat_template = TEMPLATE
    return wrapped


def make_model(folder: Path) -> Path:
    """Write model and tokenizer to `folder`; takes a few seconds."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    end: Any = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=end,
        bos_token_id=end,
    )
    model: Any = LlamaForCausalLM(config)
    _train(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _train(model: Any, tokenizer: Any) -> None:
    """The episodes, over and over; only what the model writes counts in the loss."""
    known = [(TURNS[0], True), (transcript.observation(PASSAGES), False), (TURNS[1], True)]
    rows = [_row(tokenizer, QUESTION, known), _row(tokenizer, RUNS_ON, [(RUN_ON_TEXT, True)])]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        inputs, targets = rows[step % len(rows)]
        optimizer.zero_grad()
        model(input_ids=inputs, labels=targets).loss.backward()
        optimizer.step()


def _row(tokenizer: Any, question: str, pieces: list[tuple[str, bool]]) -> tuple[torch.Tensor, torch.Tensor]:
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True)
    ids, labels = list(prompt["input_ids"]), [-100] * len(prompt["input_ids"])
    for text, learned in pieces:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids, labels = ids + piece, labels + (piece if learned else [-100] * len(piece))
    return torch.tensor([ids]), torch.tensor([labels])


def make_variant(source: Path, folder: Path, scale: float) -> None:
    """Write a model with other weights, and so other log-probs, into `folder`."""
    model: Any = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((source / name).read_bytes())
    assert json.loads((folder / "config.json").read_text())["vocab_size"]


def reference_logprobs(model: Path, prompt: list[int], response: list[int], temperature: float) -> list[float]:
    """What transformers gives the same tokens at this temperature."""
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(model)(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(response)[:, None])[:, 0].tolist()

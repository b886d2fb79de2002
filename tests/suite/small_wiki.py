"""The repositories that configs/qwen2.5-3b.toml names, in miniature: laid out and named as the real ones, with other content.

| repository                   | real                                 | here                                                 |
|------------------------------|--------------------------------------|------------------------------------------------------|
| PeterJinGo/wiki-18-corpus    | 21 M passages in a tar.gz            | 60 passages in a tar.gz                              |
| PeterJinGo/wiki-18-e5-index  | Flat index by e5-base-v2, two parts  | Flat index by the encoder below, two parts           |
| PeterJinGo/nq_hotpotqa_train | parquet: two sources, seven sources  | the same columns and sources, a few rows each        |
| intfloat/e5-base-v2          | BERT of 12 layers, other formats too | BERT of 2 random layers, other formats too           |
| Qwen/Qwen2.5-3B              | Qwen2 in two shards                  | Qwen2 of 2 layers in two shards, which was taught to |
|                              |                                      | search once, then to answer "blue" or "red"          |
"""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import faiss
import pyarrow
import pyarrow.parquet
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from services.contract import transcript
from services.prepare.catalogue import CATALOGUE
from tests.prepare.hub_server import HubServer

TRAIN_SOURCES = ("nq", "hotpotqa")
TEST_SOURCES = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
PASSAGES = [{"id": str(n), "contents": f'"Town {n}"\nTown {n} lies on river {n * 7 % 60} and has a blue gate.'} for n in range(60)]
SEARCH, ANSWERS = "<search>gate of town 7</search>", ("<answer>blue</answer>", "<answer>red</answer>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY, LESSONS = 600, 240


def fill(hub: HubServer, folder: Path) -> None:
    """Give the hub all five repositories; models are made in `folder`, in some seconds."""
    encoder, policy = make_encoder(folder / "encoder"), make_policy(folder / "policy")
    index = flat_index(folder / "encoder")
    _add(hub, "wiki-18", {"wiki-18.jsonl.gz": tar_gz("".join(json.dumps(row) + "\n" for row in PASSAGES))})
    _add(hub, "wiki-18-e5", {"part_aa": index[:4000], "part_ab": index[4000:]})
    _add(
        hub, "nq-hotpotqa", {"train.parquet": parquet("train", TRAIN_SOURCES, 8), "test.parquet": parquet("test", TEST_SOURCES, 3)}
    )
    _add(hub, "e5-base-v2", encoder | {"pytorch_model.bin": b"not to be downloaded", "onnx/model.onnx": b"nor this"})
    _add(hub, "qwen2.5-3b", policy)


def _add(hub: HubServer, name: str, files: dict[str, bytes]) -> None:
    """At the revision that the catalogue pins, and `main`."""
    entry = CATALOGUE[name]
    place = entry.repo if entry.repo_type == "model" else f"datasets/{entry.repo}"
    hub.add(place, files | {"README.md": b"# about", ".gitattributes": b""}, commit=entry.revision)


def tar_gz(text: str) -> bytes:
    """One file in folders, as wiki-18 is published."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        member = tarfile.TarInfo("data00/jiajie_jin/flashrag_indexes/wiki_dpr_100w/wiki_dump.jsonl")
        member.size = len(text.encode())
        archive.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


def parquet(split: str, sources: tuple[str, ...], rows: int) -> bytes:
    """Search-R1's columns; `rows` of each source, one source after the other."""
    table = [_row(split, n, source) for n, source in enumerate(source for source in sources for _ in range(rows))]
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), out)
    return out.getvalue()


def _row(split: str, number: int, source: str) -> dict[str, Any]:
    question = f"what colour is the gate of town {number} in {source}?"
    return {
        "id": f"{split}_{number}",
        "question": question,
        "golden_answers": ["blue"],
        "data_source": source,
        "prompt": prompt(question),
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": ["blue"]}},
        "extra_info": {"index": number, "split": split},
        "metadata": None,
    }


def prompt(question: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"Search with <search> query </search>, then <answer> answer </answer>. Question: {question}\n"}
    ]


def make_encoder(folder: Path) -> dict[str, bytes]:
    words = sorted({word for row in PASSAGES for word in row["contents"].lower().replace('"', " ").replace(".", " ").split()})
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "query", "passage", ":", *words]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()  # type: ignore[assignment]
    raw.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(**sizes, vocab_size=len(names), max_position_embeddings=512, initializer_range=0.3)).save_pretrained(
        folder
    )
    PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=512, **special).save_pretrained(folder)
    return _files(folder)


def flat_index(encoder: Path) -> bytes:
    """Of all passages, as Search-R1's index builder makes it: "passage: " before each, mean over tokens, unit length."""
    tokenizer, model = PreTrainedTokenizerFast.from_pretrained(encoder), BertModel.from_pretrained(encoder).eval()
    index = faiss.IndexFlatIP(model.config.hidden_size)
    with torch.no_grad():
        for row in PASSAGES:
            ids = torch.tensor([tokenizer("passage: " + row["contents"])["input_ids"]])
            vector = model(input_ids=ids).last_hidden_state.mean(1)
            index.add(torch.nn.functional.normalize(vector, dim=-1).numpy())
    return faiss.serialize_index(index).tobytes()


def make_policy(folder: Path) -> dict[str, bytes]:
    torch.manual_seed(0)
    tokenizer = _chat_tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 1024, "vocab_size": len(tokenizer), "tie_word_embeddings": True}
    end: Any = tokenizer.eos_token_id
    config = Qwen2Config(**sizes, bos_token_id=end, eos_token_id=end)
    model: Any = Qwen2ForCausalLM(config)
    _teach(model, tokenizer)
    model.save_pretrained(folder, max_shard_size="300KB")
    tokenizer.save_pretrained(folder)
    return _files(folder)


def _chat_tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()  # type: ignore[assignment]
    texts = [text for text, _ in _lesson(random.Random(0))] + [row["contents"] for row in PASSAGES]
    special, alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(texts * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=special[0], pad_token=special[0])
    tokenizer.chat_template = CHATML
    return tokenizer


def _lesson(draw: random.Random) -> list[tuple[str, bool]]:
    """One episode in pieces, and whether each is the policy's own."""
    row = _row("train", draw.randrange(30), draw.choice(TEST_SOURCES))
    asked = f"<|im_start|>user\n{row['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    shown = transcript.observation([passage["contents"] for passage in draw.sample(PASSAGES, 3)])
    return [(asked, False), (SEARCH, True), (shown, False), (draw.choice(ANSWERS), True)]


def _teach(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Only what the policy writes counts in the loss."""
    draw, optimizer = random.Random(1), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(LESSONS):
        ids, labels = [], []
        for text, own in _lesson(draw):
            piece = tokenizer.encode(text, add_special_tokens=False)
            ids, labels = ids + piece, labels + (piece if own else [-100] * len(piece))
        optimizer.zero_grad()
        model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
        optimizer.step()


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}

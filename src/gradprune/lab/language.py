"""A language model of our own that is small enough to travel with the book, its text, and its quality (chapter 7)."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradprune.core import files
from gradprune.lab.setup import repository

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LENGTH = 128  # tokens that the model sees at once
VOCABULARY = 2048
END = 0  # the token that stands before each document
TEXT = files.Kind("gradprune.text", "stored text", "a text stored as tokens")


def untrained() -> nn.Module:
    """Return a Llama of 1.9 million weights with random ones: four blocks, 192 wide, the head tied to the embedding.

    Raises ImportError where transformers is not installed.
    """
    logging.disable(logging.WARNING)  # what it imports tells of parts that it would have on other machines
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ImportError("the language model is one of transformers: pip install transformers") from error
    finally:
        logging.disable(logging.NOTSET)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 192,
        "intermediate_size": 416,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": True,
        "bos_token_id": END,
        "eos_token_id": END,
        "use_cache": False,
        "attn_implementation": "eager",
    }
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**settings))
    return model


def model() -> nn.Module:
    """Return the trained model in eval mode: stored in bfloat16, read into float32.

    Raises FileNotFoundError with the command that makes the file.
    """
    from gradprune.lab import experiment

    return experiment.network("language_model", untrained())


def text(part: str) -> Tensor:
    """Return the stored tokens of "test", or of "train" the first that belong to Python's own documentation.

    Raises FileNotFoundError with the command that makes the file, KeyError for another part.
    """
    return _stored()[part].long()


def tokenizer() -> Tokenizer:
    """Return what cuts text into the model's tokens, pieces of bytes that occur often, and joins them again."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(_path("language_model.tokenizer")))


def bytes_of(tokens: Tensor) -> int:
    """Return how many bytes of text tokens stand for; one that stands before a document is none."""
    return int(_stored()["bytes"].long()[tokens].sum())


def windows(tokens: Tensor) -> Tensor:
    """Return the stream of tokens cut into rows of LENGTH + 1, each begun by the last token of the one before."""
    count = (len(tokens) - 1) // LENGTH
    return tokens[: count * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)


@torch.no_grad()
def bits(model: nn.Module, tokens: Tensor, *, batch: int = 32) -> float:
    """Return the bits a model needs for a stream of tokens, each told from those before it in its window."""
    nats = 0.0
    for rows in windows(tokens).split(batch):
        logits = model(input_ids=rows[:, :-1]).logits
        nats += float(functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum"))
    return nats / math.log(2)


def bits_per_byte(model: nn.Module, tokens: Tensor) -> float:
    """Return the bits a model needs for each byte of the text that tokens stand for: less is better.

    Of tokens one would count pieces of a text that a tokenizer chose; of bytes, models with other tokens and
    compressors can be compared.
    """
    rows = windows(tokens)
    return bits(model, tokens) / bytes_of(rows[:, 1:])


def calibration(tokens: int, *, seed: int, of: Tensor | None = None, batch: int = 16) -> list[dict[str, Any]]:
    """Return `tokens` tokens of training text as batches for `gp.reconstruct_`: windows drawn at random places."""
    stream = text("train") if of is None else of
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - LENGTH, (tokens // LENGTH,), generator=generator)
    rows = torch.stack([stream[start : start + LENGTH] for start in starts.tolist()])
    return [{"input_ids": part} for part in rows.split(batch)]


def _stored() -> dict[str, Tensor]:
    return files.read(_path("language_model_text.safetensors"), TEXT)[1]


def _path(name: str) -> Any:
    path = repository() / "chapters" / "results" / name
    if not path.exists():
        raise FileNotFoundError(f"no {name}; `python chapters/experiments/language_model.py` makes it")
    return path

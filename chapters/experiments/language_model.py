"""A language model of our own: a Llama of 1.9 million weights that has read what Python says of itself.

`python chapters/experiments/language_model.py` writes language_model.safetensors (weights in bfloat16),
language_model.tokenizer, language_model_text.safetensors (tokens of the test text and of some training text) and
language_model.json (how good it is) to chapters/results; a run that was stopped goes on where it was. The text is
`language_text`'s. On one core with bfloat16 arithmetic it takes about half an hour.

Tokens are 2,048 pieces of bytes, chosen by pairs on the training text. STEPS steps of AdamW, each on 16 windows of 128
tokens from random places of the training text; the rate rises for WARM_UP steps to RATE, then falls on half a cosine to
a tenth; gradients are clipped to norm 1. Matrix products in bfloat16 (autocast), everything else in float32.

Quality is in bits per byte of the test text. Beside it: an interpolated n-gram model over the same tokens (Witten and
Bell's weights), its order chosen on validation text; xz and zstd, which may look at the training text first, and which
are given the test text then: the growth of the compressed file counts.
"""

from __future__ import annotations

import argparse
import lzma
import math
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import language_text
import torch
from torch import Tensor
from torch.nn import functional

from gradprune import lab
from gradprune.core import files
from gradprune.lab import language

STEPS, WARM_UP, BATCH, RATE, DECAY = 4500, 300, 16, 3e-3, 0.1
SAVE_EVERY = 250
STORED = 262_144  # tokens of training text that are stored
ORDERS = [1, 2, 3, 4, 5]
RESULTS = Path(__file__).resolve().parents[1] / "results"
WORK = lab.data.cache_folder() / "language_model"
PREFIX = 4_000_000  # bytes of training text that zstd and xz see first


def tokenizer() -> Any:
    """Return the byte-pair tokenizer, trained on the training text where it is not stored yet."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    path = RESULTS / "language_model.tokenizer"
    if not path.exists():
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=language.VOCABULARY,
            special_tokens=["<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator((text for _, text in language_text.parts()["train"]), trainer)
        made.save(str(path))
    return Tokenizer.from_file(str(path))


def tokens() -> dict[str, Tensor]:
    """Return each part as a stream of tokens; "python" is the training text that is Python's own documentation."""
    path = WORK / "tokens.pt"
    if not path.exists():
        cut = tokenizer()
        parts = dict(language_text.parts())
        parts["python"] = [pair for pair in parts["train"] if pair[0].startswith("python/")]
        made = {}
        for part, every in parts.items():
            ids = cut.encode_batch([text for _, text in every], add_special_tokens=False)
            made[part] = torch.tensor([i for one in ids for i in (language.END, *one.ids)], dtype=torch.int16)
        WORK.mkdir(parents=True, exist_ok=True)
        torch.save(made, path)
    loaded: dict[str, Tensor] = torch.load(path)
    return loaded


def store_text() -> None:
    """Write the tokens that the pages need, and how many bytes each token stands for."""
    cut = tokenizer()
    sizes = [len(cut.id_to_token(i)) for i in range(language.VOCABULARY)]  # each letter of a piece stands for a byte
    sizes[language.END] = 0
    streams = tokens()
    tensors = {"test": streams["test"], "train": streams["python"][:STORED].clone()}
    tensors["bytes"] = torch.tensor(sizes, dtype=torch.uint8)
    licence = "documentation of Python 3.11.7, copyright Python Software Foundation, under the PSF licence agreement"
    told = {"source": licence, "manifest": language_text.manifest()}
    files.write(RESULTS / "language_model_text.safetensors", language.TEXT, told, tensors)


def rate(step: int) -> float:
    """Return the share of the peak rate: warm-up, then half a cosine to a tenth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARM_UP) / (STEPS - WARM_UP)))


def batch(stream: Tensor, step: int) -> Tensor:
    """Return the windows of a step."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(stream) - language.LENGTH - 1, (BATCH,), generator=generator)
    return torch.stack([stream[start : start + language.LENGTH + 1] for start in starts.tolist()]).long()


def train() -> tuple[torch.nn.Module, list[dict[str, float]]]:
    """Train, or go on where it stopped; return the model and the validation losses on the way."""
    torch.manual_seed(0)
    model = language.untrained()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)
    streams = tokens()
    validation = streams["validation"][:16_385].long()
    path, first, seconds, curve = WORK / "training.pt", 0, 0.0, []
    if path.exists():
        saved = torch.load(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds, curve = saved["step"], saved["seconds"], saved["curve"]
    began = time.perf_counter() - seconds
    model.train()
    for step in range(first, STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate(step)
        rows = batch(streams["train"], step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=rows[:, :-1]).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == STEPS:
            seconds = time.perf_counter() - began
            at = {"step": step + 1, "train_nats": round(loss.item(), 3), "seconds": round(seconds)}
            curve.append(at | {"validation": round(language.bits_per_byte(model.eval(), validation), 4)})
            model.train()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state | {"seconds": seconds, "curve": curve}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
            print(curve[-1], flush=True)
    return model.eval(), curve


def store(model: torch.nn.Module) -> None:
    """Write the weights in bfloat16; the tied head is left out."""
    lab.experiment.store_network(RESULTS / "language_model.safetensors", model.to(torch.bfloat16))


class Interpolated:
    """An n-gram model: the shares of what followed the last n - 1 tokens, mixed with those of one token less."""

    def __init__(self, stream: list[int], order: int) -> None:
        self._followed: list[dict[tuple[int, ...], Counter[int]]] = [defaultdict(Counter) for _ in range(order)]
        for n, table in enumerate(self._followed):
            for at in range(n, len(stream)):
                table[tuple(stream[at - n : at])][stream[at]] += 1

    def bits(self, stream: list[int], order: int) -> float:
        """Return the bits of all tokens but the first, with the tables up to `order`."""
        total = 0.0
        for at in range(1, len(stream)):
            share = 1 / language.VOCABULARY
            for n in range(min(order, at + 1)):
                counts = self._followed[n].get(tuple(stream[at - n : at]))
                if counts is not None:
                    seen, kinds = counts.total(), len(counts)
                    share = (counts[stream[at]] + kinds * share) / (seen + kinds)
            total -= math.log2(share)
        return total


def baselines() -> list[dict[str, Any]]:
    """Return the bits per byte of n-gram models and of compressors on the test text."""
    import zstandard

    streams = tokens()
    ngram = Interpolated(streams["train"].tolist(), max(ORDERS))
    validation, test = (streams[part].tolist() for part in ("validation", "test"))
    sizes = {part: language.bytes_of(streams[part].long()[1:]) for part in ("validation", "test")}
    rows: list[dict[str, Any]] = []
    for order in ORDERS:
        row = {"model": f"{order}-gram", "validation": ngram.bits(validation, order) / sizes["validation"]}
        rows.append(row | {"test": ngram.bits(test, order) / sizes["test"]})
    before, text = (_joined(part) for part in ("train", "test"))
    before = before[-PREFIX:]
    grown = len(lzma.compress(before + text, preset=9 | lzma.PRESET_EXTREME))
    grown -= len(lzma.compress(before, preset=9 | lzma.PRESET_EXTREME))
    rows.append({"model": "xz -9e, training text before it", "test": 8 * grown / len(text)})
    rows.append(
        {"model": "xz -9e alone", "test": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)}
    )
    dictionary = zstandard.ZstdCompressionDict(before, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    wide = zstandard.ZstdCompressionParameters.from_level(22, window_log=23)
    packed = zstandard.ZstdCompressor(dict_data=dictionary, compression_params=wide).compress(text)
    rows.append({"model": "zstd -22, training text as dictionary", "test": 8 * len(packed) / len(text)})
    rows.append(
        {"model": "zstd -22 alone", "test": 8 * len(zstandard.ZstdCompressor(level=22).compress(text)) / len(text)}
    )
    return rows


def _joined(part: str) -> bytes:
    every = language_text.parts()[part]
    if part == "train":  # Python's own documentation comes last, nearest to the test text
        every = sorted(every, key=lambda pair: (pair[0].startswith("python/"), pair[0]))
    return "\n\n".join(text for _, text in every).encode()


def run(path: Path) -> None:
    """Train, store and measure."""
    store_text()
    model, curve = train()
    store(model)
    test = language.text("test")
    stored = language.model()
    rows = [{"model": "Llama, 1.9 million weights", "test": language.bits_per_byte(stored, test)}, *baselines()]
    about = "bits per byte of the test text, and on the way of training"
    told = {"about": about, "text": language_text.manifest(), "tokens": {k: len(v) for k, v in tokens().items()}}
    told |= {"parameters": sum(p.numel() for p in stored.parameters()), "training": curve}
    lab.experiment.save(path, lab.experiment.provenance([0]) | told | {"rows": rows})


if __name__ == "__main__":
    lab.start(seed=0)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "language_model.json")
    run(parser.parse_args().out)

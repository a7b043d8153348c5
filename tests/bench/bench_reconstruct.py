"""Does reconstruct_ cost what its formulas cost? Beside a direct implementation, each run in a fresh process.

The direct side is the published algorithm written out for a chain of blocks, with torch's Cholesky: the inputs of a
block are kept for every batch; layer by layer X'X is summed, a group of columns at a time is chosen and what it loses
passed on (SparseGPT, here one pass), or each row's normal equations are solved (masks given). Both sides prune the same
layers in the same order, from inputs that the pruned ones before give, in float64; of masks that are chosen the direct
side works in float32, as published. The network is transformers' Llama with random weights.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys

import numpy as np
import torch
from record import _SETTINGS, CLOCKS, PeakMemory, parser, settle, write

import gradprune as gp

os.environ["HF_HUB_OFFLINE"] = "1"  # the model is made from a configuration; nothing is downloaded
VOCABULARY, TOGETHER, DAMP, SPARSITY = 256, 128, 0.01, 0.5


def network(width, blocks):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": blocks}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads)).eval()


def batches(number, length):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(VOCABULARY, (4, length), generator=generator)} for _ in range(number)]


class Stop(Exception):
    pass


@torch.no_grad()
def direct(model, inputs, prune_layer, dtype):
    """The layers of each block in turn, on inputs that the pruned ones before give."""
    model.config.use_cache = False
    kept = []

    def keep(_, args, kwargs):
        kept.append((args, kwargs))
        raise Stop

    handle = model.model.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    for batch in inputs:
        with contextlib.suppress(Stop):
            model(**batch)
    handle.remove()
    for block in model.model.layers:
        together = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
        for names in together:
            layers = [m for n, m in block.named_modules() if n.split(".")[-1] in names]
            sums = [torch.zeros(layer.in_features, layer.in_features, dtype=dtype) for layer in layers]

            def add(layer, args, layers=layers, sums=sums):
                x = args[0].reshape(-1, args[0].shape[-1]).to(dtype)
                sums[layers.index(layer)].addmm_(x.T, x)

            handles = [layer.register_forward_pre_hook(add) for layer in layers]
            for args, kwargs in kept:
                block(*args, **kwargs)
            for handle in handles:
                handle.remove()
            for layer, h in zip(layers, sums, strict=True):
                h.diagonal().add_(DAMP * h.diagonal().mean())
                layer.weight.copy_(prune_layer(layer.weight.to(dtype), h))
        kept = [((block(*args, **kwargs), *args[1:]), kwargs) for args, kwargs in kept]


def sparsegpt(weight, h):
    """Algorithm 1 of Frantar and Alistarh (2023), as its authors' code has it."""
    weight = weight.clone()
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for start in range(0, weight.shape[1], TOGETHER):
        stop = min(start + TOGETHER, weight.shape[1])
        block, own = weight[:, start:stop].clone(), inverse[start:stop, start:stop]
        kept, errors = torch.zeros_like(block), torch.zeros_like(block)
        costs = block**2 / own.diagonal() ** 2
        mask = costs <= costs.flatten().sort().values[int(costs.numel() * SPARSITY) - 1]
        for i in range(stop - start):
            kept[:, i] = block[:, i].masked_fill(mask[:, i], 0)
            errors[:, i] = (block[:, i] - kept[:, i]) / own[i, i]
            block[:, i:] -= errors[:, i : i + 1] @ own[i : i + 1, i:]
        weight[:, start:stop] = kept
        weight[:, stop:] -= errors @ inverse[start:stop, stop:]
    return weight


def row_by_row(weight, h):
    """The least squares for the larger half of each row."""
    found = torch.zeros_like(weight)
    for row, w in enumerate(weight):
        stays = w.abs().topk(len(w) - round(SPARSITY * len(w))).indices.sort().values
        factor = torch.linalg.cholesky(h[stays][:, stays])
        found[row, stays] = torch.cholesky_solve((h[stays] @ w).unsqueeze(1), factor).squeeze(1)
    return found


SIDES = {
    ("chosen", "gradprune"): lambda m, x: gp.reconstruct_(m, x, sparsity=SPARSITY, damp=DAMP, solve="one pass"),
    ("chosen", "direct"): lambda m, x: direct(m, x, sparsegpt, torch.float32),
    ("given", "gradprune"): lambda m, x: gp.reconstruct_(
        m, x, sparsity=SPARSITY, score=gp.magnitude, scope="row", damp=DAMP
    ),
    ("given", "direct"): lambda m, x: direct(m, x, row_by_row, torch.float64),
}


def one(masks, side, arguments):
    """Seconds, the most memory beyond what model and inputs took, and how far the answers came to lie from before."""
    model, inputs = network(arguments.width, arguments.blocks), batches(arguments.batches, arguments.length)
    with torch.no_grad():
        before = model(**inputs[0]).logits
    clock = CLOCKS[_SETTINGS["clock"]]
    with PeakMemory() as memory:
        start = clock()
        SIDES[masks, side](model, inputs)
        seconds = clock() - start
    with torch.no_grad():
        change = float((model(**inputs[0]).logits - before).norm() / before.norm())
    weights = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    zeros = sum(int((p == 0).sum()) for n, p in model.named_parameters() if "proj" in n)
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "extra": memory.extra, "peak": whole, "change": change, "weights": weights,
            "sparsity": zeros / weights}  # fmt: skip


def in_a_fresh_process(masks, side, arguments):
    command = [sys.executable, __file__, "--one", masks, side, "--threads", str(arguments.threads)]
    for name in ("width", "blocks", "batches", "length", "clock"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(masks, arguments):
    runs = {"gradprune": [], "direct": []}
    for _ in range(arguments.rounds):
        for side, found in runs.items():
            found.append(in_a_fresh_process(masks, side, arguments))
    ours, theirs = runs.values()
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(ours, theirs, strict=True)]
    found = {"masks": masks, "width": arguments.width, "blocks": arguments.blocks, "weights": ours[0]["weights"],
             "tokens": 4 * arguments.batches * arguments.length, "time over direct": float(np.median(ratios)),
             "least": min(ratios), "most": max(ratios)}  # fmt: skip
    for side, several in runs.items():
        found |= {f"seconds {side}": float(np.median([run["seconds"] for run in several]))}
        found |= {f"extra MB {side}": round(float(np.median([run["extra"] for run in several])) / 1e6)}
        found |= {f"change of the answers {side}": several[0]["change"]}
    return found | {"runs": arguments.rounds}


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--blocks", type=int, default=2)
    options.add_argument("--batches", type=int, default=8)
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--one", nargs=2, help="for the processes that this one starts")
    arguments = options.parse_args()
    settle(arguments)
    if arguments.one:
        print(json.dumps(one(*arguments.one, arguments)))
    else:
        write("bench_reconstruct", [row(masks, arguments) for masks in ("chosen", "given")], seeds=[0])

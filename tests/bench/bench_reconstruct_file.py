"""What memory does reconstruct_file take, and how long, beside loading the model, reconstruct_ and saving it?

The model is transformers' Llama with random weights, in shards; its embedding and its head, which are tied, stay as
they are. Each run is a fresh process, and its memory what it had at most beyond what it had before the call; the files
are in the system's cache for both sides. What is written is counted by the system where it counts that.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from bench_reconstruct import SPARSITY, VOCABULARY, batches
from record import _SETTINGS, CLOCKS, PeakMemory, parser, ratios, settle, write
from safetensors.torch import load_file, save_file

import gradprune as gp

SIDES = ["from its files", "in memory"]


def llama(width, blocks):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": blocks}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads)).eval()


def size(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def bytes_written():
    """What this process has written to files so far."""
    counted = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counted["wchar"])


def one(side, folder, arguments):
    """Seconds, bytes written and the most memory beyond before, for one side."""
    make = lambda: llama(arguments.width, arguments.blocks)  # noqa: E731
    inputs = batches(arguments.batches, arguments.length)
    how = {"sparsity": SPARSITY, "solve": arguments.solve}
    gp.reconstruct_(llama(64, 2), inputs[:1], **how)  # what the first call loads is not counted
    before, clock = bytes_written(), CLOCKS[arguments.clock]
    with PeakMemory() as memory:
        start = clock()
        if side == "from its files":
            gp.reconstruct_file(make, folder / "in", folder / "out", inputs, **how)
        else:
            model = make()
            tensors = {n: t for path in (folder / "in").glob("*.safetensors") for n, t in load_file(path).items()}
            model.load_state_dict(tensors, strict=False)
            del tensors
            gp.reconstruct_(model, inputs, **how)
            save_file({n: t for n, t in model.state_dict().items() if "lm_head" not in n}, folder / "model")
        seconds = clock() - start
    return {"seconds": seconds, "extra": memory.extra, "written": bytes_written() - before}


def in_a_fresh_process(side, solve, folder, arguments):
    command = [sys.executable, "-W", "ignore", __file__, "--one", side, str(folder), "--solve", solve]
    for name in ("threads", "width", "blocks", "batches", "length", "clock"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"TQDM_DISABLE": "1"})
    for path in (folder / "out").glob("*"):
        path.unlink()
    return json.loads(done.stdout.splitlines()[-1])


def rows(solve, folder, arguments):
    runs = {side: [] for side in SIDES}
    for _ in range(arguments.rounds):
        for side, found in runs.items():
            found.append(in_a_fresh_process(side, solve, folder, arguments))
    model = size(folder / "in")
    for side, found in runs.items():
        seconds, theirs = ([run["seconds"] for run in some] for some in (found, runs["in memory"]))
        yield {
            "solve": solve,
            "side": side,
            "width": arguments.width,
            "blocks": arguments.blocks,
            "tokens": 4 * arguments.batches * arguments.length,
            "MB of the model": round(model / 1e6),
            "extra MB": round(max(run["extra"] for run in found) / 1e6),
            "memory over the model": max(run["extra"] for run in found) / model,
            "written over the model": max(run["written"] for run in found) / model,
            "median_s": float(np.median(seconds)),
            "time over in memory": ratios(seconds, theirs),
            "runs": len(found),
        }


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--blocks", type=int, default=64)
    options.add_argument("--batches", type=int, default=2)
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--solve", nargs="+", default=["one pass"])
    options.add_argument("--one", nargs=2, help="for the processes that this one starts")
    arguments = options.parse_args()
    settle(arguments)
    if arguments.one:
        arguments.solve, arguments.clock = arguments.solve[0], _SETTINGS["clock"]
        print(json.dumps(one(arguments.one[0], Path(arguments.one[1]), arguments)))
    else:
        with tempfile.TemporaryDirectory() as name:
            torch.manual_seed(0)
            llama(arguments.width, arguments.blocks).save_pretrained(Path(name) / "in", max_shard_size="200MB")
            found = [row for solve in arguments.solve for row in rows(solve, Path(name), arguments)]
        write("bench_reconstruct_file", found, seeds=[0])

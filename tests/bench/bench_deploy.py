"""What do compress, quantize, export, share_weights and pack's codes cost and bring? (All sides in one run.)

.venv/bin/python tests/bench/bench_deploy.py
"""

import copy
import os
import tempfile
import time

import torch
from record import in_turn, parser, ratios, settle, timed, write
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

import gradprune as gp
from gradprune.lab import models

THEIRS = {"int8": Int8WeightOnlyConfig, "int8_dynamic": Int8DynamicActivationInt8WeightConfig}


def layers(width):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).eval()


@torch.no_grad()
def run(model, x, times):
    for _ in range(times):
        model(x)


def sides_of(sides, x, arguments):
    for model in sides.values():
        run(model, x, 3)
    return in_turn({name: lambda m=m: run(m, x, arguments.times) for name, m in sides.items()}, arguments.rounds)


def compressed(width, sparsity, batch, arguments):
    """Dense against what gp.compress returns, and each layer's CSR as it was measured."""
    model, x = layers(width), torch.randn(batch, width)
    gp.prune(model, sparsity=sparsity, scope="layer")
    fast = gp.compress(model, x)
    took = sides_of({"dense": model, "compressed": fast}, x, arguments)
    return {
        "what": "compress",
        "width": width,
        "zeros": sparsity,
        "batch": batch,
        "stored": fast.compressed.whole.stored,
        "times as fast": ratios(took["dense"], took["compressed"]),
        "largest difference": fast.compressed.difference,
    }


def quantized(width, scheme, batch, arguments):
    """Dense, torchao by itself and gp.quantize."""
    model, x = layers(width), torch.randn(batch, width)
    gp.prune(model, sparsity=0.5, scope="layer")
    theirs = copy.deepcopy(model)
    their_time = timed(lambda: quantize_(theirs, THEIRS[scheme]()))
    our_time = timed(lambda: gp.quantize(model, scheme))
    ours = gp.quantize(model, scheme)
    took = sides_of({"dense": model, "torchao": theirs, "gradprune": ours}, x, arguments)
    with torch.no_grad():
        wanted = model(x)
        errors = [
            float((side(x) - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()) for side in (theirs, ours)
        ]
    return {
        "what": f"quantize, {scheme}",
        "width": width,
        "zeros": 0.5,
        "batch": batch,
        "times as fast": ratios(took["dense"], took["gradprune"]),
        "torchao over gradprune": ratios(took["torchao"], took["gradprune"]),
        "error of torchao": errors[0],
        "error": errors[1],
        "call over torchao's": our_time / their_time,
    }


def exported(width):
    """How long the export with its check takes, by the export alone."""
    torch.manual_seed(0)
    model, x = models.residual(width).eval(), torch.randn(16, 40)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        gp.export(model, x, path)
        start = time.perf_counter()
        done = gp.export(model, x, path)
        return {
            "what": "export",
            "width": width,
            "seconds": time.perf_counter() - start,
            "bytes over the weights'": done.bytes / sum(4 * p.numel() for p in model.parameters()),
            "largest difference": done.difference,
        }


def coded(width):
    """Pruned, shared, quantized and coded: bytes on disk, as shares of the dense file's."""
    model = layers(width)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "file")

        def size(network, code):
            return gp.pack(network, path, code=code).bytes_after

        def saved(network, code):
            gp.save(network, path + ".saved")
            return gp.pack(path + ".saved", path, code=code).bytes_after

        dense = sum(4 * p.numel() for p in model.parameters())
        gp.prune(model, sparsity=0.9, scope="layer")
        start = time.perf_counter()
        shared = gp.share_weights(model, 16)
        seconds = time.perf_counter() - start
        return {
            "what": "bytes",
            "width": width,
            "zeros": 0.9,
            "pruned": size(model, "bits") / dense,
            "pruned, coded": size(model, "entropy") / dense,
            "shared": size(shared, "book") / dense,
            "shared, coded": size(shared, "entropy") / dense,
            "quantized": saved(gp.quantize(model), "bits") / dense,
            "quantized, coded": saved(gp.quantize(model), "entropy") / dense,
            "seconds to share": seconds,
        }


if __name__ == "__main__":
    options = parser(__doc__)
    options.set_defaults(threads=1)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--times", type=int, default=5, help="forward passes a run")
    arguments = options.parse_args()
    settle(arguments)
    found = [
        compressed(width, sparsity, batch, arguments)
        for width in (256, 2048)
        for sparsity in (0.5, 0.8, 0.95)
        for batch in (1, 64)
    ]
    found += [quantized(1024, scheme, batch, arguments) for scheme in THEIRS for batch in (1, 256)]
    found += [exported(32), coded(512)]
    write("bench_deploy", found, seeds=[0])

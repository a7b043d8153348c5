"""Chapter 8: the residual network pruned, shrunk, corrected, quantized and exported: what it reads, weighs and takes.

`python chapters/experiments/deploy_residual.py` writes chapters/results/deploy_residual.json; a run that was stopped
goes on where it was. It needs the extras "deploy" and "executorch".

The trained networks of `residual_pruning`, five seeds. "Stage": masked by single weights (WEIGHTS of them gone, shared
as LAMP does), or by coupled channels (GROUPS of the filters' weights, the same share of every group, which leaves a
tenth of the FLOPs; chosen on validation data of seed 0); shrunk; trained on for CORRECTION steps from the whole rate,
with the labels or with the dense network as a teacher; its linear layer in int8; exported, and quantized by ONNX
Runtime with CALIBRATED training examples. Masked networks are read recalibrated. "Scratch": the shrunk architecture
with first weights drawn anew, trained as long as the correction, or as long as the dense training and the correction
together. "File": bytes on disk with weights shared among some values (then recalibrated) or not, by code.
"Exported" are bytes of files for each runtime. "Latency", "runtimes" (ExecuTorch beside these sides), "step",
"surgery" and "memory" are of seed 0: processor time of one thread, all sides in turn, in an order drawn anew each
round, and the peak of a fresh process.
"""

from __future__ import annotations

import copy
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import residual_pruning as base
import torch
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import gradprune as gp
from gradprune import lab

SEEDS = list(range(5))
WEIGHTS, GROUPS = 0.9, 0.7
CORRECTION, ORDER = 400, 1000  # steps, and what is added to the seed for the order of the batches
TEMPERATURE, SOFT = 3.0, 0.9  # of the teacher's classes, and their share of the loss; of chapter 5, not tuned
CALIBRATED = 256
STAGES = [
    "dense",
    "dense, trained on",
    "masked weights",
    "masked weights, corrected",
    "masked groups",
    "shrunk",
    "shrunk, corrected",
    "shrunk, distilled",
    "quantized",
    "exported",
    "exported, int8",
]
LEVELS = [None, 16, 8, 4]
CODES = ["plain", "bits", "book", "entropy"]
ROUNDS = 41

Read = Callable[[Tensor], Tensor]


@cache
def example() -> Tensor:
    """Return a few inputs, by which a network is traced."""
    return base.data(0).train.x[:8]


def correct(model: nn.Module, seed: int, masks: gp.Masks | None = None, steps: int = CORRECTION) -> nn.Module:
    """Train on from the whole rate."""
    base.train(model, seed, steps, 1.0, masks, order=seed + ORDER)
    return model.eval()


def distil(model: nn.Module, seed: int) -> nn.Module:
    """Train on as long, most of the loss being the distance to the dense network's classes."""
    teacher = base.dense(seed).eval()

    def loss(scores: Tensor, labels: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(x)
        soft = gp.distill_loss(scores, wanted, TEMPERATURE)
        return SOFT * soft + (1 - SOFT) * functional.cross_entropy(scores, labels)

    optimizer = torch.optim.AdamW(model.parameters(), lr=base.RATE, weight_decay=base.DECAY)
    shape, data = lab.train.cosine(CORRECTION), base.data(seed)
    order = seed + ORDER
    lab.train.fit(model, data, steps=CORRECTION, optimizer=optimizer, seed=order, watch=False, rate=shape, loss=loss)
    return model.eval()


def by_groups(model: nn.Module) -> nn.Module:
    """Prune coupled channels, in place."""
    gp.prune(model, sparsity=GROUPS, granularity="group", scope="layer", example=example())
    return model


@cache
def stage(seed: int, name: str) -> nn.Module:
    """Return the network of a stage, in eval mode; exported ones are the networks that are exported."""
    model = base.dense(seed).eval()
    if name == "dense, trained on":
        return correct(model, seed)
    if name.startswith("masked weights"):
        masks = gp.prune(model, sparsity=WEIGHTS, scope="lamp")
        if name == "masked weights":
            gp.recalibrate_(model, [base.data(seed).train.x])
            return model.eval()
        return correct(model, seed, masks)
    if name in ("masked groups", "shrunk"):
        by_groups(model)
        model = model if name == "masked groups" else gp.shrink(model, example())
        gp.recalibrate_(model, [base.data(seed).train.x])
        return model.eval()
    if name == "shrunk, corrected":
        return correct(copy.deepcopy(stage(seed, "shrunk")), seed)
    if name == "shrunk, distilled":
        return distil(copy.deepcopy(stage(seed, "shrunk")), seed)
    if name == "quantized":
        return gp.quantize(stage(seed, "shrunk, corrected"))
    return stage(seed, "shrunk, corrected") if name.startswith("exported") else model


def scratch(seed: int, steps: int) -> nn.Module:
    """Return the shrunk architecture trained from first weights of its own."""
    model = copy.deepcopy(stage(seed, "shrunk"))
    torch.manual_seed(seed + 20_000)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return correct(model, seed, steps=steps)


# ------------------------------------------------------------------------------------------------------- other runtimes


class Few(CalibrationDataReader):
    """Training examples, one batch."""

    def __init__(self, x: Tensor, name: str) -> None:
        self.batches = iter([{name: x.numpy()}])

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch, or None."""
        return next(self.batches, None)


def session(path: Path) -> onnxruntime.InferenceSession:
    """Return a session on one thread of the processor."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def in_onnx(model: nn.Module, folder: Path, *, eight_bits: bool = False) -> tuple[Path, Read]:
    """Write a network for ONNX Runtime; return the file and a function that runs it."""
    path = folder / "network.onnx"
    done = gp.export(model, example(), path)
    if eight_bits:
        logging.disable(logging.WARNING)
        x = base.data(0).train.x[:CALIBRATED]
        quantize_static(
            path, folder / "int8.onnx", Few(x, done.inputs[0]), quant_format=QuantFormat.QDQ, per_channel=True
        )
        path = folder / "int8.onnx"
    running = session(path)
    return path, lambda x: torch.from_numpy(running.run(None, {done.inputs[0]: x.numpy()})[0])


def in_executorch(model: nn.Module, x: Tensor, folder: Path) -> Callable[[], object]:
    """Return a function that runs a network on inputs by ExecuTorch, on one thread."""
    done = gp.export(model, x, folder / "network.pte", runtime="executorch")
    portable_lib._unsafe_reset_threadpool(1)
    method = Runtime.get().load_program(done.path).load_method("forward")
    return partial(method.execute, [x])


def accuracies(read: Read, seed: int) -> dict[str, float]:
    """Return the accuracies of anything that gives scores."""
    parts = {name: getattr(base.data(seed), name) for name in ("validation", "test")}
    with torch.no_grad():
        return {
            name: round(float((read(part.x).argmax(1) == part.y).double().mean()), 4) for name, part in parts.items()
        }


def staged(seed: int, name: str) -> dict[str, Any]:
    """Return what a stage reads, counts and weighs."""
    model = stage(seed, name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if name.startswith("exported"):
            path, read = in_onnx(model, folder, eight_bits=name.endswith("int8"))
            return accuracies(read, seed) | {"bytes": path.stat().st_size}
        gp.save(model, folder / "whole")
        found = accuracies(model, seed) | {"bytes": (folder / "whole").stat().st_size}
        if name.startswith("masked"):
            found["bytes packed"] = gp.pack(model, folder / "packed").bytes_after
        if name == "quantized":
            return found
        total = gp.report(model, example()[:1]).total
        counts = {
            "parameters": total.parameters,
            "not zero": total.nonzeros,
            "FLOPs": total.flops,
            "effective FLOPs": total.effective_flops,
        }
        if name == "shrunk":
            masked = stage(seed, "masked groups")
            with torch.no_grad():
                counts["difference"] = float((masked(example()) - model(example())).abs().max())
        return found | counts


def exported() -> dict[str, Any]:
    """Return the bytes of the files for each runtime, of the stored network: dense, and shrunk and recalibrated."""
    dense = lab.experiment.network("residual_network", lab.models.residual())
    small = gp.shrink(by_groups(copy.deepcopy(dense)), example())
    gp.recalibrate_(small, [base.data(0).train.x])
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for side, model in {"dense": dense, "shrunk": small}.items():
            for name, runtime in {"ONNX": "onnx", "ExecuTorch": "executorch"}.items():
                done = gp.export(model.eval(), example(), Path(temporary) / f"{side}.{runtime}", runtime=runtime)
                found[f"{name} {side}"] = done.bytes
    return {"bytes": found}


def filed(seed: int, of: str, levels: int | None, code: str) -> dict[str, Any]:
    """Return the bytes of a file, and what the network in it reads."""
    model = stage(seed, of)
    if levels is not None:
        model = gp.share_weights(model, levels)
        gp.recalibrate_(model, [base.data(seed).train.x])
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "file"
        if code == "plain":
            save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path)
        else:
            gp.pack(model, path, code=code)
        size = path.stat().st_size
    return accuracies(model.eval(), seed) | {"bytes": size}


# ------------------------------------------------------------------------------------------------------------ times


def in_turn(sides: dict[str, Callable[[], object]], rounds: int, least: float = 0.004) -> dict[str, list[float]]:
    """Return seconds of processor time a call, each side `rounds` times, in an order drawn each time."""
    often = {}
    for name, run in sides.items():
        for _ in range(3):
            run()
        start = time.process_time()
        for _ in range(5):
            run()
        often[name] = max(1, int(least / max((time.process_time() - start) / 5, 1e-7)))
    found: dict[str, list[float]] = {name: [] for name in sides}
    shuffled = random.Random(0)
    for _ in range(rounds):
        for name in shuffled.sample(list(sides), len(sides)):
            run = sides[name]
            run()  # its memory is warm
            start = time.process_time()
            for _ in range(often[name]):
                run()
            found[name].append((time.process_time() - start) / often[name])
    return found


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": round(middle, digits), "low": round(low, digits), "high": round(high, digits)}


def told(seconds: dict[str, list[float]], against: str = "dense") -> dict[str, Any]:
    """Return milliseconds of each side, and its time as a share of one side's, round by round."""
    return {
        name: {
            "ms": spread([1000 * t for t in times], 5),
            "share": spread([t / d for t, d in zip(times, seconds[against], strict=True)]),
        }
        for name, times in seconds.items()
    }


@cache
def shapes(width: int) -> dict[str, nn.Module]:
    """Return the networks that are timed: seed 0's at width 32, untrained ones else."""
    if width == 32:
        names = {"dense": "dense", "masked weights": "masked weights", "shrunk": "shrunk, corrected"}
        models = {side: copy.deepcopy(stage(0, of)) for side, of in names.items()}
    else:
        torch.manual_seed(0)
        dense = lab.models.residual(width).eval()
        masked, small = copy.deepcopy(dense), by_groups(copy.deepcopy(dense))
        gp.prune(masked, sparsity=WEIGHTS, scope="lamp")
        models = {"dense": dense, "masked weights": masked, "shrunk": gp.shrink(small, example()).eval()}
    return models | {"quantized": gp.quantize(models["shrunk"])}


def latency(width: int, batch: int, *, executorch: bool = False) -> dict[str, Any]:
    """Return how long a prediction takes, by side; with ExecuTorch's sides or without."""
    models, x = shapes(width), base.data(0).test.x[:batch]
    flops = {side: gp.report(models[side], x[:1]).total.flops for side in ("dense", "shrunk")}
    with tempfile.TemporaryDirectory() as temporary:
        sides: dict[str, Callable[[], object]] = {name: lambda model=model: model(x) for name, model in models.items()}
        for name, of in {"dense": "dense", "masked": "masked weights", "shrunk": "shrunk", "int8": "shrunk"}.items():
            folder = Path(temporary) / name
            folder.mkdir()
            path, _ = in_onnx(models[of], folder, eight_bits=name == "int8")
            running, given = session(path), x.numpy()
            key = running.get_inputs()[0].name
            sides[f"ONNX {name}"] = partial(running.run, None, {key: given})
            if executorch and name != "int8":
                sides[f"ExecuTorch {name}"] = in_executorch(models[of], x, folder)
        with torch.inference_mode():
            return {"times": told(in_turn(sides, ROUNDS)), "FLOPs": flops, "rounds": ROUNDS}


def steps(width: int) -> dict[str, Any]:
    """Return how long a training step takes, dense, with masks held and shrunk."""
    models = {side: copy.deepcopy(shapes(width)[side]).train() for side in ("dense", "masked weights", "shrunk")}
    train = base.data(0).train
    x, y = train.x[:128], train.y[:128]
    sides: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        if name == "masked weights":
            gp.prune(model, sparsity=WEIGHTS, scope="lamp").hold(optimizer, model)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        sides[name] = step
    return {"times": told(in_turn(sides, ROUNDS, 0.01)), "batch": 128, "rounds": ROUNDS}


def surgery(width: int) -> dict[str, Any]:
    """Return what pruning and shrinking themselves take, in processor time, and what masking takes."""
    dense = shapes(width)["dense"]
    found: dict[str, list[float]] = {"mask": [], "prune and shrink": []}
    for _ in range(5):
        model = copy.deepcopy(dense)
        start = time.process_time()
        gp.prune(model, sparsity=WEIGHTS, scope="lamp")
        found["mask"].append(1000 * (time.process_time() - start))
        model = copy.deepcopy(dense)
        start = time.process_time()
        gp.shrink(by_groups(model), example())
        found["prune and shrink"].append(1000 * (time.process_time() - start))
    return {"ms": {name: spread(times) for name, times in found.items()}}


# ----------------------------------------------------------------------------------------------------------- memory

WIDE, LAYERS, BATCH = 2048, 4, 32
# What a fresh process does; it prints the most of memory that it ever had, in kB.
FRESH = """
import sys
side, path, width = sys.argv[1], sys.argv[2], int(sys.argv[3])
import numpy as np
if side.startswith("ONNX"):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if path:
        running = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        x = np.zeros((32, 40), np.float32)
        running.run(None, {running.get_inputs()[0].name: x})
else:
    import torch
    from safetensors.torch import load_file
    import gradprune as gp
    torch.set_num_threads(1)
    x = torch.zeros(32, width)
    with torch.inference_mode():
        if side == "nothing":
            pass
        elif width == 40:
            from gradprune import lab
            gp.load(lab.models.residual(), path).eval()(x)
        elif side == "CSR":
            layers = load_file(path)
            for i in range(len(layers) // 3):
                shape = (width, width)
                parts = [layers[f"{i}.{name}"] for name in ("crow", "col", "values")]
                w = torch.sparse_csr_tensor(*parts, size=shape)
                x = (w @ x.T).T
        else:
            layers = gp.unpack(path) if side == "packed" else load_file(path)
            for w in layers.values():
                x = torch.nn.functional.linear(x[:, : w.shape[1]], w)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak(side: str, path: str, width: int) -> float:
    """Return the most memory a fresh process had, in MB; the median of three."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = []
    for _ in range(3):
        command = [sys.executable, "-c", FRESH, side, path, str(width)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        runs.append(int(done.stdout) / 1000)
    return float(np.median(runs))


def memory(of: str) -> dict[str, Any]:
    """Return the peaks of fresh processes: of the residual network, or of a wide stack of linear layers."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found = {"torch alone": peak("nothing", "", 40)}
        if of == "residual":
            found["ONNX alone"] = peak("ONNX", "", 40)
            for side in ("dense", "masked weights", "shrunk"):
                gp.save(shapes(32)[side], folder / side)
                found[side] = peak(side, str(folder / side), 40)
            for side in ("dense", "shrunk"):
                (folder / "onnx").mkdir(exist_ok=True)
                path, _ = in_onnx(shapes(32)[side], folder / "onnx")
                found[f"ONNX {side}"] = peak("ONNX", str(path), 40)
            return {"MB": found}
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(WIDE, WIDE, bias=False) for _ in range(LAYERS)))
        pruned = copy.deepcopy(model)
        gp.prune(pruned, sparsity=WEIGHTS)
        weights = {name: w.detach() for name, w in pruned.state_dict().items()}
        save_file(model.state_dict(), folder / "dense")
        save_file(weights, folder / "masked weights")
        gp.pack(pruned, folder / "packed")
        small = {name: w[: int(0.3 * WIDE), : int(0.3 * WIDE)].contiguous() for name, w in weights.items()}
        save_file(small, folder / "shrunk")
        rows = {}
        for i, w in enumerate(weights.values()):
            csr = w.to_sparse_csr()
            rows |= {
                f"{i}.crow": csr.crow_indices().int(),
                f"{i}.col": csr.col_indices().int(),
                f"{i}.values": csr.values(),
            }
        save_file(rows, folder / "CSR")
        for side in ("dense", "masked weights", "CSR", "packed", "shrunk"):
            found[side] = peak(side, str(folder / side), WIDE)
        files = {side: round((folder / side).stat().st_size / 1e6, 2) for side in list(found)[1:]}
        return {"MB": found, "file, MB": files, "width": WIDE, "layers": LAYERS, "batch": BATCH}


def energy() -> dict[str, Any]:
    """Return whether the processor's energy counters can be read."""
    counters = list(Path("/sys/class/powercap").glob("*/energy_uj")) if Path("/sys/class/powercap").exists() else []
    return {"counters": len(counters), "readable": sum(os.access(path, os.R_OK) for path in counters)}


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure one row."""
    what, seed = cell["what"], cell["seed"]
    if what == "stage":
        return staged(seed, cell["stage"])
    if what == "scratch":
        return accuracies(scratch(seed, cell["steps"]), seed)
    if what == "file":
        return filed(seed, cell["of"], cell["levels"], cell["code"])
    if what == "exported":
        return exported()
    if what in ("latency", "runtimes"):
        return latency(cell["width"], cell["batch"], executorch=what == "runtimes")
    if what == "step":
        return steps(cell["width"])
    if what == "surgery":
        return surgery(cell["width"])
    return memory(cell["of"]) if what == "memory" else energy()


def cells(seed: int) -> list[dict[str, Any]]:
    """Return what is measured with one seed."""
    rows = [
        *({"what": "stage", "stage": name} for name in STAGES),
        *({"what": "scratch", "steps": n} for n in (CORRECTION, base.STEPS + CORRECTION)),
        *(
            {"what": "file", "of": of, "levels": levels, "code": code}
            for of in ("dense", "masked weights, corrected", "shrunk, corrected")
            for levels in LEVELS
            for code in CODES
        ),
    ]
    return [{"seed": seed} | row for row in rows]


def once() -> list[dict[str, Any]]:
    """Return what is measured of the machine, with seed 0."""
    rows = [
        *(
            {"what": what, "width": width, "batch": batch}
            for what in ("latency", "runtimes")
            for width in (32, 256)
            for batch in (1, 32)
        ),
        *({"what": what, "width": width} for width in (32, 256) for what in ("step", "surgery")),
        *({"what": "memory", "of": of} for of in ("residual", "wide")),
        {"what": "energy"},
        {"what": "exported"},
    ]
    return [{"seed": 0} | row for row in rows]


if __name__ == "__main__":
    lab.start(seed=0)
    path = Path(__file__).resolve().parents[1] / "results" / "deploy_residual.json"
    about = "lab.models.residual on MNIST-1D: pruned, shrunk, corrected, quantized, exported; accuracy, bytes, times"
    every = [*cells(0), *once(), *(cell for seed in SEEDS[1:] for cell in cells(seed))]
    lab.experiment.run(path, every, measure, seeds=SEEDS, about=about)

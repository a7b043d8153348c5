"""How is a network written for ONNX Runtime, and run by it?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradprune.core.quiet import quiet
from gradprune.deploy.function import Integers, Outputs
from gradprune.deploy.runtimes import Runtime


def _write(
    network: Outputs, tensors: Sequence[Tensor], is_open: Sequence[bool], names: Sequence[str], path: Path
) -> None:
    shapes = tuple({0: torch.export.Dim.DYNAMIC} if each else None for each in is_open)
    options: dict[str, Any] = {"dynamic_shapes": (shapes,)} if any(is_open) else {}
    integers = any(isinstance(module, Integers) for module in network.modules())
    options |= {"optimize": not integers}  # the optimizer makes small ones floats
    options |= {"input_names": list(names), "output_names": list(network.names)}
    with quiet():
        program = torch.onnx.export(network, tuple(tensors), dynamo=True, verbose=False, **options)
        assert program is not None
        _without_traces_(program.model)
        program.save(path)


def _without_traces_(model: Any) -> None:
    """Take out of the file where in the sources each operator comes from: paths, and more bytes than small weights."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            value.metadata_props.clear()
            value.doc_string = None


def _run(path: Path, tensors: Sequence[Tensor]) -> list[Tensor]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    given = {each.name: t.numpy() for each, t in zip(session.get_inputs(), tensors, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, given)]


ONNX = Runtime(
    name="ONNX Runtime",
    libraries=["onnxruntime", "onnxscript"],
    needs="gp.export needs onnx, onnxscript and onnxruntime: pip install 'gradprune[deploy]'",
    largest=2**31 - 2**20,  # a file is one message of protobuf
    opens=True,
    write=_write,
    run=_run,
)

"""How is a network written for ExecuTorch, torch's runtime for telephones and boards, and run by it?

The operators that XNNPACK has, which is most, are handed to it; the others are ExecuTorch's own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradprune.core.quiet import quiet
from gradprune.deploy.function import Outputs
from gradprune.deploy.runtimes import Runtime


def _write(
    network: Outputs, tensors: Sequence[Tensor], is_open: Sequence[bool], names: Sequence[str], path: Path
) -> None:
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        with sdpa_kernel(SDPBackend.MATH):  # the others' outputs have strides that the lowered program has not
            program = torch.export.export(network, tuple(tensors))
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        with path.open("wb") as file:
            lowered.write_to_file(file)


def _run(path: Path, tensors: Sequence[Tensor]) -> list[Tensor]:
    with quiet():
        from executorch.runtime import Runtime as ExecuTorch

        with _no_standard_error():  # where it tells what it reads about the processor, once a process
            method = ExecuTorch.get().load_program(path).load_method("forward")
        return [found.clone() for found in method.execute([t.contiguous() for t in tensors])]


@contextlib.contextmanager
def _no_standard_error() -> Iterator[None]:
    """Drop what C++ code writes to standard error."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


EXECUTORCH = Runtime(
    name="ExecuTorch",
    libraries=["executorch.runtime"],
    needs="gp.export(runtime=\"executorch\") needs executorch: pip install 'gradprune[executorch]'",
    largest=None,
    opens=False,
    write=_write,
    run=_run,
)

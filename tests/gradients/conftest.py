"""What the tests of gradients share: tensors that say that they lie on an accelerator."""

import pytest
import torch


class _OnCuda(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: torch.device("cuda"))
    is_cpu = property(lambda self: False)


class _OnMps(_OnCuda):
    device = property(lambda self: torch.device("mps"))


@pytest.fixture(params=[_OnCuda, _OnMps])
def on_accelerator(request):
    """Returns a tensor as one that says that it lies on an accelerator; what is done with it is done on the CPU."""
    return lambda tensor: tensor.as_subclass(request.param)

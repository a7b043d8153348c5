"""What tests of several modules stand on: small models, optimizers that wrap others, a norm by other means."""

import math

import numpy as np
import torch
from torch import nn


def small_net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def two_layers(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)


def oracle_norm(tensor):
    """In NumPy, in double, scaled so that no square can leave the range."""
    flat = np.abs(np.asarray(tensor.detach().to_dense().to(torch.complex128).numpy()).ravel())
    largest = flat.max(initial=0.0)
    return float(largest * math.sqrt(((flat / largest) ** 2).sum())) if 0 < largest < math.inf else float(largest)


class Delegating(torch.optim.Optimizer):
    """As accelerate's prepared optimizer: an Optimizer by class, without its constructor and hooks of its own."""

    def __init__(self, inner):
        self.optimizer = inner

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

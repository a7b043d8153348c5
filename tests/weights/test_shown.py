"""Do masks and pruners say in a few lines how many weights stay, in all and where?"""

import pytest
import torch
from torch import nn

import gradprune as gp


def test_masks_and_pruner_show_the_total_first_and_then_each_layer():
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 2))
    mask = torch.zeros(50, 40, dtype=torch.bool)
    mask[:30] = True
    masks = gp.Masks({"0.weight": mask, "1.weight": torch.ones(2, 50, dtype=torch.bool)})
    counts = "2 tensors, 2,100 weights, sparsity 0.3810)\n  0.weight: 1,200 of 2,000 stay\n  1.weight: 100 of 100 stay"
    assert repr(masks) == f"Masks({counts}"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = gp.Pruner(model, optimizer, lambda step: 0.9 if step > 5 else 0.0, within=masks)
    assert repr(pruner) == f"Pruner(step 0, 0 events, {counts}"


@pytest.mark.parametrize("layers", [0, 11, 12, 13, 40])
def test_at_most_twelve_layers_are_shown(layers):
    masks = gp.Masks({f"{at}.weight": torch.tensor([True, False]) for at in range(layers)})
    first, *lines = repr(masks).splitlines()
    assert first == f"Masks({layers} tensors, {2 * layers} weights, sparsity {0.5 if layers else 0:.4f})"
    assert lines[:12] == [f"  {at}.weight: 1 of 2 stay" for at in range(min(layers, 12))]
    assert lines[12:] == ([f"  ... and {layers - 12} more"] if layers > 12 else [])

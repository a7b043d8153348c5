"""What is put back, whatever happened, and what is not."""

import pytest
import torch
from torch import nn

from gradprune.core.unchanged import unchanged


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_parameters_buffers_modes_and_gradients_come_back(error):
    model = network()
    model[2].eval()
    model(torch.randn(5, 3)).sum().backward()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    gradients = [p.grad for p in model.parameters()]
    values = [g.clone() for g in gradients]
    try:
        with unchanged(model, model.parameters()):
            assert all(p.grad is None for p in model.parameters())
            model.train()
            model(torch.randn(5, 3)).sum().backward()
            model[1].running_mean = torch.ones(4)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(1.0)
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert [m.training for m in model] == [True, True, False]
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(g, v) for g, v in zip(gradients, values, strict=True))


def test_parameters_that_are_not_named_are_left_alone():
    model = network()
    with unchanged(model, [model[0].weight]), torch.no_grad():
        model[0].weight.zero_()
        model[2].weight.zero_()
    assert bool(model[0].weight.any())
    assert not model[2].weight.any()


def test_an_interrupt_while_putting_back_still_puts_all_back(monkeypatch):
    model, once = network(), []
    before = {n: t.clone() for n, t in model.state_dict().items()}
    own = torch.Tensor.copy_

    def interrupted(self, *args, **kwargs):
        if len(once) < 2:
            once.append(1)
            if len(once) == 2:
                raise KeyboardInterrupt
        return own(self, *args, **kwargs)

    def change():
        with unchanged(model, model.parameters()):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(1.0)
            monkeypatch.setattr(torch.Tensor, "copy_", interrupted)

    with pytest.raises(KeyboardInterrupt):
        change()
    monkeypatch.undo()
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())

"""Does a shrunk network come back from its file, and does a model that does not fit say why?"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import IMAGES, NETWORKS, Grouped, Residual, silence_, trained
from torch import nn

import gradprune as gp

pytest.importorskip("torch_pruning")
safetensors = pytest.importorskip("safetensors.torch")


def build():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def small():
    torch.manual_seed(0)
    model = build()
    silence_([model[0]], [1, 2, 5])
    return gp.shrink(model, torch.randn(3, 4))


def saved(tmp_path, model=None):
    path = tmp_path / "small.safetensors"
    gp.save(small() if model is None else model, path)
    return path


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_shrunk_network_comes_back_as_it_was(kind, tmp_path):
    model = trained(NETWORKS[kind])
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    silence_([first, *(m for m in model.modules() if getattr(m, "num_features", 0) == first.out_channels)], [0, 5])
    network = gp.shrink(model, IMAGES)
    fresh = NETWORKS[kind]()
    before = copy.deepcopy(fresh.state_dict())
    back = gp.load(fresh, saved(tmp_path, network)).eval()
    assert same(back, network)
    assert repr(back) == repr(network)
    assert torch.equal(back(IMAGES), network(IMAGES))
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


def test_in_a_fresh_process_without_pickle_or_torch_pruning(tmp_path):
    model = trained(Grouped)
    silence_([model.first], [0, 4, 8, 12])
    network = gp.shrink(model, IMAGES)
    path = saved(tmp_path, network)
    with torch.no_grad():
        safetensors.save_file({"x": IMAGES, "y": network(IMAGES)}, tmp_path / "what.safetensors")
    code = (
        "import pickle, sys, torch\n"
        "sys.modules['torch_pruning'] = None\n"
        "import gradprune as gp\n"
        "from networks import Grouped\n"
        "from safetensors.torch import load_file\n"
        "pickle.load = pickle.loads = torch.load = None\n"
        f"model = gp.load(Grouped(), {str(path)!r}).eval()\n"
        f"what = load_file({str(tmp_path / 'what.safetensors')!r})\n"
        "print(model.grouped.in_channels, torch.equal(model(what['x']), what['y']))\n"
    )
    folders = os.pathsep.join([str(Path(gp.__file__).parents[1]), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": folders}
    )
    assert done.stdout.split() == ["12", "True"], done.stderr


def test_it_trains_on_and_is_saved_again(tmp_path):
    back = gp.load(build(), saved(tmp_path))
    assert all(p.requires_grad for p in back.parameters())
    optimizer = torch.optim.SGD(back.parameters(), lr=0.1)
    back(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    again = gp.load(build(), saved(tmp_path, back))
    assert same(again, back)


def test_a_bias_that_shrinking_made_comes_back(tmp_path):
    def biasless():
        return nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2, bias=False))

    model = biasless()
    silence_([model[0]], [0])
    network = gp.shrink(model, torch.randn(3, 4))
    back = gp.load(biasless(), saved(tmp_path, network))
    assert same(back, network)
    assert back[2].bias is not None


def test_dtypes_are_the_files_and_modes_and_flags_the_models(tmp_path):
    path = saved(tmp_path, small().to(torch.bfloat16))
    fresh = build().eval()
    fresh[0].weight.requires_grad_(False)
    back = gp.load(fresh, path)
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16}
    assert [p.requires_grad for p in back.parameters()] == [False, True, True, True]
    assert not back.training


def test_a_model_without_memory_gets_it_from_the_file(tmp_path):
    path = saved(tmp_path)
    with torch.device("meta"):
        fresh = build()
    back = gp.load(fresh, path)
    assert {p.device.type for p in back.parameters()} == {"cpu"}
    assert back(torch.randn(3, 4)).shape == (3, 2)


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.up, self.down = nn.Embedding(10, 4), nn.Linear(4, 6), nn.Linear(6, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.down(self.up(self.embedding(x)).relu()))

    model = Tied()
    silence_([model.up], [0, 1])
    network = gp.shrink(model, torch.arange(10))
    path = saved(tmp_path, network)
    assert network.head.weight is network.embedding.weight
    assert "head.weight" not in safetensors.load_file(path)
    back = gp.load(Tied(), path)
    assert back.head.weight is back.embedding.weight
    assert same(back, network)


def test_a_network_that_was_never_shrunk_is_kept_too(tmp_path):
    model = trained(Residual)
    assert same(gp.load(Residual(), saved(tmp_path, model)), model)


# ---------------------------------------------------------------------------------------------- what does not fit


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 8)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Other, "the network is a Sequential in 'small.safetensors', in the model a Other"),
        (
            lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)),
            "layer '1' is a ReLU .* in the model a GELU",
        ),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU()), "the model has no layer '2', a Linear in"),
        (
            lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Tanh()),
            r"the model has a layer '3' \(Tanh\), 'small.safetensors' none",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)),
            r"'0.weight' has shape \(5, 4\) in .*, and had \(8, 4\) before it was shrunk; in the model .*\(16, 4\)",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)),
            r"'0.weight' .* had \(8, 4\) before it was shrunk; .* build the model as wide",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2, bias=False)),
            r"the model has no '2.bias', which 'small.safetensors' has",
        ),
        (lambda: nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2)), "the model has no '0.bias'"),
    ],
)
def test_a_model_that_does_not_fit_is_an_error_that_says_which_layer(model, said, tmp_path):
    path, fresh = saved(tmp_path), model()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ValueError, match=said):
        gp.load(fresh, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


def test_a_setting_that_no_shape_shows_is_compared(tmp_path):
    path = saved(tmp_path, trained(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2))))
    with pytest.raises(ValueError, match=r"layer '0' has stride \(2, 2\) in .*, in the model \(1, 1\)"):
        gp.load(nn.Sequential(nn.Conv2d(3, 4, 3)), path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        gp.load(build(), tmp_path / "none")
    masks = tmp_path / "masks"
    gp.prune(build(), sparsity=0.5).save(masks)
    with pytest.raises(ValueError, match=r"'masks' is no file of a network: .* without a network saved by gp.save"):
        gp.load(build(), masks)
    torch.save(build().state_dict(), tmp_path / "pickle")
    with pytest.raises(ValueError, match=r"it is a pickle.*torch.load"):
        gp.load(build(), tmp_path / "pickle")
    whole = saved(tmp_path).read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"cut off or damaged"):
        gp.load(build(), tmp_path / "cut")


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({}, "newer version|damaged"),
        ({"version": 3}, "newer version"),
        ({"version": 1, "modules": {}, "shapes": {"x": [2]}, "tied": {}}, "'x' is missing or misshapen"),
        ({"version": 1, "modules": [], "shapes": {}, "tied": {}}, "damaged"),
        ([], "damaged"),
    ],
)
def test_a_file_whose_account_of_itself_is_damaged_is_refused(told, said, tmp_path):
    path = tmp_path / "damaged"
    safetensors.save_file({"y": torch.ones(2)}, path, metadata={"gradprune.network": json.dumps(told)})
    with pytest.raises(ValueError, match=said):
        gp.load(build(), path)


def test_what_cannot_be_saved_leaves_what_stood_there(tmp_path):
    path = saved(tmp_path)
    before = path.read_bytes()
    with torch.device("meta"):
        fresh = build()
    with pytest.raises(TypeError, match=r"'0.weight' is on the meta device"):
        gp.save(fresh, path)
    with pytest.raises(ValueError, match=r"folder that does not exist"):
        gp.save(build(), tmp_path / "no" / "file")
    with pytest.raises(TypeError, match=r"path must be a path"):
        gp.save(build(), 3)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        gp.save(build().state_dict(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]

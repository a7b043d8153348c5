"""Small networks that couple channels in every way that is to be taken apart."""

import torch
import transformers
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradprune.lab import models

# Inputs of `digits`, and of `gpt2` and `llama`.
X = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(20).view(2, 10)


def residual():
    torch.manual_seed(0)
    return models.residual(8)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.body = nn.Sequential(
            nn.Conv2d(8, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(inplace=True),
            nn.Conv2d(12, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.body(x)).relu().mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand = nn.Conv2d(3, 12, 1)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.project = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6 * 16, 4)

    def forward(self, x):
        x = self.depthwise(self.norm(self.expand(x)).relu()).relu()
        return self.head(self.project(x).flatten(1))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(24)
        self.second = nn.ConvTranspose2d(24, 12, 1, groups=2)
        self.head = nn.Linear(12 * 16, 4)

    def forward(self, x):
        x = self.norm(self.grouped(self.first(x).relu())).relu()
        return self.head(self.second(x).flatten(1))


class Dense(nn.Module):
    """Concatenates, its own input too."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(9, 5, 3, padding=1)
        self.third = nn.Conv2d(14, 7, 1)
        self.head = nn.Linear(7, 4)

    def forward(self, x):
        x = torch.cat([x, self.first(x).relu()], 1)
        x = torch.cat((self.second(x).relu(), x), dim=-3)
        return self.head(self.third(x).amax((2, 3)))


class Shaped(nn.Module):
    """A small U: down, up by a transposed convolution, and across."""

    def __init__(self):
        super().__init__()
        self.down1, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down2 = nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.middle = nn.Conv2d(16, 10, 3, padding=1)
        self.up = nn.ConvTranspose2d(10, 8, 2, stride=2)
        self.across = nn.Conv2d(16, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        down = self.norm(self.down1(x)).relu()
        up = self.up(self.middle(self.down2(down).relu()).relu())
        return self.out(self.across(torch.cat([down, up], 1)).relu())


class Gated(nn.Module):
    """A gated perceptron, the two halves of one layer, between a layer norm and a residual sum."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 40), nn.Linear(20, 6)

    def forward(self, x):
        value, gate = self.up(self.norm(x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * value)


IMAGES = torch.Generator().manual_seed(0)
IMAGES = torch.randn(2, 3, 4, 4, generator=IMAGES)
NETWORKS = {kind.__name__: kind for kind in (Residual, Depthwise, Grouped, Dense, Shaped)}


def trained(build, seed=0):
    """A network whose norms' statistics, scales and shifts are none that a fresh one has."""
    torch.manual_seed(seed)
    model = build()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_()
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 2)
    return model.eval()


def silence_(layers, channels):
    """Zero the channels of layers: filters, biases, a norm's scale and shift."""
    for layer in layers:
        with torch.no_grad():
            axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
            if axis and layer.groups > 1:
                each = layer.out_channels // layer.groups
                for c in channels:
                    rows = slice(c // each * layer.in_channels // layer.groups, None)
                    layer.weight[rows][: layer.in_channels // layer.groups, c % each] = 0
            else:
                layer.weight.movedim(axis, 0)[list(channels)] = 0
            if layer.bias is not None:
                layer.bias[list(channels)] = 0
    return layers


def size(model):
    return sum(p.numel() for p in model.parameters())


def digits(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)).eval()


def gpt2():
    torch.manual_seed(0)
    names = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=100, n_positions=32, **names)
    return transformers.GPT2LMHeadModel(config).eval()


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=100, **sizes)).eval()

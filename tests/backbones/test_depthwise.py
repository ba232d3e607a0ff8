"""The depthwise convolution of map blocks as a module."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mamba_zoo.backbones import _depthwise, _recompute
from mamba_zoo.backbones._cast import weights_cast
from mamba_zoo.backbones._depthwise import DepthwiseConv
from mamba_zoo.backbones._mixer import SS2D


def by_torch(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """What the layer computes, as a `Conv2d` does."""
    return F.silu(nn.Conv2d.forward(layer, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    "change",
    [{}, {"padding_mode": "circular", "_reversed_padding_repeated_twice": [1, 1, 1, 1]}, {"stride": (2, 2)},
     {"dilation": (2, 2), "padding": (2, 2)}, {"padding": (0, 0)}],
    ids=str,
)  # fmt: skip
def test_is_the_convolution_that_it_says(change):
    layer, x = DepthwiseConv(6, activation="silu"), torch.randn(2, 8, 7, 6)
    vars(layer).update(change)
    torch.testing.assert_close(layer(x), by_torch(layer, x))


class TestMadeAgain:
    """Where kernels make it, the convolution is computed again in the backward pass; here as if they did."""

    @pytest.fixture(autouse=True)
    def _as_on_a_gpu(self, monkeypatch):
        monkeypatch.setattr(_recompute, "LEAST", 1)
        monkeypatch.setattr(_depthwise, "has_kernels", lambda weight: True)

    @staticmethod
    def gradients(mixer: Any, x: torch.Tensor, after: Any = None) -> list[torch.Tensor]:
        inputs = [x, *mixer.parameters()]
        y = mixer(x).square().sum()
        if after is not None:
            after()
        return list(torch.autograd.grad(y, inputs))

    def assert_as_kept(self, monkeypatch, found: list[torch.Tensor], mixer: Any, x: torch.Tensor) -> None:
        """The gradients are those where nothing is computed again."""
        monkeypatch.setattr(_recompute, "LEAST", 2**60)
        for ours, expected in zip(found, self.gradients(mixer, x), strict=True):
            torch.testing.assert_close(ours, expected)

    def test_with_the_weights_that_it_had(self, monkeypatch):
        mixer, x = SS2D(8, conv_bias=True), torch.randn(2, 4, 5, 8, requires_grad=True)
        mine: Any = dict(mixer.conv._parameters)

        def exchange() -> None:
            mixer.conv._parameters |= {name: nn.Parameter(torch.randn_like(p)) for name, p in mine.items()}

        found = self.gradients(mixer, x, exchange)
        mixer.conv._parameters |= mine
        self.assert_as_kept(monkeypatch, found, mixer, x)

    def test_not_where_somebody_looks(self, monkeypatch):
        mixer, x = SS2D(8), torch.randn(2, 4, 5, 8, requires_grad=True)
        calls = []
        mixer.conv.register_forward_hook(lambda layer, inputs, y: calls.append(y) or 2 * y)
        found = self.gradients(mixer, x)
        assert len(calls) == 1
        self.assert_as_kept(monkeypatch, found, mixer, x)

    def test_keeps_less(self, monkeypatch):
        mixer, x = SS2D(8), torch.randn(2, 6, 7, 8, requires_grad=True)
        made = []
        right = _depthwise.depthwise_conv2d
        monkeypatch.setattr(_depthwise, "depthwise_conv2d", lambda *a, **k: made.append(a) or right(*a, **k))
        self.gradients(mixer, x)
        assert len(made) == 2


@pytest.mark.parametrize("kernels", [True, False])
def test_its_weights_are_cast_unless_kernels_read_them(kernels, monkeypatch):
    monkeypatch.setattr(_depthwise, "has_kernels", lambda weight: kernels)
    mixer, x = SS2D(8), torch.randn(1, 4, 4, 8)
    with torch.autocast("cpu", torch.bfloat16), weights_cast(mixer, x):
        assert mixer.in_proj.weight.dtype == torch.bfloat16
        assert mixer.conv.weight.dtype == (torch.float32 if kernels else torch.bfloat16)

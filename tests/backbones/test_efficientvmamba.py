"""EfficientVMamba: which token reaches which, what its stages are made of, and its arguments."""

from typing import Any

import pytest
import timm
import torch

from mamba_zoo.backbones._mixer import SS2D
from mamba_zoo.backbones.efficientvmamba import EfficientBlock, MapInvertedResidual

SMALL: dict[str, Any] = {"depths": (1, 1, 1), "dims": 16, "d_state": 3, "num_classes": 7}


def test_a_token_is_reached_by_those_before_it_among_every_second_of_every_second_row():
    torch.manual_seed(0)
    mixer = SS2D(8, 3, 2.0, scan="atrous", k=4, gate=True, conv_bias=True)
    torch.nn.init.zeros_(mixer.conv.weight)
    mixer.conv.weight.data[:, :, 1, 1] = 1  # no convolution, so that only the scan mixes tokens
    x = torch.randn(1, 5, 7, 8, requires_grad=True)
    for h, w in ((4, 6), (3, 5), (4, 5), (3, 6)):
        (grad,) = torch.autograd.grad(mixer(x)[0, h, w].square().sum(), x)
        reached = {(int(i), int(j)) for i, j in grad[0].abs().sum(-1).nonzero()}
        sample = [(i, j) for i in range(h % 2, 5, 2) for j in range(w % 2, 7, 2)]
        path = sample if h % 2 == 0 else sorted(sample, key=lambda place: place[::-1])
        assert reached == set(path[: path.index((h, w)) + 1])


@pytest.mark.parametrize("stages", [0, 2, 3])
def test_stages_of_scans_come_before_stages_of_convolutions(stages):
    model: Any = timm.create_model("efficient_vmamba_tiny", **SMALL, scan_stages=stages).eval()
    kinds = [type(stage.blocks[0]) for stage in model.stages]
    assert kinds == [EfficientBlock] * stages + [MapInvertedResidual] * (3 - stages)
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 40, 52)).shape == (1, 7)


def test_one_gate_weighs_both_branches():
    torch.manual_seed(0)
    block = EfficientBlock(16, torch.nn.Identity()).eval()
    x = torch.randn(2, 3, 5, 16)
    with torch.inference_mode():
        far = block.norm(x)
        near = block.local(far)
        weighed = [
            y * torch.sigmoid(block.gate.select(torch.nn.functional.gelu(block.gate.reduce(m))))[:, None, None]
            for y in (far, near)
            for m in (block.gate.norm(y).mean((1, 2)),)
        ]
        torch.testing.assert_close(block(x), x + sum(weighed))


def test_depths_and_dims_must_agree():
    with pytest.raises(ValueError, match=r"depths=\(1, 1, 1\) and dims=\(8, 16\) must give as many stages"):
        timm.create_model("efficient_vmamba_tiny", **{**SMALL, "dims": (8, 16)})

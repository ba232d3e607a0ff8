"""How the parameters of a state-space layer start (arXiv:2312.00752, section 3.6, and its published code)."""

from __future__ import annotations

import math

import torch
from timm.layers.weight_init import trunc_normal_ as timm_trunc_normal_
from torch import Tensor, nn

STEP_MIN, STEP_MAX, STEP_FLOOR = 1e-3, 1e-1, 1e-4


@torch.no_grad()
def init_decay_(A_log: Tensor) -> Tensor:
    """`A = -exp(A_log) = -1, ..., -n` along the states, the last axis."""
    rates = torch.arange(1, A_log.shape[-1] + 1, dtype=torch.float32, device=A_log.device)
    return A_log.copy_(rates.log().expand_as(A_log))


@torch.no_grad()
def init_step_bias_(bias: Tensor) -> Tensor:
    """`softplus(bias)` is log-uniform between 1e-3 and 1e-1 tokens."""
    if bias.is_meta:
        return bias
    u = torch.rand(bias.shape, dtype=torch.float32, device=bias.device)
    step = torch.exp(u * (math.log(STEP_MAX) - math.log(STEP_MIN)) + math.log(STEP_MIN)).clamp(min=STEP_FLOOR)
    return bias.copy_(step + torch.log(-torch.expm1(-step)))


def init_uniform_(weight: Tensor, fan_in: int) -> Tensor:
    """Uniform within `fan_in ** -0.5`: torch's default for linear layers, and the rule for the step projection."""
    bound = fan_in**-0.5
    return nn.init.uniform_(weight, -bound, bound)


def trunc_normal_(weight: Tensor, std: float) -> Tensor:
    """Truncated normal values of deviation `std`."""
    # Without values to draw, torch would spend half of the time of building a model on the meta device here.
    return weight if weight.is_meta else timm_trunc_normal_(weight, std=std)


def init_linear_(module: nn.Module) -> None:
    """For `Module.apply`: truncated normal weights of deviation 0.02 and zero biases in linear layers."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

"""Mamba: the plain layer, over one sequence of tokens. Gu and Dao 2023, arXiv:2312.00752.

Follows the arithmetic of state-spaces/mamba@e9594ce1c732 mamba_ssm/modules/mamba_simple.py (Apache-2.0).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._keys import Key, rename
from ._mixer import Mamba
from ._register import Card, build_model, register

KEYS = [
    Key(r"^A_log$", "ssm.A_log", 0),
    Key(r"^D$", "ssm.D", 0),
    Key(r"^conv1d\.weight$", "conv.weight", 0, lambda weight: weight.squeeze(1)),
    Key(r"^conv1d\.bias$", "conv.bias", 0),
    Key(r"^x_proj\.weight$", "ssm.x_proj.weight", 0),
    Key(r"^dt_proj\.weight$", "ssm.dt_proj.weight", 0),
    Key(r"^dt_proj\.bias$", "ssm.dt_bias", 0),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A layer's published state dict in our names."""
    return rename(state_dict, KEYS)


@register(
    Card(
        "sequence",
        "state-spaces/mamba@e9594ce1c732 mamba_ssm/modules/mamba_simple.py",
        "Apache-2.0",
        "2312.00752",
        251_520,
    ),
    num_classes=-1,
    input_size=None,
)
def mamba(pretrained: bool = False, **kwargs: Any) -> Mamba:
    """The Mamba layer: tokens `(b, l, dim)` to `(b, l, dim)`; 0.25 M parameters at its default width of 192."""
    return build_model(Mamba, "mamba", pretrained, checkpoint_filter_fn, **{"dim": 192, **kwargs})

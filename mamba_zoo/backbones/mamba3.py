"""Mamba-3: the plain layer, over one sequence of tokens (arXiv:2603.15569).

Follows the arithmetic of state-spaces/mamba@e9594ce1c732 mamba_ssm/modules/mamba3.py (Apache-2.0).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._keys import Key, rename
from ._mamba3 import Mamba3
from ._register import Card, build_model, register

KEYS = [
    *(Key(rf"^{name}$", f"maps.{name}", 0) for name in ("dt_bias", "D")),
    *(Key(rf"^{name}$", f"maps.{name}", None, lambda bias: bias.squeeze(1)) for name in ("B_bias", "C_bias")),
    *(Key(rf"^{name}\.weight$", f"maps.{name}") for name in ("B_norm", "C_norm")),
    Key(r"^norm\.weight$", "norm"),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A layer's published state dict in our names."""
    return rename(state_dict, KEYS)


@register(
    Card(
        "sequence",
        "state-spaces/mamba@e9594ce1c732 mamba_ssm/modules/mamba3.py",
        "Apache-2.0",
        "2603.15569",
        params=120_976,
        notes="One input and one output per head; rank=4 has four of each (MIMO), compared with no published output.",
    ),
    num_classes=-1,
    input_size=None,
)
def mamba3(pretrained: bool = False, **kwargs: Any) -> Mamba3:
    """The Mamba-3 layer: tokens `(b, l, dim)` to `(b, l, dim)`; 0.12 M parameters at its default width of 128."""
    args = {"dim": 128, "d_state": 64, "head_dim": 32, **kwargs}
    return build_model(Mamba3, "mamba3", pretrained, checkpoint_filter_fn, **args)

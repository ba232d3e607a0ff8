"""Mamba-2: the plain layer, over one sequence of tokens. Dao and Gu 2024, arXiv:2405.21060.

Follows the arithmetic of state-spaces/mamba@e9594ce1c732 mamba_ssm/modules/mamba2.py (Apache-2.0).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._keys import Key, rename
from ._mamba2 import Mamba2
from ._register import Card, build_model, register

KEYS = [
    *(Key(rf"^{name}$", name, 0) for name in ("A_log", "D", "dt_bias")),
    Key(r"^conv1d\.weight$", "conv.weight", 0, lambda weight: weight.squeeze(1)),
    Key(r"^conv1d\.bias$", "conv.bias", 0),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A layer's published state dict in our names; a skip weight per channel is cut into heads."""
    state = rename(state_dict, KEYS)
    if isinstance(model, Mamba2) and model.D.dim() == 3 and state.get("D", model.D).dim() == 2:
        state["D"] = state["D"].view(1, model.heads, -1)
    return state


@register(
    Card(
        "sequence",
        "state-spaces/mamba@e9594ce1c732 mamba_ssm/modules/mamba2.py",
        "Apache-2.0",
        "2405.21060",
        134_412,
    ),
    num_classes=-1,
    input_size=None,
)
def mamba2(pretrained: bool = False, **kwargs: Any) -> Mamba2:
    """The Mamba-2 layer: tokens `(b, l, dim)` to `(b, l, dim)`; 0.13 M parameters at its default width of 128."""
    return build_model(Mamba2, "mamba2", pretrained, checkpoint_filter_fn, **{"dim": 128, **kwargs})

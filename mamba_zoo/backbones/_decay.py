"""Which parameters weight decay leaves alone, the same for every model."""

from __future__ import annotations

from torch import nn

# The last part of the names of parameters that decay would pull to a value that means something else than "off".
UNDECAYED = frozenset(
    {
        *("A_log", "D", "dt_bias", "B_bias", "C_bias", "direction_B"),  # of state spaces
        *("bias", "norm_weight", "gamma", "beta", "order_gamma", "order_beta"),  # shifts and scales
        *("cls_token", "mask_token", "pos_embed", "temporal_pos_embed", "cls_pos", "order_prompt"),  # embeddings
    }
)


def undecayed(model: nn.Module) -> set[str]:
    """Full names of the state-space parameters, biases, norms, scales and embeddings that decay should leave alone.

    These are all parameters of one dimension at most, and those of `UNDECAYED` with more: for several directions, heads
    or positions.
    """
    return {name for name, p in model.named_parameters() if p.dim() <= 1 or name.rsplit(".", 1)[-1] in UNDECAYED}

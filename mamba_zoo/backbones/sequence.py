"""A plain causal model of sequences: a linear map in, Mamba blocks, a norm, a linear map out. Ours.

The block is that of Mamba (Gu and Dao 2023, arXiv:2312.00752): add, norm, mix.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._block import AddNormBlock, RMSNorm
from ._mixer import Mamba
from ._register import Card, build_model, register
from ._stack import CausalStack, State


class MambaSequence(CausalStack):
    """Values at every time to values at every time, each depending on the past alone.

    Memory and time grow with the length of the input; through `extend` or `step`, in chunks or one time after another,
    memory stays the same however long the input is, and the outputs are those of `forward`.

    Args:
        in_chans: Values at each time.
        out_chans: Outputs at each time.
        dim: Width.
        depth: Blocks.
        d_state: States n.
        d_conv: Taps of the convolutions.
        expand: Inner width of the mixers in units of `dim`.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        in_chans: int = 1,
        out_chans: int = 1,
        dim: int = 64,
        depth: int = 4,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        device=None,
        dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        super().__init__(
            (AddNormBlock(dim, Mamba(dim, d_state, d_conv, expand, **dd), **dd) for _ in range(depth)),
            RMSNorm(dim, **dd),
        )
        self.in_chans, self.num_features = in_chans, dim
        self.embed = nn.Linear(in_chans, dim, **dd)
        self.head = nn.Linear(dim, out_chans, **dd)

    def embed_inputs(self, x: Tensor) -> Tensor:
        """`(b, l, in_chans)` to `(b, l, dim)`."""
        return self.embed(x)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, l, in_chans)` to `(b, l, out_chans)`."""
        return super().forward(self._checked(x, 3))

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """The next times of a stream, `(b, l, in_chans)`, to `(b, l, out_chans)` and the new state."""
        return super().extend(self._checked(x, 3), state)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """`extend` for one time, `(b, in_chans)` to `(b, out_chans)`."""
        return super().step(self._checked(x, 2), state)

    def _checked(self, x: Tensor, dims: int) -> Tensor:
        if x.dim() != dims or x.shape[-1] != self.in_chans or 0 in x.shape[1:]:
            axes, least = ("(b, l, c)", " and l >= 1") if dims == 3 else ("(b, c)", "")
            wanted = f"{axes} with c = {self.in_chans} values{least}"
            raise ValueError(f"input has shape {tuple(x.shape)}, expected {wanted}")
        return x


@register(
    Card(
        "sequence",
        "mamba_zoo",
        "Apache-2.0",
        "2312.00752",
        notes="Not published: a causal model of sequences of any length, whole, in chunks or one time after another.",
    ),
    num_classes=-1,
    input_size=None,
)
def mamba_sequence(pretrained: bool = False, **kwargs: Any) -> MambaSequence:
    """A causal stack of four Mamba blocks of width 64, from one value a time to one value a time."""
    return build_model(MambaSequence, "mamba_sequence", pretrained, lambda state, _: state, **kwargs)

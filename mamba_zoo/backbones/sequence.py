"""A plain causal model of sequences: a linear map in, Mamba blocks, a norm, a linear map out. Ours.

The block is that of Mamba (Gu and Dao 2023, arXiv:2312.00752): add, norm, mix.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from ._block import AddNormBlock, RMSNorm, add_residual
from ._mixer import Mamba
from ._register import Card, build_model, register

State = list[tuple[Tensor, Tensor]]


class MambaSequence(nn.Module):
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
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.in_chans, self.num_features = in_chans, dim
        self.grad_checkpointing = False
        self.embed = nn.Linear(in_chans, dim, **dd)
        self.blocks = nn.ModuleList(
            AddNormBlock(dim, Mamba(dim, d_state, d_conv, expand, **dd), **dd) for _ in range(depth)
        )
        self.norm = RMSNorm(dim, **dd)
        self.head = nn.Linear(dim, out_chans, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, l, in_chans)` to `(b, l, out_chans)`."""
        hidden, residual = self.embed(self._checked(x, 3)), None
        for block in self.blocks:
            if self.grad_checkpointing:
                hidden, residual = checkpoint(block, hidden, residual, None)  # type: ignore[misc]
            else:
                hidden, residual = block(hidden, residual, None)
        return self._finish(hidden, residual)

    def init_state(self, batch: int) -> State:
        """The memory of a stream before its first value: what each mixer keeps."""
        return [block.mixer.init_state(batch) for block in self.blocks]  # type: ignore[operator]

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """The next times of a stream, `(b, l, in_chans)`, to `(b, l, out_chans)` and the new state."""
        return self._advance(self._checked(x, 3), state, "extend")

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """`extend` for one time, `(b, in_chans)` to `(b, out_chans)`."""
        return self._advance(self._checked(x, 2), state, "step")

    def no_weight_decay(self) -> set[str]:
        """Full names of the state-space parameters, biases and norms that decay should leave alone."""
        special = ("A_log", "D", "dt_bias", "bias")
        return {n for n, p in self.named_parameters() if p.dim() <= 1 or n.rsplit(".", 1)[-1] in special}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise learning rates."""
        return {"stem": r"^embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm|^head", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def _advance(self, x: Tensor, state: State, how: str) -> tuple[Tensor, State]:
        hidden, residual, new = self.embed(x), None, []
        for block, memory in zip(self.blocks, state, strict=True):
            residual = add_residual(hidden, residual)
            mixer: Any = block.mixer
            hidden, after = getattr(mixer, how)(block.norm(residual).to(hidden.dtype), memory)  # type: ignore[operator]
            new.append(after)
        return self._finish(hidden, residual), new

    def _finish(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        return self.head(self.norm(add_residual(hidden, residual)).to(hidden.dtype))

    def _checked(self, x: Tensor, dims: int) -> Tensor:
        if x.dim() != dims or x.shape[-1] != self.in_chans or not torch.numel(x):
            shape = "(b, l, c)" if dims == 3 else "(b, c)"
            raise ValueError(f"input has shape {tuple(x.shape)}, expected {shape} with c = {self.in_chans} values")
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

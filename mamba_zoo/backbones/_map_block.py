"""The residual block of pyramids: a mixer of maps, then an MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers._fx import register_notrace_module
from timm.layers.drop import DropPath
from torch import Tensor, nn

from ._block import LayerNorm, LeanMlp, branch_scale, normed_again, skip_rate
from ._map_nodes import mixed, with_mlp


class MapBlock(nn.Module):
    """A mixer of channels-last maps, and optionally an MLP, each `x + drop_path(f(norm(x)))`.

    Args:
        dim: Width.
        mixer: Makes the mixer, given the width.
        mlp_ratio: Hidden width of the MLP in units of `dim`; 0 is no MLP.
        drop_path: Rate at which a sample skips a branch in training.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        mixer: Callable[[int], nn.Module],
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, **dd)
        self.mixer = mixer(dim)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        if mlp_ratio > 0:
            self.norm2 = LayerNorm(dim, **dd)
            self.mlp = LeanMlp(dim, int(mlp_ratio * dim), **dd)
            self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        else:
            self.mlp = None

    def forward(self, x: Tensor) -> Tensor:
        """A map `(b, h, w, dim)` to one of the same shape."""
        x, y = mixed(self, x) or self._mixed(x)
        if self.mlp is None:
            return x + self.drop_path1(y)
        scale = branch_scale(y, skip_rate(self.drop_path1))
        whole = with_mlp(self, x, y, scale)
        if whole is not None:
            return whole
        x, y = self.norm2(x, y, scale, narrow=True)
        with normed_again(y, self.norm2, x):
            return x + self.drop_path2(self.mlp(y))

    def _mixed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm1(x, narrow=True)
        with normed_again(y, self.norm1, x):
            return x, self.mixer(y)


register_notrace_module(MapBlock)  # torch.fx takes it whole, because it looks at dtypes

"""Parts of LocalVim and LocalVMamba: directions chosen for every block, and their weighed sum (arXiv:2403.09338)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers._fx import register_notrace_module
from torch import Tensor, nn

from ..scans import ScanLike, as_spec, scan_order
from ._gate import ChannelGate
from ._ssm import CausalConv1d, SelectiveSSM, resolve_dt_rank, resolve_scan

DEFAULT = ("h", "h_flip", "w2", "w2_flip")
COLUMNS_NOTE = (
    "The published code misplaces the outputs of columns on maps that are not square; that is corrected here, see "
    "published_columns=."
)


class BlockScan(NamedTuple):
    """The scan of one block.

    Attributes:
        spec: For `scans.scan_order`.
        k: Directions.
        columns: Those of them whose outputs go where the published code puts them, see `DirectionMerge`.
    """

    spec: str
    k: int
    columns: tuple[int, ...] = ()


def block_scans(
    blocks: int,
    directions: Sequence[str] | Sequence[Sequence[str]],
    scan: ScanLike | None,
    published_columns: bool,
) -> list[BlockScan]:
    """The scan of every block.

    Args:
        blocks: How many.
        directions: Names for the scan "local", one list for all blocks or one list for each.
        scan: Instead of `directions`, the same in all blocks.
        published_columns: See `DirectionMerge`.

    Raises:
        ValueError: an unknown name or scan, another number of lists than blocks, or `published_columns` with `scan`.
        TypeError: no name, `Scan` or function.
    """
    if scan is not None:
        if published_columns:
            raise ValueError(f"published_columns is about directions by name, but scan={scan!r} takes their place")
        return [BlockScan(*resolve_scan(scan))] * blocks
    rows = [tuple(directions)] * blocks if isinstance(directions[0], str) else [tuple(row) for row in directions]
    if len(rows) != blocks:
        raise ValueError(
            f"directions has {len(rows)} lists for {blocks} blocks; give one for each, one list of names for all, or "
            f"scan="
        )
    return [
        BlockScan(
            as_spec(f"local({row!r})"),
            resolve_scan(f"local({row!r})")[1],
            tuple(i for i, name in enumerate(row) if name in ("v", "v_flip")) if published_columns else (),
        )
        for row in rows
    ]


class DirectionMerge(nn.Module):
    """The sum of directions, the channels of each weighed by a gate that all directions share.

    The published code brings the outputs of "v" and "v_flip" back from columns to rows by going from rows to columns
    once more. On square maps this is the same; on others every output ends at a wrong token.

    Args:
        dim: Channels d.
        columns: Directions whose outputs shall end where the published code puts them on maps that are not square.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, dim: int, columns: tuple[int, ...] = (), device=None, dtype=None):
        super().__init__()
        self.columns = columns
        self.gate = ChannelGate(dim, device=device, dtype=dtype)

    def forward(self, y: Tensor, grid: tuple[int, int], token: int | None = None) -> Tensor:
        """Outputs `(b, l, k, d)` of a grid `(h, w)`, and of a class token at index `token`, to `(b, l, d)`."""
        if self.columns and grid[0] != grid[1]:
            source = _published_source(grid, token, y.device)
            parts = [y[:, source, i] if i in self.columns else y[:, :, i] for i in range(y.shape[2])]
            y = torch.stack(parts, dim=2)
        return (y * self.gate(y, (1,))).sum(2)


def _published_source(grid: tuple[int, int], token: int | None, device: torch.device) -> Tensor:
    """For every token, that whose output along the columns the published code puts there."""
    rows = torch.arange(grid[0] * grid[1], device=device)
    by_columns = rows.view(grid).T.reshape(-1)
    source = by_columns[by_columns]
    if token is None:
        return source
    source = torch.where(source >= token, source + 1, source)
    return torch.cat([source[:token], source.new_tensor([token]), source[token:]])


class LocalVimMixer(nn.Module):
    """Vim's gated mixer in k directions, the channels of each weighed before they are summed.

    Where a window reaches beyond the grid, its empty steps take part as tokens of zeros: they pass through the
    convolution, whose bias makes them move the state, as published.

    Args:
        dim: Model width.
        scan: Its directions.
        d_state: States n.
        d_conv: Taps of the convolution.
        expand: Inner width in units of `dim`.
        dt_rank: Rank of the step projection; "auto" is one sixteenth of `dim`, rounded up.
        class_token: Whether a class token stands in the middle of the tokens; every direction visits it halfway.
        ssm: False leaves the scan and its parameters out, so that the convolved tokens are gated, weighed and summed.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        scan: BlockScan,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        class_token: bool = False,
        ssm: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        self.class_token = class_token
        self.scan = as_spec(f"filled(with_token({scan.spec}, 'middle'))" if class_token else f"filled({scan.spec})")
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv = CausalConv1d(scan.k, inner, d_conv, **dd)
        self.ssm = SelectiveSSM(inner, d_state, resolve_dt_rank(dt_rank, dim), scan.k, **dd) if ssm else None
        self.merge = DirectionMerge(inner, scan.columns, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens `(b, l, dim)` of a grid `(h, w)` of patches to the same shape."""
        l = x.shape[1]
        order = scan_order(self.scan, grid, x.device)
        if order.shape[1] > l:
            x = F.pad(x, (0, 0, 0, order.shape[1] - l))
        x, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.conv(x, order)
        y = u * F.silu(z)[:, :, None] if self.ssm is None else self.ssm(u, z, order)
        y = self.merge(y[:, :l], grid, (l - 1) // 2 if self.class_token else None)
        return self.out_proj(y.to(u.dtype))


# torch.fx takes it whole: it looks at shapes and dtypes. Not as a decorator, which would hide its type.
register_notrace_module(LocalVimMixer)

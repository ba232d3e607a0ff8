"""S-Mamba: a bidirectional scan over the variates of a series. Wang et al. 2024, arXiv:2403.11144.

Follows the arithmetic of wzhwzhwzh0921/S-D-Mamba@e7e8bf040661 model/S_Mamba.py, written from the paper and from what
that code computes; the repository has no licence.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers._fx import register_notrace_module
from timm.layers.mlp import Mlp
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from ..scans import ScanLike, scan_order
from ._block import LayerNorm
from ._keys import Key, rename
from ._register import Card, build_model, register
from ._series import SeriesModel, series_scan
from ._series_published import published_arguments
from ._ssm import CausalConv1d, SelectiveSSM, resolve_dt_rank

# Layers that every published file holds and no output depends on.
DEAD = r"^encoder\.attn_layers\.\d+\.(man|man2|a)\."


class ApartMamba(nn.Module):
    """k whole Mamba layers, one a direction, which share nothing; their outputs are added. One scan serves them all.

    Args:
        dim: Model width.
        d_state: States n.
        d_conv: Taps of the convolution.
        expand: Inner width of each layer in units of `dim`.
        k: Directions.
        ssm: False leaves the scan and its parameters out.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self, dim: int, d_state: int, d_conv: int, expand: float, k: int, ssm: bool = True, device=None, dtype=None
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.k, self.inner = k, int(expand * dim)
        self.in_proj = nn.Linear(dim, k * 2 * self.inner, bias=False, **dd)
        self.conv = CausalConv1d(k, self.inner, d_conv, **dd)
        self.ssm = SelectiveSSM(self.inner, d_state, resolve_dt_rank("auto", dim), k, **dd) if ssm else None
        self.out_proj = nn.Linear(k * self.inner, dim, bias=False, **dd)
        # One weight for all directions, but each starts as a layer of its own.
        nn.init.uniform_(self.out_proj.weight, -(self.inner**-0.5), self.inner**-0.5)

    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        """Tokens `(b, l, dim)`, visited by `order` `(k, m)`, to `(b, l, dim)`."""
        x, z = self.in_proj(x).unflatten(-1, (self.k, 2, self.inner)).unbind(-2)
        u = self.conv(x, order)
        y = u * F.silu(z) if self.ssm is None else self.ssm(u, z, order)
        return self.out_proj(y.to(u.dtype).flatten(2))


class Block(nn.Module):
    """Mixer and MLP, each followed by a norm of its sum with the input.

    Args:
        dim: Width.
        mixer: Takes `(x, order)`.
        d_ff: Hidden width of the MLP.
        dropout: After the activation and the output of the MLP.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, dim: int, mixer: nn.Module, d_ff: int, dropout: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.mixer = mixer
        self.norm1 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, d_ff, drop=dropout, **dd)
        self.norm2 = LayerNorm(dim, **dd)

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        """Tokens `(b, l, dim)` to tokens."""
        x = self.norm1(x + self.mixer(x, order))
        return self.norm2(x + self.mlp(x))


class SMamba(SeriesModel):
    """S-Mamba: every variate is one token, which a linear layer makes of its whole window.

    Args:
        in_chans: Variates v.
        seq_len: Steps of a window.
        pred_len: Steps to forecast; 0 is the window itself.
        num_classes: Classes; 0 forecasts.
        dim: Width.
        depth: Blocks.
        d_ff: Hidden width of the MLPs; None is `dim`.
        d_state: States n.
        d_conv: Taps of the convolution.
        expand: Inner width of the mixers in units of `dim`.
        scan: Order of the variates, on the grid `(v,)`: "bidirectional" as they are stored, or any other of
            `mamba_zoo.scans`; see `scans.correlation_scan`. Each direction has a mixer of its own. Marks are tokens
            after the variates: the grid is then `(v + marks,)`. "none" keeps the convolutions but scans nothing.
        use_norm: Normalise every window.
        dropout: In the embedding and the MLPs.
        drop_rate: Dropout before the classifier.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: a size or a scan that is not possible.
    """

    def __init__(
        self,
        in_chans: int = 7,
        seq_len: int = 96,
        pred_len: int = 96,
        num_classes: int = 0,
        dim: int = 256,
        depth: int = 2,
        d_ff: int | None = None,
        d_state: int = 2,
        d_conv: int = 2,
        expand: float = 1,
        scan: ScanLike = "bidirectional",
        use_norm: bool = True,
        dropout: float = 0.1,
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        super().__init__(in_chans, seq_len, pred_len, num_classes, dim, use_norm=use_norm, drop_rate=drop_rate, **dd)
        self.scan, k, ssm = series_scan(scan, "bidirectional", in_chans)
        self.embed = nn.Linear(seq_len, dim, **dd)
        self.embed_drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim, ApartMamba(dim, d_state, d_conv, expand, k, ssm, **dd), d_ff or dim, dropout, **dd)
            for _ in range(depth)
        )
        self.norm = LayerNorm(dim, **dd)

    def encode(self, x: Tensor, marks: Tensor | None = None) -> Tensor:
        """Windows `(b, l, v)` and marks `(b, l, m)` to tokens `(b, v + m, dim)`."""
        if marks is not None and (marks.dim() != 3 or marks.shape[:2] != x.shape[:2]):
            raise ValueError(f"marks must be (b, l, m) of the windows {tuple(x.shape)}, not {tuple(marks.shape)}")
        series = x if marks is None else torch.cat([x, marks.to(x.dtype)], dim=-1)
        tokens = self.embed_drop(self.embed(series.transpose(1, 2)))
        order = scan_order(self.scan, (tokens.shape[1],), tokens.device)
        for block in self.blocks:
            tokens = checkpoint(block, tokens, order) if self.grad_checkpointing else block(tokens, order)
        return self.norm(tokens)

    def forecast(self, tokens: Tensor) -> Tensor:
        """Tokens `(b, v + m, dim)` to `(b, pred_len, v)`."""
        return self.head(tokens[:, : self.in_chans]).transpose(1, 2)


KEYS = [
    Key(r"^enc_embedding\.value_embedding\.", "embed."),
    Key(r"^encoder\.attn_layers\.(\d+)\.", r"blocks.\1."),
    Key(r"\.attention\.", ".mixer.", 0),
    Key(r"\.attention_r\.", ".mixer.", 1),
    Key(r"mixer\.A_log$", "mixer.ssm.A_log"),
    Key(r"mixer\.D$", "mixer.ssm.D"),
    Key(r"mixer\.conv1d\.weight$", "mixer.conv.weight", None, lambda weight: weight.squeeze(1)),
    Key(r"mixer\.conv1d\.bias$", "mixer.conv.bias"),
    Key(r"mixer\.x_proj\.weight$", "mixer.ssm.x_proj.weight"),
    Key(r"mixer\.dt_proj\.weight$", "mixer.ssm.dt_proj.weight"),
    Key(r"mixer\.dt_proj\.bias$", "mixer.ssm.dt_bias"),
    Key(r"\.conv1\.weight$", ".mlp.fc1.weight", None, lambda weight: weight.squeeze(-1)),
    Key(r"\.conv1\.bias$", ".mlp.fc1.bias"),
    Key(r"\.conv2\.weight$", ".mlp.fc2.weight", None, lambda weight: weight.squeeze(-1)),
    Key(r"\.conv2\.bias$", ".mlp.fc2.bias"),
    Key(r"^encoder\.norm\.", "norm."),
    Key(r"^projector\.", "head."),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict in our names, without the layers that the published model never uses."""
    state = rename({key: value for key, value in state_dict.items() if not re.match(DEAD, key)}, KEYS)
    if not any(key.startswith("encoder.") for key in state_dict):
        return state  # our own names
    for key, weight in state.items():
        if key.endswith("mixer.in_proj.weight"):  # (k, 2 inner, dim), one layer after another
            state[key] = weight.flatten(0, 1)
        elif key.endswith("mixer.out_proj.weight"):  # (k, dim, inner): inputs one after another
            state[key] = weight.transpose(0, 1).flatten(1)
    return state


@register(
    Card(
        "series",
        "wzhwzhwzh0921/S-D-Mamba@e7e8bf040661 model/S_Mamba.py",
        "unlicensed",
        "2403.11144",
        1_145_696,
        notes="No licence was published; this is written from the paper. No trained weights were published. The "
        "published count of 1,150,624 includes 4,928 parameters that no output depends on.",
    ),
    num_classes=-1,
    input_size=None,
    classifier="head",
)
def s_mamba(pretrained: bool = False, published: str | None = None, **kwargs: Any) -> SMamba:
    """S-Mamba: windows `(b, 96, 7)` and marks `(b, 96, 4)` to `(b, 96, 7)`, or other sizes as given.

    `published` takes the settings of the paper for a data set, steps read and steps forecast, such as "etth1_96_720":
    see `_series_published.PUBLISHED`. Published test errors of ETTh1 at 96, 192, 336 and 720 steps: 0.386, 0.443, 0.489
    and 0.502.
    """
    arguments = {**published_arguments("s_mamba", published), **kwargs}
    return build_model(SMamba, "s_mamba", pretrained, checkpoint_filter_fn, **arguments)


# torch.fx takes the mixer whole: it looks at shapes.
register_notrace_module(ApartMamba)
torch.fx.wrap("scan_order")

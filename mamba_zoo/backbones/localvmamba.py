"""LocalVMamba: VMamba's first version with four directions chosen for every block. Huang et al. 2024, arXiv:2403.09338.

Follows the arithmetic of hunto/LocalMamba@75e5d1f007c3 classification/lib/models/local_vmamba.py (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers._fx import register_notrace_module
from timm.layers.drop import calculate_drop_path_rates
from torch import Tensor, nn

from ..scans import ScanLike, scan_order
from ._base import Pyramid, Stage
from ._embed import PatchMerge, PatchStem
from ._init import init_linear_
from ._keys import Key, rename
from ._local import COLUMNS_NOTE, DEFAULT, BlockScan, DirectionMerge, block_scans
from ._map_block import MapBlock
from ._mixer import SS2D
from ._register import Card, build_model, image_cfg, register
from ._ssm import SelectiveSSM
from .vmamba import KEYS as VMAMBA_KEYS
from .vmamba import STEM_KEYS


class LocalSS2D(SS2D):
    """VMamba's gated mixer, the channels of every direction weighed before they are summed.

    Args:
        dim: Model width.
        scan: Its directions.
        d_state: States n.
        ssm_ratio: Inner width in units of `dim`.
        dt_rank: Rank of the step projection; "auto" is one sixteenth of `dim`, rounded up.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        scan: BlockScan,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | str = "auto",
        device=None,
        dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        super().__init__(dim, d_state, ssm_ratio, dt_rank, scan.spec, scan.k, gate=True, conv_bias=True, **dd)
        self.merge = DirectionMerge(int(ssm_ratio * dim), scan.columns, **dd) if scan.k else nn.Identity()

    def visit(self, ssm: SelectiveSSM, u: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens `(b, l, inner)` of a grid `(h, w)` to the weighed sum of their directions."""
        return self.merge(ssm(u, order=scan_order(self.scan, grid, u.device)), grid)


class LocalVMamba(Pyramid):
    """LocalVMamba: stages of gated scans in rows, columns and windows, without MLPs.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 returns the pooled features.
        global_pool: As for timm's `ClassifierHead`; "" does not pool.
        depths: Blocks per stage.
        dims: Width of each stage, or of the first one, doubled from stage to stage.
        d_state: States n.
        ssm_ratio: Inner width of the mixer in units of its stage's width.
        dt_rank: Rank of the step projection; "auto" is one sixteenth of the stage's width, rounded up.
        patch_size: Pixels per side of a position of the first stage.
        directions: Names for the scan "local", one list for all blocks or one list for each.
        scan: Instead of `directions`, one scan for all blocks: a name, a specification, a `Scan` or a function; see
            `mamba_zoo.scans`. "none" leaves the scan, its parameters and the weights of its directions out of every
            block, as a control.
        published_columns: On maps that are not square, misplace the outputs of "v" and "v_flip" as the published code
            does; see `DirectionMerge`. Square maps are the same either way.
        out_norm: Norm the output of every stage for `features_only`, as the published detection backbones do.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Rate of the last block; rates rise linearly from 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: an unknown direction or scan, another number of lists of directions than blocks, numbers of depths
            and dims that differ, or `published_columns` with a `scan`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 9, 2),
        dims: int | Sequence[int] = 96,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | str = "auto",
        patch_size: int = 4,
        directions: Sequence[str] | Sequence[Sequence[str]] = DEFAULT,
        scan: ScanLike | None = None,
        published_columns: bool = False,
        out_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        if len(dims) != len(depths):
            raise ValueError(f"depths={tuple(depths)} and dims={tuple(dims)} must give as many stages")
        scans = iter(block_scans(sum(depths), directions, scan, published_columns))
        mixer = partial(LocalSS2D, d_state=d_state, ssm_ratio=ssm_ratio, dt_rank=dt_rank, **dd)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = [
            Stage(
                PatchMerge(dims[i - 1], dim, **dd) if i else None,
                [MapBlock(dim, partial(mixer, scan=next(scans)), 0.0, rate, **dd) for rate in rates[i]],
            )
            for i, dim in enumerate(dims)
        ]
        super().__init__(
            PatchStem(in_chans, dims[0], patch_size, **dd),
            stages,
            dims,
            [patch_size * 2**i for i in range(len(dims))],
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            out_norm,
            smallest=patch_size,
            **dd,
        )
        self.apply(init_linear_)


KEYS = [
    *VMAMBA_KEYS,
    *STEM_KEYS[PatchStem],
    Key(r"\.mixer\.multi_scan\.attn\.norm\.", ".mixer.merge.gate.norm."),
    Key(r"\.mixer\.multi_scan\.attn\.global_reduce\.", ".mixer.merge.gate.reduce."),
    Key(r"\.mixer\.multi_scan\.attn\.channel_select\.", ".mixer.merge.gate.select."),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict, of classifiers or of detection backbones, in our names."""
    return rename(state_dict, KEYS)


# What the authors' search found, block by block.
TINY = [
    ("h", "h_flip", "w7", "w7_flip"),
    ("h_flip", "v_flip", "w2", "w2_flip"),
    ("h_flip", "v_flip", "w2_flip", "w7"),
    ("h_flip", "v", "v_flip", "w2"),
    ("h", "h_flip", "v_flip", "w2_flip"),
    ("h_flip", "v_flip", "w2", "w2_flip"),
    ("h", "w2_flip", "w7", "w7_flip"),
    ("h", "h_flip", "v", "v_flip"),
    ("h", "v_flip", "w7", "w7_flip"),
    ("h_flip", "v", "w2", "w7_flip"),
    ("v", "v_flip", "w2", "w7_flip"),
    ("h", "h_flip", "v_flip", "w2_flip"),
    ("v_flip", "w2_flip", "w7", "w7_flip"),
    ("h_flip", "v_flip", "w2_flip", "w7_flip"),
    ("h_flip", "v", "w7", "w7_flip"),
]
SMALL = [
    ("h", "v", "v_flip", "w7_flip"),
    ("h", "h_flip", "v", "w7"),
    ("h_flip", "v", "v_flip", "w7"),
    ("h_flip", "v", "w2_flip", "w7"),
    ("h_flip", "v", "w2_flip", "w7"),
    ("h_flip", "v_flip", "w2", "w7_flip"),
    ("h_flip", "v", "v_flip", "w7"),
    ("h", "v", "v_flip", "w7"),
    ("h", "v", "v_flip", "w7"),
    ("h", "v", "v_flip", "w7_flip"),
    ("h", "h_flip", "v", "v_flip"),
    ("h", "v", "v_flip", "w2"),
    ("v", "v_flip", "w2_flip", "w7"),
    ("h", "h_flip", "v", "w2"),
    ("h_flip", "v", "v_flip", "w7_flip"),
    ("h", "h_flip", "v", "v_flip"),
    ("h", "v", "v_flip", "w7_flip"),
    ("h", "v", "v_flip", "w7_flip"),
    ("h", "h_flip", "v_flip", "w7"),
    ("h_flip", "v_flip", "w2_flip", "w7"),
    ("h_flip", "v", "v_flip", "w7_flip"),
    ("v", "v_flip", "w7", "w7_flip"),
    ("h", "v", "v_flip", "w7_flip"),
    ("h_flip", "v", "v_flip", "w2"),
    ("h", "v", "v_flip", "w2_flip"),
    ("h", "h_flip", "v", "w7"),
    ("h", "h_flip", "w7", "w7_flip"),
    ("h", "v_flip", "w2", "w2_flip"),
    ("h", "v_flip", "w2", "w7"),
    ("h", "v", "v_flip", "w7_flip"),
    ("h_flip", "v", "w2_flip", "w7"),
    ("h_flip", "v_flip", "w7", "w7_flip"),
    ("h", "v", "w7", "w7_flip"),
]

_CFG = image_cfg("stem.proj", "head.fc", pool_size=(7, 7))
_RELEASE = "https://github.com/hunto/LocalMamba/releases/download/v1.0.0"
_card = partial(
    Card,
    "image",
    "hunto/LocalMamba@75e5d1f007c3 classification/lib/models/local_vmamba.py",
    "Apache-2.0",
    "2403.09338",
    convention="whole scan",
)


def _build(name: str, pretrained: bool, **kwargs: Any) -> LocalVMamba:
    return build_model(LocalVMamba, name, pretrained, checkpoint_filter_fn, **kwargs)


@register(
    _card(
        25_527_160,
        5.7,
        82.7,
        0.2,
        notes=f"The published configurations name local_vssm_tiny.ckpt; the release does not have it. {COLUMNS_NOTE}",
    ),
    tag="in1k",
    **_CFG,
)
def local_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """LocalVMamba-T: 26 M parameters, 82.7 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("local_vmamba_tiny", pretrained, **{"directions": TINY, **kwargs})


@register(
    _card(
        49_748_536,
        11.4,
        83.7,
        0.2,
        checkpoint="local_vssm_small.ckpt",
        url=f"{_RELEASE}/local_vssm_small.ckpt",
        notes=COLUMNS_NOTE,
    ),
    tag="in1k",
    **_CFG,
)
def local_vmamba_small(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """LocalVMamba-S: 50 M parameters, 83.7 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("local_vmamba_small", pretrained, **{"depths": (2, 2, 27, 2), "directions": SMALL, **kwargs})


# torch.fx takes it whole: it looks at shapes and dtypes. Not as a decorator, which would hide its type.
register_notrace_module(LocalSS2D)

"""PointMamba's first version: patches sorted along x, y and z; also for part segmentation. arXiv:2402.10739v1.

Follows the arithmetic of LMD0311/PointMamba@ff34a07e9237 (branch old) models/point_mamba.py and
part_segmentation/models/pt_mamba.py (Apache-2.0).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..scans._cloud import PointScanLike
from ._block import LayerNorm
from ._keys import Key, rename
from ._point_model import PointHead, build_point_model, mark_published, pointwise, run_blocks, told_shapes
from ._points import interpolate_points
from ._register import Card, register
from .pointmamba import KEYS, PointMamba
from .pointmamba import checkpoint_filter_fn as _classifier_filter

SCAN = "join(sort_x, sort_y, sort_z)"


class PointMambaV1(PointMamba):
    """PointMamba without an order indicator, and with a second norm after the final one.

    Args:
        num_classes: Classes; 0 returns what the classifier would read.
        groups: Patches.
        group_size: Points of a patch.
        dim: Width.
        depth: Blocks.
        d_state: States n.
        d_conv: Taps of the convolution.
        expand: Inner width of the mixer in units of `dim`.
        dt_rank: Rank of the step projection.
        scan: Orders of the patches, as for `PointMamba`; this version sorts along each axis.
        order_indicator: Whether every direction has a scale and a shift of its own.
        hidden: Widths of the head before the classifier.
        drop_rate: Dropout in the head.
        drop_path_rate: Stochastic depth of the last block.
        published: See `PointMamba`; matters for part segmentation only.
        skip_origin: See `PointMamba`.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        num_classes: int = 40,
        groups: int = 64,
        group_size: int = 32,
        dim: int = 384,
        depth: int = 12,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        scan: PointScanLike = SCAN,
        order_indicator: bool = False,
        hidden: tuple[int, ...] = (256, 256),
        drop_rate: float = 0.5,
        drop_path_rate: float = 0.0,
        published: bool | None = None,
        skip_origin: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__(
            num_classes, groups, group_size, dim, depth, d_state, d_conv, expand, dt_rank, scan, order_indicator,
            hidden, drop_rate, drop_path_rate, published, skip_origin, device, dtype,
        )  # fmt: skip
        self.out_norm = LayerNorm(dim, device=device, dtype=dtype)

    after_encoder = ("head.", "out_norm.", "propagate.", "shape_embed.")

    def default_scan(self) -> str:
        """The orders of the published model."""
        return SCAN

    def finish(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """The sum that a pair stands for, normed twice."""
        return self.out_norm(super().finish(hidden, residual))


class PointMambaV1Parts(PointMambaV1):
    """A part for every point: features of three blocks, interpolated from the patches to the points.

    A published model outputs the logarithm of the softmax of these logits.

    Args:
        num_classes: Parts, of all shapes together.
        num_shapes: Shapes whose label the model is told; 0 tells it nothing.
        groups: Patches.
        group_size: Points of a patch.
        dim: Width.
        depth: Blocks.
        d_state: States n.
        scan: Orders of the patches, as for `PointMamba`.
        order_indicator: Whether every direction has a scale and a shift of its own.
        taps: Blocks whose outputs are taken, counted from 0.
        widths: Of the two layers of the interpolation, and of the two before the classifier.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block.
        published: Interpolate between the tokens of all directions as if they were so many patches, as the published
            code does: the three nearest are then the copies of one centre. Otherwise a patch has the mean of its
            tokens, and a point has features of its three nearest patches. None follows the weights.
        skip_origin: See `PointMamba`.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: a tap that is no block.
    """

    def __init__(
        self,
        num_classes: int = 50,
        num_shapes: int = 16,
        groups: int = 128,
        group_size: int = 32,
        dim: int = 384,
        depth: int = 12,
        d_state: int = 16,
        scan: PointScanLike = SCAN,
        order_indicator: bool = False,
        taps: tuple[int, ...] = (3, 7, 11),
        widths: tuple[int, int, int, int] = (1536, 1024, 512, 256),
        drop_rate: float = 0.5,
        drop_path_rate: float = 0.0,
        published: bool | None = None,
        skip_origin: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__(
            0, groups, group_size, dim, depth, d_state, scan=scan, order_indicator=order_indicator, hidden=(),
            drop_path_rate=drop_path_rate, published=published, skip_origin=skip_origin, device=device, dtype=dtype,
        )  # fmt: skip
        dd: Any = {"device": device, "dtype": dtype}
        if not taps or not all(0 <= tap < depth for tap in taps):
            raise ValueError(f"taps={taps} must be blocks of a model of {depth}, counted from 0")
        self.taps, self.num_shapes = tuple(taps), num_shapes
        inner, outer, *hidden = widths
        width = len(taps) * dim
        shape_width = 64 if num_shapes else 0
        self.shape_embed = (
            nn.Sequential(
                nn.Linear(num_shapes, 64, bias=False, **dd), nn.BatchNorm1d(64, **dd), nn.LeakyReLU(0.2, inplace=True)
            )
            if num_shapes
            else None
        )
        self.propagate = nn.Sequential(
            nn.Linear(3 + width, inner, **dd), nn.BatchNorm1d(inner, **dd), nn.ReLU(inplace=True),
            nn.Linear(inner, outer, **dd), nn.BatchNorm1d(outer, **dd), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.num_classes = num_classes
        self.head = PointHead(outer + 2 * width + shape_width, num_classes, hidden, drop_rate, **dd)
        self.head.hidden[7] = nn.Identity()  # the published head drops only after its first layer
        self.head_hidden_size = self.head.num_features

    def forward_features(self, x: Tensor) -> Tensor:
        """Clouds `(b, n, 3)` to what the classifier's head reads of every point but for its shape's label."""
        tokens, order, centres = self.embed(x)
        _, _, found = run_blocks(self, tokens, order, self.taps)
        streams = [self.out_norm(self.norm(found[tap])).to(tokens.dtype) for tap in self.taps]
        features = torch.cat(streams, dim=-1)
        whole = torch.cat([features.amax(1), features.mean(1)], dim=-1)
        if self.published:
            near = interpolate_points(x, centres.repeat(1, self.k, 1), features)
        else:
            near = interpolate_points(x, centres, features.unflatten(1, (self.k, -1)).mean(1))
        points = self.propagate(torch.cat([x.to(near.dtype), near], dim=-1).flatten(0, 1)).unflatten(0, x.shape[:2])
        return torch.cat([points, whole[:, None].expand(-1, x.shape[1], -1)], dim=-1)

    def forward(self, x: Tensor, shape: Tensor | None = None) -> Tensor:
        """Parts of clouds.

        Args:
            x: Points `(b, n, 3)`.
            shape: Label `(b,)` of each cloud's shape, from 0 to `num_shapes - 1`.

        Returns: Logits `(b, n, num_classes)`.

        Raises:
            ValueError: the label is missing, or given to a model that is not told any.
        """
        label = told_shapes(shape, len(x), self.num_shapes)
        features = self.forward_features(x)
        if label is not None and self.shape_embed is not None:
            told = self.shape_embed(label.to(features.dtype))
            features = torch.cat([features, told[:, None].expand(-1, x.shape[1], -1)], dim=-1)
        return self.head(features)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify the points of a model that is told no label of the shape."""
        return self.head(x, pre_logits)


_SEGMENTATION = [
    Key(r"^label_conv\.(\d)\.", r"shape_embed.\1."),
    Key(r"^propagation_0\.mlp_convs\.(\d)\.", lambda found: f"propagate.{3 * int(found[1])}."),
    Key(r"^propagation_0\.mlp_bns\.(\d)\.", lambda found: f"propagate.{3 * int(found[1]) + 1}."),
    Key(r"^convs([12])\.", lambda found: f"head.hidden.{4 * int(found[1]) - 4}."),
    Key(r"^bns([12])\.", lambda found: f"head.hidden.{4 * int(found[1]) - 3}."),
    Key(r"^convs3\.", "head.fc."),
    Key(r"^((shape_embed\.0|propagate\.[03]|head\.hidden\.[04]|head\.fc)\.weight)$", r"\1", convert=pointwise),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict of the classifier or of the part segmentation in our names."""
    if "convs3.weight" in state_dict:
        return mark_published(rename(state_dict, [*KEYS, *_SEGMENTATION]), model, True)
    return _classifier_filter(state_dict, model)


_RELEASE = "https://github.com/LMD0311/PointMamba/releases/download/ckpts"
_SOURCE = "LMD0311/PointMamba@ff34a07e9237 models/point_mamba.py"


def _card(params: int, file: str, notes: str, drop_path: float | None = None, source: str = _SOURCE) -> Card:
    return Card(
        "points", source, "Apache-2.0", "2402.10739", params, drop_path=drop_path, checkpoint=file,
        url=f"{_RELEASE}/{file}", notes=notes,
    )  # fmt: skip


_CFG: dict[str, Any] = {"input_size": None, "classifier": "head.fc"}


@register(
    _card(12_297_000, "modelnet_pretrain.pth", "ModelNet40: 93.6 % pre-trained; tag scratch: 92.4 (published).", 0.3),
    tag="modelnet40",
    others={"scratch": {"url": f"{_RELEASE}/modelnet_scratch.pth"}},
    num_classes=40,
    **_CFG,
)
def pointmamba_v1(pretrained: bool = False, **kwargs: Any) -> PointMambaV1:
    """PointMamba's first version for ModelNet40: 12 M parameters, 92.4 % from scratch, 93.6 % pre-trained (paper)."""
    return build_point_model(PointMambaV1, "pointmamba_v1", pretrained, checkpoint_filter_fn, **kwargs)


@register(
    _card(12_290_575, "scan_hardest_pretrain.pth", "ScanObjectNN PB_T50_RS, 2,048 points: 84.87 % pre-trained."),
    tag="hardest",
    num_classes=15,
    **_CFG,
)
def pointmamba_v1_scanobjectnn(pretrained: bool = False, **kwargs: Any) -> PointMambaV1:
    """PointMamba's first version for ScanObjectNN: 128 patches, 15 classes; 84.87 % on PB_T50_RS (paper)."""
    args = {"num_classes": 15, "groups": 128, **kwargs}
    return build_point_model(PointMambaV1, "pointmamba_v1_scanobjectnn", pretrained, checkpoint_filter_fn, **args)


@register(
    _card(
        17_360_050,
        "part_seg_pretrain.pth",
        "ShapeNetPart, 2,048 points: instance mIoU 86.0 pre-trained; tag scratch: 85.8 (published).",
        0.2,
        "LMD0311/PointMamba@ff34a07e9237 part_segmentation/models/pt_mamba.py",
    ),
    tag="shapenetpart",
    others={"scratch": {"url": f"{_RELEASE}/part_seg_scratch.pth"}},
    num_classes=50,
    **_CFG,
)
def pointmamba_v1_parts(pretrained: bool = False, **kwargs: Any) -> PointMambaV1Parts:
    """PointMamba's first version for parts of ShapeNet: 17 M parameters, 86.0 % instance mIoU pre-trained (paper)."""
    return build_point_model(PointMambaV1Parts, "pointmamba_v1_parts", pretrained, checkpoint_filter_fn, **kwargs)


@register(
    Card("points", "mamba_zoo", "Apache-2.0", "2402.10739", 1_313_778, notes="Not published: for small sets."),
    num_classes=50,
    **_CFG,
)
def pointmamba_mini_parts(pretrained: bool = False, **kwargs: Any) -> PointMambaV1Parts:
    """Part segmentation of our own for small sets of clouds: `pointmamba_mini` with a decoder."""
    args = {
        "groups": 96, "group_size": 24, "dim": 128, "depth": 6, "d_state": 8, "taps": (1, 3, 5),
        "scan": "join(hilbert, hilbert_trans)", "order_indicator": True, "widths": (256, 128, 128, 64), **kwargs,
    }  # fmt: skip
    return build_point_model(PointMambaV1Parts, "pointmamba_mini_parts", pretrained, checkpoint_filter_fn, **args)

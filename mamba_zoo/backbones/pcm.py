"""PCM (Point Cloud Mamba): a pyramid of points, each layer along another order. Zhang et al. 2024, arXiv:2403.00762.

Follows the arithmetic of SkyworkAI/PointCloudMamba@57fdb29d3cf1 openpoints/models/PCM/PCM.py (no licence stated).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers.drop import calculate_drop_path_rates
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from ..scans._cloud import PointScanLike, cloud_order, cloud_spec, rows_of, with_option
from ._keys import Key, rename
from ._pcm_layers import PCMStage, PointLinear, ResidualPoints
from ._point_model import (
    PointBackbone,
    PointHead,
    build_point_model,
    mark_published,
    mixer_keys,
    pointwise,
    told_shapes,
)
from ._point_windows import PointStream, place_in_window, whole_windows
from ._points import interpolate_points, take_points
from ._register import Card, register

_NINE = (
    "cts('xyz')", "cts('xzy')", "cts('yxz')", "cts('yzx')", "cts('zxy')", "cts('zyx')", "hilbert", "zcurve",
    "zcurve_trans",
)  # fmt: skip
SCAN = f"join({', '.join(_NINE)})"
TINY_SCAN = f"join({', '.join(_NINE[:6])})"
ROOM_SCAN = f"join({', '.join(with_option(row, 'cell=0.04') for row in _NINE)})"


class PCM(PointBackbone):
    """Stages that halve the points; every layer visits them along its own order, told by a prompt which it is.

    Args:
        num_classes: Classes; 0 returns what the classifier would read.
        in_chans: Numbers per point that are embedded; 3 are the coordinates.
        dim: Width of the embedding.
        dim_expansion: Factor of the width at each stage.
        depths: Mixers of each stage.
        pre_blocks: Residual layers on gathered points in each stage.
        neighbours: Points that each point gathers, in each stage.
        reducers: One of so many points is kept, in each stage.
        scan: Orders of the points, see `scans.points`: the mixers take its directions in turn.
        prompts: Tokens that tell a mixer its order, on either side; 0 has none.
        prompt_dim: Their width.
        d_state: States n.
        hidden: Widths of the head before the classifier.
        drop_rate: Dropout in the head.
        drop_path_rate: Stochastic depth of the last mixer.
        windows: For each stage, mix so many successive points of the sequence at a time, their coordinates counted from
            0 to 1 within each window; points that fill no window are left out, see `whole_windows`. None mixes all at
            once.
        combine_xyz: Whether coordinates are put after the features before they are embedded; `in_chans` counts both.
        published: Serialize as the published code does: the snakes reduced to sorts along their first axis, with many
            ties, and decided, like the depth of Hilbert's curve, by the whole batch. None follows the weights.
            Their prompts may be numbered in another way, see `prompt_rows`. Coordinates in windows are then scaled for
            each point by itself, as published.
        prompt_rows: For each direction of `scan`, the number of the prompts that it reads; None numbers them alike. In
            published weights the numbering follows the hashes of strings in the process that trained them: which one it
            was is found by validation scores.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: an unknown scan, settings of different numbers of stages, or prompts that do not exist.
    """

    def __init__(
        self,
        num_classes: int = 40,
        in_chans: int = 3,
        dim: int = 384,
        dim_expansion: Sequence[int] = (1, 1, 2, 1),
        depths: Sequence[int] = (1, 2, 2, 4),
        pre_blocks: Sequence[int] = (1, 1, 1, 1),
        neighbours: Sequence[int] = (12, 12, 12, 12),
        reducers: Sequence[int] = (1, 2, 2, 2),
        scan: PointScanLike = SCAN,
        prompts: int = 6,
        prompt_dim: int = 384,
        d_state: int = 16,
        hidden: tuple[int, ...] = (512, 256),
        drop_rate: float = 0.5,
        drop_path_rate: float = 0.1,
        windows: Sequence[int] | None = None,
        combine_xyz: bool = False,
        published: bool | None = None,
        prompt_rows: Sequence[int] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__(num_classes, published, in_chans)
        dd: Any = {"device": device, "dtype": dtype}
        sizes = {len(v) for v in (dim_expansion, depths, pre_blocks, neighbours, reducers, windows or depths)}
        if len(sizes) > 1:
            raise ValueError(
                f"dim_expansion, depths, pre_blocks, neighbours, reducers and windows have {sorted(sizes)} stages"
            )
        self.scan = cloud_spec(scan)
        rates: list[float] = calculate_drop_path_rates(drop_path_rate, sum(depths))  # type: ignore[assignment]
        self.rows = rows_of(self.scan)[: sum(depths)]
        numbers = list(range(len(self.rows)))
        self.prompt_rows = numbers if prompt_rows is None else list(prompt_rows)
        if sorted(self.prompt_rows) != numbers:
            raise ValueError(f"prompt_rows={prompt_rows} must be an arrangement of {numbers}, one for each direction")
        self.prompts, self.windows, self.combine_xyz = prompts, windows, combine_xyz
        self.embedding = PointLinear(in_chans, dim, **dd)
        self.order_prompt = nn.Parameter(torch.empty(prompts * len(self.rows), prompt_dim, **dd))
        dims = [dim]
        for factor in dim_expansion:
            dims.append(dims[-1] * factor)
        self.stages = nn.ModuleList(
            PCMStage(
                dims[i], dims[i + 1], reducers[i], neighbours[i], pre_blocks[i],
                rates[sum(depths[:i]) : sum(depths[: i + 1])], i > 0 and dims[i] != dims[i + 1], prompt_dim, d_state,
                **dd,
            )
            for i in range(len(depths))
        )  # fmt: skip
        self.dims, self.num_features = dims, dims[-1]
        self.head = PointHead(dims[-1], num_classes, hidden, drop_rate, bias=False, **dd)
        self.head_hidden_size = self.head.num_features
        trunc_normal_(self.order_prompt, std=0.02)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by stage."""
        return {"stem": r"^embedding|^order_prompt", "blocks": r"^stages\.(\d+)"}

    def published_row(self, spec: str) -> str:
        """The spec of a direction as the published code computes it."""
        extra = {"cts": "published=True", "hilbert": "shared_depth=True", "hilbert_trans": "shared_depth=True"}
        name = spec.partition("(")[0]
        return with_option(spec, extra[name]) if name in extra else spec

    def pyramid(self, x: Tensor, features: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Coordinates and features of the points after the embedding and after every stage.

        Args:
            x: Points `(b, n, 3)`.
            features: `(b, n, in_chans)`; None takes the coordinates.

        Returns:
            `(b, n_i, 3)` and `(b, n_i, dims[i])` for each, the points of a stage along its last order.

        Raises:
            ValueError: clouds or features of another shape.
        """
        self.check(x)
        chans = self.in_chans - 3 if self.combine_xyz else self.in_chans
        if features is None and chans in (0, 3):
            features = x[..., :chans]
        if features is None or features.shape != (*x.shape[:2], chans):
            found = None if features is None else tuple(features.shape)
            raise ValueError(f"features must be {(*x.shape[:2], chans)} to go with clouds, not {found}")
        if self.combine_xyz:
            features = torch.cat([features, x], dim=-1) if chans else x
        points, tokens = [x], [self.embedding(features.to(self.embedding.proj.weight.dtype))]
        stream, layer = PointStream(points[0], tokens[0]), 0
        stages = cast("Sequence[PCMStage]", self.stages)
        for stage, window in zip(stages, self.windows or [None] * len(stages), strict=True):
            stream = stage.enter(stream)
            order = torch.arange(len(stream), device=x.device).expand(len(x), -1)
            for block in stage.blocks:
                number = layer % len(self.rows)
                spec, row = self.rows[number]
                spec = self.published_row(spec) if self.published else spec
                # The published code sorts what is sorted already, so that the order before decides between ties.
                order = order.gather(1, cloud_order(spec, take_points(stream.xyz, order))[:, row])
                first = self.prompt_rows[number] * self.prompts
                prompt = self.order_prompt[first : first + self.prompts]
                if window is not None and len(stream) > window:
                    stream = stream.take(order)
                    if len(stream) % window:
                        stream = stream.take(whole_windows(stream.xyz, window))
                    stream = self.mix_windows(stage, block, stream, window, prompt)
                    order = torch.arange(len(stream), device=x.device).expand(len(x), -1)
                else:
                    mixed = self.run(stage.mix, block, stream.xyz, stream.x, stream.residual, order, prompt)
                    stream = PointStream(stream.xyz, *mixed)
                layer += 1
            stream = stream.take(order)
            points.append(stream.xyz)
            tokens.append(stream.x)
        return points, tokens

    def mix_windows(
        self, stage: PCMStage, block: nn.Module, stream: PointStream, window: int, prompt: Tensor
    ) -> PointStream:
        """One mixer over windows of successive points, each read from its first point to its last."""
        parts = stream.cut(window)
        place = place_in_window(parts.xyz, self.published)
        along = torch.arange(window, device=place.device).expand(len(place), -1)
        mixed = self.run(stage.mix, block, place, parts.x, parts.residual, along, prompt)
        return PointStream(parts.xyz, *mixed).joined(len(stream.x))

    def forward_features(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        """Clouds `(b, n, 3)`, and features if the model takes any, to tokens `(b, m, num_features)`."""
        return self.pyramid(x, features)[1][-1]

    def pool(self, x: Tensor) -> Tensor:
        """The maximum over the points."""
        return x.amax(1)

    def forward(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        """Clouds `(b, n, 3)`, and features `(b, n, in_chans)` if that is not 3, to logits `(b, num_classes)`."""
        return self.forward_head(self.forward_features(x, features))


class PCMParts(PCM):
    """A label for every point, by interpolation up the pyramid; told the label of its shape, or not.

    Args:
        num_classes: Parts, of all shapes together.
        num_shapes: Shapes whose label the model is told; 0 tells it nothing.
        in_chans: Numbers per point that are embedded.
        dim: Width of the embedding.
        dim_expansion: Factor of the width at each stage.
        depths: Mixers of each stage.
        pre_blocks: Residual layers on gathered points in each stage.
        neighbours: Points that each point gathers, in each stage.
        reducers: One of so many points is kept, in each stage.
        decoder_dims: Widths on the way up.
        scan: Orders of the points, as for `PCM`.
        prompts: Tokens that tell a mixer its order, on either side.
        prompt_dim: Their width.
        d_state: States n.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last mixer.
        windows: See `PCM`.
        combine_xyz: See `PCM`.
        published: See `PCM`.
        prompt_rows: See `PCM`.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        num_classes: int = 50,
        num_shapes: int = 16,
        in_chans: int = 7,
        dim: int = 384,
        dim_expansion: Sequence[int] = (1, 1, 2, 1),
        depths: Sequence[int] = (1, 2, 2, 4),
        pre_blocks: Sequence[int] = (1, 1, 1, 1),
        neighbours: Sequence[int] = (12, 12, 12, 12),
        reducers: Sequence[int] = (2, 2, 2, 2),
        decoder_dims: Sequence[int] = (768, 384, 384, 384),
        scan: PointScanLike = SCAN,
        prompts: int = 6,
        prompt_dim: int = 384,
        d_state: int = 16,
        drop_rate: float = 0.5,
        drop_path_rate: float = 0.1,
        windows: Sequence[int] | None = None,
        combine_xyz: bool = False,
        published: bool | None = None,
        prompt_rows: Sequence[int] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__(
            0, in_chans, dim, dim_expansion, depths, pre_blocks, neighbours, reducers, scan, prompts, prompt_dim,
            d_state, (), drop_rate, drop_path_rate, windows, combine_xyz, published, prompt_rows, device, dtype,
        )  # fmt: skip
        dd: Any = {"device": device, "dtype": dtype}
        if len(decoder_dims) != len(depths):
            raise ValueError(f"decoder_dims={decoder_dims} must name {len(depths)} widths, one for each stage")
        self.num_shapes, self.num_classes = num_shapes, num_classes
        levels = self.dims[::-1]
        self.decoder = nn.ModuleList(
            nn.Sequential(PointLinear(above + beside, out, bias=True, **dd), ResidualPoints(out, bias=True, **dd))
            for above, beside, out in zip([levels[0], *decoder_dims[:-1]], levels[1:], decoder_dims, strict=True)
        )
        width = decoder_dims[-1]
        self.context = nn.ModuleList(PointLinear(level, 64, **dd) for level in levels)
        self.context_end = PointLinear(64 * len(levels), 64, **dd)
        self.shape_embed = (
            nn.Sequential(PointLinear(num_shapes, 64, **dd), PointLinear(64, 64, **dd)) if num_shapes else None
        )
        width += 128 if num_shapes else 64
        self.head = PointHead(3 * width, num_classes, (3 * width,), drop_rate, bias=False, **dd)
        self.head_hidden_size = self.head.num_features

    def forward_features(self, x: Tensor, features: Tensor | None = None, shape: Tensor | None = None) -> Tensor:
        """What the head reads of every point, `(b, n, d)`; arguments as for `forward`.

        Raises:
            ValueError: the label of the shape is missing, or given to a model that is not told any.
        """
        self.check(x)
        label = told_shapes(shape, len(x), self.num_shapes)
        points, tokens = self.pyramid(x, features)
        points, tokens = points[::-1], tokens[::-1]
        y = tokens[0]
        for i, layer in enumerate(self.decoder):
            y = layer(torch.cat([tokens[i + 1], interpolate_points(points[i + 1], points[i], y)], dim=-1))
        seen = [layer(level).amax(1) for layer, level in zip(self.context, tokens, strict=True)]
        told = [self.context_end(torch.cat(seen, dim=-1))]
        if label is not None and self.shape_embed is not None:
            told.append(self.shape_embed(label.to(y.dtype)))
        y = torch.cat([y, torch.cat(told, dim=-1)[:, None].expand(-1, y.shape[1], -1)], dim=-1)
        whole = torch.cat([y.amax(1), y.mean(1)], dim=-1)
        return torch.cat([y, whole[:, None].expand(-1, y.shape[1], -1)], dim=-1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify every point."""
        return self.head(x, pre_logits)

    def forward(  # type: ignore[override]
        self, x: Tensor, shape: Tensor | None = None, features: Tensor | None = None
    ) -> Tensor:
        """Parts of clouds.

        Args:
            x: Points `(b, n, 3)`.
            shape: Label `(b,)` of each cloud's shape, if the model is told it.
            features: `(b, n, in_chans)`, if that is not 3.

        Returns: Logits `(b, n, num_classes)`.
        """
        return self.forward_head(self.forward_features(x, features, shape))


def _layer(found: Any) -> str:
    return "proj." if found[1] == "0" else "norm."


KEYS = [
    Key(r"^encoder\.embedding\.", "embedding."),
    Key(r"^encoder\.order_prompt\.weight$", "order_prompt"),
    Key(r"^encoder\.(pos_proj|order_prompt_proj)\.(\d)\.", lambda f: f"stages.{f[2]}.{_PROJ[f[1]]}."),
    Key(r"^encoder\.local_grouper_list\.(\d)\.affine_(alpha|beta)$", r"stages.\1.\2", convert=lambda v: v.flatten()),
    Key(r"^encoder\.pre_blocks_list\.(\d)\.transfer\.", r"stages.\1.transfer."),
    Key(r"^encoder\.pre_blocks_list\.(\d)\.operation\.(\d)\.", r"stages.\1.pre.\2."),
    Key(r"^encoder\.residual_proj_blocks_list\.(\d)\.", r"stages.\1.residual_proj."),
    Key(r"^encoder\.mamba_blocks_list\.(\d)\.(\d)\.", r"stages.\1.blocks.\2."),
    Key(r"^decoder\.decode_list\.(\d)\.fuse\.", r"decoder.\1.0."),
    Key(r"^decoder\.decode_list\.(\d)\.extraction\.operation\.0\.", r"decoder.\1.1."),
    Key(r"^decoder\.cls_map\.", "shape_embed."),
    Key(r"^decoder\.gmp_map_list\.", "context."),
    Key(r"^decoder\.gmp_map_end\.", "context_end."),
    Key(r"(?<=\.)net\.(0|1)\.", _layer),
    Key(r"(?<=\.net1\.|\.net2\.)(0|1)\.", _layer),
    Key(r"^prediction\.head\.([02])\.([01])\.", lambda f: f"head.hidden.{2 * int(f[1]) + int(f[2])}."),
    Key(r"^prediction\.head\.4\.0\.", "head.fc."),
    Key(r"^head\.head\.0\.([01])\.", r"head.hidden.\1."),
    Key(r"^head\.head\.2\.0\.", "head.fc."),
    Key(r"^((?!stages\.\d\.blocks).*\.weight)$", r"\1", convert=lambda v: pointwise(v) if v.dim() == 3 else v),
    *mixer_keys(r"^(stages\.\d+\.blocks\.\d+\.mixer\.)"),
]
_PROJ = {"pos_proj": "pos_proj", "order_prompt_proj": "prompt_proj"}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict in our names."""
    published = any(name.startswith("encoder.mamba_blocks_list.") for name in state_dict)
    return mark_published(rename(state_dict, KEYS) if published else state_dict, model, published)


_CFG: dict[str, Any] = {"input_size": None, "classifier": "head.fc"}
_TINY: dict[str, Any] = {"dim": 192, "depths": (1, 1, 2, 2), "scan": TINY_SCAN}


def _card(params: int, notes: str) -> Card:
    return Card(
        "points", "SkyworkAI/PointCloudMamba@57fdb29d3cf1 openpoints/models/PCM/PCM.py", "none stated", "2403.00762",
        params, drop_path=0.1,
        notes=f"{notes} Weights are published, but under names that the repository does not say.",
    )  # fmt: skip


@register(_card(34_229_824, "ModelNet40, 1,024 points: 93.1 % (published)."), num_classes=40, **_CFG)
def pcm(pretrained: bool = False, **kwargs: Any) -> PCM:
    """PCM for ModelNet40: 34 M parameters, 93.1 % of 40 classes (official README)."""
    return build_point_model(PCM, "pcm", pretrained, checkpoint_filter_fn, **kwargs)


@register(_card(6_950_656, "ModelNet40, 1,024 points: 93.3 % (published)."), num_classes=40, **_CFG)
def pcm_tiny(pretrained: bool = False, **kwargs: Any) -> PCM:
    """PCM-Tiny for ModelNet40: 7 M parameters, 93.3 % of 40 classes (official README)."""
    return build_point_model(PCM, "pcm_tiny", pretrained, checkpoint_filter_fn, **{**_TINY, **kwargs})


@register(_card(34_223_783, "ScanObjectNN PB_T50_RS, with height: 88.0 % (published)."), num_classes=15, **_CFG)
def pcm_scanobjectnn(pretrained: bool = False, **kwargs: Any) -> PCM:
    """PCM for ScanObjectNN, from coordinates and height: 88.0 % on PB_T50_RS (official README)."""
    args = {"num_classes": 15, "in_chans": 4, **kwargs}
    return build_point_model(PCM, "pcm_scanobjectnn", pretrained, checkpoint_filter_fn, **args)


@register(_card(6_944_423, "ScanObjectNN PB_T50_RS, with height: 87.1 % (published)."), num_classes=15, **_CFG)
def pcm_tiny_scanobjectnn(pretrained: bool = False, **kwargs: Any) -> PCM:
    """PCM-Tiny for ScanObjectNN, from coordinates and height: 87.1 % on PB_T50_RS (official README)."""
    args = {**_TINY, "num_classes": 15, "in_chans": 4, **kwargs}
    return build_point_model(PCM, "pcm_tiny_scanobjectnn", pretrained, checkpoint_filter_fn, **args)


@register(_card(40_626_634, "ShapeNetPart, with normals and height: instance mIoU 87.3."), num_classes=50, **_CFG)
def pcm_parts(pretrained: bool = False, **kwargs: Any) -> PCMParts:
    """PCM for parts of ShapeNet, from coordinates, normals and height: 87.3 % instance mIoU (official README)."""
    return build_point_model(PCMParts, "pcm_parts", pretrained, checkpoint_filter_fn, **kwargs)


@register(_card(8_773_834, "ShapeNetPart, with normals and height: instance mIoU 87.1."), num_classes=50, **_CFG)
def pcm_tiny_parts(pretrained: bool = False, **kwargs: Any) -> PCMParts:
    """PCM-Tiny for parts of ShapeNet: 9 M parameters, 87.1 % instance mIoU (official README)."""
    args = {**_TINY, "decoder_dims": (384, 192, 192, 192), **kwargs}
    return build_point_model(PCMParts, "pcm_tiny_parts", pretrained, checkpoint_filter_fn, **args)


@register(
    _card(23_454_597, "S3DIS, 24,576 points with colour and height, in windows: mIoU 62.8 on area 5."),
    num_classes=13,
    **_CFG,
)
def pcm_s3dis(pretrained: bool = False, **kwargs: Any) -> PCMParts:
    """PCM for rooms of S3DIS, from colour, height and coordinates: 62.8 % mIoU on area 5 (official README)."""
    args = {
        "num_classes": 13, "num_shapes": 0, "dim": 96, "dim_expansion": (1, 2, 2, 2), "reducers": (4, 4, 2, 2),
        "decoder_dims": (384, 192, 96, 96), "windows": (1024, 512, 256, 128), "combine_xyz": True,
        "scan": ROOM_SCAN, **kwargs,
    }  # fmt: skip
    return build_point_model(PCMParts, "pcm_s3dis", pretrained, checkpoint_filter_fn, **args)

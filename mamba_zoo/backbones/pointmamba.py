"""PointMamba: Mamba over patches of a point cloud along Hilbert's curve. Liang et al. 2024, arXiv:2402.10739.

Follows the arithmetic of LMD0311/PointMamba@80858e096e33 models/point_mamba_scan.py (Apache-2.0).
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
from timm.layers.drop import DropPath, calculate_drop_path_rates
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from ..scans._cloud import PointScanLike, cloud_order, trusted
from ._block import AddNormBlock, LayerNorm, add_residual
from ._checkpoint_file import read_checkpoint
from ._decay import undecayed
from ._keys import Key, rename
from ._match import unwrap, variants
from ._mixer import Mamba
from ._point_model import (
    PatchEncoder,
    PointBackbone,
    PointHead,
    PositionEmbed,
    build_point_model,
    mark_published,
    mixer_keys,
    pointwise,
    resolve_point_scan,
    run_blocks,
    scale_output_projections,
)
from ._points import chamfer_distance, group_points
from ._register import Card, register

SCAN = "join(hilbert, hilbert_trans)"


class PointMamba(PointBackbone):
    """Patches around furthest points become tokens; the sequence visits all of them once for every direction of a scan.

    One causal recurrence runs through the directions one after the other, over tokens that are scaled and shifted per
    direction ("order indicator"). Published clouds lie in the unit sphere, which the cells of the curve rely on.

    Args:
        num_classes: Classes; 0 returns what the classifier would read.
        groups: Patches; each cloud needs at least as many points.
        group_size: Points of a patch.
        dim: Width.
        depth: Blocks.
        d_state: States n.
        d_conv: Taps of the convolution.
        expand: Inner width of the mixer in units of `dim`.
        dt_rank: Rank of the step projection; "auto" is one sixteenth of `dim`, rounded up.
        scan: Orders of the patches by their centres: a name, a spec or a function; see `scans.points`. "none" keeps the
            convolution along the default orders, but leaves the state-space layers out.
        order_indicator: Whether every direction has a scale and a shift of its own.
        hidden: Widths of the head before the classifier.
        drop_rate: Dropout in the head.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        published: Take the depth of the curve from the whole batch, as the published code does: the patches of a cloud
            then have another order in a batch with a wider cloud. None does so for weights in the published form.
        skip_origin: Choose no centre of a patch within 0.0316 of the origin, as the kernel of pointnet2_ops does with
            which published weights were trained; matters for clouds with points in their middle.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: an unknown scan.
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
        order_indicator: bool = True,
        hidden: tuple[int, ...] = (256, 256),
        drop_rate: float = 0.5,
        drop_path_rate: float = 0.0,
        published: bool | None = None,
        skip_origin: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__(num_classes, published)
        dd: Any = {"device": device, "dtype": dtype}
        self.groups, self.group_size, self.skip_origin = groups, group_size, skip_origin
        spec, k = resolve_point_scan(scan)
        ssm = k > 0
        self.scan, self.k = (spec, k) if ssm else resolve_point_scan(self.default_scan())
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        self.patch_embed = PatchEncoder(dim, **dd)
        self.pos_embed = PositionEmbed(dim, **dd)
        self.order_gamma = nn.Parameter(torch.ones(self.k, dim, **dd)) if order_indicator else None
        self.order_beta = nn.Parameter(torch.zeros(self.k, dim, **dd)) if order_indicator else None
        self.blocks = nn.ModuleList(
            # A block drops what the one before it put out, so each has the rate of its predecessor.
            AddNormBlock(dim, Mamba(dim, d_state, d_conv, expand, dt_rank, ssm=ssm, **dd), rate, LayerNorm, **dd)
            for rate in [0.0, *rates[:-1]]
        )
        self.drop_path = DropPath(rates[-1]) if rates[-1] > 0 else nn.Identity()
        self.norm = LayerNorm(dim, **dd)
        self.num_features = dim
        self.head = PointHead(dim, num_classes, hidden, drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        if self.order_gamma is not None and self.order_beta is not None:
            nn.init.normal_(self.order_gamma, 1.0, 0.02)
            nn.init.normal_(self.order_beta, 0.0, 0.02)
        scale_output_projections(self, depth)

    after_encoder: ClassVar[tuple[str, ...]] = ("head.",)  # what pre-training does not train

    def default_scan(self) -> str:
        """The orders of the published model."""
        return SCAN

    def serialize(self, centres: Tensor) -> Tensor:
        """Orders `(b, k, g)` of centres `(b, g, 3)`."""
        if self.published and self.scan == SCAN:
            return cloud_order("join(hilbert(shared_depth=True), hilbert_trans(shared_depth=True))", centres)
        return cloud_order(self.scan, centres)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Clouds `(b, n, 3)` to tokens, their order, and the centres of the patches `(b, g, 3)`.

        Tokens `(b, k * g, dim)` are all patches for the first direction, furthest points first, then for the next; the
        order `(b, 1, k * g)` visits them.
        """
        self.check(x)
        patches, centres = group_points(x, self.groups, self.group_size, self.skip_origin)
        tokens = self.patch_embed(patches)[:, None]
        if self.order_gamma is not None and self.order_beta is not None:
            tokens = tokens * self.order_gamma[:, None] + self.order_beta[:, None]
        tokens = (tokens + self.pos_embed(centres)[:, None]).expand(-1, self.k, -1, -1).flatten(1, 2)
        starts = self.groups * torch.arange(self.k, device=x.device)
        order = (self.serialize(centres) + starts[:, None]).flatten(1)[:, None]
        return tokens, trusted(order, tokens.shape[1]), centres

    def forward_features(self, x: Tensor) -> Tensor:
        """Clouds `(b, n, 3)` to normed tokens `(b, k * g, dim)`, as `embed` lays them out."""
        tokens, order, _ = self.embed(x)
        return self.finish(*run_blocks(self, tokens, order)[:2])

    def finish(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """The normed sum that a pair stands for, in the dtype of `hidden`."""
        return self.norm(add_residual(self.drop_path(hidden), residual)).to(hidden.dtype)


class PointMambaPretraining(nn.Module):
    """Masked autoencoder of PointMamba: most patches are hidden, and their points predicted.

    Args:
        groups: Patches.
        group_size: Points of a patch.
        dim: Width.
        depth: Blocks of the encoder.
        decoder_depth: Blocks of the decoder.
        mask_ratio: Share of hidden patches.
        scan: Orders of the patches; every call takes one direction of them, drawn at random.
        drop_path_rate: Stochastic depth of the encoder.
        published: See `PointMamba`.
        d_state: States n.
        skip_origin: See `PointMamba`.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: a `mask_ratio` that hides none or all.
    """

    def __init__(
        self,
        groups: int = 64,
        group_size: int = 32,
        dim: int = 384,
        depth: int = 12,
        decoder_depth: int = 4,
        mask_ratio: float = 0.6,
        scan: PointScanLike = SCAN,
        drop_path_rate: float = 0.1,
        published: bool | None = None,
        d_state: int = 16,
        skip_origin: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.masked = int(mask_ratio * groups)
        if not 0 < self.masked < groups:
            raise ValueError(
                f"mask_ratio={mask_ratio} hides {self.masked} of {groups} patches; hide some and keep some"
            )
        self.encoder = PointMamba(
            0, groups, group_size, dim, depth, d_state, scan=scan, hidden=(), drop_path_rate=drop_path_rate,
            published=published, skip_origin=skip_origin, **dd,
        )  # fmt: skip
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim, **dd))
        self.decoder_pos_embed = PositionEmbed(dim, **dd)
        self.decoder = nn.ModuleList(
            AddNormBlock(dim, Mamba(dim, d_state, **dd), norm=LayerNorm, **dd) for _ in range(decoder_depth)
        )
        self.decoder_norm = LayerNorm(dim, **dd)
        self.predict = nn.Linear(dim, 3 * group_size, **dd)
        trunc_normal_(self.mask_token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Full names of the parameters that decay should leave alone, see `undecayed`."""
        return undecayed(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block of the encoder in the backward pass."""
        self.encoder.set_grad_checkpointing(enable)

    def draw_mask(self, batch: int, device: torch.device) -> Tensor:
        """Which steps of the sequence are hidden, drawn anew for every cloud: `(b, g)` bool."""
        ranks = torch.rand(batch, self.encoder.groups, device=device).argsort(dim=1).argsort(dim=1)
        return ranks < self.masked

    def reconstruct(self, x: Tensor, direction: int, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the hidden patches of clouds.

        Args:
            x: Clouds `(b, n, 3)`.
            direction: Of the scan.
            mask: `(b, g)` bool, True for the hidden steps along that direction; as many in every cloud.

        Returns:
            Predicted and true points relative to their centres, both `(b, hidden, group_size, 3)`, along the direction.
        """
        encoder = self.encoder
        encoder.check(x)
        patches, centres = group_points(x, encoder.groups, encoder.group_size, encoder.skip_origin)
        order = encoder.serialize(centres)[:, direction]
        visible, hidden = order[~mask].view(len(x), -1), order[mask].view(len(x), -1)
        tokens = encoder.patch_embed(patches)
        if encoder.order_gamma is not None and encoder.order_beta is not None:
            tokens = tokens * encoder.order_gamma[direction] + encoder.order_beta[direction]
        tokens = _rows(tokens + encoder.pos_embed(centres), visible)
        seen = encoder.finish(*run_blocks(encoder, tokens, None)[:2])
        sequence = torch.empty(len(x), encoder.groups, seen.shape[-1], device=x.device, dtype=seen.dtype)
        sequence = sequence.masked_scatter(~mask[..., None], seen)
        sequence = torch.where(mask[..., None], self.mask_token.to(seen.dtype), sequence)
        stream, residual = sequence + self.decoder_pos_embed(_rows(centres, order)), None
        for block in self.decoder:
            stream, residual = block(stream, residual, None)
        decoded = self.decoder_norm(add_residual(stream, residual)).to(stream.dtype)
        rebuilt = self.predict(decoded[mask].view(len(x), -1, decoded.shape[-1]))
        true = patches.gather(1, hidden[..., None, None].expand(-1, -1, *patches.shape[2:]))
        return rebuilt.unflatten(-1, true.shape[2:]), true

    def forward(self, x: Tensor) -> Tensor:
        """The loss for clouds `(b, n, 3)`: Chamfer distance of the hidden patches, mean over patches; a scalar."""
        direction = int(torch.randint(self.encoder.k, ()))
        rebuilt, true = self.reconstruct(x, direction, self.draw_mask(len(x), x.device))
        return chamfer_distance(rebuilt.flatten(0, 1).float(), true.flatten(0, 1).float())


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


_HEAD = {0: "hidden.0", 1: "hidden.1", 4: "hidden.4", 5: "hidden.5", 8: "fc"}
KEYS = [
    Key(r"^OrderScale_(gamma|beta)_1$", r"order_\1", 0),
    Key(r"^OrderScale_(gamma|beta)_2$", r"order_\1", 1),
    Key(r"^encoder\.(first|second)_conv\.(\d)\.", r"patch_embed.\1.\2."),
    Key(r"^(patch_embed\.(first|second)\.[03]\.weight)$", r"\1", convert=pointwise),
    Key(r"^cls_head_finetune\.(\d)\.", lambda found: f"head.{_HEAD[int(found[1])]}."),
    Key(r"^norm\.", "out_norm."),  # of the first version, whose blocks end in a norm already
    Key(r"^blocks\.norm_f\.", "norm."),
    Key(r"^blocks\.layers\.", "blocks."),
    *mixer_keys(r"^(blocks\.\d+\.mixer\.)"),
]
_DECODER = [
    Key(r"^MAE_decoder\.blocks\.norm_f\.", "decoder_norm."),
    Key(r"^MAE_decoder\.blocks\.layers\.", "decoder."),
    Key(r"^increase_dim\.0\.", "predict."),
    Key(r"^(predict\.weight)$", r"\1", convert=lambda weight: weight.squeeze(-1) if weight.dim() == 3 else weight),
    *mixer_keys(r"^(decoder\.\d+\.mixer\.)"),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict of any form of PointMamba in our names."""
    if isinstance(model, PointMambaPretraining):
        return _pretraining(state_dict, model)
    return _encoder(state_dict, model)


def _encoder(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    published = any(name.startswith(("blocks.layers.", "cls_head_finetune.")) for name in state)
    return mark_published(rename(state, KEYS) if published else state, model, published)


def _pretraining(state: dict[str, Tensor], model: PointMambaPretraining) -> dict[str, Tensor]:
    inside = {name.removeprefix("MAE_encoder."): v for name, v in state.items() if name.startswith("MAE_encoder.")}
    if not inside:
        return state
    decoder = rename({name: v for name, v in state.items() if not name.startswith("MAE_encoder.")}, _DECODER)
    return {**{f"encoder.{name}": v for name, v in _encoder(inside, model.encoder).items()}, **decoder}


def load_encoder(model: PointMamba, path: str | os.PathLike[str]) -> None:
    """Start a model from pre-training: everything but what follows the encoder, which stays as it is.

    Args:
        model: Of the sizes of the encoder that was trained.
        path: A checkpoint of `PointMambaPretraining`: published, or of a run of this package.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such checkpoint, or its encoder does not fit; `model` is unchanged.
    """
    wanted = {name: value for name, value in model.state_dict().items() if not name.startswith(model.after_encoder)}
    for weights in variants(unwrap(read_checkpoint(path))[0]):
        inside = {
            name.removeprefix("MAE_encoder."): v for name, v in weights.items() if name.startswith("MAE_encoder.")
        }
        own = {name.removeprefix("encoder."): v for name, v in weights.items() if name.startswith("encoder.")}
        new = _encoder(inside, model) if inside else own
        if set(new) == set(wanted) and all(new[name].shape == value.shape for name, value in wanted.items()):
            model.load_state_dict({**model.state_dict(), **new})
            return
        if set(new) == set(wanted):
            odd = [f"{name} {tuple(new[name].shape)}" for name in new if new[name].shape != wanted[name].shape]
            raise ValueError(f"the encoder in {path} has other sizes: {', '.join(odd[:3])}; build the model like it")
    raise ValueError(f"{path} holds no encoder of this model; pre-train with 'pointmamba_pretraining', of its sizes")


_SOURCE = "LMD0311/PointMamba@80858e096e33 models/point_mamba_scan.py"
_RELEASE = "https://github.com/LMD0311/PointMamba/releases/download/ckpts-2"
_CFG: dict[str, Any] = {"input_size": None, "classifier": "head.fc"}


def _card(params: int, file: str, notes: str, drop_path: float = 0.1) -> Card:
    return Card(
        "points", _SOURCE, "Apache-2.0", "2402.10739", params, drop_path=drop_path, checkpoint=file,
        url=f"{_RELEASE}/{file}", notes=notes,
    )  # fmt: skip


def _build(name: str, pretrained: bool, **kwargs: Any) -> PointMamba:
    return build_point_model(PointMamba, name, pretrained, checkpoint_filter_fn, **kwargs)


@register(
    _card(12_297_768, "finetune_modelnet.pth", "ModelNet40, 1,024 points: 93.6 % (published, pre-trained)."),
    tag="modelnet40",
    num_classes=40,
    **_CFG,
)
def pointmamba(pretrained: bool = False, **kwargs: Any) -> PointMamba:
    """PointMamba for ModelNet40: 12 M parameters, 93.6 % of 40 classes from 1,024 points (paper)."""
    return _build("pointmamba", pretrained, **{"num_classes": 40, **kwargs})


@register(
    _card(
        12_291_343,
        "finetune_scan_hardest.pth",
        "ScanObjectNN, 2,048 points: 89.31 % on PB_T50_RS (published, pre-trained); tags objbg, objonly: 94.32, 92.60.",
        0.5,
    ),
    tag="hardest",
    others={
        "objbg": {"url": f"{_RELEASE}/finetune_scan_objbg.pth"},
        "objonly": {"url": f"{_RELEASE}/finetune_scan_only.pth"},
    },
    num_classes=15,
    **_CFG,
)
def pointmamba_scanobjectnn(pretrained: bool = False, **kwargs: Any) -> PointMamba:
    """PointMamba for ScanObjectNN: 128 patches, 15 classes, 2,048 points; 89.31 % on PB_T50_RS (paper)."""
    return _build("pointmamba_scanobjectnn", pretrained, **{"num_classes": 15, "groups": 128, **kwargs})


@register(
    _card(16_068_704, "pretrain.pth", "Masked autoencoder, pre-trained on ShapeNet55 with 1,024 points."),
    tag="shapenet55",
    num_classes=-1,
    input_size=None,
)
def pointmamba_pretraining(pretrained: bool = False, **kwargs: Any) -> PointMambaPretraining:
    """PointMamba's masked autoencoder: 16 M parameters; its encoder starts `pointmamba`, see `load_encoder`."""
    return build_point_model(
        PointMambaPretraining, "pointmamba_pretraining", pretrained, checkpoint_filter_fn, **kwargs
    )


_MINI = {"groups": 64, "group_size": 24, "dim": 128, "depth": 6, "d_state": 8}


@register(
    Card(
        "points", "mamba_zoo", "Apache-2.0", "2402.10739", 1_154_600, drop_path=0.1,
        notes="Not published: for a few hundred clouds.",
    ),
    num_classes=40,
    **_CFG,
)  # fmt: skip
def pointmamba_mini(pretrained: bool = False, **kwargs: Any) -> PointMamba:
    """A small PointMamba of our own for small sets of clouds: six blocks of width 128, 64 patches of 24 points."""
    return _build("pointmamba_mini", pretrained, **{**_MINI, **kwargs})


@register(
    Card("points", "mamba_zoo", "Apache-2.0", "2402.10739", 1_292_360, notes="Not published: of pointmamba_mini."),
    num_classes=-1,
    input_size=None,
)
def pointmamba_mini_pretraining(pretrained: bool = False, **kwargs: Any) -> PointMambaPretraining:
    """The masked autoencoder of `pointmamba_mini`, with two blocks in the decoder."""
    return build_point_model(
        PointMambaPretraining, "pointmamba_mini_pretraining", pretrained, checkpoint_filter_fn,
        **{**_MINI, "decoder_depth": 2, **kwargs},
    )  # fmt: skip

"""timm's model contract, once for pyramids of channels-last maps and once for models of one token sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.fx
from timm.layers.classifier import ClassifierHead
from timm.layers.drop import DropPath
from timm.layers.helpers import get_device_dtype
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint, checkpoint_seq
from torch import Tensor, nn

from ._block import LayerNorm, add_residual
from ._cast import weights_cast
from ._decay import undecayed
from ._embed import check_image, remove_token

# torch.fx takes these whole, in every file that calls them: they look at shapes and dtypes.
torch.fx.wrap("add_residual")
torch.fx.wrap("check_image")


class Backbone(nn.Module):
    """What all image models share.

    Attributes:
        in_chans: Image channels.
        num_classes: Outputs of the classifier; 0 is none.
        num_features: Width of `forward_features`.
        head_hidden_size: Width that the classifier reads.
        output_fmt: Layout of `forward_features`, "NHWC" or "NLC".
        feature_info: For each tap, its width, stride and module.
    """

    in_chans: int
    num_classes: int
    num_features: int
    head_hidden_size: int
    output_fmt: str
    feature_info: list[dict[str, Any]]

    def no_weight_decay(self) -> set[str]:
        """Full names of the parameters that decay should leave alone, see `undecayed`."""
        return undecayed(self)

    def input_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one input of this size, without the batch: `(c, h, w)`."""
        return (self.in_chans, height, width)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `(b, c, h, w)` to normed features in `output_fmt`."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify what `forward_features` returns; `pre_logits` stops before the classifier."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Images `(b, c, h, w)` to logits `(b, num_classes)`."""
        with weights_cast(self, x):
            return self.forward_head(self.forward_features(x))


class Stage(nn.Module):
    """Downsampling, then blocks of one width.

    Args:
        downsample: First module; None keeps the map.
        blocks: Take and return a map.
    """

    def __init__(self, downsample: nn.Module | None, blocks: Iterable[nn.Module]):
        super().__init__()
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """`(b, h, w, c)` to `(b, h', w', c')`."""
        x = self.downsample(x)
        if self.grad_checkpointing:
            x = checkpoint_seq(self.blocks, x)  # type: ignore[assignment]
            return x
        return self.blocks(x)


class Pyramid(Backbone):
    """Stem, stages of growing width and stride, norm, pooling, classifier.

    Args:
        stem: Images `(b, c, h, w)` to a map `(b, h, w, dims[0])`.
        stages: One module per stage, from map to map.
        dims: Width of each stage.
        strides: Pixels per map position, for each stage.
        in_chans: Image channels.
        num_classes: Classes; 0 returns the pooled features.
        global_pool: As for timm's `ClassifierHead`; "" does not pool.
        drop_rate: Dropout before the classifier.
        out_norm: Give each stage a norm of its own, which `forward_intermediates` and `features_only` apply, as the
            published detection and segmentation backbones do.
        smallest: Pixels per side that the stem needs.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        stem: nn.Module,
        stages: Iterable[nn.Module],
        dims: Sequence[int],
        strides: Sequence[int],
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        out_norm: bool = False,
        smallest: int = 1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dims[-1]
        self.smallest = smallest
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{i}"}
            for i, (dim, stride) in enumerate(zip(dims, strides, strict=True))
        ]
        self.out_norms = nn.ModuleList(LayerNorm(dim, **dd) for dim in dims) if out_norm else None
        self.norm = LayerNorm(dims[-1], **dd)
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate, input_fmt="NHWC", **dd)
        self.head_hidden_size = self.head.num_features

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise learning rates."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {
            "stem": r"^stem",
            "blocks": r"^stages\.(\d+)" if coarse else [*blocks, (r"^norm|^out_norms", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        for stage in self.modules():
            if isinstance(stage, Stage):
                stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an identity."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier; None keeps the pooling."""
        self.num_classes = num_classes
        dd: Any = get_device_dtype(self)
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **dd)
        self.head_hidden_size = self.head.num_features

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `(b, c, h, w)` to normed features `(b, h', w', num_features)`."""
        check_image(x, self.in_chans, self.smallest)
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify what `forward_features` returns; `pre_logits` stops before the classifier."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of stages, along with the features.

        Args:
            x: Images `(b, c, h, w)`.
            indices: Which stages; an int is the last so many, None all.
            norm: Norm the last stage's output by the final norm (only widths that fit can be).
            stop_early: Run no stage after the last one asked for.
            output_fmt: Of the intermediates, "NCHW" or "NHWC".
            intermediates_only: Return the list alone.

        Returns:
            What `forward_features` returns, and the intermediates; each is normed if the model has `out_norm`.

        Raises:
            ValueError: another `output_fmt`.
        """
        _check_format(output_fmt, ("NCHW", "NHWC"))
        check_image(x, self.in_chans, self.smallest)
        take, last = feature_take_indices(len(self.stages), indices)  # type: ignore[arg-type]
        x = self.stem(x)
        found = []
        for i, stage in enumerate(list(self.stages)[: last + 1 if stop_early else None]):
            x = stage(x)
            if i in take:
                y = x
                if self.out_norms is not None:
                    y = self.out_norms[i](x)
                elif norm and i == len(self.stages) - 1:
                    y = self.norm(x)
                found.append(y if output_fmt == "NHWC" else y.permute(0, 3, 1, 2).contiguous())
        return found if intermediates_only else (self.norm(x), found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`, and with them the norm and the head; returns the indices."""
        take, last = feature_take_indices(len(self.stages), indices)  # type: ignore[arg-type]
        shorter = last < len(self.stages) - 1
        self.stages = nn.Sequential(*list(self.stages)[: last + 1])
        if self.out_norms is not None:
            norms = list(self.out_norms)[: last + 1]
            self.out_norms = nn.ModuleList(n if i in take else nn.Identity() for i, n in enumerate(norms))
        if shorter:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take


class Tokens(Backbone):
    """Embedding, a stack of add-norm-mix blocks over one token sequence, norm, pooling, classifier.

    Subclasses embed images in `embed`, and say by `class_index` where the class token stands.

    Args:
        blocks: Take `(hidden, residual, order)`, see `AddNormBlock`.
        norm: The final norm.
        dim: Width.
        stride: Pixels per patch, for `feature_info`.
        in_chans: Image channels.
        num_classes: Classes; 0 returns the pooled features.
        global_pool: "token" reads the class token, "avg" the mean of the others; "" does not pool.
        drop_rate: Dropout before the classifier.
        drop_path: Rate at which the last mixer's output is dropped.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: unknown `global_pool`.
    """

    output_fmt = "NLC"

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        norm: nn.Module,
        dim: int,
        stride: int,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = dim
        self.global_pool = _check_pool(global_pool)
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(blocks)
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"blocks.{i}"} for i in range(len(self.blocks))
        ]
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm = norm
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dim, num_classes, device=device, dtype=dtype) if num_classes > 0 else nn.Identity()

    def embed(self, x: Tensor) -> tuple[Tensor, Any, tuple[int, ...]]:
        """Images `(b, c, h, w)` to tokens `(b, l, d)`, what all blocks are given besides, and the patch grid.

        For most models this is the order `(k, m)` to visit the tokens in.
        """
        raise NotImplementedError

    def class_index(self, tokens: int) -> int | None:
        """Where the class token stands among `tokens`, itself included; None if there is none."""
        raise NotImplementedError

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an identity."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier; None keeps the pooling."""
        dd: Any = get_device_dtype(self)
        if global_pool is not None:
            self.global_pool = _check_pool(global_pool)
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `(b, c, h, w)` to normed tokens `(b, l, num_features)`, the class token among them."""
        hidden, order, _ = self.embed(x)
        residual = None
        for block in self.blocks:
            hidden, residual = self._run(block, hidden, residual, order)
        return self._finish(hidden, residual)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify what `forward_features` returns; `pre_logits` stops before the classifier."""
        if self.global_pool == "token":
            x = x[:, self.class_index(x.shape[1])]
        elif self.global_pool == "avg":
            x = self._patches(x).mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The patch tokens after some blocks, along with the features.

        Args:
            x: Images `(b, c, h, w)`.
            indices: After which blocks; an int is the last so many, None all.
            norm: Norm the intermediates by the final norm.
            stop_early: Run no block after the last one asked for.
            output_fmt: Of the intermediates, "NCHW" (of videos `(b, d, t, h, w)`) or "NLC"; the class token is left
                out of either.
            intermediates_only: Return the list alone.

        Returns:
            What `forward_features` returns, and the intermediates.

        Raises:
            ValueError: another `output_fmt`.
        """
        _check_format(output_fmt, ("NCHW", "NLC"))
        take, last = feature_take_indices(len(self.blocks), indices)  # type: ignore[arg-type]
        hidden, order, grid = self.embed(x)
        residual, found = None, []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            hidden, residual = self._run(block, hidden, residual, order)
            if i in take:
                y = self._patches(self._tap(i, hidden, residual, norm).to(hidden.dtype))
                if output_fmt == "NCHW":
                    y = y.transpose(1, 2).reshape(y.shape[0], -1, *grid)
                found.append(y)
        return found if intermediates_only else (self._finish(hidden, residual), found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last of `indices`, and the norm and head if asked; returns the indices."""
        take, last = feature_take_indices(len(self.blocks), indices)  # type: ignore[arg-type]
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def _patches(self, x: Tensor) -> Tensor:
        """The tokens without the class token, if there is one."""
        index = self.class_index(x.shape[1])
        return x if index is None else remove_token(x, index)

    def _tap(self, i: int, hidden: Tensor, residual: Tensor, norm: bool) -> Tensor:
        """What `forward_intermediates` gives for block `i`, which returned this pair."""
        # Not dropped: the next block draws for itself which samples lose this output.
        y = add_residual(hidden, residual)
        return self.norm(y) if norm else y

    def _run(self, block: nn.Module, hidden: Tensor, residual: Tensor | None, order: Any) -> tuple[Tensor, Tensor]:
        if self.grad_checkpointing:
            return checkpoint(block, hidden, residual, order)  # type: ignore[return-value]
        return block(hidden, residual, order)

    def _finish(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """The normed sum that a pair stands for, in the dtype of `hidden`."""
        return self.norm(add_residual(self.drop_path(hidden), residual)).to(hidden.dtype)


def _check_format(output_fmt: str, allowed: tuple[str, ...]) -> None:
    if output_fmt not in allowed:
        raise ValueError(f"output_fmt={output_fmt!r} is not possible for this model; choose one of {allowed}")


def _check_pool(global_pool: str) -> str:
    if global_pool not in ("token", "avg", ""):
        raise ValueError(f"global_pool={global_pool!r} is unknown; choose 'token', 'avg' or '' for no pooling")
    return global_pool

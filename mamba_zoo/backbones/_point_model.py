"""What models of point clouds share: patches as tokens, heads, and the behaviour that published weights expect."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from timm.layers.helpers import get_device_dtype
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from ..scans._cloud import PointScanLike, cloud_spec, directions
from ._base import Backbone
from ._block import add_residual
from ._checkpoint import build_with_weights
from ._identify import FilterFn
from ._keys import Key
from ._mixer import Mamba

Model = TypeVar("Model", bound=nn.Module)


class PublishedForm(nn.Module):
    """Remembers whether a model behaves as its published code does where that is odd, such as across a batch.

    Weights in the published form switch it on when they are loaded, and a state dict of our own carries the choice.

    Attributes:
        published: Whether to compute as published.

    Args:
        published: True or False decide, whatever is loaded; None starts with False and follows the weights.
    """

    published: bool

    def __init__(self, published: bool | None = None):
        super().__init__()
        self._follows_weights = published is None
        self.published = bool(published)

    def get_extra_state(self) -> Tensor:
        """The choice, for a state dict."""
        return torch.tensor(self.published)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the choice of a state dict over, unless the constructor was given one."""
        if self._follows_weights:
            self.published = bool(state)


def mark_published(state: dict[str, Tensor], model: nn.Module, published: bool) -> dict[str, Tensor]:
    """Add to a renamed state dict what `PublishedForm` reads: True for weights that came in the published form."""
    if not isinstance(model, PublishedForm) or "_extra_state" in state:
        return state
    return {**state, "_extra_state": torch.tensor(published or model.published)}


class PatchEncoder(nn.Module):
    """A small PointNet: patches of points to one token each (Point-BERT, arXiv:2111.14819).

    Args:
        dim: Width of a token.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, dim: int = 384, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.first = nn.Sequential(
            nn.Linear(3, 128, **dd), nn.BatchNorm1d(128, **dd), nn.ReLU(inplace=True), nn.Linear(128, 256, **dd)
        )
        self.second = nn.Sequential(
            nn.Linear(512, 512, **dd), nn.BatchNorm1d(512, **dd), nn.ReLU(inplace=True), nn.Linear(512, dim, **dd)
        )

    def forward(self, patches: Tensor) -> Tensor:
        """Points relative to their centre `(b, g, k, 3)` to tokens `(b, g, dim)`."""
        b, g, k, _ = patches.shape
        x = self.first(patches.reshape(-1, 3).to(self.first[0].weight.dtype)).view(b * g, k, 256)  # type: ignore[arg-type]
        # The layer on [whole patch, point] as two products: the part for the patch is the same for its k points.
        layer: Any = self.second[0]
        whole, each = layer.weight.split(256, dim=1)
        joint = (x @ each.T) + nn.functional.linear(x.amax(1, keepdim=True), whole, layer.bias)
        return self.second[1:](joint.flatten(0, 1)).view(b, g, k, -1).amax(2)


class PositionEmbed(nn.Sequential):
    """Centres `(b, g, 3)` to position embeddings `(b, g, dim)`."""

    def __init__(self, dim: int, act_layer: type[nn.Module] = nn.GELU, device=None, dtype=None):
        dd: Any = {"device": device, "dtype": dtype}
        super().__init__(nn.Linear(3, 128, **dd), act_layer(), nn.Linear(128, dim, **dd))

    def forward(self, input: Tensor) -> Tensor:
        """`(b, g, 3)` of any dtype to `(b, g, dim)`."""
        return super().forward(input.to(self[0].weight.dtype))  # type: ignore[arg-type]


class PointHead(nn.Module):
    """Linear, batch norm, ReLU and dropout for every hidden width, then a linear classifier.

    Args:
        dim: Width of what comes in.
        num_classes: Classes; 0 has no classifier and returns what it would read.
        hidden: Widths in between.
        drop_rate: Dropout after each of them.
        bias: Whether the hidden layers have a bias.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        hidden: Sequence[int] = (256, 256),
        drop_rate: float = 0.5,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [
                nn.Linear(dim, width, bias=bias, **dd), nn.BatchNorm1d(width, **dd), nn.ReLU(inplace=True),
                nn.Dropout(drop_rate),
            ]  # fmt: skip
            dim = width
        self.num_features = dim
        self.hidden = nn.Sequential(*layers)
        self.fc = nn.Linear(dim, num_classes, **dd) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """`(b, dim)`, or `(b, n, dim)` for every point, to logits; `pre_logits` stops before the classifier."""
        flat = self.hidden(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:-1])
        return flat if pre_logits else self.fc(flat)

    def reset(self, num_classes: int, dd: dict[str, Any]) -> None:
        """Make a new classifier; the hidden layers stay."""
        training = self.training
        self.fc = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.fc.train(training)


class PointBackbone(Backbone, PublishedForm):
    """timm's model contract for clouds `(b, n, 3)`.

    Subclasses make `head`, a `PointHead`, and `blocks`.

    Args:
        num_classes: Classes.
        published: See `PublishedForm`.
        in_chans: Numbers per point.
    """

    output_fmt = "NLC"
    blocks: nn.ModuleList
    head: PointHead

    def __init__(self, num_classes: int, published: bool | None, in_chans: int = 3):
        PublishedForm.__init__(self, published)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.grad_checkpointing = False

    def input_shape(self, height: int = 1024, width: int = 3) -> tuple[int, ...]:
        """Shape of one cloud of `height` points."""
        return (height, 3)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise learning rates."""
        return {
            "stem": r"^cls_|^pos_|^patch_embed|^order_|^embedding",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an identity."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier.

        Raises:
            ValueError: a `global_pool`; these models have one way of pooling each.
        """
        if global_pool is not None:
            raise ValueError(f"global_pool={global_pool!r}: models of points pool in one way; leave it out")
        self.num_classes = num_classes
        self.head.reset(num_classes, get_device_dtype(self))

    def run(self, block: Callable[..., Any], *args: Any) -> Any:
        """One block, its activations recomputed in the backward pass if asked."""
        return checkpoint(block, *args) if self.grad_checkpointing and self.training else block(*args)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens `(b, l, num_features)` and classify; `pre_logits` stops before the classifier."""
        return self.head(self.pool(x), pre_logits)

    def pool(self, x: Tensor) -> Tensor:
        """Tokens `(b, l, d)` to what the head reads."""
        return x.mean(1)

    def forward(self, x: Tensor) -> Tensor:
        """Clouds `(b, n, 3)` to logits `(b, num_classes)`."""
        return self.forward_head(self.forward_features(x))

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless `x` is clouds `(b, n, 3)`."""
        if x.dim() != 3 or x.shape[-1] != 3 or not len(x):
            raise ValueError(
                f"clouds must be (b, n, 3) with b >= 1, points by coordinates, not {tuple(x.shape)}; further features "
                "of a point go into `features=`, if the model has any"
            )


def run_blocks(
    model: PointBackbone, x: Tensor, order: Tensor | None, indices: Sequence[int] = ()
) -> tuple[Tensor, Tensor | None, dict[int, Tensor]]:
    """The add-norm blocks of a model over tokens `(b, l, d)`.

    Returns:
        The last pair `(hidden, residual)`, and for each of `indices` the stream after that block.
    """
    residual, found = None, {}
    for i, block in enumerate(model.blocks):
        x, residual = model.run(block, x, residual, order)
        if i in indices:
            found[i] = add_residual(x, residual)
    return x, residual, found


def resolve_point_scan(scan: PointScanLike) -> tuple[str, int]:
    """A `scan=` argument of a point model as a spec, and its number of directions; "none" has 0."""
    if isinstance(scan, str) and scan == "none":
        return scan, 0
    spec = cloud_spec(scan)
    return spec, directions(spec)


def told_shapes(shape: Tensor | None, clouds: int, num_shapes: int) -> Tensor | None:
    """Labels of shapes as rows `(b, num_shapes)` of zeros and a one; None for a model that is told none.

    Args:
        shape: `(b,)` integers.
        clouds: How many clouds there are, b.
        num_shapes: Labels that there are; 0 for none.

    Raises:
        ValueError: labels that are missing, of another shape or out of range, or given to a model that is not told any.
    """
    wanted = f"a label (b,) below {num_shapes}" if num_shapes else "no label"
    if shape is None and not num_shapes:
        return None
    if shape is None or not num_shapes:
        raise ValueError(f"this model takes {wanted} of every cloud's shape, but shape={shape!r}")
    if shape.shape != (clouds,) or shape.is_floating_point():
        raise ValueError(f"shape must be {clouds} integers (b,), not {shape.dtype} {tuple(shape.shape)}")
    looked_at = clouds > 0 and not shape.is_cuda and not shape.is_meta  # on a GPU, the look would wait for the device
    if looked_at and not 0 <= int(shape.min()) <= int(shape.max()) < num_shapes:
        raise ValueError(f"shape holds {int(shape.min())} to {int(shape.max())}; this model takes {wanted}")
    return nn.functional.one_hot(shape.long(), num_shapes)


def mixer_keys(mixer: str) -> list[Key]:
    """Published Mamba mixers with one or two branches, under `mixer`, a pattern with one group, in our names."""
    return [
        key
        for slot, b, log in ((0, "", "A_log"), (1, "_b", "A_b_log"))
        for key in (
            Key(rf"{mixer}{log}$", r"\1ssm.A_log", slot),
            Key(rf"{mixer}D{b}$", r"\1ssm.D", slot),
            Key(rf"{mixer}conv1d{b}\.weight$", r"\1conv.weight", slot, lambda weight: weight.squeeze(1)),
            Key(rf"{mixer}conv1d{b}\.bias$", r"\1conv.bias", slot),
            Key(rf"{mixer}x_proj{b}\.weight$", r"\1ssm.x_proj.weight", slot),
            Key(rf"{mixer}dt_proj{b}\.weight$", r"\1ssm.dt_proj.weight", slot),
            Key(rf"{mixer}dt_proj{b}\.bias$", r"\1ssm.dt_bias", slot),
        )
    ]


def pointwise(weight: Tensor) -> Tensor:
    """The matrix of a convolution with kernels of one point, `(out, in, 1)`."""
    return weight.squeeze(-1)


def build_point_model(cls: type[Model], name: str, pretrained: bool, filter_fn: FilterFn, **kwargs: Any) -> Model:
    """`build_with_weights` for models of points.

    Raises:
        TypeError: `features_only`; patches of points are no maps.
    """
    if kwargs.pop("features_only", False):
        raise TypeError(f"{name} makes no feature maps; forward_features returns its tokens")
    return build_with_weights(cls, name, pretrained, filter_fn=filter_fn, **kwargs)


def scale_output_projections(model: nn.Module, depth: int) -> None:
    """Divide what mixers write into the residual stream by the square root of `depth`, as published models start."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Mamba):
                module.out_proj.weight /= math.sqrt(depth)

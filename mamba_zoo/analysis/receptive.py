"""The effective receptive field (arXiv:1701.04128): by how much each pixel moves one position of a feature map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def receptive_field(model: nn.Module, images: Tensor, stage: int = -1, at: tuple[int, int] | None = None) -> Tensor:
    """Gradient of one position of a feature map, summed over its channels, with respect to the pixels.

    Its magnitude is summed over the channels of the image and averaged over images. The model runs in evaluation mode
    and is left in the mode it was in; its parameters get no gradients.

    Args:
        model: An image backbone of this package or of timm; or any module that returns a map `(b, c, h, w)` or a list
            of such maps.
        images: `(b, c, height, width)`; noise shows what the architecture allows, images what the weights do with it.
        stage: Which of the model's feature maps; -1 is the last.
        at: Row and column of the position; None is the middle, `(h // 2, w // 2)`.

    Returns:
        `(height, width)`, not negative.

    Raises:
        ValueError: `images` or the features are no batch of maps, or `at` lies outside.

    Source:
        arXiv:1701.04128, section 2: a gradient of 1 at one position, 0 elsewhere. As a picture: arXiv:2203.06717.
    """
    if images.dim() != 4:
        raise ValueError(f"images must be (b, c, height, width), not {tuple(images.shape)}")
    x = images.detach().clone().requires_grad_()
    training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            features = _features(model, x, stage)
            row, column = at or (features.shape[2] // 2, features.shape[3] // 2)
            if not (0 <= row < features.shape[2] and 0 <= column < features.shape[3]):
                raise ValueError(f"at={at} lies outside the feature map of {tuple(features.shape[2:])} positions")
            (gradient,) = torch.autograd.grad(features[:, :, row, column].sum(), x)
    finally:
        model.train(training)
    return gradient.abs().sum(1).mean(0)


def contribution_area(field: Tensor, share: float = 0.99, at: tuple[int, int] | None = None) -> float:
    """How widely a receptive field spreads: the area of the smallest square around a pixel that holds `share` of it.

    Args:
        field: `(height, width)`, not negative.
        share: Of the sum over all pixels, above 0 and at most 1.
        at: Row and column of the pixel; None is the middle, `(height // 2, width // 2)`.

    Returns:
        The area of that part of the square that lies within the field, as a fraction of the field.

    Raises:
        ValueError: a field without any positive entry, or a `share` out of range.

    Source:
        arXiv:2203.06717, table 10.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must lie above 0 and not above 1")
    height, width = field.shape
    row, column = at or (height // 2, width // 2)
    total = float(field.double().sum())
    if total <= 0:
        raise ValueError("field has no positive entry: no pixel moves the feature")
    for radius in range(max(height, width)):
        inside = field[max(row - radius, 0) : row + radius + 1, max(column - radius, 0) : column + radius + 1]
        if float(inside.double().sum()) >= share * total * (1 - 1e-12):
            return inside.numel() / field.numel()
    return 1.0


def _features(model: Any, x: Tensor, stage: int) -> Tensor:
    if hasattr(model, "forward_intermediates"):
        found = model.forward_intermediates(x, indices=[stage], intermediates_only=True)
    else:
        found = model(x)
        found = found if isinstance(found, Tensor) else [found[stage]]
    y = found if isinstance(found, Tensor) else found[0]
    if not isinstance(y, Tensor) or y.dim() != 4:
        shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"{type(model).__name__} gives {shape} instead of a feature map (b, c, h, w); give a backbone, or a module "
            "that returns such maps"
        )
    return y

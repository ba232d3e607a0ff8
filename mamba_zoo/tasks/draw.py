"""Predictions as pictures: boxes, masks and labels on an image."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_SMALL = 384  # pixels that the shorter side of a picture has at least, so that labels can be read
_OPACITY = 0.5


def colour_of(number: int) -> tuple[int, int, int]:
    """A colour for a class; neighbouring numbers differ clearly."""
    hue = (number * 0.618034) % 1.0
    r, g, b = colorsys.hsv_to_rgb(hue, 0.75 if number % 2 else 0.95, 1.0 if number % 3 else 0.85)
    return round(255 * r), round(255 * g), round(255 * b)


def draw_objects(
    image: Image.Image,
    boxes: NDArray[Any],
    labels: Sequence[str],
    classes: Sequence[int],
    masks: NDArray[np.bool_] | None = None,
) -> Image.Image:
    """An image with boxes, labels and, where given, masks; small images are enlarged.

    Args:
        image: RGB.
        boxes: `(n, 4)` corners in pixels.
        labels: One text a box.
        classes: One class number a box, for the colour.
        masks: `(n, height, width)`.
    """
    if masks is not None:
        for mask, number in zip(masks, classes, strict=True):
            image = _tinted(image, mask, colour_of(number))
    image, scale = _enlarged(image)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for box, label, number in zip(boxes, labels, classes, strict=True):
        x0, y0, x1, y1 = (float(v) * scale for v in box)
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour_of(number), width=2)
        _label(draw, font, x0, y0, label, colour_of(number), image.size)
    return image


def draw_regions(
    image: Image.Image, classes: NDArray[Any], names: Sequence[str], ground: int | None = 0
) -> Image.Image:
    """An image with its regions tinted by class, and a legend of those there are.

    Args:
        image: RGB.
        classes: `(height, width)` class numbers.
        names: Of the classes.
        ground: A class that is not tinted.
    """
    there = [int(i) for i in np.unique(classes) if i != ground and i < len(names)]
    for number in there:
        image = _tinted(image, classes == number, colour_of(number))
    image, _ = _enlarged(image)
    font = ImageFont.load_default(14)
    legend = Image.new(
        "RGB", (max(90, max((int(font.getlength(names[i])) for i in there), default=0) + 34), image.height), "white"
    )
    draw = ImageDraw.Draw(legend)
    for row, number in enumerate(there):
        draw.rectangle((8, 8 + 22 * row, 22, 22 + 22 * row), fill=colour_of(number))
        draw.text((28, 7 + 22 * row), names[number], fill="black", font=font)
    return _beside([image, legend])


def draw_strip(frames: Sequence[Image.Image], label: str) -> Image.Image:
    """The frames of a clip side by side below a label."""
    frames = [_enlarged(frame, 96)[0] for frame in frames]
    strip = _beside(frames, gap=2)
    font = ImageFont.load_default(16)
    out = Image.new("RGB", (max(strip.width, int(font.getlength(label)) + 12), strip.height + 26), "white")
    out.paste(strip, (0, 26))
    ImageDraw.Draw(out).text((6, 3), label, fill="black", font=font)
    return out


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a PNG, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _tinted(image: Image.Image, mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> Image.Image:
    pixels = np.asarray(image).astype(np.float32)
    pixels[mask] = (1 - _OPACITY) * pixels[mask] + _OPACITY * np.array(colour, np.float32)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def _enlarged(image: Image.Image, least: int = _SMALL) -> tuple[Image.Image, int]:
    scale = max(1, -(-least // min(image.size)))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST), scale


def _label(
    draw: ImageDraw.ImageDraw, font: Any, x: float, y: float, text: str, colour: tuple[int, ...], size: tuple[int, int]
) -> None:
    """A label above the box, or inside it where there is no room; never cut off by the picture's edge."""
    width, height = font.getlength(text) + 4, 18
    x = min(max(0, x), max(0, size[0] - width))
    y = y - height if y >= height else y
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    dark = sum(colour) > 380
    draw.text((x + 2, y + 1), text, fill="black" if dark else "white", font=font)


def _beside(images: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    out = Image.new("RGB", (width, max(image.height for image in images)), "white")
    x = 0
    for image in images:
        out.paste(image, (x, 0))
        x += image.width + gap
    return out

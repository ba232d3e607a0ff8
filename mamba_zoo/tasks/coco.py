"""Annotations in COCO's format: boxes, classes and masks of the objects in images, checked as they are read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MASKS_NEEDED = "instance-segmentation needs polygons or run lengths, object-detection does not"
_TOLERANCE = 1.0  # pixels by which tools that round may leave the image


class AnnotationError(ValueError):
    """Annotations that cannot be trained on."""


@dataclass(frozen=True)
class Annotated:
    """One image with its objects.

    Attributes:
        path: Of the image.
        height: In pixels.
        width: In pixels.
        boxes: `(n, 4)` corners `x0, y0, x1, y1` in pixels.
        classes: `(n,)` class numbers, from 0.
        crowd: `(n,)` whether a box holds many objects that are not told apart; such boxes are not learnt.
        outlines: For each object its polygons or run lengths as the file has them; None if it has none.
        left_out: How many objects were dropped for their boxes or outlines.
    """

    path: Path
    height: int
    width: int
    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    outlines: list[Any] = field(default_factory=list)
    left_out: int = 0

    def masks(self) -> NDArray[np.bool_]:
        """`(n, height, width)` the pixels of each object.

        Raises:
            AnnotationError: an object without an outline, or one that is no outline.
        """
        found = np.zeros((len(self.boxes), self.height, self.width), bool)
        for i, outline in enumerate(self.outlines):
            try:
                found[i] = decode(outline, self.height, self.width)
            except (ValueError, TypeError, KeyError, IndexError) as error:
                raise AnnotationError(
                    f"object {i} of {self.path} has no usable mask ({error}); {_MASKS_NEEDED}"
                ) from None
        return found


def read_coco(
    file: Path, images: Path, classes: list[str] | None = None, drop: bool = False, masks: bool = False
) -> tuple[list[Annotated], list[str]]:
    """Every image of an annotation file, and the names of the classes.

    Args:
        file: JSON with "images", "annotations" and "categories".
        images: Folder that the file names are relative to.
        classes: The names that the file must have, if they are known.
        drop: Leave out objects whose boxes are empty or outside their image, and those without an outline if `masks`.
        masks: Every object needs an outline.

    Raises:
        FileNotFoundError: no such file, or an image that is not there.
        AnnotationError: no such JSON, an unknown image or category, a box outside its image, an object without an
            outline, or other classes.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no annotation file {file}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        entries, objects = content["images"], content["annotations"]
        categories = sorted(content["categories"], key=lambda c: c["id"])
        numbers, names = {c["id"]: i for i, c in enumerate(categories)}, [str(c["name"]) for c in categories]
    except (ValueError, KeyError, TypeError) as error:
        raise AnnotationError(
            f"{file} is no annotation file in COCO's format ({error}); it needs images, annotations and categories"
        ) from None
    if not entries:
        raise AnnotationError(f"{file} lists no image")
    if classes is not None and names != classes:
        raise AnnotationError(
            f"the classes of {file} ({', '.join(names[:5])}) are not those trained on ({', '.join(classes[:5])}); "
            "every split needs the same categories"
        )
    for what, listed, keys in (
        ("image", entries, ("id", "file_name", "width", "height")),
        ("annotation", objects, ("image_id", "category_id", "bbox")),
    ):
        for each in listed:
            if lacking := [key for key in keys if key not in each]:
                raise AnnotationError(f"{file}: {what} {each.get('id')} lacks {', '.join(lacking)}")
    by_image: dict[Any, list[dict[str, Any]]] = {entry["id"]: [] for entry in entries}
    for each in objects:
        for key, known in (("image_id", by_image), ("category_id", numbers)):
            if each[key] not in known:
                raise AnnotationError(f"{file}: annotation {each.get('id')} has {key} {each[key]}, which is not listed")
        by_image[each["image_id"]].append(each)
    return [_annotated(file, images, entry, by_image[entry["id"]], numbers, drop, masks) for entry in entries], names


def decode(outline: Any, height: int, width: int) -> NDArray[np.bool_]:
    """The pixels `(height, width)` of an object.

    Args:
        outline: A list of polygons `[x0, y0, x1, y1, ...]`, or `{"size": [h, w], "counts": ...}` whose counts are run
            lengths, as numbers or packed into a text. Runs go down the columns and start with background.
        height: Of the image.
        width: Of the image.

    Raises:
        ValueError: no outline, or one of another image size.

    A polygon covers the pixels whose middles lie within it.

    Source: the packed form, five bits a character with differences to the run before the last, is that of COCO's mask
        API (https://cocodataset.org/#format-data), which documents it in its code only.
    """
    check_outline(outline, height, width)
    if isinstance(outline, dict):
        counts = outline["counts"]
        runs = np.asarray(_unpack(counts) if isinstance(counts, str) else counts, dtype=np.int64)
        if runs.sum() != height * width or (runs < 0).any():
            raise ValueError(f"its run lengths sum to {runs.sum()}, not to {height * width} pixels")
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    found = np.zeros((height, width), bool)
    for polygon in outline:
        found |= _filled(np.asarray(polygon, np.float64).reshape(-1, 2), height, width)
    return found


def check_outline(outline: Any, height: int, width: int) -> None:
    """Raise ValueError unless this is an outline, without drawing it."""
    if isinstance(outline, dict):
        if not {"size", "counts"} <= set(outline):
            raise ValueError("its run lengths need size and counts")
        if list(outline["size"]) != [height, width]:
            raise ValueError(f"its run lengths are of {outline['size']}, the image is of {[height, width]}")
        return
    if not isinstance(outline, list) or not outline:
        raise ValueError("it has none")
    for polygon in outline:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon of {len(polygon)} numbers; pairs of at least three points are needed")


def encode(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Run lengths of a mask `(h, w)`, as `decode` takes them."""
    flat = np.asarray(mask, bool).T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]]))
    counts = [0, *runs.tolist()] if flat[0] else runs.tolist()
    return {"size": list(mask.shape), "counts": counts}


def _filled(corners: NDArray[np.float64], height: int, width: int) -> NDArray[np.bool_]:
    """The pixels whose middles lie within a polygon `(points, 2)`; Pillow's own also fills those that it touches."""
    x, y = corners.T
    first, last = (int(v) for v in np.ceil(np.array([y.min(), y.max()]) - 0.5).clip(0, height))
    middles = np.arange(first, last) + 0.5
    x1, y1 = np.roll(x, -1), np.roll(y, -1)
    edge, row = np.nonzero((y[:, None] <= middles) != (y1[:, None] <= middles))
    crossings = x[edge] + (middles[row] - y[edge]) * (x1 - x)[edge] / (y1 - y)[edge]
    # Every crossing turns what is to its right from outside to inside or back.
    turns = np.zeros((last - first, width + 1), np.int64)
    np.add.at(turns, (row, np.ceil(crossings - 0.5).clip(0, width).astype(np.int64)), 1)
    found = np.zeros((height, width), bool)
    found[first:last] = turns.cumsum(1)[:, :width] % 2 == 1
    return found


def _unpack(text: str) -> list[int]:
    runs: list[int] = []
    position = 0
    while position < len(text):
        value, shift, more = 0, 0, True
        while more:
            bits = ord(text[position]) - 48
            value |= (bits & 0x1F) << shift
            more = bool(bits & 0x20)
            shift += 5
            position += 1
            if not more and bits & 0x10:
                value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs


def _annotated(
    file: Path,
    images: Path,
    entry: dict[str, Any],
    objects: list[dict[str, Any]],
    numbers: dict[Any, int],
    drop: bool,
    masks: bool,
) -> Annotated:
    path, height, width = images / entry["file_name"], int(entry["height"]), int(entry["width"])
    if not path.is_file():
        raise FileNotFoundError(f"{file} names the image {path}, which is not there")
    try:
        boxes = np.array([o["bbox"] for o in objects], np.float32).reshape(len(objects), 4)
    except (ValueError, TypeError):
        raise AnnotationError(
            f"{file}: image {entry['file_name']} has a bbox that is not four numbers: x, y, width, height"
        ) from None
    boxes[:, 2:] += boxes[:, :2]
    limits = np.array([width, height, width, height], np.float32)
    outside = np.any((boxes < -_TOLERANCE) | (boxes > limits + _TOLERANCE), axis=1)
    boxes = boxes.clip(0, limits)
    bad = outside | ~np.all(boxes[:, 2:] > boxes[:, :2], axis=1)  # NaN is no box either
    if bad.any() and not drop:
        i = int(bad.argmax())
        raise AnnotationError(
            f"{file}: the box {objects[i]['bbox']} (x, y, width, height) of annotation {objects[i].get('id')} "
            f"{'lies outside' if outside[i] else 'is empty in'} its image {entry['file_name']} of {width}x{height} "
            "pixels; correct it, or leave such boxes out with on_bad_box='drop'"
        )
    for i, each in enumerate(objects if masks else []):
        try:
            check_outline(each.get("segmentation"), height, width)
        except (ValueError, TypeError) as error:
            if not drop:
                raise AnnotationError(
                    f"{file}: annotation {each.get('id')} has no usable mask ({error}); {_MASKS_NEEDED}, and "
                    "on_bad_box='drop' leaves such objects out"
                ) from None
            bad[i] = True
    objects, boxes = [o for o, wrong in zip(objects, bad, strict=True) if not wrong], boxes[~bad]
    return Annotated(
        path, height, width, boxes,
        np.array([numbers[o["category_id"]] for o in objects], np.int64),
        np.array([bool(o.get("iscrowd", 0)) for o in objects], bool),
        [o.get("segmentation") for o in objects],
        int(bad.sum()),
    )  # fmt: skip

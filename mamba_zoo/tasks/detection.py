"""Finding objects: torchvision's detectors on the feature maps of any backbone."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ._features import Dense, Maps, statistics_of
from ._task import Task
from .checkpoints import write_atomically
from .coco import encode
from .detection_data import to_tensor
from .draw import draw_objects, save_picture
from .image_files import list_images, read_image
from .running import quiet, quiet_trainer

_SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
_RATIOS = (0.5, 1.0, 2.0)


class PyramidMaps(nn.Module):
    """The maps of a backbone joined by a feature pyramid, which is what torchvision's detectors call a backbone.

    Source: FPN, arXiv:1612.03144; its coarsest level is every second position of the one before.

    Args:
        maps: Feature maps.
        channels: Of every level.
    """

    def __init__(self, maps: Maps, channels: int) -> None:
        super().__init__()
        self.maps, self.out_channels = maps, channels
        self.fpn = FeaturePyramidNetwork(maps.channels, channels, extra_blocks=LastLevelMaxPool())
        self.strides = [*maps.strides, maps.strides[-1] * 2]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images `(b, c, h, w)` to one map `(b, channels, h', w')` a level, named "0", "1", ..., "pool"."""
        return self.fpn(OrderedDict((str(i), y) for i, y in enumerate(self.maps(x))))


class DetectorNet(Dense):
    """One of torchvision's detectors; they take lists of images and return losses, or objects in evaluation mode.

    Anchors grow with the strides of the maps: from 4 positions for RetinaNet, which has three sizes a level, and from 8
    for the two-stage detectors, as published for strides from 8 and from 4, unless `anchor_size` says otherwise.

    Args:
        maps: Feature maps.
        head: "retinanet" (arXiv:1708.02002), "faster_rcnn" (arXiv:1506.01497) or "mask_rcnn" (arXiv:1703.06870).
        num_classes: Classes, without the background.
        channels: Of the feature pyramid.
        hidden: Width of the second stage.
        size: Pixels of the shorter side that images are resized to; None leaves them as they are.
        max_size: Most pixels of the longer side.
        anchor_size: Pixels of the smallest anchors' sides; None follows the strides.
        rois: Regions of an image that the second stage learns from. Of each image, four times as many are proposed.
        detections: Most objects that are found in an image.
        mean: Of the colours.
        std: Likewise.
    """

    def __init__(
        self,
        maps: Maps,
        head: str,
        num_classes: int,
        channels: int = 256,
        hidden: int = 1024,
        size: int | None = None,
        max_size: int = 1333,
        anchor_size: int | None = None,
        rois: int = 512,
        detections: int = 100,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        backbone = PyramidMaps(maps, channels)
        strides = backbone.strides
        options: dict[str, Any] = {
            "min_size": size or 1,
            "max_size": max_size,
            "image_mean": list(mean),
            "image_std": list(std),
            "size_divisible": strides[-1],
        }
        if head == "retinanet":
            first = anchor_size or 4 * strides[0]
            sizes = tuple(tuple(int(first * s / strides[0] * scale) for scale in _SCALES) for s in strides)
            options["anchor_generator"] = AnchorGenerator(sizes, (_RATIOS,) * len(strides))
            options["detections_per_img"] = detections
            self.detector: Any = RetinaNet(backbone, num_classes + 1, **options)
        else:
            first = anchor_size or 8 * strides[0]
            sizes = tuple((first * s // strides[0],) for s in strides)
            options["rpn_anchor_generator"] = AnchorGenerator(sizes, (_RATIOS,) * len(sizes))
            options["box_detections_per_img"] = detections
            options |= {"box_batch_size_per_image": rois, "rpn_batch_size_per_image": min(256, rois)}
            for when, factor in (("train", 4), ("test", 2)):
                options |= {f"rpn_{k}_nms_top_n_{when}": factor * rois for k in ("pre", "post")}
            self.detector = _two_stages(head, num_classes + 1, hidden, backbone, options)
        if size is None:
            self.detector.transform.resize = _as_it_is

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Losses by name in training mode, else for each image its `boxes`, `labels` from 1, `scores` and `masks`."""
        return self.detector(images, targets)


class Detector(Task):
    """A detector on a backbone of the zoo, scored by COCO's mean average precision.

    Args:
        name: As in `mamba_zoo.list_models()`, or any model of timm that offers feature maps.
        scan: Scan order; None is the published one.
        head: "faster_rcnn" or "retinanet", for instance-segmentation "mask_rcnn"; None is the first of these.
        class_names: In the order of the class numbers, without the background.
        img_size: Pixels of the shorter side that images are resized to; None leaves them as they are.
        max_size: Most pixels of the longer side.
        anchor_size: Pixels of the smallest anchors' sides; None follows the strides of the maps, as published.
        rois: Regions of an image that a second stage learns from; fewer will do for small images.
        detections: Most objects that are found in an image; COCO's scores count 100.
        out_indices: Which maps of the backbone, such as [1, 2, 3]; None takes its own choice.
        fpn_channels: Of the feature pyramid.
        hidden: Width of the second stage.
        options: Further arguments of the backbone, such as `{"patch_size": 2}`.
        pretrained: Start from the published weights of the backbone.
        checkpoint_path: Start from a published checkpoint file of the backbone. Not read when a checkpoint of a run is
            loaded.
        drop_path_rate: Stochastic depth; None is the model's own.
        opt: See `Task`.
        lr: See `Task`.
        weight_decay: See `Task`.
        layer_decay: See `Task`.
        recipe: See `Task`.
        warmup_epochs: See `Task`.
        min_lr: See `Task`.
        ema_decay: See `Task`.
        freeze: See `Task`.

    Raises:
        ValueError: an unknown model or setting.
        ModuleNotFoundError: pycocotools, which computes the scores, is not installed.
    """

    unit = "images"
    monitor, monitor_mode = "val/map", "max"
    score_name, percent = "mAP", True
    curves: ClassVar[tuple[str, ...]] = ("val/map", "val/map_50")
    metric_names: ClassVar[Mapping[str, str]] = {
        "map": "box mAP",
        "map_50": "box mAP at IoU 0.5",
        "map_75": "box mAP at IoU 0.75",
        "mar_100": "box recall",
        "mask_map": "mask mAP",
        "mask_map_50": "mask mAP at IoU 0.5",
        "mask_map_75": "mask mAP at IoU 0.75",
        "mask_mar_100": "mask recall",
    }
    heads: ClassVar[tuple[str, ...]] = ("faster_rcnn", "retinanet")

    def __init__(
        self,
        name: str = "vmamba_mini",
        scan: str | None = None,
        head: str | None = None,
        class_names: list[str] | None = None,
        img_size: int | None = None,
        max_size: int = 1333,
        anchor_size: int | None = None,
        rois: int = 512,
        detections: int = 100,
        out_indices: list[int] | None = None,
        fpn_channels: int = 256,
        hidden: int = 1024,
        options: dict[str, Any] | None = None,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        drop_path_rate: float | None = None,
        opt: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        recipe: Literal["recommended", "as-published"] = "recommended",
        warmup_epochs: float = 1.0,
        min_lr: float = 0.01,
        ema_decay: float | None = None,
        freeze: Literal["none", "backbone", "bn"] = "none",
    ) -> None:
        head = head or self.heads[0]
        if head not in self.heads:
            raise ValueError(f"head={head!r} is unknown here; choose one of {', '.join(self.heads)}")
        sizes = {"rois": rois, "detections": detections, "fpn_channels": fpn_channels, "hidden": hidden}
        if small := [f"{key}={value}" for key, value in sizes.items() if value < 1]:
            raise ValueError(f"{', '.join(small)} must be at least 1")
        class_names = class_names or [str(i) for i in range(10)]
        maps = Maps(name, scan, img_size, pretrained, checkpoint_path, drop_path_rate, out_indices, options)
        net = DetectorNet(
            maps,
            head,
            len(class_names),
            fpn_channels,
            hidden,
            img_size,
            max_size,
            anchor_size,
            rois,
            detections,
            *statistics_of(name),
        )
        super().__init__(
            net, name, opt, lr, weight_decay, layer_decay, recipe, warmup_epochs, min_lr, ema_decay, freeze
        )
        self.save_hyperparameters()
        self.class_names = class_names
        self.val_metrics, self.test_metrics = mean_average_precision(head), mean_average_precision(head)

    def training_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], batch_idx: int) -> Tensor:
        """The sum of the detector's losses on one batch."""
        losses = self.net(*batch)
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], batch_idx: int) -> None:
        """Collect the objects found in one batch."""
        self._collect(batch, self.val_metrics)

    def test_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], batch_idx: int) -> None:
        """Collect the objects found in one batch."""
        self._collect(batch, self.test_metrics)

    def on_validation_epoch_end(self) -> None:
        """Score what was collected."""
        self._score("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Score what was collected."""
        self._score("test", self.test_metrics)

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Tensor]]:
        """For each image `boxes` `(n, 4)`, `labels` from 1, `scores`, and `masks` `(n, 1, h, w)` from 0 to 1."""
        return self.inference_net(batch[0])

    @classmethod
    def predict_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Which objects are written, and whether pictures are."""
        parser.add_argument(
            "--score",
            type=float,
            default=0.5,
            help="least score, from 0.05 (default: 0.5)",
        )
        parser.add_argument("--no-pictures", action="store_true", help="write predictions.json only")

    def predict_files(self, args: argparse.Namespace) -> str:
        """Objects of image files as `predictions.json` and as pictures, by default in the folder `predictions`.

        Raises:
            FileNotFoundError: no such folder, or no image in it.
            ValueError: a `score` outside 0..1.
        """
        if not 0 <= args.score <= 1:
            raise ValueError(f"score={args.score} must lie between 0 and 1")
        out = args.out or Path("predictions")
        paths = [args.data] if args.data.is_file() else list_images(args.data)
        loader = DataLoader(
            ImageFiles(paths), batch_size=min(args.batch_size, 8), num_workers=args.num_workers, collate_fn=_images_only
        )
        with quiet():
            batches: Any = quiet_trainer(args.device).predict(self, loader)
        rows, count = [], 0
        for path, found in zip(paths, (one for batch in batches for one in batch), strict=True):
            objects = self._objects(found, args.score)
            count += len(objects)
            rows.append({"file": str(path), "objects": objects})
            if not args.no_pictures:
                save_picture(self._picture(path, found, args.score), out / picture_name(path, args.data, out))
        write_atomically(out / "predictions.json", lambda f: f.write(json.dumps(rows).encode()))
        return f"{count:,} objects in {len(paths):,} images -> {out}"

    def _collect(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], metrics: Any) -> None:
        images, targets = batch
        metrics.update([_plain(one) for one in self.inference_net(images)], [_plain(target) for target in targets])

    def _score(self, split: str, metrics: Any) -> None:
        scores = metrics.compute()
        metrics.reset()
        kept = ("map", "map_50", "map_75", "mar_100")
        for key, value in scores.items():
            short = key.removeprefix("bbox_").replace("segm_", "mask_")
            if short.removeprefix("mask_") in kept:
                self.log(f"{split}/{short}", value.clamp(min=0.0))

    def _objects(self, found: Mapping[str, Tensor], least: float) -> list[dict[str, Any]]:
        objects = []
        for i in torch.nonzero(found["scores"] >= least).flatten().tolist():
            x0, y0, x1, y1 = (round(v, 2) for v in found["boxes"][i].tolist())
            one: dict[str, Any] = {
                "class": self.class_names[int(found["labels"][i]) - 1],
                "score": round(float(found["scores"][i]), 4),
                "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
            }
            if "masks" in found:
                one["segmentation"] = encode(found["masks"][i, 0].cpu().numpy() > 0.5)
            objects.append(one)
        return objects

    def _picture(self, path: Path, found: Mapping[str, Tensor], least: float) -> Image.Image:
        kept = {key: value[found["scores"] >= least].cpu() for key, value in found.items()}
        classes = (kept["labels"] - 1).tolist()
        labels = [f"{self.class_names[c]} {s:.2f}" for c, s in zip(classes, kept["scores"].tolist(), strict=True)]
        masks = kept["masks"][:, 0].numpy() > 0.5 if "masks" in kept else None
        return draw_objects(read_image(path, "RGB"), kept["boxes"].numpy(), labels, classes, masks)


class InstanceSegmenter(Detector):
    """Mask R-CNN on a backbone of the zoo, scored by the mean average precision of its masks; see `Detector`."""

    monitor = "val/mask_map"
    score_name = "mask mAP"
    curves: ClassVar[tuple[str, ...]] = ("val/mask_map", "val/map")
    heads: ClassVar[tuple[str, ...]] = ("mask_rcnn",)


class ImageFiles(Dataset):
    """Image files as tensors `(3, h, w)` from 0 to 1."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return to_tensor(read_image(self.paths[index], "RGB"))


def picture_name(path: Path, data: Path, out: Path) -> Path:
    """Where the picture of a file goes below `out`: as its file lies below `data`, but never in its place.

    Files of another kind than PNG keep their ending: `a.jpg` and `a.png` may lie side by side.
    """
    inside = Path(path.name) if path == data else path.relative_to(data)
    if path.suffix.lower() == ".png" and (out / inside).resolve() != path.resolve():
        return inside
    return inside.with_name(f"{inside.name}.png")


def mean_average_precision(head: str) -> Any:
    """COCO's scores, of boxes and, for "mask_rcnn", of masks.

    Raises:
        ModuleNotFoundError: pycocotools is not installed.
    """
    from torchmetrics.detection import MeanAveragePrecision

    try:
        metric = MeanAveragePrecision(iou_type=("bbox", "segm") if head == "mask_rcnn" else "bbox")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the scores of detection need pycocotools; pip install 'mamba_zoo[detection]'"
        ) from None
    metric.warn_on_many_detections = False
    return metric


def _plain(objects: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Objects as the metric takes them: float32, and masks `(n, h, w)` that say yes or no."""
    found = {key: value.float() if value.is_floating_point() else value for key, value in objects.items()}
    if (masks := found.get("masks")) is not None:
        found["masks"] = masks[:, 0] > 0.5 if masks.dim() == 4 else masks.bool()
    return found


def _images_only(items: list[Tensor]) -> tuple[list[Tensor]]:
    return (items,)


def _as_it_is(image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
    """In place of torchvision's resizing."""
    return image, target


def _two_stages(head: str, num_classes: int, hidden: int, backbone: PyramidMaps, options: dict[str, Any]) -> nn.Module:
    levels, channels = [str(i) for i in range(len(backbone.maps.strides))], backbone.out_channels
    options = {
        **options,
        "box_roi_pool": MultiScaleRoIAlign(levels, 7, 2),
        "box_head": TwoMLPHead(channels * 7 * 7, hidden),
        "box_predictor": FastRCNNPredictor(hidden, num_classes),
    }
    if head == "faster_rcnn":
        return FasterRCNN(backbone, **options)
    options["mask_roi_pool"] = MultiScaleRoIAlign(levels, 14, 2)
    options["mask_head"] = MaskRCNNHeads(channels, (channels,) * 4, 1)
    options["mask_predictor"] = MaskRCNNPredictor(channels, channels, num_classes)
    return MaskRCNN(backbone, **options)

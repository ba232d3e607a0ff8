"""Models of point clouds trained to name shapes, and to find their parts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._classifier import Classifier, check_classes
from ._point_nets import build_point_net, with_features
from ._task import Task
from .point_augment import PointAugment, Rotation
from .running import write_csv

Freeze = Literal["none", "backbone", "bn"]
Recipe = Literal["recommended", "as-published"]
_EXAMPLES = 4


class PointTask(Task):
    """What all point tasks share: how many points the model sees, and how training clouds are changed."""

    unit = "clouds"
    orders = ("hilbert", "zcurve", "sort_z")
    grid: ClassVar[tuple[int, ...] | None] = None
    num_points: int
    augment: PointAugment
    features: tuple[str, ...] = ()

    @classmethod
    def scan_spec(cls, scan: Any) -> str:
        """The spec of an order of points."""
        from mamba_zoo.scans._cloud import cloud_spec

        return cloud_spec(scan)

    @classmethod
    def scan_directions(cls, spec: str) -> int | None:
        """Directions of an order of points."""
        from mamba_zoo.scans._cloud import directions

        return directions(spec)

    def sample(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The points that the model sees, and in training which ones they are: any of them, changed at random."""
        if not self.training:
            return x[:, : self.num_points], None
        index = None
        if x.shape[1] > self.num_points:
            index = torch.rand(x.shape[:2], device=x.device).argsort(dim=1)[:, : self.num_points]
            x = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
        return self.augment(x), index

    def read(self, net: nn.Module, x: Tensor, *told: Tensor) -> Tensor:
        """What a network says of clouds `(b, n, 3)`, or `(b, n, 6)` with normals, told the classes of their shapes."""
        return net(x[..., :3], *told, **with_features(net, x, self.features))

    def _set_points(self, num_points: int, augment: PointAugment) -> None:
        if num_points < 1:
            raise ValueError(f"num_points={num_points} must be at least 1")
        self.num_points, self.augment = num_points, augment


class PointClassifier(PointTask, Classifier):
    """A point model that names shapes.

    Args:
        name: As in `mamba_zoo.list_models(modality="points")`, or the baselines "dgcnn" and "pointnet2".
        scan: Order of the points; None is the model's own.
        num_classes: Outputs.
        num_points: Points of a cloud that the model sees: random ones in training, the same ones otherwise.
        options: Further arguments of the model, such as `{"groups": 32}`.
        checkpoint_path: Start from a published checkpoint file.
        init_encoder: Start from pre-training: a checkpoint of `point-pretraining`, the folder of its run, or a
            published file; the head starts anew.
        scale: See `PointAugment`, as for what follows.
        translate: See `PointAugment`.
        rotate: See `PointAugment`.
        tilt: See `PointAugment`.
        flip: See `PointAugment`.
        jitter: See `PointAugment`.
        votes: Class probabilities at test time are means over so many turned copies of a cloud; 1 takes it as it is.
        label_smoothing: Probability spread over the other classes.
        opt: See `Task`, as for all that follow.
        lr: See `Task`.
        weight_decay: See `Task`.
        layer_decay: See `Task`.
        recipe: See `Task`.
        warmup_epochs: See `Task`.
        min_lr: See `Task`.
        ema_decay: See `Task`.
        freeze: See `Task`.
        class_names: In the order of the class numbers; None numbers them.
        features: What the model is told of each point beside its place, see `PointData`; only forms of PCM read any.

    Raises:
        ValueError: an unknown model or setting.
    """

    def __init__(
        self,
        name: str = "pointmamba_mini",
        scan: str | None = None,
        num_classes: int = 10,
        num_points: int = 1024,
        options: dict[str, Any] | None = None,
        checkpoint_path: str | None = None,
        init_encoder: str | None = None,
        scale: tuple[float, float] = (1.0, 1.0),
        translate: float = 0.0,
        rotate: Rotation = "none",
        tilt: float = 0.0,
        flip: bool = False,
        jitter: float = 0.0,
        votes: int = 1,
        label_smoothing: float = 0.1,
        opt: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        recipe: Recipe = "recommended",
        warmup_epochs: float = 5.0,
        min_lr: float = 0.01,
        ema_decay: float | None = None,
        freeze: Freeze = "none",
        class_names: list[str] | None = None,
        features: list[str] | None = None,
    ) -> None:
        class_names = check_classes(num_classes, class_names)
        if votes < 1:
            raise ValueError(f"votes={votes} must be at least 1")
        net = build_point_net(name, scan, num_classes, None, with_file(options, checkpoint_path), features or ())
        _start_encoder(net, init_encoder)
        super().__init__(
            net, name, num_classes, class_names, label_smoothing, opt, lr, weight_decay, layer_decay, recipe,
            warmup_epochs, min_lr, ema_decay, freeze,
        )  # fmt: skip
        self.save_hyperparameters()
        self.votes, self.features = votes, tuple(features or ())
        self._set_points(num_points, PointAugment(scale, translate, rotate, tilt, flip, jitter))

    def scores(self, net: nn.Module, batch: Any) -> Tensor:
        """Class scores `(b, num_classes)`; the logarithm of mean probabilities where copies vote."""
        x, _ = self.sample(batch[0])
        if self.training or self.votes == 1:
            return self.read(net, x)
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)  # the same turns in every test
            copies = [x, *(self.augment.turn(x) for _ in range(self.votes - 1))]
        return torch.stack([self.read(net, copy).float().softmax(-1) for copy in copies]).mean(0).clamp(min=1e-9).log()

    @classmethod
    def predict_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """How many classes to list, and how clouds are thinned."""
        parser.add_argument("--top", type=int, default=5, help="classes to list for each cloud (default: 5)")
        parser.add_argument("--voxel", type=float, default=0.0, help="data.voxel, if the model was trained with any")

    def predict_files(self, args: argparse.Namespace) -> str:
        """Class probabilities of files of clouds and meshes, as CSV."""
        from .point_predict import predict_classes

        return predict_classes(self, args)


class PartSegmenter(PointTask):
    """A point model that names the part of every point, told the class of its shape.

    Scores are means of intersection over union, over the parts of a shape's class; a part that neither has nor is
    predicted counts as 1. "miou" is the mean over shapes, "class_miou" the mean over classes of the mean over theirs.
    Only parts of a shape's own class are predicted.

    Args:
        name: As in `mamba_zoo.list_models(modality="points")`, one for parts, or the baseline "dgcnn".
        scan: Order of the points; None is the model's own.
        num_points: Points of a cloud that the model sees at a time.
        options: Further arguments of the model.
        checkpoint_path: Start from a published checkpoint file.
        init_encoder: Start from pre-training, as for `PointClassifier`.
        scale: See `PointAugment`, as for what follows.
        translate: See `PointAugment`.
        rotate: See `PointAugment`.
        tilt: See `PointAugment`.
        flip: See `PointAugment`.
        jitter: See `PointAugment`.
        label_smoothing: Probability spread over the other parts.
        opt: See `Task`, as for all that follow.
        lr: See `Task`.
        weight_decay: See `Task`.
        layer_decay: See `Task`.
        recipe: See `Task`.
        warmup_epochs: See `Task`.
        min_lr: See `Task`.
        ema_decay: See `Task`.
        freeze: See `Task`.
        class_names: Of the shapes.
        part_names: Of the parts of each class; None stands for four classes of four parts.
        features: As for `PointClassifier`.

    Raises:
        ValueError: an unknown model or setting.
    """

    monitor, monitor_mode = "val/miou", "max"
    score_name, percent = "miou", True
    curves: ClassVar[tuple[str, ...]] = ("val/miou", "val/class_miou")
    metric_names: ClassVar[Mapping[str, str]] = {
        "miou": "instance mIoU",
        "class_miou": "class mIoU",
        "accuracy": "accuracy of points",
        "loss": "cross-entropy",
    }

    def __init__(
        self,
        name: str = "pointmamba_mini_parts",
        scan: str | None = None,
        num_points: int = 2048,
        options: dict[str, Any] | None = None,
        checkpoint_path: str | None = None,
        init_encoder: str | None = None,
        scale: tuple[float, float] = (1.0, 1.0),
        translate: float = 0.0,
        rotate: Rotation = "none",
        tilt: float = 0.0,
        flip: bool = False,
        jitter: float = 0.0,
        label_smoothing: float = 0.0,
        opt: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        recipe: Recipe = "recommended",
        warmup_epochs: float = 5.0,
        min_lr: float = 0.01,
        ema_decay: float | None = None,
        freeze: Freeze = "none",
        class_names: list[str] | None = None,
        part_names: list[list[str]] | None = None,
        features: list[str] | None = None,
    ) -> None:
        parts = part_names or [[str(i) for i in range(4)] for _ in range(4)]
        total = sum(map(len, parts))
        net = build_point_net(name, scan, total, len(parts), with_file(options, checkpoint_path), features or ())
        _start_encoder(net, init_encoder)
        super().__init__(
            net, name, opt, lr, weight_decay, layer_decay, recipe, warmup_epochs, min_lr, ema_decay, freeze
        )
        self.save_hyperparameters()
        self._set_points(num_points, PointAugment(scale, translate, rotate, tilt, flip, jitter))
        self.label_smoothing, self.features = label_smoothing, tuple(features or ())
        self.part_names = parts
        self.class_names = check_classes(max(2, len(parts)), class_names) if len(parts) > 1 else (class_names or ["0"])
        owner = torch.tensor([c for c, names in enumerate(parts) for _ in names])
        self.register_buffer("allowed", owner == torch.arange(len(parts))[:, None], persistent=False)
        self._tested: list[tuple[Tensor, Tensor]] = []
        self._running: list[tuple[Tensor, Tensor]] = []
        self._examples: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        points, shape, part = batch
        x, index = self.sample(points)
        part = part[:, : self.num_points] if index is None else part.gather(1, index)
        logits = self.read(self.net, x, shape).float()
        # Over the parts of the class alone: the label of the shape is known.
        masked = logits.masked_fill(~self.allowed_parts(shape)[:, None], -1e4)
        loss = F.cross_entropy(masked.flatten(0, 1), part.flatten())
        if self.label_smoothing:
            allowed = self.allowed_parts(shape)[:, None].float()
            even = -(masked.log_softmax(-1) * allowed).sum(-1) / allowed.sum(-1)
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * even.mean()
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(points))
        return loss

    def allowed_parts(self, shape: Tensor) -> Tensor:
        """Which parts `(b, parts)` the classes `(b,)` have."""
        return self.get_buffer("allowed")[shape]

    def label(self, points: Tensor, shape: Tensor) -> Tensor:
        """Parts `(b, n)` of all points, as for `read`, of shapes of the classes `(b,)`, in pieces of `num_points`."""
        found = []
        for start in range(0, points.shape[1], self.num_points):
            piece = points[:, start : start + self.num_points]
            if short := self.num_points - piece.shape[1]:
                # A shorter piece is filled up with points that have been labelled already.
                piece = torch.cat([piece, points[:, :short]], dim=1) if start else piece
            logits = self.read(self.inference_net, piece, shape).float()
            masked = logits.masked_fill(~self.allowed_parts(shape)[:, None], -torch.inf)
            found.append(masked.argmax(-1)[:, : points.shape[1] - start])
        return torch.cat(found, dim=1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Scores of one batch."""
        self._running.append(self._evaluate(batch, "val")[:2])

    def on_validation_epoch_start(self) -> None:
        """Forget the epoch before."""
        self._running.clear()

    def on_validation_epoch_end(self) -> None:
        """Scores over all shapes."""
        self._log_scores(self._running, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Scores of one batch; the first few shapes are kept."""
        iou, shape, predicted = self._evaluate(batch, "test")
        self._tested.append((iou, shape))
        for i in range(len(batch[0])):
            if shape[i].item() not in {label for *_, label in self._examples} and len(self._examples) < _EXAMPLES:
                arrays = [value[i, : predicted.shape[1]].cpu().numpy() for value in (batch[0], predicted, batch[2])]
                self._examples.append((arrays[0][:, :3], arrays[1], arrays[2], int(shape[i])))

    def on_test_epoch_start(self) -> None:
        """Forget an earlier test."""
        self._tested.clear()
        self._examples.clear()

    def on_test_epoch_end(self) -> None:
        """Scores over all shapes."""
        self._log_scores(self._tested, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Parts `(b, n)` of a batch `(points, shape, ...)`."""
        return self.label(batch[0], batch[1])

    @property
    def test_items(self) -> np.ndarray | None:
        """Mean IoU of every shape."""
        return torch.cat([iou for iou, _ in self._tested]).cpu().numpy() if self._tested else None

    def test_arrays(self) -> dict[str, np.ndarray]:
        """`iou` and `shape` of every tested shape."""
        if not self._tested:
            return {}
        iou, shape = (torch.cat(part).cpu().numpy() for part in zip(*self._tested, strict=True))
        return {"iou": iou, "shape": shape}

    def write_test_artifacts(self, out: Path) -> list[str]:
        """Scores of every class, and the parts of a few shapes as pictures and as a page that turns them."""
        from .point_figures import plot_parts, write_viewer

        arrays = self.test_arrays()
        rows = []
        for c, name in enumerate(self.class_names):
            own = arrays["iou"][arrays["shape"] == c]
            if len(own):
                rows.append({"class": name, "shapes": len(own), "miou": float(own.mean())})
        write_csv(out / "classes.csv", rows)
        clouds = []
        for i, (points, predicted, true, label) in enumerate(self._examples):
            names = self.part_names[label]
            first = sum(map(len, self.part_names[:label]))
            plot_parts(points, {"predicted": predicted - first, "true": true - first}, names, out / f"parts{i}.png")
            for title, part in (("predicted", predicted), ("true", true)):
                clouds.append((f"{self.class_names[label]}, {title}", points, part - first, names))
        write_viewer(clouds, out / "parts.html")
        return ["classes.csv", "parts0.png and others", "parts.html"]

    @classmethod
    def predict_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Which class the shapes are of."""
        parser.add_argument(
            "--shape", help="class of the shapes; without it, the name of the folder that holds a file must be one"
        )

    def predict_files(self, args: argparse.Namespace) -> str:
        """Parts of files of clouds and meshes: labels, pictures, and a page that turns them."""
        from .point_predict import predict_parts

        return predict_parts(self, args)

    def _evaluate(self, batch: Any, split: str) -> tuple[Tensor, Tensor, Tensor]:
        points, shape, part = batch
        predicted = self.label(points, shape)
        logits = self.read(self.inference_net, points[:, : self.num_points], shape).float()
        masked = logits.masked_fill(~self.allowed_parts(shape)[:, None], -1e4)
        loss = F.cross_entropy(masked.flatten(0, 1), part[:, : logits.shape[1]].flatten())
        accuracy = (predicted == part).float().mean()
        values = {f"{split}/loss": loss, f"{split}/accuracy": accuracy}
        self.log_dict(values, on_epoch=True, batch_size=len(points), sync_dist=True)
        return shape_iou(predicted, part, self.allowed_parts(shape)), shape, predicted

    def _log_scores(self, kept: list[tuple[Tensor, Tensor]], split: str) -> None:
        if not kept:
            return
        iou, shape = (torch.cat(part) for part in zip(*kept, strict=True))
        classes = torch.stack([iou[shape == c].mean() for c in shape.unique()])
        self.log_dict({f"{split}/miou": iou.mean(), f"{split}/class_miou": classes.mean()}, sync_dist=True)


def shape_iou(predicted: Tensor, true: Tensor, allowed: Tensor) -> Tensor:
    """Mean intersection over union of every shape, `(b,)`.

    Args:
        predicted: Parts `(b, n)`.
        true: Likewise.
        allowed: Which parts count for each shape, `(b, parts)` bool; those that neither has count as 1.
    """
    parts = torch.arange(allowed.shape[1], device=predicted.device)
    got, want = predicted[..., None] == parts, true[..., None] == parts
    both, either = (got & want).sum(1).float(), (got | want).sum(1).float()
    iou = torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(either))
    return (iou * allowed).sum(1) / allowed.sum(1)


def with_file(options: Mapping[str, Any] | None, checkpoint_path: str | None) -> dict[str, Any]:
    """Arguments of a model with the published checkpoint that it starts from, if any."""
    return {**(options or {}), **({} if checkpoint_path is None else {"checkpoint_path": checkpoint_path})}


def _start_encoder(net: nn.Module, path: str | None) -> None:
    if path is None:
        return
    from ..backbones.pointmamba import PointMamba, load_encoder

    if not isinstance(net, PointMamba):
        raise ValueError(f"init_encoder={path!r} goes with models of the PointMamba family, which were pre-trained")
    where = Path(path).expanduser()
    load_encoder(net, where / "best.ckpt" if where.is_dir() else where)

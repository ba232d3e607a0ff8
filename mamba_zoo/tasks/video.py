"""A video model of the zoo trained to name what happens in clips."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

import mamba_zoo

from ._classifier import Classifier, check_classes, write_classes
from .building import build_model
from .clips import list_clips, read_clip
from .draw import draw_strip, save_picture
from .image_transforms import Preprocess
from .running import quiet, quiet_trainer
from .video_data import Clips


class VideoClassifier(Classifier):
    """A video model of the zoo with its loss, metrics, optimizer and, if asked, an average of its weights.

    Args:
        name: As in `mamba_zoo.list_models(modality="video")`.
        scan: Scan order; None is the published one.
        num_classes: Outputs.
        img_size: Height and width in pixels.
        num_frames: Frames of a clip.
        pretrained: Start from the published weights.
        checkpoint_path: Start from a published checkpoint file. Not read when a checkpoint of a run is loaded.
        drop_rate: Dropout before the head; None is the model's own.
        drop_path_rate: Stochastic depth; None is the model's own.
        label_smoothing: Probability spread over the other classes.
        opt: See `Task`.
        lr: See `Task`.
        weight_decay: See `Task`.
        layer_decay: See `Task`.
        recipe: See `Task`.
        warmup_epochs: See `Task`.
        min_lr: See `Task`.
        ema_decay: See `Task`.
        freeze: See `Task`.
        class_names: In the order of the class numbers; None numbers them.
        preprocess: How frames are prepared, as a dictionary; stored for prediction.

    Raises:
        ValueError: an unknown model or setting, or a model that takes no clips.
    """

    unit = "clips"
    orders = ("spatial_first", "temporal_first", "hilbert_video")
    grid = (8, 14, 14)

    def __init__(
        self,
        name: str = "videomamba_mini_video",
        scan: str | None = None,
        num_classes: int = 4,
        img_size: int | None = None,
        num_frames: int = 8,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        drop_rate: float | None = None,
        drop_path_rate: float | None = None,
        label_smoothing: float = 0.1,
        opt: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        recipe: Literal["recommended", "as-published"] = "recommended",
        warmup_epochs: float = 1.0,
        min_lr: float = 0.01,
        ema_decay: float | None = None,
        freeze: Literal["none", "backbone", "bn"] = "none",
        class_names: list[str] | None = None,
        preprocess: dict[str, Any] | None = None,
    ) -> None:
        class_names = check_classes(num_classes, class_names)
        if mamba_zoo.model_card(name).modality != "video":
            known = ", ".join(mamba_zoo.list_models(modality="video"))
            raise ValueError(f"{name} takes no clips; choose a video model: {known}")
        # Their position embeddings are resampled to the size of the clips, published ones too.
        more = {"num_frames": num_frames} | ({} if img_size is None else {"img_size": img_size})
        net = build_model(
            name, scan, num_classes, 3, img_size, pretrained, checkpoint_path, drop_rate, drop_path_rate, more
        )
        super().__init__(
            net, name, num_classes, class_names, label_smoothing, opt, lr, weight_decay, layer_decay, recipe,
            warmup_epochs, min_lr, ema_decay, freeze,
        )  # fmt: skip
        self.save_hyperparameters()

    @classmethod
    def predict_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """How many classes to list, and whether pictures are drawn."""
        parser.add_argument("--top", type=int, default=5, help="classes to list for each clip (default: 5)")
        parser.add_argument("--no-pictures", action="store_true", help="write predictions.csv only")

    def predict_files(self, args: argparse.Namespace) -> str:
        """Classes of clips as `predictions.csv`, and their frames with the label, by default in `predictions`.

        Raises:
            FileNotFoundError: no such path, or no clip in it.
            ValueError: `top` below 1, a clip that cannot be read, or a model that does not say how frames are prepared.
        """
        if args.top < 1:
            raise ValueError(f"top={args.top} must be at least 1")
        if self.hparams["preprocess"] is None:
            raise ValueError("the checkpoint does not say how its frames were prepared; train with preprocess=")
        out, clips, frames = args.out or Path("predictions"), list_clips(args.data), self.hparams["num_frames"]
        data = Clips(clips, [0] * len(clips), frames, Preprocess.from_dict(self.hparams["preprocess"]))
        with quiet():
            loader = DataLoader(data, batch_size=min(args.batch_size, 16), num_workers=args.num_workers)
            batches: Any = quiet_trainer(args.device).predict(self, loader)
        probabilities = torch.cat(batches)
        write_classes(out / "predictions.csv", clips, probabilities, self.class_names, args.top)
        if not args.no_pictures:
            for clip, scores in zip(clips, probabilities, strict=True):
                best = int(scores.argmax())
                strip = draw_strip(read_clip(clip, frames), f"{self.class_names[best]}  {float(scores[best]):.2f}")
                inside = Path(clip.name) if clip == args.data else clip.relative_to(args.data)
                save_picture(strip, out / inside.with_name(f"{inside.name}.png"))
        return f"{len(clips):,} clips -> {out}"

"""A model of series trained to name them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ._classifier import Classifier, check_classes, write_classes
from ._series_task import build_series_model
from .labelled_series import check_scale, padded
from .series_files import read_ts


class SeriesClassifier(Classifier):
    """A model of series with its loss and metrics.

    Series of several lengths are padded; models that can are told the lengths, the others read zeros.

    Args:
        name: As in `mamba_zoo.list_models(modality="series")`.
        scan: Scan order; None is the published one.
        net: Further arguments of the model, such as `{"dim": 128, "depth": 3}`.
        num_classes: Outputs.
        in_chans: Channels of the series.
        seq_len: Steps of the longest series.
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
        mean: Of each channel, for `scale="channels"`.
        deviation: Of each channel, likewise.
        scale: How series are scaled; see `LabelledSeries`.

    Raises:
        ValueError: an unknown model or setting.
    """

    unit = "series"
    orders = ("forward", "reversed", "bidirectional")
    grid: ClassVar[tuple[int, ...] | None] = None

    def __init__(
        self,
        name: str = "series_mamba",
        scan: str | None = None,
        net: dict[str, Any] | None = None,
        num_classes: int = 2,
        in_chans: int = 1,
        seq_len: int = 96,
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
        mean: list[float] | None = None,
        deviation: list[float] | None = None,
        scale: str = "channels",
    ) -> None:
        class_names = check_classes(num_classes, class_names)
        check_scale(scale)
        sizes = {"in_chans": in_chans, "seq_len": seq_len, "num_classes": num_classes}
        super().__init__(
            build_series_model(name, scan, None, sizes, net), name, num_classes, class_names, label_smoothing, opt, lr,
            weight_decay, layer_decay, recipe, warmup_epochs, min_lr, ema_decay, freeze,
        )  # fmt: skip
        self.save_hyperparameters()
        self.seq_len, self.scale = seq_len, scale
        self.mean, self.deviation = mean or [0.0] * in_chans, deviation or [1.0] * in_chans

    def scores(self, net: nn.Module, batch: Any) -> Tensor:
        """Class scores of padded series `(b, l, channels)` and their lengths."""
        x, _, lengths = batch
        return net(x, lengths=lengths) if getattr(net, "takes_lengths", False) else net(x)

    def predict_files(self, args: argparse.Namespace) -> str:
        """Class probabilities of the series in a `.ts` file, as CSV."""
        out = args.out or Path("predictions.csv")
        found = read_ts(args.data)
        if found.channels != len(self.mean):
            raise ValueError(f"{args.data} has {found.channels} channels, but the model reads {len(self.mean)}")
        longest = max(len(series) for series in found.series)
        steps = max(longest, self.seq_len) if getattr(self.net, "takes_lengths", False) else self.seq_len
        if longest > steps:
            raise ValueError(f"{args.data} has a series of {longest} steps, but {self.name} reads {steps} at most")
        x, lengths = padded(found.series, steps, self.mean, self.deviation, self.scale)
        device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
        self.to(device)
        with torch.inference_mode():
            parts = [
                self.predict_step((part.to(device), None, length), 0).cpu()
                for part, length in zip(x.split(args.batch_size), lengths.split(args.batch_size), strict=True)
            ]
        write_classes(out, [{"series": i} for i in range(len(x))], torch.cat(parts), self.class_names)
        return f"{len(x):,} series -> {out}"

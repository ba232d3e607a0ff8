"""The tasks that can be trained, by name. A new task is its file and one line here."""

from __future__ import annotations

import difflib
import importlib
import os
import re
from dataclasses import dataclass
from importlib.util import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._data import TaskData
    from ._task import Task

DEFAULT = "image-classification"


@dataclass(frozen=True)
class TaskEntry:
    """One task; its modules are imported when they are asked for.

    Attributes:
        model: Module and class of the `Task`, such as ".classification:ImageClassifier"; modules that start with a dot
            are of this package.
        data: Module and class of the `TaskData`, likewise.
        what: What it does, in a few words.
        recipes: Pairs of a regular expression and the name of a recipe in `configs/`: without `--config`, the first
            pair whose expression matches the whole of `--data.root` applies, or the first of all without a root.
    """

    model: str
    data: str
    what: str
    recipes: tuple[tuple[str, str], ...]

    @property
    def model_class(self) -> type[Task]:
        """The class of the `Task`."""
        return _load(self.model)

    @property
    def data_class(self) -> type[TaskData]:
        """The class of the `TaskData`."""
        return _load(self.data)

    def recipe(self, root: str | None) -> str:
        """Name of the recipe for data at `root`; None stands for the data of the first recipe."""
        fits = (name for pattern, name in self.recipes if root is None or re.fullmatch(pattern, root))
        return next(fits, self.recipes[0][1])


_SMALL_IMAGES = r"torchvision:(CIFAR|SVHN|MNIST|FashionMNIST|KMNIST|EMNIST|USPS).*"

TASKS: dict[str, TaskEntry] = {
    "image-classification": TaskEntry(
        ".classification:ImageClassifier", ".image_data:ImageData", "name what an image shows",
        (("digits", "digits"), (_SMALL_IMAGES, "cifar"), (".*", "imagefolder")),
    ),
    "audio-classification": TaskEntry(
        ".audio_classification:AudioClassifier", ".audio_data:AudioData", "name what a recording holds",
        (("tones", "tones"), (r".*(fsdd|free-spoken-digit).*", "fsdd"), (r"(?i).*speech_?commands.*", "speechcommands"),
         (".*", "audiofolder")),
    ),
    "audio-tagging": TaskEntry(
        ".audio_classification:AudioTagger", ".audio_data:TaggingData", "name everything that a recording holds",
        (("tones", "tones_tagging"), (".*", "audio_tagging")),
    ),
    "speech-enhancement": TaskEntry(
        ".speech:SpeechEnhancer", ".speech_data:EnhancementData", "take noise out of speech",
        (("synthetic", "enhancement"), (".*", "enhancement_folder")),
    ),
    "speech-separation": TaskEntry(
        ".speech:SpeechSeparator", ".speech_data:SeparationData", "take voices apart that speak at the same time",
        (("synthetic", "separation"), (".*", "separation_folder")),
    ),
    "object-detection": TaskEntry(
        ".detection:Detector", ".detection_data:DetectionData", "find objects and their boxes",
        (("digits", "detection_digits"), (".*", "detection_coco")),
    ),
    "instance-segmentation": TaskEntry(
        ".detection:InstanceSegmenter", ".detection_data:InstanceData", "find objects and their outlines",
        (("digits", "instances_digits"), (".*", "instances_coco")),
    ),
    "graph-classification": TaskEntry(
        ".graph:GraphClassifier", ".graph_data:GraphData", "name graphs",
        (("digits", "graph_digits"), (r"tu:.*", "graph_tu"), (".*", "graph_digits")),
    ),
    "graph-tagging": TaskEntry(
        ".graph_tagging:GraphTagger", ".graph_tags:TaggedGraphData", "name everything that a graph is",
        (("digits-tags", "graph_digits_tags"), (r"pyg:LRGBDataset:Peptides-func", "graph_peptides_func"),
         (".*", "graph_digits_tags")),
    ),
    "graph-regression": TaskEntry(
        ".graph_regression:GraphRegressor", ".graph_data:TargetData", "read numbers off graphs",
        (("digits", "graph_digits_regression"), (r"moleculenet:.*", "graph_esol"), (".*", "graph_digits_regression")),
    ),
    "node-classification": TaskEntry(
        ".graph:NodeClassifier", ".graph_nodes:NodeData", "name the nodes of one graph or several",
        (("karate", "graph_karate"), (r"planetoid:.*", "graph_cora"), (".*", "graph_karate")),
    ),
    "edge-classification": TaskEntry(
        ".graph:EdgeClassifier", ".graph_edges:EdgeData", "say which nodes of a graph are joined",
        (("karate", "graph_karate_edges"), (r"planetoid:.*", "graph_cora_edges"), (".*", "graph_karate_edges")),
    ),
    "node-regression": TaskEntry(
        ".graph_regression:NodeRegressor", ".graph_targets:NodeTargetData", "read numbers off the nodes of a graph",
        ((".*", "graph_karate_strength"),),
    ),
    "edge-regression": TaskEntry(
        ".graph_regression:EdgeRegressor", ".graph_targets:EdgeTargetData", "read numbers off the edges of a graph",
        ((".*", "graph_karate_ties"),),
    ),
    "forecasting": TaskEntry(
        ".forecasting:Forecaster", ".series_data:SeriesData", "say how series go on",
        (
            ("eeg", "forecast"), (".*ETTh1.*", "forecast_etth1"), (".*exchange_rate.*", "forecast_exchange"),
            (".*", "forecast"),
        ),
    ),
    "imputation": TaskEntry(
        ".imputation:Imputer", ".series_windows:WindowData", "fill gaps of series",
        ((".*", "imputation"),),
    ),
    "anomaly": TaskEntry(
        ".anomaly:AnomalyDetector", ".series_windows:WatchedData", "score how unusual each step of series is",
        ((".*", "anomaly"),),
    ),
    "series-classification": TaskEntry(
        ".series_classification:SeriesClassifier", ".labelled_series:LabelledSeries", "name what a series is",
        (("digits", "series_digits"), (".*", "series_classification")),
    ),
    "semantic-segmentation": TaskEntry(
        ".segmentation:Segmenter", ".segmentation_data:SegmentationData", "give every pixel a class",
        (("digits", "segmentation_digits"), ("torchvision:Cityscapes", "segmentation_cityscapes"),
         (".*", "segmentation_folder")),
    ),
    "video-classification": TaskEntry(
        ".video:VideoClassifier", ".video_data:VideoData", "name what happens in a clip",
        (("moving-digits", "video_digits"), (".*", "video_folder")),
    ),
    "point-classification": TaskEntry(
        ".points:PointClassifier", ".point_data:PointData", "name shapes given as points",
        (("digits", "points_digits"), (".*", "points_folder")),
    ),
    "part-segmentation": TaskEntry(
        ".points:PartSegmenter", ".point_data:PartData", "name the part of every point of a shape",
        (("solids", "parts_solids"), (".*", "parts_folder")),
    ),
    "point-pretraining": TaskEntry(
        ".point_pretraining:PointPretrainer", ".point_data:UnlabelledData",
        "fill in patches of points, before classification",
        (("digits", "pretraining_digits"), (".*", "pretraining_folder")),
    ),
}  # fmt: skip


def find_task(name: str) -> TaskEntry:
    """The task of that name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(TASKS)}"
    raise ValueError(f"no task named {name!r}; {hint}")


def task_of(model: type) -> str | None:
    """Name of the task that trains a `Task` of this class, or of a class it inherits from; None if no task does."""
    return _named(model, "model")


def task_for(data: type) -> str:
    """Name of the first task that trains on data of this class, or of a class it inherits from.

    Raises:
        ValueError: no task does.
    """
    name = _named(data, "data")
    if name is None:
        raise ValueError(f"no task trains on {data.__name__}; name it with task=, one of {', '.join(TASKS)}")
    return name


def load_task(path: str | os.PathLike[str]) -> Task:
    """The trained model of any run, in evaluation mode on the CPU; nothing is downloaded and no pickle is run.

    Args:
        path: A checkpoint of `mamba-zoo fit`, or the folder of the run for its best one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no such checkpoint.
    """
    from .checkpoints import read_checkpoint

    checkpoint = read_checkpoint(path)
    # Checkpoints older than the tasks name none: there were images only.
    return find_task(checkpoint.get("task", DEFAULT)).model_class.from_checkpoint(path)


def task_list() -> str:
    """One line a task, for help texts."""
    width = max(map(len, TASKS))
    return "\n".join(f"  {name:<{width}}  {entry.what}" for name, entry in TASKS.items())


def _named(cls: type, part: str) -> str | None:
    for base in cls.__mro__:
        for name, entry in TASKS.items():
            module, _, qualname = getattr(entry, part).partition(":")
            if (base.__module__, base.__qualname__) == (resolve_name(module, __package__), qualname):
                return name
    return None


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module, __package__), name)

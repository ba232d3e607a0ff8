"""Comparing the weights in a file with those of a model: containers, prefixes, names and shapes."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.models import PretrainedCfg
from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn

# Where the projects keep their weights, most specific first. The averaged copy (`*_ema`) is only taken when a file has
# nothing else: the published scores belong to the plain entry wherever a file has both. Runs of timm's scripts and of
# this package validate the average, so that theirs come first; see `_containers`.
_CONTAINERS = (
    "state_dict",
    "model",
    "module",  # DeepSpeed
    "base_model",  # Point-MAE and its descendants
    "generator",  # SEMamba
    "model_state",  # GraphGym
    "model_state_dict",
    "state_dict_ema",
    "model_ema",
    "ema_model",
)
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
_HOLDERS = ("net.", "model.", "backbone.", "encoder.", "audio_model.")
# What surrounds a backbone in a detector, a segmenter or a training module. Only these may be left out of a file.
_SURROUNDINGS = (
    "auxiliary_head.",
    "bbox_head.",
    "confusion.",
    "criterion.",
    "data_preprocessor.",
    "decode_head.",
    "loss.",
    "metrics.",
    "neck.",
    "roi_head.",
    "rpn_head.",
)


@dataclass
class Match:
    """How the weights in a file compare with those of a model.

    Attributes:
        values: For each name of the model's state dict the tensor to load.
        missing: Names that the model has and the file has not.
        unexpected: Names that the file has and the model has not.
        shapes: Names in both, with the file's shape and the model's, where the shapes differ.
        allowed: Differences that the caller asked for, in words.
        resized: The family's filter changed the number of values, as resizing a position table does.
        classes: Rows of the file's classifier, if it has one.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[str, str]] = field(default_factory=dict)
    allowed: list[str] = field(default_factory=list)
    resized: bool = False
    classes: int | None = None

    @property
    def differences(self) -> int:
        """How many names keep the file from fitting."""
        return len(self.missing) + len(self.unexpected) + len(self.shapes)

    def __str__(self) -> str:
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} weights of the model are not in it ({_some(self.missing)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} of its weights have no place ({_some(self.unexpected)})")
        if self.shapes:
            listed = [f"{name}: file {theirs}, model {ours}" for name, (theirs, ours) in self.shapes.items()]
            parts.append(f"{len(self.shapes)} differ in shape ({_some(listed, '; ')})")
        return "; ".join(parts)


def _some(names: list[str], between: str = ", ", limit: int = 3) -> str:
    return between.join(names[:limit]) + (f"{between}..." if len(names) > limit else "")


def unwrap(loaded: Any, ours: Container[str] = ()) -> tuple[dict[str, Tensor], str]:
    """The state dict within whatever a checkpoint file holds, and which entry it is, for messages.

    Args:
        loaded: From the file.
        ours: Names of the registered models, by which runs of timm's scripts that train them are told from published
            files of the same form.

    Returns: The state dict; and the entry, as "'state_dict_ema', not its 'state_dict'", empty if the file is the dict.

    Raises:
        ValueError: there is none; the message says what is there instead.
    """
    entry = ""
    while isinstance(loaded, Mapping):
        held = [name for name in _containers(loaded, ours) if _holds_weights(loaded.get(name))]
        if not held:
            break
        if not entry:
            entry = repr(held[0]) + (f", not its {' or '.join(map(repr, held[1:]))}" if held[1:] else "")
        loaded = loaded[held[0]]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"it holds a {type(loaded).__name__}, not a dict of weights")
    odd = [str(name) for name, value in loaded.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if odd or not loaded:
        inside = f"its entries are {_some(list(map(str, loaded)), limit=8)}" if loaded else "it is an empty dict"
        raise ValueError(f"it holds no weights under a known name: {inside}")
    return dict(loaded), entry


def _containers(loaded: Mapping[str, Any], ours: Container[str]) -> list[str]:
    """Names of entries, those to look at first first."""
    first = ()
    if "pytorch-lightning_version" in loaded:
        first = ("ema",)
    # MambaVision's files have names that timm's scripts give, and may be like theirs but for their authors' `arch`.
    elif "state_dict" in loaded and str(loaded.get("arch")).partition(".")[0] in ours:
        first = ("state_dict_ema",)
    return list(dict.fromkeys((*first, *_CONTAINERS)))


def _holds_weights(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    return any(isinstance(v, Tensor) for v in value.values()) or any(_holds_weights(value.get(c)) for c in _CONTAINERS)


def variants(state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """`state` as it is without wrapper prefixes, then the part that a training module or a detector holds."""
    state = _without_wrappers(state)
    yield state
    for prefix in _HOLDERS:
        inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        rest = [name for name in state if not name.startswith(prefix)]
        if inside and all(name.startswith(_SURROUNDINGS) for name in rest):
            yield _without_wrappers(inside)


def _without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if state and all(name.startswith(wrapper) for name in state):
            return _without_wrappers({name.removeprefix(wrapper): value for name, value in state.items()})
    return dict(state)


def match(
    state: Mapping[str, Tensor],
    model: nn.Module,
    cfg: PretrainedCfg,
    new_classes: bool = False,
    new_chans: bool = False,
    unused: Collection[str] = (),
) -> Match:
    """Compare `state`, already under the model's names, with `model`; nothing is copied.

    Args:
        state: Weights of a file.
        model: On any device, `meta` included.
        cfg: Names the classifier and the first convolution.
        new_classes: The classifier may differ in its number of rows, or be absent on either side.
        new_chans: The first convolution may differ in its number of input channels.
        unused: Names in the model that nobody will read; they may be absent from the file.

    Returns: The comparison; the file fits if `differences` is 0.
    """
    found = Match()
    classifier = tuple(f"{name}." for name in _names(cfg.classifier))
    first_conv = tuple(f"{name}.weight" for name in _names(cfg.first_conv))
    wanted = model.state_dict()
    kept = []
    for name, ours in wanted.items():
        theirs, is_head = state.get(name), name.startswith(classifier)
        if is_head and theirs is not None and theirs.ndim:
            found.classes = theirs.shape[0]
        if theirs is None and name.endswith("num_batches_tracked"):
            found.values[name] = ours  # a counter that old files lack, not a weight
        elif (
            theirs is not None and theirs.shape == ours.shape and theirs.is_floating_point() == ours.is_floating_point()
        ):
            found.values[name] = theirs
        elif new_classes and is_head and (theirs is None or theirs.shape[1:] == ours.shape[1:]):
            found.values[name] = ours
            kept.append(name)
        elif name in unused:
            found.values[name] = ours
        elif theirs is None:
            found.missing.append(name)
        elif new_chans and name in first_conv and _only_chans_differ(theirs, ours):
            found.values[name] = adapt_input_conv(ours.shape[1], theirs, base_chans=theirs.shape[1])
            found.allowed.append(f"{name} adapted from {theirs.shape[1]} to {ours.shape[1]} input channels")
        else:
            found.shapes[name] = (_shape(theirs, ours), _shape(ours, theirs))
    if kept:
        found.allowed.append(f"{', '.join(kept)} left at initialisation for the new classes")
    extra = [name for name in state if name not in wanted]
    dropped = [name for name in extra if new_classes and name.startswith(classifier)]
    if dropped:
        found.allowed.append(f"{', '.join(dropped)} not used by a model without classes")
    found.unexpected = [name for name in extra if name not in dropped]
    return found


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _alike(theirs: Tensor, ours: Tensor) -> bool:
    return theirs.shape == ours.shape and theirs.is_floating_point() == ours.is_floating_point()


def _only_chans_differ(theirs: Tensor, ours: Tensor) -> bool:
    return theirs.ndim == ours.ndim == 4 and theirs.shape[0] == ours.shape[0] and theirs.shape[2:] == ours.shape[2:]


def _shape(value: Tensor, other: Tensor) -> str:
    kind = "" if value.is_floating_point() == other.is_floating_point() else f" {value.dtype}".replace("torch.", "")
    return f"{tuple(value.shape)}{kind}"

"""Published checkpoints go in whole or not at all.

Every weight of the file is used and every weight of the model comes from it. Three differences are allowed, each only
when the caller asked for it, and each is logged: a new classifier (`num_classes`), another number of input channels
(`in_chans`), and tables that a family's `checkpoint_filter_fn` resizes. Anything else is an error that says which
registered model the file belongs to.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from timm.models import PretrainedCfg, build_model_with_cfg, is_model, resolve_pretrained_cfg
from torch import Tensor, nn

from ._checkpoint_file import read_checkpoint
from ._download import published_file
from ._exchange import exchange
from ._identify import FilterFn, blueprint, filter_of, identify, published_cfg, renamed, zoo_models
from ._match import Match, match, unwrap, variants

__all__ = ["build_with_weights", "load_checkpoint", "read_checkpoint"]

Model = TypeVar("Model", bound=nn.Module)
_logger = logging.getLogger(__name__)
# Arguments of timm's builder that are not arguments of the model.
_BUILDER = {"features_only", "feature_cfg", "kwargs_filter", "pretrained_model_args"}
_FEATURES = {"out_indices", "feature_cls"}


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    filter_fn: FilterFn | None = None,
    *,
    cfg: PretrainedCfg | None = None,
    unused: Collection[str] = (),
) -> None:
    """Load a published or own checkpoint into `model`, whole or not at all.

    Of a file with averaged weights beside the plain ones, those are taken that its scores belong to: the average from a
    run of this package, or of timm's scripts with a registered model as `arch`; else the plain ones. The log says it.

    Args:
        model: A model of this package, on a real device. Weights are converted to its dtypes.
        path: File of `torch.save` or safetensors; see `read_checkpoint`.
        filter_fn: `(state_dict, model) -> state_dict` under the model's names; the one of the model's family if None.
        cfg: The published configuration; `model.pretrained_cfg` if None.
        unused: Names of weights that the caller will drop from the model; the file need not have them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint, or does not fit; `model` is unchanged.
    """
    if cfg is None:
        cfg = published_cfg(model)
    try:
        state, entry = unwrap(read_checkpoint(path), zoo_models())
    except ValueError as error:
        text = str(error)
        raise ValueError(text if os.fspath(path) in text else f"{path} cannot be loaded: {text}") from error
    _load_state(model, state, os.fspath(path), filter_fn or filter_of(type(model).__module__), cfg, unused, entry)


def build_with_weights(
    model_cls: Callable[..., Model],
    variant: str,
    pretrained: bool = False,
    *,
    filter_fn: FilterFn | None = None,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> Model:
    """`timm.models.build_model_with_cfg` for this package's entry points: strict weights, helpful errors.

    timm's own loader skips what does not fit as soon as `num_classes` changes, and reads `file` overrides through
    other paths; here weights from every source go through `load_checkpoint`, before `features_only` wraps the model.

    Args:
        model_cls: The model's class.
        variant: Registered name.
        pretrained: Load the published weights that the configuration points to.
        filter_fn: The family's `checkpoint_filter_fn`; taken from the module of `model_cls` if None.
        pretrained_cfg: As for timm.
        pretrained_cfg_overlay: As for timm; `{"file": path}` loads that file.
        cache_dir: Folder for downloads.
        kwargs: Arguments of `model_cls` and of timm's builder. `mixer` is one of any model's: "mamba2", "mamba3" or
            "mamba3_mimo" take the place of its selective scans; see `_exchange.exchange`.

    Returns: The model, or timm's feature wrapper around it.

    Raises:
        TypeError: `model_cls` does not take one of the arguments.
        ValueError: no published weights, or a file that does not fit.
        ConnectionError: the published address cannot be reached.
    """
    accepted = list(inspect.signature(model_cls).parameters)
    mixer = "mamba" if "mixer" in accepted else kwargs.pop("mixer", "mamba")
    _check_arguments(variant, accepted, kwargs)
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)  # type: ignore[arg-type]
    feature_cfg = dict(kwargs.pop("feature_cfg", {}))  # timm fills it in
    taps = kwargs.get("out_indices", feature_cfg.get("out_indices")) if kwargs.get("features_only") else None

    def make(**arguments: Any) -> Model:
        model = model_cls(**arguments)
        exchange(model, mixer, variant)
        return model

    def construct(**arguments: Any) -> Model:
        model = make(**arguments)
        if pretrained:
            rename = filter_fn or filter_of(model_cls.__module__)
            unused = () if taps is None else _unused_for_features(make, arguments, taps)
            if cfg.state_dict:
                state, entry = unwrap(cfg.state_dict, zoo_models())
                _load_state(model, state, "the given state_dict", rename, cfg, unused, entry)
            else:
                load_checkpoint(model, published_file(variant, cfg, cache_dir), rename, cfg=cfg, unused=unused)
        return model

    return build_model_with_cfg(
        construct,
        variant,
        False,
        pretrained_cfg=pretrained_cfg,  # type: ignore[arg-type]
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        feature_cfg=feature_cfg,
        **kwargs,
    )


def _unused_for_features(model_cls: Callable[..., nn.Module], arguments: dict[str, Any], taps: Any) -> set[str]:
    """Weights that timm's feature wrapper drops: published detection backbones have neither final norm nor head."""
    model = model_cls(**{**arguments, "device": "meta"})
    everything = set(model.state_dict())
    prune: Any = getattr(model, "prune_intermediate_layers", None)
    if prune is not None:
        prune(taps, prune_norm=True, prune_head=True)
    return everything - set(model.state_dict())


def _check_arguments(variant: str, accepted: list[str], given: Mapping[str, Any]) -> None:
    known = {*accepted, *_BUILDER, *(_FEATURES if given.get("features_only") else ())}
    for name in given:
        if name in known:
            continue
        if name in _FEATURES:
            raise TypeError(f"{name}= needs features_only=True")
        near = difflib.get_close_matches(name, accepted, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise TypeError(f"{variant} takes no argument {name!r}{hint}; it takes {', '.join(accepted)}, features_only")


def _load_state(
    model: nn.Module,
    state: dict[str, Tensor],
    source: str,
    filter_fn: FilterFn,
    cfg: PretrainedCfg,
    unused: Collection[str],
    entry: str,
) -> None:
    """Check everything, then copy; the model changes only once nothing can fail any more. `entry` is for the log."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{source} cannot be loaded into a model on the meta device; build it with device='cpu'")
    new_classes = getattr(model, "num_classes", None) != _published_classes(cfg)
    new_chans = getattr(model, "in_chans", None) != (cfg.input_size or (None,))[0]
    best: Match | None = None
    complaint: Exception | None = None
    for weights in variants(state):
        try:
            new, resized = renamed(weights, model, filter_fn)
        except (ValueError, KeyError, IndexError, RuntimeError) as error:
            complaint = complaint or error
            continue
        found = match(new, model, cfg, new_classes, new_chans, unused)
        found.resized = resized
        if best is None or found.differences < best.differences:
            best = found
        if not found.differences:
            break
    name = cfg.architecture or type(model).__name__
    if best is None or best.differences or (best.resized and _has_default_sizes(model, name)):
        best = _resized_or_refused(state, best, complaint, source, name)
    model.load_state_dict(best.values, strict=True)
    notes = [f"its entry {entry}"] if entry else []
    notes += best.allowed
    if best.resized:
        notes.append("tables resized or left out by the family's filter")
    _logger.info("%s: %d weights from %s%s", name, len(best.values), source, "".join(f"; {note}" for note in notes))


def _published_classes(cfg: PretrainedCfg) -> int | None:
    """Classes of the published model; timm has no number for those that are not image classifiers."""
    if cfg.num_classes is not None and cfg.num_classes > 0:
        return cfg.num_classes
    return getattr(blueprint(cfg.architecture), "num_classes", None) if _registered(cfg.architecture) else None


def _registered(name: str | None) -> bool:
    return bool(name) and is_model(str(name))


def _has_default_sizes(model: nn.Module, name: str) -> bool:
    """Whether the model has the shapes of its registered variant, so that nobody asked for a resized table."""
    if not _registered(name):
        return False
    default = blueprint(name).state_dict()
    tables = {key: value.shape for key, value in model.state_dict().items() if "pos" in key}
    return all(key in default and default[key].shape == shape for key, shape in tables.items())


def _resized_or_refused(
    state: dict[str, Tensor], best: Match | None, complaint: Exception | None, source: str, name: str
) -> Match:
    """`best` if it only needs a resized table and the file is no other model's; else the error that says what it is."""
    fits = identify(state)
    if best is not None and not best.differences and (name in fits or all(fit.resized for fit in fits.values())):
        return best
    detail = f"its weights cannot be brought under the model's names ({complaint})" if best is None else str(best)
    if name in fits:
        classes = fits[name].classes
        if best is not None and best.classes == classes and _only_head(best):
            raise ValueError(
                f"{source} fits {name} but for its classifier of {classes} classes; "
                f"pass num_classes={classes} to load all of it"
            )
        raise ValueError(f"{source} holds {name}, but this model was built with other arguments: {detail}")
    if fits:
        listed = " or ".join(
            f"{other} with num_classes={fit.classes}" if fit.allowed else other for other, fit in fits.items()
        )
        raise ValueError(f"{source} is {listed}, not {name}; create that model to load it")
    raise ValueError(f"{source} does not fit {name}, nor any other model of mamba_zoo: {detail}")


def _only_head(found: Match) -> bool:
    """Whether the shapes that differ belong to one layer, which then is the classifier."""
    return not found.missing and not found.unexpected and len({name.rpartition(".")[0] for name in found.shapes}) == 1

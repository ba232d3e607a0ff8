"""`mamba-zoo doctor --model`: build a model, load its weights, feed it one input, and look for NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .nonfinite import NonFinite, find_nonfinite

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TENSOR_FILES = (".pt", ".pth", ".npy")


def check_model(
    name: str | None,
    checkpoint: str | None = None,
    input_file: str | None = None,
    image_size: int | None = None,
    precision: str = "float32",
    device: str = "cpu",
    train: bool = False,
) -> NonFinite:
    """Run a model on one input and name what is not finite.

    Args:
        name: Model; None with the checkpoint of a run.
        checkpoint: A published file, or the checkpoint or folder of `mamba-zoo fit`.
        input_file: An image; or a tensor in .pt, .pth or .npy, given to the model as it is. None is random noise.
        image_size: Pixels; None is the model's.
        precision: "float32", or autocast to "bfloat16" or "float16".
        device: Where to run.
        train: In training mode, with its dropout and batch statistics.

    Raises:
        ValueError: an unknown model, or files that do not fit it.
        FileNotFoundError: no such file.
    """
    net, preprocess = _load(name, checkpoint, image_size)
    x = (_noise(net, name, image_size) if input_file is None else _read(input_file, preprocess)).to(device)
    net = net.to(device).train(train)
    dtype = PRECISIONS[precision]
    with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
        return find_nonfinite(net, x)


def _load(name: str | None, checkpoint: str | None, image_size: int | None) -> tuple[nn.Module, Any]:
    from .image_transforms import Preprocess

    if checkpoint is not None and (Path(checkpoint).is_dir() or checkpoint.endswith(".ckpt")):
        from .checkpoints import read_checkpoint
        from .registry import load_task

        if "hyper_parameters" in read_checkpoint(checkpoint):
            classifier = load_task(checkpoint)
            if name not in (None, classifier.name):
                raise ValueError(f"{checkpoint} holds {classifier.name}, not {name}")
            known = classifier.hparams.get("preprocess")
            fallback = Preprocess.for_model(classifier.name, image_size, classifier.hparams.get("in_chans", 3))
            return classifier.inference_net, Preprocess.from_dict(known) if known else fallback
    if name is None:
        raise ValueError("give --model NAME, or --checkpoint with a run of mamba-zoo fit")
    import mamba_zoo

    net = mamba_zoo.create_model(name, checkpoint_path=checkpoint) if checkpoint else mamba_zoo.create_model(name)
    pictures = mamba_zoo.model_card(name).modality in ("image", "video") if mamba_zoo.list_models(name) else True
    return net, Preprocess.for_model(name, image_size, 3) if pictures else None


def _noise(net: nn.Module, name: str | None, image_size: int | None) -> Tensor:
    """Two random inputs of the model's own size, or of images of `image_size` pixels."""
    from mamba_zoo._counting import default_input

    torch.manual_seed(0)
    one = default_input(net)
    if one is None:
        raise ValueError(f"{name or type(net).__name__} does not say which inputs it takes; give one with --input FILE")
    shape = list(one.shape[1:])
    if image_size is not None:
        shape[-2:] = [image_size, image_size]
    return torch.randn(2, *shape)


def _read(path: str, preprocess: Any) -> Tensor:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no input file {path}")
    if file.suffix == ".npy":
        import numpy as np

        return torch.from_numpy(np.load(file, allow_pickle=False))
    if file.suffix in _TENSOR_FILES:
        value = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(value, Tensor):
            raise ValueError(f"{path} holds a {type(value).__name__}; a tensor is needed")
        return value
    if preprocess is None:
        raise ValueError(f"{path} is no tensor, and this model takes no pictures; give a .pt or .npy file")
    from .image_files import read_image
    from .image_transforms import eval_transform

    return eval_transform(preprocess)(read_image(file, "L" if preprocess.in_chans == 1 else "RGB"))[None]

"""Published classifiers of spectrograms, AuM and SSAMBA: their arguments, their outputs, their files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mamba_zoo.backbones._embed import remove_token
from mamba_zoo.backbones._fbank import FilterBank
from mamba_zoo.backbones._spectrogram import resize_antialiased, resize_patches

from . import synth
from .parity_family import Arguments, Family, classify, recorded, require


def aum_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    bands, frames = kwargs["spectrogram_size"]
    return "aum_tiny", {
        "mel_bins": bands,
        "frames": frames,
        "patch_size": tuple(kwargs["patch_size"]),
        "stride": tuple(kwargs["strides"]),
        "depth": kwargs["depth"],
        "dim": kwargs["embed_dim"],
        "num_classes": kwargs["num_classes"],
        "shared": kwargs["bimamba_type"] == "v1",
        "scan": {"none": "raster", "v1": "bidirectional", "v2": "bidirectional"}[kwargs["bimamba_type"]],
    }


def aum_run(model: Any, inputs: dict[str, Tensor], fixture: dict[str, Any]) -> dict[str, Tensor]:
    embedded: list[Tensor] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, arguments: embedded.append(arguments[0]))
    with recorded(
        patch_embed=model.patch_embed, first=model.blocks[0], middle=model.blocks[11], last=model.blocks[23]
    ) as seen:
        outputs = classify(model, inputs["x"])
    hook.remove()
    return {
        **outputs,
        "patch_embed": seen["patch_embed"].flatten(1, 2),
        "tokens": embedded[0],
        "layer0_mixer": seen["first"][0],
        "layer11_residual": seen["middle"][1],
        "layer23_mixer": seen["last"][0],
    }


def aum_check(fixture: dict[str, Any]) -> None:
    """The front end, and the resizing of positions and patches."""
    inputs = {
        name: torch.from_numpy(synth.synth_input(spec["name"], spec["shape"], spec["scale"]))
        for name, spec in fixture["inputs"].items()
    }
    outputs = {}
    if fixture["model"] == "aum_fbank":
        for name, spec in fixture["inputs"].items():
            rate, wave = spec["sample_rate"], inputs[name]
            front = FilterBank(None, frames=spec["target_length"], mean=spec["mean"], std=spec["std"])
            outputs[f"{name}/fbank"] = front.spectrogram(wave - wave.mean(), rate)[0]
            outputs[f"{name}/input"] = front(wave, rate)[0][0]
    else:
        positions, image, tokens = inputs["pos_8x64"], inputs["vim_14x14_midcls"], inputs["tokens_cls_mid"]
        prefixed = torch.cat([image[:, 98:99], remove_token(image, 98)], dim=1)
        index = tokens.shape[1] // 2
        outputs = {
            "pos_8x64_to_8x8": resize_antialiased(positions, (8, 64), (8, 8)),
            "pos_8x64_to_8x101": resize_antialiased(positions, (8, 64), (8, 101)),
            "vim_midcls_to_prefix": prefixed,
            "vim_midcls_to_8x64": resize_antialiased(prefixed, (14, 14), (8, 64)),
            "patch_rgb_mean": inputs["patch_16"].mean(1, keepdim=True),
            "patch_16_to_8_pinv": resize_patches(inputs["patch_16"], (8, 8)),
            "patch_16_to_24_pinv": resize_patches(inputs["patch_16"], (24, 24)),
            "pos_add_cls_at_256": tokens
            + torch.cat([positions[:, 1 : index + 1], positions[:, :1], positions[:, index + 1 :]], dim=1),
        }
    assert outputs.keys() == fixture["outputs"].keys()
    errors = {key: synth.relative_error(outputs[key].numpy(), fixture["outputs"][key]) for key in outputs}
    assert max(errors.values()) < 2e-5, errors


def ssamba_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    require(kwargs, rms_norm=False, bimamba_type="v2", if_bidirectional=True, final_pool_type="none", norm_epsilon=1e-5)
    require(kwargs, if_cls_token=True, if_abs_pos_embed=True, if_devide_out=True, use_middle_cls_token=False)
    require(kwargs, use_double_cls_token=False, if_rope=False, if_rope_residual=False, if_bimamba=False, channels=1)
    arguments = {
        "mel_bins": kwargs["input_fdim"],
        "frames": kwargs["input_tdim"],
        "patch_size": (kwargs["fshape"], kwargs["tshape"]),
        "dim": kwargs["embed_dim"],
        "depth": kwargs["depth"],
        "drop_path_rate": kwargs["drop_path_rate"],
    }
    if kwargs["pretrain_stage"]:
        return "ssamba_tiny_pretrain", arguments
    arguments |= {"stride": (kwargs["fstride"], kwargs["tstride"]), "num_classes": kwargs["label_dim"]}
    return "ssamba_tiny", arguments


def ssamba_run(model: Any, inputs: dict[str, Tensor], fixture: dict[str, Any]) -> dict[str, Tensor]:
    x = inputs["x"]
    if not fixture["kwargs"]["pretrain_stage"]:
        logits = model(x)
        model.global_pool = "token"
        return {"logits": logits, "logits_cls_task": model(x), **converted(fixture)}
    embedded: list[Tensor] = []
    normed: list[Tensor] = []
    hooks = [
        model.blocks[0].register_forward_pre_hook(lambda _, arguments: embedded.append(arguments[0])),
        model.norm.register_forward_hook(lambda _, __, output: normed.append(output)),
    ]
    block = model.blocks[0]
    with recorded(forth=block.forth.mixer, back=block.back.mixer) as mixed:
        features = model.forward_features(x)
    for hook in hooks:
        hook.remove()
    assert len(normed) == 2
    patches = features[:, 1:9]
    losses = model.pretrain(x, torch.arange(0, 500, 5)[None])
    return {
        "avgtok_features": model(x),
        "cls_features": features[:, 0],
        "cpred": model.match(patches),
        "gpred": model.restore(patches),
        "tokens": embedded[0],
        "layer0_mixer": mixed["forth"],
        "layer1_mixer_flipped": mixed["back"].flip(1),
        "norm_f_once": normed[0],
        "norm_f_twice": features,
        "pretrain_mpc_acc": losses["accuracy"][None],
        "pretrain_mpc_nce": losses["contrast"][None],
        "pretrain_mpg_mse": losses["mse"][None],
    }


def converted(fixture: dict[str, Any]) -> dict[str, Tensor]:
    """What the family's filter makes of pretrained positions and patches for this model."""
    import mamba_zoo
    from mamba_zoo.backbones.ssamba import checkpoint_filter_fn

    name, arguments = ssamba_arguments(fixture["kwargs"])
    width = arguments["dim"]
    shapes = {
        "v.pos_embed": (1, 513, width),
        "v.patch_embed.proj.weight": (width, 1, 16, 16),
        "mask_embed": (1, 1, width),
    }
    state = {key: torch.from_numpy(synth.synth_param(key, shape)) for key, shape in shapes.items()}
    new = checkpoint_filter_fn(state, mamba_zoo.create_model(name, **arguments))
    return {"converted_pos_embed": new["pos_embed"], "converted_proj_weight": new["patch_embed.proj.weight"]}


FAMILIES: dict[str, Family] = {
    "audio/aum": Family(aum_arguments, aum_run, dict, aum_check),
    "audio/ssamba": Family(
        ssamba_arguments,
        ssamba_run,
        lambda state: {f"module.{key}": value for key, value in state.items()},
        dead=r"^v\.head\.|^p_input_",
    ),
}

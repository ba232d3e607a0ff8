"""Published image and video models: their arguments, their outputs, their files."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from torch import Tensor, nn

from mamba_zoo.scans import scan_order

from .parity_family import Arguments, Family, classify, recorded, require


def vmamba_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    require(kwargs, ssm_act_layer="silu", ssm_conv=3, ssm_drop_rate=0.0, ssm_init="v0", mlp_act_layer="gelu")
    require(kwargs, mlp_drop_rate=0.0, patch_norm=True, gmlp=False, posembed=False)
    arguments = {
        "in_chans": kwargs["in_chans"],
        "num_classes": kwargs["num_classes"],
        "patch_size": kwargs["patch_size"],
        "depths": kwargs["depths"],
        "dims": kwargs["dims"],
        "d_state": kwargs["ssm_d_state"],
        "ssm_ratio": kwargs["ssm_ratio"],
        "dt_rank": kwargs["ssm_dt_rank"],
        "mlp_ratio": kwargs["mlp_ratio"],
        "gate": {"v0": True, "v05_noz": False}[kwargs["forward_type"]],
        "conv_bias": kwargs["ssm_conv_bias"],
        "stem": {"v1": "patch", "v2": "conv"}[kwargs["patchembed_version"]],
        "downsample": {"v1": "merge", "v3": "conv"}[kwargs["downsample_version"]],
        "drop_path_rate": kwargs["drop_path_rate"],
    }
    if "out_indices" in kwargs:
        arguments |= {"features_only": True, "out_norm": True, "out_indices": tuple(kwargs["out_indices"])}
    stem = arguments["stem"]
    return "vmamba_tiny_v0" if stem == "patch" else "vmamba_tiny", arguments


def vmamba_run(model: Any, inputs: dict[str, Tensor], fixture: dict[str, Any]) -> dict[str, Tensor]:
    if "out_indices" in fixture["kwargs"]:
        plain, rect = model(inputs["x"]), model(inputs["x_rect"])
        return {f"out{i}": y for i, y in enumerate(plain)} | {f"rect_out{i}": y for i, y in enumerate(rect)}
    block = model.stages[0].blocks[0]
    stages = {f"stage{i + 1}": stage for i, stage in enumerate(model.stages)}
    with recorded(patch_embed=model.stem, block0=block, **{"block0.ss2d": block.mixer}, **stages) as outputs:
        logits = model(inputs["x"])
    if fixture["kwargs"].get("norm_layer") == "ln2d":  # the published second version is NCHW throughout
        outputs = {name: y.permute(0, 3, 1, 2) for name, y in outputs.items()}
    return {**outputs, "logits": logits, "logits_rect": model(inputs["x_rect"])}


def vim_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    require(kwargs, rms_norm=True, residual_in_fp32=True, if_abs_pos_embed=True, if_rope=False, if_rope_residual=False)
    require(kwargs, bimamba_type="v2", if_cls_token=True, if_divide_out=True, use_middle_cls_token=True)
    return "vim_tiny", {
        "img_size": kwargs["img_size"],
        "patch_size": kwargs["patch_size"],
        "stride": kwargs["stride"],
        "depth": kwargs["depth"],
        "dim": kwargs["embed_dim"],
        "d_state": kwargs["d_state"],
        "in_chans": kwargs["channels"],
        "num_classes": kwargs["num_classes"],
    }


def vim_run(model: Any, inputs: dict[str, Tensor], fixture: dict[str, Any]) -> dict[str, Tensor]:
    blocks = {f"layer{i}": block for i, block in enumerate(model.blocks) if f"layer{i}.hidden" in fixture["outputs"]}
    embedded: list[Tensor] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, arguments: embedded.append(arguments[0]))
    with recorded(**blocks) as pairs:
        outputs = {**classify(model, inputs["x"]), "embed": embedded[0]}
    hook.remove()
    for name, (hidden, residual) in pairs.items():
        outputs |= {f"{name}.hidden": hidden, f"{name}.residual": residual}
    return outputs


def vim_container(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"model": state, "epoch": 299, "args": argparse.Namespace(model="vim", lr=1e-3)}


def mambavision_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    require(kwargs, layer_scale_conv=None, qkv_bias=True, qk_scale=None)
    return "mambavision_t", {
        "in_chans": kwargs["in_chans"],
        "num_classes": kwargs["num_classes"],
        "depths": kwargs["depths"],
        "dim": kwargs["dim"],
        "stem_dim": kwargs["in_dim"],
        "heads": kwargs["num_heads"][2:],
        "windows": kwargs["window_size"][2:],
        "mlp_ratio": kwargs["mlp_ratio"],
        "layer_scale": kwargs["layer_scale"],
        "drop_path_rate": kwargs["drop_path_rate"],
    }


def mambavision_run(model: Any, inputs: dict[str, Tensor], fixture: dict[str, Any]) -> dict[str, Tensor]:
    maps: dict[str, nn.Module] = {f"level{i}": model.stages[i + 1].downsample for i in range(3)}
    windows = {f"level{i}.block0.mixer": model.stages[i].blocks[0].mixer for i in (2, 3)}
    windows |= {f"level{i}.last_block": model.stages[i].blocks[-1] for i in (2, 3)}
    with recorded(stem=model.stem, **maps, level3=model.stages[3]) as outputs, recorded(**windows) as tokens:
        final = classify(model, inputs["x"])
    outputs = {name: y.permute(0, 3, 1, 2) for name, y in outputs.items()}
    return {**outputs, **tokens, **final}


def plainmamba_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    require(kwargs, layer_cfgs={**kwargs["layer_cfgs"], "use_rms_norm": False})
    mamba = kwargs["layer_cfgs"]["mamba_cfg"]
    require(mamba, conv_bias=True, bias=True)
    return "plainmamba_l1", {
        "img_size": kwargs["img_size"],
        "num_classes": kwargs["num_classes"],
        "patch_size": kwargs["patch_size"],
        "dim": kwargs["embed_dims"],
        "depth": kwargs["num_layers"],
        "stem_convs": kwargs["num_convs_patch_embed"],
        "conv_blocks": kwargs["layers_with_dwconv"],
        "d_state": mamba["d_state"],
        "expand": mamba["expand"],
        "conv_size": mamba["conv_size"],
        "drop_path_rate": kwargs["drop_path_rate"],
    }


def plainmamba_run(model: Any, inputs: dict[str, Tensor], fixture: dict[str, Any]) -> dict[str, Tensor]:
    wanted = {i: f"layer{i}" for i in range(len(model.stages)) if f"layer{i}" in fixture["outputs"]}
    maps = {name: model.stages[i] for i, name in wanted.items()}
    maps |= {f"{name}.mixer": model.stages[i].blocks[0].mixer for i, name in wanted.items()}
    with recorded(embed=model.stem, **maps) as outputs:
        final = classify(model, inputs["x"])
    outputs = {name: y.flatten(1, 2) for name, y in outputs.items()}
    return {**outputs, **final}


def videomamba_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    require(kwargs, rms_norm=True, residual_in_fp32=True, bimamba=True, kernel_size=1, stride=kwargs["patch_size"])
    return "videomamba_tiny_video" if "num_frames" in kwargs else "videomamba_tiny", {
        "img_size": kwargs["img_size"],
        "patch_size": kwargs["patch_size"],
        "depth": kwargs["depth"],
        "dim": kwargs["embed_dim"],
        "in_chans": kwargs["channels"],
        "num_classes": kwargs["num_classes"],
        "num_frames": kwargs.get("num_frames"),
        "drop_rate": kwargs.get("fc_drop_rate", 0.0),
    }


def videomamba_container(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"module": state} if "temporal_pos_embedding" in state else state


def efficientvmamba_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    # d_state, dt_rank, ssm_ratio and window_size are named, but the published constructor uses its defaults instead.
    require(kwargs, mlp_ratio=0.0, patch_norm=True, downsample_version="v1", shared_ssm=False, softmax_version=False)
    arguments = {name: kwargs[name] for name in ("in_chans", "num_classes", "patch_size", "depths", "dims")}
    if "out_indices" in kwargs:
        arguments |= {"features_only": True, "out_norm": True, "out_indices": tuple(kwargs["out_indices"])}
    return "efficient_vmamba_tiny", arguments


def efficientvmamba_container(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"state_dict": {f"module.module.{key}": value for key, value in state.items()}, "epoch": 299}


def localmamba_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    arguments: Arguments = {"directions": kwargs["directions"], "published_columns": True}
    if "out_indices" in kwargs:
        arguments |= {"features_only": True, "out_norm": True, "out_indices": tuple(kwargs["out_indices"])}
    if "embed_dim" not in kwargs:
        arguments |= {"dims": kwargs["dims"], "depths": kwargs["depths"], "drop_path_rate": kwargs["drop_path_rate"]}
        return "local_vmamba_tiny", arguments
    require(kwargs, residual_in_fp32=True, final_pool_type="mean", if_abs_pos_embed=True, bimamba_type="v2")
    require(kwargs, if_rope_residual=kwargs["if_rope"])
    token = kwargs.get("if_cls_token", False)
    require(kwargs, use_middle_cls_token=token)
    return "local_vim_tiny", arguments | {
        "img_size": tuple(kwargs.get("img_size", (224, 224))),
        "patch_size": kwargs["patch_size"],
        "depth": kwargs["depth"],
        "dim": kwargs["embed_dim"],
        "rope": kwargs["if_rope"],
        "rms_norm": kwargs["rms_norm"],
        "class_token": token,
        "global_pool": "token" if token else "avg",
    }


def localmamba_run(model: Any, inputs: dict[str, Tensor], fixture: dict[str, Any]) -> dict[str, Tensor]:
    if "embed_dim" not in fixture["kwargs"] or "out_indices" in fixture["kwargs"]:
        return vmamba_run(model, inputs, fixture)
    with recorded(patch_embed=model.patch_embed, **{"layer0.mixer": model.blocks[0].mixer}) as outputs:
        final = vim_run(model, inputs, fixture)
    return {**final, **outputs, "patch_embed": outputs["patch_embed"].flatten(1, 2)}


def check_orders(tables: dict[str, Any]) -> None:
    """The visiting orders of VMamba, EfficientVMamba and LocalMamba."""
    cross = {
        "cross2d": "cross",
        "unidi": "join(raster, raster, raster, raster)",
        "bidi": "join(raster, raster, reverse(raster), reverse(raster))",
    }
    cases = [(cross[key.split("/")[0]], key.split("/")[1], table) for key, table in tables["cross"].items()]
    cases += [("atrous", size, table) for size, table in tables["efficient"].items()]
    local = {**tables["local"], "3x5 ": tables["local_reverse_3x5"]}
    cases += [(f"local(('{one}',))", size, [row]) for size, rows in local.items() for one, row in rows.items()]
    for spec, size, table in cases:
        height, width = map(int, size.split("x"))
        assert np.array_equal(scan_order(spec, (height, width), "cpu").numpy(), np.array(table)), (spec, size)


FAMILIES = {
    "vmamba": Family(vmamba_arguments, vmamba_run, lambda state: {"model": state}, check_orders),
    "vim": Family(vim_arguments, vim_run, vim_container),
    "videomamba": Family(videomamba_arguments, vim_run, videomamba_container),
    "mambavision": Family(mambavision_arguments, mambavision_run, lambda state: {"state_dict": state, "epoch": 309}),
    "plainmamba": Family(plainmamba_arguments, plainmamba_run, lambda state: {"meta": {}, "state_dict": state}),
    "efficientvmamba": Family(efficientvmamba_arguments, vmamba_run, efficientvmamba_container),
    "localmamba": Family(localmamba_arguments, localmamba_run, lambda state: {"state_dict": state, "epoch": 299}),
}

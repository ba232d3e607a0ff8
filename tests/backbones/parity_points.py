"""Published models of point clouds: their arguments, their outputs, their files, and their orders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mamba_zoo.backbones._points import furthest_points
from mamba_zoo.scans.points import cts_code, hilbert_code, point_order, zcurve_code

from . import synth
from .parity_family import Arguments, Family, recorded, require


def points_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    name = kwargs.get("NAME") or kwargs["config"]["model"]
    return {
        "PointMambaScan": pointmamba_arguments,
        "Point_MAE_Mamba_serializationV2": pretraining_arguments,
        "PointMamba": pointmamba_v1_arguments,
        "Mamba3D": mamba3d_arguments,
        "BaseCls": pcm_arguments,
        "BasePartSeg": pcm_arguments,
        "BaseSeg": pcm_arguments,
        "pt_mamba": pointmamba_v1_parts_arguments,
    }[name](kwargs)


def pointmamba_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    require(kwargs, rms_norm=False, use_cls_token=False, max_head=False, avg_head=True, drop_out=0.0)
    require(kwargs, encoder_dims=kwargs["trans_dim"])
    return "pointmamba", {
        "num_classes": kwargs["cls_dim"],
        "groups": kwargs["num_group"],
        "group_size": kwargs["group_size"],
        "dim": kwargs["trans_dim"],
        "depth": kwargs["depth"],
        "drop_path_rate": kwargs["drop_path"],
    }


def pointmamba_v1_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    return "pointmamba_v1", pointmamba_arguments(kwargs)[1]


def pointmamba_v1_parts_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    config = kwargs["config"]
    require(config, rms_norm=False, use_cls_token=False, drop_out=0.0)
    return "pointmamba_v1_parts", {
        "num_classes": kwargs["cls_dim"],
        "dim": config["trans_dim"],
        "depth": config["depth"],
        "taps": tuple(config["fetch_idx"]),
        "drop_path_rate": config["drop_path"],
    }


def mamba3d_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    require(kwargs, encoder_dims=kwargs["trans_dim"], bimamba_type="v4", ordering=False)
    return "mamba3d", {
        "num_classes": kwargs["cls_dim"],
        "groups": kwargs["num_group"],
        "group_size": kwargs["group_size"],
        "dim": kwargs["trans_dim"],
        "depth": kwargs["depth"],
        "neighbours": kwargs["center_local_k"],
        "drop_path_rate": kwargs["drop_path_rate"],
    }


_CURVES = {"hilbert": "hilbert", "z": "zcurve", "z-trans": "zcurve_trans"}


def pcm_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    encoder, head = kwargs["encoder_args"], kwargs["cls_args"]
    require(encoder, groups=1, res_expansion=1.0, activation="relu", bias=False, use_xyz=True, normalize="anchor")
    require(encoder, pos_blocks=[0, 0, 0, 0], rms_norm=True, residual_in_fp32=True, bimamba_type="v2", mamba_pos=True)
    require(encoder, use_order_prompt=True)
    cell = f"cell={encoder.get('grid_size', 0.02)}"
    orders = [
        f"{_CURVES[name]}({cell})" if name in _CURVES else f"cts({name!r}, {cell})"
        for name in encoder["mamba_layers_orders"]
    ]
    arguments = {
        "num_classes": head["num_classes"],
        "in_chans": encoder["in_channels"],
        "dim": encoder["embed_dim"],
        "dim_expansion": encoder["dim_expansion"],
        "depths": encoder["mamba_blocks"],
        "pre_blocks": encoder["pre_blocks"],
        "neighbours": encoder["k_neighbors"],
        "reducers": encoder["reducers"],
        "scan": f"join({', '.join(orders)})",
        "prompts": encoder["prompt_num_per_order"],
        "drop_path_rate": encoder["drop_path_rate"],
    }
    if kwargs["NAME"] == "BaseCls":
        return "pcm", {**arguments, "hidden": tuple(head["mlps"])}
    decoder = kwargs["decoder_args"]
    require(decoder, decoder_blocks=[1, 1, 1, 1], mamba_blocks=[0, 0, 0, 0])
    require(head, global_feat="max,avg", in_channels=None)
    arguments["decoder_dims"] = decoder["decoder_channel_list"]
    if kwargs["NAME"] == "BaseSeg":
        return "pcm_s3dis", {
            **arguments,
            "windows": encoder["windows_size"] if encoder.get("use_windows") else None,
            "combine_xyz": encoder.get("combine_pos", False),
        }
    return "pcm_parts", arguments


def pretraining_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    config = kwargs["mamba_config"]
    require(kwargs, rms_norm=False, loss="cdl2", drop_out=0.0)
    require(config, mask_type="rand", encoder_dims=config["trans_dim"])
    return "pointmamba_pretraining", {
        "groups": kwargs["num_group"],
        "group_size": kwargs["group_size"],
        "dim": config["trans_dim"],
        "depth": config["depth"],
        "decoder_depth": config["decoder_depth"],
        "mask_ratio": config["mask_ratio"],
        "drop_path_rate": kwargs["drop_path"],
    }


def points_run(model: Any, inputs: dict[str, Tensor], fixture: dict[str, Any]) -> dict[str, Tensor]:
    name = fixture["kwargs"].get("NAME", "")
    if name == "Point_MAE_Mamba_serializationV2":
        return pretraining_run(model, inputs, fixture)
    if name == "Mamba3D":
        check_indices(model, inputs["x"], fixture)
        block = model.blocks[0]
        with recorded(
            tokens=model.patch_embed, lfa0=block.local, mixer0=block.mixer, block0=block, norm=model.norm
        ) as outputs:
            logits = model(inputs["x"])
        return {**outputs, "logits": logits}
    if name.startswith("Base"):
        return pcm_run(model, inputs, fixture)
    if "config" in fixture["kwargs"]:
        return parts_run(model, inputs, fixture)
    return pointmamba_run(model, inputs, fixture)


def pointmamba_run(model: Any, inputs: dict[str, Tensor], fixture: dict[str, Any]) -> dict[str, Tensor]:
    x = inputs["x"]
    check_indices(model, x, fixture)
    embedded, order, _ = model.embed(x)
    with recorded(tokens=model.patch_embed, block0=model.blocks[0], blocks=model.norm) as outputs:
        logits = model(x)
    hidden, residual = outputs["block0"]
    outputs |= {"sequence": embedded, "block0": hidden + residual}
    along = {key: along_order(outputs[key], order) for key in ("sequence", "block0", "blocks")}
    return {"tokens": outputs["tokens"], "logits": logits, **along}


def pcm_run(model: Any, inputs: dict[str, Tensor], fixture: dict[str, Any]) -> dict[str, Tensor]:
    """Published maps are `(b, c, n)`, the points of a stage along its last order."""
    arguments: dict[str, Any] = {}
    if "features" in inputs:
        arguments["features"] = inputs["features"].transpose(1, 2)
    if fixture["kwargs"]["NAME"] == "BasePartSeg":
        arguments["shape"] = shape_labels(fixture)
    groups = {f"group{i}": stage.pre for i, stage in enumerate(model.stages)}
    pyramid, kept = model.pyramid, []
    model.pyramid = lambda *given: kept.append(pyramid(*given)) or kept[0]
    with recorded(**groups) as outputs:
        logits = model(inputs["x"], **arguments)
    model.pyramid = pyramid
    tokens = kept[0][1]
    maps: dict[str, Any] = {"embedding": tokens[0], **{name: value.amax(2) for name, value in outputs.items()}}
    maps |= {f"stage{i}": value for i, value in enumerate(tokens[1:])}
    if logits.dim() == 3:
        logits = logits.transpose(1, 2)
    return {"logits": logits, **{name: value.transpose(1, 2) for name, value in maps.items()}}


def parts_run(model: Any, inputs: dict[str, Tensor], fixture: dict[str, Any]) -> dict[str, Tensor]:
    x = cloud_of(inputs["x"])
    logits = model(x, shape_labels(fixture)).log_softmax(-1)
    return {name: logits for name in fixture["outputs"]}  # noqa: C420 - dict.fromkeys has no type for its values


def cloud_of(x: Tensor) -> Tensor:
    """Coordinates last."""
    return x if x.shape[-1] == 3 else x.transpose(1, 2)


def shape_labels(fixture: dict[str, Any]) -> Tensor:
    """The stored label of each cloud's shape, as numbers or one-hot."""
    stored = next(
        torch.tensor(fixture["inputs"][key]["values"]) for key in ("cls", "label") if key in fixture["inputs"]
    )
    if stored.dim() > 1 and stored.shape[-1] > 1:
        return stored.reshape(-1, stored.shape[-1]).argmax(-1)
    return stored.reshape(-1).long()


def pretraining_run(model: Any, inputs: dict[str, Tensor], fixture: dict[str, Any]) -> dict[str, Tensor]:
    stored, x = fixture["inputs"]["mask"], inputs["x"]
    mask = torch.zeros(len(x), stored["length"], dtype=torch.bool)
    mask[:, stored["masked_positions"]] = True
    outputs = {}
    for direction, name in enumerate(("hilbert", "hilbert-trans")):
        rebuilt, true = model.reconstruct(x, direction, mask)
        outputs |= {f"rebuilt_{name}": rebuilt.flatten(0, 1), f"target_{name}": true.flatten(0, 1)}
    return outputs


def along_order(tokens: Tensor, order: Tensor) -> Tensor:
    """Tokens `(b, l, d)` in the order `(b, 1, l)` in which they are visited."""
    return tokens.gather(1, order[:, 0, :, None].expand_as(tokens))


def check_indices(model: Any, x: Tensor, fixture: dict[str, Any]) -> None:
    """The centres and orders that the published code chose."""
    stored = fixture.get("indices", {})
    if "fps" not in stored or len(x) > 1:
        return
    index = furthest_points(x, len(stored["fps"]))
    assert index[0].tolist() == stored["fps"]
    for name in ("hilbert", "hilbert-trans"):
        if f"order_{name}" in stored:
            order = point_order(name.replace("-", "_"), x[:, index[0]])
            assert order[0, 0].tolist() == stored[f"order_{name}"]


def check_orders(fixture: dict[str, Any]) -> None:
    """Published serializations, of given cells and of a cloud."""
    tables = fixture["permutations"]
    if "grid" in fixture["inputs"]:
        grid = torch.tensor(fixture["inputs"]["grid"]["values"]).view(fixture["inputs"]["grid"]["shape"])
        batch = (torch.arange(len(grid)) >= 300).long()  # as the fixture's own notes cut it
        for key, table in tables.items():
            check_grid_order(key, table, grid, batch)
        return
    given = {key: fixture["inputs"]["x"][key] for key in ("name", "shape", "scale")}
    x = torch.from_numpy(synth.synth_input(**given))
    clouds = {"": x, "/scaled_batch": x * torch.tensor([0.3, 4.0])[:, None, None]}
    for key, table in tables.items():
        if key == "grid":
            continue
        curve, _, case = key.partition("/")
        name, cloud = curve.replace("-", "_"), clouds[f"/{case}" if case else ""]
        together = point_order(f"{name}(shared_depth=True)", cloud)[:, 0] + 128 * torch.arange(2)[:, None]
        assert together.flatten().tolist() == table["perm"], key
        if "perm_alone_sample0" in table:
            assert point_order(name, cloud)[0, 0].tolist() == table["perm_alone_sample0"], key


def check_grid_order(key: str, table: dict[str, Any], grid: Tensor, batch: Tensor) -> None:
    family, setting, *middle, curve = key.split("/")
    together = "batch" in (setting, *middle)
    cells = grid[:, [1, 0, 2]] if curve.endswith("-trans") else grid
    if family == "pcm":
        code = cts_code(cells, curve, published=True)
    elif curve.startswith("hilbert"):
        depth = int(setting.removeprefix("depth")) if setting.startswith("depth") else int(grid.max()).bit_length()
        code = hilbert_code(cells, depth)
    else:
        code = zcurve_code(cells)
    if "code" in table and family != "pcm":  # PCM's codes differ from ours by a constant
        assert code.tolist() == table["code"], key
    order = torch.argsort(code, stable=True)
    if together:
        order = order[torch.argsort(batch[order], stable=True)]
    assert order.tolist() == table["perm"], key


FAMILIES = {
    "points": Family(
        points_arguments,
        points_run,
        lambda state: {"base_model": {f"module.{key}": value for key, value in state.items()}, "epoch": 299},
        check_orders,
    ),
}

"""Published forecasters: their arguments, their outputs, their files."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mamba_zoo.backbones import s_mamba

from .parity_family import Arguments, Family, recorded, require


def s_mamba_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    require(kwargs, activation="gelu")
    return "s_mamba", {
        "in_chans": kwargs["enc_in"],
        "seq_len": kwargs["seq_len"],
        "pred_len": kwargs["pred_len"],
        "depth": kwargs["e_layers"],
        "dim": kwargs["d_model"],
        "d_ff": kwargs["d_ff"],
        "d_state": kwargs["d_state"],
        "d_conv": kwargs["d_conv"],
        "expand": kwargs["expand"],
        "use_norm": bool(kwargs["use_norm"]),
        "dropout": kwargs["dropout"],
    }


def s_mamba_run(model: Any, inputs: dict[str, Tensor], fixture: dict[str, Any]) -> dict[str, Tensor]:
    mixer = model.blocks[0].mixer
    read: list[Tensor] = []
    hook = mixer.out_proj.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
    with recorded(embedding=model.embed_drop, layer0=model.blocks[0], encoder=model.norm) as outputs:
        forecast = model(inputs["x"], inputs.get("x_mark"))
    hook.remove()
    # One product serves both directions here; the published layers are its halves.
    ways = read[0].unflatten(-1, (2, -1)).unbind(2)
    weights = mixer.out_proj.weight.unflatten(1, (2, -1)).unbind(1)
    there, back = (way @ weight.T for way, weight in zip(ways, weights, strict=True))
    outputs |= {"forecast": forecast, "layer0_forward_mamba": there, "layer0_backward_mamba_unflipped": back.flip(1)}
    if "forecast_without_marks" in fixture["outputs"]:
        outputs["forecast_without_marks"] = model(inputs["x"])
    return outputs


def timemachine_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    require(kwargs, residual=1)
    return "timemachine", {
        "in_chans": kwargs["enc_in"],
        "seq_len": kwargs["seq_len"],
        "pred_len": kwargs["pred_len"],
        "n1": kwargs["n1"],
        "n2": kwargs["n2"],
        "d_state": kwargs["d_state"],
        "d_conv": kwargs["dconv"],
        "expand": kwargs["e_fact"],
        "independent": bool(kwargs["ch_ind"]),
        "affine": bool(kwargs["revin"]),
        "dropout": kwargs["dropout"],
    }


def timemachine_run(model: Any, inputs: dict[str, Tensor], fixture: dict[str, Any]) -> dict[str, Tensor]:
    names = ("lin1", "mamba3", "mamba4", "lin2", "mamba1", "mamba2", "lin3")
    with recorded(**{name: getattr(model, name) for name in names}, lin4_before_denorm=model.head) as outputs:
        forecast = model(inputs["x"])
    shape = fixture["outputs"]["lin4_before_denorm"]["shape"]  # the published model keeps variates in the batch
    outputs |= {"forecast": forecast, "lin4_before_denorm": outputs["lin4_before_denorm"].reshape(shape)}
    if "forecast_affine_weight_plus_1" in fixture["outputs"]:
        model.scale += 1
        outputs["forecast_affine_weight_plus_1"] = model(inputs["x"])
    return outputs


def mambats_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    require(kwargs, VPT_mode=1, ATSP_solver="SA", use_casual_conv=False, task_name="long_term_forecast")
    require(kwargs, stride=kwargs["patch_len"])
    return "mambats", {
        "in_chans": kwargs["enc_in"],
        "seq_len": kwargs["seq_len"],
        "pred_len": kwargs["pred_len"],
        "patch_size": kwargs["patch_len"],
        "depth": kwargs["e_layers"],
        "dim": kwargs["d_model"],
        "dropout": kwargs["dropout"],
    }


def mambats_run(model: Any, inputs: dict[str, Tensor], fixture: dict[str, Any]) -> dict[str, Tensor]:
    order = fixture["inputs"]["order"]["values"]
    model.set_order(order)
    with recorded(embedding=model.embed, layer0_mixer=model.blocks[0].mixer, encoder=model.norm) as outputs:
        forecast = model(inputs["x"])
    outputs["embedding"] = outputs["embedding"].flatten(0, 1)
    # Recorded in the order of the scan, which moves no token here.
    mixed = outputs["layer0_mixer"]
    outputs["layer0_mixer"] = mixed.unflatten(1, (len(order), -1))[:, order].flatten(1, 2)
    model.set_order(sorted(order))
    return {**outputs, "forecast": forecast, "forecast_identity_order": model(inputs["x"])}


def bare(state: dict[str, Tensor]) -> Any:
    """As `torch.save(model.state_dict())` of the authors' training programs leaves it."""
    return state


def parallel(state: dict[str, Tensor]) -> Any:
    """The same with `--use_multi_gpu`."""
    return {f"module.{key}": value for key, value in state.items()}


FAMILIES: dict[str, Family] = {
    "timeseries/smamba": Family(s_mamba_arguments, s_mamba_run, bare, dead=s_mamba.DEAD),
    "timeseries/timemachine": Family(timemachine_arguments, timemachine_run, bare),
    "timeseries/mambats": Family(mambats_arguments, mambats_run, parallel),
}

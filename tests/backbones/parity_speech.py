"""Published models from waveforms to waveforms: SEMamba and SPMamba."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .parity_family import Arguments, Family, recorded, require


def channels_first(outputs: dict[str, Any]) -> dict[str, Tensor]:
    """Maps `(b, t, f, c)` as the published code lays them out, `(b, c, t, f)`."""
    return {name: y.permute(0, 3, 1, 2) if y.dim() == 4 else y for name, y in outputs.items()}


def semamba_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    model, stft = kwargs["cfg"]["model_cfg"], kwargs["cfg"]["stft_cfg"]
    require(model, input_channel=2, output_channel=1)
    require(stft, win_size=stft["n_fft"])
    return "semamba", {
        "sample_rate": stft["sampling_rate"],
        "n_fft": stft["n_fft"],
        "hop": stft["hop_size"],
        "dim": model["hid_feature"],
        "depth": model["num_tfmamba"],
        "d_state": model["d_state"],
        "d_conv": model["d_conv"],
        "expand": model["expand"],
        "compress": model["compress_factor"],
        "beta": model["beta"],
        "eps": model["norm_epsilon"],
    }


def semamba_run(model: Any, inputs: dict[str, Tensor], fixture: dict[str, Any]) -> dict[str, Tensor]:
    if "mag" not in inputs:
        return semamba_wave(model, next(iter(inputs.values())), fixture["kwargs"]["cfg"]["stft_cfg"]["hop_size"])
    magnitude, phase = (inputs[name].transpose(1, 2) for name in ("mag", "pha"))
    blocks = {f"block{i}": block for i, block in enumerate(model.blocks)}
    masks: list[Tensor] = []
    hook = model.mask_out.register_forward_hook(lambda _, __, y: masks.append(y[..., 0]))
    with recorded(dense_encoder=model.squeeze, block0_time_mamba=model.blocks[0].time, **blocks) as outputs:
        magnitude, phase = (y.transpose(1, 2) for y in model.network(magnitude, phase))
    hook.remove()
    cos, sin = phase.cos(), phase.sin()
    return {
        **channels_first(outputs),
        "mask": model.beta * torch.sigmoid(model.mask_slope * masks[0])[:, None],
        "denoised_mag": magnitude,
        "denoised_com": torch.stack([magnitude * cos, magnitude * sin], -1),
        "cos_pha": cos,
        "sin_pha": sin,
    }


def semamba_wave(model: Any, noisy: Tensor, hop: int) -> dict[str, Tensor]:
    """As the published program: the last samples, less than a hop, are lost."""
    wave = model(noisy)
    scale = (noisy.shape[1] / noisy.square().sum(1, keepdim=True)).sqrt()
    spectrum = model.spectrum.analyse(noisy * scale)
    phase = spectrum.angle()
    magnitude, clean = model.network(spectrum.abs().pow(model.compress), phase)
    return {
        "wave": wave[:, : wave.shape[1] // hop * hop],
        "noisy_mag": spectrum.abs().pow(model.compress).transpose(1, 2),
        "noisy_phase_dc": phase[..., 0],
        "noisy_phase_nyquist": phase[..., -1],
        "denoised_mag": magnitude.transpose(1, 2),
        "denoised_com": torch.view_as_real(torch.polar(magnitude, clean)).transpose(1, 2),
    }


def spmamba_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    require(kwargs, window="hann", n_imics=1, emb_hs=1, activation="prelu")
    return "spmamba", {
        "sample_rate": kwargs["sample_rate"],
        "n_fft": kwargs["n_fft"],
        "hop": kwargs["stride"],
        "sources": kwargs["n_srcs"],
        "dim": kwargs["emb_dim"],
        "depth": kwargs["n_layers"],
        "window": kwargs["emb_ks"],
        "heads": kwargs["attn_n_head"],
        "query_size": kwargs["attn_approx_qk_dim"],
        "eps": kwargs["eps"],
    }


def spmamba_run(model: Any, inputs: dict[str, Tensor], fixture: dict[str, Any]) -> dict[str, Tensor]:
    blocks = {"block0": model.blocks[0], f"block{len(model.blocks) - 1}": model.blocks[-1]}
    parts = {"conv": model.embed_norm, "deconv": model.decoder, **blocks}
    with recorded(block0_intra_mamba=model.blocks[0].freq.mixer, **parts) as outputs:
        separated = model(inputs["wave"])
    return {**channels_first(outputs), "separated": separated}


def spmamba_container(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"model_name": "TFGridNetMamba", "state_dict": state, "model_args": {"n_srcs": 2}, "infos": {}}


FAMILIES = {
    "audio/semamba": Family(semamba_arguments, semamba_run, lambda state: {"generator": state}),
    "audio/spmamba": Family(spmamba_arguments, spmamba_run, spmamba_container),
}

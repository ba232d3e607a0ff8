"""Published plain layers of Mamba, Mamba-2 and Mamba-3, and language models made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .parity_family import Arguments, Family, recorded, require

_RENAMED = {
    "d_model": "dim", "headdim": "head_dim", "ngroups": "groups", "D_has_hdim": "channel_skip", "rmsnorm": "gated_norm",
    "norm_before_gate": "norm_first", "is_outproj_norm": "out_norm",
}  # fmt: skip


def _renamed(kwargs: Arguments) -> Arguments:
    return {_RENAMED.get(name, name): value for name, value in kwargs.items() if name != "use_mem_eff_path"}


def language_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    require(kwargs, rms_norm=True, residual_in_fp32=True)
    mixer = kwargs["ssm_cfg"].get("layer", "Mamba1").lower()
    return {"mamba1": "mamba_130m", "mamba2": "mamba2_130m"}[mixer], {
        "dim": kwargs["d_model"],
        "depth": kwargs["n_layer"],
        "vocab_size": kwargs["vocab_size"],
        "pad_vocab_to": kwargs["pad_vocab_size_multiple"],
    }


def language_run(model: Any, inputs: dict[str, Tensor], fixture: dict[str, Any]) -> dict[str, Tensor]:
    words = torch.tensor(fixture["inputs"]["input_ids"]["values"])
    with recorded(mixer0=model.blocks[0].mixer, mixer_last=model.blocks[-1].mixer, hidden=model.norm) as outputs:
        logits = model(words)
    return {**outputs, "logits": logits, "logits_last_token": logits[0, -1]}


def language_container(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "lm_head.weight": state["backbone.embedding.weight"]}


def _layer(name: str) -> Family:
    return Family(lambda kwargs: (name, _renamed(kwargs)), lambda model, inputs, _: {"y": model(inputs["x"])}, dict)


FAMILIES = {
    "lm": Family(language_arguments, language_run, language_container),
    "lm/mamba1": _layer("mamba"),
    "lm/mamba2_layer": _layer("mamba2"),
    "lm/mamba3": _layer("mamba3"),
}

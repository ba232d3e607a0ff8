"""Every backbone trains with every scan that fits its modality, and with none; every patch of the input matters."""

from typing import Any

import pytest
import timm
import torch
from timm.models._registry import model_entrypoint

import mamba_zoo
from mamba_zoo.scans import build_scan, list_scans

# A grid of 6 x 4 patches or positions: oblong, and no window of 7 or Hilbert curve fits it exactly.
TOKENS: dict[str, Any] = {"img_size": (96, 64), "dim": 16, "depth": 2, "d_state": 2, "num_classes": 3}
MAPS: dict[str, Any] = {"depths": (1, 1), "dims": 8, "d_state": 2, "num_classes": 3}
IMAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "vmamba": ("vmamba_tiny", MAPS),
    "vmamba v0": ("vmamba_tiny_v0", MAPS),
    "efficientvmamba": ("efficient_vmamba_tiny", {**MAPS, "dims": 16}),
    "localvmamba": ("local_vmamba_tiny", MAPS),
    "mambavision": (
        "mambavision_t",
        {"depths": (1, 1, 2, 2), "dim": 8, "stem_dim": 4, "heads": (1, 1), "windows": (6, 4), "num_classes": 3},
    ),
    "plainmamba": ("plainmamba_l1", {**TOKENS, "stem_dim": 4}),
    "vim": ("vim_tiny", TOKENS),
    "localvim": ("local_vim_tiny", {**TOKENS, "directions": ("h", "v_flip")}),
    "localvim token": ("local_vim_tiny_middle_cls_token", {**TOKENS, "directions": ("h", "h_flip")}),
    "videomamba": ("videomamba_tiny", TOKENS),
}
VIDEO: dict[str, tuple[str, dict[str, Any]]] = {
    "videomamba video": ("videomamba_tiny_video", {**TOKENS, "num_frames": 3}),
}
COMPOSED = ["none", "both_ways(transpose(hilbert))", "first(cross, 1)", "join(raster, window(2))"]
CASES = [
    *((row, scan) for row in IMAGE for scan in [*list_scans(modality="image"), *COMPOSED]),
    *((row, scan) for row in VIDEO for scan in [*list_scans(modality="video"), "none", "transpose(spatial_first)"]),
]


def test_every_family_is_here():
    names = [*mamba_zoo.list_models(modality="image"), *mamba_zoo.list_models(modality="video")]
    families = {model_entrypoint(name).__module__ for name in names}
    assert families == {model_entrypoint(name).__module__ for name, _ in [*IMAGE.values(), *VIDEO.values()]}


@pytest.mark.parametrize(("row", "scan"), CASES, ids=lambda value: value)
def test_trains_a_step(row, scan):
    architecture, settings = {**IMAGE, **VIDEO}[row]
    model: Any = timm.create_model(architecture, **settings, scan=scan).train()
    step = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(2, *model.input_shape(96, 64)).requires_grad_()
    before = torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 2]))
    assert before.isfinite()
    before.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == set()
    assert x.grad is not None
    patches = torch.nn.functional.max_pool2d(x.grad.abs().flatten(0, -3), 16)
    assert patches.all(), "some patches change nothing: they never reach what the classifier reads"
    assert all(p.grad.isfinite().all() for p in model.parameters())
    step.step()
    after = torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 2]))
    assert after.isfinite()
    assert after != before
    k = 0 if scan == "none" else build_scan(scan, *((3,) if row in VIDEO else ()), 6, 4).k
    decays = [p for name, p in model.named_parameters() if name.endswith(".A_log")]
    shared = row == "plainmamba"  # one set of parameters for all directions
    assert {len(p) for p in decays} == ({min(k, 1) if shared else k} if k else set())

"""PlainMamba's direction-aware scan against its definition, token by token, and what its weights go with."""

import copy
import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import mamba_zoo
from mamba_zoo.backbones._direction import DirectionAwareSSM
from mamba_zoo.backbones.plainmamba import PlainMambaMixer, checkpoint_filter_fn
from mamba_zoo.scans import build_scan, scan_order

SMALL: dict[str, Any] = {"dim": 24, "depth": 3, "img_size": 64, "num_classes": 7}
# Rows, curves, windows with empty steps, and directions that each visit a part of the tokens.
SCANS = ["snake", "raster", "hilbert", "window(2)", "atrous", "join(raster, first(atrous))"]


def ssm(aligned: bool, device: torch.device) -> DirectionAwareSSM:
    torch.manual_seed(0)
    layer = DirectionAwareSSM(6, 3, 2, aligned, device=device, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return layer


def move(before: int | None, token: int, width: int) -> int:
    """1 right, 2 left, 3 up, 4 down; 0 first or jump."""
    if before is None:
        return 0
    (h, w), (h0, w0) = divmod(token, width), divmod(before, width)
    return {(0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}.get((h - h0, w - w0), 0)


def token_by_token(layer: DirectionAwareSSM, u: Tensor, order: Tensor, width: int) -> Tensor:
    """The recurrence as PlainMamba's published code runs it: step t of a direction meets token t's dt, B and C."""
    low, B, C = (u @ layer.x_proj.weight[0].T).split([layer.dt_rank, layer.d_state, layer.d_state], dim=-1)
    dt = F.softplus(low @ layer.dt_proj.weight[0].T + layer.dt_bias[0])
    A = -layer.A_log[0].exp()
    outputs = [torch.zeros_like(u[:, 0]) for _ in range(u.shape[1])]
    for row in order.tolist():
        h, before = u.new_zeros(len(u), *A.shape), None
        in_raster = iter(sorted(token for token in row if token >= 0))
        for token in row:
            if token < 0:  # an empty step: a token of zeros, which moves the state all the same
                h = torch.exp(F.softplus(layer.dt_bias[0])[:, None] * A) * h
                continue
            i = token if layer.aligned else next(in_raster)
            b = B[:, i] + layer.direction_B[move(before, token, width)]
            h = torch.exp(dt[:, i, :, None] * A) * h + (dt[:, i] * u[:, token])[:, :, None] * b[:, None]
            outputs[token] = outputs[token] + (h * C[:, i, None]).sum(-1) + layer.D[0] * u[:, token]
            before = token
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("scan", SCANS)
def test_values_and_gradients_are_those_of_the_definition(scan, aligned, device):
    height, width = 3, 5
    layer = ssm(aligned, device)
    u = torch.randn(2, height * width, 6, dtype=torch.float64, device=device)
    target = torch.randn_like(u)
    results = []
    for run in (
        lambda u: layer(u, scan_order(scan, (height, width), device), (height, width)),
        lambda u: token_by_token(layer, u, build_scan(scan, height, width).order, width),
    ):
        layer.zero_grad()
        x = u.clone().requires_grad_()
        y = run(x)
        (y * target).sum().backward()
        results.append([y, x.grad, *(copy.copy(p.grad) for p in layer.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_the_published_mismatch_matters():
    u = torch.randn(1, 12, 6, dtype=torch.float64)
    order = scan_order("snake", (3, 4), "cpu")
    published, aligned = (ssm(flag, torch.device("cpu"))(u, order, (3, 4)) for flag in (False, True))
    assert torch.linalg.vector_norm(published - aligned) > 0.1 * torch.linalg.vector_norm(aligned)


def test_tables_made_in_inference_mode_serve_training():
    model: Any = timm.create_model("plainmamba_l1", **SMALL)
    x = torch.randn(1, 3, 48, 80)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert model.stages[0].blocks[0].mixer.ssm.direction_B.grad.any()


def test_weights_go_with_any_number_of_directions(tmp_path):
    model: Any = timm.create_model("plainmamba_l1", **SMALL)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    x = torch.randn(1, 3, 64, 64)
    outputs = []
    for scan in ("snake", "raster", "both_ways(hilbert)"):
        other = mamba_zoo.create_model("plainmamba_l1", checkpoint_path=tmp_path / "w.pth", scan=scan, **SMALL).eval()
        with torch.no_grad():
            outputs.append(other(x))
    with torch.no_grad():
        assert torch.equal(outputs[0], model.eval()(x))
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-6)
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-6)


def test_without_a_scan_the_convolution_is_gated():
    model: Any = timm.create_model("plainmamba_l1", scan="none", **SMALL).eval()
    assert not any("ssm" in name for name, _ in model.named_parameters())
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_conv_blocks_replace_the_map():
    model: Any = timm.create_model("plainmamba_l1", **SMALL).eval()
    assert [len(list(stage.blocks[0].conv.parameters())) > 0 for stage in model.stages] == [True, False, False]
    with torch.no_grad():
        model.stages[0].blocks[0].conv[0].weight.zero_()
        block = model.stages[0].blocks[0]
        assert not block(torch.randn(1, 4, 4, 24)).any(), "GELU of a norm without mean and bias is zero"


def test_position_embedding_for_another_size():
    model: Any = timm.create_model("plainmamba_l1", **{**SMALL, "img_size": (96, 48)})
    table = torch.randn(1, 16, 24)
    state = checkpoint_filter_fn({"backbone.pos_embed": table, "ema_backbone_pos_embed": table}, model)
    want = F.interpolate(table.view(1, 4, 4, 24).permute(0, 3, 1, 2), (6, 3), mode="bicubic", align_corners=False)
    assert list(state) == ["stem.pos_embed"]
    torch.testing.assert_close(state["stem.pos_embed"], want.permute(0, 2, 3, 1).reshape(1, 18, 24))


def test_images_are_filled_up_at_the_right_and_the_bottom():
    model: Any = timm.create_model("plainmamba_l1", **SMALL).eval()
    torch.nn.init.zeros_(model.stem.pos_embed)
    x = torch.randn(1, 3, 50, 70)
    with torch.no_grad():
        y = model.stem(x)
        filled = model.stem.norms[1](
            model.stem.convs[1](model.stem.norms[0](model.stem.convs[0](x.permute(0, 2, 3, 1))).relu())
        )
        last = F.pad(filled.relu(), (0, 0, 0, 5, 0, 7))[:, -8:, -8:]
        want = torch.einsum("bhwc,dchw->bd", last, model.stem.proj.weight) + model.stem.proj.bias
    assert y.shape == (1, math.ceil(50 / 16), math.ceil(70 / 16), 24)
    torch.testing.assert_close(y[:, -1, -1], want, rtol=1e-4, atol=1e-5)


def test_bad_arguments_say_so():
    with pytest.raises(ValueError, match="patch_size=7 must be even"):
        timm.create_model("plainmamba_l1", patch_size=7)
    with pytest.raises(ValueError, match=r"conv_blocks=\(3,\) must be numbers of blocks, from 0 to 2"):
        timm.create_model("plainmamba_l1", depth=3, conv_blocks=(3,))


def test_compiles_exports_and_traces():
    model: Any = timm.create_model("plainmamba_l1", depth=1, dim=24, img_size=32, num_classes=7).eval()
    x = torch.randn(2, 3, 32, 48)
    torch._dynamo.reset()
    compiled: Any = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    got, want = compiled(x), model(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    got.square().mean().backward()
    want.square().mean().backward()
    for ours, theirs in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    features: Any = timm.create_model(
        "plainmamba_l1", features_only=True, feature_cls="fx", out_indices=(0, 1), depth=2, dim=24, img_size=32
    )
    assert [tuple(m.shape[1:]) for m in features(x)] == [(2, 3, 24)] * 2


def test_sums_over_directions_may_leave_the_range_of_float16(device):
    torch.manual_seed(0)
    mixer: Any = PlainMambaMixer(16).to(device)
    with torch.no_grad():
        mixer.ssm.D.fill_(1e6)
    x = torch.randn(2, 4, 4, 16, device=device)
    with torch.autocast(device.type, torch.float16):
        y = mixer(x)
    assert y.abs().max() > 1000  # the sums are larger by far
    torch.testing.assert_close(y.float(), mixer(x), rtol=0, atol=0.01 * y.abs().max().item())

"""Models of point clouds beyond parity: what may be expected of all of them, their geometry, and published oddities."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters

import mamba_zoo
from mamba_zoo.backbones import card
from mamba_zoo.backbones._point_windows import PointStream, place_in_window, whole_windows
from mamba_zoo.backbones._points import (
    chamfer_distance,
    furthest_points,
    group_points,
    interpolate_points,
    nearest_points,
)
from mamba_zoo.backbones.pointmamba import load_encoder

NAMES = mamba_zoo.list_models(modality="points")
_PCM: dict[str, Any] = {
    "dim": 24, "dim_expansion": (1, 2), "depths": (1, 2), "pre_blocks": (1, 1), "neighbours": (4, 4),
    "reducers": (2, 2), "prompt_dim": 16, "prompts": 2, "d_state": 4,
}  # fmt: skip
_PATCHES: dict[str, Any] = {"groups": 12, "group_size": 6, "dim": 24, "depth": 3, "d_state": 4}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "pointmamba": ("pointmamba", _PATCHES),
    "pointmamba_v1": ("pointmamba_v1", _PATCHES),
    "pointmamba_v1_parts": ("pointmamba_v1_parts", {**_PATCHES, "taps": (0, 2), "num_shapes": 0}),
    "mamba3d": ("mamba3d", _PATCHES),
    "pcm": ("pcm", _PCM),
    "pcm_parts": ("pcm_parts", {**_PCM, "decoder_dims": (32, 24), "num_shapes": 0, "in_chans": 3}),
    "pcm windows": (
        "pcm_s3dis",
        {**_PCM, "decoder_dims": (32, 24), "windows": (8, 8), "in_chans": 6, "scan": "join(hilbert, zcurve, sort_z)"},
    ),
}


def build(row: str, **more: Any) -> Any:
    architecture, settings = SMALL[row]
    torch.manual_seed(0)
    return timm.create_model(architecture, **{"num_classes": 5, **settings, **more}).eval()


def clouds(batch: int = 2, n: int = 48) -> torch.Tensor:
    torch.manual_seed(1)
    return 0.4 * torch.randn(batch, n, 3)


@pytest.fixture(params=SMALL)
def small(request) -> Any:
    return build(request.param)


@pytest.mark.parametrize("name", NAMES)
def test_has_the_published_number_of_parameters(name):
    model = mamba_zoo.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == card(name).params


def test_every_architecture_has_a_small_model():
    built = {type(mamba_zoo.create_model(name, device="meta")) for name in NAMES}
    tested = {type(timm.create_model(name, device="meta")) for name, _ in SMALL.values()}
    assert {kind.__name__ for kind in built - tested} == {"PointMambaPretraining"}


def test_outputs_and_classifiers(small):
    x = clouds()
    points = small(x).dim() == 3
    for classes in (5, 3, 0):
        small.reset_classifier(classes)
        width = classes or small.head_hidden_size
        assert small(x).shape == ((2, 48, width) if points else (2, width))
        assert small.num_classes == classes
    with pytest.raises(ValueError, match="global_pool='avg'"):
        small.reset_classifier(5, "avg")


def test_clouds_do_not_depend_on_their_batch(small):
    x = clouds(3) * torch.tensor([0.2, 1.0, 6.0])[:, None, None]
    with torch.no_grad():
        together, alone = small(x), torch.cat([small(cloud[None]) for cloud in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", ["pointmamba", "mamba3d"])
def test_published_behaviour_depends_on_the_batch(row):
    model = build(row, published=True)
    x = clouds(2, 256) * torch.tensor([0.2, 6.0])[:, None, None]
    with torch.no_grad():
        assert not torch.allclose(model(x)[:1], model(x[:1]), rtol=1e-3, atol=1e-4)


def test_published_orders_of_pcm_depend_on_the_batch():
    x = clouds(2, 256) * torch.tensor([0.2, 6.0])[:, None, None]
    for published in (False, True):
        model = build("pcm", scan="join(cts('xyz'), hilbert)", published=published)
        with torch.no_grad():
            together, alone = model.pyramid(x)[0][-1][:1], model.pyramid(x[:1])[0][-1]
        assert torch.equal(together, alone) != published


def test_every_parameter_gets_a_gradient(small):
    small.train()
    small(clouds(4)).square().mean().backward()
    for key, parameter in small.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_weight_decay_and_layer_groups(small):
    parameters = dict(small.named_parameters())
    spared = small.no_weight_decay()
    assert spared <= set(parameters)
    assert {key for key in parameters if key.endswith(("A_log", ".D", "dt_bias", "cls_token"))} <= spared
    groups: dict[int, list[str]] = group_parameters(small, small.group_matcher())
    members = [key for group in groups.values() for key in group]
    assert sorted(members) == sorted(parameters)
    assert "head.fc.weight" in groups[max(groups)]
    assert any(key.startswith(("patch_embed", "embedding")) for key in groups[min(groups)])


def test_checkpointing_changes_neither_output_nor_gradients(small):
    results = []
    for enable in (False, True):
        model = copy.deepcopy(small).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.set_grad_checkpointing(enable)
        out = model(clouds())
        out.square().mean().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-5)


def test_bfloat16(small):
    x = clouds()
    with torch.no_grad():
        want, got = small(x), copy.deepcopy(small).bfloat16()(x.bfloat16().float().bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            mixed = small(x)
    assert got.dtype == torch.bfloat16
    assert got.isfinite().all()
    assert (mixed.float() - want).norm() < 0.1 * want.norm()


def test_own_weights_load_strictly_and_carry_the_published_form(small, tmp_path):
    row = next(row for row in SMALL if type(build(row)) is type(small) and build(row).scan == small.scan)
    architecture, settings = SMALL[row]
    small.published = True
    torch.save({"state_dict": small.state_dict()}, tmp_path / "w.pth")
    settings = {"num_classes": 5, **settings}
    other = mamba_zoo.create_model(architecture, checkpoint_path=tmp_path / "w.pth", **settings).eval()
    assert other.published
    with torch.no_grad():
        assert torch.equal(other(clouds()), small(clouds()))
    fixed = mamba_zoo.create_model(architecture, checkpoint_path=tmp_path / "w.pth", published=False, **settings)
    assert not fixed.published
    torch.save({k: v for k, v in small.state_dict().items() if "blocks.0" not in k}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="are not in it"):
        mamba_zoo.create_model(architecture, checkpoint_path=tmp_path / "w.pth", **settings)


@pytest.mark.parametrize("row", ["pointmamba", "pointmamba_v1", "pcm"])
@pytest.mark.parametrize("scan", ["spectral", "random(seed=3)", "both_ways(zcurve)", "join(sort_x, cts('zxy'), given)"])
def test_any_scan_of_points(row, scan):
    model = build(row, scan=scan).train()
    model(clouds(2)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_scan_matters_and_none_leaves_it_out():
    x = clouds()
    with torch.no_grad():
        first, second = (
            build("pointmamba", scan=f"join({a}, {b})")(x) for a, b in (("hilbert", "zcurve"), ("sort_x",) * 2)
        )
    assert not torch.allclose(first, second, rtol=1e-3)
    control = build("pointmamba", scan="none")
    assert set(control.state_dict()) == {key for key in build("pointmamba").state_dict() if ".ssm." not in key}
    assert control(x).shape == (2, 5)
    with pytest.raises(ValueError, match="mixers of Mamba3D have two branches"):
        build("mamba3d", scan="join(sort_x, sort_y, sort_z)")
    with pytest.raises(ValueError, match="no scan of points named 'hilbrt'; did you mean 'hilbert'"):
        build("pointmamba", scan="hilbrt")


def test_every_token_is_visited_once_in_every_direction():
    model = build("pointmamba")
    tokens, order, centres = model.embed(clouds())
    assert tokens.shape == (2, 24, 24)
    assert centres.shape == (2, 12, 3)
    assert torch.equal(order.sort(-1).values, torch.arange(24).expand(2, 1, -1))
    assert (order[:, 0, :12] < 12).all(), "one direction after the other"


def test_wrong_inputs_say_what_to_do():
    model = build("pointmamba")
    with pytest.raises(ValueError, match=r"must be \(b, n, 3\)"):
        model(torch.randn(2, 3, 48))
    with pytest.raises(ValueError, match="12 points are to be chosen from clouds of 9"):
        model(torch.randn(2, 9, 3))
    with pytest.raises(TypeError, match="makes no feature maps"):
        mamba_zoo.create_model("pointmamba", features_only=True)
    with pytest.raises(ValueError, match="takes a label"):
        build("pointmamba_v1_parts", num_shapes=4)(clouds())
    with pytest.raises(ValueError, match=r"features must be \(2, 48, 7\)"):
        build("pcm", in_chans=7)(clouds())
    for row in ("pcm_parts", "pointmamba_v1_parts"):
        parts = build(row, num_shapes=4)
        assert parts(clouds(), torch.tensor([0, 3])).shape == (2, 48, 5)
        for label, message in {
            (0, 4): "shape holds 0 to 4",
            (1,): r"must be 2 integers",
            (0.0, 1.0): "float32",
        }.items():
            with pytest.raises(ValueError, match=message):
                parts(clouds(), torch.tensor(label))
        with pytest.raises(ValueError, match="takes no label"):
            build(row, num_shapes=0)(clouds(), torch.tensor([0, 1]))


def test_coordinates_of_any_dtype_are_taken(small):
    x = clouds().double()
    torch.testing.assert_close(small(x).float(), small(x.float()), rtol=1e-4, atol=1e-5)


def test_pretraining_starts_the_classifier(tmp_path):
    torch.manual_seed(0)
    auto: Any = mamba_zoo.create_model("pointmamba_pretraining", decoder_depth=1, **_PATCHES)
    before = {key: value.clone() for key, value in auto.state_dict().items()}
    optimizer = torch.optim.AdamW(auto.parameters(), 3e-3)
    losses = []
    x = clouds(4, 96)
    for _ in range(25):
        loss = auto(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert [key for key, p in auto.named_parameters() if p.grad is None] == []
    rebuilt, true = auto.eval().reconstruct(x, 1, auto.draw_mask(4, x.device))
    assert rebuilt.shape == true.shape == (4, 7, 6, 3)
    torch.save({"state_dict": {f"net.{key}": value for key, value in auto.state_dict().items()}}, tmp_path / "w.ckpt")
    model = build("pointmamba")
    load_encoder(model, tmp_path / "w.ckpt")
    assert torch.equal(model.norm.weight, auto.encoder.norm.weight)
    assert not torch.equal(model.norm.weight, before["encoder.norm.weight"])
    with pytest.raises(ValueError, match=r"has other sizes: .* build the model like it"):
        load_encoder(build("pointmamba", dim=32), tmp_path / "w.ckpt")
    torch.save(model.state_dict(), tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match="holds no encoder of this model"):
        load_encoder(build("pointmamba"), tmp_path / "w.ckpt")


def test_furthest_points_are_the_greedy_ones(device):
    x = clouds(3, 60).to(device)
    index = furthest_points(x, 20).cpu()
    for cloud, chosen in zip(x.cpu(), index.tolist(), strict=True):
        assert chosen[0] == 0
        for i in range(1, 20):
            nearest = torch.cdist(cloud, cloud[chosen[:i]]).amin(1)
            assert nearest[chosen[i]] == pytest.approx(float(nearest.max()), rel=1e-5)
    assert torch.equal(index, furthest_points(x.cpu(), 20)), "the same points on every device"
    zeros = torch.zeros(1, 4, 3, device=device)
    assert torch.equal(furthest_points(zeros, 3), torch.zeros(1, 3, dtype=torch.int64, device=device))


def test_furthest_points_away_from_the_origin(device):
    x = clouds(2, 60).to(device)
    x[0, 5:30] *= 1e-3  # in the middle of the cloud
    x[1, 0] = 0
    index = furthest_points(x, 30, skip_origin=True).cpu()
    far = [(x[i].square().sum(-1) > 1e-3).nonzero()[:, 0].cpu() for i in (0, 1)]
    assert set(index[0].tolist()) <= set(far[0].tolist())
    assert torch.equal(index[0], far[0][furthest_points(x[:1, far[0]], 30).cpu()[0]])
    assert index[1, 0] == 0, "the first point is taken wherever it lies"
    assert not torch.equal(index[0], furthest_points(x, 30).cpu()[0])
    for row in ("pointmamba", "pointmamba_v1", "pointmamba_v1_parts", "mamba3d"):
        cloud = 0.1 * clouds(1) + 1  # whose furthest point is the origin
        cloud[0, 7] = 0
        assert not torch.allclose(build(row)(cloud), build(row, skip_origin=True)(cloud), rtol=1e-4, atol=1e-5)


def test_prompts_of_pcm_are_numbered_as_asked():
    row, numbers = "pcm windows", [2, 0, 1]
    model, other = build(row), build(row, prompt_rows=numbers)
    state = model.state_dict()
    prompts = state["order_prompt"].unflatten(0, (3, -1))
    state["order_prompt"] = torch.empty_like(prompts).index_copy(0, torch.tensor(numbers), prompts).flatten(0, 1)
    other.load_state_dict(state)
    assert torch.equal(other(clouds()), model(clouds()))
    with pytest.raises(ValueError, match=r"prompt_rows=\[0, 1\] must be an arrangement of \[0, 1, 2\]"):
        build(row, prompt_rows=[0, 1])


def test_neighbours_groups_and_interpolation(device, monkeypatch):
    monkeypatch.setattr("mamba_zoo.backbones._points._BLOCK", 1000)  # in several pieces
    x = clouds(2, 50).to(device)
    squared, index = nearest_points(x, x[:, :30], 4)
    want = torch.cdist(x[:, :30].double(), x.double()).square().topk(4, largest=False)
    assert torch.equal(index, want.indices)
    torch.testing.assert_close(squared.double(), want.values, rtol=1e-5, atol=1e-10)
    patches, centres = group_points(x, 5, 4)
    assert torch.equal(patches[:, :, 0], torch.zeros_like(centres)), "the centre is the nearest point"
    features = torch.randn(2, 50, 7, device=device)
    torch.testing.assert_close(interpolate_points(x, x, features), features, rtol=1e-3, atol=1e-3)
    assert interpolate_points(x, x[:, :1], features[:, :1]).shape == (2, 50, 7)
    assert float(chamfer_distance(x, x)) == 0
    with pytest.raises(ValueError, match="k=51 neighbours are asked for among 50 points"):
        nearest_points(x, x, 51)


def test_windows_hold_successive_points_and_come_back():
    xyz = clouds(2, 22)
    kept = whole_windows(xyz, 5)
    assert kept.shape == (2, 20)
    assert (kept.diff(dim=1) > 0).all(), "points stay in their order"
    chosen = furthest_points(xyz, 20)
    assert torch.equal(kept, chosen.sort(1).values)
    stream = PointStream(xyz, torch.randn(2, 22, 3)).take(kept)
    parts = stream.cut(5)
    assert parts.xyz.shape == (8, 5, 3)
    assert torch.equal(parts.x[5], stream.x[1, 5:10])
    assert torch.equal(parts.joined(2).xyz, stream.xyz)
    place, published = place_in_window(parts.xyz), place_in_window(parts.xyz, for_each_point=True)
    torch.testing.assert_close(place.amax(1), torch.ones(8, 3), atol=1e-4, rtol=0)
    assert torch.equal(place.argsort(1), parts.xyz.argsort(1))
    assert torch.equal(published.amin(2), torch.zeros(8, 5))
    flat = parts.xyz * torch.tensor([1.0, 1.0, 0.0])
    assert place_in_window(flat).isfinite().all()


def test_models_run_on_every_device(device):
    model, x = build("pcm"), clouds()
    with torch.no_grad():
        want, got = model(x), model.to(device)(x.to(device)).cpu()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)

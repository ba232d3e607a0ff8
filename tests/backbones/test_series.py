"""Models of series: timm's contract where it makes sense, scans, lengths, and what MambaTS learns."""

import copy
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models import group_parameters
from timm.models._registry import model_entrypoint

import mamba_zoo
from mamba_zoo.backbones import card
from mamba_zoo.backbones._series_published import PUBLISHED
from mamba_zoo.backbones._tour import short_path
from mamba_zoo.backbones.mambats import cheapest_order
from mamba_zoo.scans import build_scan, correlation_scan

NAMES = mamba_zoo.list_models(modality="series")
SMALL: dict[str, dict[str, Any]] = {
    "s_mamba": {"dim": 16},
    "timemachine": {"n1": 16, "n2": 8, "d_state": 4},
    "mambats": {"dim": 8, "depth": 2, "patch_size": 8},
    "series_mamba": {"dim": 16, "depth": 2, "d_state": 4},
    "series_linear": {},
    "dlinear": {"average": 5},
    "nlinear": {},
}
COUNTS = json.loads((Path(__file__).parent / "published" / "series.json").read_text())


def small(name: str, **kwargs: Any) -> Any:
    return mamba_zoo.create_model(name, **{"in_chans": 5, "seq_len": 24, "pred_len": 6, **SMALL[name], **kwargs}).eval()


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


def test_every_family_is_tried():
    assert set(SMALL) == set(NAMES)


def test_has_the_parameters_of_its_card(name):
    model: Any = mamba_zoo.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == card(name).params
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_published_settings_give_the_published_number_of_parameters(name):
    assert set(COUNTS[name]) <= set(PUBLISHED[name])
    for key, count in COUNTS[name].items():
        model: Any = mamba_zoo.create_model(name, published=key, device="meta")
        dead = 2464 * len(model.blocks) if name == "s_mamba" else 0  # in the published files, and used by nothing
        assert sum(p.numel() for p in model.parameters()) + dead == count, key


def test_unknown_published_settings_are_refused():
    with pytest.raises(ValueError, match=r"'etth1_96_97' is unknown for s_mamba.*etth1_96_96"):
        mamba_zoo.create_model("s_mamba", published="etth1_96_97")


def test_forecasts_classifies_and_reconstructs(name, device):
    x = torch.randn(3, 24, 5, device=device)
    for options, shape in [({}, (3, 6, 5)), ({"num_classes": 4}, (3, 4)), ({"pred_len": 0}, (3, 24, 5))]:
        model = small(name, **options).to(device).train()
        y = model(x)
        assert y.shape == shape
        y.square().mean().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_head_can_be_exchanged(name):
    model, x = small(name), torch.randn(2, 24, 5)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.get_classifier() is model.head
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.forward_head(features), model.head(pooled))
    model.reset_classifier(0)
    assert model(x).shape == (2, 6, 5)


def test_decay_and_depth_of_parameters(name):
    model = small(name)
    exempt = model.no_weight_decay()
    for key, parameter in model.named_parameters():
        if parameter.dim() <= 1 or key.rsplit(".")[-1] in ("A_log", "D", "dt_bias"):
            assert key in exempt
    grouped = [n for group in group_parameters(model, model.group_matcher(), reverse=False).values() for n in group]
    assert sorted(grouped) == sorted(n for n, _ in model.named_parameters())


def test_checkpointing_recomputes_the_same(name):
    model, x = small(name), torch.randn(2, 24, 5)
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    got = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_bfloat16_copies_and_files(name, tmp_path):
    model, x = small(name), torch.randn(2, 24, 5)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(copy.deepcopy(model)(x), want)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        torch.testing.assert_close(torch.load(file, weights_only=False)(x), want)
        torch.save(model.state_dict(), tmp_path / "own.pth")
        torch.testing.assert_close(small(name, checkpoint_path=tmp_path / "own.pth")(x), want)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (model(x).float() - want).norm() < 0.03 * want.norm()
    with torch.inference_mode():
        torch.testing.assert_close(model(x), want)


def test_part_of_a_file_is_refused(name, tmp_path):
    state = small(name).state_dict()
    state.pop(next(key for key in state if "head" not in key) if len(state) > 2 else "head.bias")
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="not in it"):
        small(name, checkpoint_path=tmp_path / "part.pth")


def test_windows_of_another_size_are_refused(name):
    if name != "series_mamba":
        with pytest.raises(ValueError, match=r"reads windows \(b, 24, 5\)"):
            small(name)(torch.randn(2, 25, 5))
    with pytest.raises(ValueError, match=r"reads (windows|series) \(b, (24|steps), 5\)"):
        small(name)(torch.randn(2, 24, 4))


@pytest.mark.parametrize("name", ["s_mamba", "timemachine", "mambats", "series_mamba"])
@pytest.mark.parametrize("scan", ["reversed", "both_ways(shuffled)", "random(k=3)"])
def test_takes_any_order(name, scan):
    model = small(name, scan=scan)
    x = torch.randn(2, 24, 5)
    y = model(x)
    assert y.shape == (2, 6, 5)
    k = build_scan(scan, 5).k
    stacked = {p.shape[0] for key, p in model.named_parameters() if key.endswith("A_log")}
    assert stacked == {k}
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["s_mamba", "timemachine", "mambats", "series_mamba"])
def test_without_a_scan_the_rest_stays(name):
    model = small(name, scan="none")
    whole = small(name, scan="bidirectional" if name in ("s_mamba", "series_mamba") else "forward")
    assert set(model.state_dict()) == {key for key in whole.state_dict() if ".ssm." not in key}
    model(torch.randn(2, 24, 5)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_order_of_variates_matters_and_is_followed():
    """S-Mamba over permuted variates is S-Mamba of the permuted series."""
    order, x = [3, 1, 4, 0, 2], torch.randn(2, 24, 5)
    plain = small("s_mamba", scan="forward")
    for scan in ("permuted((3, 1, 4, 0, 2))",):
        permuted = small("s_mamba", scan=scan)
        permuted.load_state_dict(plain.state_dict())
        torch.testing.assert_close(permuted(x)[:, :, order], plain(x[:, :, order]))
        assert (permuted(x) - plain(x)).abs().max() > 1e-4
    assert small("s_mamba", scan=correlation_scan(x[0]))(x).shape == (2, 6, 5)
    with pytest.raises(ValueError, match="no longer than the 5 entries"):
        small("s_mamba", scan="permuted((0, 1, 2, 3, 4, 5))")


def test_variates_of_timemachine_are_independent_or_not():
    x, other = torch.randn(2, 24, 5), torch.randn(2, 24, 5)
    other[:, :, 2] = x[:, :, 2]
    for independent in (True, False):
        model = small("timemachine", independent=independent)
        same = torch.allclose(model(x)[:, :, 2], model(other)[:, :, 2], atol=1e-5)
        assert same == independent


def test_marks_are_read_by_s_mamba_and_need_no_others():
    model, x = small("s_mamba"), torch.randn(2, 24, 5)
    assert model(x, torch.randn(2, 24, 4)).shape == (2, 6, 5)
    assert (model(x, torch.randn(2, 24, 4)) - model(x)).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"marks must be \(b, l, m\) of the windows \(2, 24, 5\), not"):
        model(x, torch.randn(2, 23, 4))


@pytest.mark.parametrize("scan", ["forward", "reversed", "bidirectional", "both_ways(random(k=1))"])
@pytest.mark.parametrize("options", [{"num_classes": 3}, {"pred_len": 0}, {"pred_len": 4, "use_norm": True}])
def test_padded_and_packed_batches_are_each_series_alone(scan, options, device):
    lengths = [7, 1, 12, 5]
    series = [torch.randn(size, 2, device=device) for size in lengths]
    model: Any = mamba_zoo.create_model("series_mamba", in_chans=2, dim=16, depth=2, scan=scan, **options)
    model = model.to(device).eval()
    alone = [model(one[None])[0] for one in series]
    padded = torch.full((4, 15, 2), 1e3, device=device)  # what is in the padding must not matter
    for row, one in zip(padded, series, strict=True):
        row[: len(one)] = one
    cuts = torch.tensor([0, *itertools.accumulate(lengths)], device=device)
    in_batch = model(padded, lengths=torch.tensor(lengths))
    in_pack = model(torch.cat(series)[None], cu_seqlens=cuts)
    for i, (want, size) in enumerate(zip(alone, lengths, strict=True)):
        packed = in_pack[0, cuts[i] : cuts[i + 1]] if options.get("pred_len") == 0 else in_pack[i]
        one = in_batch[i, :size] if options.get("pred_len") == 0 else in_batch[i]
        torch.testing.assert_close(one, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(packed, want, rtol=1e-4, atol=1e-5)
    if options.get("pred_len") == 0:
        assert not in_batch[0, 7:].any()


@pytest.mark.parametrize("scan", ["forward", "bidirectional"])
def test_gradients_of_padded_and_packed_batches_agree(scan):
    lengths = [4, 9, 6]
    x = torch.randn(3, 9, 2)
    model: Any = mamba_zoo.create_model("series_mamba", in_chans=2, dim=8, depth=2, num_classes=3, scan=scan)
    packed = torch.cat([row[:size] for row, size in zip(x, lengths, strict=True)])[None]
    cuts = torch.tensor([0, 4, 13, 19])
    weight = torch.randn(3, 3)
    want = torch.autograd.grad((model(x, lengths=lengths) * weight).sum(), list(model.parameters()))
    got = torch.autograd.grad((model(packed, cu_seqlens=cuts) * weight).sum(), list(model.parameters()))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_a_forward_scan_is_causal():
    model: Any = mamba_zoo.create_model("series_mamba", in_chans=2, dim=8, depth=2, scan="forward").eval()
    x = torch.randn(1, 20, 2)
    y = model(x)
    x[:, 11:] += 1
    torch.testing.assert_close(model(x)[:, :11], y[:, :11])
    assert (model(x)[:, 11:] - y[:, 11:]).abs().min() > 0


def test_wrong_lengths_are_refused():
    model: Any = mamba_zoo.create_model("series_mamba", dim=8, depth=1)
    for lengths in ([3], [3, 0], [3, 7]):
        with pytest.raises(ValueError, match="lengths must be 2 numbers from 1 to 6"):
            model(torch.randn(2, 6, 1), lengths=lengths)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 6"):
        model(torch.randn(1, 6, 1), cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="takes the place of lengths"):
        model(torch.randn(2, 6, 1), cu_seqlens=torch.tensor([0, 6]))


def test_mambats_visits_each_window_in_an_order_of_its_own_in_training():
    model, x = small("mambats", dropout=0.0), torch.randn(1, 24, 5).expand(64, -1, -1)
    assert model(x).std(0).max() < 1e-5  # one order in evaluation mode
    model.train()
    assert model(x).std(0).max() > 1e-4


def test_mambats_learns_which_variate_follows_which():
    """Windows in which 0 -> 1 -> 2 -> 3 -> 4 come in this order cost less; the order found is that one."""
    model = small("mambats").train()
    with torch.no_grad():
        for _ in range(60):
            model(torch.randn(32, 24, 5))
            follows = model._visited.diff(dim=1) == 1
            starts = model._visited[:, 0] == 0
            model.record(5.0 - follows.sum(1) - starts.float())
    assert model.count.sum() == 60 * 32 * 5
    assert model.eval().visit.tolist() == [0, 1, 2, 3, 4]
    assert "visit" in model.state_dict()
    again = small("mambats")
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 24, 5)
    torch.testing.assert_close(again(x), model(x))


def test_mambats_needs_the_losses_of_its_batch():
    model = small("mambats").train()
    with pytest.raises(RuntimeError, match="losses of the batch"):
        model.record(torch.ones(3))
    fixed = small("mambats", scan="forward").train()
    fixed.record(torch.ones(3))  # nothing to learn
    with pytest.raises(ValueError, match="scan='learned'"):
        fixed.set_order(range(5))
    with pytest.raises(ValueError, match="permutation of the 5 variates"):
        small("mambats").set_order([0, 1, 2, 3, 3])


def test_mambats_with_a_fixed_order_takes_a_learned_file(tmp_path):
    learned, x = small("mambats"), torch.randn(2, 24, 5)
    path = tmp_path / "published.pth"
    state = {f"encoder.layers.{key}": v for key, v in learned.blocks.state_dict().items()}
    names = {".ssm.A_log": ".A_log", ".ssm.D": ".D", ".ssm.dt_bias": ".dt_proj.bias", ".ssm.x_proj": ".x_proj.0"}
    published = {}
    for key, value in state.items():
        for ours, theirs in {**names, ".ssm.dt_proj": ".dt_proj"}.items():
            if ours in key:
                key, value = key.replace(ours, theirs), value[0]
        published[key] = value
    published |= {
        "value_embedding.1.weight": learned.embed.weight,
        "encoder.norm_f.weight": learned.norm.weight,
        "encoder.norm_f.bias": learned.norm.bias,
        "head.linear.weight": learned.head.weight,
        "head.linear.bias": learned.head.bias,
        "encoder.adjacency_matrix": torch.rand(5, 5),
        "encoder.count_matrix": torch.ones(5, 5),
        "encoder.ending_points": torch.zeros(5),
    }
    torch.save(published, path)
    fixed = small("mambats", scan="forward", checkpoint_path=path)
    torch.testing.assert_close(fixed(x), learned(x))
    loaded = small("mambats", checkpoint_path=path)
    want = cheapest_order(published["encoder.adjacency_matrix"], published["encoder.count_matrix"])
    assert loaded.visit.tolist() == want


def test_short_paths_are_short_and_repeatable():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 6, 7):
        cost = rng.random((n, n))
        path = short_path(cost, 0)
        assert sorted(path) == list(range(n))
        assert path[0] == 0
        assert path == short_path(cost, 0)

        def length(p, cost=cost):
            return sum(cost[a, b] for a, b in itertools.pairwise(p))

        best = min(length((0, *rest)) for rest in itertools.permutations(range(1, n)))
        assert length(path) <= 1.25 * best + 1e-9
    ring = np.abs(np.subtract.outer(np.arange(40), np.arange(40))).astype(float)
    assert short_path(ring, 0) == list(range(40))


def test_pairs_never_visited_cost_as_much_as_the_worst():
    cost, count = torch.zeros(3, 3), torch.ones(3, 3)
    count[0, 1] = 0  # unknown, and its sum of zero must not look cheap
    cost += torch.tensor([[0.0, 9.0, 2.0], [3.0, 1.0, 3.0], [3.0, 1.0, 1.0]])
    cost[0, 1] = 0
    assert cheapest_order(cost, count) == [0, 2, 1]


def test_families_are_registered_without_their_data():
    assert {model_entrypoint(name).__module__.rsplit(".", 1)[1] for name in NAMES} == {
        "linear_series", "mambats", "s_mamba", "series_mamba", "timemachine",
    }  # fmt: skip

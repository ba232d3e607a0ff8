"""Mamba-2 and Mamba-3: against their recurrences, as streams, and in the place of every family's selective scan."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models._registry import model_entrypoint
from torch import Tensor

import mamba_zoo
from mamba_zoo._counting import default_input
from mamba_zoo.backbones._mamba2 import DualSSM, Mamba2
from mamba_zoo.backbones._mamba3 import Mamba3, TrapezoidSSM
from mamba_zoo.backbones._ssm import SelectiveSSM
from mamba_zoo.backbones._trapezoid import trapezoid

from .test_any_scan import IMAGE, VIDEO
from .test_points import SMALL as POINTS
from .test_series import SMALL as SERIES

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **IMAGE,
    **VIDEO,
    **{row: POINTS[row] for row in ("pointmamba", "pointmamba_v1", "mamba3d", "pcm")},
    **{name: (name, {"in_chans": 5, "seq_len": 24, "pred_len": 6, **SERIES[name]})
       for name in ("s_mamba", "timemachine", "mambats", "series_mamba")},
    "localvmamba": (IMAGE["localvmamba"][0], {**IMAGE["localvmamba"][1], "scan": "window(2)"}),
    "aum": ("aum_mini", {"depth": 2}),
    "ssamba": ("ssamba_tiny", {"dim": 16, "depth": 2}),
    "semamba": ("semamba_mini", {"dim": 8, "depth": 1, "d_state": 3, "hop": 64}),
    "spmamba": ("spmamba_mini", {"dim": 4, "depth": 1, "d_state": 3, "heads": 2, "query_size": 129}),
    "graph_mamba": ("graph_mamba", {}),
    "gmn": ("gmn", {}),
    "sequence": ("mamba_sequence", {"dim": 16, "depth": 2}),
    "mamba": ("mamba", {"dim": 16}),
}  # fmt: skip


def example(row: str, model: Any) -> Any:
    """An input of two samples."""
    name, settings = FAMILIES[row]
    modality = mamba_zoo.model_card(name).modality
    if modality in ("image", "video"):
        return torch.randn(2, *model.input_shape(96, 64))
    if modality == "points":
        return torch.randn(2, 48, 3)
    if modality == "graph":
        from .test_graph import graphs, joined

        return joined(graphs())
    if modality == "series":
        return torch.randn(2, settings["seq_len"], settings["in_chans"])
    if row in ("semamba", "spmamba"):
        return torch.randn(2, 1000)
    if row in ("sequence", "mamba"):
        return torch.randn(2, 20, 1 if row == "sequence" else 16)
    return torch.cat([default_input(model), default_input(model)])  # type: ignore[list-item]


def test_every_family_with_a_selective_scan_is_here():
    own = {"mamba2", "mamba3", "language", "linear_series"}
    families = {model_entrypoint(name).__module__ for name in mamba_zoo.list_models()}
    known = {model_entrypoint(name).__module__ for name, _ in FAMILIES.values()}
    assert {name.rsplit(".", 1)[-1] for name in families - known} == own


@pytest.mark.parametrize("mixer", ["mamba2", "mamba3", "mamba3_mimo"])
@pytest.mark.parametrize("row", FAMILIES)
def test_trains_a_step_in_every_family(row, mixer):
    name, settings = FAMILIES[row]
    model: Any = mamba_zoo.create_model(name, **settings, mixer=mixer).train()
    layer = DualSSM if mixer == "mamba2" else TrapezoidSSM
    inside = [module for module in model.modules() if isinstance(module, layer)]
    assert inside
    assert not any(isinstance(module, SelectiveSSM) for module in model.modules())
    if row == "semamba":  # which begins as an identity
        for last in (model.mask_out, model.phase_real, model.phase_imag):
            torch.nn.init.normal_(last.weight)
    step = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = example(row, model)
    torch.manual_seed(0)
    before = loss(model(x))
    before.backward()
    parameters: list[Any] = [p for module in inside for p in module.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    assert sum(p.grad.any() for p in parameters) >= len(parameters) // 2
    step.step()
    torch.manual_seed(0)
    after = loss(model(x))
    assert after.isfinite()
    assert after != before


def loss(output: Any) -> Tensor:
    output = output[0] if isinstance(output, tuple) else output
    return (output * torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)).mean()


def test_errors_say_what_can_be_had():
    with pytest.raises(ValueError, match="mixer='lstm' is unknown; choose one of mamba, mamba2, mamba3, mamba3_mimo"):
        mamba_zoo.create_model("vim_mini", mixer="lstm")
    with pytest.raises(ValueError, match="mamba2 has no selective scan to exchange"):
        mamba_zoo.create_model("mamba2", mixer="mamba3")
    with pytest.raises(ValueError, match="head_dim=3 does not divide the inner width 32"):
        mamba_zoo.create_model("mamba2", dim=16, head_dim=3)


def test_a_rank_must_fit():
    with pytest.raises(ValueError, match="rank=0 must be 1 or more"):
        mamba_zoo.create_model("mamba3", rank=0)
    with pytest.raises(ValueError, match="even number of states, not d_state=7"):
        mamba_zoo.create_model("mamba3", rank=2, d_state=7)


def test_own_checkpoints_of_another_mixer_load(tmp_path):
    model: Any = mamba_zoo.create_model("vim_mini", mixer="mamba2", depth=1)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    again: Any = mamba_zoo.create_model("vim_mini", mixer="mamba2", depth=1, checkpoint_path=tmp_path / "own.pth")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.eval()(x), again.eval()(x))
    with pytest.raises(ValueError, match=r"own\.pth"):
        mamba_zoo.create_model("vim_mini", depth=1, checkpoint_path=tmp_path / "own.pth")


OPTIONS = {"groups": 2, "channel_skip": True, "norm_first": True, "bias": True}


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
def test_mamba2_is_its_recurrence(options):
    """Written out token by token in float64, groups and all."""
    layer: Any = Mamba2(8, d_state=3, head_dim=4, **options).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    inner, g, h, p, n = 16, options.get("groups", 1), 4, 4, 3
    z, u, B, C, dt = layer.in_proj(x).split([inner, inner, g * n, g * n, h], -1)
    mixed = torch.cat([u, B, C], -1)
    padded = F.pad(mixed.transpose(1, 2), (3, 0))
    mixed = F.silu(F.conv1d(padded, layer.conv.weight[0][:, None], layer.conv.bias[0], groups=mixed.shape[-1]))
    u, B, C = mixed.transpose(1, 2).split([inner, g * n, g * n], -1)
    u = u.unflatten(-1, (h, p))
    B, C = (t.unflatten(-1, (g, n)).repeat_interleave(h // g, 2) for t in (B, C))
    dt = F.softplus(dt + layer.dt_bias[0])
    state, outs = torch.zeros(2, h, p, n, dtype=torch.float64), []
    for t in range(9):
        decay = torch.exp(-layer.A_log[0].exp() * dt[:, t])
        state = decay[..., None, None] * state + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], u[:, t], B[:, t])
        outs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    y = torch.stack(outs, 1) + (layer.D[0] if layer.D.dim() == 3 else layer.D[0][:, None]) * u
    y = y.flatten(2) if options else y.flatten(2) * F.silu(z)
    y = y.unflatten(-1, (g, -1))
    y = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2) * layer.norm.weight
    y = layer.out_proj(y * F.silu(z) if options else y)
    torch.testing.assert_close(layer(x), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ["in order", "visited", "empty steps", "packed"])
def test_trapezoid_is_its_recurrence(case):
    b, l, k, h, p, n, r = 1 if case == "packed" else 2, 11, 2, 2, 3, 6, 2
    dd: Any = {"dtype": torch.float64}
    x, B, C = torch.randn(b, l, h, p, **dd), torch.randn(b, l, k, h, n, **dd), torch.randn(b, l, k, h, n, **dd)
    dt, rate, trap = torch.rand(b, l, k, h, **dd), -torch.rand(b, l, k, h, **dd), torch.rand(b, l, k, h, **dd)
    angle, D = torch.randn(b, l, k, r, **dd), torch.randn(k, h, **dd)
    order, cuts = torch.stack([torch.randperm(l) for _ in range(k)]), [0, l]
    if case == "in order":
        order = torch.arange(l).expand(k, l).clone()
    if case == "empty steps":
        order[:, 3], order = -1, order[:, :9]
    if case == "packed":
        cuts = [0, 4, 4, l]
    wanted = torch.zeros(b, l, k, h, p, **dd)
    for direction in range(k):
        for low, high in itertools.pairwise(cuts):
            state, old = torch.zeros(b, h, p, n, **dd), torch.zeros(b, h, p, n, **dd)
            turn = torch.zeros(b, h, r, **dd)
            for i in [i for i in order[direction].tolist() if i < high and (i < 0 or i >= low)]:
                if i < 0:  # a token of zeros, with a step of zero
                    old = torch.zeros_like(old)
                    continue
                at = (slice(None), i, direction)
                turn = turn + dt[at][..., None] * angle[at][:, None]
                key, query = turned(B[at], turn), turned(C[at], turn)
                decay = torch.exp(rate[at] * dt[at])[..., None, None]
                new = torch.einsum("bhp,bhn->bhpn", x[:, i], key)
                part = ((1 - trap[at]) * dt[at])[..., None, None]
                state = decay * (state + part * old) + (trap[at] * dt[at])[..., None, None] * new
                old = new
                wanted[at] = torch.einsum("bhpn,bhn->bhp", state, query) + D[direction][:, None] * x[:, i]
    y = trapezoid(
        x, dt, rate, trap, angle, B, C, D,
        order=None if case == "in order" else order, cu_seqlens=torch.tensor(cuts) if case == "packed" else None,
    )  # fmt: skip
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)


def turned(maps: Tensor, turn: Tensor) -> Tensor:
    """The first pairs of neighbours as complex numbers, multiplied by e^(i turn)."""
    r = turn.shape[-1]
    pairs = torch.view_as_complex(maps[..., : 2 * r].unflatten(-1, (r, 2)).contiguous())
    return torch.cat([torch.view_as_real(pairs * torch.exp(1j * turn)).flatten(-2), maps[..., 2 * r :]], -1)


@pytest.mark.parametrize("case", ["in order", "visited", "empty steps", "packed", "normed"])
def test_mamba3_with_several_inputs_is_its_recurrence(case):
    """The whole layer written out in float64: every head adds up its inputs in one state and reads it several times."""
    h, p, n, rank, r, l = 4, 4, 6, 3, 2, 9
    layer: Any = Mamba3(8, d_state=n, head_dim=p, groups=2, rope_fraction=0.7, out_norm=case == "normed", rank=rank)
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(1 if case == "packed" else 2, l, 8, dtype=torch.float64)
    order, cuts = torch.arange(l)[None] if case == "in order" else torch.randperm(l)[None], [0, l]
    if case == "empty steps":
        order[:, 3] = -1
    if case == "packed":
        cuts = [0, 4, l]
    sizes = [h * p, h * p, rank * 2 * n, rank * 2 * n, h, h, h, r]
    z, u, B, C, dt, rate, trap, angle = layer.in_proj(x).split(sizes, -1)
    maps = []
    for t, weight, bias in ((B, layer.maps.B_norm, layer.maps.B_bias), (C, layer.maps.C_norm, layer.maps.C_bias)):
        t = t.unflatten(-1, (rank, 2, n))
        t = t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        maps.append(t.repeat_interleave(h // 2, 3) + bias.transpose(0, 1))  # (b, l, rank, h, n)
    dt, trap = F.softplus(dt + layer.maps.dt_bias[0]), torch.sigmoid(trap)
    rate = -torch.where(rate >= 0, rate + 1, 1 / (1 - rate)).clamp(min=1e-4)
    inputs = torch.einsum("blhp,hsp->blshp", u.unflatten(-1, (h, p)), layer.mimo_x)
    gates = F.silu(torch.einsum("blhp,hsp->blshp", z.unflatten(-1, (h, p)), layer.mimo_z))
    wanted = torch.zeros(len(x), l, h * p, dtype=torch.float64)
    for low, high in itertools.pairwise(cuts):
        state, old = (torch.zeros(len(x), h, p, n, dtype=torch.float64) for _ in range(2))
        turn = torch.zeros(len(x), h, r, dtype=torch.float64)
        for i in [i for i in order[0].tolist() if i < high and (i < 0 or i >= low)]:
            if i < 0:
                old = torch.zeros_like(old)
                continue
            turn = turn + dt[:, i, :, None] * torch.pi * torch.tanh(angle[:, i])[:, None]
            key, query = (turned_by_halves(t[:, i], turn[:, None]) for t in maps)
            new = torch.einsum("bshp,bshn->bhpn", inputs[:, i], key)
            decay = torch.exp(rate[:, i] * dt[:, i])[..., None, None]
            part = ((1 - trap[:, i]) * dt[:, i])[..., None, None]
            state = decay * (state + part * old) + (trap[:, i] * dt[:, i])[..., None, None] * new
            old = new
            y = torch.einsum("bhpn,bshn->bshp", state, query) + layer.maps.D[0][:, None] * inputs[:, i]
            if case == "normed":
                y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.unflatten(0, (h, p))
            wanted[:, i] = torch.einsum("bshp,hsp->bhp", y * gates[:, i], layer.mimo_o).flatten(1)
    y = layer(
        x, order=None if case == "in order" else order, cu_seqlens=torch.tensor(cuts) if case == "packed" else None
    )
    torch.testing.assert_close(y, wanted @ layer.out_proj.weight.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gated", [False, True])
def test_several_inputs_in_the_place_of_a_scan(gated):
    """One of them is what "mamba3" is, and of several it makes no difference which is called the first."""
    u, z = torch.randn(2, 9, 8), torch.randn(2, 9, 8) if gated else None
    order = torch.stack([torch.randperm(9) for _ in range(2)])
    plain = TrapezoidSSM(8, 5, k=2, head_dim=4)
    one = TrapezoidSSM(8, 5, k=2, head_dim=4, rank=1)
    state = {name: value.view(one.state_dict()[name].shape) for name, value in plain.state_dict().items()}
    one.load_state_dict({**state, "mimo_x": torch.ones(2, 1, 4), "mimo_o": torch.ones(2, 1, 4)})
    torch.testing.assert_close(one(u, z, order, "sum"), plain(u, z, order, "sum"), rtol=1e-5, atol=1e-5)
    several = TrapezoidSSM(8, 6, k=2, head_dim=4, rank=3)
    with torch.no_grad():
        for parameter in several.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        wanted = several(u, z, order)
        maps = several.x_proj.weight[:, -2 * 3 * 6 :].unflatten(1, (2, 3, 6))
        several.x_proj.weight[:, -2 * 3 * 6 :] = maps.flip(2).flatten(1, 3)
        for weight in (several.mimo_x, several.mimo_o, several.maps.B_bias, several.maps.C_bias):
            weight.copy_(weight.flip(1))
        torch.testing.assert_close(several(u, z, order), wanted, rtol=1e-4, atol=1e-5)


def turned_by_halves(maps: Tensor, turn: Tensor) -> Tensor:
    """States i and i + n / 2 as complex numbers, the first of them multiplied by e^(i turn)."""
    first, second = maps.chunk(2, -1)
    pairs = torch.complex(first, second)
    r = turn.shape[-1]
    pairs = torch.cat([pairs[..., :r] * torch.exp(1j * turn), pairs[..., r:]], -1)
    return torch.cat([pairs.real, pairs.imag], -1)


STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("mamba2", {"dim": 16, "head_dim": 8, "d_state": 8}),
    "mamba3": ("mamba3", {"dim": 16, "head_dim": 8, "d_state": 8, "groups": 2}),
    "mamba3 normed": ("mamba3", {"dim": 16, "head_dim": 8, "d_state": 6, "rope_fraction": 1.0, "out_norm": True}),
    "mamba3 of rank 2": ("mamba3", {"dim": 16, "head_dim": 8, "d_state": 6, "rank": 2}),
    "sequence of mamba2": ("mamba_sequence", {"dim": 16, "depth": 2, "mixer": "mamba2"}),
    "sequence of mamba3": ("mamba_sequence", {"dim": 16, "depth": 2, "mixer": "mamba3"}),
    "sequence of mamba3 of rank 4": ("mamba_sequence", {"dim": 16, "depth": 2, "mixer": "mamba3_mimo"}),
    "mamba": ("mamba_130m", {"dim": 16, "depth": 2, "vocab_size": 30, "d_state": 8}),
    "language of mamba2": ("mamba2_130m", {"dim": 32, "depth": 2, "vocab_size": 30, "d_state": 8}),
    "language of mamba3": ("mamba_130m", {"dim": 32, "depth": 2, "vocab_size": 30, "d_state": 8, "mixer": "mamba3"}),
}


def memory_of(state: Any) -> int:
    """Numbers that a stream keeps."""
    return state.numel() if isinstance(state, Tensor) else sum(map(memory_of, state))


@pytest.mark.parametrize("row", STREAMS)
def test_streams_equal_the_whole(row):
    name, small = STREAMS[row]
    model: Any = mamba_zoo.create_model(name, **small).eval()
    width = {"mamba2": 16, "mamba3": 16}.get(name, 1)
    x = torch.randint(30, (2, 9)) if "130m" in name else torch.randn(2, 9, width)
    with torch.no_grad():
        whole = model(x)
        first, state = model.extend(x[:, :4], model.init_state(2))
        outs, kept = [first], memory_of(model.init_state(2))
        for t in range(4, 7):
            y, state = model.step(x[:, t], state)
            outs.append(y[:, None])
            assert memory_of(state) == kept
        outs.append(model.extend(x[:, 7:], state)[0])
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-4, atol=1e-5)


def test_a_mamba3_stream_is_exact_and_differentiates():
    """In float64, far beyond a whole turn of the angles, through the memory back to the first token."""
    layer = Mamba3(8, d_state=6, head_dim=4, rope_fraction=1.0).double()
    x = torch.randn(1, 40, 8, dtype=torch.float64, requires_grad=True)
    want = layer(x)
    state, outs = layer.init_state(1), []
    for part in x.split([1, 17, 22], dim=1):
        y, state = layer.extend(part, state)
        outs.append(y)
    got = torch.cat(outs, 1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    ours, wanted = (torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want))
    torch.testing.assert_close(ours, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "arguments", "params"),
    [
        ("mamba2_130m", {}, 128_989_632),
        ("mamba2", {"dim": 128, "head_dim": 32, "d_state": 64, **OPTIONS}, 136_088),
        ("mamba3", {"dim": 128, "head_dim": 32, "d_state": 64, "rank": 4}, 176_272),
    ],
)  # fmt: skip
def test_parameters_are_as_many_as_published(name, arguments, params):
    model = mamba_zoo.create_model(name, device="meta", **arguments)
    assert sum(p.numel() for p in model.parameters()) == params


def test_language_checkpoints(tmp_path):
    """Bare, or of the Hugging Face conversion; a second, different output map is an error."""
    small: dict[str, Any] = {"dim": 32, "depth": 1, "vocab_size": 30, "d_state": 8}
    model: Any = mamba_zoo.create_model("mamba_130m", **small).eval()
    state = model.state_dict()
    published = {
        "backbone.embeddings.weight": state["embedding.weight"],
        "backbone.norm_f.weight": state["norm.weight"],
    }
    for name, value in state.items():
        if name.startswith("blocks.0."):
            for ours, theirs in (("ssm.A_log", "A_log"), ("ssm.D", "D"), ("ssm.x_proj.weight", "x_proj.weight"),
                                 ("ssm.dt_proj.weight", "dt_proj.weight"), ("ssm.dt_bias", "dt_proj.bias"),
                                 ("conv.weight", "conv1d.weight"), ("conv.bias", "conv1d.bias")):  # fmt: skip
                if name.endswith(ours):
                    name, value = name.replace(ours, theirs), value[0]
                    value = value[:, None] if theirs == "conv1d.weight" else value
                    break
            published[name.replace("blocks.", "backbone.layers.")] = value
    words = torch.randint(30, (1, 7))
    torch.save(published, tmp_path / "pytorch_model.bin")
    again: Any = mamba_zoo.create_model("mamba_130m", checkpoint_path=tmp_path / "pytorch_model.bin", **small).eval()
    assert torch.equal(again(words), model(words))
    torch.save({**published, "lm_head.weight": torch.zeros(32, 32)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        mamba_zoo.create_model("mamba_130m", checkpoint_path=tmp_path / "pytorch_model.bin", **small)


@pytest.mark.parametrize("layer", [Mamba2, Mamba3])
def test_layers_take_directions(layer):
    """Forwards and backwards: an order reversed along with its tokens gives reversed outputs."""
    made = layer(16, d_state=8, head_dim=8, **({"k": 2} if layer is Mamba2 else {}))
    x = torch.randn(2, 10, 16)
    steps = torch.arange(10)
    order = torch.stack([steps, steps.flip(0)])
    y = made(x.flip(1), order.flip(-1)).flip(1)
    torch.testing.assert_close(made(x, order), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "mamba3"])
def test_reduced_precision_training_stays_finite(mixer):
    """Forty steps under bfloat16 autocast, and the loss falls; steps from very small to large among the tokens."""
    torch.manual_seed(0)
    model: Any = mamba_zoo.create_model("vim_mini", depth=1, dim=32, img_size=16, num_classes=4, mixer=mixer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    x, labels = 3 * torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    losses = []
    for _ in range(40):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = F.cross_entropy(model(x).float(), labels)
        optimizer.zero_grad()
        out.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(float(out.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("mixer", ["mamba2", "mamba3", "mamba3_mimo"])
def test_whole_models_in_bfloat16(mixer):
    """`model.bfloat16()` rounds decay rates and step biases once; the state and its path stay float32."""
    torch.manual_seed(0)
    model: Any = mamba_zoo.create_model("vim_mini", depth=2, dim=32, img_size=16, mixer=mixer).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        exact = model.forward_features(x)
        rounded = model.bfloat16().forward_features(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert float((rounded.float() - exact).norm() / exact.norm()) < 0.03

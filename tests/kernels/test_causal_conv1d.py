"""The ordered convolution against a loop over taps, steps and directions, on every backend."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mamba_zoo.kernels import BACKENDS, causal_conv1d, causal_conv1d_step, refusals

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def loop(x, weight, bias, order, activation, state, cuts=None):
    """The definition, one tap of one step of one direction at a time; returns outputs and final states."""
    (b, l), (k, d, w) = x.shape[:2], weight.shape
    cuts = [0, l] if cuts is None else cuts
    order = torch.arange(l).expand(k, l) if order is None else order
    order = order.expand(b, *order.shape[-2:])
    outputs, finals = {}, {}
    for i in range(b):
        for direction in range(k):
            tokens = x[i] if x.dim() == 3 else x[i, :, direction]
            for row, (low, high) in enumerate(itertools.pairwise(cuts)):
                r = max(i, row)
                history = [x.new_zeros(d)] * (w - 1) if state is None else list(state[r, direction].T)
                visits = [t for t in order[i, direction].tolist() if t < 0 or low <= t < high]
                for token in visits:
                    history = [*history, x.new_zeros(d) if token < 0 else tokens[token]]
                    y = torch.stack([weight[direction, :, j] * history[j - w] for j in range(w)]).sum(0)
                    y = y if bias is None else y + bias[direction]
                    if token >= 0:
                        outputs[i, token, direction] = F.silu(y) if activation == "silu" else y
                last = history[len(history) - (w - 1) :]
                finals[r, direction] = torch.stack(last, -1) if last else weight[direction, :, :0]
    zero = x.new_zeros(d)
    y = torch.stack([outputs.get((i, t, j), zero) for i in range(b) for t in range(l) for j in range(k)])
    rows = 1 + max(r for r, _ in finals)
    final = torch.stack([finals[r, j] for r in range(rows) for j in range(k)])
    return y.view(b, l, k, d), final.view(rows, k, d, w - 1)


def problem(b=2, l=9, k=2, d=5, w=4, shared=True, dtype=torch.float64, rows=None):
    """Random `x, weight, bias, state`, float64 leaves whose tokens are representable in `dtype`."""
    rows = b if rows is None else rows
    tensors = {
        "x": torch.randn(b, l, d) if shared else torch.randn(b, l, k, d),
        "weight": torch.randn(k, d, w),
        "bias": torch.randn(k, d),
        "state": torch.randn(rows, k, d, w - 1),
    }
    tensors["x"] = tensors["x"].to(dtype)
    return {name: t.double().requires_grad_() for name, t in tensors.items()}


def random_order(k, l, m, b=None):
    """Permutations cut to m steps, or followed by empty steps."""
    rows = [torch.cat([torch.randperm(l), torch.full((max(m - l, 0),), -1)])[:m] for _ in range(k * (b or 1))]
    rows = [row[torch.randperm(m)] for row in rows]
    return torch.stack(rows).view(k, m) if b is None else torch.stack(rows).view(b, k, m)


def backends(device, dtype):
    return [name for name, reason in refusals(device, dtype).items() if reason is None]


def reference(x, weight, bias, order, activation, state, cuts=None):
    """The same by the reference in float64, which agrees with the loop in the tests of short rows."""
    return causal_conv1d(
        x, weight, bias, order, activation, state, return_final_state=True, backend="reference",
        cu_seqlens=None if cuts is None else torch.tensor(cuts),
    )  # fmt: skip


def cut_out(x):
    """`x` as a slice of wider rows."""
    wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 24)
    wide[..., 8:-16] = x
    return wide[..., 8:-16]


def check(
    device, dtype, order, activation, cuts=None, use_bias=True, use_state=True, oracle=loop, strided=False, **sizes: Any
):
    """Values and all gradients of every backend that serves `device` and `dtype`."""
    left_out = [name for name, used in (("bias", use_bias), ("state", use_state)) if not used]
    given = {name: t for name, t in problem(dtype=dtype, **sizes).items() if name not in left_out and t.numel()}
    want = oracle(given["x"], given["weight"], given.get("bias"), order, activation, given.get("state"), cuts)
    dy = [torch.randn_like(t).to(dtype).double() for t in want]
    wanted = torch.autograd.grad(want, list(given.values()), dy)
    for backend in backends(device, dtype):
        cast = {
            name: t.detach().to(device, dtype if name == "x" else torch.promote_types(dtype, torch.float32))
            for name, t in given.items()
        }
        leaves = {name: t.requires_grad_() for name, t in cast.items()}
        tokens = cut_out(leaves["x"]) if strided else leaves["x"]
        got = causal_conv1d(
            tokens, leaves["weight"], leaves.get("bias"), None if order is None else order.to(device), activation,
            leaves.get("state"), return_final_state=True, backend=backend,
            cu_seqlens=None if cuts is None else torch.tensor(cuts, device=device),
        )  # fmt: skip
        assert got[0].dtype == dtype
        tolerance = TOLERANCE.get(dtype, 1e-12)
        for g, t in zip(got, want, strict=True):
            assert_close(g.double().cpu(), t, rtol=tolerance, atol=tolerance, msg=partial("{}: {}".format, backend))
        seeds = [g.to(device, t.dtype) for g, t in zip(dy, got, strict=True)]
        grads = torch.autograd.grad(got, list(leaves.values()), [cut_out(g) for g in seeds] if strided else seeds)
        for name, g, t in zip(leaves, grads, wanted, strict=True):
            scale = tolerance * max(1.0, float(t.abs().max()) if t.numel() else 1.0)
            message = partial("{}, gradient of {}: {}".format, backend, name)
            assert_close(g.double().cpu(), t, rtol=tolerance, atol=2 * scale, msg=message)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_dtypes(device, dtype, activation):
    check(device, dtype, random_order(2, 9, 9), activation)


@pytest.mark.parametrize("w", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("l", [1, 2, 3, 9, 33])
def test_taps_and_lengths(device, w, l):
    check(device, torch.float32, None, "silu", l=l, w=w, k=1, d=3)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_direction"])
@pytest.mark.parametrize("d", [1, 16, 37])
def test_layouts(device, shared, d):
    check(device, torch.float32, random_order(3, 9, 9), None, k=3, d=d, shared=shared)


@pytest.mark.parametrize("m", [4, 9, 13])
def test_skipped_tokens_and_empty_steps(device, m):
    check(device, torch.float32, random_order(2, 9, m), "silu")


def test_order_per_sample(device):
    check(device, torch.float32, random_order(2, 9, 11, b=2), "silu")


@pytest.mark.parametrize("use_state", [True, False])
@pytest.mark.parametrize("cuts", [[0, 4, 9], [0, 1, 1, 3, 9], [0, 9]], ids=str)
def test_packed_sequences_never_leak(device, cuts, use_state):
    order = random_order(2, 9, 9)
    check(device, torch.float32, order, "silu", cuts=cuts, use_state=use_state, b=1, rows=len(cuts) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("order", "options"),
    [
        (random_order(2, 150, 150), {"d": 72}),
        (random_order(4, 150, 150), {"d": 16, "k": 4, "use_state": False}),
        (random_order(2, 150, 110, b=3), {"d": 264, "b": 3, "activation": None}),
        (random_order(2, 150, 170), {"d": 20, "shared": False, "strided": True}),
        (random_order(2, 150, 150), {"d": 12, "b": 1, "rows": 6, "cuts": [0, 40, 40, 41, 43, 47, 150]}),
        (None, {"d": 40, "k": 1, "w": 2, "strided": True, "use_bias": False}),
        (None, {"d": 3, "k": 1, "w": 18}),
    ],
    ids=["words", "four directions", "blocks of channels", "strided", "packed", "two taps", "many taps"],
)
def test_long_rows_of_many_channels(device, dtype, order, options):
    """Rows of several runs of steps, and channels that are read several at a time."""
    check(device, dtype, order, oracle=reference, **{"activation": "silu", "l": 150, **options})


def test_without_bias_and_state(device):
    check(device, torch.float32, None, None, use_bias=False, use_state=False)


def test_strided_tokens(device):
    wide = torch.randn(2, 7, 24, device=device)
    weight = torch.randn(1, 12, 4, device=device)
    for x in (wide[..., 6:18], wide[..., ::2], wide[..., :12].transpose(0, 1).contiguous().transpose(0, 1)):
        for backend in backends(device, x.dtype):
            got = causal_conv1d(x, weight, backend=backend)
            assert_close(got, causal_conv1d(x.contiguous(), weight, backend="reference"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_streaming_continues_the_whole(activation):
    x, weight, bias, state = (t.detach() for t in problem(k=1).values())
    whole = causal_conv1d(x, weight, bias, None, activation, state)
    head, carried = causal_conv1d(x[:, :4], weight, bias, None, activation, state, return_final_state=True)
    assert_close(head, whole[:, :4])
    for t in range(4, x.shape[1]):
        y, carried = causal_conv1d_step(carried, x[:, t], weight, bias, activation)
        assert_close(y, whole[:, t])


def test_step_of_several_directions():
    x, weight, bias, state = (t.detach() for t in problem(l=1, k=3, shared=False).values())
    whole, final = causal_conv1d(x, weight, bias, None, "silu", state, return_final_state=True)
    y, after = causal_conv1d_step(state, x[:, 0], weight, bias, "silu")
    assert_close(y, whole[:, 0])
    assert_close(after, final)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": (3, 5, 1)}, r"state has shape \(2, 3, 5, 3\), expected \(2, 3, 5, 0\)"),
        ({"weight": (5, 4)}, r"weight must be \(k, d, w\)"),
        ({"state": (1, 3, 5, 3)}, r"state has shape \(1, 3, 5, 3\), expected \(2, 3, 5, 3\)"),
        ({"x": (1, 5)}, r"state has shape .* expected \(1, 3, 5, 3\)"),
        ({"x": (2, 1)}, r"x has shape \(2, 1\), expected \(b, 5\) or \(b, 3, 5\) to go with weight \(3, 5, 4\)"),
        ({"x": (2, 1, 5)}, "x has shape"),
        ({"x": (5,)}, "x has shape"),
        ({"bias": (5,)}, "bias has shape"),
    ],
    ids=str,
)
def test_a_step_refuses_what_would_be_broadcast(changes, message):
    step: Any = causal_conv1d_step
    shapes: Any = {"state": (2, 3, 5, 3), "x": (2, 5), "weight": (3, 5, 4), "bias": (3, 5)}
    y, state = step(**{name: torch.zeros(shape) for name, shape in shapes.items()})
    assert (y.shape, state.shape) == ((2, 3, 5), (2, 3, 5, 3))
    with pytest.raises(ValueError, match=message):
        step(**{name: torch.zeros(shape) for name, shape in (shapes | changes).items()})


def test_autocast_casts_only_the_tokens(device):
    x, weight, bias, _ = (t.detach().float().to(device) for t in problem().values())
    with torch.autocast(device.type, torch.bfloat16):
        y, state = causal_conv1d(x, weight, bias, return_final_state=True, backend="reference")
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_close(y, causal_conv1d(x.bfloat16(), weight, bias, backend="reference"))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck(activation):
    p = problem(l=5, d=2, w=3)
    order = random_order(2, 5, 6)
    packed = problem(b=1, l=5, d=2, w=3, rows=2)

    def plain(x, weight, bias, state):
        return causal_conv1d(x, weight, bias, order, activation, state, return_final_state=True)

    def cut(x, weight, bias, state):
        cuts = torch.tensor([0, 2, 5])
        return causal_conv1d(x, weight, bias, None, activation, state, return_final_state=True, cu_seqlens=cuts)

    assert torch.autograd.gradcheck(plain, tuple(p.values()))
    assert torch.autograd.gradcheck(cut, tuple(packed.values()))


def test_only_the_final_state_used():
    x, weight, bias, state = problem(k=1, w=3).values()
    _, final = causal_conv1d(x, weight, bias, None, "silu", state, return_final_state=True)
    gx, gw = torch.autograd.grad(final.sum(), (x, weight))
    assert_close(gx[:, -2:], torch.ones_like(gx[:, -2:]))
    assert not gx[:, :-2].any()
    assert not gw.any()


def test_registration(device):
    for backend in backends(device, torch.float32):
        p = {name: t.detach().float().to(device).requires_grad_() for name, t in problem().items()}
        order = random_order(2, 9, 9).to(device, torch.int32)[None]
        args = (p["x"], p["weight"], p["bias"], order, None, p["state"], True, False, True, backend)
        torch.library.opcheck(torch.ops.mamba_zoo.causal_conv1d.default, args)


def test_compiles_without_graph_breaks():
    p = {name: t.detach().requires_grad_() for name, t in problem().items()}
    order = random_order(2, 9, 9)

    def run(x, weight, bias, state):
        return causal_conv1d(x, weight, bias, order, "silu", state)

    want = run(*p.values())
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(*p.values())
    assert_close(got, want)
    dy = torch.randn_like(want)
    for g, w in zip(*(torch.autograd.grad(y, list(p.values()), dy) for y in (got, want)), strict=True):
        assert_close(g, w)


def test_meta_tensors_have_shapes():
    y, final = causal_conv1d(
        torch.empty(2, 9, 5, device="meta"), torch.empty(3, 5, 4, device="meta"), return_final_state=True
    )
    assert (y.shape, final.shape, y.device.type) == ((2, 9, 3, 5), (2, 3, 5, 3), "meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 4)}, r"weight must be \(k, d, w\)"),
        ({"x": torch.zeros(2, 9, 6)}, r"x has shape \(2, 9, 6\)"),
        ({"x": torch.zeros(2, 9, 3, 5)}, r"x has shape \(2, 9, 3, 5\)"),
        ({"bias": torch.zeros(5)}, r"bias has shape \(5,\)"),
        ({"activation": "gelu"}, "activation='gelu' is unknown"),
        ({"initial_state": torch.zeros(2, 2, 5, 4)}, "initial_state has shape"),
        ({"order": torch.zeros(2, 9, dtype=torch.int64)}, "visits token 0 twice"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "one packed sample"),
        ({"backend": "magic"}, "backend='magic' is unknown"),
    ],
)
def test_errors_name_the_argument(change, message):
    x, weight, bias, state = (t.detach().float() for t in problem().values())
    given = {"x": x, "weight": weight, "bias": bias, "initial_state": state} | change
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**given)


def test_every_backend_is_known():
    assert set(refusals("cpu")) == set(BACKENDS)

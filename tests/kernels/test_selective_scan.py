"""Every implementation of the selective scan against float64: value, final state and every gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck

from mamba_zoo.kernels import selective_scan, selective_scan_step, use
from mamba_zoo.kernels._order import prepare_order

from .problems import assert_agrees, backend_params, make_problem, random_order, relative_error, solve

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=backend_params())
def backend(request) -> tuple[str, str]:
    """A backend and a device that it serves."""
    return request.param


@pytest.fixture
def check(backend):
    """`check(**problem)`: build the problem on the backend's device and compare."""
    name, device = backend
    return lambda **problem: assert_agrees(make_problem(device=device, **problem), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("l", [1, 2, 3, 63, 64, 65, 197, 500])
def test_lengths(check, l, dtype):
    check(l=l, d=7, n=16 if l < 100 else 3, k=1 if l > 400 else 2, dtype=dtype)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 16, 17, 32, 64, 100, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_sizes(check, n, dtype):
    check(n=n, l=70, b=1, d=9, dtype=dtype)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("reduce", [None, "sum", "mean"])
def test_directions_and_reductions(check, k, n, reduce):
    check(k=k, n=n, l=21, reduce=reduce)


@pytest.mark.parametrize("d", [1, 2, 31, 32, 33, 96, 130])
def test_channels(check, d):
    check(d=d, n=16, l=19)
    check(d=d, n=1, l=19)


@pytest.mark.parametrize(
    "options",
    [
        {"z": None},
        {"z": "per direction"},
        {"bias": False},
        {"skip": False},
        {"softplus": False},
        {"u_per_direction": True},
        {"u_per_direction": True, "reduce": "mean"},
        {"z": "per direction", "reduce": "sum"},
        {"state": True},
        {"state": True, "order": None, "reduce": "sum"},
        {"strided": True},
        {"strided": True, "u_per_direction": True, "z": "per direction", "dtype": torch.bfloat16},
        {"z": None, "bias": False, "skip": False, "softplus": False, "order": None},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)
@pytest.mark.parametrize("n", [1, 16])
def test_options(check, options, n):
    check(n=n, l=67, **options)


@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("reduce", [None, "sum"])
@pytest.mark.parametrize("kind", ["partial", "empty", "per sample", "per sample partial", "longer", "int32"])
def test_orders(check, kind, reduce, n):
    l, k, b = 40, 3, 2
    order = {
        "partial": lambda: random_order(k, l, m=17),
        "empty": lambda: random_order(k, l, m=25, empty=9),
        "per sample": lambda: random_order(k, l, b=b),
        "per sample partial": lambda: random_order(k, l, m=13, b=b, empty=2),
        "longer": lambda: torch.cat([random_order(k, l), torch.full((k, 30), -1)], 1)[:, torch.randperm(l + 30)],
        "int32": lambda: random_order(k, l).int(),
    }[kind]()
    check(b=b, l=l, k=k, n=n, order=order, reduce=reduce, state=True)


@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("sequences", [(1,), (5, 1, 64, 30), (0, 7, 0, 65, 0), (100, 3)], ids=str)
def test_packed_batches(check, sequences, n):
    check(b=1, k=2, n=n, sequences=sequences, state=True)
    check(b=1, k=2, n=n, sequences=sequences, order=random_order(2, sum(sequences), m=(sum(sequences) + 1) // 2))


def test_packed_sequences_equal_each_alone(backend):
    """In both directions: a reversed table reverses each sequence, and nothing leaks from one to the next."""
    name, device = backend
    sequences = (5, 1, 20)
    l = sum(sequences)
    order = torch.stack([torch.arange(l), torch.arange(l).flip(0)])
    packed = make_problem(b=1, k=2, sequences=sequences, order=order, device=device)
    y = selective_scan(**packed, backend=name)
    for first, last in itertools.pairwise(packed["cu_seqlens"].tolist()):
        alone: dict[str, Any] = {key: packed[key][:, first:last] for key in ("u", "dt", "B", "C", "z")}
        steps = torch.arange(last - first, device=device)
        alone |= {key: packed[key] for key in ("A", "D", "dt_bias", "dt_softplus")}
        one = selective_scan(**alone, order=torch.stack([steps, steps.flip(0)]), backend=name)
        assert relative_error(y[:, first:last], one) < 1e-6


def test_out_dtype(check):
    """Sums of half-precision tokens may be returned in float32."""
    for dtype in (torch.float16, torch.bfloat16):
        check(dtype=dtype, out_dtype=torch.float32, reduce="sum", k=4, n=1)


@pytest.mark.parametrize("softplus", [True, False])
def test_small_and_large_steps(backend, softplus):
    """Step sizes from e^-30 to 60 keep their relative accuracy: log(1 + e^x) computed naively loses it."""
    name, device = backend
    problem = make_problem(l=64, d=8, n=1, k=1, b=1, z=None, skip=False, bias=False, device=device, softplus=softplus)
    low, high = (-30.0, 60.0) if softplus else (1e-9, 60.0)
    problem["dt"] = (
        torch.linspace(low, high, 64 * 8, device=device).view(1, 64, 1, 8)[:, torch.randperm(64)].contiguous()
    )
    for t in range(64):  # each token alone, so that a large step does not hide a small one
        part: dict[str, Any] = {key: problem[key][:, t : t + 1] for key in ("u", "dt", "B", "C")} | {"A": problem["A"]}
        part["dt_softplus"] = softplus
        ours = selective_scan(**part, backend=name)
        exact = selective_scan(
            **{k: v.double() if k != "dt_softplus" else v for k, v in part.items()}, backend="reference"
        )
        torch.testing.assert_close(ours.double(), exact, rtol=3e-6, atol=0)


def test_step_continues_a_scan(backend):
    """Streaming token by token from the final state equals one long scan."""
    name, device = backend
    problem = make_problem(l=12, k=1, order=None, device=device)
    whole = selective_scan(**problem, backend=name)
    tokens = ("u", "dt", "B", "C", "z")
    head = {key: value[:, :8] if key in tokens else value for key, value in problem.items()}
    _, state = selective_scan(**head, return_final_state=True, backend=name)
    fixed = {key: problem[key] for key in ("A", "D", "dt_bias", "dt_softplus")}
    for t in range(8, 12):
        y, state = selective_scan_step(state, **{key: problem[key][:, t] for key in tokens}, **fixed)
        assert relative_error(y, whole[:, t]) < 2e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": (1, 2, 3, 4)}, r"state has shape \(1, 2, 3, 4\), expected \(2, 2, 3, 4\)"),
        (
            {"u": (2, 1)},
            r"u has shape \(2, 1\), expected \(2, 3\) or \(2, 2, 3\) to go with dt .* \(b, k, d\)",
        ),
        ({"dt": (1, 1, 3)}, r"u has shape \(2, 3\), expected \(1, 3\)"),
        ({"dt": (2, 6, 2, 3)}, r"dt must be \(b, k, d\)"),
        ({"A": (3, 4)}, r"and A \(k, d, n\), not \(2, 2, 3\) and \(3, 4\)"),
        ({"A": (2, 1, 4)}, r"A has shape \(2, 1, 4\), expected \(2, 3, 4\)"),
        ({"B": (2, 4)}, r"B has shape \(2, 4\), expected \(2, 2, 4\)"),
        ({"C": (2, 2, 1)}, "C has shape"),
        ({"D": (3,)}, "D has shape"),
        ({"z": (1, 3)}, "z has shape"),
        ({"dt_bias": (3,)}, "dt_bias has shape"),
    ],
    ids=str,
)
def test_a_step_refuses_what_would_be_broadcast(changes, message):
    step: Any = selective_scan_step
    shapes: Any = {"state": (2, 2, 3, 4), "u": (2, 3), "dt": (2, 2, 3), "A": (2, 3, 4), "B": (2, 2, 4), "C": (2, 2, 4)}
    shapes |= {"D": (2, 3), "z": (2, 3), "dt_bias": (2, 3)}
    y, state = step(**{name: torch.zeros(shape) for name, shape in shapes.items()})
    assert (y.shape, state.shape) == ((2, 2, 3), (2, 2, 3, 4))
    with pytest.raises(ValueError, match=message):
        step(**{name: torch.zeros(shape) for name, shape in (shapes | changes).items()})


def test_chunks_with_state_equal_the_whole(backend):
    """Two halves joined by their state give the outputs and the gradients of one scan."""
    name, device = backend
    problem = make_problem(l=50, k=1, order=None, device=device)
    tokens = ("u", "dt", "B", "C", "z")
    leaves: dict[str, Any] = {
        key: v.clone().requires_grad_() if torch.is_tensor(v) else v for key, v in problem.items()
    }
    whole = selective_scan(**leaves, backend=name)
    first, state = selective_scan(
        **{key: v[:, :23] if key in tokens else v for key, v in leaves.items()}, return_final_state=True, backend=name
    )
    second = selective_scan(
        **{key: v[:, 23:] if key in tokens else v for key, v in leaves.items()}, initial_state=state, backend=name
    )
    halves = torch.cat([first, second], 1)
    assert relative_error(halves, whole) < 2e-6
    dy, inputs = torch.randn_like(whole), [v for v in leaves.values() if torch.is_tensor(v)]
    for a, b in zip(torch.autograd.grad(halves, inputs, dy), torch.autograd.grad(whole, inputs, dy), strict=True):
        assert relative_error(a, b) < 1e-5


def test_same_result_twice(backend):
    """Under deterministic algorithms, gradients are equal to the last bit."""
    name, device = backend
    problem = make_problem(l=197, d=70, n=16, device=device, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        first, seeds = solve(problem, backend=name)
        second, _ = solve(problem, seeds, backend=name)
    finally:
        torch.use_deterministic_algorithms(False)
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_autocast(backend):
    """Tokens are cast, the state's parameters are not, and gradients return in each input's own dtype."""
    name, device = backend
    problem = make_problem(l=40, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        found, seeds = solve(problem, backend=name)
    assert found["y"].dtype == torch.bfloat16
    assert found["gradient of u"].dtype == torch.float32
    rounded = {k: v.bfloat16() if k in ("u", "dt", "B", "C", "z") else v for k, v in problem.items()}
    again, _ = solve(rounded, seeds, backend=name)
    assert torch.equal(found["y"], again["y"])
    assert torch.equal(found["gradient of A"], again["gradient of A"]) or (
        relative_error(found["gradient of A"], again["gradient of A"]) < 1e-6
    )


def test_opcheck(backend):
    name, device = backend
    p = make_problem(l=9, device=device)
    table, complete = prepare_order(p["order"], 2, 9, 2, torch.device(device))
    leaves = [p[key].requires_grad_() for key in ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    state = torch.randn(2, 2, 5, 4, device=device, requires_grad=True)
    args = (*leaves, table, None, state, True, "sum", complete, True, True, torch.float32, name)
    torch.library.opcheck(torch.ops.mamba_zoo.selective_scan.default, args)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own import
def test_compiles_without_graph_breaks(backend):
    name, device = backend
    problem = make_problem(l=20, device=device, reduce="sum")
    dy = torch.randn(2, 20, 5, device=device)
    with use(name):
        eager, _ = solve(problem, [dy])
        torch._dynamo.reset()
        compiled = torch.compile(lambda kw: selective_scan(**kw), fullgraph=True, backend="aot_eager")
        u = problem["u"].clone().requires_grad_()
        y = compiled({**problem, "u": u})
        assert relative_error(y, eager["y"]) < 1e-6
        assert relative_error(torch.autograd.grad(y, u, dy)[0], eager["gradient of u"]) < 1e-6


def test_exports(backend):
    name, device = backend

    class Model(torch.nn.Module):
        def forward(self, u, dt, A, B, C):
            return selective_scan(u, dt, A, B, C, order=torch.arange(8, device=u.device).expand(2, 8), backend=name)

    p = make_problem(l=8, device=device)
    args = tuple(p[key] for key in ("u", "dt", "A", "B", "C"))
    exported = torch.export.export(Model(), args)
    assert torch.equal(exported.module()(*args), Model()(*args))


@pytest.mark.parametrize("case", ["plain", "partial", "packed"])
def test_reference_gradient_is_the_derivative(case):
    """The oracle itself, against finite differences."""
    extra = {
        "plain": {"l": 5},
        "partial": {"l": 6, "order": random_order(2, 6, m=5, empty=1)},
        "packed": {"sequences": (2, 0, 4), "b": 1},
    }[case]
    problem = make_problem(d=2, n=3, dtype=torch.float64, state=True, **extra)  # type: ignore[arg-type]
    names = [key for key, v in problem.items() if torch.is_tensor(v) and v.is_floating_point()]
    rest = {key: v for key, v in problem.items() if key not in names}

    def run(*values):
        return selective_scan(**dict(zip(names, values, strict=True)), **rest)

    assert gradcheck(run, tuple(problem[key].requires_grad_() for key in names))


def bad(**changes):
    problem = make_problem(b=2, l=6, k=2, d=3, n=4)
    problem["order"] = torch.arange(6).expand(2, 6).clone()
    problem |= changes
    return problem


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"u": torch.zeros(2, 5, 3)}, ValueError, r"u has shape \(2, 5, 3\), expected \(2, 6, 3\) or \(2, 6, 2, 3\)"),
        ({"A": torch.zeros(3, 3, 4)}, ValueError, "A has shape"),
        ({"B": torch.zeros(2, 6, 4)}, ValueError, "B has shape"),
        ({"D": torch.zeros(3)}, ValueError, "D has shape"),
        ({"z": torch.zeros(2, 6, 9)}, ValueError, "z has shape"),
        ({"dt_bias": torch.zeros(2, 9)}, ValueError, "dt_bias has shape"),
        ({"dt": torch.zeros(2, 6, 3)}, ValueError, "dt must be"),
        ({"u": torch.zeros(2, 6, 3, dtype=torch.float16)}, TypeError, "must share a dtype"),
        ({"order": torch.arange(6).expand(3, 6)}, ValueError, "2 directions"),
        ({"order": torch.arange(6).expand(5, 2, 6)}, ValueError, "2 samples"),
        ({"order": torch.arange(1, 7).expand(2, 6)}, ValueError, "order holds 6, but token indices run from 0 to 5"),
        ({"order": torch.full((2, 6), -2)}, ValueError, "order holds -2"),
        ({"order": torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 3, 3, 4, 5]])}, ValueError, "token 3 twice in direction 1"),
        ({"order": torch.zeros(2, 6)}, TypeError, "must be an int32 or int64 tensor"),
        ({"order": [[0, 1]]}, TypeError, "not list"),
        ({"reduce": "max"}, ValueError, "reduce='max'"),
        ({"backend": "fast"}, ValueError, "backend='fast' is unknown"),
        ({"initial_state": torch.zeros(2, 2, 3, 5)}, ValueError, "initial_state has shape"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "b=1"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_bad_input_names_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        selective_scan(**bad(**changes))


@pytest.mark.parametrize("cuts", [[0, 3], [1, 6], [0, 4, 2, 6]], ids=str)
def test_bad_cu_seqlens(cuts):
    problem = make_problem(b=1, l=6, order=None)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to l=6"):
        selective_scan(**problem, cu_seqlens=torch.tensor(cuts))


def test_an_order_changed_in_place_is_checked_again():
    problem = bad()
    selective_scan(**problem)
    problem["order"][0, 0] = 5
    with pytest.raises(ValueError, match="token 5 twice in direction 0"):
        selective_scan(**problem)

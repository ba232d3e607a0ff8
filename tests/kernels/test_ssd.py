"""Every implementation of the state-space dual against float64: value, final state and every gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from mamba_zoo.kernels import refusals, selective_scan, ssd, ssd_step, use
from mamba_zoo.kernels._order import prepare_order

from .problems import INTERPRETED, random_order, relative_error

# Relative error ‖ours - exact‖ / ‖exact‖ by the tokens' dtype, of outputs and states, and of gradients. Tensor cores
# multiply what is rounded to that dtype, in up to three products, one after another, on the way to an output.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# The interpreter cuts bfloat16 off instead of rounding it: twice the error, all of one sign.
INTERPRETED_TOLERANCE = 2e-2
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def backend_params() -> list[Any]:
    """`(backend, device)` pairs; those this machine cannot run are skipped with their reason."""
    pairs = [("triton", "cpu")] if INTERPRETED else [("reference", "cpu"), ("cpu", "cpu"), ("triton", "cuda")]
    params = []
    for backend, device in pairs:
        marks = []
        if device == "cuda":
            marks.append(pytest.mark.gpu)
            if not torch.cuda.is_available():
                marks.append(pytest.mark.skip(reason="this machine has no CUDA device"))
            elif reason := refusals(device, op="ssd")[backend]:
                marks.append(pytest.mark.skip(reason=reason))
        params.append(pytest.param((backend, device), marks=marks, id=f"{backend}-{device}"))
    return params


def make_problem(
    b: int = 2,
    l: int = 33,
    k: int = 2,
    h: int = 4,
    p: int = 6,
    g: int = 2,
    n: int = 5,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    order: Tensor | str | None = "random",
    x_per_direction: bool = False,
    z: str | None = None,
    bias: bool = True,
    skip: str | None = "head",
    softplus: bool = True,
    decay: bool = False,
    steps: torch.dtype | None = None,
    state: bool = False,
    sequences: tuple[int, ...] = (),
    strided: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Keyword arguments of `ssd`, random and alive: decays neither vanish nor saturate."""
    l = sum(sequences) or l

    def tokens(*shape: int, scale: float = 1.0) -> Tensor:
        if not strided:
            return (scale * torch.randn(shape)).to(device, dtype)
        wide = (scale * torch.randn(*shape[:-1], 2 * shape[-1] + 1)).to(device, dtype)
        return wide[..., shape[-1] :][..., : shape[-1]]

    def exact(x: Tensor) -> Tensor:
        return x.to(device, torch.float64 if dtype == torch.float64 else torch.float32)

    problem: dict[str, Any] = {
        "x": tokens(b, l, k, h, p) if x_per_direction else tokens(b, l, h, p),
        "dt": tokens(b, l, k, h, scale=0.5).to(steps or dtype),
        "A": None if decay else exact(-torch.rand(k, h) - 0.1),
        "B": tokens(b, l, k, g, n),
        "C": tokens(b, l, k, g, n),
        "dt_softplus": softplus,
        **options,
    }
    if not softplus:
        problem["dt"] = (0.05 + 0.4 * torch.rand(b, l, k, h)).to(problem["dt"])
    if bias:
        problem["dt_bias"] = exact(torch.randn(k, h).abs() + 1) * (-1 if softplus else 0.1)
    if skip:
        problem["D"] = exact(torch.randn(k, h) if skip == "head" else torch.randn(k, h, p))
    if decay:
        problem["decay"] = (-0.3 * torch.rand(b, l, k, h)).to(problem["dt"])
    if z:
        problem["z"] = tokens(b, l, h, p) if z == "shared" else tokens(b, l, k, h, p)
    if isinstance(order, Tensor):
        problem["order"] = order.to(device)
    elif order == "random":
        problem["order"] = random_order(k, l).to(device)
    rows = b
    if sequences:
        problem["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(sequences)], device=device)
        rows = len(sequences)
    if state:
        problem["initial_state"] = exact(torch.randn(rows, k, h, p, n))
        problem["return_final_state"] = True
    return problem


def solve(problem: dict[str, Any], seeds: list[Tensor] | None = None, **changes: Any) -> tuple[dict, list[Tensor]]:
    """Outputs and the gradient of every float input, by name, for random output gradients `seeds`."""
    leaves = {
        key: value.detach().clone().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in problem.items()
    }
    result = ssd(**{**leaves, **changes})
    outputs = list(result) if isinstance(result, tuple) else [result]
    if seeds is None:
        seeds = [torch.randn(o.shape).to(o) for o in outputs]
    inputs = {key: value for key, value in leaves.items() if isinstance(value, Tensor) and value.requires_grad}
    grads = torch.autograd.grad(outputs, list(inputs.values()), [s.to(o) for s, o in zip(seeds, outputs, strict=True)])
    found = dict(zip(("y", "final_state"), outputs, strict=False))
    return found | {f"gradient of {key}": grad for key, grad in zip(inputs, grads, strict=True)}, seeds


def exact_answer(problem: dict[str, Any], seeds: list[Tensor]) -> dict[str, Tensor]:
    """The same in float64 on the CPU by the reference, whose gradient is checked numerically on its own."""
    as64 = {
        key: (value.double() if value.is_floating_point() else value).cpu() if isinstance(value, Tensor) else value
        for key, value in problem.items()
        if key != "out_dtype"
    }
    return solve(as64, [seed.double().cpu() for seed in seeds], backend="reference")[0]


def assert_agrees(problem: dict[str, Any], backend: str) -> None:
    """`backend` agrees with float64 on every output and every gradient, within the tolerance of the tokens' dtype."""
    found, seeds = solve(problem, backend=backend)
    wanted = exact_answer(problem, seeds)
    dtype = problem["x"].dtype
    wrong = {}
    for name, ours in found.items():
        limit = (GRADIENT_TOLERANCE if name.startswith("gradient") else TOLERANCE)[dtype]
        limit = INTERPRETED_TOLERANCE if INTERPRETED and dtype == torch.bfloat16 else limit
        if not (error := relative_error(ours, wanted[name])) <= limit:
            wrong[name] = f"{error:.2e} > {limit:.0e}"
    assert not wrong, wrong


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
    check(l=l, k=1 if l > 400 else 2, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("p", "n"), [(1, 1), (16, 16), (64, 64), (64, 128), (100, 30), (128, 16), (32, 256)])
def test_sizes_of_heads_and_states(check, p, n, dtype):
    check(p=p, n=n, l=70, b=1, k=1, h=2, g=1, dtype=dtype)


@pytest.mark.parametrize(("h", "g"), [(1, 1), (3, 1), (4, 4), (12, 3), (24, 1)])
def test_groups(check, h, g):
    check(h=h, g=g, l=40, b=1)


@pytest.mark.parametrize("l", [30, 300])
def test_no_samples(backend, l):
    """In one segment of chunks, and in what would be several."""
    name, device = backend
    problem = make_problem(b=0, l=l, k=1, h=4, p=16, n=16, device=device)
    found, _ = solve(problem, backend=name)
    assert found["y"].shape == (0, l, 1, 4, 16)
    assert not found["gradient of A"].any()


@pytest.mark.parametrize("reduce", [None, "sum", "mean"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_directions_and_reductions(check, k, reduce):
    check(k=k, l=21, reduce=reduce)


@pytest.mark.parametrize(
    "options",
    [
        {"z": "shared"},
        {"z": "per direction", "reduce": "sum"},
        {"bias": False},
        {"skip": None},
        {"skip": "channel"},
        {"softplus": False},
        {"decay": True},
        {"decay": True, "softplus": False, "bias": False, "steps": torch.float32, "dtype": torch.bfloat16},
        {"x_per_direction": True},
        {"x_per_direction": True, "reduce": "mean"},
        {"state": True},
        {"state": True, "order": None, "reduce": "sum"},
        {"state": True, "l": 150, "k": 1, "chunk_size": 16},
        {"chunk_size": 32, "l": 100},
        {"strided": True},
        {"strided": True, "x_per_direction": True, "dtype": torch.bfloat16},
        {"dtype": torch.float16, "out_dtype": torch.float32, "reduce": "sum"},
        {"bias": False, "skip": None, "softplus": False, "order": None},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)
def test_options(check, options):
    check(**{"l": 67, **options})


@pytest.mark.parametrize("kind", ["partial", "empty", "per sample", "per sample partial", "longer", "int32"])
def test_orders(check, kind):
    l, k, b = 70, 3, 2
    order = {
        "partial": lambda: random_order(k, l, m=17),
        "empty": lambda: random_order(k, l, m=45, empty=9),
        "per sample": lambda: random_order(k, l, b=b),
        "per sample partial": lambda: random_order(k, l, m=13, b=b, empty=2),
        "longer": lambda: torch.cat([random_order(k, l), torch.full((k, 30), -1)], 1)[:, torch.randperm(l + 30)],
        "int32": lambda: random_order(k, l).int(),
    }[kind]()
    check(b=b, l=l, k=k, order=order, state=True)
    check(b=b, l=l, k=k, order=order, decay=True)


@pytest.mark.parametrize("sequences", [(1,), (5, 1, 64, 30), (0, 7, 0, 165, 0), (100, 3)], ids=str)
def test_packed_batches(check, sequences):
    check(b=1, k=2, sequences=sequences, state=True)
    check(b=1, k=2, g=1, sequences=sequences, state=True, skip="channel", x_per_direction=True)
    check(b=1, k=2, sequences=sequences, order=random_order(2, sum(sequences), m=(sum(sequences) + 1) // 2))


def test_many_samples(check):
    """More samples and heads than one turn or launch of programs takes."""
    check(b=9, l=130, k=2, h=6, g=1, p=16, n=16)


def test_a_long_sequence(check):
    """Long enough to be cut into segments that run side by side."""
    check(b=1, l=1500, k=1, h=2, g=1, p=16, n=16, state=True)


def test_equals_the_selective_scan(backend):
    """With one decay per head, given to every channel of it, the selective scan computes the same."""
    name, device = backend
    p = make_problem(b=1, l=50, h=3, p=4, g=1, device=device)
    y = ssd(**p, backend=name).flatten(3)
    scan = {key: p[key].repeat_interleave(4, -1) for key in ("dt", "D", "dt_bias")}
    A = p["A"].repeat_interleave(4, -1)[..., None].expand(-1, -1, 5)
    wanted = selective_scan(
        p["x"].flatten(2), A=A, B=p["B"][:, :, :, 0], C=p["C"][:, :, :, 0], order=p["order"], dt_softplus=True, **scan
    )
    assert relative_error(y, wanted) < 1e-5


def test_packed_sequences_equal_each_alone(backend):
    """In both directions: a reversed table reverses each sequence, and nothing leaks from one to the next."""
    name, device = backend
    sequences = (5, 1, 80)
    l = sum(sequences)
    order = torch.stack([torch.arange(l), torch.arange(l).flip(0)])
    packed = make_problem(b=1, k=2, sequences=sequences, order=order, device=device)
    y = ssd(**packed, backend=name)
    for first, last in itertools.pairwise(packed["cu_seqlens"].tolist()):
        alone: dict[str, Any] = {key: packed[key][:, first:last] for key in ("x", "dt", "B", "C")}
        steps = torch.arange(last - first, device=device)
        alone |= {key: packed[key] for key in ("A", "D", "dt_bias", "dt_softplus")}
        one = ssd(**alone, order=torch.stack([steps, steps.flip(0)]), backend=name)
        assert relative_error(y[:, first:last], one) < 1e-5


@pytest.mark.parametrize("decay", [False, True])
def test_step_continues_a_scan(backend, decay):
    """Streaming token by token from the final state equals one long scan."""
    name, device = backend
    problem = make_problem(l=12, k=1, order=None, device=device, decay=decay, z="shared")
    whole = ssd(**problem, backend=name)
    tokens = ("x", "dt", "B", "C", "z", "decay")
    head = {key: value[:, :8] if key in tokens else value for key, value in problem.items()}
    _, state = ssd(**head, return_final_state=True, backend=name)
    fixed = {key: problem[key] for key in ("A", "D", "dt_bias", "dt_softplus")}
    for t in range(8, 12):
        y, state = ssd_step(state, **{key: problem[key][:, t] for key in tokens if key in problem}, **fixed)
        assert relative_error(y, whole[:, t]) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": (1, 2, 4, 6, 5)}, r"state has shape \(1, 2, 4, 6, 5\), expected \(2, 2, 4, 6, 5\)"),
        (
            {"x": (1, 4, 6)},
            r"x has shape \(1, 4, 6\), expected \(2, 4, 6\) or \(2, 2, 4, 6\) to go with dt",
        ),
        ({"x": (2, 4, 1), "z": None}, r"state has shape .* expected \(2, 2, 4, 1, 5\)"),
        ({"x": (4, 6)}, r"x \(b, h, p\) or \(b, k, h, p\)"),
        ({"dt": (2, 4)}, r"dt must be \(b, k, h\)"),
        ({"A": (4,)}, "A has shape"),
        ({"A": None}, "either A"),
        ({"decay": (2, 2, 4)}, "either A"),
        ({"B": (2, 2, 3, 5)}, "3 groups, which do not divide the 4 heads"),
        ({"C": (2, 2, 1, 5)}, "C has shape"),
        ({"D": (4,)}, "D has shape"),
        ({"z": (1, 4, 6)}, "z has shape"),
        ({"dt_bias": (2, 1)}, "dt_bias has shape"),
    ],
    ids=str,
)
def test_a_step_refuses_what_would_be_broadcast(changes, message):
    shapes: Any = {"state": (2, 2, 4, 6, 5), "x": (2, 4, 6), "dt": (2, 2, 4), "A": (2, 4), "B": (2, 2, 2, 5)}
    shapes |= {"C": (2, 2, 2, 5), "D": (2, 4), "z": (2, 4, 6), "dt_bias": (2, 4)}

    def step(given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tensors: Any = {name: None if shape is None else torch.zeros(shape) for name, shape in given.items()}
        return ssd_step(**tensors)

    assert [t.shape for t in step(shapes)] == [(2, 2, 4, 6), (2, 2, 4, 6, 5)]
    with pytest.raises(ValueError, match=message):
        step(shapes | changes)


def test_halves_joined_by_their_state_equal_the_whole(backend):
    name, device = backend
    problem = make_problem(l=150, k=1, order=None, device=device)
    tokens = ("x", "dt", "B", "C")
    leaves: dict[str, Any] = {key: v.requires_grad_() if torch.is_tensor(v) else v for key, v in problem.items()}
    whole = ssd(**leaves, backend=name)
    first, state = ssd(
        **{key: v[:, :83] if key in tokens else v for key, v in leaves.items()}, return_final_state=True, backend=name
    )
    second = ssd(
        **{key: v[:, 83:] if key in tokens else v for key, v in leaves.items()}, initial_state=state, backend=name
    )
    halves = torch.cat([first, second], 1)
    assert relative_error(halves, whole) < 1e-5
    dy, inputs = torch.randn_like(whole), [v for v in leaves.values() if torch.is_tensor(v)]
    for a, b in zip(torch.autograd.grad(halves, inputs, dy), torch.autograd.grad(whole, inputs, dy), strict=True):
        assert relative_error(a, b) < 2e-5


def test_slow_decays_over_many_chunks(check):
    """The gradient of the decay is a sum over pairs of steps: nothing large may cancel if the state hardly decays."""
    check(l=600, b=1, k=1, h=2, g=1, p=8, n=8, decay=True, dtype=torch.bfloat16, steps=torch.float32)


def test_same_result_twice(backend):
    """Gradients are equal to the last bit without asking for deterministic algorithms, which therefore cost nothing."""
    name, device = backend
    problem = make_problem(l=197, h=8, p=16, n=16, device=device, dtype=torch.bfloat16)
    first, seeds = solve(problem, backend=name)
    second, _ = solve(problem, seeds, backend=name)
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, dtype):
    """Tokens are cast, steps and the state's parameters are not, and gradients return in each input's own dtype."""
    name, device = backend
    problem = make_problem(l=40, device=device)
    with torch.autocast(device, dtype=dtype):
        found, seeds = solve(problem, backend=name)
    assert found["y"].dtype == dtype
    assert found["gradient of x"].dtype == found["gradient of dt"].dtype == torch.float32
    rounded = {key: v.to(dtype) if key in ("x", "B", "C") else v for key, v in problem.items()}
    again, _ = solve(rounded, seeds, backend=name)
    assert torch.equal(found["y"], again["y"])
    assert relative_error(found["gradient of A"], again["gradient of A"]) < 1e-6


def test_opcheck(backend):
    name, device = backend
    p = make_problem(l=9, device=device, skip="channel")
    table, complete = prepare_order(p["order"], 2, 9, 2, torch.device(device))
    x, dt, A, B, C, D, bias = (p[key].requires_grad_() for key in ("x", "dt", "A", "B", "C", "D", "dt_bias"))
    state = torch.randn(2, 2, 4, 6, 5, device=device, requires_grad=True)
    args = (x, dt, A, B, C, D, None, bias, table, None, state, True, complete, 0, torch.float32, True, True, name)
    torch.library.opcheck(torch.ops.mamba_zoo.ssd.default, args)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own import
def test_compiles_without_graph_breaks(backend):
    name, device = backend
    problem = make_problem(l=20, device=device, reduce="sum", z="shared")
    dy = torch.randn(2, 20, 4, 6, device=device)
    with use(name):
        eager, _ = solve(problem, [dy])
        torch._dynamo.reset()
        compiled = torch.compile(lambda kw: ssd(**kw), fullgraph=True, backend="aot_eager")
        x = problem["x"].clone().requires_grad_()
        y = compiled({**problem, "x": x})
        assert relative_error(y, eager["y"]) < 1e-6
        assert relative_error(torch.autograd.grad(y, x, dy)[0], eager["gradient of x"]) < 1e-6


def test_exports(backend):
    name, device = backend

    class Model(torch.nn.Module):
        def forward(self, x, dt, A, B, C):
            return ssd(x, dt, A, B, C, order=torch.arange(8, device=x.device).expand(2, 8), backend=name)

    p = make_problem(l=8, device=device)
    args = tuple(p[key] for key in ("x", "dt", "A", "B", "C"))
    exported = torch.export.export(Model(), args)
    assert torch.equal(exported.module()(*args), Model()(*args))


@pytest.mark.parametrize("case", ["plain", "partial", "packed", "decay"])
def test_reference_gradient_is_the_derivative(case):
    """The oracle itself, against finite differences."""
    extra: dict[str, Any] = {
        "plain": {"l": 4, "z": "shared"},
        "partial": {"l": 6, "order": random_order(1, 6, m=5, empty=1)},
        "packed": {"sequences": (2, 0, 4), "b": 1, "skip": "channel"},
        "decay": {"l": 4, "decay": True, "x_per_direction": True, "b": 1},
    }[case]
    problem = make_problem(p=1, n=2, h=2, g=1, k=1, dtype=torch.float64, state=True, **extra)
    names = [key for key, v in problem.items() if torch.is_tensor(v) and v.is_floating_point()]
    rest = {key: v for key, v in problem.items() if key not in names}

    def run(*values):
        return ssd(**dict(zip(names, values, strict=True)), **rest)

    assert gradcheck(run, tuple(problem[key].requires_grad_() for key in names))


def test_a_backend_without_the_op_is_passed_over():
    """Within `use`, an op that the backend does not have runs on the fastest that does."""
    problem = make_problem(l=4)
    with use("cuda"):
        assert torch.equal(ssd(**problem), ssd(**problem, backend="cpu"))
    with pytest.raises(ValueError, match="backend='cuda' has no ssd"):
        ssd(**problem, backend="cuda")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_five_per_state_and_step(device):
    problem = make_problem(l=10, order=random_order(2, 10, m=7))
    p: dict[str, Any] = {key: v.to(device) if torch.is_tensor(v) else v for key, v in problem.items()}
    steps = 2 * 2 * 7 * 4 * 6
    with FlopCounterMode(display=False) as counter:
        y = ssd(**p)
    assert counter.get_total_flops() == 5 * steps * 5 + 2 * steps
    with FlopCounterMode(display=False) as counter:
        ssd(**{**p, "x": p["x"].requires_grad_()}).sum().backward()
    assert counter.get_total_flops() == 3 * (5 * steps * 5 + 2 * steps)
    assert y.shape == (2, 10, 2, 4, 6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 5, 4, 6)}, ValueError, r"x has shape \(2, 5, 4, 6\), expected \(2, 6, 4, 6\) or"),
        ({"A": torch.zeros(3, 4)}, ValueError, "A has shape"),
        ({"A": None}, ValueError, "either A"),
        ({"decay": torch.zeros(2, 6, 2, 4)}, ValueError, "either A"),
        ({"B": torch.zeros(2, 6, 2, 3, 5)}, ValueError, "3 groups, which do not divide the 4 heads"),
        ({"C": torch.zeros(2, 6, 2, 2, 9)}, ValueError, "C has shape"),
        ({"D": torch.zeros(4)}, ValueError, "D has shape"),
        ({"z": torch.zeros(2, 6, 9)}, ValueError, "z has shape"),
        ({"dt_bias": torch.zeros(2, 9)}, ValueError, "dt_bias has shape"),
        ({"dt": torch.zeros(2, 6, 4)}, ValueError, "dt must be"),
        ({"x": torch.zeros(2, 6, 4, 6, dtype=torch.float16)}, TypeError, "must share a dtype"),
        ({"dt": torch.zeros(2, 6, 2, 4, dtype=torch.float16)}, TypeError, "dt is torch.float16"),
        ({"order": torch.arange(6).expand(3, 6)}, ValueError, "2 directions"),
        ({"order": torch.full((2, 6), -2)}, ValueError, "order holds -2"),
        ({"reduce": "max"}, ValueError, "reduce='max'"),
        ({"chunk_size": 48}, ValueError, "chunk_size=48"),
        ({"backend": "fast"}, ValueError, "backend='fast' is unknown"),
        ({"initial_state": torch.zeros(2, 2, 4, 6, 9)}, ValueError, "initial_state has shape"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "b=1"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_bad_input_names_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        ssd(**{**make_problem(l=6), **changes})

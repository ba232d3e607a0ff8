"""What is special to the numba backend: threads, its cache on disk, its polynomials, lanes that are left over."""

import os
import threading
from typing import Any

import pytest
import torch
from numba.core import caching, config
from numba.np.numpy_support import carray
from torch.testing import assert_close

from mamba_zoo.kernels import causal_conv1d, refusals, selective_scan
from mamba_zoo.kernels._cpu._pool import Kernel
from mamba_zoo.kernels._cpu._simd import fetch_add, store_i64

from .problems import assert_agrees, make_problem, random_order, relative_error, solve


@pytest.fixture
def threads():
    """Set the number of threads; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def conv_gradients(seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((3, 50, 40), (2, 40, 4), (2, 40))]
    order = random_order(2, 50)
    y = causal_conv1d(*leaves, order=order, activation="silu", backend="cpu")
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.randn_like(y))]


@pytest.mark.parametrize("n", [5, 1])
@pytest.mark.parametrize(("k", "d"), [(1, 70), (3, 5)])
@pytest.mark.parametrize("reduce", [None, "sum"])
def test_no_samples_have_gradients_of_zero(n, k, d, reduce):
    problem = make_problem(b=0, l=9, k=k, d=d, n=n, reduce=reduce, state=True)
    found, _ = solve(problem, backend="cpu")
    assert found["y"].shape == ((0, 9, d) if reduce else (0, 9, k, d))
    for name in ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"):
        gradient = found[f"gradient of {name}"]
        assert gradient.shape == problem[name].shape
        assert not gradient.any()


@pytest.mark.parametrize("n", [5, 1])
@pytest.mark.parametrize("reduce", [None, "sum"])
def test_any_number_of_threads_gives_the_same_bits(threads, reduce, n):
    problem = make_problem(b=3, l=70, k=3, d=150, n=n, reduce=reduce, state=True)
    results = []
    seeds = None
    for count in (1, 2, 5):
        threads(count)
        found, seeds = solve(problem, seeds, backend="cpu")
        results.append([*found.values(), *conv_gradients(0)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_concurrent_calls_do_not_disturb_each_other(threads):
    threads(2)
    problems = [make_problem(b=2, l=60, d=100, n=n) for n in (3, 16)]
    alone = [solve(p, backend="cpu") for p in problems]
    again: dict[int, list] = {0: [], 1: []}

    def work(i):
        for _ in range(5):
            again[i].append(solve(problems[i], alone[i][1], backend="cpu")[0])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, (want, _) in enumerate(alone):
        assert len(again[i]) == 5
        for got in again[i]:
            assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_works_in_a_forked_child(threads):
    """A data-loading worker inherits the pool but none of its threads."""
    threads(2)
    problem = make_problem(b=2, l=60, d=100)
    want = selective_scan(**problem, backend="cpu")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # report through the pipe and leave without pytest's own exit
        same = torch.equal(selective_scan(**problem, backend="cpu"), want)
        os.write(writer, b"same" if same else b"different")
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 20) == b"same"
    os.waitpid(child, 0)


@pytest.mark.parametrize("d", [1, 7, 8, 9, 15, 16, 17, 33])
def test_channels_that_do_not_fill_a_vector(d):
    assert_agrees(make_problem(b=2, l=35, d=d, n=6, k=2, state=True), "cpu")
    guard = torch.full((2, 35, d + 32), 7.0)
    u = guard[..., 16 : 16 + d]
    problem = make_problem(b=2, l=35, d=d, n=2, k=1, order=None)
    u.copy_(problem["u"])
    guard[..., :16] = guard[..., 16 + d :] = float("nan")  # lanes beyond d must not leak in
    want = selective_scan(**problem, backend="reference")
    problem["u"] = u
    assert relative_error(selective_scan(**problem, backend="cpu"), want) < 1e-6


@pytest.mark.parametrize("count", [1, 8], ids=["two vectors an item", "one vector an item"])
@pytest.mark.parametrize("d", [70, 16, 96])
def test_one_state_takes_its_own_loop(threads, count, d):
    threads(count)  # few threads get work items of two vectors
    order = random_order(2, 70, m=60, empty=7)
    for reduce in (None, "mean"):
        assert_agrees(make_problem(l=70, d=d, n=1, order=order, state=True, reduce=reduce), "cpu")
    assert_agrees(make_problem(b=1, d=d, n=1, sequences=(40, 1, 29), state=True, z=None), "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    assert_agrees(make_problem(d=20, n=16, dtype=dtype, reduce="sum", k=4, u_per_direction=True), "cpu")


def one_step(dt: torch.Tensor, **options: Any) -> Any:
    """`softplus(dt)` and nothing else: y of a single step is delta u B C."""
    one = torch.ones(1, 1, dt.numel(), dtype=dt.dtype)
    maps = torch.ones(1, 1, 1, 1, dtype=dt.dtype)
    A = -torch.ones(1, dt.numel(), 1, dtype=dt.dtype)
    backend = "reference" if dt.dtype == torch.float64 else "cpu"
    y = selective_scan(one, dt.view(1, 1, 1, -1), A, maps, maps, **options, backend=backend)
    return y.flatten()


def test_softplus_keeps_its_relative_accuracy():
    dt = torch.cat([torch.linspace(-40, 40, 20001), torch.linspace(-85, -40, 2001), torch.linspace(-1e-3, 1e-3, 2001)])
    got, want = one_step(dt, dt_softplus=True), one_step(dt.double(), dt_softplus=True)
    assert_close(got.double(), want, rtol=5e-7, atol=0)


def test_gradient_of_softplus_keeps_its_relative_accuracy():
    dt = torch.linspace(-40, 40, 4001).requires_grad_()
    (got,) = torch.autograd.grad(one_step(dt, dt_softplus=True).sum(), dt)
    assert_close(got.double(), torch.sigmoid(dt.detach().double()), rtol=1e-6, atol=0)


def test_gate_keeps_its_relative_accuracy():
    z = torch.linspace(-40, 40, 4001)
    got = one_step(torch.ones(4001), z=z.view(1, 1, -1))
    assert_close(got.double(), torch.nn.functional.silu(z.double()), rtol=5e-7, atol=0)


def test_decay_is_accurate_from_no_decay_to_none_left():
    """The state after one empty step is exp(dt A): relative error 3e-7 down to e^-1, absolute below."""
    steps = torch.cat([torch.linspace(0, 1, 2001), torch.logspace(-8, 2, 2001)])
    d = len(steps)
    A, state, zero = -torch.ones(1, d, 1), torch.ones(1, 1, d, 1), torch.zeros(1, 1, 1, 1)
    _, final = selective_scan(
        torch.zeros(1, 1, d), steps.view(1, 1, 1, d), A, zero, zero, initial_state=state, return_final_state=True,
        backend="cpu",
    )  # fmt: skip
    want = torch.exp(-steps.double())
    near = steps <= 1
    assert_close(final.flatten().double()[near], want[near], rtol=3e-7, atol=0)
    assert_close(final.flatten().double(), want, rtol=0, atol=3e-7)
    assert float(final.flatten()[0]) == 1.0


def test_tiny_steps_do_not_drift():
    """A decay that rounds to 1 stays exactly 1 over many steps."""
    l = 5000
    _, final = selective_scan(
        torch.zeros(1, l, 1), torch.full((1, l, 1, 1), 1e-12), -torch.ones(1, 1, 1), torch.zeros(1, l, 1, 1),
        torch.zeros(1, l, 1, 1), initial_state=torch.ones(1, 1, 1, 1), return_final_state=True, backend="cpu",
    )  # fmt: skip
    assert float(final) == 1.0


def test_not_a_number_is_not_hidden():
    for name in ("u", "dt", "B", "C", "z"):
        problem = make_problem(b=1, l=4, k=1, d=3, n=5, order=None)
        problem[name][0, 1].fill_(float("nan"))
        y = selective_scan(**problem, backend="cpu")
        assert torch.isfinite(y[:, 0]).all(), name
        assert torch.isnan(y[:, 1]).all(), name
    problem = make_problem(b=1, l=4, k=1, d=3, n=5, order=None, state=True)
    problem["A"].fill_(float("nan"))
    assert torch.isnan(selective_scan(**problem, backend="cpu")[0]).all()


def test_refusals_say_why():
    assert refusals("cpu")["cpu"] is None
    assert "float64 is left to the reference" in str(refusals("cpu", torch.float64)["cpu"])
    assert "not on cuda" in str(refusals("cuda")["cpu"])


def count_items(pointer):
    """A loop for `Kernel`: item i writes i + 1 to place i."""
    a = carray(pointer, 1)[0]
    while True:
        item = fetch_add(a.counter)
        if item >= a.items:
            break
        store_i64(a.to + 8 * item, item + 1)


def run_items() -> list[int]:
    """The result of a kernel that is compiled, or taken from the cache, now."""
    to = torch.zeros(9, dtype=torch.int64)
    Kernel(count_items, ("to",))(items=9, scratch_floats=1, to=to.data_ptr())
    return to.tolist()


def test_compiled_code_is_kept_and_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    results, stamps = [], []
    for _ in range(2):
        results.append(run_items())
        stamps.append({file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nbc")})
    assert results[0] == results[1] == list(range(1, 10))
    assert stamps[0], "nothing was kept"
    assert stamps[0] == stamps[1], "compiled again"


def test_works_where_nothing_can_be_kept(monkeypatch):
    """No directory is writable: numba finds no place for its cache and raises."""
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert run_items() == list(range(1, 10))

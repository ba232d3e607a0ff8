"""The CUDA backend beyond its answers, which test_selective_scan.py checks: compilation, cache, launches."""

from __future__ import annotations

import itertools
import os
import re
import stat
import threading

import pytest
import torch

from mamba_zoo.kernels import _cuda, refusals, selective_scan

from .problems import TOLERANCE, make_problem, random_order, relative_error, solve

needs_nvrtc = pytest.mark.skipif(
    _cuda.refuse("cuda", torch.float32) is not None,
    reason=f"NVRTC: {_cuda.refuse('cuda', torch.float32)}",
)
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SIZES = (1, 16, 64)


def kernel_source(kernel: str, n: int, dtype: torch.dtype, **changes) -> str:
    """The source of a kernel as a large problem of `n` states would launch it."""
    from mamba_zoo.kernels._cuda import _plan

    table = {"forward": _plan.forward_launch, "backward": _plan.backward_launch}[kernel]
    return _plan.source(kernel, table(n, 384, 49_152, 2), variant(n, dtype).with_(**changes))


def variant(n: int, dtype: torch.dtype, row_bytes: float | None = None):
    """What is compiled in for tokens of `dtype`, gated, in aligned rows."""
    from mamba_zoo.kernels._cuda import _plan

    return _plan.Variant(
        dtype, dtype, map_width=min(n & -n, 4), chunk=16 // dtype.itemsize,
        spacing=_plan.spacing(n, row_bytes or 3 * dtype.itemsize), softplus=True, gated=True, empty=False, exact=True,
    )  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mamba_zoo" / "cuda"


@needs_nvrtc
@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize(("arch", "n"), [(arch, SIZES[i % 3]) for i, arch in enumerate(ARCHITECTURES)])
def test_compiles_for_every_architecture(kernel, arch, n):
    from mamba_zoo.kernels._cuda import nvrtc

    image, _ = nvrtc.compile_source(kernel_source(kernel, n, torch.float16), arch)
    assert image[:4] == b"\x7fELF"


@needs_nvrtc
@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize(
    ("n", "dtype", "changes"),
    [
        (1, torch.bfloat16, {}),
        (16, torch.bfloat16, {}),
        (16, torch.bfloat16, {"keep": True, "empty": True, "part": 2, "sums": 1}),
        (16, torch.float16, {"out": torch.float32, "added": 1}),
        (16, torch.float32, {"gated": False, "sums": 2}),
        (64, torch.bfloat16, {"exact": False, "map_width": 1}),
        (64, torch.float32, {"softplus": False, "out": torch.float16}),
    ],
    ids=str,
)
def test_keeps_its_state_in_registers(kernel, n, dtype, changes):
    """Up to 16 states nothing of weight may go to local memory: a spilled state costs more than the scan."""
    from mamba_zoo.kernels._cuda import nvrtc

    _, log = nvrtc.compile_source(kernel_source(kernel, n, dtype, **changes), "sm_90", "--ptxas-options=-v")
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert found is not None, log
    if n <= 16:
        assert max(int(x) for x in found.groups()) <= SPILL_LIMIT[kernel], log


# The backward kernel fills all 255 registers; what does not fit are addresses, used once per tile.
SPILL_LIMIT = {"forward": 16, "backward": 160}


@needs_nvrtc
def test_small_kernels_compile():
    from mamba_zoo.kernels._cuda import _plan, nvrtc

    for dtype in _cuda.DTYPES:
        assert nvrtc.compile_source(_plan.finish_source(dtype), "sm_75")[0]


@needs_nvrtc
def test_errors_of_the_compiler_are_shown():
    from mamba_zoo.kernels._cuda import nvrtc

    with pytest.raises(RuntimeError, match='identifier "oops" is undefined'):
        nvrtc.compile_source('extern "C" __global__ void f() { oops; }', "sm_90")


@needs_nvrtc
def test_damaged_cache_entry_is_rebuilt(cache):
    from mamba_zoo.kernels._cuda import nvrtc

    source = 'extern "C" __global__ void f(float* x) { x[0] = 1.0f; }'
    image = nvrtc.cubin(source, "sm_90")
    (entry,) = cache.iterdir()
    intact = entry.read_bytes()
    for damaged in (b"", intact[:-1], intact[:40] + b"?" + intact[41:]):
        entry.write_bytes(damaged)
        assert nvrtc.cubin(source, "sm_90") == image
        assert entry.read_bytes() == intact


@needs_nvrtc
def test_cache_is_used_and_keyed_by_architecture(cache, monkeypatch):
    from mamba_zoo.kernels._cuda import nvrtc

    source = 'extern "C" __global__ void f(float* x) { x[0] = 2.0f; }'
    first, second = nvrtc.cubin(source, "sm_80"), nvrtc.cubin(source, "sm_90")
    assert first != second
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(nvrtc, "compile_source", None)
    assert nvrtc.cubin(source, "sm_80") == first


@needs_nvrtc
def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    """A read-only home, or a file where the folder should be, costs compilation only."""
    from mamba_zoo.kernels._cuda import nvrtc

    source = 'extern "C" __global__ void f(float* x) { x[0] = 3.0f; }'
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert nvrtc.cubin(source, "sm_90")
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setenv("XDG_CACHE_HOME", str(locked))
    assert nvrtc.cubin(source, "sm_90")
    assert os.geteuid() == 0 or not list(locked.iterdir())


@needs_nvrtc
def test_processes_share_a_cache_entry(cache):
    """Writers of one entry at a time leave it whole and nothing beside it."""
    from mamba_zoo.kernels._cuda import nvrtc

    source = 'extern "C" __global__ void f(float* x) { x[0] = 4.0f; }'
    images = []
    threads = [threading.Thread(target=lambda: images.append(nvrtc.cubin(source, "sm_90"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(images)) == 1
    assert len(list(cache.iterdir())) == 1


@needs_nvrtc
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16, 17, 32, 33, 64, 100, 128, 129, 256])
def test_every_line_of_the_launch_table_is_sound(n):
    for d, programs in itertools.product((1, 7, 33, 96, 384, 1000), (64, 10_000, 1_000_000)):
        _check_launches(n, d, programs)


def _check_launches(n, d, programs):
    from mamba_zoo.kernels._cuda import _plan

    width = 2 if d % 2 == 0 else 1
    for launch in (_plan.forward_launch(n, d, programs, width), _plan.backward_launch(n, d, programs, width)):
        assert launch.states >= n
        assert launch.states % launch.lanes == 0
        assert launch.lanes <= 8
        assert launch.threads % 32 == 0
        assert 32 <= launch.threads <= 256
        assert d % launch.width == 0
        assert 64 % launch.tile == 0
        assert launch.blocks >= 1
    backward = _plan.backward_launch(n, d, programs, width)
    for row_bytes, dtype in ((2.5, torch.bfloat16), (6.0, torch.bfloat16), (24.0, torch.float32)):
        compiled = variant(n, dtype, row_bytes)
        assert compiled.spacing % backward.tile == 0
        assert _plan.WINDOW % compiled.spacing == 0
        assert _plan.needed_memory("backward", backward, compiled) <= 227 * 1024
        for kernel in ("forward", "backward"):
            # The least that a supported GPU has.
            small = _plan.fit_shared(kernel, backward, compiled, 64 * 1024)
            assert _plan.needed_memory(kernel, small, compiled) <= 64 * 1024
            assert small.threads % 32 == 0
    assert 2 * backward.tile * backward.states // backward.lanes % 16 == 0


def test_reasons_for_refusal():
    assert "not on cpu" in str(_cuda.refuse("cpu", torch.float32))
    assert "float64 is left to the reference" in str(_cuda.refuse("cuda", torch.float64))


def test_without_bindings_the_reason_is_given(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _cuda._unavailable.cache_clear()
    try:
        assert "pip install cuda-bindings" in str(_cuda.refuse("cuda", torch.float32))
    finally:
        _cuda._unavailable.cache_clear()


@needs_nvrtc
@pytest.mark.parametrize(("capability", "served"), [((9, 0), True), ((7, 0), False), ((99, 0), False)])
def test_a_gpu_that_the_compiler_does_not_know_is_left_to_triton(monkeypatch, capability, served):
    from mamba_zoo.kernels import _backend
    from mamba_zoo.kernels._cuda import nvrtc

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(nvrtc, "capability", lambda device: capability)
    caches = (nvrtc.architecture, _cuda._unavailable, _backend._fastest)
    for cached in caches:
        cached.cache_clear()
    try:
        assert _backend.choose("auto", torch.device("cuda"), torch.float32) == ("cuda" if served else "triton")
        reason = refusals("cuda")["cuda"]
        assert reason is None if served else f"compute capability {capability[0]}.0" in str(reason)
    finally:
        for cached in caches:
            cached.cache_clear()


def test_too_many_states_name_the_way_out():
    from mamba_zoo.kernels._cuda import _plan

    with pytest.raises(ValueError, match=r"n=257 states.*backend='reference'"):
        _plan.padded(257)


@pytest.fixture
def gpu() -> str:
    """The CUDA device, if this backend serves it."""
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    if reason := refusals("cuda")["cuda"]:
        pytest.skip(reason)
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("case", ["long", "long packed", "many rows"])
def test_long_and_wide_problems(gpu, n, case):
    """Chunked rows with states, and more rows than a grid has in its second dimension."""
    options = {
        "long": {"l": 5000, "b": 1, "k": 1, "d": 48, "state": True, "dtype": torch.bfloat16},
        "long packed": {"b": 1, "k": 2, "d": 16, "sequences": (300, 0, 2500, 1), "state": True},
        "many rows": {"b": 70_000, "l": 2, "k": 1, "d": 2, "order": None},
    }[case]
    problem = make_problem(n=n, device=gpu, **options)  # type: ignore[arg-type]
    ours, seeds = solve(problem, backend="cuda")
    exact = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in problem.items()}
    theirs, _ = solve(exact, seeds, backend="reference")
    for name, value in ours.items():
        limit = {torch.float32: 1e-5, torch.bfloat16: 4e-3}[value.dtype]
        assert relative_error(value, theirs[name]) < limit, name


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 16])
def test_deterministic_mode_is_bit_identical(gpu, n):
    """Ten runs with several blocks of channels, whose dB and dC are otherwise added in any order."""
    problem = make_problem(b=4, l=197, d=1000, n=n, device=gpu, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        first, seeds = solve(problem, backend="cuda")
        for _ in range(9):
            again, _ = solve(problem, seeds, backend="cuda")
            for name, value in first.items():
                assert torch.equal(value, again[name]), name
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_four_directions_add_to_one_gradient(gpu, n, dtype):
    """What they share has one gradient, in place of four and their sum, as accurate as any result of its dtype."""
    problem = make_problem(b=8, l=784, k=4, d=96, n=n, z="shared" if n > 1 else None, device=gpu, dtype=dtype)
    ours, seeds = solve(problem, backend="cuda")
    exact = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in problem.items()}
    theirs, _ = solve(exact, seeds, backend="reference")
    for name, value in ours.items():
        assert relative_error(value, theirs[name]) < TOLERANCE[value.dtype], name


@pytest.mark.gpu
def test_memory_beyond_inputs_and_gradients(gpu):
    """A fifth of the inputs at VMamba's shape, where parts per direction would take as much again as the inputs."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("directions add to one gradient from compute capability 9.0 on")
    problem = make_problem(b=16, l=784, k=4, d=192, n=1, z=None, device=gpu, dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in problem.values() if torch.is_tensor(x) and x.is_floating_point()]
    y = selective_scan(**problem, backend="cuda")
    dy = torch.randn_like(y)
    torch.autograd.grad(y, leaves, dy)  # loads the kernels
    y = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = selective_scan(**problem, backend="cuda")
    kept = torch.autograd.grad(y, leaves, dy)
    torch.cuda.synchronize()
    results = sum(x.numel() * x.element_size() for x in (y, *kept))
    extra = torch.cuda.max_memory_allocated() - before - results
    assert extra <= 0.2 * sum(x.numel() * x.element_size() for x in leaves)


@pytest.mark.gpu
def test_captured_in_a_graph(gpu):
    """A replayed CUDA graph computes what the eager call does, on new inputs."""
    problem = make_problem(l=197, d=64, n=16, device=gpu, dtype=torch.bfloat16, reduce="sum")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        selective_scan(**problem, backend="cuda")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = selective_scan(**problem, backend="cuda")
    problem["u"].copy_(torch.randn_like(problem["u"]))
    graph.replay()
    with torch.no_grad():
        assert torch.equal(y, selective_scan(**problem, backend="cuda"))


@pytest.mark.gpu
def test_runs_in_a_new_thread_and_stream(gpu):
    """A thread that never touched the device, and a stream that must not run ahead of its inputs."""
    problem = make_problem(l=197, d=64, n=16, device=gpu)
    expected = selective_scan(**problem, backend="cuda")
    results = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(selective_scan(**problem, backend="cuda"))
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert torch.equal(results[0], expected)


@pytest.mark.gpu
def test_second_device(gpu):
    """Tensors decide where the kernel runs, not the current device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one CUDA device")
    problem = make_problem(l=65, d=40, n=16)
    there = {key: value.to("cuda:1") if torch.is_tensor(value) else value for key, value in problem.items()}
    ours, seeds = solve(there, backend="cuda")
    here, _ = solve(problem, [s.cpu() for s in seeds], backend="reference")
    for name, value in ours.items():
        assert value.device.index == 1
        assert relative_error(value, here[name]) < 1e-5, name


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("visits", ["in turn", "far apart"])
def test_more_than_two_to_the_31_elements(gpu, backend, visits):
    """Offsets within one sample and from sample to sample go beyond 32 bits, in values and gradients."""
    l, d = 2**20 + 3, 2064
    free, _ = torch.cuda.mem_get_info()
    if free < 64 * 2**30:
        pytest.skip("needs 64 GiB of free device memory")
    u = torch.randn(1, l, d, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    dt = torch.full((1, l, 1, d), -1.0, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    B, C = (torch.randn(1, l, 1, 1, device=gpu, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    A = torch.full((1, d, 1), -1.0, device=gpu)
    assert u.numel() > 2**31
    # The state forgets: the last tokens alone give the last outputs, and the gradients of the last inputs.
    order, rows = None, torch.arange(l - 200, l, device=gpu)
    if visits == "far apart":
        order = random_order(1, 300).to(gpu) * (l // 300)
        rows = order[0]
    y = selective_scan(u, dt, A, B, C, order=order, dt_softplus=True, backend=backend)
    seed = torch.zeros_like(y)
    seed[:, rows] = torch.randn_like(y[:, rows])
    found = [y, *torch.autograd.grad(y, (u, dt, B, C), seed)]
    part = [x.detach()[:, rows].double().requires_grad_() for x in (u, dt, B, C)]
    exact = selective_scan(part[0], part[1], A.double(), *part[2:], dt_softplus=True, backend="reference")
    wanted = [exact, *torch.autograd.grad(exact, part, seed[:, rows].double())]
    for name, ours, theirs in zip(("y", "u", "dt", "B", "C"), found, wanted, strict=True):
        assert relative_error(ours[:, rows][:, -50:], theirs[:, -50:]) < 4e-3, name

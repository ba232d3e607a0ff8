"""The state-space dual on a GPU: sizes beyond 32 bits, many samples, other devices, CUDA graphs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_zoo.kernels import ssd

from .problems import relative_error
from .test_ssd import GRADIENT_TOLERANCE, TOLERANCE, exact_answer, make_problem, solve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]


def assert_close(problem: dict[str, Any]) -> None:
    """Values and gradients agree with float64."""
    ours, seeds = solve(problem, backend="triton")
    wanted = exact_answer(problem, seeds)
    for name, value in ours.items():
        limit = (GRADIENT_TOLERANCE if name.startswith("gradient") else TOLERANCE)[problem["x"].dtype]
        assert relative_error(value, wanted[name]) < limit, name


def test_more_than_two_to_the_31_elements():
    """Offsets within one sample go beyond 32 bits."""
    l, h, p, n = 2**17 + 5, 257, 64, 16
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip("needs 24 GiB of free device memory")
    x = torch.randn(1, l, h, p, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    dt = torch.full((1, l, 1, h), 0.5, device="cuda", dtype=torch.bfloat16)
    A = torch.full((1, h), -1.0, device="cuda")
    B, C = (torch.randn(1, l, 1, 1, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    with torch.no_grad():
        y = ssd(x, dt, A, B, C, backend="triton")
        # The state forgets: the last tokens alone give the last outputs.
        last = [t[:, -150:].double().cpu() for t in (x, dt, B, C)]
        wanted = ssd(last[0], last[1], A.double().cpu(), last[2], last[3], backend="reference")
    assert relative_error(y[:, -50:], wanted[:, -50:]) < TOLERANCE[torch.bfloat16]


def test_first_calls_on_a_new_machine(tmp_path):
    """Nothing is compiled yet: kernels of a pass are compiled and loaded side by side."""
    code = "from tests.kernels.test_ssd_gpu import assert_close, make_problem, torch\nfor p in (16, 24):\n"
    code += "    assert_close(make_problem(l=300, h=4, p=p, n=16, device='cuda', dtype=torch.bfloat16, state=True))"
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    kernels = {path.stem for path in tmp_path.rglob("*.cubin")}
    assert {"ssd_steps", "ssd_states", "ssd_forward", "ssd_backward_heads", "ssd_backward_maps"} <= kernels


def test_more_samples_than_a_grid_has_in_its_second_dimension():
    assert_close(make_problem(b=70_000, l=2, k=1, h=1, g=1, p=2, n=2, device="cuda", order=None, dtype=torch.bfloat16))


def test_second_device():
    """Tensors decide where the kernels run, not the current device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one CUDA device")
    problem = make_problem(l=130, h=4, p=16, n=16, device="cuda:1", dtype=torch.bfloat16, state=True)
    assert_close(problem)
    assert ssd(**problem, backend="triton")[0].device.index == 1


def test_launches_are_told_apart_by_alignment():
    """Tokens of the same shapes and strides, at addresses that allow wide loads and at others, in turn."""
    shape = (1, 130, 2, 16)
    memory = torch.randn(2, shape[1] * 32 + 8, device="cuda", dtype=torch.bfloat16)
    problem = make_problem(b=1, l=130, k=1, h=2, g=1, p=16, n=16, device="cuda", dtype=torch.bfloat16)
    for x_start, B_start in ((0, 0), (1, 0), (0, 1), (2, 8), (0, 0)):
        x = memory[0, x_start:][: shape[1] * 32].view(shape)
        B = memory[1, B_start:][: shape[1] * 16].view(1, 130, 1, 1, 16)
        assert_close({**problem, "x": x, "B": B})


@pytest.mark.parametrize("length", [200, 3000])
def test_captured_in_a_graph(length):
    """A replayed CUDA graph computes what the eager call does, on new inputs."""
    problem = make_problem(b=1, l=length, k=1, h=4, g=1, p=64, n=64, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        ssd(**problem, backend="triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = ssd(**problem, backend="triton")
    problem["x"].copy_(torch.randn_like(problem["x"]))
    graph.replay()
    with torch.no_grad():
        assert torch.equal(y, ssd(**problem, backend="triton"))

"""The causal convolution of the CUDA backend beyond its answers, which test_causal_conv1d.py checks."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch

from mamba_zoo.kernels import causal_conv1d

from .problems import relative_error
from .test_cuda import ARCHITECTURES, gpu, needs_nvrtc

__all__ = ["gpu"]  # the fixture
VARIANTS: list[dict[str, Any]] = [
    {},
    {"packed": True, "final": True},
    {"tokens": torch.float32, "silu": False},
    {"tokens": torch.float16, "taps": 7},
]


def source(kernel: str, taps: int = 4, d: int = 768, tokens: torch.dtype = torch.bfloat16, **changes) -> str:
    """The source of a pass as aligned rows of `d` channels would launch it."""
    from mamba_zoo.kernels._cuda import _conv_plan

    variant = _conv_plan.Variant(tokens, silu=True, packed=False).with_(**changes)
    return _conv_plan.source(kernel, _conv_plan.launch(kernel, taps, d, 16 // tokens.itemsize), variant)


@needs_nvrtc
@pytest.mark.parametrize(
    ("arch", "kernel", "options"),
    [(arch, ("forward", "backward")[i % 2], VARIANTS[i % 4]) for i, arch in enumerate(ARCHITECTURES)],
    ids=str,
)
def test_compiles_for_every_architecture(arch, kernel, options):
    from mamba_zoo.kernels._cuda import nvrtc

    image, _ = nvrtc.compile_source(source(kernel, **options), arch)
    assert image[:4] == b"\x7fELF"


@needs_nvrtc
@pytest.mark.parametrize(("kernel", "limit"), [("forward", 0), ("backward", 64)])
def test_holds_inputs_and_sums_in_registers(kernel, limit):
    from mamba_zoo.kernels._cuda import nvrtc

    added = kernel == "backward"
    _, log = nvrtc.compile_source(source(kernel, added=added), "sm_90", "--ptxas-options=-v")
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert spills
    assert max(int(x) for pair in spills for x in pair) <= limit, log


@needs_nvrtc
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_every_launch_is_sound(kernel):
    from mamba_zoo.kernels._cuda import _conv_plan

    for taps, d, aligned in itertools.product((1, 2, 4, 5, 9, 64), (1, 7, 33, 96, 384, 1536), (1, 2, 4, 8)):
        launch = _conv_plan.launch(kernel, taps, d, aligned)
        assert launch.width <= aligned
        assert 1 <= launch.threads <= 128
        column = (launch.width * (taps + 1)) | 1
        staged = max(2048, 64 + 2 * (taps - 1) + 2 * launch.tile)
        assert 4 * (launch.columns * column + 4 * staged) <= 48 * 1024
        for m, samples in itertools.product((0, 1, 8, 197, 65_536), (0, 1, 128)):
            run = _conv_plan.steps(launch, m, samples, 6)
            assert 1 <= run <= 64
            assert run % launch.tile == 0


@pytest.mark.gpu
def test_deterministic_mode_is_bit_identical(gpu):
    """Ten runs with four directions, whose gradients of shared tokens are otherwise added in any order."""
    x = torch.randn(4, 197, 96, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = (torch.randn(4, 96, *more, device=gpu, requires_grad=True) for more in ((4,), ()))
    order = torch.stack([torch.randperm(197) for _ in range(4)]).to(gpu)
    seed = torch.randn(4, 197, 4, 96, device=gpu, dtype=torch.bfloat16)

    def solve():
        y = causal_conv1d(x, weight, bias, order, "silu", backend="cuda")
        return y, *torch.autograd.grad(y, (x, weight, bias), seed)

    torch.use_deterministic_algorithms(True)
    try:
        first = solve()
        for _ in range(9):
            assert all(map(torch.equal, solve(), first))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(gpu):
    """Offsets within a sample go beyond 32 bits."""
    l, d = 2**20 + 3, 2064
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GiB of free device memory")
    x = torch.randn(1, l, d, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1, d, 4, device=gpu)
    order = torch.randperm(l, device=gpu)[None]
    y = causal_conv1d(x, weight, None, order, "silu", backend="cuda")
    (dx,) = torch.autograd.grad(y, x, y)
    tail = order[:, -60:]
    part = x.detach()[:, tail[0]].double().requires_grad_()
    want = causal_conv1d(part, weight.double(), None, None, "silu", backend="reference")
    (wanted,) = torch.autograd.grad(want, part, y.detach()[:, tail[0]].double())
    for ours, exact in ((y, want), (dx, wanted)):
        # The first of them have others before them.
        assert relative_error(ours[:, tail[0, 3:]], exact[:, 3:]) < 4e-3

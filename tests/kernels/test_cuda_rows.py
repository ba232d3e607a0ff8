"""Norm and MLP of the CUDA backend beyond their answers, which test_add_norm.py and test_mlp.py check."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from mamba_zoo import kernels
from mamba_zoo.kernels import _backend, add_norm

from .problems import relative_error
from .test_cuda import ARCHITECTURES, gpu, needs_nvrtc

__all__ = ["gpu"]  # the fixture
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


def sources() -> dict[str, str]:
    """One source of each kind, by what it is."""
    from mamba_zoo.kernels._cuda import _rows

    return {
        "forward": _rows.norm_source(False, BRAIN, BRAIN, BRAIN, FLOAT, 8),
        "backward": _rows.norm_source(True, BRAIN, BRAIN, BRAIN, FLOAT, 8),
        "mlp": _rows.mlp_source(BRAIN, 8),
        "forward, mixed": _rows.norm_source(False, FLOAT, HALF, BRAIN, HALF, 4),
        "backward, mixed": _rows.norm_source(True, FLOAT, HALF, BRAIN, HALF, 2),
        "forward, wide": _rows.norm_source(False, HALF, HALF, FLOAT, BRAIN, 4, wide=True),
        "backward, wide": _rows.norm_source(True, HALF, BRAIN, HALF, FLOAT, 1, wide=True),
        "mlp, odd": _rows.mlp_source(HALF, 1),
    }


@needs_nvrtc
@pytest.mark.parametrize(
    ("arch", "kinds"),
    [
        (arch, (("forward", "backward", "mlp"), ("forward, mixed", "backward, wide"), ("backward, mixed", "mlp, odd"),
                ("forward, wide",))[i % 4])
        for i, arch in enumerate(ARCHITECTURES)
    ],
    ids=str,
)  # fmt: skip
def test_compiles_for_every_architecture(arch, kinds):
    from mamba_zoo.kernels._cuda import nvrtc

    for kind in kinds:
        image, _ = nvrtc.compile_source(sources()[kind], arch)
        assert image[:4] == b"\x7fELF"


@needs_nvrtc
@pytest.mark.parametrize("kind", ["forward", "backward", "mlp"])
def test_holds_rows_in_registers(kind):
    from mamba_zoo.kernels._cuda import _rows, nvrtc

    _, log = nvrtc.compile_source(sources()[kind], "sm_90", "--ptxas-options=-v")
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert spills
    assert all(pair == ("0", "0") for pair in spills), log
    used = re.findall(r"Function properties for (\w+).*?Used (\d+) registers", log, re.DOTALL)
    found = {name: int(registers) for name, registers in used}
    if kind == "mlp":
        assert max(found.values()) <= 80, log
    else:
        for packs, resident in _rows.RESIDENT[kind == "backward"].items():
            assert found[f"norm_{kind}_{packs}"] * resident <= 65_536, log


@needs_nvrtc
def test_every_launch_is_sound():
    from mamba_zoo.kernels._cuda import _rows

    for d, width in itertools.product(
        (1, 2, 7, 33, 96, 192, 255, 384, 768, 1023, 1536, 2501, 8192, 100_000), (1, 2, 4, 8)
    ):
        if d % width:
            continue
        for rows in (0, 1, 197, 25_216, 401_408, 2**33):
            launch = _rows.norm_launch(rows, d, width, rows % 2 == 1)
            covered = launch.lanes * launch.packs * launch.width
            assert covered * launch.slices >= d
            assert launch.threads % 32 == 0
            assert launch.threads % launch.lanes == 0
            assert launch.threads == launch.lanes or launch.lanes in (4, 8, 16, 32)
            assert launch.threads <= {1: 256, 2: 512, 3: 128}[launch.packs]
            assert 1 <= launch.parts * launch.slices < 2**31
            columns = _rows.columns_launch(rows, d, width)
            assert columns.blocks * columns.lanes * columns.width >= d
            assert 1 <= columns.parts * columns.blocks < 2**31


def test_the_fastest_backend_with_kernels_is_taken(monkeypatch):
    monkeypatch.setattr(_backend, "serves", lambda name, *what: name == "triton")
    assert _backend.gpu_backend(FLOAT, "add_norm") == "triton"
    monkeypatch.setattr(_backend, "serves", lambda name, *what: True)
    assert _backend.gpu_backend(FLOAT, "mlp") == "cuda"
    with kernels.use("triton"):
        assert _backend.gpu_backend(FLOAT, "mlp") == "triton"
    with kernels.use("cpu"):  # which has no norm
        assert _backend.gpu_backend(FLOAT, "add_norm") == "cuda"
    with kernels.use("reference"):
        assert _backend.gpu_backend(FLOAT, "add_norm") == "reference"
    monkeypatch.setattr(_backend, "serves", lambda name, *what: False)
    assert _backend.gpu_backend(FLOAT, "add_norm") == "reference"


@pytest.mark.gpu
@pytest.mark.parametrize("d", [96, 384, 768, 33, 2501])
def test_norms_are_the_same_in_every_run(gpu, d):
    x, branch = (torch.randn(64, 197, d, device=gpu, dtype=BRAIN).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(d, device=gpu).requires_grad_() for _ in range(2))
    seeds = torch.randn_like(x), torch.randn_like(x)

    def solve():
        results = add_norm(x, weight, bias, branch, backend="cuda")
        return *results, *torch.autograd.grad(results, (x, branch, weight, bias), seeds)

    first = solve()
    for _ in range(5):
        assert all(map(torch.equal, solve(), first))


@pytest.mark.gpu
def test_tokens_of_two_dtypes_anywhere_in_memory(gpu):
    x = torch.randn(3, 64, device=gpu).flatten()
    branch = torch.randn(3, 64, device=gpu).to(BRAIN).flatten()
    weight = torch.ones(16, device=gpu)
    for starts in ((0, 4), (2, 0), (0, 0), (1, 1)):  # 16 bytes apart or not, for one of them or the other
        given = [t[at : at + 128].view(1, 8, 16) for t, at in zip((x, branch), starts, strict=True)]
        stream, y = add_norm(given[0], weight, None, given[1], kind="rms", backend="cuda")
        want = add_norm(given[0], weight, None, given[1], kind="rms", backend="reference")
        assert relative_error(stream, want[0]) < 1e-6
        assert relative_error(y, want[1]) < 1e-5


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(gpu):
    rows, d = 2**22 + 5, 520
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free device memory")
    x = torch.randn(1, rows, d, device=gpu, dtype=BRAIN).requires_grad_()
    weight, bias = (torch.randn(d, device=gpu).requires_grad_() for _ in range(2))
    _, y = add_norm(x, weight, bias, backend="cuda")
    dx, dbias = torch.autograd.grad(y, (x, bias), y)
    tail = x.detach()[:, -100:].double().requires_grad_()
    _, want = add_norm(tail, weight.double(), bias.double(), backend="reference")
    (wanted,) = torch.autograd.grad(want, tail, y.detach()[:, -100:].double())
    assert relative_error(y[:, -100:], want) < 4e-3
    assert relative_error(dx[:, -100:], wanted) < 6e-3
    assert relative_error(dbias, y.detach().sum((0, 1), dtype=FLOAT)) < 1e-4

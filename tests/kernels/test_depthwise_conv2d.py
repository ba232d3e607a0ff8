"""The depthwise convolution of maps against float64, on every backend that runs here."""

import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mamba_zoo.kernels import depthwise_conv2d, refusals, use

from .problems import relative_error
from .test_cuda import ARCHITECTURES, gpu, needs_nvrtc

__all__ = ["gpu"]  # the fixture
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {FLOAT: 1e-5, BRAIN: 6e-3, HALF: 1e-3}
# Shapes: maps (b, h, w, d).
CASES: list[dict[str, Any]] = [
    {"shape": (2, 5, 7, 24)},
    {"shape": (2, 9, 8, 33), "activation": None},
    {"shape": (1, 1, 1, 1)},
    {"shape": (3, 2, 15, 100), "bias": False, "strided": True},
    {"shape": (2, 4, 5, 8), "size": (1, 3), "activation": None, "bias": False},
    {"shape": (2, 12, 3, 6), "size": (3, 1), "dtype": HALF, "strided": True},
    {"shape": (1, 3, 20, 17), "size": (1, 9), "dtype": BRAIN},
    {"shape": (2, 6, 6, 10), "size": (7, 7)},
    {"shape": (4, 14, 14, 96), "dtype": BRAIN, "weights": BRAIN, "bias": False},
    {"shape": (3, 28, 28, 40), "dtype": HALF, "weights": HALF},
    {"shape": (2, 16, 16, 130), "autocast": BRAIN},
    {"shape": (2, 7, 7, 1030), "autocast": HALF, "strided": True},
    {"shape": (2, 7, 9, 12), "frozen": ("weight", "bias")},
    {"shape": (2, 7, 9, 12), "frozen": ("weight", "bias"), "activation": None},
    {"shape": (2, 7, 9, 12), "frozen": ("x", "bias"), "dtype": BRAIN},
    {"shape": (0, 7, 9, 12)},
]


def make(device, shape, size=(3, 3), dtype=FLOAT, weights=FLOAT, bias=True, strided=False, frozen=(), **case) -> dict:
    """Tensors of a case, those that are not frozen with a gradient."""
    x = torch.randn(*shape[:-1], 2 * shape[-1]).chunk(2, -1)[1] if strided else torch.randn(shape)
    tensors = {"x": x.to(dtype), "weight": torch.randn(shape[-1], 1, *size).to(weights)}
    if bias:
        tensors["bias"] = torch.randn(shape[-1]).to(weights)
    if strided:  # a copy to the device or to another dtype would be contiguous
        wide = torch.zeros(*shape[:-1], 2 * shape[-1], device=device, dtype=dtype)
        wide.chunk(2, -1)[1].copy_(tensors["x"])
        tensors["x"] = wide.chunk(2, -1)[1]
    return {name: t.to(device).detach().requires_grad_(name not in frozen) for name, t in tensors.items()}


def check(device, backend, **case):
    torch.manual_seed(0)
    given, activation, autocast = make(device, **case), case.get("activation", "silu"), case.get("autocast")
    with torch.autocast(device.type, autocast) if autocast else nullcontext():
        y = depthwise_conv2d(**given, activation=activation, backend=backend)
    wanted = [name for name, t in given.items() if t.requires_grad]
    computed = autocast or case.get("dtype", FLOAT)
    exact = {name: t.detach().double().requires_grad_(name in wanted) for name, t in given.items()}
    size = given["weight"].shape[2:]
    expected = F.conv2d(
        exact["x"].movedim(-1, 1), exact["weight"], exact.get("bias"), padding=(size[0] // 2, size[1] // 2),
        groups=len(exact["weight"]),
    ).movedim(1, -1)  # fmt: skip
    if activation == "silu":
        expected = F.silu(expected)
    assert (y.dtype, y.shape) == (computed, expected.shape)
    seed = torch.randn_like(y).transpose(1, 2).contiguous().transpose(1, 2)
    ours = torch.autograd.grad(y, [given[name] for name in wanted], seed)
    theirs = torch.autograd.grad(expected, [exact[name] for name in wanted], seed.double())
    for name, a, b in (("y", y, expected), *zip(wanted, ours, theirs, strict=True)):
        if name != "y":
            assert (a.dtype, a.shape) == (given[name].dtype, given[name].shape), name
        if b.numel():
            assert relative_error(a, b) < TOLERANCE[computed], name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64(case, device):
    same = case.get("autocast") or case.get("weights", FLOAT) == case.get("dtype", FLOAT) or device.type == "cpu"
    check(device, "auto", **case)
    if same:
        check(device, "reference", **case)


def test_float64_compilers_and_second_gradients_are_left_to_torch(device):
    x = torch.randn(1, 3, 2, 2, device=device, dtype=torch.float64).requires_grad_()
    weight = torch.randn(2, 1, 3, 3, device=device, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: depthwise_conv2d(*t, activation="silu"), (x, weight))
    with use("reference"):
        assert torch.autograd.gradgradcheck(lambda *t: depthwise_conv2d(*t, activation="silu"), (x, weight))
    x, weight = x.detach().float(), weight.detach().float()
    found = torch.func.vmap(lambda t: depthwise_conv2d(t, weight))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(found[1], 2 * depthwise_conv2d(x, weight))
    with torch.device("meta"):
        assert depthwise_conv2d(torch.empty(2, 5, 4, 3), torch.empty(3, 1, 3, 3)).shape == (2, 5, 4, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 3, 8)}, ValueError, r"x has shape \(2, 3, 8\), expected maps \(b, h, w, d\)"),
        ({"x": torch.ones(2, 3, 3, 8).int()}, TypeError, "x must be of a floating-point dtype, not torch.int32"),
        ({"weight": torch.ones(8, 1, 2, 3)}, ValueError, r"expected \(8, 1, kh, kw\), kh and kw odd"),
        ({"weight": torch.ones(8, 8, 3, 3)}, ValueError, r"weight has shape \(8, 8, 3, 3\)"),
        ({"bias": torch.ones(7)}, ValueError, r"bias has shape \(7,\), expected \(8,\)"),
        ({"bias": [0.0]}, TypeError, "bias must be a tensor, not list"),
        ({"activation": "gelu"}, ValueError, "activation='gelu' is unknown"),
        ({"backend": "triton"}, ValueError, "backend='triton' has no depthwise_conv2d"),
        ({"backend": "fast"}, ValueError, "backend='fast' is unknown"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' cannot run here: it runs on NVIDIA GPUs, not on cpu"),
    ],
)  # fmt: skip
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=message):
        depthwise_conv2d(**{"x": torch.ones(2, 3, 3, 8), "weight": torch.ones(8, 1, 3, 3), **change})


def source(backward: bool, dtype: torch.dtype = BRAIN, width: int = 4, strip: int = 7) -> str:
    """The source of a pass with nine taps."""
    from mamba_zoo.kernels._cuda import depthwise_conv2d as launcher

    launch = (launcher.BACKWARD if backward else launcher.FORWARD)[strip]
    return launcher._source(backward, dtype, width, launch, 3, 3)


@needs_nvrtc
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_for_every_architecture(backward, arch):
    from mamba_zoo.kernels._cuda import nvrtc

    image, _ = nvrtc.compile_source(source(backward, HALF, 1, 4), arch)
    assert image[:4] == b"\x7fELF"


@needs_nvrtc
@pytest.mark.parametrize("strip", [7, 4])
@pytest.mark.parametrize("backward", [False, True])
def test_keeps_everything_in_registers(backward, strip):
    from mamba_zoo.kernels._cuda import nvrtc

    _, log = nvrtc.compile_source(source(backward, strip=strip), "sm_90", "--ptxas-options=-v")
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert spills
    assert all(pair == ("0", "0") for pair in spills), log


@pytest.mark.gpu
def test_more_taps_than_kernels_take(gpu):
    x, weight = torch.ones(1, 9, 9, 4, device=gpu), torch.ones(4, 1, 5, 5, device=gpu)
    with pytest.raises(ValueError, match=r"takes up to 9 taps, not \(5, 5\)"):
        depthwise_conv2d(x, weight, backend="cuda")
    assert float(depthwise_conv2d(x, weight)[0, 4, 4, 0]) == 25


@pytest.mark.gpu
def test_the_same_in_every_run(gpu):
    x, weight = torch.randn(32, 28, 28, 192, device=gpu, dtype=BRAIN), torch.randn(192, 1, 3, 3, device=gpu)
    x, weight, seed = x.requires_grad_(), weight.requires_grad_(), torch.randn_like(x)

    def solve():
        y = depthwise_conv2d(x, weight, activation="silu", backend="cuda")
        return y, *torch.autograd.grad(y, (x, weight), seed)

    first = solve()
    for _ in range(5):
        assert all(map(torch.equal, solve(), first))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(gpu):
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free device memory")
    x = torch.randn(700, 64, 64, 760, device=gpu, dtype=BRAIN).requires_grad_()
    weight = torch.randn(760, 1, 3, 3, device=gpu)
    y = depthwise_conv2d(x, weight, activation="silu", backend="cuda")
    (dx,) = torch.autograd.grad(y, x, y)
    last = x.detach()[-1:].double().requires_grad_()
    want = depthwise_conv2d(last, weight.double(), activation="silu", backend="reference")
    (wanted,) = torch.autograd.grad(want, last, y.detach()[-1:].double())
    assert relative_error(y[-1:], want) < TOLERANCE[BRAIN]
    assert relative_error(dx[-1:], wanted) < TOLERANCE[BRAIN]


@pytest.mark.gpu
def test_is_taken_on_a_gpu(gpu):
    if refusals("cuda", op="depthwise_conv2d")["cuda"] is not None:
        pytest.skip("this machine has no NVRTC")
    x = torch.randn(1, 9, 9, 4, device=gpu).requires_grad_()
    weight = torch.randn(4, 1, 3, 3, device=gpu)
    assert "DepthwiseConv" in type(depthwise_conv2d(x, weight).grad_fn).__name__
    found = torch.compile(depthwise_conv2d, backend="eager", fullgraph=True)(x, weight)
    torch.testing.assert_close(found, depthwise_conv2d(x, weight, backend="reference"), rtol=0, atol=0)

"""Calls that reach the kernels past torch's dispatcher, and those that are watched, come to the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mamba_zoo import kernels
from mamba_zoo.kernels import _triton, causal_conv1d, refusals, selective_scan
from mamba_zoo.kernels._order import trust_order
from mamba_zoo.kernels.add_norm import add_norm

from .problems import make_problem, solve


@pytest.mark.parametrize("final", [False, True])
def test_a_profiler_sees_the_op_and_changes_nothing(final):
    problem = make_problem(b=2, l=5, k=2, d=3, n=2, return_final_state=final)
    plain, seeds = solve(problem, backend="reference")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        seen, _ = solve(problem, seeds, backend="reference")
    names = {event.key for event in profile.key_averages()}
    assert {"mamba_zoo::selective_scan", "mamba_zoo::selective_scan_backward"} <= names
    assert plain.keys() == seen.keys()
    for name, value in plain.items():
        assert torch.equal(value, seen[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_registered_op_returns_a_tensor_for_what_was_not_asked_for(dtype):
    x, weight = torch.randn(1, 4, 3, dtype=dtype), torch.randn(1, 3, 2, dtype=dtype)
    order = torch.arange(4, dtype=torch.int32).expand(1, 1, 4)
    y, final = torch.ops.mamba_zoo.causal_conv1d(
        x, weight, None, order, None, None, False, True, False, "reference"
    )  # fmt: skip
    assert final.shape == (0,)
    assert final.dtype == torch.float32
    assert torch.equal(y, causal_conv1d(x, weight, backend="reference"))


def test_tokens_in_turn_need_no_table_whatever_mode_came_first():
    """The table is kept from call to call: one made without data, or for inference alone, would spoil the next."""
    x, weight = torch.randn(1, 41, 3), torch.randn(1, 3, 2, requires_grad=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        causal_conv1d(mode.from_tensor(x), mode.from_tensor(weight.detach()), backend="reference")
    with torch.inference_mode():
        expected = causal_conv1d(x, weight, backend="reference")
    y = causal_conv1d(x, weight, order=None, backend="reference")
    assert torch.equal(y, causal_conv1d(x, weight, order=torch.arange(41)[None], backend="reference"))
    assert torch.equal(y, expected)
    y.sum().backward()
    assert weight.grad is not None


def test_a_table_may_take_the_place_of_one_that_is_gone():
    """What is known of a table is found by its address, which the next table may have."""
    problem = make_problem(b=1, l=6, k=1, d=2, n=1, order=None)
    for _ in range(50):
        problem["order"] = torch.randperm(6)[None]
        selective_scan(**problem, backend="reference")
    problem["order"] = torch.tensor([[0, 1, 2, 3, 4, 9]])
    with pytest.raises(ValueError, match="order holds 9"):
        selective_scan(**problem, backend="reference")


@pytest.mark.parametrize("way", ["inference", "numpy", "trusted"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_table_that_is_written_to_unseen_reaches_no_kernel(dtype, way):
    """A write that autograd does not count is not checked either, so an index out of range must stay where it is."""
    problem = make_problem(b=1, l=8, k=1, d=2, n=1, order=None)
    with torch.inference_mode(way != "numpy"):
        order = torch.arange(8, dtype=dtype)[None]
        if way == "trusted":
            trust_order(order, 8)
        y = selective_scan(**{**problem, "order": order})
        (order.numpy() if way == "numpy" else order)[0, 3] = 2
        assert torch.equal(selective_scan(**{**problem, "order": order}), y)
        with pytest.raises(ValueError, match="order visits token 2 twice"):
            selective_scan(**{**problem, "order": order.clone()})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_table_that_is_written_to_is_read_again(dtype):
    problem = make_problem(b=1, l=8, k=1, d=2, n=1, order=None)
    order = torch.arange(8, dtype=dtype)[None]
    selective_scan(**{**problem, "order": order})
    order.copy_(order.flip(-1))
    y = selective_scan(**{**problem, "order": order})
    assert torch.equal(y, selective_scan(**{**problem, "order": torch.arange(8).flip(0)[None]}))
    order[0, 0] = 8
    with pytest.raises(ValueError, match="order holds 8"):
        selective_scan(**{**problem, "order": order})


@pytest.mark.parametrize("inference", [False, True])
def test_a_table_first_used_in_inference_mode_serves_training(inference):
    problem = make_problem(b=1, l=8, k=1, d=2, n=1, order=None)
    with torch.inference_mode(inference):
        order = torch.randperm(8, dtype=torch.int32)[None]
    with torch.inference_mode():
        expected = selective_scan(**{**problem, "order": order})
    u = problem.pop("u").requires_grad_()
    y = selective_scan(u, **{**problem, "order": order})
    assert torch.equal(y, expected)
    y.sum().backward()
    assert u.grad is not None


@pytest.mark.gpu
def test_a_graph_follows_a_table_that_is_one_of_its_inputs():
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    problem = make_problem(b=1, l=8, k=1, d=2, n=1, order=None, device="cuda")
    order = problem["order"] = torch.arange(8, dtype=torch.int32, device="cuda")[None]
    selective_scan(**problem)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        y = selective_scan(**problem)
    order.copy_(order.flip(-1))
    graph.replay()
    assert torch.equal(y, selective_scan(**{**problem, "order": order.clone()}))


@pytest.mark.gpu
def test_a_kernel_is_launched_again_only_for_what_it_was_compiled_for():
    """Widths, alignment and dtypes that Triton compiles apart, each launched twice, in turn."""
    if not torch.cuda.is_available() or refusals("cuda")["triton"]:
        pytest.skip("this machine has no CUDA device that Triton serves")
    memory = torch.randn(2**16, device="cuda")
    cases = list(itertools.product((1, 16, 48, 50), (0, 1, 4), (torch.float32, torch.float16)))
    for d, start, dtype in 2 * cases:
        x, weight = memory.to(dtype)[start : start + 6 * d].view(2, 3, d), memory[start : start + d]
        theirs = add_norm(x, weight, branch=x, backend="reference")
        for backend in ("triton", "auto"):
            ours = add_norm(x, weight, branch=x, backend=backend)
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def problem_of(op: str) -> dict[str, Any]:
    """The smallest problem of an op."""
    x = torch.randn(1, 4, 2)
    return {
        "selective_scan": {"u": x, "dt": x[:, :, None], "A": -torch.ones(1, 2, 1), "B": x[:, :, None, :1],
                           "C": x[:, :, None, :1], "D": torch.ones(1, 2)},
        "causal_conv1d": {"x": x, "weight": torch.ones(1, 2, 3), "bias": torch.ones(1, 2)},
        "ssd": {"x": x[:, :, None], "dt": x[:, :, None, :1], "A": -torch.ones(1, 1), "B": x[:, :, None, None],
                "C": x[:, :, None, None], "D": torch.ones(1, 1)},
        "add_norm": {"x": x, "weight": torch.ones(2), "bias": torch.ones(2)},
    }[op]  # fmt: skip


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d", "ssd", "add_norm"])
def test_wrong_kinds_of_arguments_are_named(op):
    """Kernels would read an address of another device, and cut off the fractions of what integers hold."""
    run, problem = getattr(kernels, op), problem_of(op)
    run(**problem)
    tokens, *_, last = problem
    with pytest.raises(TypeError, match=f"{tokens} must be a tensor, not ndarray"):
        run(**{**problem, tokens: problem[tokens].numpy()})
    with pytest.raises(TypeError, match="must be a tensor, not float"):
        run(**{**problem, last: 1.0})
    with pytest.raises(ValueError, match=rf"{last} is on meta, but {tokens} on cpu; move it there"):
        run(**{**problem, last: problem[last].to("meta")})
    whole = {k: v.long() if v.dim() > 2 and k not in ("A", "weight") else v for k, v in problem.items()}
    with pytest.raises(TypeError, match=rf"{tokens} must be of a floating-point dtype, not torch\.int64"):
        run(**whole)


class Sum(torch.nn.Module):
    """An op as a model."""

    def __init__(self, op: str, problem: dict[str, Any]):
        super().__init__()
        self.op, self.problem = op, problem

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = next(iter(self.problem))
        return getattr(kernels, self.op)(**{**self.problem, tokens: x}).sum()


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d", "ssd"])
def test_a_program_exported_without_gradients_has_the_same_gradient(op):
    problem = problem_of(op)
    model, x = Sum(op, problem), next(iter(problem.values()))
    with torch.no_grad():
        program: Any = torch.export.export(model, (x,)).module()
    (wanted,) = torch.autograd.grad(model(x.requires_grad_()), x)
    (found,) = torch.autograd.grad(program(x), x)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d", "ssd"])
def test_a_second_derivative_is_right_or_an_error(op):
    """Never a gradient that leaves the op out, as a penalty on gradients would have it beside other layers."""
    problem = problem_of(op)
    model, x = Sum(op, problem), next(iter(problem.values())).requires_grad_()
    (dx,) = torch.autograd.grad(model(x.sin()) + x.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()
    problem = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in problem.items()}
    model, x = Sum(op, problem), x.detach().double().requires_grad_()
    with kernels.use("reference"):
        assert torch.autograd.gradgradcheck(lambda x: model(x.sin()), (x,))


def test_parameters_and_results_are_floating_point():
    problem = problem_of("selective_scan")
    with pytest.raises(TypeError, match=r"A must be of a floating-point dtype, not torch\.complex64"):
        selective_scan(**{**problem, "A": problem["A"].to(torch.complex64)})
    with pytest.raises(TypeError, match="out_dtype must be of a floating-point dtype, not float32"):
        selective_scan(**problem, out_dtype="float32")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cu_seqlens must be an int32 or int64 tensor, not list"):
        selective_scan(**problem, cu_seqlens=[0, 4])  # type: ignore[arg-type]


def test_triton_is_left_out_where_it_could_not_build_its_launchers(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setattr(_triton.sys, "platform", "linux")
    _triton._missing.cache_clear()
    try:
        monkeypatch.setattr(_triton.sysconfig, "get_path", lambda *names: str(tmp_path))
        monkeypatch.setenv("CC", "gcc")
        monkeypatch.delenv("CPATH", raising=False)
        monkeypatch.delenv("C_INCLUDE_PATH", raising=False)
        assert "has no Python.h" in str(_triton.refuse("cuda", torch.float32))
        _triton._missing.cache_clear()
        monkeypatch.delenv("CC")
        monkeypatch.setattr(_triton.shutil, "which", lambda name: None)
        assert "install gcc or clang" in str(_triton.refuse("cuda", torch.float32))
        assert "install gcc or clang" in str(refusals("cuda", torch.float32, "ssd")["triton"])
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "Python.h").touch()
        monkeypatch.setenv("CC", "gcc")
        monkeypatch.setenv("CPATH", str(tmp_path / "elsewhere"))
        _triton._missing.cache_clear()
        assert _triton.refuse("cuda", torch.float32) is None
    finally:
        _triton._missing.cache_clear()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("way", ["dual numbers", "functional"])
def test_a_directional_derivative_is_an_error(way, learned):
    """Not zero without a word, whatever has a gradient in the other direction."""
    given = make_problem(b=1, l=5, k=2, d=3, n=4)
    u = given.pop("u")
    given["A"].requires_grad_(learned)

    def run() -> None:
        if way == "functional":
            torch.func.jvp(lambda u: selective_scan(u, **given), (u,), (u,))
        with torch.autograd.forward_ad.dual_level():
            selective_scan(torch.autograd.forward_ad.make_dual(u, u), **given)

    with pytest.raises((NotImplementedError, RuntimeError)):
        run()

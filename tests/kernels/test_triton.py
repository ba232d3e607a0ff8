"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for NVIDIA's machines.

The interpreter is chosen when triton is imported, so its cases run in a process of their own: this same file and those
of the norms and the MLP, started once more with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .compiled import compile_kernel, stack_bytes
from .problems import INTERPRETED, assert_agrees, make_problem, random_order, solve
from .test_add_norm import CASES as NORMS
from .test_causal_conv1d import check as check_convolution
from .test_causal_conv1d import random_order as random_visits
from .test_mlp import CASES as MLPS
from .test_ssd import assert_agrees as assert_dual_agrees
from .test_ssd import make_problem as make_dual

pytest.importorskip("triton", reason="triton is not installed")

SCANS: dict[str, dict[str, Any]] = {
    "two chunks and a tail, with state": {"b": 1, "l": 37, "k": 1, "d": 9, "n": 16, "state": True},
    "one state, several tiles": {"b": 2, "l": 19, "k": 2, "d": 5, "n": 1, "state": True},
    "odd states, empty steps, mean": {"l": 9, "n": 3, "order": "empty", "reduce": "mean", "state": True},
    "order per sample, sum in float32": {
        "l": 6, "n": 2, "order": "per sample", "reduce": "sum", "dtype": torch.bfloat16, "out_dtype": torch.float32,
    },
    "nothing optional": {
        "l": 7, "n": 1, "z": None, "bias": False, "skip": False, "softplus": False, "order": None,
        "dtype": torch.float16,
    },
    "own tokens and gates, strided": {
        "b": 1, "l": 6, "n": 2, "u_per_direction": True, "z": "per direction", "strided": True,
        "dtype": torch.bfloat16,
    },
    "packed, one sequence of two chunks": {
        "b": 1, "k": 2, "d": 3, "n": 2, "sequences": (0, 5, 0, 34, 0), "state": True,
    },
    "many states": {"b": 1, "l": 5, "k": 1, "d": 3, "n": 100},
    "channel blocks that share B and C": {"b": 1, "l": 9, "k": 1, "d": 40, "n": 4},
}  # fmt: skip
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "two tiles": {"b": 1, "l": 20, "k": 1, "d": 3, "activation": "silu"},
    "empty steps, float16": {"b": 1, "m": 12, "activation": None, "dtype": torch.float16},
    "skipped tokens, bfloat16": {"b": 1, "m": 5, "activation": "silu", "dtype": torch.bfloat16, "shared": False},
    "order per sample": {"m": 11, "per_sample": True, "activation": "silu"},
    "packed": {"b": 1, "rows": 4, "cuts": [0, 1, 1, 3, 9], "activation": "silu"},
    "one tap": {"w": 1, "activation": None, "b": 1},
    "seven taps, no state": {
        "b": 1,
        "w": 7,
        "l": 5,
        "k": 1,
        "activation": "silu",
        "use_bias": False,
        "use_state": False,
    },
}
DUALS: dict[str, dict[str, Any]] = {
    "chunks in segments, with state": {"b": 1, "l": 35, "k": 2, "h": 1, "g": 1, "state": True, "chunk_size": 16},
    "chunks in turn": {"b": 1, "l": 36, "k": 1, "h": 4, "g": 2, "p": 3, "n": 3, "chunk_size": 16},
    "decays of tokens, float16": {
        "b": 1, "l": 35, "k": 1, "h": 2, "g": 1, "decay": True, "x_per_direction": True, "dtype": torch.float16,
        "chunk_size": 16, "state": True,
    },
    "packed": {"b": 1, "k": 2, "h": 1, "g": 1, "sequences": (0, 3, 0, 20), "state": True, "chunk_size": 16},
    "empty steps, bfloat16, strided": {
        "b": 1, "l": 20, "k": 2, "h": 1, "g": 1, "order": "empty", "dtype": torch.bfloat16, "strided": True,
    },
    "order per sample, nothing optional": {
        "l": 9, "h": 1, "g": 1, "order": "per sample", "bias": False, "skip": None, "softplus": False,
        "out_dtype": torch.float32, "dtype": torch.float16,
    },
    "blocks of channels": {"b": 1, "l": 20, "k": 1, "h": 2, "g": 1, "p": 70, "n": 20, "skip": "channel"},
}  # fmt: skip

if INTERPRETED:

    @pytest.mark.parametrize("name", SCANS)
    def test_scan(name):
        problem = dict(SCANS[name])
        if problem.get("order") == "empty":
            problem["order"] = random_order(2, 9, m=7, empty=2)
        if problem.get("order") == "per sample":
            problem["order"] = random_order(2, 6, b=2)
        assert_agrees(make_problem(**problem), "triton")

    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_convolution(name):
        case = dict(CONVOLUTIONS[name])
        l, k, m, per_sample = case.get("l", 9), case.get("k", 2), case.pop("m", None), case.pop("per_sample", False)
        order = random_visits(k, l, l if m is None else m, b=2 if per_sample else None)
        check_convolution(torch.device("cpu"), case.pop("dtype", torch.float32), order, case.pop("activation"), **case)

    @pytest.mark.parametrize("name", DUALS)
    def test_dual(name, monkeypatch):
        from mamba_zoo.kernels._triton import ssd

        case = dict(DUALS[name])
        if name == "chunks in turn":  # as if the heads alone filled the device
            monkeypatch.setattr(ssd, "_PROGRAMS", 4)
            monkeypatch.setattr(ssd, "_plans", type(ssd._plans)())
        if case.get("order") == "empty":
            case["order"] = random_order(2, 20, m=15, empty=3)
        if case.get("order") == "per sample":
            case["order"] = random_order(2, 9, b=2)
        assert_dual_agrees(make_dual(**case), "triton")

    def test_deterministic():
        problem = make_problem(b=1, l=4, k=1, d=40, n=2)
        torch.use_deterministic_algorithms(True)
        try:
            first, seeds = solve(problem, backend="triton")
            second, _ = solve(problem, seeds, backend="triton")
            assert_agrees(problem, "triton")
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(first[key], second[key]) for key in first)

    def test_offsets_of_64_bits(monkeypatch):
        from mamba_zoo.kernels._triton import causal_conv1d, selective_scan, ssd

        for module in (causal_conv1d, selective_scan, ssd):
            monkeypatch.setattr(module, "needs_wide_offsets", lambda *tensors: True)
        assert_dual_agrees(make_dual(b=1, l=9, k=1, h=1, g=1, decay=True), "triton")
        assert_agrees(make_problem(b=1, l=5, k=1, d=3, n=2), "triton")
        check_convolution(torch.device("cpu"), torch.float32, None, "silu", l=3, b=1)

    @pytest.mark.parametrize(("n", "count"), [(100, 100), (64, 5), (1, 1)])
    def test_furthest_points(n, count):
        from mamba_zoo.backbones import _points
        from mamba_zoo.kernels._triton.furthest_points import furthest_points

        clouds = torch.randn(3, n, 3)
        clouds[1] = 0
        clouds[2] = clouds[2].round()  # with many equal distances
        assert torch.equal(furthest_points(clouds, count), _points.furthest_points(clouds, count))

    def test_the_interpreter_is_never_chosen():
        from mamba_zoo.kernels._backend import choose

        cpu = torch.device("cpu")
        assert choose("triton", cpu, torch.float32) == "triton"
        assert choose("auto", cpu, torch.float32) != "triton"

else:

    def test_kernels_agree_in_the_interpreter():
        # numpy's warning is about triton's own code.
        allow = "ignore:Conversion of an array with ndim:DeprecationWarning"
        files = [__file__, *(str(Path(__file__).with_name(f"test_{name}.py")) for name in ("add_norm", "mlp"))]
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-W", allow, "-p", "no:cacheprovider", *files],
            env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout[-3000:]
        count = len(SCANS) + len(CONVOLUTIONS) + len(DUALS) + len(NORMS) + len(MLPS) + 9
        assert f"{count} passed" in run.stdout, run.stdout[-500:]

    @pytest.mark.parametrize(("n", "arch"), [(1, 90), (16, 80), (16, 90)])
    def test_scan_keeps_its_states_in_registers(n, arch):
        from mamba_zoo.kernels._triton import selective_scan as host
        from mamba_zoo.kernels._triton._scan_backward import scan_backward
        from mamba_zoo.kernels._triton._scan_forward import scan_forward

        spacing = host.saved_spacing(n)
        common = {"SOFTPLUS": True, "N": n, "NP": n, "S": spacing, "V": 8, "VN": min(n, 8), "WIDE": False}
        absent = ("offsets", "initial")
        for kernel, shape, more, unused in (
            (scan_forward, host.FORWARD[n], {}, ("final",)),
            (scan_backward, host.BACKWARD[n], {"ATOMIC": True}, ("dfinal", "dinitial")),
        ):
            constants = {**common, "R": shape.groups, "DL": shape.lanes, "T": shape.steps, **more}
            compiled = compile_kernel(kernel, constants, arch, absent + unused, num_warps=shape.warps)
            assert stack_bytes(compiled) <= 8, kernel

    def test_convolution_compiles():
        from mamba_zoo.kernels._triton import _conv_kernels as kernels

        tile = {"W": 4, "T": 16, "BD": 64, "V": 8, "WIDE": False}
        state = {"W": 4, "BD": 64, "WIDE": False}
        plain, packed = ("offsets", "row_of", "initial"), ()
        for kernel, constants, absent in (
            (kernels.conv_forward, {**tile, "SILU": True}, plain),
            (kernels.conv_forward, {**tile, "SILU": True}, packed),
            (kernels.conv_backward_weight, {**tile, "SILU": True}, plain),
            (kernels.conv_backward_x, tile, ("offsets", "row_of", "dfinal")),
            (kernels.conv_final_state, state, packed),
            (kernels.conv_backward_state, state, packed),
        ):
            assert stack_bytes(compile_kernel(kernel, constants, 90, absent, num_warps=4)) == 0, kernel

"""Kernels that Triton compiles side by side, with its real compiler and a driver that is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# A process of its own: the driver stays, and in others Triton interprets.
CODE = """
import contextlib
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from mamba_zoo.kernels._triton import _launch
from tests.kernels.doubling import double, triple

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_active_torch_device(self): return torch.device("cpu")

class OnAGpu(torch.Tensor):
    is_cuda = True
    def get_device(self): return 0

driver.set_active(Driver())
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.is_current_stream_capturing = lambda: False
loaded, run = [], []
_launch._load = lambda device, kernel: loaded.append(kernel.metadata.name)
_launch.Launch.__call__ = lambda self, like, *tensors: run.append(self.kernel.fn.__name__)
x = torch.zeros(64).as_subclass(OnAGpu)

def launches():
    return [(_launch.Launch(kernel, 1, (3,), {"B": 64}), (x,)) for kernel in (double, triple)]
"""
SOUND = """
for _ in range(2):
    _launch.in_turn(x, *launches())
    assert sorted(loaded) == ["double", "triple"], loaded  # once
assert run == ["double", "triple"] * 2
"""
FAILING = """
double.device_caches[0]  # Triton finds its compiler here
compile = double.compile
def no_room(*args, **kwargs):
    raise OSError(28, "No space left on device")
double.compile = no_room
try:
    _launch.in_turn(x, *launches())
except OSError as error:
    assert "No space left" in str(error)
else:
    raise AssertionError("no error")
assert not run
double.compile = compile
double.warmup(x, 3, B=64, grid=(1,))  # Triton compiles as it did before
_launch.in_turn(x, *launches())
assert run == ["double", "triple"]
"""


@pytest.mark.parametrize("case", [SOUND, FAILING], ids=["sound", "failing"])
def test_kernels_are_compiled_once_and_errors_leave_nothing_behind(case, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", CODE + case]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""Whole models as CUDA graphs: the host queues one replay instead of hundreds of kernels."""

from __future__ import annotations

import gc
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

_WARMUP = 3  # calls before recording: libraries choose their kernels, orders of visits are checked


def capture(model: nn.Module, most: int = 4) -> Captured:
    """The model as CUDA graphs; see `Captured`.

    >>> fast = mamba_zoo.capture(model.cuda().eval())
    >>> fast(images)  # recorded at the first batch of this shape, replayed after that
    """
    return Captured(model, most)


class Captured(nn.Module):
    """A model that is recorded as a CUDA graph for every kind of input it is given, and replayed from then on.

    A replay costs the host a few microseconds a parameter, where a call from Python costs that for every operation:
    worth it where the device waits for the host, as with small batches, small models or fast GPUs. Every call with
    inputs of a shape, dtype, autocast and mode seen before is a replay. Results are the same, random numbers are fresh
    in every replay, and changes of the weights in place, as optimizers make them, are seen. With gradients, forward and
    backward are recorded: the memory that the backward pass reads is that of the last call, so it has to run before the
    next call with inputs of this kind. On a CPU the model is simply called.

    Args:
        model: Any model whose work does not depend on the values of its inputs. Its parameters are shared.
        most: Kinds of input that are kept; the one not used for longest is dropped. Each holds the memory of a call.

    Raises:
        RuntimeError: from a call, if the model cannot be recorded, for example because it waits for the GPU; from a
            backward pass that comes after the next call.
        ValueError: `most` is below 1.
    """

    def __init__(self, model: nn.Module, most: int = 4):
        super().__init__()
        if most < 1:
            raise ValueError(f"most={most} must be at least 1")
        self.model, self.most = model, most
        self._recorded: OrderedDict[tuple, _Recording] = OrderedDict()

    def forward(self, *inputs: Tensor) -> Any:
        """As the model's, with tensors only."""
        if not inputs or any(not isinstance(x, Tensor) or not x.is_cuda for x in inputs):
            return self.model(*inputs)
        amp = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        graded = torch.is_grad_enabled()
        kinds = tuple((x.shape, x.stride(), x.dtype, x.device, graded and x.requires_grad) for x in inputs)
        key = (kinds, amp, graded, self.model.training)
        found = self._recorded.get(key)
        if found is None or found.is_stale():
            found = self._recorded[key] = self._record(inputs, amp, graded)
            while len(self._recorded) > self.most:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        return found.replay(*inputs)

    def reset(self) -> None:
        """Forget what was recorded: needed after parameters were replaced by other objects, and frees the memory."""
        self._recorded.clear()

    def _record(self, inputs: tuple[Tensor, ...], amp: tuple[bool, torch.dtype], graded: bool) -> _Recording:
        buffers = {name: x.clone() for name, x in self.model.named_buffers()}
        try:
            # Autocast around the model alone: it would cast what the backward pass multiplies as well.
            with _nothing_collected(), torch.inference_mode(False), torch.autocast("cuda", enabled=False):
                replay = (_with_gradients if graded else _without_gradients)(_Shell(self.model, amp), inputs)
        except RuntimeError as error:
            _leave_recording(inputs[0].device)
            raise RuntimeError(
                f"{type(self.model).__name__} cannot be recorded as a CUDA graph ({error}); call it as it is"
            ) from error
        # The calls before recording were not the user's.
        with torch.no_grad():
            for name, x in self.model.named_buffers():
                x.copy_(buffers[name])
        return _Recording(self.model, replay)


class _Recording:
    """A recorded call, and the state of the model that it is a call of."""

    def __init__(self, model: nn.Module, replay: Callable[..., Any]):
        self.replay = replay
        self._weights, self._parts = [*model.parameters(), *model.buffers()], list(model.modules())
        self._before = self._state()

    def is_stale(self) -> bool:
        """Whether weights have moved (`model.to`), were frozen or thawed, or parts or torch are in another mode."""
        return self._state() != self._before

    def _state(self) -> tuple:
        return (
            [(x.data_ptr(), x.requires_grad) for x in self._weights],
            [part.training for part in self._parts],
            torch.are_deterministic_algorithms_enabled(),
        )


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """No garbage is collected meanwhile: a graph that is freed while another is recorded would spoil that one."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Shell(nn.Module):
    """A model of its own, under autocast or not, whose `forward` can be replaced."""

    def __init__(self, model: nn.Module, amp: tuple[bool, torch.dtype]):
        super().__init__()
        self.model, self.amp = model, amp
        self.training = model.training  # its own alone: parts of the model may be in another mode

    def forward(self, *inputs: Tensor) -> Any:
        enabled, dtype = self.amp
        # The cast weights that autocast remembers would not belong to the graph.
        with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
            return self.model(*inputs)


def _with_gradients(shell: _Shell, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    samples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
    with warnings.catch_warnings():
        # torch keeps the graph of its calls before recording, made on another stream.
        warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
        graphed: Any = torch.cuda.make_graphed_callables(
            shell, samples, num_warmup_iters=_WARMUP, allow_unused_input=True
        )
    calls = 0

    def replay(*given: Tensor) -> Any:
        nonlocal calls
        calls += 1
        mine = calls

        def check(grad: Tensor) -> None:
            if calls != mine:
                raise RuntimeError(
                    "the backward pass of a captured model came after its next call, which has overwritten what it "
                    "needs; run it before that call, or call the model itself"
                )

        def own(x: Any) -> Any:  # not the memory that the next replay writes to
            if not isinstance(x, Tensor):
                return x
            x = x.clone()
            if x.requires_grad:
                x.register_hook(check)
            return x

        return tree_map(own, graphed(*given))

    return replay


def _leave_recording(device: torch.device) -> None:
    """After a recording that failed: torch's random numbers stay in it until another one has succeeded."""
    with suppress(RuntimeError), torch.cuda.device(device), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=device)


def _without_gradients(shell: _Shell, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    held = tuple(x.clone() for x in inputs)
    with torch.no_grad():
        stream = torch.cuda.Stream(held[0].device)
        stream.wait_stream(torch.cuda.current_stream(held[0].device))
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP):
                shell(*held)
        torch.cuda.current_stream(held[0].device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = shell(*held)

    def replay(*given: Tensor) -> Any:
        with torch.no_grad():
            for mine, theirs in zip(held, given, strict=True):
                mine.copy_(theirs)
            graph.replay()
            return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, out)

    return replay

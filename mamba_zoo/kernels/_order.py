"""Visiting orders as the kernels read them: checked once, int32, one table per sample and direction."""

from __future__ import annotations

import weakref
from functools import lru_cache

import torch
from torch import Tensor

_LONGEST_KEPT = 2**20  # tokens
# id of an order tensor -> the tensor and {(device, l): (version, int32 table, every token visited?)}. Reading the
# values of a table on a GPU waits for the device, so each tensor is read once, not once a layer. The table is a copy:
# a write that leaves no trace, through NumPy or in inference mode, must not reach a kernel unread. (Torch's dictionary
# of weak keys takes twice as long to look in.)
_checked: dict[int, tuple[weakref.ref[Tensor], dict]] = {}


def prepare_order(order: Tensor | None, b: int, l: int, k: int, device: torch.device) -> tuple[Tensor, bool]:
    """The table `(1 | b, k, m)` int32 on `device`, and whether each direction is known to visit all `l` tokens.

    Args:
        order: `(k, m)` or `(b, k, m)` integers; token index, or -1 for an empty step. None: each direction 0..l-1.
        b: Samples.
        l: Tokens.
        k: Directions.
        device: Where the tokens are.

    Raises:
        TypeError: `order` is not an integer tensor.
        ValueError: wrong shape, an index outside -1..l-1, or a token visited twice by one direction.
    """
    if order is None:
        return _in_turn(l, device).expand(1, k, l), True
    if not isinstance(order, Tensor) or order.dtype not in (torch.int32, torch.int64):
        found = order.dtype if isinstance(order, Tensor) else type(order).__name__
        raise TypeError(f"order must be an int32 or int64 tensor, not {found}; pass scan.order of a Scan")
    if order.dim() not in (2, 3) or order.shape[-2] != k or (order.dim() == 3 and order.shape[0] not in (1, b)):
        raise ValueError(
            f"order has shape {tuple(order.shape)}, but dt has {k} directions and u {b} samples; "
            f"give ({k}, m) or ({b}, {k}, m)"
        )
    if torch.compiler.is_compiling() or order.is_meta or _is_fake(order):
        return _unchecked(order, device), False
    known = _known(order)
    entry = known.get((device, l))
    if entry is None or entry[0] != _version(order):
        if _capturing(device):
            return _unchecked(order, device), False
        table = _copied(order, device)  # before the check, which waits for it: other streams may read it next
        entry = known[device, l] = (_version(order), table, _check_values(order, l))
    elif order.dtype == torch.int32 and order.device == device and _capturing(device):
        return _unchecked(order, device), entry[2]  # a graph reads its inputs where they lie, at every replay
    return entry[1], entry[2]


def _in_turn(l: int, device: torch.device) -> Tensor:
    """Tokens 0..l-1. The table is kept: making it on a GPU is a launch for every call of every layer."""
    passing = (
        l > _LONGEST_KEPT
        or torch.compiler.is_compiling()
        or device.type == "meta"
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or _capturing(device)
    )
    if passing:
        return torch.arange(l, dtype=torch.int32, device=device)
    return _in_turn_kept(1 << (l - 1).bit_length(), device)[:l]


@lru_cache(maxsize=256)
def _in_turn_kept(l: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference mode could not be saved for a gradient later
        table = torch.arange(l, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams will read it, and do not wait for this one
    return table


def trust_order(order: Tensor, l: int) -> None:
    """Note that every row of `order` is a permutation of the `l` tokens, so that its values need not be read.

    For tables made by a sort, anew for every batch: reading one from a GPU waits for the device.
    """
    if order.is_meta or _is_fake(order):
        return
    known = _known(order)
    known[order.device, l] = (_version(order), _copied(order, order.device), True)


def _known(order: Tensor) -> dict:
    """What has been found out about a table; forgotten with the tensor."""
    place = id(order)
    found = _checked.get(place)
    if found is None or found[0]() is not order:
        found = _checked[place] = (weakref.ref(order, lambda _: _checked.pop(place, None)), {})
    return found[1]


def _version(order: Tensor) -> int:
    """How often the table was written to, as far as autograd knows; tables made in inference mode do not count it."""
    return -1 if order.is_inference() else order._version


def _copied(order: Tensor, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference mode could not be saved for a gradient later
        table = order.detach().to(device, torch.int32, copy=True, memory_format=torch.contiguous_format)
    return table if table.dim() == 3 else table[None]


def _unchecked(order: Tensor, device: torch.device) -> Tensor:
    table = order.to(device=device, dtype=torch.int32)
    return (table if table.dim() == 3 else table[None]).contiguous()


def pack_order(table: Tensor, cu_seqlens: Tensor, l: int) -> tuple[Tensor, Tensor]:
    """Sort each direction by sequence, keeping its order within each.

    Every sequence of a packed batch then owns a run of steps, whatever the order was: a reversed table, or one that
    hops between sequences, visits each sequence exactly as if it were alone.

    Args:
        table: `(1, k, m)` int32 from `prepare_order`.
        cu_seqlens: `(s + 1,)` token boundaries, `0 = cu_seqlens[0] <= ... <= cu_seqlens[s] = l`.
        l: Tokens.

    Returns:
        The sorted table `(1, k, m)` and the step boundaries of each sequence, `(k, s + 1)` int32.
    """
    cuts = cu_seqlens.to(table.device)
    sequence = torch.searchsorted(cuts[1:].contiguous(), table[0].to(cuts.dtype), right=True)
    sequence, steps = sequence.sort(dim=-1, stable=True)
    bounds = torch.arange(len(cuts), device=table.device, dtype=sequence.dtype).expand(len(sequence), -1)
    offsets = torch.searchsorted(sequence.contiguous(), bounds.contiguous())
    return table.gather(-1, steps[None]).contiguous(), offsets.to(torch.int32).contiguous()


def _check_values(order: Tensor, l: int) -> bool:
    """Raise on a bad table; return whether each direction visits every token."""
    values = order.detach().cpu()
    low, high = (int(values.min()), int(values.max())) if values.numel() else (0, -1)
    if low < -1 or high >= l:
        raise ValueError(
            f"order holds {low if low < -1 else high}, but token indices run from 0 to {l - 1} (-1 for an empty step)"
        )
    ordered = values.sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if twice.any():
        where = [int(i) for i in twice.nonzero()[0]]
        token = int(ordered[(*where[:-1], where[-1] + 1)])
        raise ValueError(f"order visits token {token} twice in direction {where[-2]}; each direction may visit it once")
    return values.shape[-1] == l and low >= 0


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

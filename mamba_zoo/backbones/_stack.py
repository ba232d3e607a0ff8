"""A stack of causal add-norm-mix blocks: run on whole inputs, or along a stream in memory that does not grow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from ._block import AddNormBlock, add_residual
from ._decay import undecayed

State: TypeAlias = list[Any]  # what each mixer keeps


class CausalStack(nn.Module):
    """Embed, blocks, norm, head; every output depends on its own input and on those before it.

    A subclass makes its input layer, calls `super().__init__`, and says in `embed_inputs` and `head` what comes before
    and after the blocks. Memory and time grow with the length of the input; through `extend` or `step`, in chunks or
    one after another, memory stays the same, and the outputs are those of `forward`.

    Args:
        blocks: Their mixers have `init_state`, `extend` and `step`, if the stack is to be streamed.
        norm: The final norm.
    """

    head: Callable[[Tensor], Tensor]  # features (..., dim) to outputs

    def __init__(self, blocks: Iterable[AddNormBlock], norm: nn.Module) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def embed_inputs(self, x: Tensor) -> Tensor:
        """Inputs to the first hidden tokens `(..., dim)`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Whole inputs `(b, l, ...)` to outputs `(b, l, ...)`."""
        return self.head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Whole inputs `(b, l, ...)` to normed features `(b, l, dim)`."""
        hidden, residual = self.embed_inputs(x), None
        for block in self.blocks:
            given = (hidden, residual, None)
            pair: Any = checkpoint(block, *given) if self.grad_checkpointing else block(*given)
            hidden, residual = pair
        return self._normed(hidden, residual)

    def init_state(self, batch: int) -> State:
        """The memory of `batch` streams before their first input."""
        return first_state(self.blocks, batch)

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """The next inputs of a stream `(b, l, ...)` to their outputs and the new state."""
        return self._advance(x, state, "extend")

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """`extend` for one input of each stream, `(b, ...)` to `(b, ...)`."""
        return self._advance(x, state, "step")

    def no_weight_decay(self) -> set[str]:
        """Full names of the parameters that decay should leave alone, see `undecayed`."""
        return undecayed(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise learning rates."""
        return {"stem": r"^embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm|^head", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def _advance(self, x: Tensor, state: State, how: str) -> tuple[Tensor, State]:
        hidden, residual, new = advance(self.blocks, self.embed_inputs(x), state, how)
        return self.head(self._normed(hidden, residual)), new

    def _normed(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        return self.norm(add_residual(hidden, residual)).to(hidden.dtype)


def first_state(blocks: Iterable[nn.Module], batch: int) -> State:
    """What the mixers of causal blocks keep of `batch` streams before their first input."""
    return [_mixer(block).init_state(batch) for block in blocks]


def advance(blocks: Iterable[nn.Module], hidden: Tensor, state: State, how: str) -> tuple[Tensor, Tensor | None, State]:
    """The next tokens of a stream through causal blocks: what they put out, the residual stream, the new state.

    Args:
        blocks: Add-norm-mix blocks.
        hidden: `(b, l, dim)`, or `(b, dim)` for one token.
        state: Of `first_state`, or returned by the call before.
        how: "extend", or "step" for one token.
    """
    residual, new = None, []
    for block, memory in zip(blocks, state, strict=True):
        residual = add_residual(hidden, residual)
        tokens = block.get_submodule("norm")(residual).to(hidden.dtype)
        hidden, after = getattr(_mixer(block), how)(tokens, memory)
        new.append(after)
    return hidden, residual, new


def _mixer(block: nn.Module) -> Any:
    return block.get_submodule("mixer")

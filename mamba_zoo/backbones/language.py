"""Language models of plain Mamba and Mamba-2 blocks (arXiv:2312.00752, arXiv:2405.21060).

Follows the arithmetic of state-spaces/mamba@e9594ce1c732 mamba_ssm/models/mixer_seq_simple.py (Apache-2.0).
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from . import mamba, mamba2, mamba3
from ._block import AddNormBlock, RMSNorm
from ._keys import Key, rename
from ._mamba2 import Mamba2
from ._mamba3 import Mamba3
from ._mixer import Mamba
from ._register import Card, build_model, register
from ._stack import CausalStack

MIXERS = {"mamba": Mamba, "mamba2": Mamba2, "mamba3": Mamba3}
_MULTIPLE = {"mamba": 8, "mamba2": 16, "mamba3": 16}


class MambaLM(CausalStack):
    """Words to scores of the next word: embedding, blocks, norm, and the embedding once more as the output map.

    Memory and time grow with the length of the text; through `extend` or `step`, in chunks or one word after another,
    memory stays the same, and the scores are those of `forward`.

    Args:
        vocab_size: Words; rounded up to the multiple that the published models are padded to, or to `pad_vocab_to`.
        dim: Width.
        depth: Blocks.
        mixer: "mamba", "mamba2" or "mamba3".
        d_state: States n; None is the mixer's default.
        pad_vocab_to: The vocabulary is rounded up to a multiple of this; None is 8 for Mamba and 16 for the others.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: an unknown mixer.
    """

    def __init__(
        self,
        vocab_size: int = 50277,
        dim: int = 768,
        depth: int = 24,
        mixer: str = "mamba",
        d_state: int | None = None,
        pad_vocab_to: int | None = None,
        device=None,
        dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        if mixer not in MIXERS:
            raise ValueError(f"mixer={mixer!r} is unknown; choose one of {', '.join(MIXERS)}")
        multiple = pad_vocab_to or _MULTIPLE[mixer]
        states: Any = {} if d_state is None else {"d_state": d_state}
        super().__init__(
            (AddNormBlock(dim, MIXERS[mixer](dim, **states, **dd), **dd) for _ in range(depth)), RMSNorm(dim, **dd)
        )
        self.num_features = dim
        self.embedding = nn.Embedding(-(-vocab_size // multiple) * multiple, dim, **dd)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, (Mamba, Mamba2, Mamba3)):
                nn.init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
                with torch.no_grad():
                    module.out_proj.weight /= math.sqrt(depth)

    def embed_inputs(self, x: Tensor) -> Tensor:
        """Integers `(b, l)` to tokens `(b, l, dim)`."""
        return self.embedding(x)

    def head(self, features: Tensor) -> Tensor:
        """Features `(..., dim)` to scores `(..., vocabulary)`."""
        return nn.functional.linear(features, self.embedding.weight)


_LAYERS = {"mamba": mamba.KEYS, "mamba2": mamba2.KEYS, "mamba3": mamba3.KEYS}
KEYS = [
    Key(r"^backbone\.embeddings?\.", "embedding."),
    Key(r"^backbone\.norm_f\.", "norm."),
    Key(r"^backbone\.layers\.", "blocks."),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict in our names, of `state-spaces/mamba*` or of its Hugging Face conversion.

    The output map is the embedding; files that hold it twice must hold the same twice.

    Raises:
        ValueError: the two differ.
    """
    state = dict(state_dict)
    head = state.pop("lm_head.weight", None)
    embedding = next((t for key, t in state.items() if re.match(r"backbone\.embeddings?\.", key)), None)
    if head is not None and (embedding is None or not torch.equal(head, embedding)):
        raise ValueError("lm_head.weight differs from the embedding, but this model uses one for both")
    mixer = next((name for name, cls in MIXERS.items() if isinstance(_first_mixer(model), cls)), "mamba")
    inside = [
        Key(r"^(blocks\.\d+\.mixer\.)" + key.pattern.removeprefix("^"), rf"\1{key.name}", key.slot, key.convert)
        for key in _LAYERS[mixer]
    ]
    return rename(state, [*KEYS, *inside])


def _first_mixer(model: nn.Module) -> nn.Module | None:
    return model.blocks[0].mixer if isinstance(model, MambaLM) else None  # type: ignore[return-value]


def _card(name: str, paper: str, params: int) -> Card:
    return Card(
        "sequence",
        "state-spaces/mamba@e9594ce1c732 mamba_ssm/models/mixer_seq_simple.py",
        "Apache-2.0",
        paper,
        params,
        checkpoint="pytorch_model.bin",
        url=f"https://huggingface.co/state-spaces/{name}/resolve/main/pytorch_model.bin",
        notes="Words are those of the GPT-NeoX tokenizer, which is not part of this package.",
    )


@register(_card("mamba-130m", "2312.00752", 129_135_360), num_classes=-1, input_size=None)
def mamba_130m(pretrained: bool = False, **kwargs: Any) -> MambaLM:
    """Mamba-130M, a language model trained on the Pile: 129 M parameters."""
    return build_model(MambaLM, "mamba_130m", pretrained, checkpoint_filter_fn, **kwargs)


@register(_card("mamba2-130m", "2405.21060", 128_989_632), num_classes=-1, input_size=None)
def mamba2_130m(pretrained: bool = False, **kwargs: Any) -> MambaLM:
    """Mamba2-130M, a language model trained on the Pile: 129 M parameters."""
    return build_model(MambaLM, "mamba2_130m", pretrained, checkpoint_filter_fn, **{"mixer": "mamba2", **kwargs})

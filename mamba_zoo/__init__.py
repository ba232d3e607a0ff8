"""A zoo of Mamba and state-space models; importing it registers every model with timm.

>>> import mamba_zoo
>>> model = mamba_zoo.create_model("vmamba_tiny", num_classes=10, scan="hilbert", device="meta")
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._capture import capture
from ._factory import ModelCard, create_model, list_models, model_card, register_all

if TYPE_CHECKING:
    from . import analysis, compare, doctor, kernels, scans, tasks

__version__ = "0.1.0"
__all__ = [
    "ModelCard",
    "__version__",
    "analysis",
    "capture",
    "compare",
    "create_model",
    "doctor",
    "kernels",
    "list_models",
    "model_card",
    "scans",
    "tasks",
]

# Imported on first use: some of them bring Lightning, Matplotlib or a compiler along.
_LAZY = {name: f".{name}" for name in ("analysis", "compare", "doctor", "kernels", "scans", "tasks")}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(_LAZY[name], __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


register_all()

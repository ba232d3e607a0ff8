"""What was found out about a module, kept with it."""

from __future__ import annotations

from threading import RLock
from typing import Any

from torch import nn


class Findings(dict[Any, Any]):
    """Of one module: freed with it whatever they refer to, and neither copied nor pickled along with it.

    A dictionary of weak keys would keep a module for ever whose layers have a hook that refers to it.
    """

    def __init__(self, modules: dict[str, Any] | None = None):
        super().__init__()
        self.modules, self.lock = modules, RLock()

    def __reduce__(self) -> tuple[type[Findings], tuple[()]]:
        return Findings, ()


def findings(module: nn.Module) -> Findings:
    """Those of `module`; replicas of it, which share all attributes but their layers, have their own."""
    found = module.__dict__.get("_findings")
    if found is None or found.modules is not module._modules:
        found = module.__dict__["_findings"] = Findings(module._modules)
    return found

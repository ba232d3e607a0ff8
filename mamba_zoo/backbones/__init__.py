"""Architectures, each registered with timm when this package is imported."""

from . import mamba, mambavision, plainmamba, videomamba, vim, vmamba
from ._register import Card, card, cards

__all__ = ["Card", "card", "cards", "mamba", "mambavision", "plainmamba", "videomamba", "vim", "vmamba"]

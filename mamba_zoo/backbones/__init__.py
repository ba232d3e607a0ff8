"""Architectures, each registered with timm when this package is imported."""

from . import mamba, mambavision, plainmamba, videomamba, vim, vmamba
from ._fbank import FRONT_ENDS, FilterBank, FrontEnd, MelSpectrogram, front_end
from ._register import Card, card, cards
from ._streaming import stream

__all__ = [
    "FRONT_ENDS",
    "Card",
    "FilterBank",
    "FrontEnd",
    "MelSpectrogram",
    "card",
    "cards",
    "front_end",
    "mamba",
    "mambavision",
    "plainmamba",
    "stream",
    "videomamba",
    "vim",
    "vmamba",
]

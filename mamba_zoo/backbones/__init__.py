"""Architectures, each registered with timm when this package is imported."""

from . import vmamba

__all__ = ["vmamba"]

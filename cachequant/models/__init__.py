"""Adapters: what only they know is a model's structure."""

from cachequant.models.adapter import adapter

__all__ = ["adapter"]

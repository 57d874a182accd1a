"""The frozen language model: the layers that adapters change, and the logits with these changes."""

from bora_pyro.backbone.backbone import BUILTIN_BASES, Backbone, Change

__all__ = ["BUILTIN_BASES", "Backbone", "Change"]

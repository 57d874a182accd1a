"""The frozen language model: its target layers, and its logits with the outputs of those layers changed."""

from bora_pyro.backbone.backbone import BUILTIN_BASES, Backbone, Change

__all__ = ["BUILTIN_BASES", "Backbone", "Change"]

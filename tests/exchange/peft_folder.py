"""The names within a PEFT folder."""

from __future__ import annotations

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.model.decoder.layers.1.self_attn.q_proj.lora_{}.weight"

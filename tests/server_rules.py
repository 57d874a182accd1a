"""What two servers of LoRA adapters ask of a folder, restated from their sources, neither of which is installed here.

vLLM: ``vllm/lora/peft_helper.py`` (``PEFTHelper.from_dict``, ``_validate_features``, ``validate_legal``), ``vllm/lora/utils.py``
(``parse_fine_tuned_lora_name``), ``vllm/lora/lora_model.py`` (``from_local_checkpoint``: which modules are expected),
``vllm/plugins/lora_resolvers/filesystem_resolver.py`` (adapters by name in one folder).

LoRAX: ``server/lorax_server/adapters/lora.py`` (``LoraConfig.load``, ``map_weights_for_model``, ``LoraWeights.load``),
``server/lorax_server/utils/adapter.py`` (``load_module_map``), and the layers of each model in
``server/lorax_server/models/flash_gpt2.py`` and ``flash_llama.py``.
"""

from __future__ import annotations

import json
import os

from safetensors.torch import load_file

#: Layers that LoRAX can adapt, by architecture: the path of the blocks, and the paths within one.
LORAX_LAYERS = {
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "llama": (
        "model.layers",
        [*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))],
    ),
}
# Keys of the LoraConfig of PEFT 0.4: an older PEFT inside a server refuses keys that it does not know.
OLD_KEYS = {
    "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r", "revision",
    "target_modules", "task_type",
}  # fmt: skip


def vllm_resolves(folder, name, *, base_model):
    """The path of the adapter that a request names, as the file system resolver finds it, or None."""
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, name))
    if os.path.isabs(name) or os.path.commonpath([root, path]) != root:
        return None
    file = os.path.join(path, "adapter_config.json")
    if not os.path.exists(file):
        return None
    with open(file) as opened:
        config = json.load(opened)
    return path if config["peft_type"] == "LORA" and config["base_model_name_or_path"] == base_model else None


def vllm_problems(folder, *, linear, max_lora_rank=16):
    """What vLLM would refuse; ``linear`` are the paths of the base's linear layers."""
    config = json.loads((folder / "adapter_config.json").read_text())
    problems = [f"no {name}" for name in ("r", "lora_alpha", "target_modules") if name not in config]
    if config.get("modules_to_save"):
        problems.append("modules_to_save")
    if config.get("use_dora", False):
        problems.append("DoRA")
    if config["r"] > max_lora_rank:
        problems.append(f"rank {config['r']}")
    if config.get("bias", "none") != "none":
        problems.append("bias")
    expected = {path.rsplit(".", 1)[-1] for path in linear}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = name.split(".")
        if not (parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B")):
            problems.append(f"unsupported LoRA weight {name}")
            continue
        module = ".".join(parts[2 if name.startswith("base_model.model.") else 0 : -2])
        if module.rsplit(".", 1)[-1] not in expected or module not in linear:
            problems.append(f"unexpected module {module}")
        if tensor.shape[0 if parts[-2] == "lora_A" else 1] != config["r"]:
            problems.append(f"rank of {name}")
    return problems


def lorax_problems(folder, architecture, *, layers):
    """What LoRAX would refuse or, silently, leave out; ``layers`` is how many blocks the base has."""
    config = json.loads((folder / "adapter_config.json").read_text())
    problems = [f"key {name}" for name in config if name not in OLD_KEYS]
    state = load_file(folder / "adapter_model.safetensors")
    blocks, kinds = LORAX_LAYERS[architecture]
    used = set()
    for kind in kinds:
        names = [
            {factor: f"base_model.model.{blocks}.{layer}.{kind}.lora_{factor}.weight" for factor in "AB"}
            for layer in range(layers)
        ]
        found = [pair for pair in names if all(name in state for name in pair.values())]
        if found and len(found) < layers:
            problems.append(f"{kind} of some layers only, which drops it from all")
        used |= {name for pair in found for name in pair.values()}
    return problems + [f"unused {name}" for name in state if name not in used]

"""What loading a base model needs besides transformers: quantisation, devices, and checks of what is loaded.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> _ = (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "facebook/opt-350m"}')
>>> check_no_adapter(folder)
Traceback (most recent call last):
bora_pyro.errors.InputError: base model '...' is an adapter of 'facebook/opt-350m'; give that as the base, or merge ...
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from bora_pyro.backbone.configuration import model_type
from bora_pyro.errors import InputError, check_one_of, shown
from bora_pyro.files.regular import read_regular

#: Quantisations of a base's linear layers: bitsandbytes' NormalFloat4 and LLM.int8().
QUANTIZATIONS = ("4bit", "8bit")
#: Values of ``device_map`` with which transformers itself distributes the layers over the devices.
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")

#: The largest adapter configuration, in bytes, that is read to find the name of its base.
CONFIG_BYTES = 2**20


def check_no_adapter(name: str | Path) -> None:
    """Check that a base is not an adapter and has no adapter in its folder.

    transformers would silently load another base, the one that the adapter names, with the adapter merged into it.

    Args:
        name: a folder or a hub id. Other names pass: loading the base reports them.

    Raises:
        InputError: the folder or repository has an ``adapter_config.json``.
        OSError: the hub has no such repository.
    """
    file = find_adapter_config_file(str(name))
    if file is None:
        return
    try:
        base = json.loads(read_regular(Path(file), most=CONFIG_BYTES))["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        base = None
    of, give = (f" of {shown(base)}", "that") if isinstance(base, str) and base else ("", "the one that it was trained on")
    raise InputError(
        f"base model {str(name)!r} is an adapter{of}; give {give} as the base, or merge the adapter into its base and take "
        "adapter_config.json out of the folder"
    )


def check_causal(name: str | Path, place: str | Path | None = None, **arguments: Any) -> None:
    """Check by its configuration that a base is a causal language model.

    Args:
        name: a folder or a hub id.
        place: where its files are; default: ``name``.
        arguments: further arguments of ``from_pretrained``.

    Raises:
        InputError: it is of another type: encoder-decoder, encoder, image model, ...
        OSError: there is no such base, or it has no configuration.
    """
    config = AutoConfig.from_pretrained(place or name, **arguments)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    built = f" (a {', '.join(config.architectures)})" if config.architectures else ""
    kind = "an encoder-decoder model" if config.is_encoder_decoder else "no causal language model"
    raise InputError(
        f"base model {str(name)!r} is of type {model_type(config)!r}{built}, {kind}; give one of the "
        f"{len(MODEL_FOR_CAUSAL_LM_MAPPING)} types that transformers' AutoModelForCausalLM loads, such as llama, qwen3, gemma2, "
        "gpt2 or opt"
    )


def load_causal(name: str | Path, place: str | Path | None = None, **arguments: Any) -> PreTrainedModel:
    """Load a causal language model with all its weights.

    transformers only warns if a file lacks weights, and draws them at random: for example the head of a body saved alone.

    Args:
        name: a folder or a hub id.
        place: where its files are; default: ``name``.
        arguments: further arguments of ``from_pretrained``.

    Raises:
        InputError: weights are missing.
        Exception: of any type, from a damaged file.
    """
    # safetensors only: reading pickled weights could run code
    model, found = AutoModelForCausalLM.from_pretrained(
        place or name, use_safetensors=True, output_loading_info=True, **arguments
    )
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"base model {str(name)!r} has no weights for {missing[0]!r}{more}, which a {type(model).__name__} needs; give a "
            "base that was saved whole, with its language modelling head"
        )
    return model


def placement_arguments(
    quantization: str | None, device_map: str | Mapping[str, Any] | None, precision: torch.dtype, device: torch.device | str
) -> dict[str, Any]:
    """Arguments of transformers' ``from_pretrained`` for quantisation and devices; empty for a plain base on one device.

    Raises:
        InputError: a value is unknown, or a package is missing.
    """
    if quantization is not None:
        check_one_of("quantization", quantization, QUANTIZATIONS)
    if isinstance(device_map, str):
        check_one_of("device_map", device_map, DEVICE_MAPS)
    if quantization is not None:
        _require("quantization", quantization, ("bitsandbytes", "accelerate"), extra="quantization")
        quiet_bitsandbytes()
        return {
            "quantization_config": BitsAndBytesConfig(load_in_8bit=True)
            if quantization == "8bit"
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=precision),
            "device_map": {"": device} if device_map is None else device_map,
        }
    if device_map is not None:
        _require("device_map", device_map, ("accelerate",), extra="peft")
        return {"device_map": device_map}
    return {}


def quiet_bitsandbytes() -> None:
    """Keep bitsandbytes from its warnings, also those of its import, which peft does too.

    It warns for every layer and batch that inputs become float16, and about a missing kernel without a backward pass.
    """
    for noisy in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def check_exact_products(model: PreTrainedModel) -> None:
    """Check that this processor multiplies the 8-bit layers of a base without an error.

    bitsandbytes multiplies by ``torch._int_mm`` where the processor has AVX-512. Without its VNNI instructions the sums of two
    products are cut at 16 bits, and the outputs of a layer are about a fifth off.

    Raises:
        InputError: a layer of 8 bits lies on the CPU, and its products are wrong.
    """
    if not any(parameter.dtype == torch.int8 and parameter.device.type == "cpu" for parameter in model.parameters()):
        return
    inputs, weight = torch.full((32, 64), 127, dtype=torch.int8), torch.full((32, 64), -127, dtype=torch.int8)
    exact = -64 * 127**2  # below 2^24, so that float32 holds it
    if (torch.ops.bitsandbytes.int8_linear_matmul(inputs, weight) != exact).any():
        raise InputError("quantization '8bit' gives wrong products on this processor (AVX-512 without VNNI); use 4bit or none")


def keep_differentiable(model: PreTrainedModel) -> PreTrainedModel:
    """Stop bitsandbytes from repacking 4-bit weights for CPUs with bfloat16.

    bitsandbytes repacks a layer the first time that its input needs no gradient: the first layer always, the others in an
    evaluation. This cannot be undone. A repacked layer computes in bfloat16, has no backward pass, and fails if its output size
    is not a multiple of 32.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _require(option: str, value: object, packages: Sequence[str], *, extra: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{option} {value!r} needs {package}, which is not installed; pip install 'bora_pyro[{extra}]'")

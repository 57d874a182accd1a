"""What the server vLLM asks of a folder with an adapter, and the command that serves such folders.

>>> print(serve_command("exports/speeches", "facebook/opt-350m", 16).partition(" vllm ")[2])
serve facebook/opt-350m --enable-lora --max-lora-rank 16

The rules are those of vLLM's ``vllm/config/lora.py`` (ranks), ``vllm/lora/peft_helper.py`` (options of the configuration),
``vllm/lora/lora_model.py`` (names of tensors) and ``vllm/plugins/lora_resolvers/filesystem_resolver.py`` (place and base).
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from safetensors import safe_open

from bora_pyro.errors import InputError
from bora_pyro.exchange.save import CONFIG, PREFIX, TENSORS

#: The ranks that vLLM serves with.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def check_base_name(name: str) -> None:
    """Check that a server can know the base by this name.

    Raises:
        InputError: the base comes with this library, and has no name elsewhere.
    """
    if name.startswith("builtin:"):
        raise InputError(f"vLLM has no base {name!r}; save it with save_pretrained, and give its folder as --base_name")


def check_for_vllm(folder: Path, base_model: str) -> int:
    """Check a folder by the rules of vLLM.

    Args:
        folder: the folder of one adapter.
        base_model: the name of the base on the server.

    Returns:
        The rank, for ``--max-lora-rank``.

    Raises:
        InputError: vLLM would refuse the folder, or read it otherwise than PEFT.
    """
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    rank, problems = config["r"], []
    if rank not in RANKS:
        problems.append(f"its rank is {rank}, not one of {', '.join(map(str, RANKS))}")
    if config["lora_alpha"] != rank:
        problems.append(f"its alpha is {config['lora_alpha']}, and its rank {rank}")
    for name in ("modules_to_save", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern"):
        if config.get(name):
            problems.append(f"it has {name}")
    if config["bias"] != "none":
        problems.append("it has a bias")
    if config["peft_type"] != "LORA" or config["base_model_name_or_path"] != base_model:
        problems.append(f"it is no LoRA adapter of {base_model!r}")
    with safe_open(folder / TENSORS, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118 (it has no iterator)
            path, _, factor = key.removesuffix(".weight").rpartition(".")
            if not key.startswith(PREFIX) or factor not in ("lora_A", "lora_B"):
                problems.append(f"{key!r} is no matrix of LoRA")
            elif ".experts" in path:
                problems.append(f"{key!r} is of a routed expert, which vLLM expects fused with the others of its layer")
            elif opened.get_slice(key).get_shape()[0 if factor == "lora_A" else 1] != rank:
                problems.append(f"{key!r} has another rank than {rank}")
    if problems:
        raise InputError(f"vLLM does not take {folder.name}: {problems[0]}; export a merged base (--merged) for it")
    return int(rank)


def serve_command(folder: str | Path, base_model: str, rank: int) -> str:
    """The command that serves all adapters of an exported folder. A request names an adapter by its folder, as its ``model``.

    Args:
        folder: the exported folder.
        base_model: the name of the base, as in the adapters' files.
        rank: the largest rank of the adapters.
    """
    place = shlex.quote(str(Path(folder).resolve()))
    return (
        f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=true VLLM_PLUGINS=lora_filesystem_resolver VLLM_LORA_RESOLVER_CACHE_DIR={place} "
        f"vllm serve {shlex.quote(base_model)} --enable-lora --max-lora-rank {rank}"
    )

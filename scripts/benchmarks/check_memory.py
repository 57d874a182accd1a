"""Compare the predicted memory of fits with the measured one, each setting in a separate process.

    python scripts/benchmarks/check_memory.py --output results/memory.csv

Each process fits two epochs of a few steps, with validation and checkpoints, on random documents. On CPUs the measured figure is
the largest resident size of the process. It includes freed blocks that glibc's allocator keeps. On CUDA the figure is the largest
amount that torch had allocated.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from bora_pyro.adapters import LoRA
from bora_pyro.backbone.backbone import Backbone
from bora_pyro.data import TaskData
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.inference.fit import fit
from bora_pyro.inference.memory import estimate_memory, peak_memory_bytes, resident_bytes
from bora_pyro.model import BoRA
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import option
from bora_pyro.priors import LearnedPrecision
from bora_pyro.runs.build import find_device

_OPT = {
    "vocab_size": 16_384, "hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 2048, "num_hidden_layers": 10,
    "num_attention_heads": 8, "dropout": 0.0, "max_position_embeddings": 1024,
}  # fmt: skip
_LLAMA = {
    "vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6,
    "num_key_value_heads": 2,
}  # fmt: skip
USUAL, ALL = ["q_proj", "v_proj"], "all-linear"
TOKENS, STEPS = 128, 2

#: The fits: base, tasks, rank, tokens of a batch, targets, and whether gradient checkpointing is on. With more than 64 tasks each
#: step uses only some of them. The rows of the last setting, 7 GiB, are kept in files.
SETTINGS: list[tuple[str, int, int, int, list[str] | str, bool]] = [
    ("builtin:nano", 25, 8, 4096, USUAL, False),
    ("builtin:nano", 100, 16, 4096, ALL, False),
    ("builtin:nano", 25, 8, 8192, USUAL, True),
    ("random:opt-40m", 4, 8, 1024, USUAL, False),
    ("random:opt-40m", 25, 8, 4096, USUAL, False),
    ("random:opt-40m", 25, 8, 4096, USUAL, True),
    ("random:opt-40m", 25, 16, 2048, ALL, False),
    ("random:opt-40m", 60, 16, 1024, ALL, False),
    ("random:llama", 4, 4, 2048, USUAL, False),
    ("random:llama", 25, 8, 4096, ALL, False),
    ("random:llama", 25, 8, 4096, ALL, True),
    ("random:llama", 60, 32, 1024, ALL, False),
    ("builtin:nano", 1000, 8, 4096, USUAL, False),
    ("builtin:nano", 2000, 16, 4096, ALL, False),
]


@dataclass(kw_only=True)
class CheckConfig:
    """Compare the predicted memory of fits with the measured one."""

    device: str = option("cpu", "cpu, cuda, cuda:1, ...")
    threads: int = option(1, "CPU threads")
    output: str | None = option(None, "a CSV file for the table (default: none is written)")
    setting: int | None = option(None, "measure only the setting of this number, in this process, and print it as JSON")

    def validate(self) -> None:
        """Check the number of the setting."""
        if self.setting is not None and not 0 <= self.setting < len(SETTINGS):
            raise InputError(f"setting is {self.setting}; give a whole number from 0 to {len(SETTINGS) - 1}")


def measure(number: int, device: torch.device) -> dict[str, Any]:
    """Fit one setting and measure its memory. A process can do this only once, because its peak never falls."""
    base, tasks, rank, budget, targets, checkpointing = SETTINGS[number]
    process = resident_bytes(device)
    model = BoRA(_base(base, targets, checkpointing, device), tasks, adapter=LoRA(rank=rank), prior=LearnedPrecision())
    vocabulary = model.backbone.model.get_input_embeddings().num_embeddings
    train, held_out = _documents(max(STEPS * budget // TOKENS, tasks), tasks, vocabulary), _documents(32, tasks, vocabulary)
    data = TaskData([f"task {d}" for d in range(tasks)], train=train, validation=held_out, test=held_out)
    predicted = estimate_memory(model, data, token_budget=budget, process=process)
    with tempfile.TemporaryDirectory() as folder:
        fit(model, data, epochs=2, token_budget=budget, learning_rate=1e-3, checkpoints=Path(folder))
    measured = peak_memory_bytes(device)
    mebibytes = {name: round(value / 2**20) for name, value in vars(predicted).items()}
    return {
        "base_model": base, "tasks": tasks, "rank": rank, "token_budget": budget,
        "targets": targets if isinstance(targets, str) else " ".join(targets), "gradient_checkpointing": checkpointing,
        "device": device.type, **{f"{name}_mib": value for name, value in mebibytes.items()},
        "predicted_mib": round(predicted.total / 2**20), "measured_mib": round(measured / 2**20),
        "ratio": round(predicted.total / measured, 3),
    }  # fmt: skip


def _base(name: str, targets: list[str] | str, checkpointing: bool, device: torch.device) -> Backbone:
    if name.startswith("builtin:"):
        return Backbone.from_pretrained(name, targets=targets, device=device, gradient_checkpointing=checkpointing)
    opt = name == "random:opt-40m"
    model: Any = OPTForCausalLM(OPTConfig(**_OPT)) if opt else LlamaForCausalLM(LlamaConfig(**_LLAMA))
    return Backbone(model.to(device), targets=targets, gradient_checkpointing=checkpointing)


def _documents(rows: int, tasks: int, vocabulary: int) -> TokenSplit:
    documents = torch.randint(vocabulary, (rows, TOKENS), generator=torch.Generator().manual_seed(rows)).tolist()
    return TokenSplit.from_documents(documents, task=[row % tasks for row in range(rows)], num_tasks=tasks)


def main(argv: list[str]) -> int:
    """Measure all settings one after another, print the table, and write the file."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(CheckConfig, argv, prog="check_memory.py")
        device = find_device(config.device)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if config.setting is not None:
        torch.set_num_threads(config.threads)
        print(json.dumps(measure(config.setting, device)))
        return 0
    rows = []
    for number in range(len(SETTINGS)):
        words = ["--setting", str(number), "--device", config.device, "--threads", str(config.threads)]
        done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"error: setting {number} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
            return 1
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        row = rows[-1]
        print(
            f"{row['base_model']:<15}{row['tasks']:>4} tasks, rank {row['rank']:>2}, {row['token_budget']:>5} tokens, "
            f"{row['targets']:<14}{'checkpointing' if row['gradient_checkpointing'] else '':<14}"
            f"predicted {row['predicted_mib']:>6} MiB, measured {row['measured_mib']:>6} MiB, ratio {row['ratio']:.3f}",
            flush=True,
        )
        if config.output is not None:
            pd.DataFrame(rows).to_csv(config.output, index=False)
    return 0


if __name__ == "__main__":
    run_script(main)

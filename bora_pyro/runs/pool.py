"""Pool independently trained LoRA adapters: estimate the Θ and τ that they imply, and shrink each towards Θ without retraining.

    bora pool-adapters adapters --base_model facebook/opt-350m --held_out later.csv --output_dir pooled

The folder ``adapters`` has one PEFT folder for each task. One of four options sets how far each adapter is shrunk:

- ``--held_out``: the shrinkage that predicts held-out texts best;
- ``--documents``: estimated from the number of documents of each task, a table with the columns task and documents;
- ``--noise``: estimated from a known noise;
- ``--shrinkage``: the given value.

The adapters may have been trained from different starts. They are first brought into a common frame, which changes no ΔW.
The command writes ``<task>/``, ``global-mean/`` (Θ), ``groups.csv`` (τ by kind of layer), ``tasks.csv`` (shrinkage, distances,
and the error of the cut to a low rank) and ``pooling.json``.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass

import pandas as pd
import torch

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.diagnostics.deviations import SPACES
from bora_pyro.errors import InputError
from bora_pyro.exchange.load import PeftAdapter
from bora_pyro.exchange.names import AdapterNames
from bora_pyro.exchange.pooling.folder import (
    POOLING,
    adapter_names,
    group_table,
    read_adapters,
    read_documents,
    task_table,
    write_pooled,
)
from bora_pyro.exchange.pooling.held_out import HeldOut, held_out_shrinkage, read_held_out
from bora_pyro.exchange.pooling.hierarchy import Estimator, FixedShrinkage, JamesStein, MarginalLikelihood
from bora_pyro.exchange.pooling.pool import FULL, Pooled, pool
from bora_pyro.exchange.save import check_exportable
from bora_pyro.files.atomic import check_place
from bora_pyro.files.text import name_line
from bora_pyro.options.field import check_choices, option
from bora_pyro.runs.command import Command


@dataclass(kw_only=True)
class PoolConfig:
    """Pool independently trained LoRA adapters of one base under one hierarchy."""

    folder: str = option("", "folder with a PEFT folder for each task", positional=True)
    base_model: str = option(
        "builtin:nano", "the frozen language model: a folder, a GGUF file, a hub id, builtin:nano or builtin:smollm2"
    )
    trust_remote_code: bool = option(
        False, "let a base model run code of its own on this machine; allowed on the command line only", line_only=True
    )
    same_base: bool = option(True, "refuse adapters that name a base model other than base_model")
    tasks: list[str] | None = option(None, "names of tasks or of their folders (default: all but global-mean and draws)")
    documents: str | None = option(
        None, "table with the columns task and documents: estimate tau and the noise from these numbers"
    )
    held_out: str | None = option(
        None, "table of texts that no adapter was trained on: take the shrinkage that predicts them best"
    )
    task_column: str = option("task", "column of held_out with the name of the task or of its folder")
    text_column: str = option("text", "column of held_out with the text")
    max_tokens: int = option(256, "tokens of a held-out text that are read")
    noise: float | None = option(
        None, "standard deviation of the noise in each entry: estimate the shrinkage as James and Stein do"
    )
    shrinkage: float | None = option(None, "shrinkage of every task: 0 leaves it as it is, 1 replaces it by Theta")
    space: str = option(
        "delta_w",
        "what is shrunk: the change of a layer, or the weights A and B (only for adapters with a common start)",
        choices=SPACES,
    )
    rank: int | str | None = option(
        None,
        "rank of the result; full cuts nothing (default: the largest rank of the adapters)",
        expects="a whole number or full",
        words=(FULL,),
    )
    output_dir: str = option("", "the folder to make")
    overwrite: bool = option(False, "replace an earlier result")
    threads: int | None = option(None, "CPU threads (default: torch's own choice)")

    def validate(self) -> None:
        """Check the values."""
        if not self.folder.strip():
            raise InputError(
                "no folder is given; name the folder of the adapters, as in pool_adapters.py adapters --output_dir pooled"
            )
        if not self.output_dir.strip():
            raise InputError("no output_dir is given; name the folder to make, as in --output_dir pooled")
        check_choices(self)
        if sum(value is not None for value in (self.documents, self.held_out, self.noise, self.shrinkage)) != 1:
            raise InputError(
                "give one of --held_out, --documents, --noise and --shrinkage: the adapters alone cannot show how much of their "
                "differences is noise"
            )
        if isinstance(self.rank, int) and self.rank < 1:
            raise InputError(f"rank is {self.rank}; give a whole number from 1 up, or {FULL}")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads is {self.threads}; give a whole number from 1 up")


def pool_adapters(config: PoolConfig) -> Pooled:
    """Read the adapters, pool them, write and print the result.

    Raises:
        InputError: the adapters, the documents or the base model cannot be used, or the output folder is taken.
    """
    check_place(config.output_dir, record=POOLING, overwrite=config.overwrite)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    adapters, names = read_adapters(config.folder, config.tasks), adapter_names(config.folder)
    documents = None if config.documents is None else read_documents(config.documents, list(adapters), names)
    targets = next(iter(adapters.values())).targets
    backbone = Backbone.from_pretrained(config.base_model, targets=targets, trust_remote_code=config.trust_remote_code)
    check_exportable(backbone)  # before the work, because nothing could be written
    options = asdict(config)
    estimator: Estimator
    if documents is not None:
        estimator = MarginalLikelihood(documents)
    elif config.held_out is not None:
        found = _held_out(config, adapters, names, backbone)
        estimator = FixedShrinkage(found.share)
        options["held_out_perplexities"] = {f"{share:g}": perplexity for share, perplexity in found.perplexities.items()}
    elif config.noise is not None:
        estimator = JamesStein(config.noise)
    else:
        estimator = FixedShrinkage(config.shrinkage or 0.0)
    pooled = pool(adapters, backbone, estimator, space=config.space, rank=config.rank, same_base=config.same_base)
    options["estimator"] = repr(estimator)
    write_pooled(
        config.output_dir, pooled, options=options, documents=documents, names=names, base_model=config.base_model,
        overwrite=config.overwrite,
    )  # fmt: skip
    _report(pooled, documents)
    return pooled


def _held_out(config: PoolConfig, adapters: dict[str, PeftAdapter], names: AdapterNames, backbone: Backbone) -> HeldOut:
    assert config.held_out is not None
    documents, counts = read_held_out(
        config.held_out,
        backbone,
        list(adapters),
        names=names,
        task_column=config.task_column,
        text_column=config.text_column,
        max_tokens=config.max_tokens,
    )
    print(f"data: {counts}", file=sys.stderr)
    found = held_out_shrinkage(adapters, backbone, documents, space=config.space, same_base=config.same_base)
    print(f"perplexity of {len(documents)} held-out documents by shrinkage (0: the adapters, 1: Θ):")
    for share, perplexity in found.perplexities.items():
        print(f"  {share:.1f}  {perplexity:.2f}{'  <- taken' if share == found.share else ''}")
    print()
    return found


def _report(pooled: Pooled, documents: list[float] | None) -> None:
    with pd.option_context("display.width", 160, "display.max_columns", 20):
        print("by group:")
        print(group_table(pooled).to_string(index=False, float_format="{:.4g}".format))
        print("\nby task:")
        shown = ["task", "documents", "rank", "distance", "distance_shrunk", "relative_error"]
        table = task_table(pooled, documents)
        table["task"] = table["task"].map(name_line)
        print(table[[name for name in shown if name in table]].to_string(index=False, float_format="{:.4g}".format))


COMMAND = Command(
    "pool-adapters", PoolConfig, pool_adapters, lambda config, pooled: print(f"pooled adapters: {config.output_dir}")
)

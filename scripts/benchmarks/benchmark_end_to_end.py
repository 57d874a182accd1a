"""Compare the time to a good validation perplexity: one fit that learns tau against the six fits of the paper's grid.

    python scripts/benchmarks/benchmark_end_to_end.py --output results/end_to_end.json

The paper's recipe uses the centred form. It fits once for each tau of the grid, with a learning rate proportional to tau
(``--coefficient`` times tau), and keeps the fit with the best validation perplexity. Its time is that of all fits. Ours is one
fit of the non-centred form that learns tau. Its time is that until its validation perplexity is as low as the best of the grid.
Both have the same base, data, batches, maximum of epochs and patience, and validate after each epoch. A fit of the grid that
diverges counts with its best state and with its time until then.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from bases import at_least, check_output, load_base, machine, place, writable

import bora_pyro as bp
from bora_pyro.data import TaskData, load_tasks
from bora_pyro.errors import InputError
from bora_pyro.inference.fit import NonFiniteLossError
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_choices, option
from bora_pyro.priors import LearnedPrecision, Prior
from bora_pyro.runs.build import find_device


@dataclass(kw_only=True)
class EndToEndConfig:
    """Seconds to a validation perplexity: one fit with a learned tau against the paper's grid of fits."""

    data: str = option("builtin:documentation", "the documents, as map_fit.py takes them")
    task_column: str = option("task", "column that names a document's task")
    text_column: str = option("text", "column that holds a document's text")
    num_tasks: int | None = option(None, "largest number of tasks (default: all)")
    max_tokens: int = option(128, "tokens of a document that are read")
    max_train_documents: int | None = option(16, "largest number of training documents of a task, or none for all")
    max_eval_documents: int | None = option(12, "largest number of validation documents of a task, or none for all")
    base_model: str = option(
        "builtin:nano", "the frozen language model, with its tokenizer: a path, a hub id, builtin:nano or builtin:smollm2"
    )
    targets: list[str] | None = option(
        None, "layers that get an adapter, by the last part of their names (default: the architecture's usual ones)"
    )
    precision: str = option("float32", "arithmetic of the frozen model", choices=("float32", "bfloat16"))
    rank: int = option(8, "rank r of the adapters; alpha is the rank")
    taus: list[str] = option(
        ["1", "10", "100", "1000", "10000", "100000"], "the paper's grid of tau (default: 1 10 100 1000 10000 100000)"
    )
    coefficient: float = option(1e-5, "the grid's learning rate divided by tau; the paper's table has 0.00001")
    learning_rate: float = option(1e-2, "learning rate of our fit")
    epochs: int = option(12, "largest number of passes over the training documents")
    patience: int = option(3, "stop after this number of epochs without a better validation perplexity; 0 never stops early")
    token_budget: int = option(2048, "tokens of a batch, padding included")
    threads: int | None = option(None, "CPU threads (default: torch's own choice)")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    seed: int = option(0, "seed of the split, the start and the order of the documents")
    output: str | None = option(None, "a JSON file for all numbers (default: none is written)")

    def validate(self) -> None:
        """Check the values that can be checked without a model."""
        check_choices(self)
        at_least(self, _LEAST)
        for name in ("coefficient", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}; give a finite number above 0")
        for tau in self.taus:
            try:
                usable = 0 < float(tau) < float("inf")
            except ValueError:
                usable = False
            if not usable:
                raise InputError(
                    f"taus has {tau!r}; give finite numbers above 0, because the learning rate is proportional to tau"
                )
        if self.base_model.startswith("random:"):
            raise InputError(f"base_model is {self.base_model!r}; this benchmark needs a trained base, such as builtin:nano")
        check_output(self.output)


_LEAST = {
    "num_tasks": 2, "max_tokens": 2, "max_train_documents": 1, "max_eval_documents": 1, "rank": 1, "epochs": 1, "patience": 0,
    "token_budget": 2, "threads": 1, "seed": 0,
}  # fmt: skip


def timed_fit(config: EndToEndConfig, backbone: bp.Backbone, data: TaskData, prior: Prior, rate: float) -> dict[str, Any]:
    """Fit once, and return the time, the best validation perplexity and a curve with the seconds and perplexity of each epoch."""
    curve: list[dict[str, Any]] = []
    diverged = False
    start = time.perf_counter()

    def keep(report: dict[str, Any]) -> None:
        curve.append(
            {
                "epoch": report["epoch"],
                "seconds": time.perf_counter() - start,
                "validation_perplexity": report["validation_perplexity"],
            }
        )

    try:
        fitted = bp.fit(
            bp.BoRA(backbone, data.num_tasks, adapter=bp.LoRA(rank=config.rank), prior=prior, seed=config.seed),
            data,
            epochs=config.epochs,
            learning_rate=rate,
            token_budget=config.token_budget,
            patience=config.patience,
            seed=config.seed,
            on_epoch=keep,
        )
    except NonFiniteLossError as error:
        fitted, diverged = error.fitted, True
    return {
        "learning_rate": rate,
        "seconds": time.perf_counter() - start,
        "epochs": len(curve),
        "best_epoch": fitted.best_epoch,
        "validation_perplexity": fitted.validation_perplexity,
        "diverged": diverged,
        "curve": curve,
    }


def seconds_to(curve: list[dict[str, Any]], target: float) -> float | None:
    """Seconds until the curve is first as low as the target; None if it never is.

    >>> curve = [{"seconds": 2.0, "validation_perplexity": 9.0}, {"seconds": 4.0, "validation_perplexity": 7.5}]
    >>> seconds_to(curve, 8.0), seconds_to(curve, 7.0)
    (4.0, None)
    """
    return next((point["seconds"] for point in curve if point["validation_perplexity"] <= target), None)


def measure(config: EndToEndConfig) -> dict[str, Any]:
    """Run our fit and the grid, and return the content of the JSON file."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = find_device(config.device)
    backbone = load_base(config.base_model, targets=config.targets, precision=config.precision, device=device)
    if backbone.context is not None and config.max_tokens > backbone.context:
        raise InputError(f"max_tokens is {config.max_tokens}; {config.base_model} reads at most {backbone.context}")
    assert backbone.tokenizer is not None
    data = load_tasks(
        config.data,
        backbone.tokenizer,
        task_column=config.task_column,
        text_column=config.text_column,
        num_tasks=config.num_tasks,
        max_tokens=config.max_tokens,
        max_train_documents=config.max_train_documents,
        max_eval_documents=config.max_eval_documents,
        seed=config.seed,
        small_tasks="drop",
    )
    if not data.validation.num_tokens:
        raise InputError(f"{config.data} has no validation documents, which this benchmark needs; give more documents")
    # a first fit, so that one-time costs of a process (compiled kernels, Pyro's first trace) are not measured
    warm = bp.BoRA(backbone, data.num_tasks, adapter=bp.LoRA(rank=config.rank))
    bp.fit(warm, data, epochs=1, token_budget=config.token_budget, patience=0)

    ours = timed_fit(config, backbone, data, LearnedPrecision(), config.learning_rate)
    print(_line("ours, tau learned", ours), flush=True)
    grid = []
    for tau in sorted(map(float, config.taus)):
        prior = bp.HierarchicalNormal(tau=tau, form="centered")
        grid.append({"tau": tau} | timed_fit(config, backbone, data, prior, config.coefficient * tau))
        print(_line(f"centred, tau {tau:g}", grid[-1]), flush=True)
    best = min(grid, key=lambda fit: fit["validation_perplexity"])
    target, total = best["validation_perplexity"], sum(fit["seconds"] for fit in grid)
    reached = seconds_to(ours["curve"], target)
    return {
        "machine": machine(device),
        "options": asdict(config),
        "data": {
            "tasks": data.num_tasks,
            "train_documents": len(data.train),
            "validation_documents": len(data.validation),
        },
        "ours": ours,
        "grid": grid,
        "summary": {
            "target_perplexity": target,
            "best_tau_of_grid": best["tau"],
            "grid_seconds": total,
            "our_seconds_to_target": reached,
            "our_seconds": ours["seconds"],
            "our_validation_perplexity": ours["validation_perplexity"],
            "grid_seconds_over_ours_to_target": None if reached is None else total / reached,
        },
    }


def _line(name: str, fit: dict[str, Any]) -> str:
    end = ", diverged" if fit["diverged"] else ""
    return f"{name:<24}{fit['validation_perplexity']:>10.3f}  {fit['seconds']:>8.1f} s, {fit['epochs']} epochs{end}"


def summary(report: dict[str, Any]) -> str:
    """The printed result."""
    found = report["summary"]
    lines = [
        f"on {place(report['machine'])}: the grid's best validation perplexity is {found['target_perplexity']:.3f} (tau "
        f"{found['best_tau_of_grid']:g}), ours {found['our_validation_perplexity']:.3f}",
        f"the grid's fits took {found['grid_seconds']:.1f} s",
    ]
    if found["our_seconds_to_target"] is None:
        lines.append(f"our one fit did not reach that perplexity in its {found['our_seconds']:.1f} s")
    else:
        ratio = found["grid_seconds_over_ours_to_target"]
        lines.append(
            f"our one fit reached that perplexity after {found['our_seconds_to_target']:.1f} s: {ratio:.1f} times faster"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Measure, print the result, and write the JSON file."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(EndToEndConfig, argv, prog="benchmark_end_to_end.py")
        output = None if config.output is None else writable(config.output)
        report = measure(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(report))
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_script(main)

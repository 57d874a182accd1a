"""Fold several MAP fits of the same tasks into one adapter a task: the mean of their ΔW.

    bora fold runs/seed-0 runs/seed-1 runs/seed-2 --output_dir runs/folded
    bora fold runs/ensemble --output_dir runs/folded

The fits may have other seeds, orders of the documents, starts or learning rates. The mean of K changes of rank r is one adapter
of rank K r, so nothing is lost; ``--rank`` cuts it. ``--distil true`` then fits it to the predictions of the mixture, on the
training documents of its task. The command measures what folding costs: the test perplexity of each fit, of the mixture of their
predictions, and of the folded adapters.

The folder has ``adapters/<task>/`` in PEFT form, ``metrics.json`` and ``fold.json``. If nothing is cut and the fits are alike, it
is also a run, with the rank K r, that every command reads. Distilled adapters are no run. Θ is not distilled: it stays folded.

Two seeds split the documents in two ways, unless the fits have one ``split_seed``. The fold therefore has a split of its own: a
document is for testing if no fit trained on it or chose an epoch by it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from bora_pyro.adapters import LoRA
from bora_pyro.data import ByRecord, TaskData
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.exchange.factors import LoraForm, lora_form
from bora_pyro.exchange.fold import mean_form, stacked
from bora_pyro.exchange.save import check_exportable
from bora_pyro.files.atomic import check_place
from bora_pyro.files.slugs import GLOBAL_MEAN, adapter_folders
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.model import BoRA, Weights
from bora_pyro.options.field import option
from bora_pyro.predict.distil import distil
from bora_pyro.predict.mixture import predictive
from bora_pyro.priors import HierarchicalNormal
from bora_pyro.runs.build import build_run
from bora_pyro.runs.command import Command
from bora_pyro.runs.ensemble import member_folders
from bora_pyro.runs.fold_members import Member, check_alike, check_number, document_keys, joint_split, not_a_run
from bora_pyro.runs.joined import JoinOptions, joined_config, joined_fit, joined_metrics, write_joined
from bora_pyro.runs.layout import FOLD

# Why adapters that were asked to be distilled are no run.
_DISTILLED = "the adapters are fitted to the predictions of the mixture, without a prior"


@dataclass(kw_only=True)
class FoldConfig(JoinOptions):
    """Fold several MAP fits of the same tasks into one adapter a task, the mean of their changes."""

    runs: list[str] = option(
        [], "folders of two or more finished MAP fits, or of ensembles, which have several", positional=True, whole=True
    )
    rank: int | None = option(
        None, "cut the adapters to this rank (default: the sum of the fits' ranks, which is exact)", least=1
    )
    mixture: bool = option(True, "also measure the mixture of the fits' predictions, which takes a pass for each fit")
    distil: bool = option(
        False,
        "fit the folded adapters to the predictions of the mixture on the training documents of their tasks; what is kept is the "
        "epoch with the lowest validation perplexity, or the folded adapters",
    )
    distil_epochs: int = option(3, "passes over the training documents for --distil", least=1)
    distil_learning_rate: float = option(3e-3, "AdamW's largest learning rate for --distil", positive=True)


def fold(config: FoldConfig) -> dict[str, Any]:
    """Read the fits, fold them, measure, and write the folder.

    Returns:
        The content of ``fold.json``.

    Raises:
        InputError: a run cannot be read, the runs differ in their base, layers, tasks or documents, or the folder is taken.
    """
    check_place(config.output_dir, record=FOLD, overwrite=config.overwrite)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    paths = _paths(config)
    members = [Member.read(path, device=config.device, trust_remote_code=config.trust_remote_code) for path in paths]
    check_alike(members)
    record, same_split = joint_split(members)
    forms = [mean_form(of_task, rank=config.rank) for of_task in zip(*(member.forms for member in members), strict=True)]
    exact = sum(member.forms[0].rank for member in members)
    errors = [form.relative_error for form in forms]
    reason = _DISTILLED if config.distil else not_a_run(members, cut=forms[0].rank < exact)
    fit = joined_config(members[0].config, config.output_dir, forms[0])
    prior = None if reason is None else HierarchicalNormal(1.0)
    model, data = build_run(fit, quiet=True, split=ByRecord(record), prior=prior)
    check_exportable(model.backbone)
    mixture = Mixture.of(members, model)
    distilled: dict[str, Any] = {}
    if config.distil:
        forms, distilled = _distil(mixture, data, forms, config)
    fitted = joined_fit(model, data, forms, _mean_tau(members) if reason is None else {})
    notes = _notes(members, data, same_split)
    metrics = joined_metrics(fitted, fit, data, is_run=reason is None, notes=notes)
    found = {
        "rank": forms[0].rank,
        "run": reason is None,
        **({} if reason is None else {"not_a_run": reason}),
        "same_split": same_split,
        "base": members[0].base,
        "test_documents": data.test.num_documents,
        "test_perplexity": metrics["test_perplexity"],
        **_perplexities(members, mixture, data.test, config),
        **({"distilled": distilled} if distilled else {}),
        "relative_error": dict(zip([*_folders(data)], errors, strict=True)),
        "notes": notes,
    }
    write_joined(config.output_dir, FOLD, found, fitted, fit, data, record, metrics, overwrite=config.overwrite)
    return found


def _paths(config: FoldConfig) -> list[str]:
    """The folders of the fits: those that are given, and the members of those that are ensembles."""
    paths = [path for run in config.runs for path in member_folders(run)]
    check_number(paths, "fits, as in fold runs/a runs/b, or of an ensemble")
    return paths


def _mean_tau(members: Sequence[Member]) -> dict[str, Tensor]:
    """What the prior of the folded fit has learned: the geometric mean of the members' τ."""
    taus = {name: [member.precisions[name] for member in members] for name in members[0].precisions}
    return {name: torch.stack(of).log().mean(0).exp() for name, of in taus.items()}


@dataclass(frozen=True, eq=False)
class Mixture:
    """The fits as the adapters of one model.

    Attributes:
        model: a model with LoRA of scale 1 and the largest rank of the fits.
        weights: θ of all tasks in each fit, (D, layers, *shape) by name.
    """

    model: BoRA
    weights: list[Weights]

    @classmethod
    def of(cls, members: Sequence[Member], model: BoRA) -> Mixture:
        """The fits on the base of a model, with its tasks and its likelihood."""
        rank = max(form.rank for member in members for form in member.forms)
        plain = BoRA(model.backbone, model.num_tasks, adapter=LoRA(rank), likelihood=model.likelihood)
        return cls(plain, [stacked(plain, [form.with_rank([rank]) for form in member.forms[:-1]]) for member in members])

    def perplexity(self, split: TokenSplit, *, token_budget: int) -> float | None:
        """The perplexity of the mixture of their predictions."""
        return predictive(self.model, split, lambda: self.weights, token_budget=token_budget).perplexity()


def _distil(mixture: Mixture, data: TaskData, forms: list[LoraForm], config: FoldConfig) -> tuple[list[LoraForm], dict[str, Any]]:
    """Fit the folded adapters to the mixture; returns them, and their perplexities before and after."""
    plain, budget = mixture.model, config.token_budget
    fitted = distil(
        plain, data, lambda: mixture.weights, stacked(plain, forms[:-1]), alpha=forms[0].alpha,
        epochs=config.distil_epochs, patience=0, learning_rate=config.distil_learning_rate, token_budget=budget,
    )  # fmt: skip
    student, theta = fitted.model, fitted.weights()[0]
    found: dict[str, Any] = {"kept": fitted.best_epoch > 0, "epochs": config.distil_epochs, "best_epoch": fitted.best_epoch}
    for name, split in (("validation", data.validation), ("test", data.test)):
        folded, after = (scores.perplexity() for scores in evaluate(student, split, stacked(student, forms[:-1]), theta))
        found[name] = {"folded": folded, "distilled": after}
        found[name] |= {"mixture": mixture.perplexity(split, token_budget=budget)} if name == "validation" else {}
    if fitted.best_epoch:
        of_tasks = (lora_form(student, weights, task=d) for d, weights, _ in fitted.each_task())
        forms = [*map(_on_cpu, of_tasks), forms[-1]]
    return forms, found


def _on_cpu(form: LoraForm) -> LoraForm:
    factors = {path: {name: value.cpu() for name, value in of_layer.items()} for path, of_layer in form.factors.items()}
    return LoraForm(factors, form.alpha)


def _perplexities(members: Sequence[Member], mixture: Mixture, test: TokenSplit, config: FoldConfig) -> dict[str, Any]:
    """The test perplexity of each member, and of the mixture of their predictions."""
    rows = []
    for member, theta in zip(members, mixture.weights, strict=True):
        (scores,) = evaluate(mixture.model, test, theta, token_budget=config.token_budget)
        about = {"run": member.path, "posterior_sha256": member.digest, "seed": member.config.seed}
        rows.append(about | {"test_perplexity": scores.perplexity()})
    found: dict[str, Any] = {"members": rows}
    if config.mixture and len(test):
        found["mixture_test_perplexity"] = mixture.perplexity(test, token_budget=config.token_budget)
    return found


def _folders(data: TaskData) -> list[str]:
    slugs = adapter_folders(data.tasks)
    return [*(slugs[task] for task in data.tasks), GLOBAL_MEAN]


def _notes(members: Sequence[Member], data: TaskData, same_split: bool) -> list[str]:
    """What the user should know about the documents of the perplexities."""
    if same_split:
        return []
    number, own = data.test.num_documents, members[0].data.test.num_documents
    if not number:
        return [
            "the fits split the documents in different ways, and none is left that no fit trained on or chose an epoch by: there "
            "are no test perplexities; fits with one --split_seed have one split"
        ]
    notes = [
        f"the fits split the documents in different ways: the perplexities are over the {number} of {own} test documents that no "
        "fit trained on or chose an epoch by"
    ]
    read = {key for member in members for split in (member.data.train, member.data.validation) for key in document_keys(split)}
    if again := sum(key in read for key in document_keys(data.test)):
        notes.append(f"{again} of these documents have the same text as a document that a fit trained on or chose an epoch by")
    return notes


def show(config: FoldConfig, found: Mapping[str, Any]) -> None:
    """Print the perplexities, the error of a cut, and what can read the folder."""
    for note in found["notes"]:
        print(f"note: {note}", file=sys.stderr)
    rows = {row["run"]: row["test_perplexity"] for row in found["members"]}
    if "mixture_test_perplexity" in found:
        rows["mixture of their predictions"] = found["mixture_test_perplexity"]
    distilled = found.get("distilled", {})
    rows[f"folded, rank {found['rank']}"] = distilled["test"]["folded"] if distilled else found["test_perplexity"]
    if distilled:
        rows[f"distilled, rank {found['rank']}"] = distilled["test"]["distilled"]
    if found["test_documents"]:
        print(f"test perplexity of {found['test_documents']:,} documents:")
        print(pd.Series(rows).to_string(float_format="{:.2f}".format))
    if distilled:
        before, after, mixture = (f"{distilled['validation'][name]:.2f}" for name in ("folded", "distilled", "mixture"))
        kept = (
            f"epoch {distilled['best_epoch']} of {distilled['epochs']} is kept" if distilled["kept"] else "nothing is kept of it"
        )
        print(f"distilled: validation perplexity {before} -> {after} (the mixture's is {mixture}); {kept}")
    if error := max(found["relative_error"].values()):
        print(f"relative error of the cut: up to {error:.3g} (by task in {FOLD})")
    readers = "a run of rank {rank}, which every command reads" if found["run"] else "PEFT adapters; no run, because {not_a_run}"
    print(f"folded: {config.output_dir} ({readers.format(**found)})")


COMMAND = Command("fold", FoldConfig, fold, show)

"""Compose fits of the same tasks that adapt different layers: one adapter a task with the changes of all.

    bora map-fit --data style.csv --layers 0-1 --output_dir runs/early
    bora map-fit --data facts.csv --layers 2-3 --output_dir runs/late
    bora compose runs/early runs/late --output_dir runs/both

Nothing is trained. The fits may have other documents and other objectives, as in TexForce (arXiv 2311.15657), which joins the
adapter of a text encoder and that of an image model. Each ΔW stays as it is, but what a layer reads changes, so the command
measures the composition on the test documents of each fit, beside the fit's own adapters.

The folder has ``adapters/<task>/`` in PEFT form, ``metrics.json`` and ``compose.json``. If the fits have LoRA of one rank under
priors of one kind, it is also a run, which every command reads, with the documents and the options of the first fit. A learned τ
stays with its layers, so the run has one for each layer.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.data import ByRecord
from bora_pyro.errors import InputError
from bora_pyro.exchange.compose import union_form
from bora_pyro.exchange.factors import LoraForm
from bora_pyro.exchange.fold import stacked
from bora_pyro.exchange.save import check_exportable
from bora_pyro.files.atomic import check_place
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.model import BoRA
from bora_pyro.options.field import option
from bora_pyro.priors import HierarchicalNormal
from bora_pyro.runs.build import build_run
from bora_pyro.runs.command import Command
from bora_pyro.runs.config.groups import LEARNED
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.fold_members import (
    PRIOR_OPTIONS,
    Member,
    check_base,
    check_number,
    check_tasks,
    different_form,
    document_keys,
    without_tau,
)
from bora_pyro.runs.joined import JoinOptions, joined_config, joined_fit, joined_metrics, write_joined
from bora_pyro.runs.layout import COMPOSE

# Options of the prior that the composition sets itself.
_SET = ("tau_per",)


@dataclass(kw_only=True)
class ComposeConfig(JoinOptions):
    """Compose MAP fits of the same tasks that adapt different layers into one adapter a task."""

    runs: list[str] = option(
        [], "folders of two or more finished MAP fits; no layer may be adapted by two of them", positional=True, whole=True
    )


def compose(config: ComposeConfig) -> dict[str, Any]:
    """Read the fits, join their adapters, measure, and write the folder.

    Returns:
        The content of ``compose.json``.

    Raises:
        InputError: a run cannot be read, the runs differ in their base or tasks, two adapt one layer, or the folder is taken.
    """
    check_place(config.output_dir, record=COMPOSE, overwrite=config.overwrite)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    check_number(config.runs, "fits, as in compose runs/a runs/b")
    members = [
        Member.read(path, device=config.device, trust_remote_code=config.trust_remote_code, command="compose")
        for path in config.runs
    ]
    _check_apart(members)
    forms = [union_form(of_task) for of_task in zip(*(member.forms for member in members), strict=True)]
    reason = _not_a_run(members)
    first = members[0]
    fit = _config(members, forms[0], config.output_dir)
    prior = None if reason is None else HierarchicalNormal(1.0)
    model, data = build_run(fit, quiet=True, split=ByRecord(first.record), prior=prior)
    check_exportable(model.backbone)
    fitted = joined_fit(model, data, forms, _tau_by_layer(members, model.backbone) if reason is None else {})
    notes = _notes(members)
    metrics = joined_metrics(fitted, fit, data, is_run=reason is None, notes=notes)
    found = {
        "rank": forms[0].rank,
        "run": reason is None,
        **({} if reason is None else {"not_a_run": reason}),
        "base": first.base,
        "layers": len(forms[0].factors),
        "members": [_measured(member, model, forms, config.token_budget) for member in members],
        "notes": notes,
    }
    write_joined(config.output_dir, COMPOSE, found, fitted, fit, data, first.record, metrics, overwrite=config.overwrite)
    return found


def _check_apart(members: Sequence[Member]) -> None:
    """Check that the fits have one base and the same tasks, and that no layer is adapted by two of them."""
    for first, other in combinations(members, 2):
        check_base(first, other)
        check_tasks(first, other, "compose")
        if both := sorted({*first.layers} & {*other.layers}):
            more = f" and {len(both) - 1} more" if len(both) > 1 else ""
            raise InputError(
                f"{other.path} and {first.path} both adapt {both[0]}{more}; compose fits of different layers (--layers, "
                "--targets), or fold fits of the same ones"
            )


def _config(members: Sequence[Member], form: LoraForm, output_dir: str) -> MapFitConfig:
    """The configuration of the composition: that of the first fit, with the layers of all."""
    changes: dict[str, Any] = {"targets": [path for member in members for path in member.layers], "layers": None}
    if any(member.precisions for member in members):
        changes["tau_per"] = "layer"
    return joined_config(members[0].config, output_dir, form, **changes)


def _not_a_run(members: Sequence[Member]) -> str | None:
    """Why the composition cannot be read as a run; None if it can."""
    first = members[0]
    for member in members:
        if reason := without_tau(member) or different_form(first, member):
            return reason
        if member.config.tau == LEARNED and member.config.tau_per == "task":
            return f"{member.path} has a tau for each task, which is one for all layers"
        for name in PRIOR_OPTIONS:
            if name not in _SET and getattr(member.config, name) != getattr(first.config, name):
                return f"{member.path} and {first.path} have different values of {name}"
    return None


def _tau_by_layer(members: Sequence[Member], backbone: Backbone) -> dict[str, Tensor]:
    """The learned τ of each layer, (layers, 1, ...) by ``tau.<slot>.<latent>``: that of the fit which adapts the layer."""
    rows: dict[tuple[str, str], Tensor] = {}  # by the path of the layer and the latent
    for member in members:
        for name, tau in member.precisions.items():
            _, slot, latent = name.split(".")
            paths = member.slots[slot]
            for path, row in zip(paths, tau.expand(len(paths), 1, 1), strict=True):
                rows[path, latent] = row
    latents = dict.fromkeys(latent for _, latent in rows)
    return {
        f"tau.{slot.name}.{latent}": torch.stack([rows[path, latent] for path in slot.paths])
        for slot in backbone.slots
        for latent in latents
    }


def _measured(member: Member, model: BoRA, forms: Sequence[LoraForm], token_budget: int) -> dict[str, Any]:
    """How well the base, the fit's own adapters and the composition predict the fit's test documents."""
    found = {"run": member.path, "posterior_sha256": member.digest, "layers": len(member.layers)}
    test, measure = member.data.test, member.likelihood.measure.name
    found |= {"measure": measure, "test_documents": test.num_documents}
    of_fit = BoRA(model.backbone, model.num_tasks, adapter=model.adapter, likelihood=member.likelihood)
    base, composed = evaluate(of_fit, test, None, stacked(of_fit, forms[:-1]), token_budget=token_budget)
    return found | {"base": base.value(), "own": member.metrics.get(f"test_{measure}"), "composed": composed.value()}


def _notes(members: Sequence[Member]) -> list[str]:
    """What the user should know about the documents of the measures."""
    notes = []
    for member in members:
        others = {
            key: other.path
            for other in members
            if other is not member
            for split in (other.data.train, other.data.validation)
            for key in document_keys(split)
        }
        if read := [others[key] for key in document_keys(member.data.test) if key in others]:
            notes.append(
                f"{len(read)} of the {member.data.test.num_documents} test documents of {member.path} have the text of a "
                f"document that another fit trained on or chose an epoch by, as {read[0]}: give the fits one --split_seed"
            )
    return notes


def show(config: ComposeConfig, found: Mapping[str, Any]) -> None:
    """Print the measures, and what can read the folder."""
    for note in found["notes"]:
        print(f"note: {note}", file=sys.stderr)
    rows = found["members"]
    print("on the test documents of each fit:")
    columns = ["test_documents", "measure", "base", "own", "composed"]
    table = pd.DataFrame([[row[name] for name in columns] for row in rows], [row["run"] for row in rows], columns)
    print(table.rename(columns={"test_documents": "documents"}).to_string(float_format="{:.2f}".format))
    layers = " + ".join(str(row["layers"]) for row in rows)
    readers = "a run of rank {rank}, which every command reads" if found["run"] else "PEFT adapters; no run, because {not_a_run}"
    print(f"composed: {config.output_dir}, {layers} layers ({readers.format(**found)})")


COMMAND = Command("compose", ComposeConfig, compose, show)

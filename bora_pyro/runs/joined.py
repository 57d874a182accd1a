"""A fit that was made from the adapters of other fits: its configuration, the fitted model, and its folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from bora_pyro.data import TaskData
from bora_pyro.errors import InputError
from bora_pyro.exchange.factors import LoraForm
from bora_pyro.exchange.fold import stacked
from bora_pyro.files.atomic import whole_folder, write_record
from bora_pyro.guides import make_parameters, map_guide
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.fitted import Fitted
from bora_pyro.model import BoRA
from bora_pyro.options.field import check_fields, option
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.results import metrics_of, write_adapters, write_posterior
from bora_pyro.runs.resume import as_written


@dataclass(kw_only=True)
class JoinOptions:
    """What all commands that join fits have."""

    output_dir: str = option("", "the folder to make")
    token_budget: int = option(4096, "tokens of a batch, padding included", least=1)
    overwrite: bool = option(False, "replace an earlier result")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ... or mps")
    trust_remote_code: bool = option(
        False, "let a base model run code of its own on this machine; allowed on the command line only", line_only=True
    )
    threads: int | None = option(None, "CPU threads (default: torch's own choice)", least=1)

    def validate(self) -> None:
        """Check the values."""
        check_fields(self)
        if not self.output_dir.strip():
            raise InputError("no output_dir is given; name the folder to make, as in --output_dir joined")


def joined_config(config: MapFitConfig, output_dir: str, form: LoraForm, **changes: Any) -> MapFitConfig:
    """The configuration of the new fit: that of one of the fits, with LoRA of the new rank.

    Args:
        config: the configuration of this fit.
        output_dir: the folder of the new fit.
        form: one of its adapters.
        changes: other options that differ.
    """
    return dataclasses.replace(
        config, adapter="lora", adapter_option=None, rank=form.rank, alpha=form.alpha, start_from=None, start_as="theta",
        output_dir=output_dir, overwrite=False, resume=False, trackers=None, **changes,
    )  # fmt: skip


@torch.no_grad()
def joined_fit(model: BoRA, data: TaskData, forms: Sequence[LoraForm], tau: Mapping[str, Tensor]) -> Fitted:
    """The new fit.

    Args:
        model: a model with LoRA of the new rank.
        data: the documents.
        forms: the adapter of each task, and then Θ.
        tau: what the prior has learned, by ``tau.<latent>``; empty if it learns nothing.
    """
    with poutine.seed(rng_seed=0):
        model.weights()  # a prior that learns creates its tensors when it is sampled for the first time
    model.prior.load_state({name: value.to(model.backbone.device) for name, value in tau.items()})
    theta, mean = stacked(model, forms[:-1]), {name: value[0] for name, value in stacked(model, forms[-1:]).items()}
    guide = map_guide(model, model.sites_given(theta, mean))
    make_parameters(guide, model)
    (validation,) = evaluate(model, data.validation, theta)
    documents, template = data.train.documents_per_task, data.chat_template
    score = validation.value()
    return Fitted(model, guide, data.tasks, validation_score=score, documents=documents, chat_template=template)


def joined_metrics(fitted: Fitted, config: MapFitConfig, data: TaskData, *, is_run: bool, notes: Sequence[str]) -> dict[str, Any]:
    """The content of ``metrics.json``. If the new fit has no prior, it lacks what depends on one or on a common basis."""
    metrics = metrics_of(fitted, data, tau=config.tau, learning_rate=config.learning_rate, seed=config.seed)
    if not is_run:
        for name in ("tau", "tau_by_group"):
            metrics.pop(name, None)
        for row in metrics["tasks"].values():
            row.pop("deviation_norm")
    return metrics | {"notes": [*metrics["notes"], *notes]}


def write_joined(
    path: str, name: str, record: Mapping[str, Any], fitted: Fitted, config: MapFitConfig, data: TaskData,
    split: Mapping[str, Any], metrics: Mapping[str, Any], *, overwrite: bool,
) -> None:  # fmt: skip
    """Write the folder whole: the adapters, ``metrics.json`` and the record, and a run if ``record["run"]`` is true.

    Args:
        path: the folder.
        name: the file of the record.
        record: what was joined, and what it costs.
        fitted: the new fit.
        config: its configuration.
        data: its documents.
        split: content of ``split.json``.
        metrics: content of ``metrics.json``.
        overwrite: replace an earlier result.
    """
    with whole_folder(path, record=name, overwrite=overwrite) as aside:
        folder = RunFolder(aside)
        if record["run"]:
            folder.write_config(as_written(config))
            folder.write_split(split)
            write_posterior(folder, fitted, data, "map")
        write_adapters(folder, fitted, config.base_model)
        folder.write_metrics(metrics)
        write_record(aside, name, record)

"""What a fit of gates reads: the adapters of a finished run, or PEFT folders of adapters that were trained elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bora_pyro.adapters import LoRA
from bora_pyro.data import TaskData
from bora_pyro.errors import InputError, shown
from bora_pyro.exchange.factors import LoraForm
from bora_pyro.exchange.fold import mean_form, stacked
from bora_pyro.exchange.load import PeftAdapter
from bora_pyro.exchange.names import AdapterNames
from bora_pyro.exchange.pooling.folder import adapter_names, read_adapters
from bora_pyro.files.slugs import adapter_folders
from bora_pyro.guides import make_parameters, map_guide
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.fitted import Fitted
from bora_pyro.model import BoRA, Weights
from bora_pyro.priors import HierarchicalNormal
from bora_pyro.runs.added_tasks import Addition
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.map_fit import MapFitConfig, parse_config
from bora_pyro.runs.config.route_fit import RouteFitConfig
from bora_pyro.runs.saved import SavedRun

# Options of a fit of adapters, which are fitted already.
_OF_A_FIT = (
    "adapter", "adapter_option", "rank", "alpha", "targets", "layers", "prior", "prior_option", "tau", "tau_group",
    "task_group_column", "penalty", "start_from", "start_as", "router", "router_option", "likelihood",
)  # fmt: skip


@dataclass(frozen=True)
class RoutedAdapters:
    """Adapters of several tasks, and documents of these tasks.

    Attributes:
        fitted: the adapters.
        data: the documents.
        config: the configuration with which the base and the documents are read again.
        split: content of ``split.json``.
        test: the measure of the test documents, each read by the adapter of its own task; None: there are none.
        norms: ‖θ_d − Θ‖ by the name of the task's folder; empty: the adapters have no Θ.
        run: the run; None: the adapters come from PEFT folders.
        new: if the run is routed: the adapters that are added to it, by the name of their task. ``fitted`` has the old ones,
            ``data`` the documents of all tasks.
        additions: the documents of the tasks that are not those of ``config``.
    """

    fitted: Fitted
    data: TaskData
    config: MapFitConfig
    split: dict[str, Any]
    test: float | None
    norms: Mapping[str, float | None]
    run: SavedRun | None = None
    new: Mapping[str, Weights] = field(default_factory=dict)
    additions: Sequence[Addition] = ()

    @classmethod
    def of_run(cls, run: SavedRun) -> RoutedAdapters:
        """The adapters of a finished run."""
        measure = run.fitted.model.likelihood.measure.name
        norms = {slug: run.metrics["tasks"][slug].get("deviation_norm") for slug in adapter_folders(run.fitted.tasks).values()}
        test = run.metrics.get(f"test_{measure}")
        return cls(run.fitted, run.data, run.config, run.folder.read_split(), test, norms, run)


def read_folders(config: RouteFitConfig) -> RoutedAdapters:
    """Adapters from the PEFT folders in ``config.adapters``, with the documents that ``config.fit_config`` names.

    The ranks and the layers may differ. Smaller ranks are filled up with zeros, and so are layers that an adapter leaves as they
    are. The adapters have no common prior: Θ is the mean of the ΔW, cut to their largest rank.

    Raises:
        InputError: a folder or the configuration cannot be read; a task has no adapter, or an adapter has no documents; or the
            adapters are of another base.
    """
    assert config.adapters is not None
    assert config.fit_config is not None
    adapters, names = read_adapters(config.adapters), adapter_names(config.adapters)
    fit = _fit_config(config, adapters)
    model, data = build_run(fit, quiet=True, prior=HierarchicalNormal(1.0))
    folders = folders_of_tasks(data.tasks, adapters, names, place=config.adapters, documents=fit.data)
    forms = [form_on(adapters[folder], model, same_base=config.same_base) for folder in folders.values()]
    notes = _notes(forms, model)
    data.notes.extend(notes)
    mean = mean_form(forms, rank=fit.rank).with_rank([fit.rank])
    theta, means = stacked(model, forms), {name: value[0] for name, value in stacked(model, [mean]).items()}
    guide = map_guide(model, model.sites_given(theta, means))
    make_parameters(guide, model)
    fitted = Fitted(model, guide, data.tasks, documents=data.train.documents_per_task, chat_template=data.chat_template)
    test = evaluate(model, data.test, theta)[0].value() if data.test.num_tokens else None
    return RoutedAdapters(fitted, data, fit, data.split_record, test, {})


def _fit_config(config: RouteFitConfig, adapters: Mapping[str, PeftAdapter]) -> MapFitConfig:
    """The configuration with which base and documents are read: LoRA of the largest rank in the layers of all adapters."""
    try:
        fit = parse_config(MapFitConfig, ["--config", str(config.fit_config)])
    except InputError as error:
        raise InputError(str(error).replace("--config", "--fit_config", 1)) from None
    usual, rank = MapFitConfig(), max(adapter.rank for adapter in adapters.values())
    for name in _OF_A_FIT:
        if getattr(fit, name) != getattr(usual, name):
            raise InputError(
                f"{config.fit_config} has {name} {shown(getattr(fit, name))}, but the adapters are fitted already; leave it out"
            )
    return dataclasses.replace(
        fit, rank=rank, alpha=float(rank), targets=list(dict.fromkeys(path for one in adapters.values() for path in one.factors)),
        tau=1.0, split_seed=fit.seed_of_split, device=config.device, threads=config.threads,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip


def folders_of_tasks(
    tasks: Sequence[str], adapters: Mapping[str, PeftAdapter], names: AdapterNames, *, place: str, documents: object
) -> dict[str, str]:
    """The folder with the adapter of each task.

    Args:
        tasks: the tasks of the documents.
        adapters: the adapters by the name of their folder.
        names: the names of the tasks of these folders, if known.
        place: the folder that contains these folders, for errors.
        documents: the source of the documents, for errors.

    Raises:
        InputError: a task has no adapter, or an adapter has no documents.
    """
    found = {}
    for task, folder in names.folders_of(tasks, among=[*adapters]).items():
        if folder is None or folder not in adapters:
            raise InputError(f"task {shown(task)} of {documents} has no adapter in {place}{names.nearest(task)}")
        found[task] = folder
    if without := [folder for folder in adapters if folder not in found.values()]:
        raise InputError(
            f"the adapter in {place}/{without[0]} has no documents in {documents}, and its gate cannot be learned; give "
            "documents of its task, or move the folder away"
        )
    return found


def form_on(adapter: PeftAdapter, model: BoRA, *, same_base: bool) -> LoraForm:
    """The adapter with matrices for all layers, the rank of the model, and scale 1.

    Raises:
        InputError: it is of another base, changes other layers, or has a larger rank.
    """
    shapes = {path: (slot.in_features, slot.out_features) for slot in model.backbone.slots for path in slot.paths}
    zeros = {
        path: {"lora_A": torch.zeros(adapter.rank, sizes[0]), "lora_B": torch.zeros(sizes[1], adapter.rank)}
        for path, sizes in shapes.items()
        if path not in adapter.factors
    }
    whole = dataclasses.replace(adapter, factors={**adapter.factors, **zeros}).on(model.backbone, same_base=same_base)
    assert isinstance(model.adapter, LoRA)
    return LoraForm(whole.factors, whole.alpha).with_rank([model.adapter.rank])


def _notes(forms: list[LoraForm], model: BoRA) -> list[str]:
    """What is not known of the adapters, and how many layers they leave as they are."""
    notes = [
        "the adapters were trained elsewhere, perhaps on documents that are for testing here, so the test measures may be "
        "too good"
    ]
    layers = sum(slot.layers for slot in model.backbone.slots)
    fewer = [sum(bool(of["lora_A"].any()) for of in form.factors.values()) for form in forms]
    if min(fewer) == layers:
        return notes
    return [*notes, f"the adapters change {min(fewer)} to {max(fewer)} of {layers} layers; the others they leave as they are"]

"""Adapters that are added to a routed run: PEFT folders of new tasks, with documents of these tasks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from bora_pyro.adapters import LoRA
from bora_pyro.data import TaskData
from bora_pyro.data.join import join_tasks
from bora_pyro.errors import InputError, shown
from bora_pyro.exchange.fold import stacked
from bora_pyro.exchange.load import PeftAdapter, read_peft
from bora_pyro.exchange.names import AdapterNames
from bora_pyro.exchange.pooling.folder import adapter_names, read_adapters
from bora_pyro.exchange.save import CONFIG
from bora_pyro.files.slugs import adapter_folders
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.route_fit import by_task_model, frozen
from bora_pyro.model import BoRA, Weights
from bora_pyro.runs.added_tasks import AddedDocuments, Addition, read_additions
from bora_pyro.runs.config.map_fit import parse_config
from bora_pyro.runs.config.route_fit import RouteFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.kinds import ROUTED, kind_of
from bora_pyro.runs.layout import ADAPTERS
from bora_pyro.runs.layout import CONFIG as RUN_CONFIG
from bora_pyro.runs.new_documents import with_options_of_fit
from bora_pyro.runs.routed_adapters import RoutedAdapters, folders_of_tasks, form_on
from bora_pyro.runs.saved import SavedRun, load_run


def read_added(config: RouteFitConfig) -> tuple[RoutedAdapters, RouteFitConfig]:
    """The adapters of a routed run, those that are added, and the documents of all of them.

    Documents of the new tasks are split as those of a fit: as the data says, otherwise by group. The gates need validation
    documents of the new tasks too, because the validation perplexity of all tasks chooses the epoch.

    Args:
        config: the configuration, with ``add``.

    Returns:
        The adapters, and the configuration with the options of the run's gates and of its documents where none are given.

    Raises:
        InputError: the run has no gates, or gates over draws; an option differs from that of its gates; an adapter or the
            documents cannot be read, do not belong together, or are of a task of the run.
    """
    assert config.add is not None
    run = load_run(config.run, device=config.device, trust_remote_code=config.trust_remote_code)
    if kind_of(run.folder) != ROUTED:
        raise InputError(
            f"the run in {config.run} has no gates to add an adapter to; fit them with bora route-fit {config.run}, or leave "
            "--add out"
        )
    model = run.fitted.model
    config = config.with_gates(_config_of(run))
    if frozen(model).num_draws:
        raise InputError(
            f"the gates of the run in {config.run} were fitted over draws, which a new adapter does not have; fit gates without "
            "--draws"
        )
    if type(model.adapter) is not LoRA:
        raise InputError(f"the adapters of the run in {config.run} are {model.adapter}; PEFT folders can be added to LoRA alone")
    config = with_options_of_fit(config, run.config, reads_options=False, run=config.run)
    documents = {field.name for field in dataclasses.fields(AddedDocuments)}
    values = {name: value for name, value in dataclasses.asdict(config).items() if name in documents}
    own = AddedDocuments(**values | {"long_documents": run.config.long_documents})
    new = own.load(model.backbone)
    _check_validation(new)
    data = join_tasks(run.data, new)
    adapters, notes = _read(config, model, new)
    data.notes.extend(notes)
    plain = by_task_model(model)
    plain.num_tasks = data.num_tasks
    theta = {
        name: torch.cat([value, torch.stack([one[name] for one in adapters.values()]).to(value)])
        for name, value in frozen(model).theta.items()
    }
    test = evaluate(plain, data.test, theta)[0].value() if data.test.num_tokens else None
    known = {row["name"]: row.get("deviation_norm") for row in run.metrics["tasks"].values()}
    norms = {slug: known.get(task) for task, slug in adapter_folders(data.tasks).items()}
    additions = [*read_additions(run.folder), Addition(own, new.split_record)]
    split = run.folder.read_split()
    return RoutedAdapters(run.fitted, data, run.config, split, test, norms, run, adapters, additions), config


def _config_of(run: SavedRun) -> RouteFitConfig:
    return parse_config(RouteFitConfig, ["--config", str(run.folder.path / RUN_CONFIG)])


def _check_validation(data: TaskData) -> None:
    for task, number in zip(data.tasks, data.validation.documents_per_task, strict=True):
        if not number:
            raise InputError(
                f"task {shown(task)} has no validation documents, by which the epoch of its gates is chosen; give it three "
                "documents or more, or a split with validation documents"
            )


def _read(config: RouteFitConfig, model: BoRA, data: TaskData) -> tuple[dict[str, Weights], list[str]]:
    """The adapter of each new task, (layers, *shape) by name of the latent, and notes that say which it is."""
    assert config.add is not None
    place, adapters, names = _adapters(config.add)
    if len(adapters) == len(data.tasks) == 1 and not names.tasks:
        [(folder, _)], [task] = adapters.items(), data.tasks
        folders = {task: folder}
    else:
        folders = folders_of_tasks(data.tasks, adapters, names, place=place, documents=config.data)
    found, notes = {}, []
    for task, folder in folders.items():
        adapter = adapters[folder]
        assert isinstance(model.adapter, LoRA)
        if adapter.rank > model.adapter.rank:
            raise InputError(
                f"the adapter in {adapter.folder} has rank {adapter.rank}, and those of the run in {config.run} have "
                f"{model.adapter.rank}; give one of at most this rank"
            )
        weights, scale = stacked(model, [form_on(adapter, model, same_base=config.same_base)]), model.adapter.scaling
        # the form has the scale 1
        found[task] = {name: value[0] / (scale if name.endswith("lora_B") else 1.0) for name, value in weights.items()}
        notes.append(f"task {shown(task)} has the adapter in {adapter.folder}")
    return found, notes


def _adapters(folder: str) -> tuple[str, dict[str, PeftAdapter], AdapterNames]:
    """The folder that contains the adapters' folders, the adapters by the name of their folder, and the names of their tasks."""
    path = Path(folder)
    if RunFolder.holds_run(path):
        path /= ADAPTERS
    if not (path / CONFIG).is_file():
        return str(path), read_adapters(path, least=1), adapter_names(path)
    place = path.absolute().parent
    return str(path.parent), {path.name: read_peft(path)}, AdapterNames.read(place, [path.name])

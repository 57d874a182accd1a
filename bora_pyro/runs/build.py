"""The objects that a configuration describes: the device, the frozen model, the documents, the BoRA model."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch

from bora_pyro.adapters import ADAPTERS, Adapter
from bora_pyro.backbone.backbone import Backbone
from bora_pyro.backbone.sharding import shard_base
from bora_pyro.data import TaskData, load_tasks
from bora_pyro.data.tables import check_source
from bora_pyro.errors import InputError
from bora_pyro.inference.processes import Processes
from bora_pyro.likelihoods.next_tokens import CausalLM
from bora_pyro.model import BoRA
from bora_pyro.options.members import build_member
from bora_pyro.priors import LearnedPrecision, Prior, prior_from_tau, with_shared
from bora_pyro.runs.config.map_fit import MapFitConfig

#: Options of a configuration that ``load_tasks`` takes by the same name.
DATA_OPTIONS = (
    "task_column", "text_column", "prompt_column", "completion_column", "messages_column", "chat_template", "group_column",
    "split_column", "streaming", "num_tasks", "long_documents", "max_train_documents", "max_eval_documents", "seed",
    "small_tasks", "task_weights",
)  # fmt: skip


def build_run(
    config: MapFitConfig,
    *,
    quiet: bool = False,
    split_record: Mapping[str, Any] | None = None,
    team: Processes | None = None,
    prior: Prior | None = None,
) -> tuple[BoRA, TaskData]:
    """The model and the tokenised data that a configuration describes, nothing fitted yet.

    Args:
        config: the checked configuration.
        quiet: show no notes.
        split_record: split as an earlier run's ``split.json`` says, instead of anew.
        team: the processes of the fit, which hold the base in parts where the configuration says so; a run that is read holds
            it whole.
        prior: instead of the configuration's.

    Raises:
        InputError: something in the configuration or the data cannot be used.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    check_source(config.data)  # before a base is fetched for documents that are not there
    sharded = config.shard_base and team is not None
    if sharded and team is not None and team.size == 1:
        raise InputError("shard_base is true, but there is one process; start several with torchrun, or leave it out")
    backbone = Backbone.from_pretrained(
        config.base_model,
        targets=config.targets,
        precision=getattr(torch, config.precision),
        device="cpu" if sharded else find_device(config.device),
        quantization=config.quantization,
        device_map=config.device_map,
        gradient_checkpointing=config.gradient_checkpointing,
        trust_remote_code=config.trust_remote_code,
    )
    if sharded and team is not None:
        shard_base(backbone, find_device(config.device))
        team.sharded_base = True
    data = _load_data(config, backbone, quiet=quiet, split_record=split_record)
    adapter = _adapter(config)
    model = BoRA(
        backbone,
        len(data.tasks),
        adapter=adapter,
        prior=prior or with_shared(_prior(config), adapter.shared),
        likelihood=CausalLM(config.likelihood_unit, task_weights=data.task_weights),
        seed=config.seed,
    )
    return model, data


def find_device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes an accelerator where there is one.

    Raises:
        InputError: torch has no such device here.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found else "cpu"
    if ":" not in name and name != "cpu" and "LOCAL_RANK" in os.environ:
        name = f"{name}:{os.environ['LOCAL_RANK']}"  # a device for each process of this machine
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        fewer = ", or start fewer processes" if "LOCAL_RANK" in os.environ else ""
        raise InputError(f"device {name!r} is not available here; use --device auto, or --device cpu{fewer}") from error
    return torch.device(name)


def _adapter(config: MapFitConfig) -> Adapter:
    return build_member("adapter", ADAPTERS, config.adapter, usual={"rank": config.rank, "alpha": config.alpha})


def _prior(config: MapFitConfig) -> Prior:
    if isinstance(config.tau, str):
        return LearnedPrecision(config.tau_per, config.tau_start)
    return prior_from_tau(config.tau, config.prior_form, penalty=config.penalty)


def _load_data(config: MapFitConfig, backbone: Backbone, *, quiet: bool, split_record: Mapping[str, Any] | None) -> TaskData:
    max_tokens, notes = config.max_tokens, []
    if backbone.context is not None and max_tokens > backbone.context:
        notes.append(f"max_tokens {max_tokens} is more than the base model reads; {backbone.context} is used")
        max_tokens = backbone.context
    assert backbone.tokenizer is not None
    data = load_tasks(
        config.data,
        backbone.tokenizer,
        max_tokens=max_tokens,
        split_record=split_record,
        **{name: getattr(config, name) for name in DATA_OPTIONS},
    )
    data.notes[:0] = notes
    if not quiet:
        for note in data.notes:
            print(f"note: {note}", file=sys.stderr)
    return data

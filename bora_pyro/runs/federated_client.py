"""A client of a federated fit between processes, from a configuration to a run folder.

    bora federated-client --name ada --data ada.csv --server fit.example.org:9092 --root_certificates ca.pem --key ada_key

The folder is that of a MAP fit of the client's own tasks, under the Θ and the τ of all clients. Every command that reads a run
reads it, except ``posterior-fit``. The state is stored after each round, so that a client that has died can go on.
"""

from __future__ import annotations

import dataclasses
import secrets
import sys
from collections.abc import Mapping
from typing import Any

from bora_pyro.data import ByRecord, TaskData
from bora_pyro.errors import InputError
from bora_pyro.federated.client import Client
from bora_pyro.federated.client_state import restore, state_of
from bora_pyro.federated.flower import check_flower
from bora_pyro.federated.flower.client import serve
from bora_pyro.federated.loop import fitted_at
from bora_pyro.federated.options import FederatedOptions
from bora_pyro.federated.participant import Participant, check_ended
from bora_pyro.inference.checkpoint import Checkpoints
from bora_pyro.inference.fitted import Fitted
from bora_pyro.options.field import part_of
from bora_pyro.runs.build import build_run, check_can_export
from bora_pyro.runs.command import Command
from bora_pyro.runs.config.federated_client import FederatedClientConfig
from bora_pyro.runs.config.groups import AUTO
from bora_pyro.runs.federated_peers import agreement_of, check_files, checked_strategy, private_key
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import METRICS
from bora_pyro.runs.progress import layers_line, print_table
from bora_pyro.runs.results import metrics_of
from bora_pyro.runs.run import Run

_PROGRESS = {"federation": (str,), "trained": (int,), "best": (int,), "secret": (str,), "lines": (int,)}


def run_federated_client(config: FederatedClientConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Connect to a server, take part in the rounds, and write a run folder.

    Args:
        config: the checked configuration.
        quiet: show no progress and no notes.

    Returns:
        The content of ``metrics.json``: that of a MAP fit, and ``federated``.

    Raises:
        InputError: Flower is not installed, something in the configuration or the data cannot be used, or the server does not
            accept this client. Nothing is written before the first round.
    """
    config.check_connection()
    check_flower()
    config = config.resolved
    check_files(root_certificates=config.root_certificates, key=config.key)
    key = None if config.key is None else private_key(config.key)
    session = _Session(config)
    split = ByRecord(session.folder.read_split()) if session.resume else None
    model, data = build_run(config.map_fit, quiet=quiet, split=split, least_tasks=1)
    if config.export_adapters:
        check_can_export(model.backbone)
    strategy, weights = checked_strategy(config, model), model.likelihood.task_weights
    session.client = client = Client(config.name, model, data, strategy, part_of(config, FederatedOptions), task_weights=weights)
    if not quiet:
        print(layers_line(model.backbone.slots), file=sys.stderr)
        if config.insecure:
            print("note: insecure is true: no TLS, and the server does not know this client by a key", file=sys.stderr)
    progress = session.restored()
    participant = Participant(
        client, agreement_of(config, model), secret=session.secret, on_trained=session.store, progress=progress
    )
    session.participant = participant
    with session.folder:
        serve(
            config.server,
            participant.answer,
            lambda: participant.ended,
            most=participant.most,
            root_certificates=config.root_certificates,
            insecure=config.insecure,
            key=key,
            patience=config.server_timeout,
            say=lambda line: None if quiet else print(line, file=sys.stderr, flush=True),
        )
        result = check_ended(participant)
        session.take()
        fitted = fitted_at(result, model, data, [client])
        fitted.history, fitted.best_epoch = session.folder.read_log(), result.best_round
        fitted.seconds = sum(entry["seconds"] for entry in fitted.history)
        fitted.validation_score = _validation(fitted, data)
        data.notes.extend(participant.notes)
        saving = Run(session.folder, config.base_model, quiet=quiet, adapters=config.export_adapters)
        return saving.save(fitted, data, lambda: _metrics(config, fitted, data, participant))


class _Session:
    """The run folder of a client, and the state in it."""

    client: Client
    participant: Participant

    def __init__(self, config: FederatedClientConfig) -> None:
        self.config, self.folder = config, RunFolder(config.output_dir)
        there = RunFolder.holds_run(config.output_dir) and not config.overwrite
        self.resume = there if config.resume == AUTO else bool(config.resume)
        self.folder.check_free(overwrite=config.overwrite, resume=self.resume)
        if self.resume and (self.folder.path / METRICS).exists():
            raise InputError(
                f"output_dir {config.output_dir} holds a finished run; give --overwrite true, or another --output_dir"
            )
        self.secret, self._lines, self._taken = secrets.token_hex(16), 0, False

    def restored(self) -> dict[str, Any] | None:
        """Bring the client into its stored state; None if there is none."""
        checkpoint = Checkpoints(self.folder.checkpoints).newest() if self.resume else None
        if checkpoint is None:
            return None
        checkpoint.check_progress(_PROGRESS)
        restore(self.client, checkpoint)
        self.secret, self._lines = checkpoint.progress["secret"], checkpoint.progress["lines"]
        return checkpoint.progress

    def take(self) -> None:
        """Take the folder, the first time that there is something to write."""
        if self._taken:
            return
        self.folder.take(overwrite=self.config.overwrite, resume=self.resume)
        self.folder.write_config(dataclasses.asdict(self.config) | {"overwrite": False, "resume": AUTO})
        self.folder.write_split(self.client.data.split_record)
        self._taken = True

    def store(self, report: dict[str, Any]) -> None:
        """Store the state after the steps of a round, and log its report."""
        self.take()
        self.folder.cut_log(self._lines)
        self.folder.log(report)
        self._lines += 1
        groups, progress = state_of(self.client)
        progress |= self.participant.progress | {"secret": self.secret, "lines": self._lines}
        Checkpoints(self.folder.checkpoints).save(report["epoch"], groups, progress)


def _validation(fitted: Fitted, data: TaskData) -> float | None:
    """The measure of the client's own validation documents."""
    if not data.validation.num_tokens:
        return None
    found: float | None = fitted.evaluate(data.validation, name="validation")[
        f"validation_{fitted.model.likelihood.measure.name}"
    ]
    return found


def _metrics(config: FederatedClientConfig, fitted: Fitted, data: TaskData, participant: Participant) -> dict[str, Any]:
    metrics = metrics_of(fitted, data, tau=config.map_fit.tau, learning_rate=config.learning_rate, seed=config.seed)
    found = {"strategy": config.strategy, "name": config.name, "server": config.server, "rounds": participant.progress["trained"]}
    return metrics | {"federated": found | {"local_steps": config.local_steps, "insecure": config.insecure}}


def show(config: FederatedClientConfig, metrics: Mapping[str, Any]) -> None:
    """Print the table of the client's tasks, and the run folder."""
    print_table(metrics)
    print(f"client {config.name}: the best round was {metrics['best_epoch']}")
    print(f"run folder: {config.output_dir}")


COMMAND = Command("federated-client", FederatedClientConfig, run_federated_client, show)

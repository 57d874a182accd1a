"""A federated fit in one process, from a configuration to a run folder.

    bora federated --data reviews.csv --clients task --output_dir runs/federated
    bora federated --data reviews.csv --clients 8 --strategy ffa --output_dir runs/ffa

:func:`~bora_pyro.federated.loop.federate` does the work. The folder is that of a MAP fit, and every command that reads one reads
it, except ``posterior-fit``: it would need the documents of all clients in one place. ``metrics.json`` also has the bytes that
would travel, and what noise guarantees. There are no checkpoints: a federated fit that is interrupted is started again.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bora_pyro.data import TaskData
from bora_pyro.errors import InputError, shown
from bora_pyro.federated.loop import Federation
from bora_pyro.federated.options import FederatedOptions
from bora_pyro.federated.privacy import privacy_record
from bora_pyro.federated.rounds import rounds_text
from bora_pyro.federated.strategies import STRATEGIES
from bora_pyro.inference.fitted import Fitted
from bora_pyro.options.field import part_of
from bora_pyro.runs.build import begin, build_run, check_can_export
from bora_pyro.runs.command import Command
from bora_pyro.runs.config.federated import FederatedConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.progress import Progress, layers_line, print_table
from bora_pyro.runs.results import metrics_of
from bora_pyro.runs.run import Run
from bora_pyro.runs.start import write_start


def run_federated(config: FederatedConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Load, fit, evaluate, and write a run folder.

    Args:
        config: the checked configuration.
        quiet: show no progress and no notes.

    Returns:
        The content of ``metrics.json``: that of a MAP fit, and ``federated`` with the clients and the bytes.

    Raises:
        InputError: something in the configuration or the data cannot be used, in which case nothing is written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a federated fit runs in one process; start it without torchrun")
    config = config.resolved
    folder = RunFolder(config.output_dir)
    folder.check_free(overwrite=config.overwrite, resume=None)
    model, data = build_run(config.map_fit, quiet=quiet, regroup=config.regroup)
    if config.export_adapters:
        check_can_export(model.backbone)
    start = begin(config.map_fit, model, data, quiet=quiet)
    strategy, clients = STRATEGIES[config.strategy](), config.deal(data)
    federation = Federation(model, data, strategy, part_of(config, FederatedOptions), clients=clients)
    if not quiet:
        print(layers_line(model.backbone.slots), file=sys.stderr)
        sizes = [len(tasks) for tasks in clients.values()]
        print(
            f"{len(clients)} clients with {min(sizes)} to {max(sizes)} tasks; {federation.server.participants} train in a round; "
            f"{federation.server.message().num_bytes:,} bytes to a client",
            file=sys.stderr,
        )
    if strategy.by_turns and (alone := sum(len(tasks) == 1 for tasks in clients.values())):
        what = f"{alone} of {len(clients)} clients have one task: what such a client sends is the adapter of that task itself"
        _note(data, what, quiet=quiet)
    folder.take(overwrite=config.overwrite, resume=None)
    with folder:
        folder.write_config(dataclasses.asdict(config) | {"overwrite": False})
        folder.write_split(data.split_record)
        if start is not None:
            write_start(folder, start)
        fitted = _fit(federation, folder, quiet=quiet)
        for note in refusals(fitted.history):
            _note(data, note, quiet=quiet)
        if config.private:
            private = privacy_record(federation.options, fitted.history[-1]["privacy"])
            _note(data, private["statement"], quiet=quiet)
        saving = Run(folder, config.base_model, quiet=quiet, adapters=config.export_adapters)
        return saving.save(fitted, data, lambda: _metrics(config, clients, fitted, data, private if config.private else None))


def refusals(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """A note for each client whose messages were refused, and one about rounds in which nothing moved.

    >>> refused = [{"client": "bob", "reason": "'bob', round 2: 'x' is missing"}]
    >>> refusals([{"epoch": 1, "refused": [], "moved": True}, {"epoch": 2, "refused": refused, "moved": True}])
    ["client 'bob' was refused in round 2, which went on without it ('bob', round 2: 'x' is missing)"]
    """
    rounds: dict[str, list[int]] = {}
    reasons: dict[str, str] = {}
    for entry in history:
        for refused in entry["refused"]:
            of_client = rounds.setdefault(refused["client"], [])
            of_client += [entry["epoch"]] if entry["epoch"] not in of_client else []
            reasons.setdefault(refused["client"], refused["reason"])
    notes = [
        f"client {shown(client)} was refused in {rounds_text(of_client)}, which went on without it ({reasons[client]})"
        for client, of_client in rounds.items()
    ]
    if still := [entry["epoch"] for entry in history if not entry["moved"]]:
        notes.append(f"the messages of {rounds_text(still)} were too few or too large: the common values stayed as they were")
    return notes


def _fit(federation: Federation, folder: RunFolder, *, quiet: bool) -> Fitted:
    measure, options = federation.model.likelihood.measure, federation.options
    steps = options.rounds * options.local_steps
    with Progress(steps, epochs=options.rounds, measure=measure, enabled=not quiet) as bar:

        def record(report: dict[str, Any]) -> None:
            folder.log(report)
            bar.update(
                int(report["step"]),
                loss=report["loss"],
                tokens_per_second=report["training_tokens_per_second"],
                epoch=int(report["epoch"]),
                validation=report.get(f"validation_{measure.name}"),
            )

        return federation.run(on_round=record)


def _note(data: TaskData, note: str, *, quiet: bool) -> None:
    data.notes.append(note)
    if not quiet:
        print(f"note: {note}", file=sys.stderr)


def _metrics(
    config: FederatedConfig,
    clients: Mapping[str, list[str]],
    fitted: Fitted,
    data: TaskData,
    private: dict[str, Any] | None,
) -> dict[str, Any]:
    metrics = metrics_of(fitted, data, tau=config.map_fit.tau, learning_rate=config.learning_rate, seed=config.seed)
    found: dict[str, Any] = {"strategy": config.strategy, "clients": {name: list(tasks) for name, tasks in clients.items()}}
    found |= {"rounds": len(fitted.history), "local_steps": config.local_steps}
    for name in ("uploaded_bytes", "downloaded_bytes"):
        found[name] = sum(entry[name] for entry in fitted.history)
    found["refused_messages"] = sum(len(entry["refused"]) for entry in fitted.history)
    return metrics | {"federated": found | ({} if private is None else {"privacy": private})}


def show(config: FederatedConfig, metrics: Mapping[str, Any]) -> None:
    """Print the table of the tasks, what travelled, and the run folder."""
    print_table(metrics)
    found = metrics["federated"]
    number = len(found["clients"])
    print(
        f"{config.strategy}, {number} client{'s' * (number != 1)}, {found['rounds']} rounds of {config.local_steps} local steps: "
        f"{found['uploaded_bytes']:,} bytes uploaded and {found['downloaded_bytes']:,} downloaded by all clients"
    )
    if not metrics["best_epoch"] and found["rounds"]:
        print("no round had a better validation score than the start, which is kept")
    print(f"run folder: {config.output_dir}")


COMMAND = Command("federated", FederatedConfig, run_federated, show)

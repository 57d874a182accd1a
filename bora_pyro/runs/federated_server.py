"""The server of a federated fit between processes, from a configuration to a run folder.

    bora federated-server --num_clients 3 --certificate server.pem --private_key server.key --client_keys keys

The folder has no tasks, so the commands that read a run do not read it. It has Θ as a PEFT folder (``adapters/global-mean``),
Θ and a learned τ as tensors (``common.safetensors``), ``metrics.jsonl`` with a line for each round, and ``metrics.json``. There
are no checkpoints.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any

from bora_pyro.errors import InputError
from bora_pyro.exchange.save import save_peft
from bora_pyro.federated.flower import check_flower
from bora_pyro.federated.flower.server import FlowerServer
from bora_pyro.federated.options import FederatedOptions
from bora_pyro.federated.remote import RemoteClients, absences
from bora_pyro.federated.rounds import Result, Rounds
from bora_pyro.federated.server import Server
from bora_pyro.federated.wire import LARGEST_HEADER
from bora_pyro.files.slugs import GLOBAL_MEAN
from bora_pyro.inference.fitted import entries_of, mean_tau, tau_by_group
from bora_pyro.model import BoRA
from bora_pyro.options.field import part_of
from bora_pyro.priors import LearnedPrecision
from bora_pyro.runs.build import build_without_documents, check_can_export
from bora_pyro.runs.command import Command
from bora_pyro.runs.config.federated_server import FederatedServerConfig
from bora_pyro.runs.federated import refusals
from bora_pyro.runs.federated_peers import agreement_of, check_files, checked_strategy, public_keys
from bora_pyro.runs.fitting import RunStopped
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import COMMON
from bora_pyro.runs.versions import versions


def run_federated_server(config: FederatedServerConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Wait for the clients, run the rounds, and write a run folder.

    Args:
        config: the checked configuration.
        quiet: print nothing about clients and rounds.

    Returns:
        The content of ``metrics.json``.

    Raises:
        InputError: Flower is not installed, something in the configuration cannot be used, or too few clients have joined; then
            nothing is written.
        RunStopped: the process got Ctrl-C. The clients are told.
    """
    config.check_connection()
    check_flower()
    config = config.resolved
    check_files(certificate=config.certificate, private_key=config.private_key)
    folder = RunFolder(config.output_dir)
    folder.check_free(overwrite=config.overwrite, resume=None)
    keys = None if config.client_keys is None else public_keys(config.client_keys)
    model, say = build_without_documents(config.map_fit), _say(quiet)
    check_can_export(model.backbone)
    checked_strategy(config, model)
    numbers = sum(start.numel() * start.element_size() for start in model.starts.values())
    host, port = config.address
    files: dict[str, Any] = {"certificate": config.certificate, "private_key": config.private_key, "keys": keys}
    with FlowerServer(host, port, most=numbers + 2 * LARGEST_HEADER, **files) as link:
        say(f"listening at {link.address}; waiting for {config.num_clients} clients")
        if config.insecure:
            say("note: insecure is true: no TLS and no client keys; whoever reaches the port can read and take part")
        clients = RemoteClients(link, agreement_of(config, model), round_timeout=config.round_timeout, say=say)
        try:
            server = _server(config, model, clients)
            folder.take(overwrite=config.overwrite, resume=None)
            with folder:
                return _serve(config, folder, model, server, clients, link, say)
        except KeyboardInterrupt:
            clients.dismiss("the server was stopped")
            raise RunStopped("stopped; there are no checkpoints, start again with --overwrite true", 130) from None
        except BaseException as error:
            clients.dismiss(f"the server has ended ({error})")
            raise


def _server(config: FederatedServerConfig, model: BoRA, clients: RemoteClients) -> Server:
    """The server, after the clients have joined."""
    enrolled = clients.gather(config.num_clients, config.join_timeout)
    if isinstance(model.prior, LearnedPrecision) and not clients.validation_documents:
        raise InputError(f"{model.prior} is learned from validation documents, and no client has any; give a fixed tau")
    return Server(checked_strategy(config, model), model.starts, model.prior, enrolled, part_of(config, FederatedOptions))


def _serve(
    config: FederatedServerConfig,
    folder: RunFolder,
    model: BoRA,
    server: Server,
    clients: RemoteClients,
    link: FlowerServer,
    say: Any,
) -> dict[str, Any]:
    """Run the rounds, and write the results."""
    folder.write_config(dataclasses.asdict(config) | {"overwrite": False})
    measure = model.likelihood.measure

    def record(report: dict[str, Any]) -> None:
        folder.log(report)
        value = report.get(f"validation_{measure.name}")
        of_validation = "" if value is None else f", validation {measure.name} {value:.{measure.digits}f}"
        say(f"round {report['epoch']} of {config.rounds}: {report['clients']} messages{of_validation}")

    clients.begin(server)
    result = Rounds(server, clients, model).run(on_round=record)
    model.prior.load_state(result.tau)
    # the results come first: the clients may take their time
    folder.save_tensors(COMMON, result.common | result.tau, {"strategy": config.strategy, "base_model": config.base_model})
    common = {name: value.to(model.backbone.device) for name, value in result.common.items()}
    error = save_peft(folder.adapters / GLOBAL_MEAN, model, common, base_model=config.base_model)
    notes = [*model.backbone.notes, *clients.notes, *refusals(result.history), *absences(result.history)]
    if error:
        notes.append(f"the adapter has no exact LoRA form; it was exported with a relative error of up to {error:.2g}")
    if without := clients.end(result):
        notes.append(f"the end of the fit has not reached {', '.join(map(repr, without))}: their run folders are not finished")
    metrics = _metrics(config, model, server, result, link.traffic, notes)
    for note in notes if say is not _nothing else ():
        if note not in clients.notes:
            say(f"note: {note}")
    folder.write_metrics(metrics)
    return metrics


def _metrics(
    config: FederatedServerConfig, model: BoRA, server: Server, result: Result, traffic: Mapping[str, int], notes: list[str]
) -> dict[str, Any]:
    history = result.history
    found: dict[str, Any] = {"strategy": config.strategy, "rounds": len(history), "local_steps": config.local_steps}
    found["clients"] = {client.name: dataclasses.asdict(client) for client in server.clients.values()}
    for name in ("uploaded_bytes", "downloaded_bytes"):
        found[name] = sum(entry[name] for entry in history)
    found |= {"flower_bytes": dict(traffic), "insecure": config.insecure}
    found["refused_messages"] = sum(len(entry["refused"]) for entry in history)
    found["missing_messages"] = sum(len(entry["missing"]) for entry in history)
    taus = {name: model.prior.precision(name, start) for name, start in model.starts.items()}
    tau = mean_tau(taus, entries_of(model))
    learned = {"tau_by_group": tau_by_group(model, {})} if isinstance(model.prior, LearnedPrecision) else {}
    return {
        f"validation_{model.likelihood.measure.name}": result.score,
        "tau": tau if tau < math.inf else "inf",
        **learned,
        "learning_rate": config.learning_rate,
        "epochs": len(history),
        "best_epoch": result.best_round,
        "fit_seconds": round(result.seconds, 2),
        "seed": config.seed,
        "notes": notes,
        "versions": versions(),
        "federated": found,
    }


def _nothing(line: str) -> None:
    """Print nothing."""


def _say(quiet: bool) -> Any:
    return _nothing if quiet else lambda line: print(line, file=sys.stderr, flush=True)


def show(config: FederatedServerConfig, metrics: Mapping[str, Any]) -> None:
    """Print what the rounds have come to, what travelled, and the run folder."""
    found = metrics["federated"]
    print(
        f"{config.strategy}, {len(found['clients'])} clients, {found['rounds']} rounds of {config.local_steps} local steps: "
        f"{found['uploaded_bytes']:,} bytes uploaded and {found['downloaded_bytes']:,} downloaded by all clients; best round "
        f"{metrics['best_epoch']}"
    )
    print(
        f"run folder: {config.output_dir} (adapters/{GLOBAL_MEAN} is a PEFT folder; the adapters of the tasks are at the clients)"
    )


COMMAND = Command("federated-server", FederatedServerConfig, run_federated_server, show)

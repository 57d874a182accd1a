"""Real processes on this machine: the fit is that of the simulation, and clients die, come back and send garbage."""

from __future__ import annotations

import json
import re

import pytest
import torch

from bora_pyro.federated.deal import deal
from bora_pyro.federated.loop import federate
from bora_pyro.federated.options import FederatedOptions
from bora_pyro.federated.strategies import STRATEGIES
from bora_pyro.files.slugs import GLOBAL_MEAN
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import part_of
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.federated import FederatedConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.saved import load_run
from tests.federated.flower_fit import Running, write_certificate, write_key
from tests.tiny_base import documents, line, quick_fit, write_table

pytest.importorskip("flwr", reason="the extra 'federated' is not installed")

NAMES = {"ada": "Ada", "bo": "Børge B.", "cleo": "Cleo"}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Options that server and clients share, the options of each client, and those of the simulation."""
    folder = tmp_path_factory.mktemp("flower")
    shared = {name: value for name, value in quick_fit(folder).items() if name not in ("tau", "epochs", "data", "max_tokens")}
    shared |= {"rounds": 6, "local_steps": 2, "learning_rate": 0.03, "patience": 0}
    # a split by group would depend on the numbers of the rows, which differ in a client's own table
    table = documents().assign(split=(["train"] * 6 + ["validation"] * 2 + ["test"] * 2) * len(NAMES))
    clients = {}
    for name, task in NAMES.items():
        data = write_table(folder / f"{name}.csv", table[table["task"] == task])
        clients[name] = {"name": name, "data": data, "max_tokens": 32, "split_column": "split"}
    return shared, clients, {"data": write_table(folder / "all.csv", table), "max_tokens": 32, "split_column": "split"}


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Processes of a test that fails end with it."""
    yield
    for process in Running.started:
        process.kill()
    Running.started.clear()


def start(folder, shared, clients, *, secure=False, spoilt="", **of_server):
    """The server, and a client process of each name."""
    own = {"insecure": "true"}
    if secure:
        certificate, private_key = write_certificate(folder)
        keys = {name: write_key(folder, name) for name in clients}
        own = {"certificate": certificate, "private_key": private_key, "client_keys": folder / "keys"}
    options = shared | own | {"num_clients": len(clients), "listen": "127.0.0.1:0", "output_dir": folder / "server"} | of_server
    server = Running(folder / "server.txt", ["federated-server", *line(options)])
    server.wait_for("listening at ")
    address = re.search(r"listening at (\S+);", server.text)[1]
    lines = {}
    for name, client in clients.items():
        own = {"root_certificates": certificate, "key": keys[name]} if secure else {"insecure": "true"}
        lines[name] = ["federated-client", *line(shared | client | own | {"server": address, "output_dir": folder / name})]
    codes = {spoilt: SPOILT}
    return server, lines, {name: Running(folder / f"{name}.txt", words, codes.get(name)) for name, words in lines.items()}


@pytest.mark.parametrize(("strategy", "secure"), [("bora", True), ("ffa", False)])
def test_the_fit_is_that_of_the_simulation(given, strategy, secure, tmp_path):
    shared, clients, together = given
    shared = shared | {"strategy": strategy, "rounds": 2}
    server, _, running = start(tmp_path, shared, clients, secure=secure)
    assert [process.end() for process in (server, *running.values())] == [0] * 4, server.text
    config = parse_config(FederatedConfig, line(shared | together))
    model, data = build_run(config.map_fit, quiet=True)
    names = dict(zip(NAMES.values(), NAMES, strict=True))
    dealt = {names[task]: tasks for task, tasks in deal(data.tasks).items()}
    expected = federate(model, data, STRATEGIES[strategy](), part_of(config, FederatedOptions), clients=dealt)
    theta, mean = expected.weights()
    folder = RunFolder.open(tmp_path / "server")
    common = folder.load_tensors("common")
    for latent, value in mean.items():
        torch.testing.assert_close(common[latent], value, rtol=1e-4, atol=1e-6)
    metrics = json.loads((tmp_path / "server" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["best_epoch"] == expected.best_epoch > 0
    assert metrics["validation_perplexity"] == pytest.approx(expected.validation_score, rel=1e-5)
    assert metrics["notes"] == []
    assert metrics["federated"]["uploaded_bytes"] == sum(entry["uploaded_bytes"] for entry in expected.history)
    assert metrics["federated"]["downloaded_bytes"] == sum(entry["downloaded_bytes"] for entry in expected.history)
    assert metrics["federated"]["insecure"] != secure
    assert (tmp_path / "server" / "adapters" / GLOBAL_MEAN / "adapter_model.safetensors").is_file()
    assert ("insecure is true" in server.text) != secure
    for place, name in enumerate(NAMES):
        run = load_run(tmp_path / name)
        own, own_mean = run.fitted.weights()
        for latent, value in theta.items():
            torch.testing.assert_close(own[latent][0], value[place], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(own_mean[latent], mean[latent], rtol=1e-4, atol=1e-6)
        assert run.fitted.tasks == [NAMES[name]]
        assert run.federated_config.name == name


SPOILT = """
import sys
from bora_pyro import cli
from bora_pyro.federated.client import Client
whole = Client.message
def message(self, number):
    found = whole(self, number)
    for value in found.tensors.values():
        value.fill_(float("nan"))
    return found
Client.message = message
sys.exit(cli.run(sys.argv[1:]))
"""


def test_a_client_that_dies_and_comes_back_and_one_that_sends_garbage(given, tmp_path):
    shared, clients, _ = given
    shared = shared | {"rounds": 4, "tau": 100}
    server, lines, running = start(tmp_path, shared, clients, spoilt="bo", round_timeout=100)
    server.wait_for("round 1 of 4")
    running["ada"].kill()
    running["ada"] = Running(tmp_path / "ada.txt", lines["ada"])
    assert [process.end() for process in (server, *running.values())] == [0] * 4, server.text
    metrics = json.loads((tmp_path / "server" / "metrics.json").read_text(encoding="utf-8"))
    [refused] = [note for note in metrics["notes"] if "was refused" in note]
    assert refused.startswith("client 'bo' was refused in rounds 1, 2, 3, 4, which went on without it ('bo', round 1: 'v_proj.")
    assert refused.endswith("has a number that is not finite)")
    [back] = [note for note in metrics["notes"] if "came back" in note]
    assert re.fullmatch(r"client 'ada' came back in round [2-4] with its state of round [1-3]", back)
    assert metrics["federated"]["refused_messages"] == 4
    assert metrics["federated"]["missing_messages"] == 0
    for name in NAMES:
        own = load_run(tmp_path / name)
        assert [entry["epoch"] for entry in own.fitted.history] == [1, 2, 3, 4]
        assert (tmp_path / name / "adapters" / GLOBAL_MEAN).is_dir()

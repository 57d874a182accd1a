"""The command `federated`: a run folder like any other, what travels, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from bora_pyro.federated.deal import deal
from bora_pyro.federated.loop import federate
from bora_pyro.federated.message import Message
from bora_pyro.federated.options import FederatedOptions
from bora_pyro.federated.strategies import STRATEGIES
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import part_of
from bora_pyro.runs import federated
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.federated import FederatedConfig
from bora_pyro.runs.federated import refusals
from bora_pyro.runs.saved import load_run
from tests.tiny_base import command_main, documents, line, quick_fit, write_table

main = command_main("federated")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Options of a quick federated fit, and its run folder."""
    folder = tmp_path_factory.mktemp("federated")
    options = {name: value for name, value in quick_fit(folder).items() if name not in ("tau", "epochs")}
    options |= {"strategy": "bora", "rounds": 2, "local_steps": 2, "learning_rate": 0.03, "clients": 2}
    assert main(line(options | {"output_dir": folder / "run"})) == 0
    return options, folder / "run"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_folder_is_what_the_library_fits(given, strategy, tmp_path, capsys):
    options, folder = given
    options = options | {"strategy": strategy}
    if strategy != "bora":
        folder = tmp_path / "run"
        assert main(line(options | {"output_dir": folder})) == 0
        printed = capsys.readouterr()
        assert f"{strategy}, 2 clients, 2 rounds of 2 local steps: " in printed.out
        assert "2 clients with 1 to 2 tasks; 2 train in a round; " in printed.err
    config = parse_config(FederatedConfig, line(options))
    model, data = build_run(config.map_fit, quiet=True)
    clients = deal(data.tasks, 2)
    expected = federate(model, data, STRATEGIES[strategy](), part_of(config, FederatedOptions), clients=clients)
    found = load_run(folder)
    assert found.federated_config.strategy == strategy
    assert found.fitted.best_epoch == expected.best_epoch > 0
    for ours, theirs in zip(found.fitted.weights(), expected.weights(), strict=True):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-7)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert found.fitted.evaluate(found.data.test)["test_perplexity"] == pytest.approx(metrics["test_perplexity"], rel=1e-5)
    about = metrics["federated"]
    assert about["clients"] == clients
    assert about["uploaded_bytes"] == sum(entry["uploaded_bytes"] for entry in expected.history)
    assert about["refused_messages"] == 0
    assert (metrics["tau"] == "inf") == (not strategy.startswith("bora"))
    log = [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2]
    alone = [note for note in metrics["notes"] if "what such a client sends is the adapter of that task itself" in note]
    assert len(alone) == (strategy == "bora")
    slot = found.fitted.model.backbone.slots[0]
    written = load_file(folder / "adapters" / "ada" / "adapter_model.safetensors")
    theta = found.fitted.weights()[0]
    assert torch.equal(written[f"base_model.model.{slot.paths[0]}.lora_B.weight"], theta[f"{slot.name}.lora_B"][0, 0])
    if strategy == "ffa":  # A is common and has never changed
        key = f"base_model.model.{slot.paths[0]}.lora_A.weight"
        files = list((folder / "adapters").rglob("adapter_model.safetensors"))
        assert len(files) == 4  # three tasks and Θ
        for file in files:
            assert torch.equal(load_file(file)[key], model.fixed[f"{slot.name}.lora_A"][0])


def test_clients_with_documents_of_several_tasks(given, tmp_path, capsys):
    """A task is then what a client has, in the folder and in what reads it."""
    options, _ = given
    folder = tmp_path / "run"
    assert main(line(options | {"dirichlet": 0.5, "output_dir": folder})) == 0
    [note] = [text for text in capsys.readouterr().err.splitlines() if "by Dirichlet(0.5)" in text]
    found = load_run(folder)
    assert found.data.tasks == found.fitted.tasks == ["client 1", "client 2"]
    counts = found.data.train.documents_per_task
    assert f": {min(counts)} to {max(counts)} training documents at a client, " in note
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert note == f"note: {next(text for text in metrics['notes'] if 'Dirichlet' in text)}"
    assert metrics["federated"]["clients"] == {"client 1": ["client 1"], "client 2": ["client 2"]}
    assert found.fitted.evaluate(found.data.test)["test_perplexity"] == pytest.approx(metrics["test_perplexity"], rel=1e-5)
    _, whole = build_run(found.federated_config.map_fit, quiet=True)
    assert sum(counts) == whole.train.num_documents
    assert found.data.test.num_tokens == whole.test.num_tokens


def test_other_commands_read_the_folder(given, tmp_path, capsys):
    _, folder = given
    rows = documents(("Cleo",), number=8, seed=5).assign(task="Dora", split=["train"] * 5 + ["test"] * 3)
    words = line({"data": write_table(tmp_path / "new.csv", rows), "split_column": "split", "output_dir": tmp_path / "new"})
    assert command_main("adapt")([str(folder), *words, "--steps", "3"]) == 0, capsys.readouterr().err
    adapted = load_run(tmp_path / "new")
    assert float(adapted.fitted.deviation_norms()[0]) > 0
    mean = load_run(folder).fitted.weights()[1]
    for name, value in adapted.fitted.weights()[1].items():
        torch.testing.assert_close(value, mean[name], rtol=0, atol=0)
    assert command_main("report")([str(folder), "--samples", "0"]) == 0, capsys.readouterr().err
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Options of the federated fit that are not the defaults" in page
    assert command_main("diagnose")([str(folder)]) == 0, capsys.readouterr().err
    assert (folder / "diagnostics" / "shrinkage.csv").is_file()
    words = line({"output_dir": tmp_path / "exported"})
    assert command_main("export-adapters")([str(folder), *words]) == 0, capsys.readouterr().err
    assert list((tmp_path / "exported").rglob("adapter_model.safetensors"))
    capsys.readouterr()
    assert command_main("posterior-fit")([str(folder), "--output_dir", str(tmp_path / "posterior")]) == 2
    assert "is a federated fit, and a posterior around it would need the documents of all clients" in capsys.readouterr().err
    assert not (tmp_path / "posterior").exists()


@pytest.mark.parametrize(
    ("privacy", "guaranteed"), [({"epsilon": 3, "delta": 0.01}, True), ({"noise_multiplier": 1, "noise_seed": 4}, False)]
)
def test_the_folder_says_what_is_private(given, privacy, guaranteed, tmp_path, capsys):
    options, _ = given
    folder = tmp_path / "run"
    assert main(line(options | privacy | {"tau": 100, "output_dir": folder})) == 0
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    found = metrics["federated"]["privacy"]
    assert found["guaranteed"] == guaranteed
    assert found["statement"] in metrics["notes"]
    assert f"note: {found['statement']}" in capsys.readouterr().err
    assert metrics["best_epoch"] == metrics["epochs"] == 2
    log = [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["loss"] for entry in log] == [None, None]
    assert log[0]["privacy"]["epsilon"] < log[1]["privacy"]["epsilon"] == found["epsilon"]
    assert set(found["clients"]) == {"client 1", "client 2"}
    assert all(own["steps"] == 4 and own["epsilon"] <= found["epsilon"] for own in found["clients"].values())
    assert load_run(folder).federated_config.private
    words = line({"output_dir": tmp_path / "exported"})
    assert command_main("export-adapters")([str(folder), *words]) == 0, capsys.readouterr().err
    cards = [file.read_text(encoding="utf-8") for file in (tmp_path / "exported").rglob("README.md")]
    assert len(cards) == 5  # three tasks, Θ, and the whole
    said = "differential privacy against all who see" if guaranteed else "no privacy is claimed: the seed of the noise is known"
    assert all(said in card for card in cards)
    assert command_main("report")([str(folder), "--adapters", "false"]) == 0, capsys.readouterr().err
    assert said in (folder / "report.html").read_text(encoding="utf-8")


def test_a_refused_client_is_named_in_the_notes(given, tmp_path, monkeypatch, capsys):
    options, _ = given

    class Spoilt(federated.Federation):
        def _upload(self, message):
            if message.sender == "client 2" and message.number:
                tensors = {name: value * math.nan for name, value in message.tensors.items()}
                message = Message(message.sender, message.number, tensors)
            return super()._upload(message)

    monkeypatch.setattr(federated, "Federation", Spoilt)
    assert main(line(options | {"output_dir": tmp_path / "run"})) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    [note] = [note for note in metrics["notes"] if "was refused" in note]
    assert note.startswith("client 'client 2' was refused in rounds 1, 2, which went on without it")
    assert f"note: {note}" in capsys.readouterr().err
    assert metrics["federated"]["refused_messages"] == 2
    command_main("report")([str(tmp_path / "run"), "--adapters", "false"])
    assert "was refused in rounds 1, 2" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_long_list_of_rounds_is_cut():
    refused = [{"client": "bob", "reason": "why"}]
    [note, still] = refusals([{"epoch": number, "refused": refused * 2, "moved": number != 3} for number in range(1, 15)])
    assert still == "the messages of round 3 were too few or too large: the common values stayed as they were"
    assert note == "client 'bob' was refused in rounds 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ..., which went on without it (why)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume": "true"}, "resume is true, but a federated fit has no checkpoints; start it again with --overwrite true"),
        ({"strategy": "fedavg"}, "strategy is 'fedavg'; allowed: bora, bora_noncentered, ffa, fedit, exact_product"),
        ({"strategy": "ffa", "tau": 100}, "tau is 100, but strategy ffa has one adapter for all clients; leave tau out"),
        ({"tau": "inf"}, "tau is inf, a limit that strategy bora does not have; give learned or a number"),
        ({"tau": 0}, "tau is 0, a limit that strategy bora does not have"),
        ({"tau_per": "task"}, "tau_per is 'task'; allowed: site, layer, model"),
        ({"clients": 4}, "clients is 4; give task (a client for each task), or a number from 1 to 3"),
        ({"clients": "tasks"}, "clients is 'tasks'; give task (a client for each task), or a whole number from 1 up"),
        (
            {"dirichlet": 0.3, "clients": "task"},
            "dirichlet is 0.3, which spreads documents over a number of clients, and clients",
        ),
        ({"dirichlet": 0.3, "clients": 1}, "give a whole number from 2 up, or leave dirichlet out"),
        ({"dirichlet": -1}, "dirichlet is -1"),
        ({"dirichlet": 1e9}, "dirichlet is 1e+09; give a number between 0.001 and 1e+06"),
        ({"dirichlet": 0.3, "task_weights": "w.csv"}, "dirichlet and task_weights are both given"),
        ({"dirichlet": 0.3, "clients": 40}, "none of 100 draws gives each of 40 clients one of the 18 training documents"),
        ({"clients": 0}, "clients is '0'; give task (a client for each task), or a whole number from 1 up"),
        (
            {"strategy": "fedit", "adapter": "lora_frozen_a"},
            "averages lora_A and lora_B, and FrozenALoRA(rank=2, alpha=2.0) has lora_B; give LoRA() (--adapter lora)",
        ),
        ({"strategy": "ffa", "adapter": "nola"}, "needs a fixed A, and the adapter is NOLA"),
        ({"adapter": "triadapt"}, "changes during a fit, which a federated fit does not do"),
        ({"shard_base": "true"}, "shard_base is true, but a federated fit runs in one process"),
        ({"aggregate": "trimmed_mean", "tau": 100}, "a trimmed mean needs three clients a round, and there are 2"),
        ({"epochs": 3}, "unknown option 'epochs'"),
        ({"epsilon": 3}, "tau is learned from sums of single documents, which get no noise; with privacy give a number for tau"),
        ({"epsilon": -1, "tau": 100}, "epsilon is -1.0; give a finite number above 0"),
        ({"sample_rate": 0.5}, "sample_rate is 0.5, and neither epsilon nor noise_multiplier is given"),
        ({"epsilon": 1e-9, "delta": 1e-12, "tau": 100}, "which no noise reaches at delta 1e-12"),
    ],
)
def test_bad_input(given, changes, message, tmp_path, capsys):
    options, _ = given
    assert main(line(options | {"output_dir": tmp_path / "new"} | changes)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["federated-server", "federated-client"])
@pytest.mark.parametrize("option", [{"epsilon": 3}, {"noise_multiplier": 1}])
def test_no_privacy_is_promised_between_processes(command, option, tmp_path, capsys):
    options = {"strategy": "ffa", "insecure": "true", "output_dir": tmp_path / "out"} | option
    assert command_main(command)(line(options)) == 2
    error = capsys.readouterr().err
    [(name, value)] = option.items()
    assert f"{name} is {value}, but private steps of a client that comes back are not counted between processes yet" in error
    assert not (tmp_path / "out").exists()

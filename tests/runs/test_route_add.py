"""Adapters of new tasks for finished gates: what is fitted, what stays, the run folder, and what is refused."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from bora_pyro import Backbone, BoRA, LoRA, save_peft
from bora_pyro.exchange.factors import lora_form
from bora_pyro.exchange.load import read_peft
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.route_fit import gates_of
from bora_pyro.predict.gates import read_gates
from bora_pyro.runs.generate import COMMAND as GENERATE
from bora_pyro.runs.route_fit import COMMAND
from bora_pyro.runs.saved import load_run
from tests.tiny import of_task, random_weights
from tests.tiny_base import line, map_run, quick_fit, write_table

main = COMMAND.main
PLACES = ("run", "add", "data", "adapters", "fit_config", "output_dir")
FIT = {"epochs": 12, "patience": 0, "token_budget": 64, "learning_rate": 0.1}
NEW = {"Dora": "up down", "Émile": "day dusk", "Ada": "red"}


def texts(*tasks, number=10, column="task"):
    """Documents that repeat the words of their task."""
    return pd.DataFrame({column: task, "text": f"{n} " + 3 * f"{NEW[task]} "} for task in tasks for n in range(number))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("route_add")


@pytest.fixture(scope="module")
def options(folder):
    return quick_fit(folder) | {"learning_rate": 0.1, "epochs": 3, "alpha": 4.0}


@pytest.fixture(scope="module")
def run(folder, options):
    return map_run(options | {"tau": 1, "output_dir": folder / "run"})


@pytest.fixture(scope="module")
def routed(run, folder):
    assert main([str(run), *line(FIT | {"k": 1, "gate_scale": 2.0, "output_dir": folder / "routed"})]) == 0
    return folder / "routed"


@pytest.fixture(scope="module")
def peft(folder, options):
    """The adapters of two new tasks, of a smaller rank and another scale than those of the run."""
    for name, tasks in (("dora", ["Dora"]), ("both", ["Dora", "Émile"]), ("old", ["Ada"])):
        write_table(folder / f"{name}.csv", texts(*tasks))
    own = {"data": folder / "both.csv", "tau": 0, "rank": 1, "alpha": 1.5, "epochs": 8, "output_dir": folder / "new"}
    map_run(options | own)
    (folder / "new" / "adapters").rename(folder / "peft")
    return folder / "peft"


def add(source, adapters, data, out, **more):
    return [str(source), *line(FIT | {"add": adapters, "data": data, "output_dir": out} | more)]


@pytest.fixture(scope="module")
def more(routed, peft, folder):
    assert main(add(routed, peft / "dora", folder / "dora.csv", folder / "more")) == 0
    return folder / "more"


def change_of(model, theta, task):
    """ΔW of a task by layer, in the plain model of the same layers."""
    plain = BoRA(model.backbone, len(next(iter(theta.values()))), adapter=model.adapter)
    form = lora_form(plain, of_task(theta, task))
    return {path: form.alpha / form.rank * of["lora_B"] @ of["lora_A"] for path, of in form.factors.items()}


def test_the_gates_of_the_others_are_the_same_bit_for_bit(routed, more, peft):
    before, after = load_run(routed).fitted, load_run(more).fitted
    assert after.tasks == [*before.tasks, "Dora"]
    old, new = before.weights()[0], after.weights()[0]
    assert old.keys() == new.keys()
    for name, value in old.items():
        assert torch.equal(new[name][:3], value)
    # the new gates are the only site
    stored = load_file(more / "posterior.safetensors")
    for name, value in gates_of(new).items():
        assert bool(value[3].any())
        assert torch.equal(stored[f"theta.{name}"], value[3:])
    assert sum(value.numel() for value in after.guide.parameters()) == sum(v[3:].numel() for v in gates_of(new).values())
    # the new adapter is that of its folder, whatever its rank and scale
    given = read_peft(peft / "dora")
    for path, found in change_of(after.model, frozen_part(new), 3).items():
        of_layer = given.factors[path]
        torch.testing.assert_close(found, given.scaling * of_layer["lora_B"] @ of_layer["lora_A"])


def frozen_part(weights):
    return {name: value for name, value in weights.items() if not name.endswith("gate")}


def test_the_new_adapter_is_used(routed, more):
    """Its documents are read by it, more often than by chance, and those of the others still by theirs."""
    saved = load_run(more)
    weights, test = saved.fitted.weights()[0], saved.data.test
    found = read_gates(saved.fitted.model, weights, test)
    own = [p.argmax(1) == d for p, d in zip(found.probabilities, found.task, strict=True)]
    assert torch.cat([hits for hits, d in zip(own, found.task.tolist(), strict=True) if d == 3]).double().mean() > 0.5
    metrics = json.loads((more / "metrics.json").read_text())
    assert metrics["added"] == ["Dora"]
    assert metrics["gate"] == pytest.approx(found.numbers())
    assert saved.fitted.evaluate(test)["test_perplexity"] == pytest.approx(metrics["test_perplexity"], rel=1e-5)
    # the perplexity with the adapter of the right task
    plain = BoRA(saved.fitted.model.backbone, 4, adapter=saved.fitted.model.adapter)
    (right_one,) = evaluate(plain, test, frozen_part(weights))
    assert metrics["task_test_perplexity"] == pytest.approx(right_one.perplexity(), rel=1e-5)
    before = json.loads((routed / "metrics.json").read_text())
    norms = {row["name"]: row["deviation_norm"] for row in metrics["tasks"].values()}
    assert norms == {row["name"]: row["deviation_norm"] for row in before["tasks"].values()} | {"Dora": None}
    assert metrics["tau"] == before["tau"]
    assert repr(saved.fitted.model.router) == "MeteoRA(k=1, temperature=1.0, execution='gathered')"
    assert saved.fitted.model.prior.scale == 2


def test_old_documents_stay_on_their_side(routed, more):
    before, after = load_run(routed).data, load_run(more).data
    for name in ("train", "validation", "test"):
        old, new = getattr(before, name), getattr(after, name)
        assert [new.document(n).tolist() for n in range(len(old))] == [old.document(n).tolist() for n in range(len(old))]
        assert new.task[len(old) :].tolist() == [3] * (len(new) - len(old)) != []


def test_what_it_says_and_a_second_addition(more, peft, folder, capsys):
    """A folder of adapters, found by the names of its folders; the run has additions already."""
    write_table(folder / "emile.csv", texts("Émile", column="speaker"))
    words = add(more, folder / "one", folder / "emile.csv", folder / "again", epochs=1, task_column="speaker")
    (folder / "one").mkdir()
    (peft / "emile").rename(folder / "one" / "emile")
    assert main(words) == 0
    (folder / "one" / "emile").rename(peft / "emile")
    said = capsys.readouterr()
    assert "gates were fitted for Émile; those of the other 4 tasks are as they were" in said.out
    assert "note: task 'Émile' has the adapter in " in said.err
    before, after = load_run(more).fitted, load_run(folder / "again").fitted
    assert after.tasks == [*before.tasks, "Émile"]
    for name, value in before.weights()[0].items():
        assert torch.equal(after.weights()[0][name][:4], value)
    assert GENERATE.main([str(folder / "again"), "--prompt", "red", "--max_new_tokens", "2"]) == 0
    # the folder can be replaced, as it has no files but its own
    assert main([*words, "--overwrite", "true", "--add", str(peft / "emile")]) == 2  # --add is given twice
    again = add(more, peft / "emile", folder / "emile.csv", folder / "again", epochs=1, task_column="speaker", overwrite=True)
    assert main(again) == 0


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"data": "old.csv"}, "task 'Ada' has documents already; give documents of new tasks alone"),
        ({"data": "both.csv"}, "task 'Émile' of .*both.csv has no adapter in"),
        ({"data": "gone.csv"}, "file '.*gone.csv' does not exist"),
        ({"data": None}, "no data is given; name the documents of the new tasks, as in --data new.csv"),
        ({"add": "gone"}, "gone is no folder"),
        ({"add": None}, "data is '.*dora.csv', but it speaks of the documents of new tasks; give their adapters with --add"),
        ({"add": "large"}, "has rank 5, and those of the run in .* have 2; give one of at most this rank"),
        ({"add": "other"}, "has matrices of .*, which is no target layer"),
        ({"run": "run"}, "has no gates to add an adapter to; fit them with bora route-fit"),
        ({"run": ""}, "a run or --adapters: neither is given"),
        ({"k": 2}, "k is 2, but the gates of the run in .* were fitted with 1; leave it out"),
        ({"gate_scale": 1.0}, "gate_scale is 1.0, but the gates of the run in .* were fitted with 2.0"),
        ({"draws": 2}, "draws is 2, but adapters from PEFT folders have no posterior"),
        ({"adapters": "peft", "fit_config": "x.yaml"}, "both are given"),
        ({"data": "few.csv", "split_column": "split"}, "task 'Dora' has no validation documents"),
        ({"add": "peft"}, "the adapter in .*peft/emile has no documents in .*dora.csv, and its gate cannot be learned"),
        ({"output_dir": "routed"}, "is the run itself"),
    ],
)
def test_what_cannot_be_added(routed, run, peft, folder, options, change, error, capsys):
    if not (folder / "large").exists():
        for name, rank, targets in (("large", 5, options["targets"].split(",")), ("other", 2, ["q_proj"])):
            backbone = Backbone.from_pretrained(options["base_model"], targets=targets)
            model = BoRA(backbone, 2, adapter=LoRA(rank=rank))
            save_peft(folder / name, model, of_task(random_weights(model, seed=0), 0))
        write_table(folder / "few.csv", texts("Dora", number=3).assign(split=["train", "test", "test"]))
    values = {"run": "routed", "add": "peft/dora", "data": "dora.csv", "output_dir": "none"} | change
    paths = {name: folder / value if name in PLACES and value else value for name, value in values.items()}
    words = {name: value for name, value in paths.items() if name != "run" and value is not None}
    assert main([*([str(paths["run"])] if paths["run"] else []), *line(words)]) == 2
    assert re.search(error, capsys.readouterr().err)
    assert not (folder / "none").exists()


def test_the_same_option_of_the_gates_may_be_given(routed, peft, folder):
    assert main(add(routed, peft / "dora", folder / "dora.csv", folder / "same", epochs=1, k=1)) == 0

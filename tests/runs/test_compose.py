"""The command `compose`: fits of different layers become one run, with its numbers and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from bora_pyro.exchange.factors import lora_form
from bora_pyro.exchange.load import read_peft
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.runs.compose import COMMAND
from bora_pyro.runs.generate import GenerateConfig, generate
from bora_pyro.runs.layout import COMPOSE
from bora_pyro.runs.saved import load_run
from tests.tiny_base import command_main, documents, line, map_run, quick_fit, write_table

main = COMMAND.main


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """Fits of the two blocks: of one table and of two, of τ that is learned and given, and of other ranks and tasks."""
    folder = tmp_path_factory.mktemp("fits")
    options = quick_fit(folder) | {"learning_rate": 0.03, "epochs": 1}
    other = write_table(folder / "other.csv", documents(seed=5))
    for name, more in {
        "early": {"layers": "0"},
        "late": {"layers": "1", "targets": "fc2", "data": other, "seed": 3},
        "same-table": {"layers": "-1", "split_seed": 3},
        "rank-1": {"layers": "1", "rank": 1, "tau": 30},
        "both-blocks": {},
        "given": {"layers": "0", "tau": 30},
        "given-too": {"layers": "1", "tau": 30},
        "two-tasks": {"layers": "1", "num_tasks": 2},
    }.items():
        map_run(options | more | {"output_dir": folder / name})
    return folder


def words(fits, out, *names, **options):
    return [*(str(fits / name) for name in names), *line({"output_dir": out, "threads": 1, **options})]


def changes(run, d):
    model, theta = run.fitted.model, run.fitted.weights()[0]
    form = lora_form(model, {name: value[d] for name, value in theta.items()})
    return {path: form.alpha / form.rank * of["lora_B"] @ of["lora_A"] for path, of in form.factors.items()}


def test_fits_of_different_layers_become_a_run(fits, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(words(fits, out, "early", "late")) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"composed: {out}, 2 + 1 layers (a run of rank 2, which every command reads)\n")
    run, early, late = (load_run(path, device="cpu") for path in (out, fits / "early", fits / "late"))
    assert {slot.name: slot.blocks for slot in run.fitted.model.backbone.slots} == {"v_proj": (0,), "fc2": (0, 1)}
    for d in range(3):
        whole, parts = changes(run, d), changes(early, d) | changes(late, d)
        assert whole.keys() == parts.keys()
        assert all(torch.equal(value, parts[path]) for path, value in whole.items())
    # each learned τ stays with its layer
    tau = run.fitted.model.prior.state()["tau.fc2.lora_B"].flatten().tolist()
    own = [member.fitted.model.prior.state()["tau.fc2.lora_B"].item() for member in (early, late)]
    assert tau == pytest.approx(own, rel=1e-6)
    # the documents are those of the first fit, and each fit's own test documents are measured
    assert run.data.digest == early.data.digest
    found = json.loads((out / COMPOSE).read_text(encoding="utf-8"))
    for row, member in zip(found["members"], (early, late), strict=True):
        assert row["own"] == member.metrics["test_perplexity"]
        theta = run.fitted.weights()[0]
        base, composed = evaluate(run.fitted.model, member.data.test, None, theta)
        assert row["base"] == pytest.approx(base.perplexity(), rel=1e-5)
        assert row["composed"] == pytest.approx(composed.perplexity(), rel=1e-5)
        assert f"{row['composed']:.2f}" in printed
    assert run.metrics["test_perplexity"] == pytest.approx(found["members"][0]["composed"], rel=1e-5)
    texts, _ = generate(GenerateConfig(run=str(out), prompt=["red"], max_new_tokens=2))
    assert {text.task for text in texts} >= {"Ada", "global-mean"}
    # nothing goes on there, and it is not replaced without a word
    assert command_main()(["--config", str(out / "config.yaml"), "--resume", "true"]) == 2
    assert "joined adapters of several fits" in capsys.readouterr().err
    assert main(words(fits, out, "early", "late")) == 2
    assert "holds an earlier result; give --overwrite true" in capsys.readouterr().err


def test_a_given_tau_is_kept(fits, tmp_path):
    assert main(words(fits, tmp_path / "out", "given", "given-too")) == 0
    run = load_run(tmp_path / "out", device="cpu")
    assert run.fitted.tau() == pytest.approx(30)
    assert run.config.tau_per == "site"


def test_fits_without_a_common_prior_give_adapters(fits, tmp_path, capsys):
    assert main(words(fits, tmp_path / "out", "early", "rank-1")) == 0
    assert "no run, because" in capsys.readouterr().out
    assert not (tmp_path / "out" / "config.yaml").exists()
    peft = read_peft(tmp_path / "out" / "adapters" / "cleo")
    assert peft.rank == 2
    assert "tau" not in json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))


def test_documents_that_another_fit_has_read_are_noted(fits, tmp_path, capsys):
    assert main(words(fits, tmp_path / "out", "early", "same-table")) == 0
    runs = [load_run(fits / name, device="cpu") for name in ("early", "same-table")]
    texts = [[split.document(n).tolist() for split in (r.data.train, r.data.validation) for n in range(len(split))] for r in runs]
    tests = [[run.data.test.document(n).tolist() for n in range(len(run.data.test))] for run in runs]
    read = sum(document in texts[1] for document in tests[0])
    assert 0 < read < len(tests[0])
    assert f"{read} of the {len(tests[0])} test documents of {fits / 'early'} have the text of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("early",), "1 runs are given; name the folders of two or more fits"),
        (("early", "early"), "is given twice; give each once"),
        (("early", "both-blocks"), "both adapt model.decoder.layers.0.fc2 and 1 more; compose fits of different layers"),
        (("early", "two-tasks"), "have different tasks: only one has 'Cleo'; compose fits of the same tasks"),
        (("early", "gone"), "gone does not exist"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(fits, tmp_path, capsys, names, message):
    assert main(words(fits, tmp_path / "out", *names)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_other_blocks_is_not_read(fits, tmp_path, capsys):
    folder = fits / "given"
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    assert "layers:\n- '0'" in config
    (folder / "config.yaml").write_text(config.replace("layers:\n- '0'", "layers:\n- '1'"), encoding="utf-8")
    try:
        assert command_main("generate")([str(folder), "--prompt", "red"]) == 2
        assert "config.yaml asks for" in capsys.readouterr().err
    finally:
        (folder / "config.yaml").write_text(config, encoding="utf-8")

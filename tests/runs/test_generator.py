"""The commands `generator-fit` and `generate-adapter`: what they measure and write, what reads it, and what they refuse."""

from __future__ import annotations

import json
import re
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OPTForCausalLM

import bora_pyro as bp
from bora_pyro import Backbone, BoRA, InputError, LoRA, load_peft
from bora_pyro.adapters import ADAPTERS
from bora_pyro.data import load_tasks
from bora_pyro.data.splitters import ForNewTasks
from bora_pyro.inference.adapt import load_new_tasks
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.predict.generators import Ridge
from bora_pyro.predict.generators.left_out import leave_one_out
from bora_pyro.predict.task_vector import task_vectors
from bora_pyro.runs.adapt import run_adapt
from bora_pyro.runs.config.adapt import AdaptConfig
from bora_pyro.runs.config.generator_fit import GeneratorFitConfig
from bora_pyro.runs.generate_adapter import COMMAND as GENERATE
from bora_pyro.runs.generate_adapter import GENERATED
from bora_pyro.runs.generator_fit import COMMAND as FIT
from bora_pyro.runs.generator_fit import check_run, notes, run_generator_fit
from bora_pyro.runs.generator_folder import RECORD, read_generator
from bora_pyro.runs.saved import load_run
from tests.choice_table import OPTIONS, write
from tests.choice_table import table as choices
from tests.runs.posterior import posterior_fit
from tests.tiny import loaded_peft
from tests.tiny_base import WORDS, command_main, documents, line, map_run, quick_fit, save_base, write_table

TASKS = (*WORDS, "Dora", "Eve")
QUICK = {"threads": 1, "device": "cpu"}


def table(tasks, *, number=10, seed=0):
    """Documents whose words are those of two of the toy tasks, for tasks beyond these."""
    mixed = {"Dora": ("Ada", "Cleo"), "Eve": ("Børge B.", "Cleo"), "Zoe": ("Ada", "Børge B.")}
    parts = []
    for task in tasks:
        sources = mixed.get(task, (task,))
        parts += [documents((source,), number=number // len(sources), seed=seed).assign(task=task) for source in sources]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    options = quick_fit(folder) | {"learning_rate": 0.03, "epochs": 3}
    return options | {"data": write_table(folder / "documents.csv", table(TASKS))}


@pytest.fixture(scope="module")
def fitted(inputs, tmp_path_factory):
    """A MAP fit of five tasks, and a posterior around it."""
    folder = tmp_path_factory.mktemp("fits")
    map_run(inputs | {"output_dir": folder / "run"})
    posterior_fit(folder / "run", folder / "posterior")
    return folder


@pytest.fixture(scope="module")
def generators(fitted):
    """A generator of each method: ridge of the MAP fit, the others of the posterior."""
    words = {"ridge": {}, "cvae": {"method_option": "steps=30", "draws": 2}, "nearest": {"left_out": "false"}, "mean": {}}
    for method, options in words.items():
        run = fitted / ("run" if method == "ridge" else "posterior")
        options = QUICK | {"method": method, "output_dir": fitted / method} | options
        assert FIT.main([str(run), *line(options)]) == 0
    return fitted


@pytest.fixture
def new(tmp_path):
    return write_table(tmp_path / "new.csv", table(("Zoe", "Eve"), seed=5))


def test_the_fit_is_that_of_the_library(generators, capsys):
    run = load_run(generators / "run", device="cpu")
    saved = read_generator(generators / "ridge")
    vectors = task_vectors(run.fitted.model.backbone, run.data.train)
    latents = saved.generator.layout.flatten(run.fitted.weights()[0])
    assert torch.equal(saved.generator.space.standard.centre, latents.double().mean(0).float())
    of_vector = saved.record["vector"]
    assert (of_vector["documents_read"], of_vector["tokens_read"]) == (vectors.documents, vectors.tokens)
    assert saved.record["tasks"] == run.data.tasks == sorted(TASKS)
    assert saved.record["base"]["digest"] == run.fitted.model.backbone.digest
    assert saved.record["posterior_sha256"] == run.folder.digest_of("posterior")
    # the errors of tasks left out, and the perplexities with their adapters
    found = leave_one_out({"ridge": Ridge}, vectors.vectors, latents, layout=saved.generator.layout)["ridge"]
    rows = saved.record["left_out"]["methods"]
    assert list(rows) == ["base", "mean", "nearest", "ridge", "own"]
    norms = (found - latents).norm(dim=1)
    assert rows["ridge"]["error"] == pytest.approx(float(norms.square().mean().sqrt()), rel=1e-4)
    assert list(rows["ridge"]["error_by_task"].values()) == pytest.approx(norms.tolist(), rel=1e-4)
    mean = (latents.sum(0) - latents) / (len(latents) - 1)
    assert rows["mean"]["error"] == pytest.approx(float((mean - latents).norm(dim=1).square().mean().sqrt()), rel=1e-4)
    (score,) = evaluate(run.fitted.model, run.data.test, saved.generator.layout.unflatten(found))
    assert rows["ridge"]["test_perplexity"] == pytest.approx(score.perplexity(), rel=1e-5)
    assert rows["own"]["test_perplexity"] == pytest.approx(run.metrics["test_perplexity"], rel=1e-5)
    assert rows["base"]["test_perplexity"] == pytest.approx(run.metrics["base_test_perplexity"], rel=1e-5)
    size = (generators / "ridge" / "generator.safetensors").stat().st_size
    assert saved.record["bytes"] == {"generator": size, "adapters": 4 * latents.numel()}


def test_what_is_printed(fitted, tmp_path, capsys):
    options = QUICK | {"method": "ridge", "documents": 2, "states": "mean", "output_dir": tmp_path / "out"}
    assert FIT.main([str(fitted / "run"), *line(options)]) == 0
    out, err = capsys.readouterr()
    record = json.loads((tmp_path / "out" / RECORD).read_text(encoding="utf-8"))
    assert record["vector"]["documents_read"] == [2] * 5
    tokens = sum(record["vector"]["tokens_read"])
    assert f"5 tasks; vectors of 16 numbers from 10 training documents ({tokens} tokens), 2 to 2 a task" in err
    for name in ("no adapter", "mean adapter", "nearest", "ridge", "the task's own"):
        assert re.search(rf"^  {name} .*\d+\.\d\d$", out, re.M), name
    assert f"ridge chose penalty {record['chosen']['penalty']:g}\n" in out
    share = record["bytes"]["generator"] / record["bytes"]["adapters"]
    assert out.endswith(f"generator: {tmp_path / 'out'} ({share:.0%} of the bytes of all adapters)\n")


def test_a_method_that_is_no_better_is_named():
    rows = {"mean": {"error": 1.0}, "ridge": {"error": 0.5}, "cvae": {"error": 0.75}}
    assert notes("ridge", rows) == notes("mean", rows) == []
    assert notes("cvae", rows) == ["cvae is no nearer to the adapters of tasks left out than ridge regression (0.750 and 0.500)"]
    assert len(notes("cvae", rows | {"cvae": {"error": 1.0}})) == 2
    assert notes("ridge", rows | {"ridge": {"error": 1.5}})[0].startswith("ridge is no nearer")


@pytest.mark.parametrize("method", ["ridge", "cvae", "nearest", "mean"])
def test_generated_adapters_are_those_of_the_vectors(generators, new, tmp_path, capsys, method):
    """Neither the run nor its documents are needed, and PEFT reads what was generated."""
    alone = shutil.copytree(generators / method, tmp_path / "generator")
    draws = {"draws": 2} if method == "cvae" else {}
    out = tmp_path / "out"
    assert GENERATE.main([str(alone), *line(QUICK | {"data": new, "held_out": 0.5, "output_dir": out} | draws)]) == 0
    printed = capsys.readouterr()
    assert "20 rows read; 20 documents of 2 tasks: 10 train, 0 validation, 10 test" in printed.err
    record = json.loads((out / GENERATED).read_text(encoding="utf-8"))
    run, saved = load_run(generators / "posterior", device="cpu"), read_generator(alone)
    backbone = run.fitted.model.backbone
    data = load_tasks(new, backbone.tokenizer, split=ForNewTasks(0.5, 0), max_tokens=32)
    vectors = task_vectors(backbone, data.train)
    model = BoRA(backbone, 2, adapter=LoRA(2))
    theta = []
    for d, (slug, task) in enumerate((("eve", "Eve"), ("zoe", "Zoe"))):
        row = record["tasks"][slug]
        assert (row["name"], row["documents_read"], row["tokens_read"]) == (task, 5, vectors.tokens[d])
        expected = saved.generator.generate(vectors.vectors[d])
        written = load_peft(out / "adapters" / slug, model)
        for name, value in expected.items():
            torch.testing.assert_close(written[name], value, rtol=0, atol=0)
        theta.append(written)
        peft = loaded_peft(backbone.model, out / "adapters" / slug)
        ids = data.test.document(0)[None]
        change = model.change({name: value[None] for name, value in written.items()}, torch.zeros(1, dtype=torch.int64))
        with torch.inference_mode():
            torch.testing.assert_close(peft(input_ids=ids).logits, backbone.logits(ids, change), rtol=1e-4, atol=1e-5)
    assert json.loads((out / "adapters" / "tasks.json").read_text(encoding="utf-8")) == {"eve": "Eve", "zoe": "Zoe"}
    centre = saved.generator.layout.unflatten(saved.generator.space.standard.centre)
    both = {name: torch.stack([weights[name] for weights in theta]) for name in theta[0]}
    of_mean = {name: value.expand(2, *value.shape) for name, value in centre.items()}
    base, mean, generated = evaluate(model, data.test, None, of_mean, both)
    for key, scores in (("base_", base), ("mean_", mean), ("", generated)):
        assert record[f"{key}test_perplexity"] == pytest.approx(scores.perplexity(), rel=1e-5)
        assert record["tasks"]["zoe"][f"{key}test_perplexity"] == pytest.approx(scores.perplexity(1), rel=1e-5)
    assert f"{generated.perplexity():,.2f}" in printed.out
    if draws:
        first, second = (load_peft(out / "adapters" / f"zoe--draw-{k}", model) for k in range(2))
        assert not torch.equal(first["fc2.lora_A"], second["fc2.lora_A"])
        assert torch.equal(first["fc2.lora_A"], saved.generator.generate(vectors.vectors[1], draw=0)["fc2.lora_A"])


def test_without_documents_held_out_nothing_is_measured(generators, new, tmp_path, capsys):
    options = QUICK | {"data": new, "documents_read": 3, "output_dir": tmp_path / "out"}
    assert GENERATE.main([str(generators / "ridge"), *line(options)]) == 0
    out, err = capsys.readouterr()
    assert "perplexity" not in out
    assert "no document was held out, so nothing says how good the adapters are; give --held_out 0.5" in err
    record = json.loads((tmp_path / "out" / GENERATED).read_text(encoding="utf-8"))
    assert [row["documents_read"] for row in record["tasks"].values()] == [3, 3]
    assert "test_perplexity" not in record
    # taken, and replaced
    assert GENERATE.main([str(generators / "ridge"), *line(options)]) == 2
    assert "holds an earlier result" in capsys.readouterr().err
    assert GENERATE.main([str(generators / "ridge"), *line(options | {"overwrite": "true"})]) == 0


def test_documents_held_out_by_group():
    """A group is on one side, and a task of one group keeps it for its vector."""
    rows = [{"task": "a", "text": f"x{n}", "doc_id": f"g{n // 2}"} for n in range(8)] + [
        {"task": "b", "text": "y", "doc_id": "h"}
    ]
    tokenizer = Backbone.from_pretrained("builtin:nano").tokenizer
    data = load_tasks(bp.table(rows), tokenizer, split=ForNewTasks(0.5, 3))
    sides = data.split_record["tasks"]
    assert sorted(sides["a"].values()) == ["test", "test", "train", "train"]
    assert sides["b"] == {"h": "train"}
    assert data.train.documents_per_task == [4, 1]
    given = [row | {"part": "train" if n else "test"} for n, row in enumerate(rows)]
    with pytest.raises(InputError, match=r"held_out is 0.5, but the data has a split of its own, which is used"):
        load_tasks(bp.table(given), tokenizer, split=ForNewTasks(0.5), split_column="part", group_column="text")


def test_an_adaptation_begins_at_generated_adapters(generators, new, tmp_path):
    """After no more than a step the tasks are near them; the prior is that of the fit."""
    words = line(QUICK | {"data": new, "steps": 1, "learning_rate": 1e-12, "start_from_generator": generators / "ridge"})
    assert command_main("adapt")([str(generators / "run"), *words, "--output_dir", str(tmp_path / "out")]) == 0
    run, saved = load_run(tmp_path / "out"), read_generator(generators / "ridge")
    of_fit = load_run(generators / "run")
    vectors = task_vectors(of_fit.fitted.model.backbone, load_new_tasks(new, of_fit.fitted, max_tokens=32).train)
    theta, mean = run.fitted.weights()
    for d in range(2):
        for name, value in saved.generator.generate(vectors.vectors[d]).items():
            torch.testing.assert_close(theta[name][d], value, rtol=1e-4, atol=1e-6)
    for name, value in of_fit.fitted.weights()[1].items():
        torch.testing.assert_close(mean[name], value, rtol=0, atol=0)
    assert run.fitted.tau() == pytest.approx(of_fit.fitted.tau(), rel=1e-5)


@pytest.mark.parametrize("adapter", ["lora_shared_plus_task", "nola", "sara", "triadapt"])
def test_the_nearest_task_of_a_task_is_itself(inputs, tmp_path, adapter):
    """Fixed tensors, masks and shared latents come back: a task of the fit gets its own adapter again, and its perplexity."""
    assert adapter in ADAPTERS
    options = inputs | {"epochs": 1, "adapter": adapter, "targets": "v_proj", "learning_rate": 0.1}
    run = load_run(map_run(options | {"output_dir": tmp_path / "run"}), device="cpu")
    words = line(QUICK | {"method": "nearest", "left_out": "false", "output_dir": tmp_path / "generator"})
    assert FIT.main([str(tmp_path / "run"), *words]) == 0
    shutil.rmtree(tmp_path / "run" / "adapters")
    sides = run.data.split_record["tasks"]["Cleo"]
    rows = table(TASKS).query("task == 'Cleo'").assign(split=[sides[group] for group in sorted(sides, key=_number)])
    words = line(
        QUICK | {"data": write_table(tmp_path / "cleo.csv", rows), "split_column": "split", "output_dir": tmp_path / "out"}
    )
    assert GENERATE.main([str(tmp_path / "generator"), *words]) == 0
    record = json.loads((tmp_path / "out" / GENERATED).read_text(encoding="utf-8"))
    own = run.metrics["tasks"]["cleo"]
    assert record["tasks"]["cleo"]["documents_read"] == own["train_documents"]
    assert record["tasks"]["cleo"]["test_documents"] == own["test_documents"]
    assert record["test_perplexity"] == pytest.approx(own["test_perplexity"], rel=1e-5)
    assert abs(record["mean_test_perplexity"] / own["test_perplexity"] - 1) > 5e-5  # another adapter than the mean


def _number(group):
    return int("".join(filter(str.isdigit, group)) or 0)


def test_answers_among_options(inputs, tmp_path, capsys):
    tasks = ("Ada", "Børge B.", "Cleo", "Dora")
    rows = [
        row | {"completion": OPTIONS[(tasks.index(row["task"]) + int(row["prompt"][0]) // 3) % 3]} for row in choices(tasks[:3])
    ]
    rows += [row | {"task": "Dora"} for row in choices(("Ada",))]
    columns = {"split_column": "split", "options_column": "options", "prompt_column": "prompt", "completion_column": "completion"}
    options = inputs | columns | {"data": write(tmp_path / "rows.jsonl", rows), "likelihood": "choice", "tau": 30}
    map_run(options | {"output_dir": tmp_path / "run"})
    words = line(QUICK | {"method": "ridge", "output_dir": tmp_path / "generator"})
    assert FIT.main([str(tmp_path / "run"), *words]) == 0
    methods = read_generator(tmp_path / "generator").record["left_out"]["methods"]
    run = load_run(tmp_path / "run")
    assert methods["own"]["test_nll"] == pytest.approx(run.metrics["test_nll"], rel=1e-5)
    new = write(tmp_path / "new.jsonl", [row | {"task": "Zoe"} for row in rows if row["task"] == "Cleo"])
    words = line(QUICK | {"data": new, "split_column": "split", "output_dir": tmp_path / "out"})
    assert GENERATE.main([str(tmp_path / "generator"), *words]) == 0
    record = json.loads((tmp_path / "out" / GENERATED).read_text(encoding="utf-8"))
    assert record["tasks"]["zoe"]["documents_read"] == 6
    assert 0 < record["test_nll"] < 10
    assert re.search(r"^  task .*NLL +NLL +NLL$", capsys.readouterr().out, re.M)


@pytest.fixture(scope="module")
def others(inputs, generators):
    """Runs that no generator, or not this one, can be used with."""
    options = inputs | {"epochs": 1}
    map_run(options | {"num_tasks": 3, "output_dir": generators / "few"})
    map_run(options | {"tau": "inf", "output_dir": generators / "one"})
    map_run(options | {"rank": 1, "output_dir": generators / "rank-1"})
    return generators


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("few", {}, "the run has 3 tasks, and a generator learns from 4 or more; fit more tasks"),
        ("one", {}, "all tasks have the same adapter, so there is nothing to generate"),
        ("run", {"draws": 4}, "draws is 4, but the run in .* is a point estimate, which has none; leave draws out, or give"),
        ("run", {"method": "rigde"}, "method is 'rigde'; allowed: cvae, ridge, nearest, mean; did you mean 'ridge'?"),
        ("run", {"method_option": "stepz=3"}, "method cvae has no option 'stepz'; did you mean 'steps'?"),
        ("run", {"states": "first"}, "states is 'first'; allowed: last, mean"),
        ("run", {"output_dir": "RUN"}, "is the run itself; give another folder for the generator"),
        ("gone", {}, "gone does not exist"),
        ("", {}, "no run is given"),
    ],
)
def test_what_no_generator_is_fitted_to(others, tmp_path, capsys, run, options, message):
    options = QUICK | {"output_dir": tmp_path / "out"} | options
    options = {key: others / run if value == "RUN" else value for key, value in options.items()}
    assert FIT.main([*([str(others / run)] if run else []), *line(options)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_adapters_without_a_common_form_are_refused(fitted):
    run = load_run(fitted / "run", device="cpu")
    name = next(iter(run.fitted.model.starts))
    start = run.fitted.model.starts[name]
    run.fitted.model.tensors.masks[name] = torch.ones((5, *start.shape), dtype=torch.bool)
    with pytest.raises(
        InputError, match=r"each task has a mask of its own for 'v_proj.lora_A', so the adapters have no common form"
    ):
        check_run(run)


def test_an_ensemble_is_refused(inputs, tmp_path):
    words = inputs | {"epochs": 1, "members": 2, "num_tasks": 2, "max_train_documents": 2, "max_eval_documents": 1}
    assert command_main("ensemble")(line(words | {"output_dir": tmp_path / "ensemble"})) == 0
    with pytest.raises(
        InputError, match=r"is an ensemble: its members began at different starts.* use one of them, such as .*members/0"
    ):
        run_generator_fit(GeneratorFitConfig(run=str(tmp_path / "ensemble"), output_dir=str(tmp_path / "out")), quiet=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generator": "gone"}, "there is no generator in .*gone; give the output_dir of generator_fit.py"),
        ({"generator": "run"}, "there is no generator in"),
        ({"held_out": 1}, "held_out is 1.0; give a share from 0 to below 1, such as 0.5"),
        ({"draws": 2}, "draws is 2, but the generator in .*ridge gives one adapter and no draws; leave it out"),
        ({"data": ""}, "data is empty|no data is given"),
        ({"text_column": "txt"}, "no column 'txt'"),
        ({"base_model": "OTHER"}, "is of another base, .*: its weights are not those of"),
        ({"base_model": "WIDER"}, "is of another base, .*: its weights are not those of"),
    ],
)
def test_bad_input_of_generate_adapter(generators, new, tmp_path, capsys, change, message):
    bases = {"OTHER": {}, "WIDER": {"hidden_size": 32, "word_embed_proj_dim": 32}}
    if (kind := change.get("base_model")) is not None:
        base = save_base(tmp_path / "base")
        backbone = Backbone.from_pretrained(base)
        if bases[kind]:
            config = backbone.model.config
            config.update(bases[kind])
            OPTForCausalLM(config).save_pretrained(base)
        else:
            with torch.no_grad():
                backbone.model.get_input_embeddings().weight += 1
            backbone.model.save_pretrained(base)
        change = {"base_model": base}
    options = QUICK | {"data": new, "output_dir": tmp_path / "out"} | change
    generator = generators / options.pop("generator", "ridge")
    assert GENERATE.main([str(generator), *line(options)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_a_generator_of_another_adapter_starts_no_adaptation(others, new, tmp_path):
    config = AdaptConfig(
        run=str(others / "rank-1"),
        data=new,
        steps=1,
        start_from_generator=str(others / "ridge"),
        output_dir=str(tmp_path / "out"),
    )
    with pytest.raises(InputError, match=r"is of another adapter, .*'rank': 2.* than .*'rank': 1") as caught:
        run_adapt(config, quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["record", "tensor", "bytes", "numbers", "fit"])
def test_a_damaged_folder_is_one_line(generators, new, tmp_path, capsys, damage):
    folder = shutil.copytree(generators / "ridge", tmp_path / "generator")
    file = folder / "generator.safetensors"
    if damage == "record":
        (folder / RECORD).write_text("{}", encoding="utf-8")
    elif damage == "bytes":
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    elif damage == "fit":
        (folder / "fit.yaml").write_text("rnak: 3\n", encoding="utf-8")
    else:
        tensors = load_file(file)
        if damage == "tensor":
            del tensors["method.weight"]
        else:
            tensors["space.centre"][0] = torch.nan
        save_file(tensors, file)
    assert GENERATE.main([str(folder), *line(QUICK | {"data": new, "output_dir": tmp_path / "out"})]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert not (tmp_path / "out").exists()

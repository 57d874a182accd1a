"""MTLoRA through the commands: a run with ranks by task is fitted, read back, resumed, adapted, continued and exported."""

from __future__ import annotations

import json

import pytest
import torch

from bora_pyro import InputError
from bora_pyro.predict.generate import generate_side_by_side
from bora_pyro.runs.saved import load_run
from tests.tiny_base import WORDS, command_main, documents, line, quick_fit, write_table

RANKS = dict(zip(WORDS, (1, 2, 3), strict=True))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Options of a quick fit, with ranks by task, own pairs in the last block, and learned scales."""
    folder = tmp_path_factory.mktemp("mtlora")
    ranks = folder / "ranks.csv"
    ranks.write_text("task,rank\n" + "".join(f"{task},{rank}\n" for task, rank in RANKS.items()), encoding="utf-8")
    weights = folder / "weights.yaml"
    weights.write_text("Ada: 2\n", encoding="utf-8")
    given = (f"task_ranks={ranks}", "task_scale=2", "task_layers=-1 fc2", "trainable_scales=true")
    return quick_fit(folder) | {"adapter": "mtlora", "epochs": 1, "adapter_option": given, "task_weights": str(weights)}


def words(options):
    """A command line on which the options of the adapter are repeated."""
    options = dict(options)
    return [*line({k: v for k, v in options.items() if k != "adapter_option"})] + [
        word for value in options.get("adapter_option", ()) for word in ("--adapter_option", value)
    ]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert command_main()(words(inputs | {"output_dir": folder})) == 0
    return folder


def test_the_number_of_latents_is_printed(inputs, tmp_path, capsys):
    assert command_main()(words(inputs | {"output_dir": tmp_path / "run"})) == 0
    # two kinds of layers, 16 x 16 and 32 x 16, in two blocks, with one scale each; own pairs in one layer, with one scale
    shared, own = 2 * (2 * (16 + 16) + 1 + 2 * (32 + 16) + 1), [rank * (32 + 16) + 1 for rank in (1, 3)]
    line = f"latents: {shared} for all tasks together, and {own[0]} to {own[1]} for each task\n"
    assert line in capsys.readouterr().err


def test_a_run_comes_back_with_its_ranks(finished):
    run = load_run(finished)
    model = run.fitted.model
    assert tuple(model.adapter.task_ranks) == tuple(RANKS[task] for task in run.fitted.tasks)
    assert model.tensors.names(model.backbone.slots[0]) == ["shared_A", "shared_B", "shared_log_scale"]
    mask = model.tensors.masks["fc2.lora_A"]
    assert mask.sum((2, 3)).tolist() == [[0, RANKS[task]] for task in run.fitted.tasks]
    metrics = json.loads((finished / "metrics.json").read_text(encoding="utf-8"))
    assert run.fitted.evaluate(run.data.test)["test_perplexity"] == pytest.approx(metrics["test_perplexity"], rel=1e-5)
    for slug, rank in zip(metrics["tasks"], RANKS.values(), strict=True):
        config = json.loads((finished / "adapters" / slug / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["r"] == 2 + rank
    config = json.loads((finished / "adapters" / "global-mean" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 5


def test_texts_are_written_with_the_ranks_of_their_tasks(finished):
    fitted = load_run(finished).fitted
    options = {"max_new_tokens": 5, "raw": True}
    together = generate_side_by_side(fitted, "1 red", [*WORDS, "global-mean", "base"], **options)
    for text in together:
        [alone] = generate_side_by_side(fitted, "1 red", [text.task], **options)
        torch.testing.assert_close(text.log_prob, alone.log_prob, atol=1e-5, rtol=1e-4)
    # each is the author of its own pass
    model, ids = fitted.model, together[2].tokens[None]
    theta, mean = fitted.weights()
    stacked = {name: torch.cat([theta[name], mean[name][None]]) for name in theta}
    own, other = (model.backbone.logits(ids, model.change(stacked, torch.tensor([2]), torch.tensor([d]))) for d in (2, 0))
    assert not torch.equal(own, other)


def test_a_run_is_resumed_only_with_the_same_ranks(inputs, finished, tmp_path, capsys):
    options = inputs | {"output_dir": tmp_path / "run"}
    assert command_main()(words(options)) == 0
    ranks = tmp_path / "ranks.csv"
    ranks.write_text("task,rank\n" + "".join(f"{task},{4 - rank}\n" for task, rank in RANKS.items()), encoding="utf-8")
    given = [f"task_ranks={ranks}", *inputs["adapter_option"][1:]]
    capsys.readouterr()
    assert command_main()(words(options | {"adapter_option": given, "resume": "true", "epochs": 2})) == 2
    assert "adapter_option is" in capsys.readouterr().err
    # the same name of the file, with other ranks
    original = inputs["adapter_option"][0].removeprefix("task_ranks=")
    with open(original, encoding="utf-8") as file:
        content = file.read()
    try:
        with open(original, "w", encoding="utf-8") as file:
            file.write(ranks.read_text(encoding="utf-8"))
        assert command_main()(words(options | {"resume": "true", "epochs": 2})) == 2
        err = capsys.readouterr().err
        assert "the ranks of the tasks (task_ranks) are not those with which the fit began" in err
        with pytest.raises(InputError, match=r"its config\.yaml asks for BoRA\(.*Ranks\(3, 2, 1\)"):
            load_run(tmp_path / "run")
    finally:
        with open(original, "w", encoding="utf-8") as file:
            file.write(content)
    assert command_main()(words(options | {"resume": "true", "epochs": 2})) == 0


@pytest.mark.parametrize("guide", ["map", "normal"])
def test_new_tasks_are_adapted_and_read_back(finished, tmp_path, guide):
    data = write_table(tmp_path / "new.csv", documents(("Cleo", "Ada"), number=3).replace({"Cleo": "Dora", "Ada": "Emil"}))
    options = {"data": data, "steps": 2, "guide": guide, "learning_rate": 0.1, "output_dir": tmp_path / "new"}
    assert command_main("adapt")([str(finished), *line(options)]) == 0
    found = load_run(tmp_path / "new")
    adapter = found.fitted.model.adapter
    assert (adapter.task_ranks, adapter.task_rank) == (None, 3)
    assert found.fitted.model.tensors.masks["fc2.lora_A"].sum((1, 2)).tolist() == [0, 3]
    assert all(norm > 0 for norm in found.fitted.deviation_norms().tolist())
    config = json.loads((tmp_path / "new" / "adapters" / "dora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 5


def test_a_posterior_and_its_exports(finished, tmp_path):
    options = {"epochs": 1, "draws": 2, "output_dir": tmp_path / "posterior"}
    assert command_main("posterior-fit")([str(finished), *line(options)]) == 0
    assert load_run(tmp_path / "posterior").fitted.model.tensors.masks["fc2.lora_A"].dim() == 4
    export = {"draws": 1, "output_dir": tmp_path / "exports"}
    assert command_main("export-adapters")([str(tmp_path / "posterior"), *line(export)]) == 0
    merged = {"merged": "global-mean", "output_dir": tmp_path / "merged"}
    assert command_main("export-adapters")([str(tmp_path / "posterior"), *line(merged)]) == 0
    ranks = {
        folder.parent.name: json.loads(folder.read_text(encoding="utf-8"))["r"]
        for folder in (tmp_path / "exports").glob("*/adapter_config.json")
    }
    assert ranks["ada"] == ranks["ada--draw-0"] == 3
    assert ranks["cleo"] == ranks["global-mean"] == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["task_ranks=none.csv"], "task_ranks 'none.csv' cannot be read"),
        (
            ["task_layers=7"],
            "task_layers names block 7, in which there is no such layer; the first is block 0 and the last is block 1",
        ),
        (
            ["module_ranks=fc3:2"],
            "module_ranks names 'fc3', which is no kind of adapted layer; there are v_proj, fc2; did you mean",
        ),
        (["task_rang=2"], "adapter mtlora has no option 'task_rang'; did you mean 'task_rank'?"),
        (["task_rank=0"], "task_rank is 0; give a whole number from 1 to 65536"),
        (["shared_scale=4"], "alpha 6 is the scale alpha/rank = 3, and shared_scale is 4; give one of them"),
    ],
)
def test_a_bad_option_is_one_line_and_nothing_is_written(inputs, tmp_path, given, message, capsys):
    options = inputs | {"adapter_option": given, "output_dir": tmp_path / "run"}
    if "shared_scale=4" in given:
        options["alpha"] = 6
    assert command_main()(words(options)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert not (tmp_path / "run").exists()

"""The command `fold`: its numbers, what reads its folder, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bora_pyro import BoRA, LoRA
from bora_pyro.backbone.tokenizer import load_tokenizer
from bora_pyro.data import load_tasks
from bora_pyro.exchange.factors import lora_form
from bora_pyro.exchange.load import load_peft, read_peft
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.predict.mixture import predictive
from bora_pyro.report.export import COMMAND as EXPORT
from bora_pyro.runs.fold import COMMAND
from bora_pyro.runs.fold_members import joint_split
from bora_pyro.runs.generate import GenerateConfig, generate
from bora_pyro.runs.infer_task import InferTaskConfig, infer_tasks
from bora_pyro.runs.layout import FOLD
from bora_pyro.runs.saved import load_run
from tests.tiny_base import command_main, documents, line, map_run, quick_fit, save_base, write_table

main = COMMAND.main


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """Three fits of one split, of other seeds; one of another split; and one of another rank."""
    folder = tmp_path_factory.mktemp("fits")
    options = quick_fit(folder) | {"learning_rate": 0.03}
    sides = ["train"] * 6 + ["validation"] * 2 + ["test"] * 2
    given = options | {"data": write_table(folder / "given.csv", documents().assign(part=sides * 3)), "split_column": "part"}
    for seed in range(3):
        map_run(given | {"seed": seed, "output_dir": folder / f"seed-{seed}"})
    map_run(given | {"rank": 1, "tau": 30, "output_dir": folder / "rank-1"})
    larger = write_table(folder / "larger.csv", documents(number=20))
    for seed in range(2):
        map_run(options | {"data": larger, "epochs": 1, "seed": seed, "output_dir": folder / f"split-{seed}"})
    return folder


def words(fits, out, *names, **options):
    return [*(str(fits / name) for name in names), *line({"output_dir": out, "threads": 1, **options})]


def changes(run):
    """ΔW of each task and layer, (out, in)."""
    model, theta = run.fitted.model, run.fitted.weights()[0]
    forms = [lora_form(model, {name: value[d] for name, value in theta.items()}) for d in range(len(run.data.tasks))]
    return [{path: form.alpha / form.rank * of["lora_B"] @ of["lora_A"] for path, of in form.factors.items()} for form in forms]


SEEDS = ("seed-0", "seed-1", "seed-2")


def test_the_folded_fit_is_a_run_with_the_mean_change(fits, tmp_path, capsys):
    assert main(words(fits, tmp_path / "out", *SEEDS)) == 0
    out, _ = capsys.readouterr()
    assert out.endswith(f"folded: {tmp_path / 'out'} (a run of rank 6, which every command reads)\n")
    found = json.loads((tmp_path / "out" / FOLD).read_text())
    run, members = load_run(tmp_path / "out", device="cpu"), [load_run(fits / name, device="cpu") for name in SEEDS]
    assert (run.config.rank, run.config.alpha, run.fitted.model.adapter.rank) == (6, 2.0, 6)
    own = [changes(member) for member in members]
    for d, of_task in enumerate(changes(run)):
        for path, value in of_task.items():
            torch.testing.assert_close(value, sum(member[d][path] for member in own) / 3, rtol=1e-5, atol=1e-7)
    # perplexities: of the members as their runs have them, of the mixture, and of the fold
    assert [row["test_perplexity"] for row in found["members"]] == pytest.approx(
        [member.metrics["test_perplexity"] for member in members], rel=1e-5
    )
    (score,) = evaluate(run.fitted.model, run.data.test, run.fitted.weights()[0])
    assert found["test_perplexity"] == pytest.approx(score.perplexity(), rel=1e-5) == run.metrics["test_perplexity"]
    draws = [member.fitted.weights()[0] for member in members]
    mixture = predictive(members[0].fitted.model, run.data.test, lambda: draws).perplexity()
    assert found["mixture_test_perplexity"] == pytest.approx(mixture, rel=1e-4)
    assert f"{mixture:.2f}" in out
    assert found["same_split"]
    assert found["notes"] == []
    assert set(found["relative_error"].values()) == {0.0}
    assert [row["posterior_sha256"] for row in found["members"]] == [member.folder.digest_of("posterior") for member in members]
    # a learned tau is the geometric mean
    for name, tau in run.fitted.tau_by_group().items():
        assert math.log(tau) == pytest.approx(
            sum(math.log(member.fitted.tau_by_group()[name]) for member in members) / 3, rel=1e-4
        )


def test_what_reads_runs_and_adapters_reads_the_folder(fits, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(words(fits, out, *SEEDS[:2], mixture="false")) == 0
    assert "mixture_test_perplexity" not in json.loads((out / FOLD).read_text())
    assert read_peft(out / "adapters" / "ada").rank == 4
    texts, _ = generate(GenerateConfig(run=str(out), prompt=["red"], max_new_tokens=2))
    assert {text.task for text in texts} >= {"Ada", "global-mean"}
    assert len(infer_tasks(InferTaskConfig(run=str(out), text=["red green"], unknown=0.1))) == 1
    assert EXPORT.main([str(out), "--output_dir", str(tmp_path / "export")]) == 0  # checked with PEFT
    printed = capsys.readouterr().out
    assert "logits" in printed
    # no fit goes on there
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    for option, said in (
        ("resume", "holds the joined adapters of several fits, which cannot go on"),
        ("overwrite", "which no run wrote"),
    ):
        assert command_main()(["--config", str(out / "config.yaml"), f"--{option}", "true"]) == 2
        assert said in capsys.readouterr().err
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    # taken, and replaced
    assert main(words(fits, out, *SEEDS[:2])) == 2
    assert "holds an earlier result; give --overwrite true" in capsys.readouterr().err
    assert main(words(fits, out, *SEEDS[:2], rank=2, overwrite="true")) == 0
    assert "no run, because the adapters are cut" in capsys.readouterr().out
    assert not (out / "config.yaml").exists()
    assert read_peft(out / "adapters" / "global-mean").rank == 2
    errors = json.loads((out / FOLD).read_text())["relative_error"]
    assert list(errors) == ["ada", "borge-b", "cleo", "global-mean"]
    assert all(0 < error < 1 for error in errors.values())


@pytest.mark.parametrize("tau", [0, 30, math.inf])
def test_fits_under_any_tau_are_read_as_a_run(fits, tmp_path, tau):
    options = {"data": fits / "given.csv", "split_column": "part", "base_model": fits / "base", "targets": "v_proj"}
    options |= {"max_tokens": 32, "token_budget": 256, "rank": 1, "epochs": 1, "learning_rate": 0.03, "threads": 1}
    for seed in range(2):
        map_run(options | {"tau": tau, "seed": seed, "output_dir": tmp_path / f"{seed}"})
    assert main(words(tmp_path, tmp_path / "out", "0", "1")) == 0
    run, members = load_run(tmp_path / "out", device="cpu"), [load_run(tmp_path / f"{seed}", device="cpu") for seed in range(2)]
    own = [changes(member) for member in members]
    for d, of_task in enumerate(changes(run)):
        for path, value in of_task.items():
            torch.testing.assert_close(value, (own[0][d][path] + own[1][d][path]) / 2, rtol=1e-5, atol=1e-7)
    assert run.fitted.tau() == pytest.approx(tau)
    if tau in (0, math.inf):
        assert (run.fitted.deviation_norms() > 0).all() == (tau == 0)


def test_folded_adapters_are_distilled(fits, tmp_path, capsys):
    options = {"rank": 2, "distil": "true", "distil_epochs": 4, "distil_learning_rate": 0.01}
    assert main(words(fits, tmp_path / "out", *SEEDS, **options)) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / FOLD).read_text())
    about = found["distilled"]
    assert about["kept"] == (about["best_epoch"] > 0)
    assert about["validation"]["distilled"] <= about["validation"]["folded"]
    assert found["test_perplexity"] == pytest.approx(about["test"]["distilled"], rel=1e-5)
    assert f"{about['validation']['folded']:.2f} -> {about['validation']['distilled']:.2f}" in out
    assert "no run, because the adapters are fitted to the predictions of the mixture" in out
    assert read_peft(tmp_path / "out" / "adapters" / "ada").rank == 2
    assert all(0 < error < 1 for error in found["relative_error"].values())  # of the cut, where it begins
    # what is written is what was measured, and Θ stays folded
    assert main(words(fits, tmp_path / "folded", *SEEDS, rank=2)) == 0
    plain = json.loads((tmp_path / "folded" / FOLD).read_text())
    assert plain["test_perplexity"] == pytest.approx(about["test"]["folded"], rel=1e-5)
    run = load_run(fits / "seed-0", device="cpu")
    model = BoRA(run.fitted.model.backbone, 3, adapter=LoRA(rank=2))
    for name, folder in (("distilled", "out"), ("folded", "folded")):
        slugs = ("ada", "borge-b", "cleo")
        of_tasks = [load_peft(tmp_path / folder / "adapters" / slug, model) for slug in slugs]
        theta = {key: torch.stack([weights[key] for weights in of_tasks]) for key in of_tasks[0]}
        (score,) = evaluate(model, run.data.test, theta)
        assert score.perplexity() == pytest.approx(about["test"][name], rel=1e-4)
    means = [load_peft(tmp_path / folder / "adapters" / "global-mean", model) for folder in ("out", "folded")]
    assert all(torch.equal(value, means[1][key]) for key, value in means[0].items())


def test_fits_of_other_ranks_are_folded_but_are_no_run(fits, tmp_path, capsys):
    assert main(words(fits, tmp_path / "out", "seed-0", "rank-1")) == 0
    assert "no run, because" in capsys.readouterr().out
    assert read_peft(tmp_path / "out" / "adapters" / "cleo").rank == 3
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "tau" not in metrics
    assert metrics["tasks"]["ada"]["train_documents"] == 6


def test_documents_that_a_fit_has_seen_do_not_count(fits, tmp_path, capsys):
    assert main(words(fits, tmp_path / "out", "split-0", "split-1")) == 0
    members = [load_run(fits / name, device="cpu") for name in ("split-0", "split-1")]
    texts = [
        {split.document(n).numpy().tobytes() for split in splits for n in range(len(split))}
        for splits in zip(*((run.data.train, run.data.validation) for run in members), strict=True)
    ]
    found, run = json.loads((tmp_path / "out" / FOLD).read_text()), load_run(tmp_path / "out", device="cpu")
    assert not found["same_split"]
    test = {run.data.test.document(n).numpy().tobytes() for n in range(len(run.data.test))}
    assert not any(test & seen for seen in texts)
    assert 0 < len(test) == found["test_documents"] < len(members[0].data.test)
    every = len(members[0].data.test)
    said = f"the perplexities are over the {len(test)} of {every} test documents that no fit trained on or chose an epoch by"
    assert said in capsys.readouterr().err
    assert any(said in note for note in run.metrics["notes"])
    (alone,) = evaluate(members[1].fitted.model, run.data.test, members[1].fitted.weights()[0])
    assert found["members"][1]["test_perplexity"] == pytest.approx(alone.perplexity(), rel=1e-5)


def test_where_no_document_is_left_there_are_no_perplexities(fits, tmp_path, capsys):
    sides = ["test"] * 2 + ["train"] * 6 + ["validation"] * 2  # other test documents than those of the other fits
    table = write_table(tmp_path / "other.csv", documents().assign(part=sides * 3))
    options = {"base_model": fits / "base", "split_column": "part", "max_tokens": 32, "targets": "v_proj,fc2", "rank": 2}
    map_run(options | {"data": table, "epochs": 1, "token_budget": 256, "threads": 1, "output_dir": tmp_path / "other"})
    assert main(words(fits, tmp_path / "out", "seed-0", tmp_path / "other")) == 0
    out, err = capsys.readouterr()
    assert "none is left that no fit trained on or chose an epoch by" in err
    assert "perplexity" not in out
    assert load_run(tmp_path / "out", device="cpu").metrics["test_perplexity"] is None


def test_one_seed_of_the_split_serves_fits_of_other_seeds(tmp_path):
    data, digests = write_table(tmp_path / "documents.csv"), set()
    tokenizer, _ = load_tokenizer(save_base(tmp_path / "base"))
    options = {"max_tokens": 32, "max_train_documents": 4, "max_eval_documents": 1}
    for seed, split_seed in ((0, None), (3, 0), (3, None)):
        found = load_tasks(data, tokenizer, seed=seed, split_seed=split_seed, **options)
        digests.add(found.digest)
    assert len(digests) == 2


def test_the_joint_split():
    class Stub:
        def __init__(self, *sides):
            self.record = {"seed": 3, "tasks": {"a": dict(zip("uvwx", sides, strict=True))}}

    one = Stub("train", "validation", "test", "test")
    assert joint_split([one, Stub("train", "validation", "test", "test")]) == (one.record, True)
    record, same = joint_split([one, Stub("test", "test", "test", "train"), Stub("test", "test", "test", "validation")])
    assert not same
    assert record["tasks"] == {"a": {"u": "train", "v": "validation", "w": "test", "x": "train"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fits: [fits / "seed-0"], "1 runs are given; name the folders of two or more fits"),
        (lambda fits: [fits / "seed-0", fits / "x" / ".." / "seed-0"], "is given twice; give each once"),
        (lambda fits: [fits / "seed-0", fits / "gone"], "gone does not exist"),
        (lambda fits: [fits / "seed-0", fits / "other-base"], "have different base models"),
        (lambda fits: [fits / "seed-0", fits / "other-targets"], "adapt different layers: only one adapts"),
        (lambda fits: [fits / "seed-0", fits / "two-tasks"], "have different tasks: only one has 'Cleo'"),
        (lambda fits: [fits / "seed-0", fits / "short"], "max_tokens is 16 and 32; fold fits with one max_tokens"),
        (lambda fits: [fits / "seed-0", fits / "fewer"], "have different documents of task 'Ada'"),
        (lambda fits: [fits / "seed-0", fits / "posterior"], "is a posterior; fold takes MAP fits"),
        (lambda fits: [fits / "seed-0", fits / "unfinished"], "is not finished"),
    ],
)
def test_what_cannot_be_folded(others, tmp_path, capsys, change, message):
    assert main([*map(str, change(others)), "--output_dir", str(tmp_path / "out"), "--threads", "1"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def others(fits):
    """Runs that have nothing in common with the others, beside them."""
    sides = ["train"] * 6 + ["validation"] * 2 + ["test"] * 2
    options = {
        "data": fits / "given.csv", "split_column": "part", "base_model": fits / "base", "max_tokens": 32, "token_budget": 256,
        "rank": 2, "targets": "v_proj,fc2", "epochs": 1, "threads": 1,
    }  # fmt: skip
    base = save_base(fits / "second")
    state = load_run(fits / "seed-0", device="cpu").fitted.model.backbone.model
    with torch.no_grad():
        state.get_input_embeddings().weight += 1
    state.save_pretrained(base)
    fewer = write_table(fits / "fewer.csv", documents(number=9).assign(part=(sides[:5] + sides[6:]) * 3))
    for name, change in {
        "other-base": {"base_model": base},
        "other-targets": {"targets": "v_proj"},
        "two-tasks": {"num_tasks": 2},
        "short": {"max_tokens": 16},
        "fewer": {"data": fewer},
        "unfinished": {},
    }.items():
        map_run(options | change | {"output_dir": fits / name})
    (fits / "unfinished" / "metrics.json").unlink()
    posterior = [str(fits / "seed-0"), *line({"output_dir": fits / "posterior", "epochs": 1, "draws": 2})]
    assert command_main("posterior-fit")(posterior) == 0
    (fits / "x").mkdir()
    return fits

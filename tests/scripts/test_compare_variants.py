"""The tables of the released code's variants and of the two forms: what is run, what is chosen, what is not run again."""

from __future__ import annotations

import math
from concurrent.futures import Future
from typing import ClassVar

import pandas as pd
import pytest
import yaml

from bora_pyro import InputError
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.saved import load_run
from bora_pyro.runs.sweep import MAP_FIT
from tests.tiny_base import command_main, line, quick_fit, script

variants, forms = script("compare_variants"), script("compare_forms")


@pytest.fixture(scope="module")
def fit_config(tmp_path_factory):
    """The options of a quick fit as a file."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "fit.yaml").write_text(yaml.safe_dump(quick_fit(folder)))
    return str(folder / "fit.yaml")


class InProcess:
    """Fits that run in this process, and the words that asked for them."""

    words: ClassVar[list[list[str]]] = []
    main = staticmethod(command_main())

    def __init__(self, program, jobs):
        assert program == MAP_FIT

    def start(self, words):
        future = Future()
        self.words.append(words)
        future.set_result("no" if self.main(words) else None)
        return future

    def stop(self):
        pass


@pytest.fixture
def in_process(monkeypatch):
    """The words of the fits, which run in this process."""
    monkeypatch.setattr(variants, "Fits", InProcess)
    monkeypatch.setattr(InProcess, "words", [])
    return InProcess.words


def compare(fit_config, tmp_path, **options):
    paths = {"fit_config": fit_config, "output": str(tmp_path / "table.csv"), "runs_dir": str(tmp_path / "runs"), "jobs": 1}
    return variants.Comparison(variants.VariantsConfig(**(paths | options)))


# variants


def test_every_variant_is_run_and_no_run_is_repeated(fit_config, in_process, tmp_path, capsys):
    options = {"tau": 4.0, "learning_rates": ["0.01", "0.03"], "seeds": 2}
    comparison = compare(fit_config, tmp_path, **options)
    comparison.run_all()
    table = pd.read_csv(tmp_path / "table.csv", dtype={"tau": str, "learning_rate": str})
    assert list(table) == variants.COLUMNS
    pd.testing.assert_frame_equal(table, comparison.table.sort_values(variants.COLUMNS[:4]).reset_index(drop=True), rtol=1e-5)
    grids = {"paper": 1, "centered_rate_by_tau": 1, "norm_penalty": 4, "document_likelihood": 3, "shared_plus_task": 4,
             "released_objective": 3}  # fmt: skip
    # at each τ the middle rate, at the best one the other rate too, and the second seed
    assert table.groupby("variant").size().to_dict() == {name: taus + 2 for name, taus in grids.items()}
    assert len(in_process) == len(table) == sum(grids.values()) + 2 * 6
    assert not table.isna().any(axis=None)

    for row in table.itertuples():
        run = RunFolder.open(tmp_path / "runs" / "table" / f"{row.variant}-tau{row.tau}-lr{row.learning_rate}-seed{row.seed}")
        config, metrics = run.read_config(), run.read_metrics()
        assert (config["tau"], config["learning_rate"], config["seed"]) == (float(row.tau), float(row.learning_rate), row.seed)
        assert row.test_perplexity == pytest.approx(metrics["test_perplexity"], rel=1e-5)
        switches = {name: config[name] for name in ("penalty", "likelihood_unit", "prior_form", "adapter")}
        plain = {"penalty": "normal", "likelihood_unit": "tokens", "prior_form": "noncentered", "adapter": "lora"}
        expected = {key: value for key, value in variants.VARIANTS[row.variant].options.items() if key in plain}
        assert switches == plain | expected
        assert config["scale_learning_rate_with_tau"] == (config["prior_form"] == "centered")

    summary = comparison.summary()
    assert summary.count("\n| ") == 6
    assert f"| paper | 4 | {comparison.chosen['paper'][1]} |" in summary
    again = compare(fit_config, tmp_path, **options)
    again.run_all()
    assert len(in_process) == len(table)
    assert again.summary() == summary


def test_the_grids(fit_config, tmp_path):
    comparison = compare(fit_config, tmp_path, tau=100.0, learning_rates=["3e-2", "0.003", "1e-2"])
    assert {name: comparison.taus(name) for name in variants.VARIANTS} == {
        "paper": ["100"],
        "centered_rate_by_tau": ["100"],
        "norm_penalty": ["30", "100", "300", "1000"],
        "document_likelihood": ["0.3", "1", "3"],
        "shared_plus_task": ["1", "10", "100", "1000"],
        "released_objective": ["1", "3", "10"],
    }
    assert comparison.rates("paper", "100") == ["0.003", "0.01", "0.03"]
    # the rates are the same once they are multiplied by τ
    assert comparison.rates("centered_rate_by_tau", "100") == ["3e-05", "0.0001", "0.0003"]
    assert comparison.rates("released_objective", "10") == ["0.0003", "0.001", "0.003"]


@pytest.fixture
def rigged(fit_config, tmp_path, monkeypatch):
    """A comparison whose runs have perplexities that the test says, and the runs in their order."""
    perplexities = {
        ("paper", "100", "0.01"): (20.0, 30.0),
        ("paper", "100", "0.003"): (21.0, 10.0),
        ("paper", "100", "0.03"): (19.0, 40.0),  # worse on the test split, better on the validation split: this one is chosen
        ("norm_penalty", "30", "0.01"): (26.0, 20.0),
        ("norm_penalty", "100", "0.01"): (25.0, 20.0),
        ("norm_penalty", "300", "0.01"): (18.0, 20.0),
        ("norm_penalty", "1000", "0.01"): (None, 1.0),
        ("norm_penalty", "300", "0.003"): (18.5, 1.0),
    }
    started = []

    class Rigged(InProcess):
        def start(self, words):
            options = dict(zip(words[::2], words[1::2], strict=True))
            folder = RunFolder.create(options["--output_dir"])
            variant = folder.path.name.partition("-tau")[0]
            run = variant, options["--tau"], options["--learning_rate"], int(options["--seed"])
            started.append(run)
            future = Future()
            if run[:3] in perplexities:
                validation, test = perplexities[run[:3]]
                folder.write_config({})
                scores = {"validation_perplexity": validation, "test_perplexity": test * (1 + run[3])}
                folder.write_metrics(scores | {"base_test_perplexity": 50.0, "fit_seconds": 1.0})
            future.set_result(None if run[:3] in perplexities else "the loss is not finite")
            return future

    monkeypatch.setattr(variants, "Fits", Rigged)
    return compare(fit_config, tmp_path, variants=["paper", "norm_penalty"], seeds=2), started


def test_tau_then_the_rate_are_chosen_on_the_first_seed_s_validation(rigged, capsys):
    comparison, started = rigged
    comparison.run_all()
    assert comparison.chosen == {"paper": ("100", "0.03"), "norm_penalty": ("300", "0.01")}
    assert started == [
        ("paper", "100", "0.01", 0),
        *(("norm_penalty", tau, "0.01", 0) for tau in ("30", "100", "300", "1000")),
        *(("paper", "100", rate, 0) for rate in ("0.003", "0.03")),
        *(("norm_penalty", "300", rate, 0) for rate in ("0.003", "0.03")),
        ("paper", "100", "0.03", 1),
        ("norm_penalty", "300", "0.01", 1),
    ]
    # a fit that failed loses and is named
    assert capsys.readouterr().err == (
        "error: the fit of norm_penalty with tau 300, learning rate 0.03, seed 0 failed: the loss is not finite\n"
    )
    assert comparison.summary().splitlines()[2:] == [
        "| paper | 100 | 0.03 | 60.00 ± 28.28 | 1.000 ± 0.000 | 2 |",
        "| norm_penalty | 300 | 0.01 | 30.00 ± 14.14 | 0.500 ± 0.000 | 2 |",
        "note: paper is best at the learning rate 0.03, an end of its grid 0.003 0.01 0.03",
    ]


def test_the_first_fit_that_fails_ends_the_comparison(fit_config, tmp_path, in_process):
    comparison = compare(fit_config, tmp_path, data=str(tmp_path / "nowhere.csv"))
    with pytest.raises(InputError, match=r"the fit of .* with tau .*, learning rate .*, seed 0 failed: no"):
        comparison.run_all()
    assert not (tmp_path / "table.csv").exists()


def test_without_validation_documents_nothing_can_be_chosen(rigged):
    comparison, _ = rigged
    comparison.table = pd.DataFrame(
        [["paper", "100", rate, 0, None, 9.0, 9.0, 1.0, ""] for rate in "ab"], columns=variants.COLUMNS
    )
    with pytest.raises(InputError, match="no fit of paper has a validation perplexity to choose by"):
        comparison.best("paper", [("100", "a"), ("100", "b")])


def test_a_fit_is_a_process_of_map_fit(fit_config, tmp_path):
    """The real thing once, refused at once: the process's last line is the reason."""
    comparison = compare(fit_config, tmp_path, data=str(tmp_path / "nowhere.csv"), variants=["paper"])
    with pytest.raises(InputError, match=r"the fit of paper with tau 100, learning rate 0\.01, seed 0 failed: .*nowhere\.csv"):
        comparison.run_all()


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("variants", {"fit_config": "nowhere.yaml"}, "nowhere.yaml does not exist"),
        ("variants", {"variants": "paper,norm"}, "variant 'norm' is not known"),
        ("variants", {"variants": "norm_penalti"}, "did you mean 'norm_penalty'?"),
        ("variants", {"tau": "inf"}, "tau is inf; give a finite number above 0"),
        ("variants", {"learning_rates": "0.1,many"}, "learning_rates has 'many'"),
        ("variants", {"learning_rates": "0"}, "learning_rates has '0'"),
        ("variants", {"seeds": 0}, "seeds is 0"),
        ("variants", {"taus": 1}, "did you mean 'tau'?"),
        ("variants", {"data": ""}, "data is empty"),
        ("variants", {"output": "other.csv"}, "other.csv has the columns a, b"),
        ("forms", {"fit_config": "nowhere.yaml"}, "nowhere.yaml does not exist"),
        ("forms", {"taus": "100,inf"}, "taus has 'inf'"),
        ("forms", {"coefficients": "tiny"}, "coefficients has 'tiny'"),
        ("forms", {"output": "other.csv"}, "other.csv has the columns a, b"),
        ("forms", {"data": "nowhere.csv"}, "nowhere.csv"),
    ],
)
def test_bad_options_end_with_one_line(script, arguments, words, fit_config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    module = {"variants": variants, "forms": forms}[script]
    assert module.main(line({"fit_config": fit_config} | arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


# forms


@pytest.fixture(scope="module")
def forms_table(fit_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    options = {"fit_config": fit_config, "output": str(folder / "forms.csv"), "threads": 1}
    config = forms.FormsConfig(**options, taus=["5", "50"], learning_rates=["0.03"], coefficients=["1e-3", "4e-3"])
    return config, forms.run_all(config)


def test_fits_with_other_options_join_no_table(forms_table, fit_config, tmp_path, capsys):
    """Neither that of the forms nor that of the variants; a table that does not say its options has a note."""
    config, _ = forms_table
    words = line({"fit_config": fit_config, "output": config.output, "seed": 1, "taus": "5"})
    assert forms.main(words) == 2
    assert "forms.csv has rows with seed 0 instead of 1" in capsys.readouterr().err
    row = {"variant": "paper", "tau": "4", "learning_rate": "0.01", "seed": 0, "validation_perplexity": 9.0}
    stored = pd.DataFrame([dict.fromkeys(variants.COLUMNS, 1.0) | row | {"options": '{"epochs": 77}'}])
    stored.to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(InputError, match=r"has rows with .* instead of"):
        compare(fit_config, tmp_path)
    stored.drop(columns="options").to_csv(tmp_path / "table.csv", index=False)
    assert list(compare(fit_config, tmp_path).table) == variants.COLUMNS
    assert "note: 1 of 1 rows of" in capsys.readouterr().err


def test_the_table_of_forms_has_every_epoch_of_every_arm(forms_table):
    config, table = forms_table
    assert list(table) == [*forms.COLUMNS, "options"]
    stored = forms.read_table(forms.Path(config.output))
    pd.testing.assert_frame_equal(stored, table, rtol=1e-5, check_dtype=False)
    assert set(zip(table.form, table.tau, table.learning_rate, strict=True)) == {
        (form, tau, rate)
        for tau in ("5", "50")
        for form, rate in (("noncentered", "0.03"), ("centered", "0.001"), ("centered", "0.004"))
    }
    assert table.groupby(["form", "tau", "learning_rate"]).epoch.apply(list).tolist() == [[0, 1, 2]] * 6
    start, rest = table[table.epoch == 0], table[table.epoch > 0]
    assert start.objective.isna().all()
    assert start.test_perplexity.nunique() == start.validation_perplexity.nunique() == 1
    assert not rest.isna().any(axis=None)
    assert (rest.step == rest.epoch * rest.step.min()).all()


@pytest.mark.parametrize(
    ("form", "tau", "rate", "more"),
    [
        ("noncentered", "50", "0.03", {}),
        ("centered", "5", "0.004", {"scale_learning_rate_with_tau": "true"}),
        ("centered", "50", "0.001", {"scale_learning_rate_with_tau": "true"}),
    ],
)
def test_an_arm_is_the_run_of_map_fit_with_the_same_options(form, tau, rate, more, forms_table, fit_config, tmp_path):
    _, table = forms_table
    arm = table[(table.form == form) & (table.tau == tau) & (table.learning_rate == rate)].set_index("epoch")
    folder = tmp_path / "run"
    options = {"config": fit_config, "tau": tau, "prior_form": form, "learning_rate": rate, "output_dir": folder} | more
    assert command_main()(line(options)) == 0
    run = RunFolder.open(folder)
    for entry in run.read_log():
        row = arm.loc[entry["epoch"]]
        assert row.step == entry["step"]
        # the density of θ_d: the whitened deviation's, less ½ log τ for each of its entries
        shift = 0.5 * math.log(float(tau)) * entries(run) / tokens(run) if form == "noncentered" else 0.0
        assert row.objective == pytest.approx(entry["objective"] - shift, rel=1e-5)
        assert row.validation_perplexity == pytest.approx(entry["validation_perplexity"], rel=1e-6)
    metrics = run.read_metrics()
    assert arm.loc[metrics["best_epoch"]].test_perplexity == pytest.approx(metrics["test_perplexity"], rel=1e-6)
    assert arm.loc[0].test_perplexity == pytest.approx(metrics["base_test_perplexity"], rel=1e-6)


def entries(run):
    """Entries of all tasks' deviations."""
    return sum(value.numel() for name, value in run.load_tensors("posterior").items() if name.endswith("_decentered"))


def tokens(run):
    """Predicted tokens of the training documents."""
    return load_run(run.path).data.train.num_tokens


def test_arms_that_the_table_of_forms_has_are_not_run_again(forms_table, monkeypatch, capsys):
    config, table = forms_table
    started = []
    monkeypatch.setattr(forms, "run_arm", lambda config, arm: started.append(arm))
    again = forms.run_all(config)
    assert started == []
    pd.testing.assert_frame_equal(again, table, rtol=1e-5, check_dtype=False)


def test_the_arm_of_each_form_is_that_of_the_lowest_validation_perplexity():
    columns = ["form", "tau", "learning_rate", "step", "epoch", "objective", "validation_perplexity", "test_perplexity"]
    rows = [
        ("centered", "1000", "1e-5", 4, 2, 3.0, 20.0, 10.0),
        ("centered", "1000", "3e-5", 2, 1, 3.0, 19.0, 30.0),
        ("centered", "1000", "3e-5", 4, 2, 3.0, 19.5, 1.0),
        ("noncentered", "1000", "0.01", 4, 2, 9.0, 18.0, 25.0),
        ("noncentered", "100", "0.01", 4, 2, 9.0, 17.0, 24.0),
    ]
    assert forms.summary(pd.DataFrame(rows, columns=columns)).splitlines()[2:] == [
        "| noncentered | 100 | 0.01 | 17.00 | 24.00 | 2 | 4 |",
        "| centered | 1000 | 3e-5 τ | 19.00 | 30.00 | 1 | 2 |",
        "| noncentered | 1000 | 0.01 | 18.00 | 25.00 | 2 | 4 |",
    ]


def test_an_arm_that_diverges_keeps_what_it_has(fit_config, tmp_path, capsys):
    config = forms.FormsConfig(fit_config=fit_config, output=str(tmp_path / "forms.csv"), threads=1)
    rows = forms.run_arm(config, ("noncentered", "1", "1e30"))
    assert "note: noncentered, tau 1, rate 1e30: the validation perplexity is not a number" in capsys.readouterr().err
    assert rows.epoch.tolist() == [0]

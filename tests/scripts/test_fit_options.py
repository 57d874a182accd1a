"""Experiments whose fits have the options of a YAML file: each option reaches ``fit``, or is refused."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import yaml

from bora_pyro.inference.options import FitOptions
from bora_pyro.options.field import with_changes
from tests.tiny_base import documents, line, quick_fit, script, write_table

TASKS = ("Ada", "Børge B.", "Cleo", "Dora")
GIVEN = {"average": False, "deviation_reach": 1.0, "warmup": 0.3, "gradient_clip": 0.5, "gradient_norm": False, "accumulate": 2}
WORDS = {
    "few_documents": {
        "documents": "2", "left_out": 2, "least_documents": 5, "seeds": 1, "fit_learning_rates": 0.01, "learning_rates": 0.02,
        "steps": 5,
    },
    "compare_unknown": {"left_out": 2, "seeds": 1, "lengths": 4, "learning_rate": 0.01},
    "compare_forms": {"taus": 5, "learning_rates": 0.01, "coefficients": 0.002},
    "compare_posteriors": {"arms": "map_longer,ensemble", "seeds": 1, "epochs": 1, "draws": 2, "map_learning_rate": 0.01},
}  # fmt: skip
#: What the arms override, by script.
OVERRIDDEN = {
    "few_documents": ("learning_rate", "epochs", "token_budget", "patience", "task_subsampling"),
    "compare_unknown": ("learning_rate",),
    "compare_forms": ("learning_rate", "patience"),
    "compare_posteriors": ("learning_rate", "epochs", "patience", "temperature", "seed"),
}


@pytest.fixture
def words(tmp_path):
    """A function that writes the options of the fits, and returns the words of a script."""

    def make(name, **options):
        options = (
            quick_fit(tmp_path) | {"data": write_table(tmp_path / "four.csv", documents(TASKS, number=12)), "epochs": 4} | options
        )
        del options["threads"]
        (tmp_path / "fit.yaml").write_text(yaml.safe_dump(options | {"targets": ["v_proj", "fc2"]}))
        paths = {"fit_config": tmp_path / "fit.yaml", "output": tmp_path / "table.csv", "threads": 1}
        paths |= {"runs_dir": tmp_path / "runs"} if name == "compare_posteriors" else {}
        return line(paths | WORDS[name])

    return make


def replace_fit(module, record, monkeypatch):
    """Replace ``fit`` in a script, and in the module of its arms if it has one."""
    for part in (module, sys.modules.get(f"{module.__name__}_arms")):
        if hasattr(part, "fit"):
            monkeypatch.setattr(part, "fit", record)


@pytest.mark.parametrize("name", WORDS)
def test_every_option_of_the_file_reaches_the_fits(name, words, monkeypatch, capsys):
    module, seen = script(name), []
    fit = module.fit

    def record(model, data, options=None, **more):
        fields = {field.name for field in dataclasses.fields(FitOptions)}
        changes = {key: value for key, value in more.items() if key in fields}
        seen.append(with_changes(options or FitOptions(), changes))
        return fit(model, data, options, **more)

    replace_fit(module, record, monkeypatch)
    assert module.main(words(name, **GIVEN)) == 0, capsys.readouterr().err
    expected = FitOptions(**GIVEN, epochs=4, token_budget=256)
    assert len(seen) > 1 or name == "compare_unknown"
    for options in seen:
        same = {key: getattr(expected, key) for key in OVERRIDDEN[name]}
        assert with_changes(options, same) == expected


def test_the_steps_of_new_tasks_are_optimiser_steps(words, monkeypatch, capsys):
    module, seen = script("few_documents"), []
    monkeypatch.setattr(module, "TOKEN_BUDGET", 2)
    fit = module.fit

    def record(model, data, options, **more):
        fitted = fit(model, data, options, **more)
        seen.append((data, more, fitted.history[-1]["step"]))
        return fitted

    replace_fit(module, record, monkeypatch)
    assert module.main(words("few_documents", **GIVEN)) == 0, capsys.readouterr().err
    tuned = [(data, more, steps) for data, more, steps in seen if "epochs" in more]
    assert len(tuned) == 2 * 3  # bora, scratch, pooled_tuned: a search of one and a test
    for data, more, steps in tuned:
        assert len(data.train) == 2 * 2  # batches of one document each
        an_epoch = len(data.train) // GIVEN["accumulate"]
        assert steps == an_epoch * more["epochs"]
        assert 5 <= steps < 5 + an_epoch


@pytest.mark.parametrize(
    ("name", "option", "value", "reason"),
    [
        ("few_documents", "prior_form", "centered", "the arms do not have it"),
        ("few_documents", "tau_documents", "half", "the arms do not have it"),
        ("compare_unknown", "start_from", "a", "the fit to the other tasks does not have it"),
        ("compare_forms", "start_from", "a", "all arms have the usual start"),
        ("compare_posteriors", "start_from", "a", "the ensemble has several starts"),
    ],
)
def test_what_a_script_cannot_follow_is_refused(name, option, value, reason, words, tmp_path, capsys):
    more = {"tau": 9.0} if option == "prior_form" else {}
    assert script(name).main(words(name, **{option: value}, **more)) == 2
    assert capsys.readouterr().err == f"error: {option} is {value!r} in {tmp_path / 'fit.yaml'}; {reason}: leave it out\n"


@pytest.mark.parametrize("name", ["few_documents", "compare_unknown"])
def test_task_weights_of_the_file_reach_the_fits(name, words, tmp_path, monkeypatch, capsys):
    weights = {task: n + 1.0 for n, task in enumerate(TASKS)}
    (tmp_path / "weights.yaml").write_text(yaml.safe_dump(weights))
    module, seen = script(name), []
    fit = module.fit

    def record(model, data, *arguments, **more):
        seen.append((data.tasks, model.likelihood.task_weights))
        return fit(model, data, *arguments, **more)

    replace_fit(module, record, monkeypatch)
    assert module.main(words(name, task_weights=str(tmp_path / "weights.yaml"))) == 0, capsys.readouterr().err
    tasks, found = seen[0]
    assert found.tolist() == [weights[task] for task in tasks]

"""Groups of tasks from a column of the table: through a fit, a run folder, a posterior, an adaptation, and what is refused."""

from __future__ import annotations

import pytest
import torch

from bora_pyro.data import load_tasks
from bora_pyro.data.tables import table
from bora_pyro.errors import InputError
from bora_pyro.runs.adapt import run_adapt
from bora_pyro.runs.config.adapt import AdaptConfig
from bora_pyro.runs.config.map_fit import MapFitConfig, parse_config
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.posterior_fit import run_posterior_fit
from bora_pyro.runs.saved import load_run
from tests.runs.test_resume import Killed, killed_at
from tests.tiny_base import documents, line, quick_fit, without_times, write_table

PARTY = {"Ada": "whig", "Børge B.": "free", "Cleo": "whig"}


def with_parties(**changes):
    frame = documents()
    return frame.assign(party=frame["task"].map(PARTY | changes))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return quick_fit(folder) | {"data": write_table(folder / "parties.csv", with_parties()), "task_group_column": "party"}


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    more = {"token_budget": 64, "learning_rate": 0.03, "output_dir": folder}
    run_map_fit(parse_config(MapFitConfig, line(inputs | more)), quiet=True)
    return folder


def test_a_run_with_groups_gives_its_numbers_again(finished):
    loaded = load_run(finished)
    metrics = loaded.metrics
    assert metrics["best_epoch"]
    assert metrics["task_groups"] == PARTY
    assert metrics["tau_group"] == pytest.approx(loaded.fitted.tau_group())
    assert metrics["tau_group"] != pytest.approx(100)
    assert "3 tasks in 2 groups: 'free' (1), 'whig' (2)" in metrics["notes"]
    again = loaded.fitted.evaluate(loaded.data.test)
    assert again["test_perplexity"] == pytest.approx(metrics["test_perplexity"], rel=1e-6)
    assert any(name.startswith("group.") for name in loaded.fitted.sites())


@pytest.mark.parametrize("drawn", [False, True])
def test_a_killed_fit_with_groups_is_resumed_to_what_it_would_have_been(inputs, tmp_path, monkeypatch, drawn):
    more = inputs | {"token_budget": 64, "learning_rate": 0.03, "checkpoint_every": 1, "task_subsampling": drawn, "epochs": 3}
    whole = run_map_fit(parse_config(MapFitConfig, line(more | {"output_dir": tmp_path / "whole"})), quiet=True)
    with monkeypatch.context() as patch:
        killed_at(patch, 2)
        with pytest.raises(Killed):
            run_map_fit(parse_config(MapFitConfig, line(more | {"output_dir": tmp_path / "run"})), quiet=True)
    resumed = run_map_fit(parse_config(MapFitConfig, line(more | {"output_dir": tmp_path / "run", "resume": True})), quiet=True)
    assert without_times(resumed) == without_times(whole)


@pytest.mark.parametrize("guide", ["normal", "structured", "swag"])
def test_a_posterior_keeps_the_groups(finished, tmp_path, guide):
    config = PosteriorFitConfig(run=str(finished), guide=guide, epochs=1, output_dir=str(tmp_path / "posterior"), threads=1)
    metrics = run_posterior_fit(config, quiet=True)
    loaded = load_run(tmp_path / "posterior")
    assert loaded.fitted.evaluate(loaded.data.test)["test_perplexity"] == pytest.approx(metrics["test_perplexity"], rel=1e-5)
    draw = loaded.posterior().sites(0)
    assert any(name.startswith("group.") for name in draw)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guide": "laplace"}, "needs a prior that treats each latent separately, not GroupedNormal"),
        ({"guide": "normal", "tau": "half_cauchy"}, "the fit has 2 groups of tasks, which a random tau does not have"),
    ],
)
def test_a_posterior_that_cannot_have_groups_is_refused(finished, tmp_path, options, words):
    config = PosteriorFitConfig(run=str(finished), output_dir=str(tmp_path / "posterior"), threads=1, **options)
    with pytest.raises(InputError, match=words):
        run_posterior_fit(config, quiet=True)
    assert not (tmp_path / "posterior").exists()


def test_new_tasks_of_a_group_begin_at_its_mean(finished, tmp_path):
    run = load_run(finished)
    new = write_table(tmp_path / "new.csv", documents(("Ada",)).assign(task="Dora"))
    means = {}
    for group in (None, "whig"):
        options = {"steps": 1, "learning_rate": 1e-12, "threads": 1, "output_dir": str(tmp_path / str(group))}
        metrics = run_adapt(AdaptConfig(run=str(finished), data=new, task_group=group, **options), quiet=True)
        adapted = load_run(tmp_path / str(group))
        means[group] = adapted.fitted.weights()[1]
        assert any("new tasks are taken to be in none of them" in note for note in metrics["notes"]) == (group is None)
    _, mean = run.fitted.weights()
    deviations = run.fitted.model.prior.group_deviations(run.fitted.sites(), [*mean])
    for name, value in mean.items():
        torch.testing.assert_close(means[None][name], value)
        torch.testing.assert_close(means["whig"][name], value + deviations[name][1])
    config = AdaptConfig(run=str(finished), data=new, task_group="wig", output_dir=str(tmp_path / "other"), threads=1)
    with pytest.raises(InputError, match="there is no group 'wig'; the fit has 'free', 'whig'; did you mean 'whig'"):
        run_adapt(config, quiet=True)


REFUSALS = {
    "another prior": ({"prior": "hierarchical_normal"}, "prior hierarchical_normal has no groups"),
    "centred": ({"prior_form": "centered", "tau": 5}, "prior_form is centered, which groups of tasks do not have"),
    "norm": ({"penalty": "norm", "tau": 5}, "penalty is norm, which groups of tasks do not have"),
    "independent": ({"tau": 0}, "independent tasks share nothing in a group; leave task_group_column out"),
    "pooled": ({"tau": "inf"}, "tasks of a group would have one adapter; give --task_column party"),
    "no precision": ({"tau_group": 0}, "tau_group is 0.0; give learned, or a number between"),
    "a word": ({"tau_group": "learn"}, "--tau_group: 'learn' cannot be used; give learned, or a number above 0"),
    "no column": ({"task_group_column": "partei"}, "no column 'partei' \\(task_group_column\\).*did you mean 'party'"),
    "no groups": ({"task_group_column": None, "tau_group": 10}, "tau_group is 10.0, but there are no groups of tasks"),
    "a prior without groups": ({"task_group_column": None, "prior": "grouped_normal"}, "name the column of their groups"),
    "given twice": ({"prior": "grouped_normal", "tau_group": 10}, "prior and tau_group are both given"),
}


@pytest.mark.parametrize(("more", "words"), REFUSALS.values(), ids=REFUSALS)
def test_options_that_do_not_fit_groups_are_refused(inputs, tmp_path, more, words):
    options = {name: value for name, value in (inputs | more | {"output_dir": tmp_path / "run"}).items() if value is not None}
    with pytest.raises(InputError, match=words) as caught:
        run_map_fit(parse_config(MapFitConfig, line(options)), quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_prior_by_its_name(inputs, tmp_path):
    options = inputs | {"prior": "grouped_normal", "prior_option": "tau=5", "epochs": 1, "output_dir": tmp_path / "run"}
    run_map_fit(parse_config(MapFitConfig, line(options)), quiet=True)
    assert repr(load_run(tmp_path / "run").fitted.model.prior) == "GroupedNormal(2 groups, tau=5, tau_group=learned)"


def rows(**changes):
    return with_parties(**changes).to_dict("records")


def test_groups_are_read_and_counted(tokenizer):
    data = load_tasks(table(rows()), tokenizer, task_group_column="party", max_tokens=16)
    assert data.task_groups == ["whig", "free", "whig"]
    assert "3 tasks in 2 groups: 'free' (1), 'whig' (2)" in data.notes
    other = load_tasks(table(rows(Cleo="free")), tokenizer, task_group_column="party", max_tokens=16)
    without = load_tasks(table(rows()), tokenizer, max_tokens=16)
    assert without.task_groups is None
    assert len({data.digest, other.digest, without.digest}) == 3
    streamed = load_tasks(table(rows()), tokenizer, task_group_column="party", max_tokens=16, streaming=True)
    assert streamed.task_groups == data.task_groups
    assert streamed.digest == data.digest


def test_an_empty_cell_says_nothing_and_a_task_needs_a_group(tokenizer):
    given = rows()
    given[1]["party"] = ""
    assert load_tasks(table(given), tokenizer, task_group_column="party").task_groups == ["whig", "free", "whig"]
    with pytest.raises(
        InputError, match="task 'Cleo' has no group in column 'party' \\(task_group_column\\); give every task one"
    ):
        load_tasks(table(rows(Cleo="")), tokenizer, task_group_column="party")


def test_a_task_of_two_groups_is_refused(tokenizer):
    given = rows()
    given[3]["party"] = "free"
    with pytest.raises(InputError, match="row 4: task 'Ada' is in group 'free', and in 'whig' in an earlier row") as caught:
        load_tasks(table(given), tokenizer, task_group_column="party")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def tokenizer(inputs):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(inputs["base_model"])

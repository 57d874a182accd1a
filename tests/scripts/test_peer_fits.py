"""Fits of the arms of compare_peers.py: two libraries give the same adapter, and what an arm cannot follow is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from bora_pyro.data.batch import IGNORED
from tests.tiny import peft_warnings
from tests.tiny_base import documents, line, quick_fit, script, write_table

fits, options = script("peer_fits"), script("peer_options")
peer_peft = script("peer_peft")


@pytest.fixture(scope="module")
def fit_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    given = {name: value for name, value in quick_fit(folder).items() if name != "threads"}
    (folder / "fit.yaml").write_text(yaml.safe_dump(given | {"targets": ["v_proj", "fc2"]}))
    return str(folder / "fit.yaml")


@pytest.fixture(scope="module")
def uneven(fit_config, tmp_path_factory):
    """The same with texts of two lengths: batches have very different numbers of tokens, and epochs of batches."""
    folder = tmp_path_factory.mktemp("uneven")
    table = pd.concat([documents(words=words, number=number, seed=words) for words, number in ((2, 10), (12, 7))])
    given = yaml.safe_load(Path(fit_config).read_text(encoding="utf-8"))
    given |= {"data": write_table(folder / "uneven.csv", table), "token_budget": 96, "epochs": 4}
    (folder / "fit.yaml").write_text(yaml.safe_dump(given))
    return folder / "fit.yaml"


@pytest.fixture(scope="module")
def rows(fit_config, tmp_path_factory):
    """A function that returns the rows of an arm's fit, by arm."""
    found = {}

    def of(arm, schedule="cosine"):
        if (arm, schedule) not in found:
            folder = tmp_path_factory.mktemp("fit")
            given = yaml.safe_load(Path(fit_config).read_text(encoding="utf-8"))
            (folder / "fit.yaml").write_text(yaml.safe_dump(given | {"schedule": schedule}))
            words = {"fit_config": folder / "fit.yaml", "arm": arm, "learning_rate": 0.03, "result": folder / "rows.json"}
            with peft_warnings():
                assert fits.main(line(words)) == 0
            found[arm, schedule] = {row["arm"]: row for row in json.loads((folder / "rows.json").read_text())}
        return found[arm, schedule]

    return of


@pytest.mark.parametrize(
    ("ours", "theirs", "schedule"),
    [("bora_inf", "peft_one", "cosine"), ("bora_inf", "peft_one", "constant"), ("bora_0", "peft_each", "cosine")],
)
def test_two_libraries_give_the_same_fit(ours, theirs, schedule, rows):
    one, other = rows(ours, schedule)[ours], rows(theirs, schedule)[theirs]
    for name in ("validation_perplexity", "test_perplexity"):
        assert one[name] == pytest.approx(other[name], rel=1e-3)
    assert one["trainable_parameters"] == other["trainable_parameters"]
    assert one["documents_digest"] == other["documents_digest"]
    assert other["logit_difference"] < 1e-5
    base = rows("base")["base"]["test_perplexity"]
    assert one["test_perplexity"] < 0.9 * base


def test_a_token_counts_alike_in_batches_of_all_sizes(uneven, tmp_path):
    """So that one adapter for all is the same fit in both libraries, whatever the documents."""
    found = {}
    for arm in ("bora_inf", "peft_one"):
        with peft_warnings():
            words = {"fit_config": uneven, "arm": arm, "learning_rate": 0.03, "result": tmp_path / f"{arm}.json"}
            assert fits.main(line(words)) == 0
        [found[arm]] = json.loads((tmp_path / f"{arm}.json").read_text())
    for name in ("validation_perplexity", "test_perplexity"):
        assert found["peft_one"][name] == pytest.approx(found["bora_inf"][name], rel=1e-4)


def test_the_soups_come_with_the_adapters_of_each_task(rows):
    found = rows("peft_each")
    assert list(found) == ["peft_each", *options.SOUPS]
    ranks = {arm: row["rank"] for arm, row in found.items()}
    assert ranks == {"peft_each": 2, "peft_soup": 2, "peft_soup_delta": 2 * 3}


def test_the_soup_of_the_changes_is_their_mean(fit_config):
    config = options.FitOf(fit_config=fit_config).fit()
    template, data = fits.build_run(config, quiet=True)
    arms = peer_peft.Peft(template, data, config)
    generator = torch.Generator().manual_seed(0)
    theta = {name: torch.randn(3, *start.shape, generator=generator) for name, start in template.starts.items()}
    plain = peer_peft.BoRA(template.backbone, 3, adapter=template.adapter, prior=peer_peft.Pooled())
    _, soup = arms.soups(fits.Outcome("peft_each", plain, theta, math.inf))
    for site in ("v_proj", "fc2"):
        each = theta[f"{site}.lora_B"] @ theta[f"{site}.lora_A"]
        wide = soup.theta[f"{site}.lora_B"] @ soup.theta[f"{site}.lora_A"]
        torch.testing.assert_close(wide, each.mean(0).expand_as(wide))


def test_half_of_the_epochs_for_all_then_one_a_task(rows):
    row, one = rows("peft_one_then_each")["peft_one_then_each"], rows("peft_one")["peft_one"]
    assert row["training_tokens"] == one["training_tokens"]
    assert row["trainable_parameters"] == 3 * one["trainable_parameters"]


def test_the_names_of_the_tasks_are_read_and_not_predicted(fit_config):
    config = options.FitOf(fit_config=fit_config).fit()
    template, data = fits.build_run(config, quiet=True)
    named = script("peer_names").with_names(data, template.backbone)
    tokenizer = template.backbone.tokenizer
    for n, d in enumerate(data.train.task.tolist()):
        added = len(named.train.document(n)) - len(data.train.document(n))
        assert tokenizer.decode(named.train.document(n)[1 : 1 + added]) == f"{data.tasks[d]}\n"
        assert named.train.labels(n)[1 + added :].tolist() == data.train.labels(n)[1:].tolist()
        assert (named.train.labels(n)[: 1 + added] == IGNORED).all()


def test_bora_reads_the_names_as_one_lora_does(fit_config, tmp_path):
    """With τ = ∞ it is the same fit in both libraries, if the names do not change which documents are a batch."""
    whole = yaml.safe_load(Path(fit_config).read_text(encoding="utf-8")) | {"token_budget": 10**6}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
    found = {}
    for arm in ("bora_inf_task_id", "peft_task_id", "base", "base_task_id"):
        with peft_warnings():
            words = {"fit_config": tmp_path / "fit.yaml", "arm": arm, "learning_rate": 0.03, "result": tmp_path / "fit.json"}
            assert fits.main(line(words)) == 0
        [found[arm]] = json.loads((tmp_path / "fit.json").read_text())
    for name in ("validation_perplexity", "test_perplexity"):
        assert found["bora_inf_task_id"][name] == pytest.approx(found["peft_task_id"][name], rel=1e-3)
        assert found["base_task_id"][name] != found["base"][name]
    assert found["base_task_id"]["trainable_parameters"] == 0


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("accumulate", 2, "the arms through PEFT do not have it"),
        ("tau_documents", "half", "the arms through PEFT do not have it"),
        ("tau_per", "task", "each arm has its own prior"),
    ],
)
def test_an_option_that_not_all_arms_follow_is_refused(option, value, reason, fit_config, tmp_path, capsys):
    given = yaml.safe_load(Path(fit_config).read_text(encoding="utf-8"))
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(given | {option: value}))
    for name in ("peer_fits", "compare_peers"):
        assert script(name).main(["--fit_config", str(tmp_path / "fit.yaml")]) == 2
        error = f"error: {option} is {value!r} in {tmp_path / 'fit.yaml'}; {reason}: leave it out\n"
        assert capsys.readouterr().err == error

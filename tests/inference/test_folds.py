"""Two folds of the validation documents: one teaches τ, the other chooses the epoch."""

from __future__ import annotations

import pytest
import torch

from bora_pyro import HierarchicalNormal, InputError, LearnedPrecision, fit
from bora_pyro.data import TokenSplit
from bora_pyro.guides import map_guide
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.folds import Folds
from bora_pyro.inference.loop import Loop
from tests.tiny_base import toy_data, toy_model

OPTIONS = {"epochs": 1, "token_budget": 64, "tau_documents": "half"}


def test_every_other_document_of_each_task_teaches_tau():
    split = toy_data().validation
    folds = Folds.of(split, "half", learns_tau=True)
    assert torch.cat([folds.choosing, folds.teaching]).sort().values.tolist() == list(range(len(split)))
    assert split.subset(folds.teaching).documents_per_task == split.subset(folds.choosing).documents_per_task == [4, 4, 4]
    assert folds.note(split) == "12 validation documents teach tau, and 12 others choose the epoch"


def test_tasks_with_one_document_go_to_the_folds_in_turn():
    split = TokenSplit.from_documents([[0, 5]] * 4, task=[3, 2, 0, 1], num_tasks=4)
    folds = Folds.of(split, "half", learns_tau=True)
    assert split.task[folds.teaching].sort().values.tolist() == [1, 3]
    assert folds.note(split).endswith("; 4 tasks have documents in one of both only")


def test_the_pieces_of_a_document_stay_together():
    split = TokenSplit.from_documents([[0, 5]] * 6, task=[0, 0, 0, 0, 1, 1], num_tasks=2)
    split = split.replace(document_index=torch.tensor([0, 0, 1, 1, 2, 2]))
    assert Folds.of(split, "half", learns_tau=True).teaching.tolist() == [2, 3]


@pytest.mark.parametrize("drawn", [False, True], ids=["all tasks", "drawn tasks"])
def test_tau_is_shown_one_fold_and_the_perplexity_is_that_of_the_other(drawn):
    data, model = toy_data(), toy_model(prior=LearnedPrecision())
    folds = Folds.of(data.validation, "half", learns_tau=True)
    loop = Loop(model, data, map_guide(model), task_subsampling=drawn, **OPTIONS)
    shown = torch.cat([batch.index for batches in loop.validation_batches() for batch in batches])
    assert shown.sort().values.tolist() == folds.teaching.tolist()
    (scores,) = evaluate(model, data.validation.subset(folds.choosing), loop.state.adapters())
    assert loop.fitted.validation_perplexity == pytest.approx(scores.perplexity(), rel=1e-5)


def test_another_fold_gives_another_tau():
    first, second = (
        fit(toy_model(prior=LearnedPrecision(every=1)), toy_data(), **OPTIONS | {"tau_documents": which})
        for which in ("all", "half")
    )
    assert first.tau() != second.tau()


def test_a_fixed_tau_has_no_fold():
    with pytest.raises(InputError, match="tau_documents is half, but no tau is learned in this fit; leave tau_documents out"):
        fit(toy_model(prior=HierarchicalNormal()), toy_data(), **OPTIONS)


def test_one_validation_document_is_too_few():
    with pytest.raises(InputError, match="there is 1 validation document; give more documents, or all"):
        Folds.of(toy_data(validation=(0, 1, 0)).validation, "half", learns_tau=True)

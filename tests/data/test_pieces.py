"""Pieces of one long document count as one document wherever documents are counted."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from pyro import poutine

from bora_pyro import CausalLM, InputError, TaskData, fit, infer_task
from bora_pyro.data import TokenSplit, load_tasks, table
from bora_pyro.data.subset import subset
from bora_pyro.diagnostics.shrinkage import held_out, shrinkage
from bora_pyro.diagnostics.unknown_texts import sample_texts, text_scores
from bora_pyro.guides.curvature import diagonal_fisher, gradients_of, kronecker_fisher
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.predict.mixture import predictive
from bora_pyro.runs.checks import check_data
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.results import metrics_of
from tests.data_fixtures import WORDS, word_tokenizer
from tests.tiny import random_weights, tiny_bora

#: Words of each document: 38 and an end are 13 pieces of 3 tokens each.
LONG = 38


def long_rows():
    """Three long training documents, two of "a" and one of "b"; a short one of each task to validate, and a long one to test."""
    rows = [
        {"task": task, "split": "train", "text": " ".join(WORDS[(k + n) % 6] for n in range(LONG))}
        for k, task in enumerate("aab")
    ]
    rows += [{"task": task, "split": "validation", "text": f"red {WORDS[k + 1]}"} for k, task in enumerate("ab")]
    return rows + [{"task": task, "split": "test", "text": " ".join([WORDS[k]] * 5)} for k, task in enumerate("ab")]


@pytest.fixture(scope="module")
def data():
    options = {"split_column": "split", "max_tokens": 4, "long_documents": "split"}
    return load_tasks(table(long_rows()), word_tokenizer(), **options)


@pytest.fixture(scope="module")
def with_likelihood():
    """A function that gives one tiny model another likelihood."""
    models = {tasks: tiny_bora(tasks=tasks, targets=["q_proj"]) for tasks in (2, 3)}

    def model(tasks, likelihood=None):
        other = copy.copy(models[tasks])
        other.likelihood = likelihood or CausalLM()
        return other

    return model


def unequal_split():
    """Five documents of unequal length in pieces that do not lie together: documents 7 and 2 have three and two pieces."""
    pieces = [[0, 5, 6, 7, 8], [0, 9, 8], [0, 5], [0, 3, 4, 5], [0, 7, 7, 7, 3, 4], [0, 6, 6, 4], [0, 8, 3]]
    return TokenSplit.from_documents(
        pieces, task=[1, 0, 1, 0, 1, 2, 1], num_tasks=3, document_index=[7, 2, 7, 2, 7, 4, 5], pad_token_id=1
    )


MEMBERS = {(1, 3): 0, (5,): 2, (6,): 1, (0, 2, 4): 1}  # the rows of each document, in the order of their numbers, and its task


@pytest.mark.parametrize("streaming", [False, True])
def test_three_documents_in_39_pieces_are_three_documents(streaming):
    options = {"split_column": "split", "max_tokens": 4, "long_documents": "split", "streaming": streaming}
    data = load_tasks(table(long_rows()), word_tokenizer(), **options)
    train = data.train
    assert (train.num_documents, len(train), train.documents_per_task) == (3, 39, [2, 1])
    assert repr(train) == "TokenSplit(3 documents in 39 pieces, 117 predicted tokens, 2 tasks)"
    assert repr(data).endswith("documents: 3 train, 2 validation, 2 test)")
    assert data.counts.documents == {"train": 3, "validation": 2, "test": 2}
    assert "5 of 7 documents are longer than 4 tokens and were split into 43 pieces" in data.notes
    assert train.document_of.tolist() == [n for n in range(3) for _ in range(13)]
    torch.testing.assert_close(train.piece_share, torch.full((39,), 1 / 13, dtype=torch.float64))
    assert data.validation.piece_share is None
    assert repr(data.validation) == "TokenSplit(2 documents, 6 predicted tokens, 2 tasks)"


def test_whole_documents_are_drawn(data):
    one = subset(data, ["a", "b"], max_train_documents=1)
    assert (one.train.documents_per_task, len(one.train)) == ([1, 1], 26)
    assert subset(data, ["b"]).train.documents_per_task == [1]
    texts = sample_texts(data.train, 2)
    assert (len(texts), texts.num_documents) == (2, 2)
    assert {int(n) for n in data.train.first_pieces} == {0, 13, 26}


def test_the_pieces_of_a_document():
    split = unequal_split()
    assert (len(split), split.num_documents, split.documents_per_task) == (7, 4, [1, 2, 1])
    assert split.document_of.tolist() == [3, 0, 3, 0, 3, 1, 2]
    assert split.first_pieces.tolist() == [1, 5, 6, 0]
    assert split.sum_by_document(split.predicted).tolist() == [5, 3, 2, 10]
    torch.testing.assert_close(split.piece_share, torch.tensor([4 / 10, 2 / 5, 1 / 10, 3 / 5, 5 / 10, 1, 1], dtype=torch.float64))
    some = split.subset(torch.tensor([4, 6, 2]))
    assert (some.num_documents, some.piece_share.tolist()) == (2, pytest.approx([5 / 6, 1, 1 / 6]))
    assert split.subset(torch.arange(0)).documents_per_task == [0, 0, 0]
    with pytest.raises(InputError, match="document_index has 2 entries for 7 rows"):
        split.replace(document_index=torch.tensor([0, 1]))
    with pytest.raises(InputError, match="rows of several tasks the same number"):
        split.replace(document_index=torch.zeros(7))


@pytest.mark.parametrize("weights", [None, torch.tensor([2.0, 1.0, 0.5])])
@pytest.mark.parametrize("budget", [1, 12, 1000])
def test_a_document_counts_once_whatever_its_number_of_pieces(with_likelihood, budget, weights):
    """Σ_n w_d (Σ of its pieces' log-likelihood) / (its tokens), over the pieces of all batches."""
    split, model = unequal_split(), with_likelihood(3, CausalLM("documents", task_weights=weights))
    theta = random_weights(model)
    (scores,) = evaluate(model, split, theta)
    expected = number = 0.0
    for rows, task in MEMBERS.items():
        weight = 1.0 if weights is None else float(weights[task])
        own = list(rows)
        expected += weight * float(scores.log_likelihood[own].sum() / split.predicted[own].sum())
        number += weight
    found = observed = 0.0
    for whole in split.batches(token_budget=budget):
        for batch in whole.parts(8):  # as a base that reads few tokens at once
            trace = poutine.trace(model.likelihood).get_trace(model, theta, batch)
            found += float(trace.log_prob_sum()) / batch.scale
            observed += model.likelihood.observations_of(batch.to("cpu"))
    assert found == pytest.approx(expected, rel=1e-5)
    assert observed == pytest.approx(number, rel=1e-6)
    assert model.likelihood.observations_of(split) == pytest.approx(number, rel=1e-12)
    tokens = CausalLM(task_weights=weights)
    assert tokens.observations_of(split) == tokens.observations_of(split.replace(document_index=None))


@pytest.mark.parametrize("unit", ["tokens", "documents"])
@pytest.mark.parametrize("budget", [1, 12, 1000])
def test_the_gradient_of_a_document_is_the_sum_over_its_pieces(with_likelihood, unit, budget):
    split, model = unequal_split(), with_likelihood(3, CausalLM(unit))
    theta = random_weights(model)
    expected, fisher = [], {name: torch.zeros_like(value) for name, value in theta.items()}
    for rows, task in MEMBERS.items():
        own = {name: value[task].clone().requires_grad_() for name, value in theta.items()}
        every = {name: value[None].expand(3, *value.shape) for name, value in own.items()}
        (batch,) = split.subset(torch.tensor(rows)).batches(token_budget=1000)
        value = model.likelihood.score(model, every, batch).sum()
        value = value / int(split.predicted[list(rows)].sum()) if unit == "documents" else value
        gradients = dict(zip(own, torch.autograd.grad(value, list(own.values())), strict=True))
        expected.append((task, gradients))
        for name, gradient in gradients.items():
            fisher[name][task] += gradient.square()
    found = [
        (int(task), {name: value[n] for name, value in gradients.items()})
        for tasks, gradients in gradients_of(model, theta, split, token_budget=budget)
        for n, task in enumerate(tasks)
    ]
    assert len(found) == len(expected)
    for task, gradients in expected:
        assert any(
            task == other and all(torch.allclose(value, given[name], rtol=1e-3, atol=1e-6) for name, value in gradients.items())
            for other, given in found
        )
    for name, value in diagonal_fisher(model, theta, split, token_budget=budget).items():
        torch.testing.assert_close(value, fisher[name], rtol=1e-3, atol=1e-6)
    long = kronecker_fisher(model, theta, split, token_budget=budget)["q_proj.lora_A.long"]  # its trace is the Fisher's
    torch.testing.assert_close(long.sum(-1), fisher["q_proj.lora_A"].sum((-2, -1)), rtol=1e-3, atol=1e-6)


def test_a_fit_tells_and_uses_the_numbers_of_documents(with_likelihood, data):
    model = with_likelihood(2, CausalLM("documents"))
    fitted = fit(model, data, epochs=1, token_budget=40)
    assert fitted.documents == [2, 1]
    torch.testing.assert_close(infer_task(fitted, data.test).log_prior.exp(), torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))
    metrics = metrics_of(fitted, data, tau=100.0, learning_rate=0.01, seed=0)
    assert (metrics["train_documents"], metrics["test_documents"]) == (3, 2)
    assert [(row["train_documents"], row["test_documents"]) for row in metrics["tasks"].values()] == [(2, 1), (1, 1)]
    # the history's loss is per document: the sum of its pieces over its tokens
    (start,) = evaluate(model, data.train, {name: value.expand(2, *value.shape) for name, value in model.starts.items()})
    one_step = fit(with_likelihood(2, CausalLM("documents")), data, epochs=1, token_budget=1000)
    expected = -float(data.train.sum_by_document(start.log_likelihood).sum()) / 39 / 3
    assert one_step.history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_scores_of_documents_are_of_whole_ones(with_likelihood, data):
    model = with_likelihood(2)
    fitted = fit(model, data, epochs=1, token_budget=40)
    container = held_out(fitted, data, split="train")
    (scores,) = evaluate(model, data.train, fitted.weights()[0])
    by_document = scores.log_likelihood.view(3, 13).sum(1)
    assert container["log_likelihood"]["documents"].values.ravel().tolist() == pytest.approx(by_document.tolist())
    constant = container["constant_data"]
    assert constant["document_tokens"].values.tolist() == [39, 39, 39]
    assert constant["document_task"].values.tolist() == ["a", "a", "b"]
    assert constant["train_documents"].values.tolist() == [2, 1]
    assert shrinkage(fitted, data)["log_likelihood"]["documents"].sizes["document"] == 2
    found = predictive(model, data.train, lambda: [fitted.weights()[0]])
    torch.testing.assert_close(found.log_predictive(), by_document, rtol=1e-4, atol=1e-3)
    assert len(text_scores(model, data.train, fitted.weights()[0], lambda: [fitted.weights()[0]])) == 39  # each row is a text


def test_a_checkpoint_that_counts_otherwise_is_refused(with_likelihood, data, tmp_path):
    options = {"epochs": 1, "token_budget": 40, "checkpoints": tmp_path}
    fit(with_likelihood(2), data, **options)
    assert fit(with_likelihood(2), data, **options).documents == [2, 1]
    rows = dataclasses.replace(data, train=data.train.replace(document_index=None))
    with pytest.raises(InputError, match=r"counts documents in another way: the 39 pieces are of 39 documents") as caught:
        fit(with_likelihood(2), rows, **options)
    assert "\n" not in str(caught.value)


def test_a_run_of_a_version_that_counted_pieces_is_read(data, tmp_path):
    row = {"test_perplexity": 1.0, "base_test_perplexity": 1.0}
    metadata, tasks = {"tasks": '["a", "b"]'}, {task: {"name": task, **row} for task in "ab"}
    for documents in (3, 39):
        check_data(RunFolder(tmp_path), data, {"train_documents": documents, "test_documents": 2, "tasks": tasks}, metadata)
    with pytest.raises(InputError, match="had 4 train documents, but the data now have 3"):
        check_data(RunFolder(tmp_path), data, {"train_documents": 4, "test_documents": 2, "tasks": tasks}, metadata)


def test_data_without_pieces_are_as_before():
    split = TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[1, 0], num_tasks=2)
    assert split.document_index is None
    assert split.batches()[0].piece_share is None
    assert CausalLM("documents").observations_of(split) == 2.0
    # an older run with pieces knows its documents again
    pieces = split.replace(task=torch.tensor([0, 0]), document_index=torch.tensor([8, 8]))
    rows = pieces.replace(document_index=None)
    assert TaskData(["a", "b"], *[pieces] * 3).digest == TaskData(["a", "b"], *[rows] * 3).digest

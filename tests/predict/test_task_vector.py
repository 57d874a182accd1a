"""Task vectors: what they are a mean of, that a row depends on nothing else, and that no adapter enters."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from bora_pyro import Backbone, InputError, adapt, fit
from bora_pyro.data import TokenSplit
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.predict.task_vector import last_states, task_vector, task_vectors
from tests.tiny import random_weights, tiny_backbone, tiny_bora, tiny_data, tiny_model, tiny_questions, tiny_split


def backbone_of(architecture):
    """A tiny base whose end mark is the token 2."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 2, "<unk>": 3}, "<unk>")),
        bos_token="<s>",
        eos_token="</s>",
    )
    return Backbone(tiny_model(architecture), tokenizer)


def alone(backbone, ids, states):
    """The state of one document by a pass of its own, without padding."""
    ids = ids[:-1] if ids[-1] == 2 and len(ids) > 2 else ids
    found = last_states(backbone, torch.tensor([ids]))[0].double()
    return found[-1] if states == "last" else found[1:].mean(0)


@pytest.mark.parametrize("architecture", ["opt", "opt-350m", "gpt2", "gemma2"])
@pytest.mark.parametrize("states", ["last", "mean"])
@torch.inference_mode()
def test_it_is_the_mean_over_documents_read_alone(architecture, states):
    """So neither padding nor the other rows of a batch have an influence, and the end mark has none either."""
    backbone = backbone_of(architecture)
    documents, task = [[0, 5, 6, 2], [0, 7, 8, 9, 10, 11, 12], [0, 2], [0, 9, 5]], [0, 1, 0, 0]
    split = TokenSplit.from_documents(documents, task=task, num_tasks=2, pad_token_id=1)
    expected = torch.stack(
        [
            torch.stack([alone(backbone, row, states) for row, d in zip(documents, task, strict=True) if d == of]).mean(0)
            for of in (0, 1)
        ]
    )
    for token_budget in (1, 8, 1000):
        found = task_vectors(backbone, split, states=states, token_budget=token_budget)
        torch.testing.assert_close(found.vectors.double(), expected, rtol=1e-4, atol=1e-5)
        assert (found.documents, found.tokens) == ([3, 1], [3 + 2 + 3, 7])


def test_the_states_are_those_that_the_head_reads():
    for architecture in ("opt", "gemma2"):  # Gemma 2 caps its logits, so it does not end with its head
        backbone = tiny_backbone(architecture)
        ids = torch.tensor([[0, 5, 6]])
        with torch.inference_mode():
            logits = backbone.model.get_output_embeddings()(last_states(backbone, ids))
        cap = getattr(backbone.model.config, "final_logit_softcapping", None)
        torch.testing.assert_close(logits if cap is None else cap * torch.tanh(logits / cap), backbone.logits(ids))


@pytest.mark.parametrize("states", ["last", "mean"])
def test_no_adapter_enters(states):
    model, data = tiny_bora(), tiny_data()
    before = task_vectors(model.backbone, data.train, states=states).vectors
    with model.backbone.changed(model.change(random_weights(model), torch.zeros(1, dtype=torch.int64)), 1):
        pass
    evaluate(model, data.test, random_weights(model))
    fitted = fit(model, data, epochs=1)
    adapt(fitted, data, steps=1)
    assert torch.equal(task_vectors(fitted.model.backbone, data.train, states=states).vectors, before)
    assert torch.equal(task_vectors(tiny_backbone(), data.train, states=states).vectors, before)


def test_a_task_s_documents_do_not_depend_on_the_other_tasks():
    backbone, split = tiny_backbone(), tiny_split((9, 2, 7))
    few = task_vectors(backbone, split, documents=3, seed=4)
    assert few.documents == [3, 2, 3]
    for d in range(3):
        own = split.subset((split.task == d).nonzero()[:, 0])
        only = task_vectors(backbone, own, documents=3, seed=4)
        torch.testing.assert_close(only.vectors[d], few.vectors[d], rtol=1e-4, atol=1e-5)
        assert only.tokens[d] == few.tokens[d]
        assert not only.vectors[torch.arange(3) != d].any()  # tasks without documents
    assert not torch.equal(task_vectors(backbone, split, documents=3, seed=5).vectors, few.vectors)


def test_pieces_and_questions_count_once():
    backbone = tiny_backbone()
    rows = [[0, 5, 6], [0, 7, 8], [0, 9]]
    pieces = TokenSplit.from_documents(rows, task=[0, 0, 1], num_tasks=2, document_index=[4, 4, 5], pad_token_id=1)
    whole = TokenSplit.from_documents([rows[0], rows[2]], task=[0, 1], num_tasks=2, pad_token_id=1)
    found = task_vectors(backbone, pieces)
    assert found.documents == [1, 1]
    torch.testing.assert_close(found.vectors, task_vectors(backbone, whole).vectors)
    questions = tiny_questions((3, 1, 4))
    right = [questions.document(n).tolist() for n in questions.correct.nonzero()[:, 0].tolist()]
    tasks = questions.task[questions.correct].tolist()
    plain = TokenSplit.from_documents(right, task=tasks, num_tasks=3, pad_token_id=1)
    found = task_vectors(backbone, questions)
    assert found.documents == [3, 1, 4]
    torch.testing.assert_close(found.vectors, task_vectors(backbone, plain).vectors)


def test_one_task_of_texts():
    backbone = Backbone.from_pretrained("builtin:nano")
    texts = ["A graph is a set of nodes.", "An edge."]
    vector = task_vector(backbone, texts)
    halves = [task_vector(backbone, text) for text in texts]
    torch.testing.assert_close(vector, (halves[0] + halves[1]) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda backbone, split: task_vector(backbone, split.subset(torch.arange(0))), "there is no document"),
        (lambda backbone, split: task_vectors(backbone, split.subset(torch.arange(0))), "there is no document"),
        (
            lambda backbone, split: task_vectors(backbone, split, states="lsat"),
            "states is 'lsat'; allowed: last, mean; did you mean",
        ),
        (lambda backbone, split: task_vectors(backbone, split, documents=0), "documents is 0; give a whole number from 1 up"),
        (lambda backbone, split: task_vector(backbone, ["a"]), "the base has no tokenizer"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call(tiny_backbone(), tiny_split())

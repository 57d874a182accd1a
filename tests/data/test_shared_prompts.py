"""Options that share the row of their prompt give what rows of their own give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bora_pyro import BoRA, LoRA
from bora_pyro.backbone.backbone import Backbone
from bora_pyro.backbone.probe_layout import reads_layout
from bora_pyro.data import TokenSplit
from bora_pyro.data.shared_prompts import SharedPrompts
from bora_pyro.guides.curvature import document_gradients
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.likelihoods import Choice
from bora_pyro.predict.linearised import LinearisedBoRA
from tests.tiny import ARCHITECTURES, VOCABULARY, random_weights, tiny_backbone, tiny_bora, tiny_model, tiny_questions

#: The architectures whose layers all have plain attention.
PLAIN = ["opt", "opt-350m", "gpt2", "llama", "qwen2", "qwen3", "gemma"]


def long_questions(counts=(3, 1, 4), *, seed=0):
    """As `tiny_questions`, with prompts of seven to ten tokens, so that sharing them pays."""
    split = tiny_questions(counts, seed=seed)
    generator = torch.Generator().manual_seed(7)
    more = {n: torch.randint(3, VOCABULARY, (6,), generator=generator).tolist() for n in range(split.num_documents)}
    rows = [[0, *more[int(split.document_of[n])], *split.document(n).tolist()[1:]] for n in range(len(split))]
    read = [len(row) - int(split.predicted[n]) for n, row in enumerate(rows)]
    columns = {name: getattr(split, name).tolist() for name in ("task", "document_index", "correct")}
    return TokenSplit.from_documents(rows, num_tasks=split.num_tasks, read=read, pad_token_id=1, **columns)


def apart(model):
    """The same model, which reads each option in a row of its own."""
    vars(model.backbone)["longest_shared"] = 0
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bases_with_plain_attention_share_prompts(name):
    assert tiny_backbone(name).longest_shared == (32 if name in PLAIN else 0)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_base_that_reads_its_own_way_is_found_out(precision):
    class OwnPositions(nn.Module):
        """A base that takes its positions from the order of the tokens."""

        def __init__(self, model):
            super().__init__()
            self.inner, self.config, self.dtype = model, model.config, model.dtype
            self.get_input_embeddings = model.get_input_embeddings

        def forward(self, input_ids, use_cache, position_ids=None, attention_mask=None):
            return self.inner(input_ids=input_ids, use_cache=use_cache, attention_mask=attention_mask)

    class NoMask(OwnPositions):
        """A base that sees every earlier token."""

        def forward(self, input_ids, use_cache, position_ids=None, attention_mask=None):
            return self.inner(input_ids=input_ids, use_cache=use_cache, position_ids=position_ids)

    class Refuses(OwnPositions):
        """A base that takes no such arguments."""

        def forward(self, input_ids, use_cache):
            return self.inner(input_ids=input_ids, use_cache=use_cache)

    model, device = tiny_model("llama").to(precision), torch.device("cpu")
    assert reads_layout(model, device)
    assert not any(reads_layout(kind(model), device) for kind in (OwnPositions, NoMask, Refuses))


def test_rows_are_shared_and_given_back():
    [batch] = long_questions().batches(token_budget=10_000)
    shared = SharedPrompts.of(batch)
    assert shared.batch.input_ids.numel() < batch.input_ids.numel() / 1.5
    assert shared.batch.task.tolist() == batch.task[batch.first_rows].tolist()
    for name, of in (("input_ids", shared.batch.input_ids), ("position", shared.batch.layout["position_ids"])):
        back = shared.unpacked(of[..., None])[..., 0]
        expected = batch.input_ids if name == "input_ids" else torch.arange(back.shape[1]).expand_as(back)
        held = batch.attention_mask.bool()
        assert torch.equal(back[held], expected.expand_as(back)[held])


def test_short_prompts_are_not_shared():
    rows = [[0, 5, 6, 7, 8], [0, 9], [0, 4]]
    more = {"read": [1] * 3, "document_index": [0] * 3, "correct": [True, False, False]}
    [batch] = TokenSplit.from_documents(rows, task=[0] * 3, num_tasks=2, **more).batches()
    assert SharedPrompts.of(batch).batch.input_ids.shape == (1, 7)
    [batch] = TokenSplit.from_documents(rows[:2], task=[0] * 2, num_tasks=2, **{n: v[:2] for n, v in more.items()}).batches()
    assert SharedPrompts.of(batch).batch.input_ids.tolist() == [[0, 5, 6, 7, 8, 9]]
    split = long_questions((2, 0, 0))
    [whole] = split.batches(token_budget=10_000)
    width = SharedPrompts.of(whole).batch.input_ids.shape[1]
    assert SharedPrompts.of(whole, longest=width) is not None
    assert SharedPrompts.of(whole, longest=width - 1) is None
    [one] = split.replace(task=split.task).batches(token_budget=10_000)
    different = one.input_ids.clone()
    different[:, 1] = torch.arange(len(different)) + 3  # prompts that differ from their second token on
    assert SharedPrompts.of(type(one)(**vars(one) | {"input_ids": different})) is None


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("option_score", ["sum", "mean"])
def test_scores_are_those_of_rows_of_their_own(name, option_score):
    split = long_questions()
    model = tiny_bora(name, likelihood=Choice(option_score))
    theta, calls = random_weights(model, scale=0.1), []
    original = model.backbone.lazy_logits
    model.backbone.lazy_logits = lambda ids, *args, **more: calls.append(more["layout"]) or original(ids, *args, **more)
    shared = evaluate(model, split, theta, None, token_budget=80)
    assert all(layout is not None for layout in calls)
    for one, other in zip(shared, evaluate(apart(model), split, theta, None, token_budget=80), strict=True):
        torch.testing.assert_close(one.log_p, other.log_p, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.options, other.options, rtol=1e-4, atol=1e-4)
    assert calls[-1] is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_gradients_are_those_of_rows_of_their_own(name, checkpointing):
    split = long_questions()
    backbone = tiny_backbone(name, gradient_checkpointing=checkpointing)
    model = BoRA(backbone, 3, adapter=LoRA(rank=2), likelihood=Choice())
    theta = random_weights(model, scale=0.1)
    [batch] = split.batches(token_budget=10_000)
    shared = document_gradients(model, theta, batch)
    for name_of, expected in document_gradients(apart(model), theta, batch).items():
        torch.testing.assert_close(shared[name_of], expected, rtol=1e-3, atol=1e-5)


def test_the_linearised_model_shares_prompts():
    split, model = long_questions(), tiny_bora("llama", likelihood=Choice())
    centre, theta = random_weights(model, scale=0.1), random_weights(model, scale=0.1, seed=1)
    (shared,) = evaluate(LinearisedBoRA(model, centre), split, theta)
    (other,) = evaluate(LinearisedBoRA(apart(model), centre), split, theta)
    torch.testing.assert_close(shared.log_p, other.log_p, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_it_is_the_same_up_to_rounding():
    split = long_questions()
    backbone = Backbone(tiny_model("llama").bfloat16())
    model = BoRA(backbone, 3, adapter=LoRA(rank=2), likelihood=Choice())
    assert backbone.longest_shared
    theta = random_weights(model, scale=0.1)
    (shared,), (other,) = evaluate(model, split, theta), evaluate(apart(model), split, theta)
    assert float((shared.options - other.options)[shared.options > -torch.inf].abs().max()) < 0.3

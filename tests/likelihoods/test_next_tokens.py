from __future__ import annotations

import pyro
import pytest
import torch
from pyro import poutine

from bora_pyro import CausalLM, InputError
from bora_pyro.data.batch import IGNORED
from bora_pyro.likelihoods import NextTokens
from tests.tiny import VOCABULARY, random_ids, random_weights, tiny_batch, tiny_bora, tiny_model, tiny_split


def random_logits(rows=3, tokens=7, *, seed=0):
    return 2 * torch.randn((rows, tokens, VOCABULARY), generator=torch.Generator().manual_seed(seed))


def test_log_prob_is_the_loss_of_transformers():
    model, batch = tiny_model(), tiny_batch()
    with torch.no_grad():
        output = model(input_ids=batch.input_ids, labels=batch.labels)
    tokens = (batch.labels != IGNORED).sum()
    assert (batch.labels[:, 1:] == IGNORED).any()  # there is padding
    torch.testing.assert_close(NextTokens(output.logits).log_prob(batch.labels).sum(), -output.loss * tokens)


def test_log_prob_of_each_document_and_per_token():
    model, batch = tiny_model(), tiny_batch()
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits
        lengths = batch.attention_mask.sum(-1).tolist()
        loss = torch.stack(
            [model(input_ids=row[None, :n], labels=row[None, :n]).loss for row, n in zip(batch.input_ids, lengths, strict=True)]
        )
    torch.testing.assert_close(NextTokens(logits, per_token=True).log_prob(batch.labels), -loss)
    torch.testing.assert_close(NextTokens(logits).log_prob(batch.labels), -loss * (torch.tensor(lengths) - 1))


def test_masked_labels_count_nowhere():
    logits, labels = random_logits(), random_ids()
    mask = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[2] = True  # a document without an observed token
    single = torch.log_softmax(logits[:, :-1], -1).gather(-1, labels[:, 1:, None])[..., 0] * ~mask[:, 1:]
    observed = labels.masked_fill(mask, IGNORED)
    torch.testing.assert_close(NextTokens(logits).log_prob(observed), single.sum(-1))
    per_token = NextTokens(logits, per_token=True).log_prob(observed)
    torch.testing.assert_close(per_token, single.sum(-1) / (~mask[:, 1:]).sum(-1).clamp(min=1))
    assert NextTokens(logits).log_prob(observed)[2] == 0
    assert per_token[2] == 0


def test_the_first_token_and_the_last_logits_count_nowhere():
    logits, labels = random_logits(), random_ids()
    expected = NextTokens(logits).log_prob(labels)
    labels[:, 0] = IGNORED
    logits[:, -1] = torch.nan
    assert torch.equal(NextTokens(logits, validate_args=False).log_prob(labels), expected)


def test_masked_positions_have_no_gradient():
    logits, labels = random_logits().requires_grad_(), random_ids()
    labels[:, 4:] = IGNORED
    NextTokens(logits).log_prob(labels).sum().backward()
    moved = logits.grad.abs().sum(-1) > 0
    assert torch.equal(moved, torch.arange(7).expand(3, 7) < 3)


def test_bf16_logits_give_a_float32_density():
    logits, labels = random_logits().bfloat16(), random_ids()
    density = NextTokens(logits).log_prob(labels)
    assert density.dtype == torch.float32
    assert torch.equal(density, NextTokens(logits.float()).log_prob(labels))


def test_samples_follow_the_logits():
    logits = torch.full((2, 5, VOCABULARY), -30.0)
    expected = random_ids(2, 5)
    logits.scatter_(-1, expected.roll(-1, 1)[..., None], 30.0)  # position i holds the logits of token i + 1
    with pyro.poutine.seed(rng_seed=0):
        drawn = NextTokens(logits).sample(torch.Size([4]))
    assert drawn.shape == (4, 2, 5)
    assert (drawn[..., 0] == IGNORED).all()
    assert torch.equal(drawn[..., 1:], expected[:, 1:].expand(4, 2, 4))


def test_samples_have_the_right_frequencies():
    logits = torch.zeros(1, 2, 3)
    logits[0, 0] = torch.tensor([0.5, 0.3, 0.2]).log()
    with pyro.poutine.seed(rng_seed=0):
        drawn = NextTokens(logits).sample(torch.Size([20_000]))[:, 0, 1]
    frequencies = torch.bincount(drawn, minlength=3) / 20_000
    torch.testing.assert_close(frequencies, torch.tensor([0.5, 0.3, 0.2]), atol=0.02, rtol=0)  # five standard errors


def test_expand_keeps_values_and_unit():
    one = NextTokens(random_logits(rows=1), per_token=True)
    labels = random_ids(rows=1)
    many = one.expand(torch.Size([4]))
    assert (many.batch_shape, many.event_shape) == ((4,), (7,))
    torch.testing.assert_close(many.log_prob(labels.expand(4, 7)), one.log_prob(labels).expand(4))


@pytest.mark.parametrize("unit", ["tokens", "documents"])
def test_minibatches_are_unbiased_for_all_documents(unit):
    model, split = tiny_bora(likelihood=CausalLM(unit)), tiny_split((3, 1, 4), seed=3)
    weights = random_weights(model)

    def log_likelihood(batch):
        trace = poutine.trace(model.likelihood).get_trace(model, weights, batch)
        trace.compute_log_prob()
        return trace.nodes["tokens"]["log_prob_sum"]

    [everything] = split.batches(token_budget=10_000)
    batches = list(split.batches(token_budget=16, seed=0))
    assert len({len(batch.task) for batch in batches}) > 1  # unequal batches
    estimates = torch.stack([log_likelihood(batch) for batch in batches])
    torch.testing.assert_close(estimates.mean(), log_likelihood(everything))


def test_the_likelihood_is_one_observed_site_in_a_plate_of_documents():
    batch = tiny_batch()
    trace = poutine.trace(CausalLM()).get_trace(tiny_bora(), None, batch)
    assert trace.observation_nodes == ["tokens"]
    [frame] = trace.nodes["tokens"]["cond_indep_stack"]
    assert (frame.name, frame.size, frame.dim) == ("documents", len(batch.task), -1)
    assert trace.nodes["tokens"]["scale"] == batch.scale


def test_an_unknown_unit_names_the_nearest():
    with pytest.raises(InputError, match=r"'document'.*tokens, documents; did you mean 'documents'\?"):
        CausalLM("document")
    assert repr(CausalLM("documents")) == "CausalLM(unit='documents')"

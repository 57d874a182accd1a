"""TriAdaptLoRA: the triangular core, growth that changes no output, and a budget that is met exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bora_pyro import HierarchicalNormal, Independent, InputError, LoRA, fit, map_guide
from bora_pyro.adapters import TriAdaptLoRA
from bora_pyro.adapters.triadapt import RankGrowth, grown_ranks
from bora_pyro.backbone.slots import Slot
from bora_pyro.inference.elbo import TemperedELBO
from bora_pyro.inference.fit import FitStopped
from tests.tiny import random_weights, tiny_batch, tiny_bora, tiny_data

SLOT = Slot("q_proj", ("a.q_proj",), 16, 24)
FIT = {"epochs": 3, "learning_rate": 0.03, "token_budget": 16, "patience": 0}


def draw(adapter, *, rows=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = adapter.start(SLOT, None, generator)
    return {name: torch.randn((*rows, *value.shape), generator=generator) for name, value in start.latents.items()}


def training_only():
    """Without validation documents the last state is kept."""
    data = tiny_data()
    return replace(data, validation=data.validation.subset(torch.arange(0)))


def ranks_of(model):
    return torch.cat([model.tensors.masks[f"{slot.name}.lora_A"][..., 0].sum(-1) for slot in model.backbone.slots])


def set_ranks(model, rank):
    for slot in model.backbone.slots:
        for name, mask in model.adapter.masks(torch.full((slot.layers,), rank)).items():
            model.tensors.masks[f"{slot.name}.{name}"] = mask


def packed(matrix):
    """The lower triangle, row by row."""
    row, column = torch.tril_indices(*matrix.shape)
    return matrix[row, column]


def test_the_core_reaches_every_matrix():
    adapter, tensors = TriAdaptLoRA(rank=2, alpha=3.0), draw(TriAdaptLoRA(rank=2))
    core = torch.randn((4, 4), generator=torch.Generator().manual_seed(1))
    tensors |= {"lower": packed(core.tril()), "upper": packed(core.triu(1).T)}
    assert torch.equal(adapter.core(tensors), core)
    delta = 3.0 / 4 * tensors["lora_B"] @ core @ tensors["lora_A"]
    torch.testing.assert_close(adapter.delta(tensors), delta)
    torch.testing.assert_close(adapter.factors(tensors).delta(), delta)


def test_the_diagonal_is_the_sum_of_two_latents():
    adapter = TriAdaptLoRA(rank=2)
    lower, upper = (torch.randn((4, 4), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    core = adapter.core({"lower": packed(lower), "upper": packed(upper)})
    assert torch.equal(core, lower.tril() + upper.tril().T)


def test_the_identity_as_core_is_lora():
    adapter, tensors = TriAdaptLoRA(rank=2, alpha=3.0), draw(TriAdaptLoRA(rank=2), rows=(5,))
    x = torch.randn((5, 7, 16), generator=torch.Generator().manual_seed(1))
    tensors |= {"lower": packed(torch.eye(4)).expand(5, -1), "upper": torch.zeros(5, 10)}
    torch.testing.assert_close(adapter.output(x, tensors), LoRA(rank=4, alpha=3.0).output(x, tensors))


def test_the_output_is_that_of_the_factors():
    adapter, tensors = TriAdaptLoRA(rank=2, alpha=3.0), draw(TriAdaptLoRA(rank=2), rows=(5,))
    x = torch.randn((5, 7, 16), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(adapter.output(x, tensors), x @ adapter.delta(tensors).mT, atol=1e-4, rtol=1e-4)


def test_growth_changes_no_output():
    """New ranks have random A and B, and no entries in C: the outputs are the same to the last bit."""
    model = tiny_bora("llama", targets="all-linear", adapter=TriAdaptLoRA(rank=4, start_rank=2))
    start, batch = model.starts, tiny_batch()
    weights = {}
    for name, value in random_weights(model).items():
        # what training at rank 2 leaves: active entries anywhere, the others at the start
        mask = model.tensors.masks[name]
        weights[name] = torch.where(mask, value, start[name])
    before = model.logits(batch, weights)
    set_ranks(model, 6)
    assert torch.equal(model.logits(batch, weights), before)
    assert not torch.equal(before, model.logits(batch, None))


def test_new_ranks_have_a_gradient_and_the_others_none():
    model = tiny_bora(adapter=TriAdaptLoRA(rank=4, start_rank=2), prior=Independent())
    for rank in (2, 5):
        set_ranks(model, rank)
        guide = map_guide(model)
        TemperedELBO().differentiable_loss(model, guide, tiny_batch()).backward()
        for name, parameter in guide.named_parameters():
            if name.endswith(("lower", "upper")):
                row = torch.tril_indices(8, 8)[0]
                assert (parameter.grad != 0)[..., row < rank].float().mean() > 0.5
                assert not parameter.grad[..., row >= rank].any()


def test_the_masks_are_those_of_ranks_one_at_a_time():
    adapter = TriAdaptLoRA(rank=2)
    masks = adapter.masks(torch.tensor([1, 3]))
    for n, rank in enumerate((1, 3)):
        ones = {name: torch.ones_like(value) for name, value in draw(adapter).items()}
        cut = {name: value * masks[name][n] for name, value in ones.items()}
        assert cut["lora_A"].sum(0).eq(rank).all()
        assert cut["lora_B"].sum(1).eq(rank).all()
        core = adapter.core(cut)
        assert core[:rank, :rank].bool().all()
        assert not core[rank:].any()
        assert not core[:, rank:].any()


@pytest.mark.parametrize("growth", ["linear", "exponential"])
@pytest.mark.parametrize("prior", [HierarchicalNormal(tau=10), Independent()], ids=repr)
def test_the_budget_is_never_exceeded_and_met_at_the_end(growth, prior):
    model = tiny_bora("llama", adapter=TriAdaptLoRA(rank=4, block=3, growth=growth, growths=4), prior=prior)
    budget, totals = 4 * sum(slot.layers for slot in model.backbone.slots), []
    fitted = fit(
        model, training_only(), on_step=lambda entry: totals.append(int(ranks_of(model).sum())), **FIT | {"average": False}
    )
    assert totals[0] == budget / 4
    assert totals == sorted(totals)
    assert totals[-1] == budget
    assert max(totals) == budget
    assert len(set(totals)) > 2
    assert ranks_of(model).max() <= 8
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
    theta, _ = fitted.weights()
    for name, value in theta.items():
        inactive = ~model.tensors.masks[name].expand(model.starts[name].shape)
        assert torch.equal(value[0][inactive], model.starts[name][inactive])


def test_a_fit_of_one_step_spends_the_budget():
    model = tiny_bora(adapter=TriAdaptLoRA(rank=4))
    fit(model, training_only(), **FIT | {"epochs": 1, "token_budget": 10_000})
    assert ranks_of(model).sum() == 4 * sum(slot.layers for slot in model.backbone.slots)


def test_the_layers_with_the_largest_scores_grow():
    linear, score = TriAdaptLoRA(rank=4, block=2), torch.tensor([0.1, 0.4, 0.2, 0.0])
    ones = torch.ones(4, dtype=torch.int64)  # 12 ranks are left
    assert grown_ranks(linear, ones, score, 0.25).tolist() == [3, 3, 3, 1]  # ⌊12/4⌋ = 3 layers
    exponential = TriAdaptLoRA(rank=4, block=2, growth="exponential")
    assert grown_ranks(exponential, ones, score, 0.3).tolist() == [1, 3, 3, 1]  # ⌊12^0.3⌋ = 2
    # equal scores are all at the threshold, as far as the budget lasts
    assert grown_ranks(linear, ones, torch.zeros(4), 0.01).tolist() == [3, 3, 3, 3]
    assert grown_ranks(linear, ones, score, 1.0).sum() == 16
    # a layer with the largest rank grows no more
    assert grown_ranks(linear, torch.tensor([1, 8, 1, 1]), score, 0.2).tolist() == [1, 8, 3, 1]
    assert grown_ranks(linear, torch.tensor([2, 8, 3, 2]), score, 1.0).tolist() == [2, 8, 4, 2]


def test_the_score_is_the_growth_of_the_normalised_norm():
    model = tiny_bora(targets="q_proj", adapter=TriAdaptLoRA(rank=4, block=3), prior=HierarchicalNormal(tau=10))
    weights = {name: value[:1].expand_as(value) for name, value in random_weights(model).items()}

    class State:
        def global_mean(self):
            return weights

    class Loop:
        draws_tasks, state = False, State()

    loop, hooks = Loop(), RankGrowth(model.adapter)
    loop.model = model
    norms = [weights["q_proj.lower"][0, layer, 0] + weights["q_proj.upper"][0, layer, 0] for layer in range(2)]  # C is 1 x 1
    hooks.grow(loop, 1)
    grown = ranks_of(model)
    assert grown.tolist() == ([4, 1] if norms[0].abs() > norms[1].abs() else [1, 4])
    # the grown layer has two blocks, so its F is half of what it was
    torch.testing.assert_close(hooks.importance, torch.stack(norms).abs() / torch.where(grown == 4, 2, 1))


def test_a_fit_with_growing_ranks_goes_on_where_it_was_stopped(tmp_path):
    def model():
        return tiny_bora(adapter=TriAdaptLoRA(rank=4, growths=3), prior=HierarchicalNormal(tau=10))

    def everything(fitted):
        return {name: value.detach() for name, value in fitted.guide.named_parameters()} | fitted.model.state()

    whole, asked = fit(model(), training_only(), **FIT), []
    stop = {"stop": lambda: asked.append(1) or len(asked) == 5}
    with pytest.raises(FitStopped):
        fit(model(), training_only(), checkpoints=tmp_path, **stop, **FIT)
    resumed = fit(model(), training_only(), checkpoints=tmp_path, **FIT)
    assert all(torch.equal(value, everything(resumed)[name]) for name, value in everything(whole).items())


def test_ranks_grow_where_steps_draw_tasks_if_the_prior_has_a_mean():
    model = tiny_bora(adapter=TriAdaptLoRA(rank=2, growths=2), prior=HierarchicalNormal(tau=10))
    fit(model, training_only(), task_subsampling=True, **FIT)
    assert ranks_of(model).sum() == 2 * sum(slot.layers for slot in model.backbone.slots)
    model = tiny_bora(adapter=TriAdaptLoRA(rank=2, growths=2), prior=Independent())
    with pytest.raises(InputError, match=r"under Independent\(\), and a step draws some tasks; give --task_subsampling false"):
        fit(model, training_only(), task_subsampling=True, **FIT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; give a whole number from 1 up"),
        ({"alpha": 0.0}, "alpha 0.0 is not allowed; it must be positive and finite; the usual value is max_rank (16)"),
        ({"max_rank": 4}, "max_rank is 4; give at least the rank, 8"),
        ({"start_rank": 9}, "start_rank is 9; give at most the rank, 8"),
        ({"block": 0}, "block is 0; give a whole number from 1 up"),
        ({"growths": 0}, "growths is 0; give a whole number from 1 up"),
        ({"growth": "lineal"}, "growth is 'lineal'; allowed: linear, exponential; did you mean 'linear'?"),
        ({"warmup": 0.8}, "warmup is 0.8 and until is 0.7; give fractions of the steps"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError) as caught:
        TriAdaptLoRA(**options)
    assert message in str(caught.value)

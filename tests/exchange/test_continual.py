"""Tasks in sequence: each stage begins at the merged base of the one before, and leaves its leading directions alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bora_pyro import BoRA, InputError, LoRA, fit
from bora_pyro.adapters import OSFT, SaRA
from bora_pyro.data.subset import subset
from bora_pyro.exchange.continual import Continual, Stage, continual_fit
from bora_pyro.exchange.merge import merge_into_base
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.priors import Given, Independent
from tests.tiny import TASKS, of_task, random_ids, random_weights, tiny_backbone, tiny_bora, tiny_data, tiny_split

OPTIONS = {"epochs": 2, "learning_rate": 0.03, "token_budget": 16, "patience": 0}


def training_only(data):
    """Without validation documents the last state is kept."""
    return replace(data, validation=data.validation.subset(torch.arange(0)))


def weights_of(backbone):
    slots = backbone.slots
    return {(slot.name, n): backbone.weight(slot, n).double().clone() for slot in slots for n in range(slot.layers)}


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_base_becomes_the_adapted_model(architecture):
    model = tiny_bora(architecture, targets="all-linear")
    weights, ids, digest = random_weights(model), random_ids(), model.backbone.digest
    expected = model.backbone.logits(ids, model.change(weights, torch.tensor([1, 1, 1])))
    merge_into_base(model, of_task(weights, 1))
    torch.testing.assert_close(model.backbone.logits(ids), expected, atol=1e-4, rtol=1e-4)
    assert model.backbone.digest != digest


@pytest.mark.parametrize("inner", [LoRA(rank=2), SaRA(fraction=0.2)], ids=repr)
def test_each_stage_leaves_the_leading_directions_of_the_base_before_alone(inner):
    """Also after AdamW's steps, which take hooked gradients out of their space; and the leading singular values stay."""
    backbone = tiny_backbone("llama", targets=["q_proj"])
    before = [weights_of(backbone)]
    continual_fit(
        backbone,
        training_only(tiny_data((3, 1, 4))),
        adapter=inner,
        preserve=(0.25, 0.5),
        on_stage=lambda _: before.append(weights_of(backbone)),
        **OPTIONS,
    )
    assert len(before) == 4
    for share, old, new in zip((0.25, 0.375, 0.5), before, before[1:], strict=False):
        for name, weight in old.items():
            delta = new[name] - weight
            left, _, right = torch.linalg.svd(weight)
            k = int(share * min(weight.shape))
            assert delta.norm() > 1e-3
            assert (left[:, :k].T @ delta).norm() < 1e-5 * delta.norm() + 1e-5  # of rounding to float32
            assert (delta @ right[:k].T).norm() < 1e-5 * delta.norm() + 1e-5


def test_a_stage_is_a_fit_of_its_task_on_the_merged_base():
    data, order = tiny_data((3, 1, 4)), ["task 2", "task 0"]
    found = continual_fit(tiny_backbone("llama"), data, order=order, adapter=LoRA(rank=2), tau=5.0, seed=3, **OPTIONS)
    backbone = tiny_backbone("llama")
    judge = BoRA(backbone, TASKS, prior=Independent())
    for row, (task, share) in enumerate(zip(order, (0.3, 0.7), strict=True)):
        model = BoRA(backbone, 1, adapter=OSFT(preserve=share, inner=LoRA(rank=2)), prior=Given({}, {}), seed=3)
        model.prior = Given(model.starts, {name: torch.tensor(5.0) for name in model.starts})
        fitted = fit(model, subset(data, [task]), seed=3, **OPTIONS)
        merge_into_base(model, of_task(fitted.weights()[0], 0))
        (scores,) = evaluate(judge, data.test, None)
        assert found.stages[row].losses == [math.log(scores.perplexity(d)) for d in (2, 0)]
    assert found.order == order


def test_a_sequence_goes_on_where_it_was():
    data, backbone = tiny_data((3, 1, 4)), tiny_backbone("llama")
    whole = continual_fit(backbone, data, adapter=LoRA(rank=2), **OPTIONS)

    class Stopped(Exception):
        pass

    def stop(so_far):
        if len(so_far.stages) == 2:
            raise Stopped

    halfway, seen = tiny_backbone("llama"), []
    with pytest.raises(Stopped):
        continual_fit(halfway, data, adapter=LoRA(rank=2), on_stage=lambda so_far: seen.append(so_far) or stop(so_far), **OPTIONS)
    resumed = continual_fit(halfway, data, adapter=LoRA(rank=2), done=seen[-1], **OPTIONS)
    assert torch.equal(resumed.matrix, whole.matrix)
    for name, weight in weights_of(backbone).items():
        assert torch.equal(weights_of(halfway)[name], weight)


def test_all_directions_preserved_change_nothing():
    backbone = tiny_backbone("llama")
    before = weights_of(backbone)
    found = continual_fit(backbone, training_only(tiny_data()), adapter=LoRA(rank=2), preserve=(1, 1), **OPTIONS)
    for name, weight in weights_of(backbone).items():
        torch.testing.assert_close(weight, before[name], atol=1e-6, rtol=0)
    assert found.forgetting == pytest.approx(0, abs=1e-5)
    assert found.learning == pytest.approx(0, abs=1e-5)


def test_the_averages_of_three_stages():
    losses = [[1.0, 5.0, 6.0], [2.0, 3.0, 5.5], [2.5, 3.25, 4.0]]
    stages = [Stage(str(n), 0.5, 1, 1.0, 0.0, row) for n, row in enumerate(losses)]
    found = Continual(["0", "1", "2"], [4.0, 6.0, 6.5], stages)
    assert found.average == pytest.approx((2.5 + 3.25 + 4) / 3)
    assert found.forgetting == pytest.approx(((2.5 - 1) + (3.25 - 3)) / 2)
    assert found.forward == pytest.approx(((6 - 5) + (6.5 - 5.5)) / 2)
    assert found.learning == pytest.approx(((4 - 1) + (5 - 3) + (5.5 - 4)) / 3)
    assert math.isnan(replace(found, stages=stages[:1]).forgetting)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": ["task 0", "task 9"]}, "task 'task 9' is not in the data, which has 3"),
        ({"order": ["task 0", "task 0"]}, "task 'task 0' stands twice in the order; name each task once"),
        ({"order": []}, "the order has no task"),
        ({"preserve": (0.3, 1.5)}, "a preserved share is 1.5; give a number from 0 to 1, nearest: 1"),
        ({"tau": math.inf}, "tau is inf, under which a task changes nothing"),
        ({"tau": -1.0}, "tau -1.0 is not allowed"),
    ],
)
def test_bad_input(changes, message):
    backbone = tiny_backbone("llama")
    before = backbone.digest
    with pytest.raises(InputError, match=message):
        continual_fit(backbone, tiny_data(), **changes)
    assert backbone.digest == before


def test_a_task_without_test_documents_is_refused():
    data = replace(tiny_data(), test=tiny_split((2, 0, 1), seed=2))
    with pytest.raises(InputError, match="task 'task 1' has no test document"):
        continual_fit(tiny_backbone("llama"), data)

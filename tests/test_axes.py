"""The axes carry members that the library does not know: fit, checkpoint, resume and export, with no edit elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from pyro import poutine
from safetensors import safe_open

from bora_pyro import BoRA, HierarchicalNormal, InputError, LoRA, adapt, fit, map_guide, normal_guide, save_peft
from bora_pyro.exchange.factors import lora_form
from bora_pyro.guides import low_rank_guide
from bora_pyro.guides.curvature import document_gradients
from bora_pyro.inference.fit import FitStopped
from tests.tiny import TASKS, loaded_peft, random_ids, random_weights, tiny_backbone, tiny_batch, tiny_data, tiny_model
from tests.toy_members import model_with

MEMBERS = pytest.mark.parametrize("member", ["adapter", "wrapper", "prior", "router", "objective"])
OPTIONS = {"epochs": 3, "token_budget": 30, "patience": 0, "learning_rate": 0.03}


def everything(fitted):
    return {name: value.detach() for name, value in fitted.guide.named_parameters()} | fitted.model.state()


@MEMBERS
@pytest.mark.parametrize("guide", [map_guide, normal_guide])
def test_a_toy_member_is_fitted_and_gives_adapters(member, guide):
    model = model_with(member)
    batch = tiny_batch()
    start = {name: value.expand(TASKS, *value.shape) for name, value in model.starts.items()}
    torch.testing.assert_close(model.logits(batch, start), model.logits(batch, None))
    fitted = fit(model, tiny_data(), guide=guide(model), **OPTIONS)
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
    theta, mean = fitted.weights()
    assert theta.keys() == mean.keys() == model.starts.keys()
    assert all(value.isfinite().all() for value in theta.values())
    assert fitted.evaluate(tiny_data().test)["test_perplexity"] > 0
    assert fitted.deviation_norms().shape == (TASKS,)


@MEMBERS
def test_a_fit_of_a_toy_member_goes_on_where_it_was_stopped(member, tmp_path):
    whole = fit(model_with(member), tiny_data(), **OPTIONS)
    asked = []
    with pytest.raises(FitStopped):
        fit(model_with(member), tiny_data(), checkpoints=tmp_path, stop=lambda: asked.append(1) or len(asked) == 4, **OPTIONS)
    resumed = fit(model_with(member), tiny_data(), checkpoints=tmp_path, **OPTIONS)
    assert len(resumed.history) == 3
    for name, value in everything(whole).items():
        assert torch.equal(value, everything(resumed)[name]), name


def test_a_mask_that_changes_during_a_fit():
    model = model_with("adapter")
    assert all(mask.tolist() == [[True, False, False, False]] * 2 for mask in model.tensors.masks.values())
    fitted = fit(model, tiny_data(), **OPTIONS)
    kept = fitted.best_epoch
    for name, mask in model.tensors.masks.items():
        active = 1 + kept
        assert mask.sum(-1).tolist() == [active, active]
        theta, _ = fitted.weights()
        assert not theta[name][..., active:].any()  # inactive entries have stayed at the start
        assert theta[name][..., :active].any()


def test_a_guide_learns_no_scale_of_an_inactive_entry():
    model = model_with("adapter")
    guide = normal_guide(model)
    fit(model, tiny_data(), guide=guide, callbacks=[], **OPTIONS)
    before = normal_guide(model)
    with torch.no_grad():
        before(tiny_batch())
    own = dict(before.named_parameters())
    moved = [name for name, value in guide.named_parameters() if not torch.equal(value[..., 0], own[name][..., 0])]
    assert len(moved) == len(own)
    assert all(torch.equal(value[..., 1:], own[name][..., 1:]) for name, value in guide.named_parameters())
    with pytest.raises(InputError, match="guide low_rank cannot leave out the entries that Spectral"):
        low_rank_guide(model)


def model_by_rank():
    """LoRA whose tasks have 1, 2 and 3 ranks."""

    class ByRank(LoRA):
        """LoRA with 1, 2 and 3 ranks for the three tasks."""

        def start(self, slot, weight, generator):
            start = super().start(slot, weight, generator)
            active = torch.arange(3) < torch.tensor([[1], [2], [3]])  # (D, r)
            start.masks.update({"lora_A": active[:, :, None], "lora_B": active[:, None, :]})
            return start

    return BoRA(tiny_backbone("llama"), TASKS, adapter=ByRank(rank=3), prior=HierarchicalNormal(10))


def test_tasks_with_ranks_of_their_own(tmp_path):
    model = model_by_rank()
    weights = random_weights(model)
    cut = {name: value.clone() for name, value in weights.items()}
    for name, value in cut.items():
        for d in range(TASKS):
            (value[d, :, d + 1 :] if name.endswith("_A") else value[d, :, :, d + 1 :]).zero_()
    plain = BoRA(model.backbone, TASKS, adapter=LoRA(rank=3))
    batch = tiny_batch()
    assert torch.equal(model.logits(batch, weights), plain.logits(batch, cut))
    trace = poutine.trace(poutine.condition(model.weights, data=model.sites_given(weights, model.starts))).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["theta.q_proj.lora_A_decentered"]
    of_task = [torch.distributions.Normal(0, 1).log_prob(site["value"][d][:, : d + 1]).sum() for d in range(TASKS)]
    torch.testing.assert_close(site["log_prob"], torch.stack(of_task))
    fitted = fit(model, tiny_data(), **OPTIONS)
    theta, _ = fitted.weights()
    save_peft(tmp_path / "b", model, {name: value[1] for name, value in theta.items()}, task=1)
    with safe_open(tmp_path / "b" / "adapter_model.safetensors", framework="pt") as file:
        keys = [key for key in file.keys() if "lora_A" in key]  # noqa: SIM118 (a file is no mapping)
        assert keys
        assert all(not file.get_tensor(key)[2:].any() and file.get_tensor(key)[:2].any() for key in keys)


@pytest.mark.parametrize("member", ["adapter", "wrapper"])
def test_a_change_without_a_lora_form_is_exported_cut_to_a_rank(member, tmp_path):
    model = model_with(member)
    for mask in model.tensors.masks.values():
        mask[:] = True
    weights = {name: value[1] for name, value in random_weights(model).items()}
    assert save_peft(tmp_path / "whole", model, weights) < 1e-5
    peft, ids = loaded_peft(tiny_model("llama"), tmp_path / "whole"), random_ids()
    ours = model.backbone.logits(ids, model.change({n: v[None] for n, v in weights.items()}, torch.tensor([0, 0, 0])))
    torch.testing.assert_close(peft(input_ids=ids).logits, ours, atol=1e-4, rtol=1e-4)
    error = save_peft(tmp_path / "cut", model, weights, rank=1)
    assert 0.05 < error < 1
    assert json.loads((tmp_path / "cut" / "adapter_config.json").read_text())["r"] == 1
    with safe_open(tmp_path / "cut" / "adapter_model.safetensors", framework="pt") as file:
        assert float(file.metadata()["relative_error"]) == pytest.approx(error, rel=1e-4)


def test_a_routed_model_says_that_it_cannot_be_exported(tmp_path):
    model = model_with("router")
    with pytest.raises(InputError, match=r"adapters cannot be exported from TokenMixture\(3\): which of them is used depends"):
        lora_form(model, model.starts)
    with pytest.raises(InputError, match="reads a token by all tasks; use one process"):
        fit(model, tiny_data(), task_subsampling=True)


def test_a_router_counts_in_its_buffer():
    model = model_with("router")
    fitted = fit(model, tiny_data(), **OPTIONS)
    tokens = sum(batch.input_ids.numel() for batch in tiny_data().train.batches(token_budget=30, seed=0))
    if fitted.best_epoch:
        for counts in model.tensors.buffers.values():
            assert counts.sum(-1).min() > 0.5 * tokens * fitted.best_epoch


def test_new_tasks_keep_the_masks_of_the_fit():
    fitted = fit(model_with("adapter"), tiny_data(), **OPTIONS)
    before = fitted.model.state()
    data = tiny_data((2, 1))
    adapted = adapt(fitted, replace(data, validation=data.train.subset(torch.arange(0))), steps=3)
    after = fitted.model.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    theta, mean = adapted.weights()
    for name, mask in adapted.model.tensors.masks.items():
        inactive = ~mask.expand_as(theta[name][0])
        assert not theta[name][:, inactive].any()
        assert not torch.equal(theta[name][0], mean[name])


def test_a_new_task_has_the_largest_rank_of_the_others():
    fitted = fit(model_by_rank(), tiny_data(), **OPTIONS)
    adapted = adapt(fitted, tiny_data((2, 1)), steps=2)
    assert not adapted.model.tensors.masks  # all entries are active
    assert fitted.model.tensors.masks["q_proj.lora_A"].shape[:2] == (TASKS, 2)


def test_what_asks_for_single_tasks_refuses_a_router_that_reads_all():
    fitted = fit(model_with("router"), tiny_data(), **OPTIONS)
    with pytest.raises(InputError, match=r"TokenMixture\(3\) reads a token by the adapters of the fit's own tasks"):
        adapt(fitted, tiny_data((2, 1)), steps=2)
    theta, _ = fitted.weights()
    with pytest.raises(InputError, match="by the adapters of all 3 tasks, and those of 1 are given"):
        fitted.model.change({name: value[:1] for name, value in theta.items()}, torch.tensor([0]))
    with pytest.raises(InputError, match="give a router by task"):
        document_gradients(fitted.model, theta, tiny_batch())


def test_a_checkpoint_of_a_model_with_other_buffers_is_refused(tmp_path):
    fit(model_with("adapter"), tiny_data(), checkpoints=tmp_path, **OPTIONS)
    other = model_with("adapter")
    other.tensors.masks.popitem()
    with pytest.raises(InputError, match="is of another model"):
        fit(other, tiny_data(), checkpoints=tmp_path, callbacks=[], **OPTIONS)

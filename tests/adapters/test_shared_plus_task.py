"""The shared pair plus the task's own: one change of rank 2r, a shared part that is one for all tasks, and its export."""

from __future__ import annotations

import json
import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from bora_pyro import HierarchicalNormal, Independent, LearnedPrecision, LoRA, Pooled, fit, map_guide, save_peft
from bora_pyro.adapters import SharedPlusTaskLoRA
from bora_pyro.backbone.slots import Slot
from bora_pyro.priors import HierarchicalNorm, with_shared
from bora_pyro.runs.fitting import _newest_tau
from bora_pyro.runs.saved import load_run
from tests.tiny import TASKS, loaded_peft, of_task, random_ids, random_weights, tiny_batch, tiny_bora, tiny_data, tiny_model
from tests.tiny_base import command_main, line, quick_fit

SLOT = Slot("q_proj", ("a.q_proj",), 16, 24)
PRIORS = [HierarchicalNormal(tau=10), HierarchicalNorm(tau=10, form="centered"), Independent(), Pooled()]
EVERY_PRIOR = pytest.mark.parametrize("prior", PRIORS, ids=repr)


def shared_bora(prior, architecture="opt", **options):
    adapter = SharedPlusTaskLoRA(rank=2, alpha=3.0)
    return tiny_bora(architecture, adapter=adapter, prior=with_shared(prior, adapter.shared), **options)


def site_of(parameter):
    """The sample site of one of AutoDelta's parameters."""
    return parameter.removesuffix("_unconstrained")


def test_the_change_is_the_sum_of_the_changes_of_two_loras():
    both, one, generator = SharedPlusTaskLoRA(rank=2, alpha=3.0), LoRA(rank=2, alpha=3.0), torch.Generator().manual_seed(0)
    start = both.start(SLOT, None, generator).latents
    tensors = {name: torch.randn((5, *value.shape), generator=generator) for name, value in start.items()}
    x, output = torch.randn((5, 7, 16), generator=generator), torch.randn((5, 7, 24), generator=generator)
    shared = {"lora_A": tensors["shared_A"], "lora_B": tensors["shared_B"]}
    expected = one.output(x, shared) + one.output(x, tensors)
    torch.testing.assert_close(both.output(x, tensors), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both.add(output, x, tensors), output + expected, atol=1e-5, rtol=1e-5)


def test_the_two_pairs_start_as_lora_does_and_apart():
    model, lora = shared_bora(Independent()), tiny_bora()
    for slot in model.backbone.slots:
        of = {name: model.starts[f"{slot.name}.{name}"] for name in ("shared_A", "shared_B", "lora_A", "lora_B")}
        bound = slot.in_features**-0.5
        assert of["shared_A"].shape == of["lora_A"].shape == lora.starts[f"{slot.name}.lora_A"].shape
        assert all(value.abs().max() <= bound and value.std() > 0.4 * bound for value in (of["shared_A"], of["lora_A"]))
        assert not (of["shared_A"] == of["lora_A"]).any()
        assert of["shared_B"].count_nonzero() == of["lora_B"].count_nonzero() == 0


@EVERY_PRIOR
def test_number_of_parameters(prior):
    model = shared_bora(prior, "llama", targets="all-linear")
    guide, batch = map_guide(model), tiny_batch()
    TraceMeanField_ELBO().differentiable_loss(model, guide, batch).backward()
    one = sum(value.numel() for name, value in model.starts.items() if ".shared_" in name)
    copies = TASKS if isinstance(prior, Independent) else 1 if isinstance(prior, Pooled) else TASKS + 1
    assert sum(p.numel() for p in guide.parameters()) == one + copies * one
    shared = {name: p for name, p in guide.named_parameters() if ".shared_" in name}
    assert set(guide.median()) & set(map(site_of, shared)) == {f"prior_mean.{n}" for n in model.starts if ".shared_" in n}
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in guide.parameters())
    # at the start B is 0, so that B has a gradient and A has none
    assert all((p.grad.abs().sum() > 0) == site_of(name).endswith("_B") for name, p in shared.items())


@EVERY_PRIOR
def test_stock_svi_lowers_the_loss(prior):
    model, batch = shared_bora(prior), tiny_batch()
    svi = SVI(model, map_guide(model), pyro.optim.AdamW({"lr": 1e-2, "weight_decay": 0.0}), Trace_ELBO())
    with poutine.seed(rng_seed=0):
        losses = [svi.step(batch) for _ in range(12)]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - 5  # nats


def test_a_fit_shares_the_shared_pair_and_nothing_else():
    model = shared_bora(HierarchicalNormal(tau=10))
    fitted = fit(model, tiny_data(), epochs=3, learning_rate=0.03, token_budget=16, patience=0)
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
    theta, mean = fitted.weights()
    for name, value in theta.items():
        assert torch.equal(value[0], value[1]) == (".shared_" in name)
        assert not torch.equal(mean[name], model.starts[name])
    own = torch.stack([(theta[n] - mean[n]).flatten(1).square().sum(1) for n in theta if ".lora_" in n]).sum(0).sqrt()
    torch.testing.assert_close(fitted.deviation_norms(), own)


def test_tau_is_that_of_what_tasks_have_of_their_own():
    model = shared_bora(LearnedPrecision(start=10.0, every=1))
    fitted = fit(model, tiny_data(), epochs=2, learning_rate=0.03, token_budget=16, patience=0)
    by_group = fitted.tau_by_group()
    own = {name: tau for name, tau in by_group.items() if ".lora_" in name}
    assert {tau for name, tau in by_group.items() if name not in own} == {math.inf}
    sizes = {name: model.starts[name].numel() for name in own}
    variance = sum(sizes[name] / tau for name, tau in own.items()) / sum(sizes.values())
    assert fitted.tau() == pytest.approx(1 / variance, rel=1e-5)
    path = [point["tau"] for epoch in fitted.history for point in epoch["tau_path"]]
    assert all(point.keys() == own.keys() for point in path)
    # the kept state's, and that of its epoch as it is printed: which epoch is kept depends on the processor
    assert fitted.best_epoch
    assert _newest_tau(model, fitted.history[fitted.best_epoch - 1]) == pytest.approx(fitted.tau(), rel=1e-5)
    assert fit(shared_bora(Pooled()), tiny_data(), epochs=1).tau() == math.inf


def test_a_learned_tau_and_a_posterior_around_it_by_the_commands(tmp_path, capsys):
    options = quick_fit(tmp_path) | {"adapter": "lora_shared_plus_task", "epochs": 1, "output_dir": tmp_path / "run"}
    assert command_main()(line(options)) == 0
    tau = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))["tau"]
    assert f"learned τ: {float(format(tau, '.3g')):g} (harmonic mean" in capsys.readouterr().out
    words = [str(tmp_path / "run"), *line({"epochs": 1, "draws": 2, "output_dir": tmp_path / "posterior"})]
    assert command_main("posterior-fit")(words) == 0
    assert load_run(tmp_path / "posterior").fitted.tau() == pytest.approx(tau, rel=1e-5)


@pytest.mark.parametrize("architecture", ["opt-350m", "gpt2"])
@pytest.mark.parametrize("alpha", [None, 3.0, 2.5])
def test_it_leaves_as_a_peft_folder_of_twice_the_rank(architecture, alpha, tmp_path):
    model = tiny_bora(architecture, adapter=SharedPlusTaskLoRA(rank=2, alpha=alpha))
    weights, input_ids = random_weights(model), random_ids()
    save_peft(tmp_path, model, of_task(weights, 1))
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (4, 2 * (alpha or 2))
    peft = loaded_peft(tiny_model(architecture), tmp_path)
    expected = model.backbone.logits(input_ids, model.change(weights, torch.tensor([1, 1, 1])))
    torch.testing.assert_close(peft(input_ids=input_ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rank", "alpha"), [(3, 0.1), (7, 0.7), (6, 16.0)])
def test_the_alpha_of_plain_lora_is_written_to_the_last_bit(rank, alpha, tmp_path):
    model = tiny_bora(adapter=LoRA(rank=rank, alpha=alpha))
    save_peft(tmp_path, model, model.starts)
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["lora_alpha"] == alpha

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

from bora_pyro import Adapter, BoRA, HierarchicalNormal, Independent, InputError, Pooled, fit, map_guide, save_peft
from bora_pyro.adapters import ADAPTERS
from bora_pyro.backbone.layer_tensors import Start
from bora_pyro.backbone.slots import Slot
from tests.tiny import TASKS, random_ids, random_weights, tiny_adapter, tiny_backbone, tiny_batch, tiny_bora, tiny_data

EVERY_ADAPTER = pytest.mark.parametrize("name", ADAPTERS)
#: Those that start without random numbers.
NOT_RANDOM = {"sara", "soka"}
SLOT = Slot("q_proj", ("a.q_proj", "b.q_proj"), 16, 24)
#: Adapters whose change is a product of two matrices, and those of them whose latents are these matrices.
LOW_RANK = ("lora", "lora_frozen_a", "lora_shared_plus_task", "mtlora", "nola")
MATRICES = LOW_RANK[:4]


def start_of(adapter, slot=SLOT, *, seed=0):
    """The tensors of one layer as the adapter begins."""
    weight = torch.randn((slot.out_features, slot.in_features), generator=torch.Generator().manual_seed(0))
    return adapter.start(slot, lambda: weight, torch.Generator().manual_seed(seed))


def draw(tensors, generator, *, rows=()):
    return {name: torch.randn((*rows, *value.shape), generator=generator) for name, value in tensors.items()}


def guide_with_gradient(model):
    """The MAP guide at its start, after one backward pass, and its loss."""
    guide, batch = map_guide(model), tiny_batch()
    loss = TraceMeanField_ELBO().differentiable_loss(model, guide, batch)
    loss.backward()
    return guide, loss


@pytest.mark.parametrize("architecture", ["opt-350m", "gpt2", "llama"])
@EVERY_ADAPTER
def test_an_adapter_starts_as_nothing_with_a_gradient(name, architecture):
    """Every adapter: ΔW = 0 at the start, a gradient that is not zero everywhere, exactly the declared latents trained."""
    model = tiny_bora(architecture, targets="all-linear", adapter=tiny_adapter(name, alpha=3.0))
    guide, _ = guide_with_gradient(model)

    theta, mean = model.weights_given(guide.median())
    batch = tiny_batch()
    assert torch.equal(model.logits(batch, theta), model.logits(batch, None))
    for key, start in model.starts.items():
        assert torch.equal(theta[key], start.expand(TASKS, *start.shape))  # all tasks share the start
        assert torch.equal(mean[key], start)

    assert any(p.grad.abs().sum() > 0 for p in guide.parameters())
    assert all(p.grad is not None for p in guide.parameters())
    assert not any(value.requires_grad for value in model.fixed.values())
    latents = {f"{slot.name}.{latent}" for slot in model.backbone.slots for latent in start_of(model.adapter, slot).latents}
    assert set(model.starts) == latents == set(theta)
    assert not set(model.fixed) & latents


@pytest.mark.parametrize(
    ("prior", "copies"), [(HierarchicalNormal(), TASKS + 1), (Independent(), TASKS), (Pooled(), 1)], ids=repr
)
@EVERY_ADAPTER
def test_exactly_the_declared_latents_are_trained(name, prior, copies):
    model = tiny_bora("llama", targets="all-linear", adapter=tiny_adapter(name), prior=prior)
    guide, _ = guide_with_gradient(model)
    declared = sum(
        slot.layers * value.numel() for slot in model.backbone.slots for value in start_of(model.adapter, slot).latents.values()
    )
    assert sum(p.numel() for p in guide.parameters()) == copies * declared


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("lora", 2 * (16 + 24)),
        ("lora_frozen_a", 2 * 24),
        ("lora_shared_plus_task", 4 * (16 + 24)),
        ("mtlora", 4 * (16 + 24)),
        ("nola", 2 * 256),
        ("soka", 2 * (1 + 16 + 24)),
    ],
)
def test_number_of_latents_a_layer(name, entries):
    assert sum(value.numel() for value in start_of(tiny_adapter(name)).latents.values()) == entries


@EVERY_ADAPTER
def test_fixed_tensors_stay_where_they_are_during_a_fit(name):
    model = tiny_bora(adapter=tiny_adapter(name))
    before = {key: value.clone() for key, value in model.fixed.items()}
    fit(model, tiny_data(), epochs=1)
    torch.testing.assert_close(model.fixed, before, atol=0, rtol=0)
    assert all(value.grad is None for value in model.fixed.values())


def test_a_frozen_a_is_where_lora_starts():
    lora, frozen = tiny_bora(adapter=ADAPTERS["lora"](rank=2)), tiny_bora(adapter=ADAPTERS["lora_frozen_a"](rank=2))
    assert set(frozen.fixed) == {key for key in lora.starts if key.endswith("lora_A")}
    bound = 1 / math.sqrt(32)
    assert all(value.abs().max() <= bound and value.std() > 0.4 * bound for value in frozen.fixed.values())


@pytest.mark.parametrize("name", LOW_RANK)
def test_lora_matrices_give_the_same_change(name):
    rank = {"lora_shared_plus_task": 4, "mtlora": 4}.get(name, 2)  # two pairs of rank 2 are one of rank 4
    adapter, generator = tiny_adapter(name, alpha=3.0), torch.Generator().manual_seed(0)
    latents, fixed = draw(start_of(adapter).latents, generator, rows=(5,)), start_of(adapter).fixed
    x = torch.randn((5, 7, 16), generator=generator)
    change = adapter.output(x, latents | fixed)
    for row in range(5):
        tensors = {key: value[row] for key, value in latents.items()} | fixed
        factors = adapter.factors(tensors)
        assert (factors.lora_A.shape, factors.lora_B.shape) == ((rank, 16), (24, rank))
        delta = 3.0 / 2 * factors.lora_B @ factors.lora_A  # ΔW = (α/r) B A: (out, in)
        torch.testing.assert_close(change[row], x[row] @ delta.T, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(adapter.delta(tensors), delta)
        assert factors.scaling == adapter.scaling
        if name not in MATRICES:
            with pytest.raises(InputError, match="LoRA matrices cannot be read as "):
                adapter.from_factors(factors, fixed)
            continue
        back = adapter.from_factors(factors, fixed)
        assert all(torch.equal(value, latents[key][row]) for key, value in back.items())
        assert back.keys() == latents.keys()


@EVERY_ADAPTER
def test_the_change_is_in_the_precision_of_the_layer(name):
    adapter, generator = tiny_adapter(name), torch.Generator().manual_seed(0)
    tensors = draw(start_of(adapter).latents, generator, rows=(5,)) | start_of(adapter).fixed
    assert adapter.output(torch.ones(5, 7, 16, dtype=torch.bfloat16), tensors).dtype == torch.bfloat16


@pytest.mark.parametrize("name", MATRICES)
def test_scaling_is_alpha_over_rank(name):
    adapter = ADAPTERS[name]
    assert (adapter(rank=4).alpha, adapter(rank=4).scaling) == (4.0, 1.0)
    assert adapter(rank=4, alpha=2).scaling == 0.5
    generator = torch.Generator().manual_seed(0)
    tensors = draw(start_of(adapter(4)).latents, generator, rows=(2,)) | draw(start_of(adapter(4)).fixed, generator)
    x = torch.randn((2, 3, 16), generator=generator)
    torch.testing.assert_close(adapter(4, alpha=2).output(x, tensors), 0.5 * adapter(4).output(x, tensors))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; give a whole number from 1 up"),
        ({"rank": -3}, "rank is -3; give a whole number from 1 up"),
        ({"rank": 4, "alpha": 0.0}, r"alpha 0.0 is not allowed.*the rank \(4\)"),
        ({"alpha": -1.0}, "alpha -1.0 is not allowed"),
        ({"alpha": math.nan}, "alpha nan is not allowed"),
        ({"alpha": math.inf}, "alpha inf is not allowed"),
    ],
)
@pytest.mark.parametrize("name", MATRICES)
def test_bad_rank_and_alpha(name, options, message):
    with pytest.raises(InputError, match=message):
        ADAPTERS[name](**options)


@EVERY_ADAPTER
def test_the_seed_decides_the_start(name):
    backbone = tiny_backbone(targets="all-linear")
    one, same, other = (BoRA(backbone, TASKS, adapter=tiny_adapter(name), seed=seed) for seed in (1, 1, 2))
    state = torch.random.get_rng_state()
    for store in ("starts", "fixed"):
        torch.testing.assert_close(getattr(one, store), getattr(same, store), atol=0, rtol=0)
    differs = any(not torch.equal(value, (other.starts | other.fixed)[key]) for key, value in (one.starts | one.fixed).items())
    assert differs == (name not in NOT_RANDOM)
    assert torch.equal(torch.random.get_rng_state(), state)  # no global generator is touched


def test_a_starts_uniform_as_in_peft():
    in_features = 4096
    slot = Slot("q_proj", ("q_proj",), in_features, 8)
    start = start_of(ADAPTERS["lora"](rank=16), slot).latents["lora_A"]
    bound = 1 / math.sqrt(in_features)
    reference = torch.nn.init.kaiming_uniform_(
        torch.empty(16, in_features), a=math.sqrt(5), generator=torch.Generator().manual_seed(0)
    )
    for a in (start, reference):
        assert a.abs().max() <= bound
        assert a.abs().max() > 0.999 * bound
        torch.testing.assert_close(a.std(), torch.tensor(bound / math.sqrt(3)), rtol=0.01, atol=0)
        assert a.mean().abs() < 0.01 * bound


def test_layers_start_differently():
    model = tiny_bora()
    assert all(not torch.equal(value[0], value[1]) for key, value in model.starts.items() if key.endswith("lora_A"))


@dataclass(frozen=True)
class Bias(Adapter):
    """A third member of the axis, known to the library by nothing but its base class: a bias on each output."""

    def start(self, slot, weight, generator):
        return Start({"bias": torch.zeros(slot.out_features)})

    def output(self, x, tensors):
        return tensors["bias"].to(x.dtype)[:, None, :].expand(*x.shape[:-1], -1)


def test_a_new_adapter_needs_no_change_of_the_library():
    model = tiny_bora("opt", targets=["q_proj", "fc1"], adapter=Bias(), prior=HierarchicalNormal(tau=10))
    # a bias on the output is a bias of the layer
    weights = random_weights(model)
    input_ids = random_ids(1)
    changed = model.backbone.logits(input_ids, model.change(weights, torch.tensor([2])))
    base = model.backbone.model
    state = {name: value.clone() for name, value in base.state_dict().items()}
    for slot in model.backbone.slots:
        for layer, path in enumerate(slot.paths):
            base.get_submodule(path).bias += weights[f"{slot.name}.bias"][2, layer]
    torch.testing.assert_close(changed, base(input_ids=input_ids).logits, atol=1e-5, rtol=1e-5)
    base.load_state_dict(state)

    fitted = fit(model, tiny_data(), epochs=5, patience=0)
    assert sum(p.numel() for p in fitted.guide.parameters()) == (TASKS + 1) * 2 * (32 + 48)
    losses = [entry["loss"] for entry in fitted.history]
    assert losses[-1] < losses[0]
    assert fitted.deviation_norms().shape == (TASKS,)


def test_an_adapter_without_a_lora_form_says_so(tmp_path):
    model = tiny_bora(adapter=Bias())
    with pytest.raises(InputError, match=r"Bias\(\) cannot be written as LoRA matrices"):
        save_peft(tmp_path, model, model.starts)
    assert not list(tmp_path.iterdir())

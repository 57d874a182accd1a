"""OSFT: the preserved directions stay untouched by construction, whatever the inner adapter, the optimiser and the draw."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft.tuners.osf.utils import decompose_weight_matrix, project_gradient_to_orthogonal_space

from bora_pyro import Backbone, BoRA, HierarchicalNormal, InputError, LoRA, fit, load_peft, normal_guide, save_peft
from bora_pyro.adapters import OSFT, SaRA
from bora_pyro.adapters.base import Factors
from bora_pyro.adapters.osft import layer_importance
from bora_pyro.backbone.slots import Slot
from tests.tiny import TASKS, of_task, random_ids, random_weights, tiny_backbone, tiny_bora, tiny_data, tiny_split

SLOT = Slot("q_proj", ("a.q_proj",), 16, 24)
INNER = ["lora", "lora_frozen_a", "lora_shared_plus_task", "mtlora", "sara", "triadapt"]
EVERY_INNER = pytest.mark.parametrize("inner", INNER)
FIT = {"epochs": 3, "learning_rate": 0.03, "token_budget": 16, "patience": 0}


def weight_of(slot=SLOT, *, seed=0):
    return torch.randn((slot.out_features, slot.in_features), generator=torch.Generator().manual_seed(seed))


def training_only():
    """Without validation documents the last state is kept."""
    data = tiny_data()
    return replace(data, validation=data.validation.subset(torch.arange(0)))


def draw(adapter, *, rows=(), weight=weight_of):
    """The tensors of a layer, with random latents."""
    generator = torch.Generator().manual_seed(0)
    start = adapter.start(SLOT, weight, generator)
    latents = {name: torch.randn((*rows, *value.shape), generator=generator) for name, value in start.latents.items()}
    return latents | start.fixed | start.buffers


@EVERY_INNER
def test_the_change_avoids_the_leading_directions(inner):
    adapter = OSFT(preserve=0.25, inner=inner, rank=2)
    tensors, left, values, right = draw(adapter), *torch.linalg.svd(weight_of(), full_matrices=False)
    delta = adapter.delta(tensors)
    assert (left[:, :4].T @ delta).abs().max() < 1e-5 * delta.norm()
    assert (delta @ right[:4].T).abs().max() < 1e-5 * delta.norm()
    inside = adapter.wrapped.delta(tensors)
    expected = (torch.eye(24) - left[:, :4] @ left[:, :4].T) @ inside @ (torch.eye(16) - right[:4].T @ right[:4])
    torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-4)
    # the leading triplets of the weight stay, while the change is smaller than they are
    small = weight_of() + delta * (0.5 * values[3] / torch.linalg.matrix_norm(delta, 2))
    found, new, _ = torch.linalg.svd(small, full_matrices=False)
    shared = torch.isclose(new[:, None], values[:4], rtol=1e-4).any(0)
    assert shared.all()
    assert torch.linalg.svdvals(found.T @ left[:, :4]).min() > 1 - 1e-4


@EVERY_INNER
def test_the_output_is_that_of_the_change(inner):
    adapter = OSFT(preserve=0.25, inner=inner, rank=2, alpha=3.0)
    tensors, x = draw(adapter, rows=(3,)), torch.randn((3, 5, 16), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(adapter.output(x, tensors), x @ adapter.delta(tensors).mT, atol=1e-4, rtol=1e-4)
    factors = adapter.factors(tensors)
    assert (factors is None) == (inner == "sara")
    if factors is not None:
        torch.testing.assert_close(factors.delta(), adapter.delta(tensors), atol=1e-4, rtol=1e-4)


@EVERY_INNER
def test_nothing_preserved_is_the_inner_adapter_and_all_is_no_change(inner):
    none, every = (OSFT(preserve=preserve, inner=inner, rank=2) for preserve in (0.0, 1.0))
    x = torch.randn((3, 5, 16), generator=torch.Generator().manual_seed(1))
    tensors = draw(none, rows=(3,))
    torch.testing.assert_close(none.output(x, tensors), none.wrapped.output(x, tensors))
    tensors = draw(every, rows=(3,))
    assert every.output(x, tensors).abs().max() < 1e-4 * every.wrapped.output(x, tensors).abs().max()


def test_the_directions_are_those_of_peft_and_adamw_leaves_the_space_of_hooked_gradients():
    """PEFT projects gradients. After steps of AdamW its change is not orthogonal any more, and ours is."""
    weight, k = weight_of(), 8
    parts = decompose_weight_matrix(weight, k)
    tensors = draw(OSFT(preserve=0.5, rank=2))
    torch.testing.assert_close(tensors["osft_left"].T @ tensors["osft_left"], parts["U_high"] @ parts["U_high"].T)
    torch.testing.assert_close(tensors["osft_right"].T @ tensors["osft_right"], parts["V_high"].T @ parts["V_high"])
    target, low = weight_of(seed=1), [parts["U_low"], parts["S_low"], parts["V_low"]]
    optimizer = torch.optim.AdamW(low, lr=1e-2, weight_decay=0.0)

    def hooked():
        return parts["U_low"] * parts["S_low"] @ parts["V_low"]

    before = hooked().detach()
    for _ in range(100):
        optimizer.zero_grad()
        (hooked() - target).square().sum().backward()
        project_gradient_to_orthogonal_space(parts)
        optimizer.step()
    change = (hooked() - before).detach()
    assert (parts["U_high"].T @ change).norm() > 0.05 * change.norm()

    adapter = OSFT(preserve=0.5, rank=2)
    start = adapter.start(SLOT, weight_of, torch.Generator().manual_seed(0))
    latents = {name: value.clone().requires_grad_() for name, value in start.latents.items()}
    optimizer = torch.optim.AdamW(latents.values(), lr=1e-2, weight_decay=0.0)
    for _ in range(100):
        optimizer.zero_grad()
        (adapter.delta(latents | start.fixed) - target).square().sum().backward()
        optimizer.step()
    change = adapter.delta(latents | start.fixed).detach()
    assert change.norm() > 1
    assert (parts["U_high"].T @ change).norm() < 1e-5
    assert (change @ parts["V_high"].T).norm() < 1e-5


@pytest.mark.parametrize("k", [4, 16])
def test_soft_scales_along_each_direction(k):
    left, values, right = torch.linalg.svd(weight_of(), full_matrices=False)
    adapter, hard = (OSFT(preserve=k / 16, soft=soft, rank=2) for soft in (True, False))
    tensors = draw(adapter)
    inside, delta = adapter.wrapped.delta(tensors), adapter.delta(tensors)
    after = values[k] if k < 16 else torch.tensor(0.0)
    scale = torch.cat([after / values[:k], torch.ones(16 - k)])
    torch.testing.assert_close(
        left.T @ delta @ right.T, scale[:, None] * (left.T @ inside @ right.T) * scale, atol=1e-4, rtol=1e-4
    )
    if k == 16:
        torch.testing.assert_close(delta, hard.delta(draw(hard)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guide", [None, normal_guide])
def test_a_fit_touches_no_preserved_direction(guide):
    model = tiny_bora("llama", targets=["q_proj", "down_proj"], adapter=OSFT(rank=2), prior=HierarchicalNormal(tau=10))
    fitted = fit(model, training_only(), guide=guide and guide(model), **FIT)
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
    theta, _ = fitted.weights()
    for slot in model.backbone.slots:
        for layer in range(slot.layers):
            left, values, right = torch.linalg.svd(model.backbone.weight(slot, layer), full_matrices=False)
            tensors = model.tensors.at_layer(
                slot, layer, {name: theta[f"{slot.name}.{name}"][:, layer] for name in model.tensors.names(slot)}
            )
            delta, k = model.adapter.delta(tensors), len(values) // 2
            assert (left[:, :k].T @ delta).abs().max() < 1e-5
            assert (delta @ right[:k].T).abs().max() < 1e-5
            assert delta.abs().max() > 1e-3


def test_the_next_task_starts_from_the_merged_weights():
    """After a merge the layer is that of the fit, and its new leading directions are those of the merged weight."""
    model = tiny_bora("llama", targets="q_proj", adapter=OSFT(preserve=0.25, rank=2))
    weights, ids = random_weights(model), random_ids(1)
    expected = model.backbone.logits(ids, model.change(weights, torch.tensor([1])))
    base = model.backbone.model
    [slot] = model.backbone.slots
    for layer, path in enumerate(slot.paths):
        tensors = model.tensors.at_layer(slot, layer, {n: weights[f"q_proj.{n}"][1, layer] for n in model.tensors.names(slot)})
        base.get_submodule(path).weight.data += model.adapter.delta(tensors)
    after = BoRA(Backbone(base, targets="q_proj"), TASKS, adapter=OSFT(preserve=0.5, rank=2))
    start = {name: value.expand(TASKS, *value.shape) for name, value in after.starts.items()}
    torch.testing.assert_close(after.backbone.logits(ids, after.change(start, torch.tensor([0]))), expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(after.backbone.weight(slot, 0), tiny_backbone("llama").weight(slot, 0))
    merged = torch.linalg.svd(after.backbone.weight(slot, 0)).U[:, :16]
    torch.testing.assert_close(after.fixed["q_proj.osft_left"][0].T @ after.fixed["q_proj.osft_left"][0], merged @ merged.T)


def test_an_export_is_read_back_with_the_same_change(tmp_path):
    model = tiny_bora("llama", targets="q_proj", adapter=OSFT(rank=2, alpha=3.0))
    weights, [slot] = of_task(random_weights(model), 0), model.backbone.slots
    assert save_peft(tmp_path, model, weights) == 0

    def deltas(weights):
        return [
            model.adapter.delta(
                model.tensors.at_layer(slot, n, {name: weights[f"q_proj.{name}"][n] for name in ("lora_A", "lora_B")})
            )
            for n in range(slot.layers)
        ]

    again = load_peft(tmp_path, model)
    torch.testing.assert_close(deltas(again), deltas(weights), atol=1e-5, rtol=1e-4)
    adapter, tensors = OSFT(rank=2), draw(OSFT(rank=2))
    with pytest.raises(InputError, match=r"the A of these matrices changes the directions that OSFT\(.*\) preserves"):
        adapter.from_factors(Factors(tensors["lora_A"], tensors["lora_B"], 2.0), tensors)
    with pytest.raises(InputError, match="LoRA matrices cannot be read as OSFT"):
        OSFT(soft=True).from_factors(Factors(tensors["lora_A"], tensors["lora_B"], 2.0), tensors)


def test_the_maps_of_the_latents_give_their_gradients():
    adapter, tensors = OSFT(preserve=0.25, rank=2, alpha=3.0), draw(OSFT(preserve=0.25, rank=2), rows=(3,))
    latents = {name: tensors[name].requires_grad_() for name in ("lora_A", "lora_B")}
    x, g = (torch.randn((3, 5, n), generator=torch.Generator().manual_seed(n)) for n in (16, 24))
    gradients = torch.autograd.grad((adapter.output(x, tensors) * g).sum(), latents.values())
    for (name, (u, of_output)), gradient in zip(adapter.linear_maps(x, g, tensors).items(), gradients, strict=True):
        assert name in latents
        torch.testing.assert_close(of_output.mT @ u, gradient, atol=1e-3, rtol=1e-4)


def test_the_wrapper_has_what_its_inner_adapter_has():
    assert OSFT(inner="lora_shared_plus_task").shared == ("shared_A", "shared_B")
    assert OSFT(inner="sara", inner_options="fraction=0.1, select=random").wrapped == SaRA(fraction=0.1, select="random")
    assert OSFT(inner=LoRA(rank=3)).wrapped == LoRA(rank=3)
    assert OSFT(rank=3, alpha=6.0).wrapped == LoRA(rank=3, alpha=6.0)
    growing = tiny_bora("opt", adapter=OSFT(inner="triadapt", inner_options="growths=2", rank=2))
    fit(growing, training_only(), **FIT)
    ranks = [growing.tensors.masks[f"{slot.name}.lora_A"][..., 0].sum() for slot in growing.backbone.slots]
    assert sum(ranks) == 2 * sum(slot.layers for slot in growing.backbone.slots)


def test_the_preserved_rank_follows_the_importance_of_a_layer():
    backbone = tiny_backbone("llama", targets=["q_proj", "k_proj"])
    found = layer_importance(backbone, tiny_split())
    paths = {slot.name: slot.paths for slot in backbone.slots}
    assert set(found) == {path for of_slot in paths.values() for path in of_slot}
    assert sum(found[path] for path in paths["q_proj"]) / 2 == pytest.approx(1)
    assert all(found[path] == 1 for path in paths["k_proj"])  # 16 x 32
    first, second = paths["q_proj"]
    model = BoRA(backbone, TASKS, adapter=OSFT(importance={first: 0.5, second: 1.5}, rank=2))
    left = model.fixed["q_proj.osft_left"]
    # ⌊32 (0.1 + 0.5 · 0.7)⌋ and all 32; the shorter one is filled up with zeros, which project nothing
    assert left.shape == (2, 32, 32)
    assert [int(of_layer.any(-1).sum()) for of_layer in left] == [14, 32]
    assert model.fixed["k_proj.osft_left"].shape == (2, 12, 16)
    slot = next(slot for slot in backbone.slots if slot.name == "q_proj")
    expected = torch.linalg.svd(backbone.weight(slot, 0)).U[:, :14]
    torch.testing.assert_close(left[0].T @ left[0], expected @ expected.T)


def test_importance_is_the_mean_cosine_of_input_and_output():
    backbone = tiny_backbone("llama", targets="q_proj")
    split, seen = tiny_split((2, 1)), {}

    def change(slot, layer, x, output):
        seen.setdefault(slot.paths[layer], []).append(torch.cosine_similarity(x, output, dim=-1).flatten())
        return output

    for batch in split.batches(token_budget=1):  # a document at a time: no padding
        backbone.logits(batch.input_ids, change)
    means = {path: torch.cat(values).mean().clamp(min=0) for path, values in seen.items()}
    average = sum(means.values()) / len(means)
    expected = {path: float(mean / average) if average else 1.0 for path, mean in means.items()}
    assert layer_importance(backbone, split) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preserve": 1.5}, "preserve is 1.5; give a number from 0 to 1, nearest: 1"),
        ({"preserve": -0.1}, "preserve is -0.1; give a number from 0 to 1, nearest: 0"),
        ({"least": 0.9}, "least is 0.9 and most is 0.8; give least <= most"),
        ({"inner": "osft"}, "inner is 'osft'; allowed: lora, "),
        ({"inner": "lorra"}, "did you mean 'lora'?"),
        ({"inner": "sara", "inner_options": "fractoin=1"}, "inner sara has no option 'fractoin'; did you mean 'fraction'?"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError) as caught:
        OSFT(**options)
    assert message in str(caught.value)


def test_a_fraction_that_preserves_nothing_names_the_layer():
    with pytest.raises(
        InputError, match=r"preserve 0.05 preserves no direction of layer q_proj \(24 x 16\); give at least 0.0625"
    ):
        draw(OSFT(preserve=0.05))

"""SMoRA: its limits are LoRA and a mixture of LoRAs, and its gates are those of the paper."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pyro import poutine
from torch import nn

from bora_pyro import BoRA, HierarchicalNormal, Independent, InputError, LoRA, Pooled, adapt, fit, map_guide, save_peft
from bora_pyro.adapters import OSFT, SMoRA
from bora_pyro.adapters.load_balance import BIAS, LOAD, LoadBalance, next_bias, variation
from bora_pyro.backbone.slots import Slot
from bora_pyro.data.batch import IGNORED
from bora_pyro.diagnostics.deviations import delta_w_norms
from bora_pyro.diagnostics.rank_usage import rank_usage
from bora_pyro.exchange.factors import layer_deltas, lora_form
from bora_pyro.guides import laplace_guide, laplace_kfac_guide, laplace_kronecker_guide, normal_guide
from bora_pyro.guides.curvature import document_gradients
from bora_pyro.guides.matrix_normal import from_columns
from bora_pyro.guides.matrix_sides import matrix_sides
from bora_pyro.inference.elbo import TemperedELBO
from bora_pyro.inference.fit import FitStopped
from bora_pyro.predict.linearised import LinearisedBoRA
from bora_pyro.priors import with_shared
from tests.tiny import TASKS, random_weights, tiny_backbone, tiny_batch, tiny_bora, tiny_data, tiny_split

SLOT = Slot("q_proj", ("a.q_proj",), 16, 24)
FIT = {"epochs": 3, "learning_rate": 0.03, "token_budget": 16, "patience": 0}


def draw(adapter, *, rows=5, seed=0):
    """Random latents, (rows, *shape), and the buffers of the start."""
    generator = torch.Generator().manual_seed(seed)
    start = adapter.start(SLOT, None, generator)
    latents = {name: torch.randn((rows, *value.shape), generator=generator) for name, value in start.latents.items()}
    return latents | start.buffers


def inputs(rows=5, tokens=7, *, seed=1):
    return torch.randn((rows, tokens, 16), generator=torch.Generator().manual_seed(seed))


def training_only(data=None):
    """Without validation documents the last state is kept."""
    data = data or tiny_data()
    return replace(data, validation=data.validation.subset(torch.arange(0)))


def by_hand(adapter, x, tensors, row, token):
    """The change of one token, with p, the choice and the gates written as in the paper."""
    p = torch.sigmoid(tensors["gate"][row] @ x[row, token] + (tensors["task_gate"][row] if adapter.task_gates else 0))
    p = p.repeat_interleave(adapter.partition)
    bias = tensors.get(BIAS, torch.zeros(adapter.experts)).repeat_interleave(adapter.partition)
    chosen = (p + bias).argsort(descending=True, stable=True)[: adapter.k]
    value = p + bias if adapter.bias_in_value else p
    gates = torch.zeros(adapter.rank)
    gates[chosen] = adapter.k * value[chosen] / value[chosen].sum()
    return adapter.alpha / adapter.k * tensors["lora_B"][row] @ (gates * (tensors["lora_A"][row] @ x[row, token]))


@pytest.mark.parametrize(
    "options",
    [{}, {"partition": 2, "active": 4}, {"task_gates": True}, {"bias_in_value": True}, {"balance": 0.0}, {"active": 8}],
    ids=str,
)
@pytest.mark.parametrize("execution", ["dense", "gathered"])
def test_the_change_is_that_of_the_paper(options, execution):
    adapter = SMoRA(rank=8, alpha=3.0, execution=execution, **{"active": 3} | options)
    tensors, x = draw(adapter), inputs()
    if BIAS in tensors:
        tensors[BIAS] = 0.2 * torch.randn(adapter.experts, generator=torch.Generator().manual_seed(2))
    expected = torch.stack([torch.stack([by_hand(adapter, x, tensors, row, token) for token in range(7)]) for row in range(5)])
    torch.testing.assert_close(adapter.output(x, tensors), expected, atol=1e-5, rtol=1e-5)
    chosen, gates = adapter.route(x, tensors)
    assert chosen.shape == (5, 7, adapter.k // adapter.partition)
    assert (gates > 0).all()
    torch.testing.assert_close(gates.sum(-1) * adapter.partition, torch.full((5, 7), float(adapter.k)))
    dense = adapter._by_rank(chosen, gates)
    assert (dense != 0).sum(-1).eq(adapter.k).all()


@pytest.mark.parametrize("options", [{"active": 2}, {"active": 4, "partition": 2}, {"active": 6, "partition": 3}], ids=str)
def test_gathered_and_dense_are_equal_with_their_gradients(options):
    x, found = inputs(), []
    for execution in ("dense", "gathered"):
        adapter = SMoRA(rank=12, execution=execution, **options)
        tensors = draw(adapter)
        leaves = {name: value.requires_grad_() for name, value in tensors.items() if name not in (BIAS, LOAD)}
        own = x.clone().requires_grad_()
        output = adapter.output(own, tensors)
        gradients = torch.autograd.grad(output.square().sum(), [own, *leaves.values()])
        found.append([output.detach(), *gradients])
    for dense, gathered in zip(*found, strict=True):
        torch.testing.assert_close(gathered, dense, atol=1e-3, rtol=1e-4)


def test_all_ranks_with_uniform_gates_are_lora():
    adapter, lora = SMoRA(rank=6, active=6, alpha=3.0), LoRA(rank=6, alpha=3.0)
    tensors, x = draw(adapter), inputs()
    uniform = tensors | {"gate": torch.zeros_like(tensors["gate"])}
    torch.testing.assert_close(adapter.output(x, uniform), lora.output(x, tensors))
    difference = (adapter.output(x, tensors) - lora.output(x, tensors)).abs().max()
    assert difference > 0.1  # not with other gates, although all ranks are active


def test_blocks_of_ranks_are_a_mixture_of_loras():
    """N = 4 LoRAs of rank 2, the two likeliest of them with weights p / Σ p, by a loop over tokens and experts."""
    adapter = SMoRA(rank=8, active=4, partition=2, alpha=6.0)
    tensors, x = draw(adapter), inputs()
    experts = [
        {"lora_A": tensors["lora_A"][:, 2 * n : 2 * n + 2], "lora_B": tensors["lora_B"][:, :, 2 * n : 2 * n + 2]}
        for n in range(4)
    ]
    outputs = [LoRA(rank=2, alpha=6.0).output(x, expert) for expert in experts]
    expected = torch.zeros(5, 7, 24)
    for row in range(5):
        for token in range(7):
            p = torch.sigmoid(tensors["gate"][row] @ x[row, token])
            best = p.topk(2).indices.tolist()
            for n in best:
                expected[row, token] += p[n] / p[best].sum() * outputs[n][row, token]
    torch.testing.assert_close(adapter.output(x, tensors), expected, atol=1e-5, rtol=1e-5)


def test_gradients_reach_only_the_gates_of_chosen_ranks():
    adapter = SMoRA(rank=8, active=2)
    tensors, x = draw(adapter, rows=1), inputs(rows=1, tokens=1)
    tensors["gate"].requires_grad_()
    adapter.output(x, tensors).square().sum().backward()
    chosen, _ = adapter.route(x, tensors)
    moved = (tensors["gate"].grad[0] != 0).any(-1)
    assert sorted(chosen.flatten().tolist()) == moved.nonzero().flatten().tolist()


def test_scores_without_bounds_give_finite_gates():
    """sigmoid underflows to 0 or rounds to 1 there; the gates are still a choice of the largest scores."""
    adapter = SMoRA(rank=4, active=2, balance=0.0)
    tensors = {name: torch.zeros_like(value) for name, value in draw(adapter, rows=1).items()}
    x = torch.zeros(1, 1, 16)
    x[..., 0] = 1.0
    for scores, best in (([-300.0, -200.0, -250.0, -280.0], {1, 2}), ([50.0, 60.0, 70.0, 55.0], {1, 2})):
        tensors["gate"][0, :, 0] = torch.tensor(scores)
        chosen, gates = adapter.route(x, tensors)
        assert {*chosen.flatten().tolist()} == best
        assert gates.isfinite().all()
        assert float(gates.sum()) == pytest.approx(2)


def test_the_bias_chooses_and_does_not_weigh():
    tensors, x = draw(SMoRA(rank=4, active=2), rows=1), inputs(rows=1)
    without, of_paper = SMoRA(rank=4, active=2).route(x, tensors)
    biased = tensors | {BIAS: torch.tensor([5.0, 5.0, 0.0, 0.0])}
    chosen, gates = SMoRA(rank=4, active=2).route(x, biased)
    assert (chosen < 2).all()
    p = torch.sigmoid(x @ tensors["gate"].mT).gather(-1, chosen)
    torch.testing.assert_close(gates, 2 * p / p.sum(-1, keepdim=True))
    # an equal bias of all changes no choice and no value; in the value it does
    equal = tensors | {BIAS: torch.full((4,), 0.5)}
    again, same = SMoRA(rank=4, active=2).route(x, equal)
    assert torch.equal(without.sort(-1).values, again.sort(-1).values)
    torch.testing.assert_close(of_paper.sort(-1).values, same.sort(-1).values)
    _, other = SMoRA(rank=4, active=2, bias_in_value=True).route(x, equal)
    assert not torch.allclose(of_paper.sort(-1).values, other.sort(-1).values, atol=1e-3)


def test_the_load_becomes_equal_on_skewed_inputs():
    """Fixed gates and inputs with a common mean: without a bias a few experts get most tokens; with one all get their share."""
    adapter = SMoRA(rank=8, active=2, balance=0.003)
    tensors = draw(adapter, rows=1)
    tensors["gate"] *= 0.1
    x = inputs(rows=1, tokens=256) + 1.0
    measured = []
    for _ in range(200):
        count = torch.bincount(adapter.route(x, tensors)[0].flatten(), minlength=8)
        measured.append(float(variation(count)))
        tensors[BIAS] = next_bias(tensors[BIAS], count, rate=adapter.balance)
    assert measured[0] > 0.8
    assert measured[-1] < 0.2
    still = SMoRA(rank=8, active=2, balance=0.0)
    assert still.callbacks() == []
    assert BIAS not in still.start(SLOT, None, torch.Generator()).buffers


def test_a_fit_balances_its_load():
    """The gates hardly move at this rate, so that the bias alone changes the load."""
    options = FIT | {"epochs": 12, "learning_rate": 1e-6}
    model = tiny_bora(adapter=SMoRA(rank=8, active=2, balance=0.05), prior=Pooled())
    fitted = fit(model, training_only(), **options)
    loads = [epoch["load_variation"] for epoch in fitted.history]
    assert loads[-1] < 0.6 * loads[0]
    assert all(value.abs().max() > 0.05 for name, value in model.tensors.buffers.items() if name.endswith(BIAS))
    fixed = tiny_bora(adapter=SMoRA(rank=8, active=2, balance=0.0), prior=Pooled())
    start = fit(fixed, training_only(), **options | {"epochs": 1, "learning_rate": 1e-9})
    before = rank_usage(start, tiny_data().train)
    after = rank_usage(fit(fixed, training_only(), **options), tiny_data().train)
    unbalanced = [torch.cat([variation(value.sum(0)) for value in usage.values()]).mean() for usage in (before, after)]
    assert abs(unbalanced[1] / unbalanced[0] - 1) < 0.05
    assert not fixed.tensors.buffers


def test_the_tokens_of_the_steps_are_counted_and_no_others():
    """Not those of validation, of the gradients that teach a prior, or of predictions, and each step's own once."""
    from bora_pyro.priors import LearnedPrecision

    model = tiny_bora(adapter=SMoRA(rank=4, active=2), prior=LearnedPrecision())
    data = tiny_data((6, 4, 8))
    fitted = fit(model, data, epochs=2, token_budget=40, patience=0, learning_rate=0.01)
    if not fitted.best_epoch:
        pytest.fail("the fit never improved, so that the load of no epoch was kept")
    tokens = sum(batch.input_ids.numel() for batch in data.train.batches(token_budget=40, seed=0))
    padded = {name: load for name, load in model.tensors.buffers.items() if name.endswith(LOAD)}
    assert len(padded) == len(model.backbone.slots)
    for load in padded.values():
        assert load.sum(-1).min() == load.sum(-1).max()  # all layers read the same tokens
        assert 2 * int(data.train.lengths.sum()) <= load.sum(-1).min() <= 2 * 1.3 * tokens
    before = {name: value.clone() for name, value in model.tensors.buffers.items()}
    fitted.evaluate(data.test)
    document_gradients(model, fitted.weights()[0], tiny_batch())
    assert all(torch.equal(value, before[name]) for name, value in model.tensors.buffers.items())


def test_the_load_of_a_step_is_that_of_all_processes():
    """Two processes of equal load: each adds the sum of both, and moves its bias by it."""

    class Twice:
        def all_reduce(self, value):
            return value.mul_(2)

    class Loop:
        epoch, processes, report = 0, Twice(), {}

    loop, model = Loop(), tiny_bora(adapter=SMoRA(rank=4, active=2, balance=0.5), targets=["q_proj"])
    loop.model = model
    [hooks] = model.adapter.callbacks()
    load, count = model.tensors.buffers["q_proj.load"], torch.tensor([[3, 1, 0, 0], [1, 1, 1, 1]])
    load += 7  # of an earlier epoch
    for step in range(2):
        hooks.before_passes(loop)
        load += count  # what the passes of this process count
        hooks.before_step(loop)
        assert torch.equal(load, 2 * (step + 1) * count)
    expected = torch.tensor([[-1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(model.tensors.buffers["q_proj.gate_bias"], expected)
    hooks.after_epoch(loop)
    assert loop.report["load_variation"] == pytest.approx(float(variation(count).mean()))


def test_layers_that_are_computed_again_give_the_same_bias():
    """Gradient checkpointing counts the tokens of a layer twice, which changes no sign."""
    biases = []
    for checkpointing in (False, True):
        backbone = tiny_backbone("llama", gradient_checkpointing=checkpointing)
        model = BoRA(backbone, TASKS, adapter=SMoRA(rank=4, active=2, balance=0.01), prior=Pooled())
        fit(model, training_only(), **FIT)
        biases.append({name: value for name, value in model.tensors.buffers.items() if name.endswith(BIAS)})
    assert all(value.any() for value in biases[0].values())
    torch.testing.assert_close(biases[0], biases[1])


def test_layers_on_several_devices_are_refused(monkeypatch):
    model = tiny_bora(adapter=SMoRA(rank=4))
    monkeypatch.setattr(type(model.backbone), "device", torch.device("cuda:0"))
    [hooks] = model.adapter.callbacks()
    assert isinstance(hooks, LoadBalance)
    with pytest.raises(InputError, match=r"on several devices \(.*_proj on cpu, the embedding on cuda:0\); leave device_map"):
        hooks.begin(model, tiny_data())


def test_a_layer_may_have_a_parameter_elsewhere_and_still_be_counted():
    """Weights that wait on the meta device are moved to the device of the pass (offloading)."""
    model = tiny_bora(adapter=SMoRA(rank=4), targets=["q_proj"])
    for path in model.backbone.slots[0].paths:
        layer = model.backbone.model.get_submodule(path)
        layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    model.adapter.callbacks()[0].begin(model, tiny_data())


def test_a_zero_b_is_the_base():
    model, batch = tiny_bora("llama", targets="all-linear", adapter=SMoRA(rank=4, active=2)), tiny_batch()
    weights = {n: torch.zeros_like(v) if n.endswith("lora_B") else v for n, v in random_weights(model).items()}
    assert torch.equal(model.logits(batch, weights), model.logits(batch, None))


def task_gates_model(prior):
    adapter = SMoRA(rank=4, active=2, task_gates=True)
    return tiny_bora(adapter=adapter, prior=with_shared(prior, adapter.shared))


@pytest.mark.parametrize(("prior", "one"), [(Pooled(), True), (HierarchicalNormal(tau=1), False)], ids=repr)
def test_task_gates_under_an_infinite_tau_are_one_routing(prior, one):
    model = task_gates_model(prior)
    fitted = fit(model, training_only(), **FIT | {"epochs": 8})
    theta, _ = fitted.weights()
    same = {name for name, value in theta.items() if torch.equal(value, value[:1].expand_as(value))}
    own = {name for name in theta if name.endswith("task_gate")}
    assert same == (set(theta) if one else set(theta) - own)
    assert all(theta[name].any() for name in own)
    x, slot = torch.randn((TASKS, 50, 32), generator=torch.Generator().manual_seed(0)), model.backbone.slots[0]
    x[1:] = x[0]
    latents = {name: theta[f"{slot.name}.{name}"][:, 0] for name in model.tensors.names(slot)}
    _, gates = model.adapter.route(x, model.tensors.at_layer(slot, 0, latents))
    assert torch.equal(gates[0], gates[1]) == one


@pytest.mark.parametrize(
    ("options", "shared"),
    [
        ({}, ()),
        ({"share": "experts"}, ("lora_A", "lora_B")),
        ({"task_gates": True}, ("lora_A", "lora_B", "gate")),
        ({"task_gates": True, "share": "none"}, ()),
        ({"task_gates": True, "share": "experts"}, ("lora_A", "lora_B")),
    ],
    ids=str,
)
def test_what_tasks_share(options, shared):
    adapter = SMoRA(rank=4, **options)
    model = tiny_bora(adapter=adapter, prior=with_shared(Independent(), adapter.shared))
    assert adapter.shared == shared
    latents = {name.rpartition(".")[-1] for name in model.starts}
    sites = {site["name"] for site in poutine.trace(model.weights).get_trace().nodes.values() if site["type"] == "sample"}
    for name in latents:
        kinds = {site.partition(".")[0] for site in sites if site.endswith(f".{name}")}
        assert kinds == {"prior_mean" if name in shared else "theta"}, name


def test_gates_have_a_prior_like_any_latent():
    model = tiny_bora(adapter=SMoRA(rank=4), prior=HierarchicalNormal(tau=10))
    theta, mean = random_weights(model), {name: value[0] for name, value in random_weights(model, seed=1).items()}
    sites = model.sites_given(theta, mean)
    assert "theta.q_proj.gate_decentered" in sites
    torch.testing.assert_close(
        sites["theta.q_proj.gate_decentered"], math.sqrt(10) * (theta["q_proj.gate"] - mean["q_proj.gate"])
    )


@pytest.mark.parametrize("options", [{}, {"partition": 2, "active": 4}, {"bias_in_value": True}], ids=str)
def test_the_linear_maps_give_the_gradients_of_documents(options):
    model = tiny_bora("llama", targets="all-linear", adapter=SMoRA(rank=8, alpha=3.0, **{"active": 3} | options))
    for name, value in model.tensors.buffers.items():
        if name.endswith(BIAS):
            value += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
    split, theta = tiny_split(), random_weights(model)
    [batch] = split.batches(token_budget=10_000)
    expected = document_gradients(model, theta, batch)
    found = list(matrix_sides(model, theta, split, token_budget=10_000))
    assert {each.name for each in found} == set(model.starts)
    for each in found:
        gradients = from_columns(each.long.mT @ each.short, expected[each.name][:, each.layer])
        torch.testing.assert_close(gradients, expected[each.name][:, each.layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guide", [laplace_guide, laplace_kfac_guide, laplace_kronecker_guide])
def test_curvature_gives_a_posterior_of_the_gates(guide):
    model = tiny_bora(adapter=SMoRA(rank=4, active=2), prior=HierarchicalNormal(tau=10))
    fitted = fit(model, training_only(), **FIT)
    around = guide(model, fitted.sites(), data=tiny_data())
    with torch.no_grad(), poutine.seed(rng_seed=0):
        draws = [around() for _ in range(2)]
    gate = "theta.q_proj.gate_decentered"
    assert not torch.equal(draws[0][gate], draws[1][gate])
    theta, _ = model.weights_given(draws[0])
    assert model.logits(tiny_batch(), theta).isfinite().all()


def test_task_gates_are_no_linear_maps():
    model = task_gates_model(HierarchicalNormal(tau=1))
    fitted = fit(model, training_only(), **FIT)
    with pytest.raises(InputError, match=r"task_gate' is not a matrix, .*; use the guide laplace"):
        laplace_kfac_guide(model, fitted.sites(), data=tiny_data())


def test_the_linear_expansion_is_that_of_finite_differences():
    model = tiny_bora(adapter=SMoRA(rank=4, active=2))
    centre, batch = random_weights(model, scale=0.1), tiny_batch()
    step = {name: 1e-3 * value for name, value in random_weights(model, seed=1).items()}
    moved = {name: value + step[name] for name, value in centre.items()}
    expansion = LinearisedBoRA(model, centre).logits(batch, moved)
    counted = batch.labels != IGNORED
    at, exact = model.logits(batch, centre)[counted], model.logits(batch, moved)[counted]
    assert (expansion[counted] - exact).abs().max() < 0.05 * (exact - at).abs().max()


@pytest.mark.parametrize("guide", [map_guide, normal_guide])
def test_a_fit_goes_on_where_it_was_stopped(guide, tmp_path):
    def model():
        return tiny_bora(adapter=SMoRA(rank=4, active=2, balance=0.01), prior=HierarchicalNormal(tau=10))

    def everything(fitted):
        return {name: value.detach() for name, value in fitted.guide.named_parameters()} | fitted.model.state()

    one, asked = model(), []
    whole = fit(one, training_only(), guide=guide(one), **FIT)
    first, second = model(), model()
    stop = {"stop": lambda: asked.append(1) or len(asked) == 4}
    with pytest.raises(FitStopped):
        fit(first, training_only(), guide=guide(first), checkpoints=tmp_path, **stop, **FIT)
    resumed = fit(second, training_only(), guide=guide(second), checkpoints=tmp_path, **FIT)
    assert any(name.endswith(BIAS) and value.any() for name, value in everything(whole).items())
    assert everything(whole).keys() == everything(resumed).keys()
    assert all(torch.equal(value, everything(resumed)[name]) for name, value in everything(whole).items())
    assert [epoch["load_variation"] for epoch in resumed.history] == [epoch["load_variation"] for epoch in whole.history]


def test_new_tasks_keep_the_bias_of_the_fit():
    model = tiny_bora(adapter=SMoRA(rank=4, active=2, balance=0.01), prior=HierarchicalNormal(tau=10))
    fitted = fit(model, training_only(), **FIT)
    before = {name: value.clone() for name, value in model.tensors.buffers.items()}
    data = tiny_data((2, 1))
    adapted = adapt(fitted, replace(data, validation=data.validation.subset(torch.arange(0))), steps=3)
    for name, value in before.items():
        assert torch.equal(value, model.tensors.buffers[name])
        assert torch.equal(value, adapted.model.tensors.buffers[name])


def test_there_is_no_change_of_weights(tmp_path):
    model = tiny_bora(adapter=SMoRA(rank=4))
    fitted = fit(model, training_only(), **FIT | {"epochs": 1})
    for refused in (lora_form, layer_deltas, lambda m, w: save_peft(tmp_path, m, w), lambda m, w: delta_w_norms(fitted)):
        with pytest.raises(InputError, match=r"SMoRA\(rank=4, alpha=2.0, active=2\) cannot be written as LoRA matrices"):
            refused(model, model.starts)
    assert not list(tmp_path.iterdir())
    assert fitted.deviation_norms().shape == (TASKS,)


def test_inside_osft_it_leaves_the_leading_directions_alone():
    adapter = OSFT(preserve=0.25, inner=SMoRA(rank=4, active=2, task_gates=True, balance=0.01))
    assert adapter.shared == ("lora_A", "lora_B", "gate")
    backbone = tiny_backbone("llama", targets=["q_proj"])
    model = BoRA(backbone, TASKS, adapter=adapter, prior=with_shared(HierarchicalNormal(1), adapter.shared))
    fit(model, training_only(), **FIT)
    assert all(value.any() for name, value in model.tensors.buffers.items())
    [slot] = backbone.slots
    left, _, _ = torch.linalg.svd(backbone.weight(slot, 0))
    weights = random_weights(model)
    latents = {name: weights[f"{slot.name}.{name}"][:, 0] for name in model.tensors.names(slot)}
    x = torch.randn((TASKS, 4, 32), generator=torch.Generator().manual_seed(0))
    change = adapter.output(x, model.tensors.at_layer(slot, 0, latents))
    assert (change @ left[:, :8]).abs().max() < 1e-4 * change.abs().max()


def test_a_gradient_reaches_the_gates_of_a_fit():
    model = tiny_bora(adapter=SMoRA(rank=4), prior=Independent())
    weights = random_weights(model)
    guide = map_guide(model, model.sites_given(weights, {name: value.mean(0) for name, value in weights.items()}))
    TemperedELBO().differentiable_loss(model, guide, tiny_batch()).backward()
    assert all(p.grad.abs().sum() > 0 for p in guide.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; give a whole number from 1 up"),
        ({"rank": 1}, "rank is 1 and partition is 1; give a rank that is a multiple of the partition and at least two blocks"),
        ({"rank": 8, "partition": 3}, "nearest: 9"),
        ({"rank": 8, "partition": 8}, "nearest: 16"),
        ({"rank": 8, "active": 1}, "active is 1; give a multiple of the partition (1) from 2 to the rank (8), nearest: 2"),
        ({"rank": 8, "active": 9}, "nearest: 8"),
        ({"rank": 8, "partition": 2, "active": 3}, "active is 3; give a multiple of the partition (2) from 4 to the rank (8)"),
        ({"alpha": 0.0}, "alpha 0.0 is not allowed; it must be positive and finite; the usual value is active (2)"),
        ({"balance": -1.0}, "balance is -1.0; give a number from 0 (none) to below 1"),
        ({"balance": math.nan}, "balance is nan"),
        ({"balance": 0.0, "bias_in_value": True}, "bias_in_value is true, but balance is 0"),
        ({"share": "expert"}, "share is 'expert'; allowed: none, experts, all; did you mean 'experts'?"),
        ({"share": "all"}, "share is all, which leaves tasks no latent of their own; give task_gates=true too, or tau inf"),
        ({"execution": "sparse"}, "execution is 'sparse'; allowed: dense, gathered"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError) as caught:
        SMoRA(**options)
    assert message in str(caught.value)


def test_it_prints_itself():
    assert repr(SMoRA()) == "SMoRA(rank=8, alpha=2.0, active=2)"
    assert (
        repr(SMoRA(rank=16, partition=4, task_gates=True)) == "SMoRA(rank=16, alpha=8.0, active=8, partition=4, task_gates=True)"
    )
    assert (SMoRA(rank=64).active, SMoRA(rank=64, alpha=16).scaling) == (8, 2.0)

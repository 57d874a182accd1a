"""SaRA: the smallest weights alone move, the memory follows their number, and the nuclear norm is a factor of the prior."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from bora_pyro import Backbone, BoRA, HierarchicalNormal, Independent, InputError, Pooled, fit, map_guide, normal_guide
from bora_pyro.adapters import SaRA, sara
from bora_pyro.adapters.factor import PRIOR_FACTOR
from bora_pyro.backbone.slots import Slot
from bora_pyro.data.batch import TaskDraw
from bora_pyro.inference.elbo import TemperedELBO
from bora_pyro.inference.fit import FitStopped
from tests.tiny import TASKS, of_task, random_ids, random_weights, tiny_batch, tiny_bora, tiny_data, tiny_model

SLOT = Slot("q_proj", ("a.q_proj",), 16, 24)
FIT = {"epochs": 3, "learning_rate": 0.03, "token_budget": 16, "patience": 0}


def weight_of(slot=SLOT, *, seed=0):
    return torch.randn((slot.out_features, slot.in_features), generator=torch.Generator().manual_seed(seed))


def training_only():
    """Without validation documents the last state is kept."""
    data = tiny_data()
    return replace(data, validation=data.validation.subset(torch.arange(0)))


def start_of(adapter, *, seed=0):
    return adapter.start(SLOT, weight_of, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("select", ["smallest", "largest", "random"])
def test_the_entries_are_as_many_as_asked_for(select):
    weight = weight_of().abs().flatten()
    start = start_of(SaRA(fraction=0.1, select=select))
    index = start.fixed["index"]
    assert len(index) == len(index.unique()) == round(0.1 * 16 * 24) == start.latents["sparse"].numel()
    ordered = weight.sort().values
    expected = {"smallest": ordered[:38], "largest": ordered[-38:]}
    if select in expected:
        assert torch.equal(weight[index].sort().values, expected[select])
    else:
        assert not torch.equal(index, start_of(SaRA(fraction=0.1, select=select), seed=1).fixed["index"])


def test_equal_weights_are_chosen_in_their_order():
    start = SaRA(fraction=0.25).start(SLOT, lambda: torch.ones(24, 16), torch.Generator())
    assert start.fixed["index"].tolist() == [*range(95, -1, -1)]


def test_a_threshold_chooses_all_entries_below_it_in_layers_of_any_number():
    model = tiny_bora("llama", targets=["q_proj", "down_proj"], adapter=SaRA(threshold=0.05))
    weights = random_weights(model)
    numbers = []
    for slot in model.backbone.slots:
        mask = model.tensors.masks.get(f"{slot.name}.sparse", torch.ones_like(model.starts[f"{slot.name}.sparse"], dtype=bool))
        for layer in range(slot.layers):
            weight = model.backbone.weight(slot, layer)
            small = weight.abs() < 0.05
            assert int(mask[layer].sum()) == int(small.sum())
            numbers.append(int(small.sum()))
            latents = {name: weights[f"{slot.name}.{name}"][:, layer] for name in model.tensors.names(slot)}
            tensors = model.tensors.at_layer(slot, layer, latents)
            delta, x = model.adapter.delta(tensors), torch.randn(TASKS, 5, slot.in_features)
            assert torch.equal(delta != 0, small.expand_as(delta))
            torch.testing.assert_close(model.output(x, tensors), x @ delta.mT)
    assert len(set(numbers)) > 2
    fitted = fit(model, tiny_data(), **FIT)
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, of forward derivatives
@pytest.mark.parametrize("block", [2**20, 64, 1])
def test_the_product_and_its_gradients_are_those_of_a_dense_change(block, monkeypatch):
    monkeypatch.setattr(sara, "BLOCK", block)
    adapter, generator = SaRA(fraction=0.1), torch.Generator().manual_seed(0)
    start = start_of(adapter)
    p = torch.randn((3, 38), generator=generator, dtype=torch.float64).requires_grad_()
    x = torch.randn((3, 5, 16), generator=generator, dtype=torch.float64).requires_grad_()
    tensors = start.fixed | {"sparse": p}
    out = torch.randn((3, 5, 24), generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((adapter.output(x, tensors) * out).sum(), (x, p))
    dense = torch.autograd.grad((x @ adapter.delta(tensors).mT * out).sum(), (x, p))
    torch.testing.assert_close(ours, dense)
    torch.testing.assert_close(adapter.output(x, tensors), x @ adapter.delta(tensors).mT)
    assert torch.autograd.gradcheck(
        lambda x, p: adapter.output(x, start.fixed | {"sparse": p}), (x, p), check_forward_ad=True, fast_mode=True
    )


def test_the_memory_follows_the_entries(monkeypatch):
    """No tensor of a pass, forward or backward, is as large as the layer; what is kept is x, p and the places."""
    monkeypatch.setattr(sara, "BLOCK", 1)
    width, entries, sizes = 256, 655, []
    slot = Slot("q_proj", ("a.q_proj",), width, width)
    adapter = SaRA(fraction=0.01)
    start = adapter.start(slot, lambda: weight_of(slot), torch.Generator())
    p, x = torch.randn((1, entries), requires_grad=True), torch.randn((1, 4, width), requires_grad=True)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            found = result if isinstance(result, (tuple, list)) else [result]
            sizes.extend(value.untyped_storage().nbytes() // 4 for value in found if isinstance(value, torch.Tensor))
            return result

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value.numel()) or value, lambda value: value):
        output = adapter.output(x, start.fixed | {"sparse": p})
    assert sum(kept) == x.numel() + p.numel() + entries
    with Largest():
        adapter.output(x, start.fixed | {"sparse": p})
        output.sum().backward()
    assert sizes
    assert max(sizes) <= 2 * (entries + width)  # places are 8 bytes; a block is at most a row longer than p
    assert max(sizes) < width * width / 10


def test_the_other_weights_are_those_of_the_base_and_merging_is_addition():
    model = tiny_bora("llama", targets="all-linear", adapter=SaRA(fraction=0.1))
    weights, ids = random_weights(model), random_ids()
    both = {name: (value[0] + value[1])[None] for name, value in weights.items()}
    base = tiny_model("llama")
    for slot in model.backbone.slots:
        for layer, path in enumerate(slot.paths):
            fixed = model.tensors.at_layer(slot, layer, {})
            before = base.get_submodule(path).weight.detach().clone()
            for d in (0, 1):
                base.get_submodule(path).weight.data += model.adapter.delta(
                    fixed | {"sparse": weights[f"{slot.name}.sparse"][d, layer]}
                )
            changed = base.get_submodule(path).weight.flatten() != before.flatten()
            assert set(changed.nonzero()[:, 0].tolist()) == set(fixed["index"].tolist())
    ours = model.backbone.logits(ids, model.change(both, torch.zeros(3, dtype=torch.int64)))
    torch.testing.assert_close(ours, base(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def penalty(model, theta):
    """λ Σ_d Σ_layers of the smoothed nuclear norm, by a full decomposition."""
    adapter, total = model.adapter, torch.zeros(TASKS)
    for slot in model.backbone.slots:
        for layer in range(slot.layers):
            for d in range(TASKS):
                fixed = model.tensors.at_layer(slot, layer, {})
                delta = adapter.delta(fixed | {"sparse": theta[f"{slot.name}.sparse"][d, layer]})
                values = torch.linalg.svd(delta).S
                total[d] += adapter.nuclear * ((values**2 + adapter.smoothing**2).sqrt() - adapter.smoothing).sum()
    return total


@pytest.mark.parametrize("prior", [HierarchicalNormal(tau=10), Independent(), Pooled()], ids=repr)
def test_the_nuclear_norm_is_a_factor_of_the_prior_of_each_task(prior):
    plain, with_factor = (tiny_bora(adapter=SaRA(fraction=0.1, nuclear=nuclear), prior=prior) for nuclear in (0.0, 0.7))
    theta = random_weights(plain)
    if isinstance(prior, Pooled):
        theta = {name: value[:1].expand_as(value) for name, value in theta.items()}
    sites, batch = plain.sites_given(theta, of_task(theta, 0)), tiny_batch()

    def log_joint(model):
        return poutine.trace(poutine.condition(model, data=sites)).get_trace(batch).log_prob_sum()

    expected = penalty(with_factor, theta).sum()
    torch.testing.assert_close(log_joint(with_factor), log_joint(plain) - expected)


def test_the_nuclear_norm_of_drawn_tasks_is_weighted():
    model = tiny_bora(adapter=SaRA(fraction=0.1, nuclear=0.7), prior=HierarchicalNormal(tau=10))
    theta = random_weights(model)
    sites = model.sites_given(theta, of_task(theta, 0))
    draw = TaskDraw(torch.tensor([0, 2]), torch.tensor([1.5, 2.5]))
    sites = {name: value[draw.index] if name.startswith("theta") else value for name, value in sites.items()}
    trace = poutine.trace(poutine.condition(model.weights, data=sites)).get_trace(draw)
    of_task_ = penalty(model, theta)
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes[f"{PRIOR_FACTOR}adapter"]["log_prob_sum"], -(1.5 * of_task_[0] + 2.5 * of_task_[2]))


def test_the_nuclear_norm_counts_as_prior_and_not_as_likelihood():
    model = tiny_bora(adapter=SaRA(fraction=0.1, nuclear=0.7), prior=Independent())
    theta, batch = random_weights(model), tiny_batch()
    guide = map_guide(model, model.sites_given(theta, of_task(theta, 0)))
    loss, elbo = {}, TemperedELBO()
    for temperature in (1.0, 0.25):
        elbo.temperature = temperature
        loss[temperature] = elbo.differentiable_loss(model, guide, batch)
    torch.testing.assert_close(elbo.kl, penalty(model, theta).sum())
    torch.testing.assert_close(loss[1.0] - loss[0.25], 0.75 * elbo.kl)
    torch.testing.assert_close(loss[1.0], torch.tensor(Trace_ELBO().loss(model, guide, batch)))


def test_the_nuclear_norm_thresholds_the_singular_values():
    """The mode of exp(−½‖ΔW − T‖² − λ‖ΔW‖_*) is T with its singular values σ replaced by max(σ − λ, 0)."""
    adapter, target = SaRA(fraction=1.0, nuclear=3.0, smoothing=1e-2), weight_of().double()
    fixed = start_of(adapter).fixed
    p = torch.zeros((1, 16 * 24), dtype=torch.float64, requires_grad=True)
    assert not torch.autograd.grad(adapter.log_factor(fixed | {"sparse": p}).sum(), p)[0].any()  # smooth at the pretrained model
    optimizer = torch.optim.LBFGS([p], max_iter=300, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def loss():
        optimizer.zero_grad()
        tensors = fixed | {"sparse": p}
        value = 0.5 * (adapter.delta(tensors) - target).square().sum() - adapter.log_factor(tensors).sum()
        value.backward()
        return value

    optimizer.step(loss)
    left, values, right = torch.linalg.svd(target, full_matrices=False)
    expected = left @ torch.diag((values - 3.0).clamp(min=0)) @ right
    delta = adapter.delta(fixed | {"sparse": p.detach()})[0]
    torch.testing.assert_close(delta, expected, atol=0.02, rtol=0)
    assert (torch.linalg.svdvals(delta) > 0.05).sum() == (values > 3.0).sum() < 16


@pytest.mark.parametrize("guide", [map_guide, normal_guide])
def test_entries_that_have_grown_keep_their_values(guide):
    model = tiny_bora(adapter=SaRA(fraction=0.3, progressive=0.5), prior=HierarchicalNormal(tau=10))
    states, built = [], guide(model)

    def watch(entry):
        states.append({name: value.detach().clone() for name, value in built.named_parameters()})

    fit(model, training_only(), guide=built, on_step=watch, **FIT | {"epochs": 6})
    half = round(0.5 * len(states)) - 1
    trained = model.tensors.buffers
    assert all(value.any() and not value.all() for value in trained.values())
    moved = 0
    for name, last in states[-1].items():
        slot = next(slot.name for slot in model.backbone.slots if slot.name in name)
        frozen = ~trained[f"{slot}.trained"]
        assert torch.equal(last.masked_select(frozen), states[half][name].masked_select(frozen))
        assert last.masked_select(frozen).any()
        moved += int((last != states[half][name]).sum())
    assert moved


def test_the_threshold_of_a_reselection_is_that_of_the_layer():
    model = tiny_bora(adapter=SaRA(fraction=0.3, progressive=0.5), prior=HierarchicalNormal(tau=10))
    fitted = fit(model, training_only(), **FIT | {"epochs": 2, "average": False})
    _, mean = fitted.weights()
    for slot in model.backbone.slots:
        for layer in range(slot.layers):
            index = model.tensors.fixed[f"{slot.name}.index"][layer]
            weight = model.backbone.weight(slot, layer).flatten()
            others = torch.ones(len(weight), dtype=torch.bool).index_fill(0, index, False)
            grown = ~model.tensors.buffers[f"{slot.name}.trained"][layer]
            # a frozen entry has the value that it had at the re-selection, which was not among the smallest
            now = (weight[index] + mean[f"{slot.name}.sparse"][layer]).abs()
            assert bool((now[grown] > weight[index].abs().max()).all())
            assert weight[others].abs().min() >= weight[index].abs().max()


def test_a_fit_with_a_reselection_goes_on_where_it_was_stopped(tmp_path):
    def model():
        return tiny_bora(adapter=SaRA(fraction=0.3, progressive=0.5, nuclear=0.1), prior=HierarchicalNormal(tau=10))

    def everything(fitted):
        return {name: value.detach() for name, value in fitted.guide.named_parameters()} | fitted.model.state()

    whole, asked = fit(model(), training_only(), **FIT), []
    stop = {"stop": lambda: asked.append(1) or len(asked) == 5}
    with pytest.raises(FitStopped):
        fit(model(), training_only(), checkpoints=tmp_path, **stop, **FIT)
    resumed = fit(model(), training_only(), checkpoints=tmp_path, **FIT)
    assert any(not value.all() for name, value in everything(whole).items() if name.startswith("buffers/"))
    assert all(torch.equal(value, everything(resumed)[name]) for name, value in everything(whole).items())


def test_a_reselection_needs_steps_that_move_all_tasks():
    model = tiny_bora(adapter=SaRA(progressive=0.5))
    with pytest.raises(
        InputError, match=r"progressive 0\.5 needs steps of AdamW that move all tasks; give --task_subsampling false"
    ):
        fit(model, tiny_data(), task_subsampling=True, **FIT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "fraction is 0.0; give a number above 0 and at most 1, nearest: 0.01"),
        ({"fraction": 2.0}, "fraction is 2.0; give a number above 0 and at most 1, nearest: 1"),
        ({"fraction": float("nan")}, "fraction is nan"),
        ({"threshold": 0.0}, "threshold is 0.0; give a number above 0"),
        ({"select": "small"}, "select is 'small'; allowed: smallest, largest, random; did you mean 'smallest'?"),
        ({"threshold": 0.1, "select": "random"}, "threshold chooses the smallest entries, and select is 'random'"),
        ({"progressive": 0.5, "select": "largest"}, "progressive chooses the smallest entries, and select is 'largest'"),
        ({"nuclear": -1.0}, "nuclear is -1.0; give a number from 0 up"),
        ({"smoothing": 0.0}, "smoothing is 0.0; give a number above 0"),
        ({"progressive": 1.0}, "progressive is 1.0; give a number from 0 up and below 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError) as caught:
        SaRA(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1e-4}, r"fraction 0.0001 chooses no entry of layer q_proj \(24 x 16\); give at least 0.0026"),
        ({"threshold": 1e-9}, r"threshold 1e-09 is below every weight of layer q_proj \(24 x 16\); the smallest is .*, give"),
    ],
)
def test_a_layer_without_entries_is_named(options, message):
    with pytest.raises(InputError, match=message):
        start_of(SaRA(**options))


def test_zeroed_small_weights_change_the_base_less_than_other_ones():
    """The premise of SaRA, on the built-in base: the smallest tenth of the weights matters less than a random tenth."""
    backbone, ids = Backbone.from_pretrained("builtin:nano"), torch.arange(20, 60)[None]
    base, errors = backbone.logits(ids), {}
    for select in ("smallest", "random"):
        model = BoRA(backbone, 2, adapter=SaRA(fraction=0.1, select=select))
        zeroed = {}
        for slot in backbone.slots:
            index = model.tensors.fixed[f"{slot.name}.index"]
            weight = torch.stack([backbone.weight(slot, layer).flatten() for layer in range(slot.layers)])
            zeroed[f"{slot.name}.sparse"] = -weight.gather(1, index)[None]
        with torch.no_grad():
            errors[select] = float((model.backbone.logits(ids, model.change(zeroed, torch.tensor([0]))) - base).square().mean())
    assert errors["smallest"] < 0.05 * errors["random"]

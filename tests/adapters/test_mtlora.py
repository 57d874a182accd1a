"""MTLoRA: what its two pairs are equal to, which gradients are zero, how many latents act, and what its options allow."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

from bora_pyro import (
    BoRA,
    HierarchicalNormal,
    Independent,
    InputError,
    LoRA,
    adapt,
    fit,
    load_peft,
    map_guide,
    normal_guide,
    save_peft,
)
from bora_pyro.adapters import ADAPTERS, OSFT, MTLoRA, SharedPlusTaskLoRA
from bora_pyro.backbone.slots import Slot
from bora_pyro.exchange.factors import layer_deltas
from bora_pyro.guides import low_rank_guide
from bora_pyro.guides.tfb import TfbGuide
from bora_pyro.inference.checkpoint import Checkpoints
from bora_pyro.predict.infer_task import infer_task, log_likelihoods
from bora_pyro.priors import Given, HierarchicalNorm, with_shared
from tests.tiny import (
    TASKS,
    loaded_peft,
    of_task,
    random_ids,
    random_weights,
    tiny_backbone,
    tiny_batch,
    tiny_bora,
    tiny_data,
    tiny_model,
    tiny_split,
)

RANKS = (1, 3, 2)
SLOT = Slot("q_proj", ("layers.0.q_proj",), 16, 24)
FIT = {"epochs": 2, "learning_rate": 0.03, "token_budget": 30, "patience": 0}
#: Options that differ in ranks, scales and layers.
UNLIKE = {
    "plain": {},
    "scales": {"task_rank": 1, "shared_scale": 4.0, "task_scale": 0.5},
    "ranks by task": {"task_ranks": RANKS, "task_scale": 3.0},
    "layers": {"task_layers": "-1 fc1 v_proj", "module_ranks": "fc1:3/1"},
    "learned scales": {"trainable_scales": True, "task_ranks": RANKS, "task_layers": "0"},
}
EVERY = pytest.mark.parametrize("options", UNLIKE.values(), ids=UNLIKE)


def mt_bora(options=None, architecture="opt", *, targets=("q_proj", "v_proj", "fc1"), prior=None, tasks=TASKS, **more):
    adapter = MTLoRA(**{"rank": 2} | (options or {}))
    prior = with_shared(HierarchicalNormal(10) if prior is None else prior, adapter.shared)
    return tiny_bora(architecture, adapter=adapter, targets=list(targets), prior=prior, tasks=tasks, **more)


def weights_of(model, *, seed=0):
    """Random θ of all tasks, whose shared latents are the same."""
    found = random_weights(model, seed=seed)
    shared = model.adapter.shared
    return {n: v[:1].expand_as(v).clone() if n.rpartition(".")[-1] in shared else v for n, v in found.items()}


def own(name):
    return ".lora_" in name


def test_the_default_is_the_plain_shared_plus_task_bit_for_bit():
    plain, both = (tiny_bora(adapter=kind(rank=2, alpha=3.0), targets=["q_proj", "fc1"]) for kind in (SharedPlusTaskLoRA, MTLoRA))
    assert plain.starts.keys() == both.starts.keys()
    assert all(torch.equal(value, both.starts[name]) for name, value in plain.starts.items())
    assert not both.tensors.masks
    weights, batch = random_weights(plain), tiny_batch()
    assert torch.equal(plain.logits(batch, weights), both.logits(batch, weights))
    slot = plain.backbone.slots[0]
    one, other = (model.adapter.factors(of_layer(model, weights, slot)) for model in (plain, both))
    assert one.alpha == other.alpha == 6.0
    assert torch.equal(one.lora_B, other.lora_B)
    assert plain.adapter.kept_per_token(slot) == both.adapter.kept_per_token(slot)


def of_layer(model, weights, slot, layer=0, task=0):
    latents = {name: weights[f"{slot.name}.{name}"][task : task + 1, layer] for name in model.tensors.names(slot)}
    tensors = model.tensors.at_layer(slot, layer, latents, torch.tensor([task]))
    return {name: value[0] if name in latents else value for name, value in tensors.items()}


@pytest.mark.parametrize("options", [{}, {"task_rank": 3}, {"task_rank": 1, "shared_scale": 4.0, "task_scale": 0.5}], ids=repr)
def test_one_task_is_one_lora_of_the_sum_of_the_ranks(options):
    """[B_0, (s_1/s_0) B_1] [A_0; A_1] with the scale s_0, through the whole language model."""
    backbone, adapter = tiny_backbone(targets=["q_proj", "fc1"]), MTLoRA(rank=2, **options)
    model = BoRA(backbone, 1, adapter=adapter, prior=Given({}, {}))
    shared, (rank,) = adapter.ranks(backbone.slots[0])
    lora = BoRA(backbone, 1, adapter=LoRA(shared + rank, alpha=adapter.scaling * (shared + rank)), prior=Given({}, {}))
    weights, ratio = random_weights(model), (adapter.task_scale or adapter.scaling) / adapter.scaling
    both = {}
    for slot in backbone.slots:
        a0, b0, a1, b1 = (weights[f"{slot.name}.{name}"] for name in ("shared_A", "shared_B", "lora_A", "lora_B"))
        both[f"{slot.name}.lora_A"] = torch.cat([a0, a1], -2)
        both[f"{slot.name}.lora_B"] = torch.cat([b0, ratio * b1], -1)
    batch = tiny_batch((4,))
    expected = lora.logits(batch, both)
    assert (expected - model.logits(batch, None)).abs().max() > 0.1
    torch.testing.assert_close(model.logits(batch, weights), expected, atol=1e-5, rtol=1e-5)


@EVERY
def test_without_the_tasks_own_pairs_it_is_the_shared_lora(options):
    model = mt_bora(options, prior=Independent())
    weights, batch = weights_of(model), tiny_batch()
    weights = {name: torch.zeros_like(value) if name.endswith("lora_B") else value for name, value in weights.items()}
    deltas = [layer_deltas(model, of_task(weights, d), task=d) for d in range(TASKS)]
    for slot in model.backbone.slots:
        for layer, path in enumerate(slot.paths):
            tensors = of_layer(model, weights, slot, layer)
            scale = model.adapter.scaling * float(tensors.get("shared_log_scale", torch.zeros(1)).exp())
            expected = scale * tensors["shared_B"] @ tensors["shared_A"]
            for delta in deltas:
                torch.testing.assert_close(delta[path], expected)
    assert (model.logits(batch, weights) - model.logits(batch, None)).abs().max() > 0.1


@EVERY
def test_the_loss_of_a_task_has_no_gradient_in_the_pairs_of_others(options):
    model = mt_bora(options)
    batch = tiny_split((0, 4, 0)).batches(token_budget=10_000)[0]
    weights = {name: value.requires_grad_() for name, value in weights_of(model).items()}
    labels = batch.labels[:, 1:]
    log_p = model.logits(batch, weights)[:, :-1].log_softmax(-1)
    torch.nn.functional.nll_loss(log_p.mT, labels, ignore_index=-100).backward()
    for name, value in weights.items():
        assert not value.grad[[0, 2]].any()  # exactly 0
        mask = model.tensors.mask(name, torch.tensor([1]))
        active = torch.ones_like(value[:1], dtype=torch.bool) if mask is None else mask.expand_as(value[:1])
        assert value.grad[1:2][active].any()
        assert not value.grad[1:2][~active].any()


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
@EVERY
def test_a_merged_task_gives_the_logits_of_the_unmerged_model(options, architecture):
    targets = {"opt": ("q_proj", "v_proj", "fc1"), "gpt2": ("c_attn", "c_fc"), "llama": ("q_proj", "v_proj", "down_proj")}
    kinds = targets[architecture]
    given = {"task_layers": f"-1 {kinds[-1]}", "module_ranks": f"{kinds[0]}:3"} if "module_ranks" in options else options
    model = mt_bora(given, architecture, targets=kinds)
    weights, ids = weights_of(model), random_ids()
    mean = {name: value.mean(0) for name, value in weights.items()}
    stacked = {name: torch.cat([value, mean[name][None]]) for name, value in weights.items()}
    for row, task in enumerate([0, 1, 2, None]):
        # −1 is the mean of all tasks, which has the entries of all of them
        index = torch.full((len(ids),), -1 if task is None else task)
        expected = model.backbone.logits(ids, model.change(stacked, torch.full((len(ids),), row), index))
        base = copy.deepcopy(model.backbone.model)
        for path, delta in layer_deltas(model, {n: v[row] for n, v in stacked.items()}, task=task).items():
            module = base.get_submodule(path)
            module.weight.data += delta.mT if architecture == "gpt2" else delta
        torch.testing.assert_close(base(input_ids=ids).logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("options", "layers"), [({}, 2), ({"task_layers": "0"}, 1), ({"task_layers": "1:, v_proj"}, 1)])
def test_number_of_active_latents(options, layers):
    """(r_0 + Σ_d r_d) (in + out) in a layer with tasks' own pairs, and r_0 (in + out) in one without them."""
    model = mt_bora({"rank": 4, "task_ranks": RANKS} | options)
    for slot in model.backbone.slots:
        chosen = layers if slot.name == "v_proj" or "v_proj" not in options.get("task_layers", "") else 0
        names = [f"{slot.name}.{name}" for name in model.tensors.names(slot)]
        size = slot.in_features + slot.out_features
        shared = sum(int(model.tensors.active(name, 1)) for name in names if not own(name))
        tasks = sum(model.tensors.active(name, TASKS) for name in names if own(name))
        assert shared == slot.layers * 4 * size
        assert torch.as_tensor(tasks).tolist() == ([chosen * rank * size for rank in RANKS] if chosen else 0)
        assert all(model.starts[name].shape[-2 if name.endswith("A") else -1] == 3 for name in names if own(name))


def test_a_kind_of_layer_without_a_task_part_has_no_latents_for_it():
    model = mt_bora({"task_layers": "fc1", "trainable_scales": True})
    assert [model.tensors.names(slot) for slot in model.backbone.slots] == [
        ["shared_A", "shared_B", "shared_log_scale"],
        ["shared_A", "shared_B", "shared_log_scale"],
        ["shared_A", "shared_B", "shared_log_scale", "lora_A", "lora_B", "lora_log_scale"],
    ]
    assert not model.tensors.masks


@EVERY
def test_a_fit_trains_what_is_active_and_predicts(options):
    model = mt_bora(options)
    guide = map_guide(model)
    TraceMeanField_ELBO().differentiable_loss(model, guide, tiny_batch()).backward()
    assert sum(p.numel() for p in guide.parameters()) == sum(
        value.numel() * (TASKS + 1 if own(name) else 1) for name, value in model.starts.items()
    )
    fitted = fit(model, tiny_data(), **FIT)
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
    theta, mean = fitted.weights()
    for name, value in theta.items():
        active = model.tensors.mask(name, torch.arange(TASKS))
        active = torch.ones_like(value, dtype=torch.bool) if active is None else active.expand_as(value)
        moved = value != mean[name]
        assert not moved[~active].any()  # Θ alone, which other tasks have moved
        assert (mean[name] != model.starts[name]).any()
        assert moved[active].any() == own(name)


def test_steps_that_draw_tasks_keep_their_ranks():
    model = mt_bora({"task_ranks": RANKS, "task_layers": "-1"})
    fitted = fit(model, tiny_data(), task_subsampling=True, **FIT)
    theta, mean = fitted.weights()
    deviation = (theta["fc1.lora_A"] - mean["fc1.lora_A"]).any(-1)  # (tasks, layers, ranks)
    assert not deviation[:, 0].any()
    assert deviation[:, 1].sum(-1).tolist() == list(RANKS)


def test_scales_are_learned_around_those_that_are_given():
    model = mt_bora({"trainable_scales": True, "shared_scale": 4.0, "task_scale": 0.5})
    weights, slot = weights_of(model), model.backbone.slots[2]
    tensors = of_layer(model, weights, slot, 1, task=2)
    s0, s2 = (scale * float(tensors[f"{pair}_log_scale"].exp()) for pair, scale in (("shared", 4.0), ("lora", 0.5)))
    expected = s0 * tensors["shared_B"] @ tensors["shared_A"] + s2 * tensors["lora_B"] @ tensors["lora_A"]
    torch.testing.assert_close(model.adapter.delta(tensors), expected)
    fitted = fit(model, tiny_data(), **FIT)
    theta, _ = fitted.weights()
    for slot in model.backbone.slots:
        shared, scale = theta[f"{slot.name}.shared_log_scale"], theta[f"{slot.name}.lora_log_scale"]
        assert shared.any()
        assert torch.equal(shared[0], shared[1])
        assert not torch.equal(scale[0], scale[1])
    assert model.prior.precision("fc1.shared_log_scale", model.starts["fc1.shared_log_scale"]).isinf()
    assert model.prior.precision("fc1.lora_log_scale", model.starts["fc1.lora_log_scale"]) == 10


@pytest.mark.parametrize(
    "options", [{}, {"task_scale": 3.0, "task_rank": 1}, {"task_layers": "fc1", "task_scale": 3.0}], ids=repr
)
def test_linear_maps_have_the_scale_of_each_pair(options):
    adapter = MTLoRA(rank=2, **options)
    generator = torch.Generator().manual_seed(0)
    slot = Slot("q_proj", ("q_proj",), 16, 24)
    latents = adapter.start(slot, None, generator).latents
    assert ("lora_A" in latents) == ("task_layers" not in options)
    tensors = {name: torch.randn((5, *value.shape), generator=generator).requires_grad_() for name, value in latents.items()}
    x, gradient = torch.randn((5, 7, 16), generator=generator), torch.randn((5, 7, 24), generator=generator)
    (adapter.output(x, tensors) * gradient).sum().backward()
    maps = adapter.linear_maps(x, gradient, {name: value.detach() for name, value in tensors.items()})
    assert maps.keys() == tensors.keys()
    for name, (u, g) in maps.items():
        torch.testing.assert_close(g.mT @ u, tensors[name].grad, atol=1e-4, rtol=1e-4)
    assert MTLoRA(trainable_scales=True).linear_maps(x, gradient, tensors) is None


def test_a_task_leaves_with_its_own_rank_and_theta_with_the_largest(tmp_path):
    model = mt_bora({"task_ranks": RANKS, "shared_scale": 2.0, "task_layers": "-1"})
    weights, ids = weights_of(model), random_ids()
    mean = {name: value.mean(0) for name, value in weights.items()}
    for d, rank in enumerate(RANKS):
        save_peft(tmp_path / str(d), model, of_task(weights, d), task=d)
        config = json.loads((tmp_path / str(d) / "adapter_config.json").read_text(encoding="utf-8"))
        assert (config["r"], config["lora_alpha"]) == (2 + rank, 2 * (2 + rank))
        peft = loaded_peft(tiny_model("opt"), tmp_path / str(d))
        expected = model.backbone.logits(ids, model.change(weights, torch.full((len(ids),), d)))
        torch.testing.assert_close(peft(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    save_peft(tmp_path / "mean", model, mean)
    assert json.loads((tmp_path / "mean" / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 5
    save_peft(tmp_path / "served", model, of_task(weights, 0), task=0, ranks=[8])
    assert json.loads((tmp_path / "served" / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 8
    with pytest.raises(InputError, match="whose layers or tasks differ; read them as plain LoRA"):
        load_peft(tmp_path / "mean", model)


def test_a_folder_of_equal_layers_is_read_back(tmp_path):
    model = mt_bora({"task_rank": 1, "shared_scale": 4.0, "task_scale": 0.5})
    weights = of_task(weights_of(model), 1)
    save_peft(tmp_path, model, weights, task=1)
    for name, value in load_peft(tmp_path, model).items():
        torch.testing.assert_close(value, weights[name])


@pytest.mark.parametrize("options", [{"task_ranks": RANKS}, {"task_ranks": RANKS, "task_layers": "-1"}], ids=repr)
def test_a_new_task_has_the_largest_rank(options):
    fitted = fit(mt_bora(options), tiny_data(), **FIT)
    data = tiny_data((2, 1))
    adapted = adapt(fitted, replace(data, validation=data.validation.subset(torch.arange(0))), steps=3)
    assert adapted.model.adapter.ranks(SLOT) == (2, (3,))
    assert adapted.model.adapter.task_ranks is None
    masks = adapted.model.tensors.masks
    assert len(masks) == (6 if "task_layers" in options else 0)
    assert all(mask[1].all() and not mask[0].any() for mask in masks.values())
    theta, mean = adapted.weights()
    change = (theta["q_proj.lora_A"] - mean["q_proj.lora_A"])[:, -1]
    assert change.any(-1).all()  # every row has moved
    # the model of the new tasks is the one that its description builds
    again = mt_bora({name: value for name, value in vars(fitted.model.adapter.for_tasks(None)).items()})
    assert again.tensors.masks.keys() == masks.keys()
    assert all(torch.equal(value, masks[name]) for name, value in again.tensors.masks.items())


def test_texts_of_unknown_task_are_read_with_the_ranks_of_their_candidates():
    fitted = fit(mt_bora({"task_ranks": RANKS}), tiny_data(), **FIT)
    model, split = fitted.model, tiny_split((2, 2, 2), seed=5)
    theta, _ = fitted.weights()
    theta = {
        name: value + 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) for name, value in theta.items()
    }
    every = log_likelihoods(model, split, theta)
    for d in range(TASKS):
        one = {name: value[d : d + 1] for name, value in theta.items()}
        alone = log_likelihoods(model, split, one, tasks=torch.tensor([d]))
        torch.testing.assert_close(alone[:, 0], every[:, d], atol=1e-4, rtol=1e-5)
        single = log_likelihoods(model, split, one)  # with the rank of the first task
        assert torch.allclose(single[:, 0], every[:, d], atol=1e-4) == (d == 0)
    # in chunks of one task
    assert torch.allclose(
        infer_task(fitted, split, token_budget=1).log_likelihood, infer_task(fitted, split).log_likelihood, atol=1e-4
    )


def test_a_guide_learns_no_scale_of_an_inactive_entry():
    model = mt_bora({"task_ranks": RANKS, "task_layers": "-1"})
    before, guide = normal_guide(model), normal_guide(model)
    fit(model, tiny_data(), guide=guide, **FIT)
    with torch.no_grad():
        before(tiny_batch())
    start = dict(before.named_parameters())
    seen = 0
    for name, value in guide.named_parameters():
        if "theta" in name and "fc1.lora_A" in name.replace("/", ".") and value.dim() == 4:
            moved = value != start[name]
            assert not moved[:, 0].any()
            assert not moved[0, 1, 1:].any()
            assert moved[0, 1, 0].any()
            assert moved[1, 1].any()
            seen += 1
    assert seen == 2  # the mean and the scale
    with pytest.raises(InputError, match=r"guide low_rank cannot leave out the entries that MTLoRA\("):
        low_rank_guide(model)


def test_the_guide_tfb_knows_the_scale_of_the_tasks_pair():
    model = mt_bora({"task_scale": 4.0})
    theta = weights_of(model)
    sites = model.sites_given(theta, {name: value.mean(0) for name, value in theta.items()})
    guide = TfbGuide(model, sites)
    plain = mt_bora({})
    other = TfbGuide(plain, plain.sites_given(theta, {name: value.mean(0) for name, value in theta.items()}))
    for name, (inverse, _, _) in guide._noise.items():
        torch.testing.assert_close(4 * inverse, other._noise[name][0])
    learned = mt_bora({"trainable_scales": True})
    with pytest.raises(InputError, match="guide tfb needs LoRA with a fixed scale"):
        TfbGuide(learned, {})


def test_what_reads_theta_alone_refuses_ranks_by_task():
    for options in ({"task_dropout": 0.1}, {"kept_by": "global_mean"}):
        with pytest.raises(InputError, match=r"cuts Theta to the rank of each task; leave (task_dropout|kept_by) out"):
            fit(mt_bora({"task_ranks": RANKS}), tiny_data(), **FIT | options)
        fit(mt_bora({"task_layers": "-1"}), tiny_data(), **FIT | options)


def test_a_penalty_of_norms_takes_learned_scales_and_refuses_masks():
    fit(mt_bora({"trainable_scales": True, "task_scale": 2.0}, prior=HierarchicalNorm(50)), tiny_data(), **FIT)
    with pytest.raises(InputError, match="a penalty of norms has no inactive entries"):
        fit(mt_bora({"task_ranks": RANKS}, prior=HierarchicalNorm(50)), tiny_data(), **FIT)


def test_a_checkpoint_of_other_ranks_is_refused(tmp_path):
    fit(mt_bora({"task_ranks": RANKS}), tiny_data(), checkpoints=tmp_path, **FIT)
    assert Checkpoints(tmp_path).newest() is not None
    with pytest.raises(InputError, match=r"the ranks of the tasks \(task_ranks\) are not those with which the fit began"):
        fit(mt_bora({"task_ranks": (3, 1, 2)}), tiny_data(), checkpoints=tmp_path, **FIT | {"epochs": 3})
    resumed = fit(mt_bora({"task_ranks": RANKS}), tiny_data(), checkpoints=tmp_path, **FIT | {"epochs": 3})
    assert len(resumed.history) == 3


def test_inside_osft_it_keeps_its_ranks_by_task():
    adapter = OSFT(inner=MTLoRA(rank=2, task_ranks={"a": 1, "b": 3}), preserve=0.25)
    with pytest.raises(InputError, match="which a model knows by number; give adapter"):
        tiny_bora(adapter=adapter, tasks=2)
    model = tiny_bora(adapter=adapter.for_tasks(["a", "b"]), tasks=2, prior=with_shared(Independent(), adapter.shared))
    assert model.tensors.masks["q_proj.lora_A"][:, 0, :, 0].tolist() == [[True, False, False], [True, True, True]]
    assert model.adapter.for_tasks(None).wrapped.task_rank == 3
    assert OSFT(inner="lora", rank=2).for_tasks(["a"]) == OSFT(inner="lora", rank=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; give a whole number from 1 up"),
        ({"task_rank": 0}, "task_rank is 0; give a whole number from 1 to 65536"),
        ({"task_rank": 2**16 + 1}, "task_rank is 65537; give a whole number from 1 to 65536"),
        ({"shared_scale": 0.0}, "shared_scale is 0.0; give a finite number above 0, for example 1"),
        ({"task_scale": float("nan")}, "task_scale is nan; give a finite number above 0"),
        ({"alpha": 16.0, "shared_scale": 4.0}, r"alpha 16 is the scale alpha/rank = 2, and shared_scale is 4; give one of them"),
        ({"task_ranks": (2, 0)}, "a rank in task_ranks is 0; give a whole number from 1"),
        ({"task_ranks": ()}, "task_ranks is .*give the rank of each task, or a file with them, or leave it out"),
        ({"task_ranks": {}}, "task_ranks is .*give the rank of each task, or a file with them, or leave it out"),
        (
            {"task_ranks": (2, 4), "task_rank": 2},
            "task_rank is 2, and task_ranks has the rank of every task; leave task_rank out",
        ),
        ({"module_ranks": "fc1"}, "module_ranks has 'fc1'; give kind:rank or kind:rank/rank"),
        ({"module_ranks": "fc1:0"}, "module_ranks for fc1 is 0; give a whole number from 1"),
        ({"module_ranks": "fc1:2/0"}, "module_ranks for fc1 is 0; give a whole number from 1"),
        ({"module_ranks": "fc1:2 fc1:3"}, "module_ranks has 'fc1' twice; give it once"),
        ({"module_ranks": " "}, "module_ranks is ' '; give kind:rank"),
        ({"module_ranks": "fc1:8/4", "task_ranks": (2, 4)}, "module_ranks that of the tasks in fc1; give fc1:8 alone"),
        ({"task_layers": " , "}, "task_layers is ' , '; name blocks"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(InputError, match=message) as caught:
        MTLoRA(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_ranks": {"ada": 2}}, "task_ranks names tasks, which a model knows by number; give adapter.for_tasks"),
        ({"task_ranks": (2, 4)}, r"task_ranks is Ranks\(2, 4\), and the model has 3 tasks; give one rank for each"),
        (
            {"module_ranks": "fc3:8"},
            "module_ranks names 'fc3', which is no kind of adapted layer; there are v_proj, q_proj, fc1; did",
        ),
        ({"task_layers": "-1 k_proj"}, "task_layers names 'k_proj', which is no kind of adapted layer; there are v_proj, q_proj"),
        (
            {"task_layers": "2"},
            "task_layers names block 2, in which there is no such layer; the first is block 0 and the last is block 1",
        ),
        ({"task_layers": "-3"}, "task_layers names block -3, in which there is no such layer"),
        ({"task_layers": "1:1"}, "task_layers names block 1:1, in which there is no such layer"),
    ],
)
def test_options_that_do_not_fit_the_model(options, message):
    with pytest.raises(InputError, match=message):
        mt_bora(options)


@pytest.mark.parametrize(
    ("content", "tasks", "message"),
    [
        ("task,rank\nada,2\neve,4\n", ["ada", "eva"], "there is no task 'eve' among the 2 of the fit; did you mean 'eva'"),
        ("task,rank\nada,2\n", ["ada", "eve"], "has no rank of task 'eve'; name it, or give task_rank for the tasks without one"),
        ("task,rank\nada,0\n", ["ada"], "the rank of task 'ada' is '0'; give a whole number from 1 to 65536"),
        ("task,rank\nada,2.5\n", ["ada"], "the rank of task 'ada' is '2.5'; give a whole number from 1"),
        ("task,rank\nada,many\n", ["ada"], "the rank of task 'ada' is 'many'; give a whole number"),
        ("task,rank\nada,2\nada,2\n", ["ada"], "has the task 'ada' twice; give each once"),
        ("task,ranks\nada,2\n", ["ada"], "has no column 'rank'; give columns task and rank; did you mean 'ranks'"),
    ],
)
def test_files_of_ranks_that_cannot_be_used(content, tasks, message, tmp_path):
    file = tmp_path / "ranks.csv"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        MTLoRA(task_ranks=file).for_tasks(tasks)
    assert str(file) in str(caught.value)


def test_ranks_are_read_from_tables_and_mappings(tmp_path):
    (tmp_path / "ranks.csv").write_text("rank,task\n4,eve\n2,ada\n", encoding="utf-8")
    (tmp_path / "ranks.yaml").write_text("ada: 2\neve: 4\n", encoding="utf-8")
    (tmp_path / "ranks.json").write_text('{"ada": 2, "eve": 4}', encoding="utf-8")
    for name in ("ranks.csv", "ranks.yaml", "ranks.json"):
        adapter = MTLoRA(rank=2, task_ranks=str(tmp_path / name))
        assert tuple(adapter.for_tasks(["ada", "eve"]).task_ranks) == (2, 4)
        assert adapter.for_tasks(None).task_rank == 4
    some = MTLoRA(task_ranks=tmp_path / "ranks.csv", task_rank=8)
    assert tuple(some.for_tasks(["ada", "bob", "eve"]).task_ranks) == (2, 8, 4)
    with pytest.raises(InputError, match=r"task_rank is 8, for tasks without a rank of their own, and task_ranks '.*' names all"):
        some.for_tasks(["ada", "eve"])
    with pytest.raises(InputError, match=r"task_ranks '.*none.csv' cannot be read"):
        MTLoRA(task_ranks=tmp_path / "none.csv").for_tasks(["ada"])


def test_it_is_registered_beside_its_plain_case():
    assert ADAPTERS["mtlora"] is MTLoRA
    assert ADAPTERS["lora_shared_plus_task"] is SharedPlusTaskLoRA
    assert repr(SharedPlusTaskLoRA(rank=4)) == "SharedPlusTaskLoRA(rank=4, alpha=4.0)"

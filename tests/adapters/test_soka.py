"""SoKA: the Kronecker-product SVD, the start in the frozen weight, the product without ΔW, and LoKr as its smallest case."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoKrConfig, get_peft_model
from torch import nn

from bora_pyro import InputError, fit, normal_guide, save_peft
from bora_pyro.adapters import SoKA
from bora_pyro.adapters.layer_gradients import layer_gradients
from bora_pyro.adapters.soka import kronecker_svd, rank_by_energy, rearranged
from bora_pyro.backbone.slots import Slot
from bora_pyro.guides import low_rank_guide
from bora_pyro.runs.saved import load_run
from tests.tiny import of_task, peft_warnings, random_ids, random_weights, tiny_batch, tiny_bora, tiny_data
from tests.tiny_base import command_main, line, quick_fit

SLOT = Slot("q_proj", ("a.q_proj",), 12, 30)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def start_of(adapter, slot=SLOT, weight=None):
    weight = random(slot.out_features, slot.in_features, dtype=torch.float32) if weight is None else weight
    return adapter.start(slot, lambda: weight, torch.Generator().manual_seed(0))


def tensors_of(adapter, slot=SLOT, *, rows=()):
    """The tensors of a layer with latents far from the start."""
    start = start_of(adapter, slot)
    latents = {name: value + 0.3 * random(*rows, *value.shape, dtype=torch.float32) for name, value in start.latents.items()}
    return start.fixed | latents


@pytest.mark.parametrize(("m", "n"), [(5, 3), (5, 4), (1, 1), (30, 12), (2, 6)])
def test_all_products_give_the_matrix_and_some_of_them_miss_the_tail(m, n):
    matrix = random(30, 12)
    sigma, u, v = kronecker_svd(matrix, m, n)
    assert (len(sigma), u.shape[1:], v.shape[1:]) == (min(m * n, 360 // (m * n)), (m, n), (30 // m, 12 // n))
    products = torch.stack([s * torch.kron(a, b) for s, a, b in zip(sigma, u, v, strict=True)])
    torch.testing.assert_close(products.sum(0), matrix)
    for r in range(len(sigma)):
        torch.testing.assert_close((matrix - products[:r].sum(0)).square().sum(), sigma[r:].square().sum())
    assert (u.flatten(1).gather(1, u.flatten(1).abs().argmax(1, keepdim=True)) > 0).all()
    torch.testing.assert_close(u.flatten(1) @ u.flatten(1).mT, torch.eye(len(u), dtype=u.dtype))


def test_a_plain_reshape_would_be_another_matrix():
    u, v = random(5, 3), random(6, 4, seed=1)
    product = torch.kron(u, v)
    torch.testing.assert_close(torch.linalg.matrix_rank(rearranged(product, 5, 3)), torch.tensor(1))
    assert torch.linalg.matrix_rank(product.reshape(15, 24)) > 1


@pytest.mark.parametrize("planted", [1, 2, 5, 8])
@pytest.mark.parametrize("energy", [0.99, 1.0])
def test_energy_finds_a_planted_number_of_products(planted, energy):
    u, v = random(planted, 4, 4), random(planted, 6, 5, seed=1)
    axes = (torch.linalg.qr(value.flatten(1).mT).Q.mT.view_as(value) for value in (u, v))
    values = torch.linspace(3, 2, planted, dtype=torch.float64)
    matrix = sum(s * torch.kron(a, b) for s, a, b in zip(values, *axes, strict=True)) + 1e-3 * random(24, 20, seed=2)
    assert rank_by_energy(kronecker_svd(matrix, 4, 4)[0], energy) == planted


@pytest.mark.parametrize(
    ("values", "energy", "rank"),
    [
        ([3.0, 2.0, 1.0], 9 / 14, 1),  # 9 of 14
        ([3.0, 2.0, 1.0], 0.65, 2),
        ([3.0, 2.0, 1.0], 1.0, 3),  # a straight line has no elbow
        ([1.0, 1.0, 1.0, 1.0], 1.0, 4),
        ([4.0, 1.0, 0.9, 0.8], 1.0, 1),
        ([0.0, 0.0], 0.5, 1),
        ([2.0], 0.5, 1),
    ],
)
def test_rank_by_energy(values, energy, rank):
    assert rank_by_energy(torch.tensor(values), energy) == rank


def test_all_products_reach_any_change():
    adapter, wanted = SoKA(rank=15), random(30, 12, seed=5, dtype=torch.float32)
    start = start_of(adapter)
    sigma, u, v = kronecker_svd(random(30, 12, dtype=torch.float32) + wanted, 5, 3)
    torch.testing.assert_close(adapter.delta(start.fixed | {"sigma": sigma, "U": u, "V": v}), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["weight", "zero"])
@pytest.mark.parametrize(("inputs", "outputs"), [(12, 30), (30, 12), (16, 16), (4, 49), (49, 4), (9, 7)])
def test_the_product_is_that_of_the_dense_change(inputs, outputs, init):
    slot = Slot("x", ("x",), inputs, outputs)
    adapter = SoKA(rank=2, alpha=3.0, init=init)
    tensors = tensors_of(adapter, slot, rows=(5,))
    x = random(5, 7, inputs, seed=9, dtype=torch.float32)
    left, right = adapter.products(tensors)
    dense = torch.stack([sum(map(torch.kron, left[d], right[d])) for d in range(5)])
    torch.testing.assert_close(adapter.delta(tensors), dense)
    torch.testing.assert_close(adapter.output(x, tensors), x @ dense.mT, atol=1e-4, rtol=1e-4)
    if init == "weight":
        sums = [
            torch.stack([sum(s * torch.kron(a, b) for s, a, b in zip(*of, strict=True)) for of in zip(*part, strict=True)])
            for part in (
                (tensors["sigma"], tensors["U"], tensors["V"]),
                ([tensors["start_sigma"]] * 5, [tensors["start_U"]] * 5, [tensors["start_V"]] * 5),
            )
        ]
        torch.testing.assert_close(dense, 1.5 * (sums[0] - sums[1]), atol=1e-5, rtol=1e-5)


def test_the_change_has_the_full_rank_and_few_latents():
    adapter, slot = SoKA(rank=1, init="zero"), Slot("x", ("x",), 64, 64)
    tensors = tensors_of(adapter, slot)
    assert torch.linalg.matrix_rank(adapter.delta(tensors)) == 64
    assert sum(tensors[name].numel() for name in ("U", "V")) == 128
    assert adapter.factors(tensors) is None


@pytest.mark.parametrize("init", ["weight", "zero"])
def test_what_is_kept_for_the_backward_pass(init):
    adapter, slot = SoKA(rank=2, init=init), Slot("x", ("x",), 16, 96)
    terms, (m, n, p, q) = (4 if init == "weight" else 2), adapter.sizes(slot)
    assert (m, n, p, q) == (8, 4, 12, 4)
    assert adapter.kept_per_token(slot) == terms * min(n * p, m * q)
    tensors = tensors_of(adapter, slot, rows=(1,))
    for name in start_of(adapter, slot).latents:
        tensors[name].requires_grad_()
    saved: dict[int, int] = {}
    held = []  # a freed storage would give its address to another one

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = adapter.output(torch.ones(1, 500, 16), tensors)
    of_tokens = sum(numbers for numbers in saved.values() if numbers >= 500 * 16)
    assert result.shape == (1, 500, 96)
    # the products of the first side, and the input, which is kept anyway
    assert of_tokens == 500 * (adapter.kept_per_token(slot) + 16)


@pytest.mark.parametrize("factor", [-1, 4])
def test_one_product_from_zero_is_lokr_of_peft(factor):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(48, 32, bias=False)

        def forward(self, x):
            return self.linear(x)

    config = LoKrConfig(target_modules=["linear"], r=1000, alpha=2500, decompose_factor=factor, init_weights=False)
    with torch.random.fork_rng(devices=[]), peft_warnings():
        torch.manual_seed(0)
        peft = get_peft_model(Layer(), config)
    lokr = peft.base_model.model.linear
    adapter = SoKA(rank=1, alpha=2.5, init="zero", factor=None if factor == -1 else factor)
    slot = Slot("linear", ("linear",), 48, 32)
    latents = start_of(adapter, slot).latents
    u, v = lokr.lokr_w1["default"].detach(), lokr.lokr_w2["default"].detach()
    assert (latents["U"].shape[1:], latents["V"].shape[1:]) == (u.shape, v.shape)
    tensors = {"U": u[None, None], "V": v[None, None]}
    torch.testing.assert_close(adapter.delta(tensors)[0], lokr.get_delta_weight("default").detach())
    x = random(1, 5, 48, dtype=torch.float32)
    with torch.no_grad():
        expected = peft(x) - nn.functional.linear(x, lokr.base_layer.weight)
    torch.testing.assert_close(adapter.output(x, tensors), expected, atol=1e-5, rtol=1e-5)
    # and begins as it does: U at 0, V uniform
    assert not latents["U"].any()
    assert 0.4 * v.shape[1] ** -0.5 < latents["V"].std() < v.shape[1] ** -0.5


def test_the_weight_itself_never_moves_to_zero():
    """Θ begins at the products of the weight: deviations of tasks are around them, and none is around 0."""
    model = tiny_bora("llama", targets=["q_proj", "v_proj"], adapter=SoKA(rank=3))
    batch = tiny_batch()
    fitted = fit(model, tiny_data(), epochs=3, learning_rate=0.01, patience=0)
    theta, mean = fitted.weights()
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
    for name, start in model.starts.items():
        assert (theta[name] - start).norm() < 0.5 * start.norm() * math.sqrt(len(theta[name]))
        assert not torch.equal(mean[name], start)
    start = {name: value.expand(3, *value.shape) for name, value in model.starts.items()}
    assert torch.equal(model.logits(batch, start), model.logits(batch, None))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt"])
def test_rows_of_several_tasks_are_the_tasks_one_by_one(architecture):
    model = tiny_bora(architecture, targets="all-linear", adapter=SoKA(rank=2))
    weights, ids, task = random_weights(model), random_ids(4), torch.tensor([2, 0, 2, 1])
    together = model.backbone.logits(ids, model.change(weights, task))
    for row, d in enumerate(task.tolist()):
        alone = {name: value[None] for name, value in of_task(weights, d).items()}
        expected = model.backbone.logits(ids[row : row + 1], model.change(alone, torch.tensor([0])))
        torch.testing.assert_close(together[row : row + 1], expected, atol=1e-4, rtol=1e-4)


def test_layers_with_ranks_of_their_own():
    weight = sum(random(5, 3, seed=k)[:, None, :, None] * random(6, 4, seed=10 + k)[None, :, None, :] for k in range(2))
    weight = weight.reshape(30, 12).float() + 1e-3 * random(30, 12, seed=30, dtype=torch.float32)
    start = start_of(SoKA(rank=4, energy=0.999), weight=weight)
    assert start.masks["sigma"].tolist() == [True, True, False, False]
    for tensors in (start.latents, start.fixed):
        assert all(not value[2:].any() and value[:2].any() for value in tensors.values())

    model = tiny_bora("llama", targets=["q_proj", "v_proj"], adapter=SoKA(rank=4, energy=0.5))
    active = [mask.flatten(1).sum(1).tolist() for name, mask in model.tensors.masks.items() if name.endswith("sigma")]
    assert any(number < 4 for of_slot in active for number in of_slot)
    batch, start = tiny_batch(), {name: value.expand(3, *value.shape) for name, value in model.starts.items()}
    assert torch.equal(model.logits(batch, start), model.logits(batch, None))
    fitted = fit(model, tiny_data(), guide=normal_guide(model), epochs=2, learning_rate=0.01, patience=0)
    theta, _ = fitted.weights()
    for name, mask in model.tensors.masks.items():
        assert not theta[name].masked_select(~mask.expand_as(theta[name][0])).any()
    with pytest.raises(InputError, match="guide low_rank cannot leave out the entries that SoKA"):
        low_rank_guide(model)


def test_it_leaves_as_lora_matrices_with_their_error(tmp_path):
    model = tiny_bora("llama", targets=["q_proj", "v_proj"], adapter=SoKA(rank=2))
    weights = of_task(random_weights(model), 0)
    errors = [save_peft(tmp_path / str(rank), model, weights, rank=rank) for rank in (1, 8, 32)]
    assert 1 > errors[0] > errors[1] > 0.01
    assert errors[2] < 1e-5


def test_a_run_gives_its_products_again(tmp_path):
    options = quick_fit(tmp_path) | {"adapter": "soka", "rank": 2, "tau": 10, "epochs": 1, "output_dir": tmp_path / "run"}
    assert command_main()([*line(options), "--adapter_option", "energy=0.9"]) == 0
    run = load_run(tmp_path / "run")
    assert run.fitted.model.adapter == SoKA(rank=2, energy=0.9)
    assert run.fitted.evaluate(run.data.test)["test_perplexity"] == pytest.approx(run.metrics["test_perplexity"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rank": 16},
            r"rank 16 is too large for layer q_proj, whose weight is 30 x 12: 15 .* of 5 x 3 and 6 x 4 .*give rank 15",
        ),
        (
            {"factor": 4},
            r"factor 4 does not divide both sizes of layer q_proj, whose weight is 30 x 12; the nearest that does is 3",
        ),
        ({"factor": 100}, "the nearest that does is 6"),
        ({"factor": 6, "rank": 11, "init": "zero"}, r"10 Kronecker products of 6 x 6 and 5 x 2 .*give rank 10 or less"),
    ],
)
def test_what_does_not_fit_a_layer(options, message):
    with pytest.raises(InputError, match=message) as caught:
        start_of(SoKA(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "svd"}, "init is 'svd'; allowed: weight, gradient, zero"),
        ({"factor": 0}, "factor is 0; give a whole number from 1 up"),
        ({"energy": 0.0}, "energy is 0.0; give a share above 0 and at most 1"),
        ({"energy": math.nan}, "energy is nan; give a share above 0 and at most 1"),
        ({"energy": 0.9, "init": "zero"}, "energy is 0.9, but init=zero has no singular values; give init=weight, or no energy"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        SoKA(**options)


def test_layer_gradients_are_those_of_the_weights():
    """Of the mean loss of a token, over batches; also in a layer that stores its weight transposed."""
    for architecture in ("llama", "gpt2"):
        model = tiny_bora(architecture, targets="all-linear")
        backbone, split = model.backbone, tiny_data().train
        found = layer_gradients(backbone, split, token_budget=24)
        backbone.model.requires_grad_(True)
        total, tokens = 0.0, 0
        for n in range(len(split)):
            ids = split.document(n)[None]
            total = total - backbone.model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).sum()
            tokens += ids.shape[1] - 1
        (total / tokens).backward()
        modules = dict(backbone.model.named_modules())
        for slot in backbone.slots:
            for path in slot.paths:
                own = modules[path].weight.grad
                torch.testing.assert_close(found[path], own.mT if slot.fan_in_fan_out else own, atol=1e-5, rtol=1e-3)


def test_it_can_begin_along_the_gradient():
    """ΔW is 0 at the start, and a first step of σ alone goes where the loss falls fastest among r products."""
    weight, gradient = random(30, 12, dtype=torch.float32), random(30, 12, seed=1, dtype=torch.float32)
    adapter = SoKA(rank=3, init="gradient", gradients={"a.q_proj": gradient})
    start = start_of(adapter, weight=weight)
    assert not adapter.delta(start.latents | start.fixed).any()
    sigma = start.latents["sigma"]
    torch.testing.assert_close(sigma.norm(), start_of(SoKA(rank=3), weight=weight).latents["sigma"].norm())
    products = [torch.kron(u, v) for u, v in zip(start.latents["U"], start.latents["V"], strict=True)]
    along = torch.stack([-(product * gradient).sum() for product in products])
    torch.testing.assert_close(along / along.norm(), sigma / sigma.norm(), atol=1e-4, rtol=1e-3)
    best, *_ = kronecker_svd(gradient, *adapter.sizes(SLOT)[:2])
    torch.testing.assert_close(along, best[:3], atol=1e-4, rtol=1e-4)


def test_a_fit_that_begins_along_the_gradient_learns():
    base = tiny_bora(targets=["q_proj"]).backbone
    adapter = SoKA(rank=2, init="gradient", gradients=layer_gradients(base, tiny_data().train))
    model = tiny_bora(targets=["q_proj"], adapter=adapter)
    fitted = fit(model, tiny_data(), epochs=3, learning_rate=0.03, patience=0)
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "gradient"}, r"init is gradient, which needs the gradients of documents; give SoKA\(init='gradient'"),
        ({"gradients": {}}, "gradients are given, but init is weight"),
    ],
)
def test_gradients_and_their_start_belong_together(options, message):
    with pytest.raises(InputError, match=message):
        SoKA(**options)


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({}, r"the gradient of layer a.q_proj is missing; give shape \(30, 12\)"),
        ({"a.q_proj": torch.zeros(12, 30)}, r"is of shape \(12, 30\)"),
    ],
)
def test_every_layer_needs_a_gradient(gradients, message):
    with pytest.raises(InputError, match=message):
        start_of(SoKA(rank=1, init="gradient", gradients=gradients))

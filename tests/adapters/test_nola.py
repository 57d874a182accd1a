"""NOLA: coefficients of random matrices, which a seed gives again in any process, kept or drawn anew in each pass."""

from __future__ import annotations

import hashlib
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.autograd import forward_ad, gradcheck

from bora_pyro import BoRA, HierarchicalNormal, InputError, fit, normal_guide
from bora_pyro.adapters import NOLA, LoRA
from bora_pyro.adapters.nola import SOURCES, SeededSum, draw_bases
from bora_pyro.backbone.slots import Slot
from bora_pyro.inference.memory import estimate_memory
from bora_pyro.predict.linearised import LinearisedBoRA
from bora_pyro.runs.saved import load_run
from tests.tiny import of_task, random_ids, random_weights, tiny_backbone, tiny_bora, tiny_data
from tests.tiny_base import command_main, line, quick_fit

SLOT = Slot("q_proj", ("a.q_proj",), 16, 24)
EVERY_SOURCE = pytest.mark.parametrize("source", SOURCES)


def tensors_of(adapter, slot=SLOT, *, rows=(), seed=0):
    """The tensors of a layer with random coefficients."""
    start = adapter.start(slot, None, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    return start.fixed | {name: torch.randn((*rows, *value.shape), generator=generator) for name, value in start.latents.items()}


@pytest.mark.parametrize(("inputs", "outputs", "rank"), [(16, 24, 1), (16, 24, 4), (16, 24, 16), (64, 4, 4), (1, 1, 4)])
def test_neither_the_rank_nor_the_layer_decides_how_many_latents_there_are(inputs, outputs, rank):
    start = NOLA(rank=rank, bases=7, bases_b=5).start(Slot("x", ("x",), inputs, outputs), None, torch.Generator())
    assert {name: tuple(value.shape) for name, value in start.latents.items()} == {"coefficients_A": (7,), "coefficients_B": (5,)}


def test_at_the_start_b_has_a_gradient_and_a_has_none():
    adapter = NOLA(rank=2, bases=5)
    start = adapter.start(SLOT, None, torch.Generator().manual_seed(0))
    latents = {name: value.requires_grad_() for name, value in start.latents.items()}
    change = adapter.delta(latents | start.fixed)
    assert not change.any()
    change.square().add(change).sum().backward()
    assert latents["coefficients_B"].grad.abs().min() > 0
    assert not latents["coefficients_A"].grad.any()


@EVERY_SOURCE
def test_the_change_is_that_of_the_sums_written_out(source):
    adapter = NOLA(rank=3, alpha=2.0, bases=6, bases_b=4, bases_from=source)
    kept = NOLA(rank=3, alpha=2.0, bases=6, bases_b=4).start(SLOT, None, torch.Generator().manual_seed(0)).fixed
    tensors = tensors_of(adapter, rows=(5,))
    a = kept["start_A"] + torch.einsum("dk,kri->dri", tensors["coefficients_A"], kept["bases_A"])
    b = torch.einsum("dl,lor->dor", tensors["coefficients_B"], kept["bases_B"])
    torch.testing.assert_close(adapter.delta(tensors), 2 / 3 * b @ a)
    x = torch.randn((5, 7, 16), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(adapter.output(x, tensors), 2 / 3 * x @ (b @ a).mT, atol=1e-5, rtol=1e-5)
    # the gradient of A with respect to a coefficient is its matrix
    jacobian = torch.autograd.functional.jacobian(
        lambda c: adapter.factors(tensors | {"coefficients_A": c}).lora_A, tensors["coefficients_A"][0]
    )
    torch.testing.assert_close(jacobian.movedim(-1, 0), kept["bases_A"])


@pytest.mark.parametrize(("number", "shape"), [(1, (3, 5)), (300, (8, 16)), (7, (1, 1))])
def test_parts_of_any_size_are_the_same_matrices(number, shape, monkeypatch):
    whole = torch.cat(list(draw_bases(11, number, shape)))
    for chunk in (1, 100, 1000):
        monkeypatch.setattr("bora_pyro.adapters.nola.CHUNK", chunk)
        parts = list(draw_bases(11, number, shape))
        assert all(part.numel() <= max(chunk, math.prod(shape)) for part in parts)
        assert torch.equal(torch.cat(parts), whole)


def test_entries_are_uniform_with_one_over_the_root_of_their_number():
    bases = torch.cat(list(draw_bases(0, 400, (16, 16))))
    assert bases.abs().max() <= 1 / 20
    assert bases.std() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.01)
    # so that the variance of an entry of A does not depend on k: 1/(3τ)
    for number in (50, 800):
        of_entry = torch.cat(list(draw_bases(0, number, (16, 16)))).square().sum(0)
        assert float(of_entry.mean()) == pytest.approx(1 / 3, rel=0.02)


def test_a_sum_by_seed_has_the_right_derivatives(monkeypatch):
    monkeypatch.setattr("bora_pyro.adapters.nola.CHUNK", 40)
    coefficients = torch.randn((2, 9), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert gradcheck(lambda c: SeededSum.apply(c, 5, (4, 5)), coefficients)
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", message="`torch.jit.script", category=DeprecationWarning)  # torch's own use of it
        dual = forward_ad.make_dual(coefficients.detach(), torch.ones(2, 9, dtype=torch.float64))
        tangent = forward_ad.unpack_dual(SeededSum.apply(dual, 5, (4, 5))).tangent
    torch.testing.assert_close(tangent[0], torch.cat(list(draw_bases(5, 9, (4, 5)))).sum(0).double())


def test_kept_or_drawn_again_the_fit_is_the_same():
    models = [
        tiny_bora("llama", targets="all-linear", adapter=NOLA(2, bases=20, bases_from=source)) for source in ("memory", "seed")
    ]
    weights, batch = random_weights(models[0]), tiny_data().train.batches()[0]
    torch.testing.assert_close(models[0].logits(batch, weights), models[1].logits(batch, weights), atol=1e-4, rtol=1e-4)
    state = torch.random.get_rng_state()
    fitted = [fit(model, tiny_data(), epochs=2, learning_rate=0.03, token_budget=30, patience=0) for model in models]
    torch.testing.assert_close(fitted[0].weights(), fitted[1].weights(), atol=1e-4, rtol=1e-3)
    assert fitted[0].history[-1]["loss"] < fitted[0].history[0]["loss"]
    assert torch.equal(torch.random.get_rng_state(), state)
    # what is kept: A₀, and all bases or two seeds and a size
    numbers = [sum(value.numel() for value in model.fixed.values()) for model in models]
    slots = models[0].backbone.slots
    starts = sum(slot.layers * 2 * slot.in_features for slot in slots)
    assert numbers[1] == starts + sum(3 * slot.layers for slot in slots)
    assert numbers[0] == starts + sum(slot.layers * 20 * 2 * (slot.in_features + slot.out_features) for slot in slots)


@EVERY_SOURCE
def test_with_enough_bases_any_lora_is_one(source):
    adapter = NOLA(rank=2, bases=2 * 16 + 8, bases_b=2 * 24 + 8, bases_from=source)
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn((2, 16), generator=generator), torch.randn((24, 2), generator=generator)
    kept = NOLA(rank=2, bases=40, bases_b=56).start(SLOT, None, torch.Generator().manual_seed(0)).fixed
    fixed = adapter.start(SLOT, None, torch.Generator().manual_seed(0)).fixed
    solved = {}
    for side, target in (("A", a - kept["start_A"]), ("B", b)):
        matrices = kept[f"bases_{side}"].double().flatten(1).mT
        solved[f"coefficients_{side}"] = torch.linalg.lstsq(matrices, target.double().view(-1, 1)).solution[:, 0]
    delta = adapter.delta(solved | fixed)
    torch.testing.assert_close(delta, LoRA(2).delta({"lora_A": a, "lora_B": b}).double(), atol=1e-5, rtol=1e-5)


#: A process of its own, which is given the seed and the coefficients, and says what ΔW is.
_AGAIN = """
import hashlib, sys, torch
from safetensors.torch import load_file
from bora_pyro.adapters import NOLA
from bora_pyro.backbone.slots import Slot
torch.manual_seed(99), torch.rand(5)
for source in sys.argv[2:]:
    adapter = NOLA(rank=3, bases=50, bases_from=source)
    fixed = adapter.start(Slot("q_proj", ("a.q_proj",), 16, 24), None, torch.Generator().manual_seed(0)).fixed
    delta = adapter.delta(fixed | load_file(f"{sys.argv[1]}/{source}.safetensors"))
    print(hashlib.sha256(delta.numpy().tobytes()).hexdigest())
"""


def test_coefficients_and_seed_give_the_same_bits_in_another_process(tmp_path):
    bits = []
    for source in SOURCES:
        adapter = NOLA(rank=3, bases=50, bases_from=source)
        tensors = tensors_of(adapter)
        latents = {name: value for name, value in tensors.items() if name.startswith("coefficients")}
        save_file(latents, tmp_path / f"{source}.safetensors")
        bits.append(hashlib.sha256(adapter.delta(tensors).numpy().tobytes()).hexdigest())
    words = [sys.executable, "-c", _AGAIN, str(tmp_path), *SOURCES]
    found = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert found.stdout.split() == bits


@EVERY_SOURCE
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_rows_of_several_tasks_are_the_tasks_one_by_one(architecture, source):
    model = tiny_bora(architecture, targets="all-linear", adapter=NOLA(2, bases=12, bases_from=source))
    weights, ids, task = random_weights(model, scale=1.0), random_ids(4), torch.tensor([2, 0, 2, 1])
    together = model.backbone.logits(ids, model.change(weights, task))
    for row, d in enumerate(task.tolist()):
        alone = {name: value[None] for name, value in of_task(weights, d).items()}
        expected = model.backbone.logits(ids[row : row + 1], model.change(alone, torch.tensor([0])))
        torch.testing.assert_close(together[row : row + 1], expected, atol=1e-4, rtol=1e-4)


@EVERY_SOURCE
def test_sums_are_float32_where_the_layer_is_bfloat16(source):
    adapter = NOLA(2, bases=40, bases_from=source)
    tensors = tensors_of(adapter, rows=(3,))
    x = torch.randn((3, 5, 16), generator=torch.Generator().manual_seed(0))
    half = adapter.output(x.bfloat16(), tensors)
    assert half.dtype == torch.bfloat16
    both = adapter.factors(tensors)
    expected = x.bfloat16() @ both.lora_A.bfloat16().mT @ both.lora_B.bfloat16().mT
    torch.testing.assert_close(half, expected, atol=0.1, rtol=0.02)


@EVERY_SOURCE
def test_it_can_be_linearised_and_has_a_mean_field_posterior(source):
    model = tiny_bora(adapter=NOLA(2, bases=12, bases_from=source), prior=HierarchicalNormal(tau=10))
    fitted = fit(model, tiny_data(), guide=normal_guide(model), epochs=2, learning_rate=0.03, patience=0)
    theta, _ = fitted.weights()
    linear, batch = LinearisedBoRA(model, theta), tiny_data().train.batches()[0]
    steps = [linear.logits(batch, {name: value + k / 10 for name, value in theta.items()}) for k in (0, 1, 2)]
    torch.testing.assert_close(steps[2] - steps[1], steps[1] - steps[0], atol=1e-4, rtol=1e-3)
    assert (steps[1] - steps[0]).abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_of_a_batch_has_the_matrices_of_its_rows(checkpointing, monkeypatch):
    model = BoRA(tiny_backbone("opt", gradient_checkpointing=checkpointing), 3, adapter=NOLA(2, bases=9))
    whole = estimate_memory(model, tiny_data())
    formed = sum(slot.layers * 2 * (slot.in_features + slot.out_features) for slot in model.backbone.slots)
    monkeypatch.setattr(NOLA, "kept_per_row", LoRA.kept_per_row)
    less = estimate_memory(model, tiny_data())
    rows = int(sum(tiny_data().train.documents_per_task))
    # one of the two decoder layers is recomputed at a time; otherwise a quarter is added for unused memory
    expected = 4 * rows * formed * (1 / 2 if checkpointing else 1.25)
    assert whole.activations - less.activations == pytest.approx(expected, abs=1)
    assert (whole.state, whole.logits) == (less.state, less.logits)


@EVERY_SOURCE
def test_a_run_has_no_bases_and_gives_them_again(source, tmp_path):
    options = quick_fit(tmp_path) | {"adapter": "nola", "rank": 2, "tau": 10, "epochs": 1, "output_dir": tmp_path / "run"}
    words = [*line(options), "--adapter_option", "bases=9", f"bases_from={source}"]
    assert command_main()(words) == 0
    tensors = load_file(tmp_path / "run" / "posterior.safetensors")
    assert all(
        value.numel() <= 64 or name.endswith(("coefficients_A", "coefficients_B")) or "decentered" in name
        for name, value in tensors.items()
    )
    run = load_run(tmp_path / "run")
    adapter = NOLA(2, bases=9, bases_from=source)
    assert run.fitted.model.adapter == adapter
    own = BoRA(run.fitted.model.backbone, 2, adapter=adapter, seed=run.config.seed)
    assert own.fixed.keys() == run.fitted.model.fixed.keys()
    assert all(torch.equal(value, run.fitted.model.fixed[name]) for name, value in own.fixed.items())
    assert run.fitted.evaluate(run.data.test)["test_perplexity"] == pytest.approx(run.metrics["test_perplexity"], rel=1e-6)
    # the bases of another seed are recognised
    file = tmp_path / "run" / "config.yaml"
    file.write_text(re.sub(r"(?m)^seed: \d+", "seed: 77", file.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(InputError, match=r"fixed tensor .* of NOLA.* is not that of the run"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bases": 0}, "bases is 0; give a whole number from 1 up"),
        ({"bases_b": -1}, "bases_b is -1; give a whole number from 1 up"),
        ({"bases_from": "seeds"}, "bases_from is 'seeds'; allowed: memory, seed; did you mean 'seed'?"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        NOLA(**options)

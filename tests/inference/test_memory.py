"""The predicted memory: its parts, and what each depends on."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bora_pyro import Backbone, BoRA, LoRA, TaskData
from bora_pyro.adapters import ADAPTERS
from bora_pyro.backbone.head import CHUNK_ENTRIES
from bora_pyro.data import TokenSplit
from bora_pyro.guides import map_guide
from bora_pyro.inference.layer_memory import layers_of
from bora_pyro.inference.loop import Loop
from bora_pyro.inference.memory import MemoryEstimate, base_bytes, estimate_memory, peak_memory_bytes
from bora_pyro.priors import HierarchicalNormal, Independent, LearnedPrecision, Pooled
from tests.tiny import tiny_adapter, tiny_backbone

PRIORS = [HierarchicalNormal(tau=100), HierarchicalNormal(form="centered"), Independent(), Pooled(), LearnedPrecision()]


def data_of(tasks, *, documents=12, tokens=8):
    """Documents of one length, so that batches have the same shape whatever the number of tasks."""
    split = TokenSplit.from_documents([[5] * tokens] * documents, task=[n % tasks for n in range(documents)], num_tasks=tasks)
    return TaskData([f"task {d}" for d in range(tasks)], split, split, split)


def estimate(tasks=3, *, rank=2, architecture="llama", checkpointing=False, prior=None, **options):
    backbone = tiny_backbone(architecture, gradient_checkpointing=checkpointing, num_hidden_layers=8)
    model = BoRA(backbone, tasks, adapter=LoRA(rank=rank), prior=prior)
    return estimate_memory(model, data_of(tasks), **{"token_budget": 96} | options)


def test_the_parts_add_up_and_are_all_shown():
    found = estimate(process=5 * 2**30)
    assert found.total == sum(dataclasses.asdict(found).values())
    assert found.process == 5 * 2**30
    sizes = (2**30, 2**31, 2**29, 2**28, 2**30)
    assert str(MemoryEstimate(*sizes)) == (
        "about 4.8 GiB = process 1.0 + base 2.0 + adapters and optimiser 0.5 + activations 0.2 + logits 1.0"
    )
    assert "process" not in str(MemoryEstimate(0, *sizes[1:]))


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_state_is_the_bytes_of_the_tensors_of_a_fit(adapter, prior):
    model = BoRA(tiny_backbone("opt"), 3, adapter=tiny_adapter(adapter), prior=prior)
    data = data_of(3)
    options = {"warmup": 0.0, "accumulate": 1, "gradient_clip": 1.0, "seed": 0, "epochs": 1, "learning_rate": 0.01}
    loop = Loop(model, data, map_guide(model), token_budget=32, **options)
    batch = data.train.batches(token_budget=32)[0]
    loop.step([batch], 0.01, 0)
    loop.backward(batch, validate=False)
    theta, _ = loop.fitted.weights()
    moments = [loop.state.optimizer.state[p][key] for p in loop.state.shared for key in ("exp_avg", "exp_avg_sq")]
    best = [value for name, value in loop.state.best.items() if name in loop.state.parameters]
    gradients = [p.grad for p in loop.state.shared]
    means = [loop.state.mean.values[name] for name in loop.state.parameters]
    held = [*loop.state.shared, *moments, *best, *means, *model.starts.values()]
    held += [value for store in (model.fixed, model.tensors.buffers, model.tensors.masks) for value in store.values()]
    every_task = sum(4 * value.numel() for value in theta.values())
    throughout = sum(t.numel() * t.element_size() for t in held) + every_task
    in_backward = sum(t.numel() * t.element_size() for t in gradients) + every_task
    assert estimate_memory(model, data, token_budget=32).state == throughout + in_backward


def test_the_state_is_linear_in_the_number_of_tasks():
    four, eight, twelve = (estimate(tasks, rank=64).state for tasks in (100, 200, 300))
    assert eight - four == twelve - eight > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_and_logits_do_not_depend_on_the_number_of_tasks(checkpointing):
    few, many = (estimate(tasks, checkpointing=checkpointing) for tasks in (2, 12))
    assert (few.activations, few.logits, few.base) == (many.activations, many.logits, many.base)
    assert few.state < many.state


def test_the_base_is_counted_as_it_is_stored():
    backbone = tiny_backbone("llama")
    numbers = sum(p.numel() for p in backbone.model.parameters()) + sum(b.numel() for b in backbone.model.buffers())
    assert base_bytes(backbone) >= 4 * numbers - 4 * backbone.model.get_input_embeddings().weight.numel()
    assert base_bytes(backbone) <= 4 * numbers
    full = base_bytes(backbone)
    backbone.model.to(torch.bfloat16)
    assert full / 2 <= base_bytes(backbone) < 0.55 * full


# what autograd keeps of a token in a layer, counted by hooks on the saved tensors of a larger model: in units of h, k and f
KEPT = {
    ("opt", None): (7, 0, 1, 2),
    ("opt", "all-linear"): (8, 0, 1, 6),
    ("llama", None): (5, 2, 3, 2),
    ("llama", "all-linear"): (6, 2, 4, 7),
    ("gpt2", None): (7, 0, 4, 1),
}


@pytest.mark.parametrize("setting", KEPT, ids=str)
def test_what_a_layer_keeps(setting):
    architecture, targets = setting
    model = BoRA(tiny_backbone(architecture, targets=targets), 2, adapter=LoRA(rank=2))
    config = model.backbone.model.config
    width, inner = 32, 128 if architecture == "gpt2" else 48
    keys = 16 if architecture == "llama" else width
    hidden, kv, feed_forward, ranks = KEPT[setting]
    layers = layers_of(model)
    assert (layers.hidden, layers.inner, layers.keys, layers.number) == (width, inner, keys, config.num_hidden_layers)
    assert layers.layer() == 4 * (hidden * width + kv * keys + feed_forward * inner + 2 * ranks)


def test_checkpointing_and_chunks_need_less(monkeypatch):
    plain, checkpointed = estimate(), estimate(checkpointing=True)
    monkeypatch.setitem(CHUNK_ENTRIES, "cpu", 1)  # chunks of 64 tokens, the least
    chunked = estimate()
    assert checkpointed.total < plain.total
    assert chunked.total <= plain.total
    assert chunked.logits == 3 * 4 * 64 * 64 < plain.logits


def test_an_accelerator_needs_the_largest_phase_and_a_cpu_their_sum(monkeypatch):
    model = BoRA(tiny_backbone("llama"), 3)
    on_cpu = estimate_memory(model, data_of(3), token_budget=96)
    monkeypatch.setattr(Backbone, "device", torch.device("cuda"))
    on_gpu = estimate_memory(model, data_of(3), token_budget=96)
    assert on_gpu.total < on_cpu.total
    assert on_gpu.base == on_cpu.base
    assert all(getattr(on_gpu, part) <= value for part, value in vars(on_cpu).items())


def test_the_peak_is_that_of_the_process():
    assert peak_memory_bytes(torch.device("cpu")) > 2**27

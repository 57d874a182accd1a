"""Tiny random language models and documents, and PEFT as the reference that adapters are compared with."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from bora_pyro import Backbone, BoRA, LoRA, TaskData
from bora_pyro.adapters import ADAPTERS
from bora_pyro.data import TokenSplit
from bora_pyro.options.members import build_member

VOCABULARY, WIDTH, TASKS = 64, 32, 3

_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "initializer_range": 0.2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_LLAMA = {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
_OPT = {**_SIZES, "ffn_dim": 48}

#: Model type and configuration by the name that the tests give them.
ARCHITECTURES = {
    "opt": ("opt", {**_OPT, "word_embed_proj_dim": WIDTH, "init_std": 0.2}),
    # as facebook/opt-350m: norms after the blocks, and an embedding narrower than the blocks
    "opt-350m": ("opt", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "init_std": 0.2}),
    "gpt2": ("gpt2", {**_SIZES, "n_positions": 32}),
    "llama": ("llama", _LLAMA),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 4}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _LLAMA),
    "gemma": ("gemma", _LLAMA),
    "gemma2": ("gemma2", {**_LLAMA, "query_pre_attn_scalar": 8, "sliding_window": 4}),
}


def tiny_model(architecture="opt", *, seed=0, **changes):
    """A causal language model with random weights, in evaluation mode."""
    model_type, sizes = ARCHITECTURES[architecture]
    config = AutoConfig.for_model(model_type, **{**sizes, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def tiny_backbone(architecture="opt", *, targets=None, gradient_checkpointing=False, **changes):
    return Backbone(tiny_model(architecture, **changes), targets=targets, gradient_checkpointing=gradient_checkpointing)


def tiny_adapter(name, **usual):
    """An adapter by its name, of rank 2. It gets those of the given arguments that it has."""
    return build_member("adapter", ADAPTERS, name, usual={"rank": 2} | usual)


def tiny_bora(architecture="opt", *, targets=None, tasks=TASKS, adapter=None, **options):
    """BoRA of rank 2 and scale 1.5 on a tiny model."""
    return BoRA(tiny_backbone(architecture, targets=targets), tasks, adapter=adapter or LoRA(rank=2, alpha=3.0), **options)


def random_ids(rows=3, tokens=7, *, seed=0):
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def random_weights(model, *, scale=0.3, seed=0):
    """θ of all tasks, (D, layers, *shape) by name, far from any start."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn((model.num_tasks, *start.shape), generator=generator) for name, start in model.starts.items()
    }


def of_task(weights, d):
    """One task's weights, (layers, *shape) by name."""
    return {name: value[d] for name, value in weights.items()}


def tiny_split(counts=(3, 1, 4), *, seed=0, longest=9):
    """`counts[d]` documents of unequal length for each task d, in mixed order."""
    generator = torch.Generator().manual_seed(seed)
    task = [d for d, count in enumerate(counts) for _ in range(count)]
    task = [task[n] for n in torch.randperm(len(task), generator=generator).tolist()]
    lengths = torch.randint(2, longest + 1, (len(task),), generator=generator).tolist()
    documents = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return TokenSplit.from_documents(documents, task=task, num_tasks=len(counts), pad_token_id=1)


def tiny_batch(counts=(3, 1, 4), *, seed=0):
    """All documents of a tiny split as one batch."""
    [batch] = tiny_split(counts, seed=seed).batches(token_budget=10_000)
    return batch


def tiny_questions(counts=(3, 1, 4), *, seed=0):
    """`counts[d]` questions for each task d, in mixed order: two to four options, whose rows do not lie together."""
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    def ids(length):
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    rows, read, task, document, correct = [], [], [], [], []
    for question, d in enumerate(d for d, count in enumerate(counts) for _ in range(count)):
        prompt, options = [0, *ids(number(1, 4))], number(2, 4)
        right = number(0, options - 1)
        for option in range(options):
            rows.append([*prompt, *ids(number(1, 3)), 2])
            for column, value in zip((read, task, document, correct), (len(prompt), d, question, option == right), strict=True):
                column.append(value)
    order = torch.randperm(len(rows), generator=generator).tolist()
    columns = ([column[n] for n in order] for column in (rows, task, read, document, correct))
    rows, task, read, document, correct = columns
    more = {"read": read, "document_index": document, "correct": correct, "pad_token_id": 1}
    return TokenSplit.from_documents(rows, task=task, num_tasks=len(counts), **more)


def tiny_data(counts=(3, 1, 4)):
    """Tasks whose three splits are drawn alike."""
    train, validation, test = (tiny_split(counts, seed=seed) for seed in range(3))
    return TaskData([f"task {d}" for d in range(len(counts))], train, validation, test)


def peft_model(model, weights, targets=None):
    """PEFT's own LoRA on a copy of the base of `model`, with one task's `weights`, (layers, *shape) by name.

    `targets` is given to PEFT as it is, so that PEFT finds the layers its own way.
    """
    backbone = model.backbone
    config = LoraConfig(
        r=model.adapter.rank,
        lora_alpha=model.adapter.alpha,
        target_modules=targets or [slot.name for slot in backbone.slots],
        fan_in_fan_out=backbone.slots[0].fan_in_fan_out,
        lora_dropout=0.0,
    )
    with peft_warnings():
        peft = get_peft_model(copy.deepcopy(backbone.model), config).eval()
    layers = dict(peft.base_model.model.named_modules())
    found = {path for path, module in layers.items() if hasattr(module, "lora_A")}
    assert found == {path for slot in backbone.slots for path in slot.paths}
    for slot in backbone.slots:
        for layer, path in enumerate(slot.paths):
            latents = {name: weights[f"{slot.name}.{name}"][layer] for name in model.tensors.names(slot)}
            for name, value in model.tensors.at_layer(slot, layer, latents).items():
                getattr(layers[path], name)["default"].weight.data.copy_(value)
    return peft


def loaded_peft(base, folder):
    """PEFT's own reading of a folder, on a copy of `base`."""
    with peft_warnings():
        return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


@contextmanager
def peft_warnings():
    """No warning of PEFT's own making is an error within."""
    # PEFT reads an attribute that transformers has renamed: theirs to settle
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def hooks_left(backbone):
    """Number of hooks and replaced forwards on the modules of the base."""
    modules = list(backbone.model.modules())
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in vars(module)) for module in modules)

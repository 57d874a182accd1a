"""Continuation of prompts by the adapters of several tasks in one batch, with ``generate`` of transformers and its cache.

>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
>>> fitted = bp.fit(bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2)), bp.load_tasks(bp.table(table), backbone.tokenizer), epochs=1)
>>> written = generate_side_by_side(fitted, ["A tree", "The end of"], ["ada", "bob", "base"], max_new_tokens=3)
>>> [(text.prompt, text.task, len(text.tokens)) for text in written][:3]
[('A tree', 'ada', 3), ('A tree', 'bob', 3), ('A tree', 'base', 3)]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bora_pyro.backbone.backbone import Change
from bora_pyro.backbone.slots import Slot
from bora_pyro.backbone.texts import tokenizer_of
from bora_pyro.errors import InputError
from bora_pyro.inference.fitted import Fitted
from bora_pyro.model import Weights
from bora_pyro.predict.authors import Authors
from bora_pyro.predict.mixture_text import check_generation, prompt_tokens
from bora_pyro.predict.write import write


@dataclass(frozen=True)
class Continuation:
    """A generated continuation of a prompt, and the author whose adapter generated it.

    Attributes:
        prompt: the prompt.
        task: name of the author: a task, Θ or the base.
        sample: index of the sample, from 0.
        text: the continuation without special tokens.
        tokens: (tokens,) int64, the continuation. The last token is the end token if the model generated one.
        log_prob: (tokens,) log-probability of each token under the adapter, in nats, at temperature 1.
    """

    prompt: str
    task: str
    sample: int
    text: str
    tokens: Tensor
    log_prob: Tensor


@torch.inference_mode()
def generate_side_by_side(
    fitted: Fitted,
    prompts: str | Sequence[str],
    tasks: Sequence[str],
    *,
    samples: int = 1,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    raw: bool = False,
) -> list[Continuation]:
    """Continue each prompt with the adapter of each task, at the centre of the guide, in one batch.

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
        >>> fitted = bp.fit(bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2)), data, epochs=1)
        >>> texts = generate_side_by_side(fitted, "A tree", ["ada", "global-mean"], samples=2, temperature=0.8, max_new_tokens=4)
        >>> [(text.task, text.sample) for text in texts]
        [('ada', 0), ('ada', 1), ('global-mean', 0), ('global-mean', 1)]

    Args:
        fitted: the fitted model.
        prompts: one prompt or several. An empty prompt is the start of a document. If the fit used chats, a prompt is a user's
            message, and the continuation is the answer.
        tasks: names of tasks or of their folders. ``base`` is the base without an adapter. ``global-mean`` or ``Θ`` is Θ. If a
            task has the name ``base`` or ``global-mean``, the name means the task, and the base or Θ is ``plain base`` or
            ``plain global-mean``. Repeated names count once. A routed model needs no task: its name is ``routed``.
        samples: number of continuations of each prompt by each task.
        max_new_tokens: largest number of new tokens. A continuation also ends where the context of the base is full.
        temperature: 0 takes the most probable token. Above 0, tokens are sampled with probabilities ∝ p^(1/temperature). The
            base's own ``generation_config`` is ignored.
        top_p: sample only from the most probable tokens whose probabilities sum to this (nucleus sampling).
        seed: seed of the samples. The samples also depend on the other rows of the batch.
        raw: treat prompts as beginnings of texts, also if the fit used chats.

    Returns:
        One continuation for each prompt, task and sample, in this order.

    Raises:
        InputError: if a task is unknown, there is no prompt, the base cannot write with ``generate`` what it predicts, or as for
            :func:`~bora_pyro.predict.mixture_text.generate`.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    check_generation(max_new_tokens, temperature)
    if not prompts or not tasks:
        raise InputError("give a prompt and a task, one or more of each")
    if samples < 1 or (samples > 1 and temperature == 0):
        raise InputError(
            f"samples is {samples} at temperature {temperature:g}; give 1, or a temperature above 0 for different ones"
        )
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; give a probability above 0, up to 1")
    backbone, authors = fitted.model.backbone, Authors(fitted.tasks, routed=fitted.model.router.reads_all_tasks)
    tokenizer = tokenizer_of(backbone, "read and write texts with")
    tasks = list(dict.fromkeys(map(authors.resolve, [tasks] if isinstance(tasks, str) else tasks)))
    weights, row_of, task_of = _weights(fitted, tasks, authors)
    template = None if raw else fitted.chat_template
    encoded = [prompt_tokens(backbone, tokenizer, prompt, template) for prompt in prompts]
    requests = [(n, task, sample) for n in range(len(prompts)) for task in tasks for sample in range(samples)]
    sampled = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {"do_sample": False}

    def change_of(group: Sequence[int]) -> Change:
        rows = torch.tensor([row_of[requests[i][1]] for i in group], device=backbone.device)
        of_row = rows.clamp(min=0)
        return _except_base_rows(fitted.model.change(weights, of_row, task_of.to(rows.device)[of_row]), rows < 0)

    written = write(
        backbone, [encoded[n] for n, _, _ in requests], change_of, max_new_tokens=max_new_tokens, sampling=sampled, seed=seed
    )
    return [
        Continuation(prompts[n], task, sample, tokenizer.decode(tokens, skip_special_tokens=True), tokens, log_prob)
        for (n, task, sample), (tokens, log_prob) in zip(requests, written, strict=True)
    ]


def _weights(fitted: Fitted, tasks: Sequence[str], authors: Authors) -> tuple[Weights, dict[str, int], Tensor]:
    """θ of the given tasks and Θ, as (rows, layers, *shape) by name; the row of each author; and the task of each row.

    The base has row −1. Θ has the task −1. A routed model has the weights of all tasks, and reads each row by any of them.
    """
    if authors.routed is not None:
        every, _ = fitted.weights()
        return every, {authors.base: -1, authors.routed: 0}, torch.zeros(1, dtype=torch.int64)
    index = sorted({authors.tasks[task] for task in tasks if task in authors.tasks})
    theta, mean = fitted.weights_of()(torch.tensor(index or [0]))
    weights = {name: torch.cat([value[: len(index)], mean[name][None]]) for name, value in theta.items()}
    rows = {task: index.index(authors.tasks[task]) for task in tasks if task in authors.tasks}
    return weights, {authors.base: -1, authors.mean: len(index)} | rows, torch.tensor([*index, -1])


def _except_base_rows(change: Change, is_base: Tensor) -> Change:
    """The same change, except that the rows of the base stay unchanged."""
    if not is_base.any():
        return change

    def changed(slot: Slot, layer: int, x: Tensor, output: Tensor) -> Tensor:
        # copied first, because the change may work in place
        own = output[is_base.to(output.device)].clone()
        result = change(slot, layer, x, output).clone()
        result[is_base.to(result.device)] = own.to(result)
        return result

    return changed

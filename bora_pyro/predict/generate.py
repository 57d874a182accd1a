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

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from bora_pyro.backbone.backbone import Change
from bora_pyro.backbone.slots import Slot
from bora_pyro.backbone.texts import tokenizer_of
from bora_pyro.errors import InputError
from bora_pyro.inference.fitted import Fitted
from bora_pyro.model import Weights
from bora_pyro.predict.authors import Authors
from bora_pyro.predict.mixture_text import check_generation, end_tokens, prompt_tokens


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
            ``plain global-mean``. Repeated names count once.
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
        InputError: if a task is unknown, there is no prompt, or as for :func:`~bora_pyro.predict.mixture_text.generate`.
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
    backbone, authors = fitted.model.backbone, Authors(fitted.tasks)
    tokenizer = tokenizer_of(backbone, "read and write texts with")
    tasks = list(dict.fromkeys(map(authors.resolve, [tasks] if isinstance(tasks, str) else tasks)))
    weights, row_of = _weights(fitted, tasks, authors)
    template = None if raw else fitted.chat_template
    encoded = [prompt_tokens(backbone, tokenizer, prompt, template) for prompt in prompts]
    requests = [(n, task, sample) for n in range(len(prompts)) for task in tasks for sample in range(samples)]
    sampled = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {"do_sample": False}
    ends, written = end_tokens(backbone, tokenizer), dict[int, Continuation]()
    with torch.random.fork_rng(), _without_own_settings(backbone.model):
        torch.manual_seed(seed)
        lengths = [len(encoded[n]) for n, _, _ in requests]
        for new_tokens, group in _by_new_tokens(lengths, max_new_tokens, backbone.context).items():
            input_ids, mask = _left_padded([encoded[requests[i][0]] for i in group], tokenizer)
            config = GenerationConfig(
                max_new_tokens=new_tokens, pad_token_id=_pad(tokenizer), eos_token_id=sorted(ends) or None,
                return_dict_in_generate=True, output_logits=True, **sampled,
            )  # fmt: skip
            rows = torch.tensor([row_of[requests[i][1]] for i in group], device=backbone.device)
            change = _except_base_rows(fitted.model.change(weights, rows.clamp(min=0)), rows < 0)
            with backbone.changed(change, len(group)) as model:
                output = model.generate(
                    input_ids=input_ids.to(backbone.device), attention_mask=mask.to(backbone.device), generation_config=config
                )
            new = output.sequences[:, input_ids.shape[1] :].cpu()
            log_p = torch.stack([step.float().log_softmax(-1).cpu() for step in output.logits], 1)  # (rows, tokens, vocabulary)
            new_log_p = log_p.gather(2, new[..., None])[..., 0]
            for i, tokens, log_prob in zip(group, new, new_log_p, strict=True):
                n, task, sample = requests[i]
                length = _length(tokens, ends)
                text = tokenizer.decode(tokens[:length], skip_special_tokens=True)
                written[i] = Continuation(prompts[n], task, sample, text, tokens[:length], log_prob[:length])
    return [written[i] for i in range(len(requests))]


def _weights(fitted: Fitted, tasks: Sequence[str], authors: Authors) -> tuple[Weights, dict[str, int]]:
    """θ of the given tasks and Θ, as (rows, layers, *shape) by name, and the row of each author; the base has row −1."""
    index = sorted({authors.tasks[task] for task in tasks if task in authors.tasks})
    theta, mean = fitted.weights_of()(torch.tensor(index or [0]))
    weights = {name: torch.cat([value[: len(index)], mean[name][None]]) for name, value in theta.items()}
    rows = {task: index.index(authors.tasks[task]) for task in tasks if task in authors.tasks}
    return weights, {authors.base: -1, authors.mean: len(index)} | rows


def _by_new_tokens(lengths: Sequence[int], max_new_tokens: int, context: int | None) -> dict[int, list[int]]:
    """Group prompts by the number of tokens that fit behind them, so that a long prompt does not shorten other continuations.

    Returns:
        The indices of the prompts, by number of new tokens.
    """
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        new_tokens = max_new_tokens if context is None else min(max_new_tokens, context - length)
        groups.setdefault(new_tokens, []).append(index)
    return groups


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Remove the model's own generation settings for the duration of the context.

    transformers merges them with the settings of a call. A base's repetition penalty or beam search would change the result.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


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


def _left_padded(documents: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (rows, tokens), of documents padded on the left."""
    longest = max(len(document) for document in documents)
    input_ids = torch.full((len(documents), longest), _pad(tokenizer))
    mask = torch.zeros_like(input_ids)
    for row, document in enumerate(documents):
        input_ids[row, longest - len(document) :] = document
        mask[row, longest - len(document) :] = 1
    return input_ids, mask


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(number for number in ids if number is not None)


def _length(tokens: Tensor, ends: Collection[int]) -> int:
    """Number of tokens up to and including the end token, or of all tokens if there is none. Padding follows the end token."""
    return next((n + 1 for n, token in enumerate(tokens.tolist()) if token in ends), len(tokens))

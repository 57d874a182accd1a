"""Prompts continued by several tasks' adapters in one batch, through ``generate`` of transformers and its cache.

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
from bora_pyro.predict.authors import Writers
from bora_pyro.predict.mixture_text import check_generation, end_tokens, prompt_tokens


@dataclass(frozen=True)
class Written:
    """A text and who has written it.

    Attributes:
        prompt: its beginning.
        task: whose adapter has continued it.
        sample: number of the continuation, from 0, where several were asked for.
        text: the continuation, special tokens left out.
        tokens: (tokens,) int64; the last one is the end of the document where the model has written it.
        log_prob: (tokens,) log-probability of each under the adapter, in nats, whatever the temperature.
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
) -> list[Written]:
    """Continue each prompt by each task, all rows in one batch, each under its own adapter at the guide's centre.

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
        >>> fitted = bp.fit(bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2)), data, epochs=1)
        >>> texts = generate_side_by_side(fitted, "A tree", ["ada", "global-mean"], samples=2, temperature=0.8, max_new_tokens=4)
        >>> [(text.task, text.sample) for text in texts]
        [('ada', 0), ('ada', 1), ('global-mean', 0), ('global-mean', 1)]

    Args:
        fitted: a fit.
        prompts: one beginning or several; an empty one is the document's start. Where the fit was one of chats, a prompt is what
            a user says, and the text is the answer.
        tasks: names of tasks or of their folders; ``base`` is the base without an adapter, ``global-mean`` or ``Θ`` is Θ. Where a
            task has such a name it is the task, and the others are ``plain base`` and ``plain global-mean``. One that is named
            twice writes once.
        samples: continuations of each prompt by each task.
        max_new_tokens: the longest continuation; shorter where the base reads no more.
        temperature: 0 takes the most probable token, above 0 tokens are drawn with probabilities ∝ p^(1/temperature), whatever
            the base's own ``generation_config`` says.
        top_p: draw among the most probable tokens that have this much probability together.
        seed: of the draws. A batch of other rows draws other tokens.
        raw: take prompts as beginnings of texts, also where the fit was one of chats.

    Returns:
        A text for each prompt, task and sample, in this order.

    Raises:
        InputError: no such task, no prompt, or as for :func:`~bora_pyro.predict.mixture_text.generate`.
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
    backbone, writers = fitted.model.backbone, Writers(fitted.tasks)
    tokenizer = tokenizer_of(backbone, "read and write texts with")
    tasks = list(dict.fromkeys(map(writers.named, [tasks] if isinstance(tasks, str) else tasks)))
    weights, row_of = _weights(fitted, tasks, writers)
    template = None if raw else fitted.chat_template
    begun = [prompt_tokens(backbone, tokenizer, prompt, template) for prompt in prompts]
    asked = [(n, task, sample) for n in range(len(prompts)) for task in tasks for sample in range(samples)]
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {"do_sample": False}
    ends, written = end_tokens(backbone, tokenizer), dict[int, Written]()
    with torch.random.fork_rng(), _neutral(backbone.model):
        torch.manual_seed(seed)
        for room, places in _by_room([len(begun[n]) for n, _, _ in asked], max_new_tokens, backbone.context).items():
            input_ids, mask = _left_padded([begun[asked[place][0]] for place in places], tokenizer)
            config = GenerationConfig(
                max_new_tokens=room, pad_token_id=_pad(tokenizer), eos_token_id=sorted(ends) or None,
                return_dict_in_generate=True, output_logits=True, **drawn,
            )  # fmt: skip
            rows = torch.tensor([row_of[asked[place][1]] for place in places], device=backbone.device)
            change = _with_base(fitted.model.change(weights, rows.clamp(min=0)), rows < 0)
            with backbone.changed(change, len(places)) as model:
                output = model.generate(
                    input_ids=input_ids.to(backbone.device), attention_mask=mask.to(backbone.device), generation_config=config
                )
            new = output.sequences[:, input_ids.shape[1] :].cpu()
            log_p = torch.stack([step.float().log_softmax(-1).cpu() for step in output.logits], 1)  # (rows, tokens, vocabulary)
            of_new = log_p.gather(2, new[..., None])[..., 0]
            for place, tokens, log_prob in zip(places, new, of_new, strict=True):
                n, task, sample = asked[place]
                length = _length(tokens, ends)
                text = tokenizer.decode(tokens[:length], skip_special_tokens=True)
                written[place] = Written(prompts[n], task, sample, text, tokens[:length], log_prob[:length])
    return [written[place] for place in range(len(asked))]


def _weights(fitted: Fitted, tasks: Sequence[str], writers: Writers) -> tuple[Weights, dict[str, int]]:
    """θ of the tasks that are asked for and Θ, (rows, layers, *shape), and the row of each name; −1 is the base's."""
    index = sorted({writers.tasks[task] for task in tasks if task in writers.tasks})
    theta, mean = fitted.weights_of()(torch.tensor(index or [0]))
    weights = {name: torch.cat([value[: len(index)], mean[name][None]]) for name, value in theta.items()}
    rows = {task: index.index(writers.tasks[task]) for task in tasks if task in writers.tasks}
    return weights, {writers.base: -1, writers.mean: len(index)} | rows


def _by_room(lengths: Sequence[int], max_new_tokens: int, context: int | None) -> dict[int, list[int]]:
    """Rows that can be continued by equally many tokens, by that number: no prompt takes room from a shorter one."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        room = max_new_tokens if context is None else min(max_new_tokens, context - length)
        groups.setdefault(room, []).append(row)
    return groups


@contextmanager
def _neutral(model: PreTrainedModel) -> Iterator[None]:
    """The model without generation settings of its own: transformers adds them to those that it is given.

    A penalty for repetition or a beam search that a base comes with would take other tokens than the most probable ones.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _with_base(change: Change, is_base: Tensor) -> Change:
    """The same change, but none in some rows."""
    if not is_base.any():
        return change

    def changed(slot: Slot, layer: int, x: Tensor, output: Tensor) -> Tensor:
        # before the change, which may be made in place
        own = output[is_base.to(output.device)].clone()
        result = change(slot, layer, x, output).clone()
        result[is_base.to(result.device)] = own.to(result)
        return result

    return changed


def _left_padded(documents: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (rows, tokens), of documents that end together."""
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
    """How many tokens a row has up to its end; what follows pads it."""
    return next((n + 1 for n, token in enumerate(tokens.tolist()) if token in ends), len(tokens))

"""Several prompts are continued in one batch, each row by its own adapter, with ``generate`` of transformers and its cache.

>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> greedy = {"do_sample": False}
>>> [(tokens, log_prob)] = write(
...     backbone, [torch.tensor([0, 17])], lambda rows: unchanged, max_new_tokens=3, sampling=greedy, seed=0
... )
>>> len(tokens), log_prob.shape
(3, torch.Size([3]))
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from bora_pyro.backbone.backbone import Backbone, Change
from bora_pyro.backbone.generation import Generation, left_padded, left_padding, without_own_settings
from bora_pyro.backbone.passes import COARSE_ROUNDING, rounding_of
from bora_pyro.backbone.slots import Slot
from bora_pyro.backbone.texts import tokenizer_of
from bora_pyro.data.batch import IGNORED
from bora_pyro.errors import InputError
from bora_pyro.predict.mixture_text import end_tokens

#: The largest difference of a log-probability, in nats, between a pass of a text and its generation token by token. The second
#: number is for weights in a short precision or quantised.
MOST_ROUNDING = (0.02, 0.5)

_log = logging.getLogger(__name__)


def unchanged(slot: Slot, layer: int, x: Tensor, output: Tensor) -> Tensor:
    """The change of the base without an adapter: none."""
    return output


@torch.inference_mode()
def write(
    backbone: Backbone,
    prompts: Sequence[Tensor],
    change_of: Callable[[Sequence[int]], Change],
    *,
    max_new_tokens: int,
    sampling: Mapping[str, Any],
    seed: int,
    most_rows: int | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Continue each prompt by the adapter of its row.

    The log-probabilities are checked against one pass of the whole texts, without a cache or padding before them. If they differ,
    a slower way to call ``generate`` is tried.

    Args:
        backbone: the base, which has a tokenizer.
        prompts: the token ids of each prompt, (tokens,) int64.
        change_of: returns how the adapters of the prompts at some positions change the layers.
        max_new_tokens: largest number of new tokens. A continuation also ends where the context of the base is full.
        sampling: the settings of transformers' ``GenerationConfig`` that say how a token is chosen. The base's own are ignored.
        seed: seed of the samples. The samples also depend on the other rows of the batch.
        most_rows: the most prompts of a batch; None: as many as there are.

    Returns:
        For each prompt the new tokens, (tokens,) int64, which end with the end token if the model wrote one, and the
        log-probability of each, (tokens,) float32, in nats, at temperature 1.

    Raises:
        InputError: the base cannot write with ``generate`` what it predicts, or it has no tokenizer.
    """
    tokenizer = tokenizer_of(backbone, "read and write texts with")
    ends = end_tokens(backbone, tokenizer)
    more = {**sampling, "eos_token_id": sorted(ends) or None, "pad_token_id": left_padding(tokenizer)}
    lengths = [len(prompt) for prompt in prompts]
    for way in backbone.generation.and_slower():
        _note(backbone, way, lengths)
        written: dict[int, tuple[Tensor, Tensor]] = {}
        with torch.random.fork_rng(), without_own_settings(backbone.model):
            torch.manual_seed(seed)
            for new_tokens, group in _groups(lengths, max_new_tokens, backbone.context, way, most_rows):
                change, own = change_of(group), [prompts[i] for i in group]
                config = GenerationConfig(
                    max_new_tokens=new_tokens, use_cache=way.cached, return_dict_in_generate=True, output_logits=True, **more
                )
                found = _write(backbone, own, change, config, ends)
                if not _is_predicted(backbone, own, found, change):
                    break
                written.update(zip(group, found, strict=True))
            else:
                return [written[i] for i in range(len(prompts))]
    kind = type(backbone.model).__name__
    raise InputError(f"the base, a {kind}, cannot write texts with transformers' generate as it predicts them")


def _write(
    backbone: Backbone, prompts: Sequence[Tensor], change: Change, config: GenerationConfig, ends: Collection[int]
) -> list[tuple[Tensor, Tensor]]:
    """The tokens that follow each prompt, with the end token if there is one, and the log-probability of each."""
    input_ids, mask = left_padded(prompts, config.pad_token_id)
    with backbone.changed(change, len(prompts)) as model:
        output = model.generate(
            input_ids=input_ids.to(backbone.device), attention_mask=mask.to(backbone.device), generation_config=config
        )
    new = output.sequences[:, input_ids.shape[1] :].cpu()
    log_p = torch.stack([step.float().log_softmax(-1).cpu() for step in output.logits], 1)  # (rows, tokens, vocabulary)
    log_prob = log_p.gather(2, new[..., None])[..., 0]
    lengths = [_length(tokens, ends) for tokens in new]
    return [(new[row, :length], log_prob[row, :length]) for row, length in enumerate(lengths)]


def _is_predicted(backbone: Backbone, prompts: Sequence[Tensor], found: Sequence[tuple[Tensor, Tensor]], change: Change) -> bool:
    """Whether one pass of the whole texts, without a cache or padding before them, gives the tokens these log-probabilities."""
    texts = [torch.cat([prompt, tokens]) for prompt, (tokens, _) in zip(prompts, found, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(backbone.device)
    targets = torch.full_like(padded, IGNORED)
    for row, (prompt, (tokens, _)) in enumerate(zip(prompts, found, strict=True)):
        targets[row, len(prompt) - 1 : len(prompt) - 1 + len(tokens)] = tokens
    logits = backbone.lazy_logits(padded, change)
    if isinstance(logits, Tensor):
        targets = targets.to(logits.device)
        losses = torch.nn.functional.cross_entropy(logits.float().mT, targets, ignore_index=IGNORED, reduction="none")
    else:
        losses = logits.token_losses(targets)
    expected = -losses[targets != IGNORED].cpu()
    # an infinite difference of equal infinities is no number
    difference = (torch.cat([log_prob for _, log_prob in found]) - expected).nan_to_num(0.0).abs()
    return bool(difference.max() <= MOST_ROUNDING[rounding_of(backbone.model) >= COARSE_ROUNDING])


def _groups(
    lengths: Sequence[int], max_new_tokens: int, context: int | None, way: Generation, most_rows: int | None = None
) -> list[tuple[int, list[int]]]:
    """Group prompts into batches by the number of tokens that fit behind them, so that a long prompt shortens no other text.

    Args:
        lengths: tokens of each prompt.
        max_new_tokens: largest number of new tokens.
        context: the most tokens that the base reads.
        way: which prompts may stand in one batch.
        most_rows: the most prompts of a batch; None: no limit.

    Returns:
        The number of new tokens and the indices of the prompts, for each batch.
    """
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        new_tokens = max_new_tokens if context is None else min(max_new_tokens, context - length)
        groups.setdefault(new_tokens, []).append(index)
    return [
        (new_tokens, [group[n] for n in batch[first : first + (most_rows or len(batch))]])
        for new_tokens, group in groups.items()
        for batch in way.batches([lengths[index] for index in group])
        for first in range(0, len(batch), most_rows or len(batch))
    ]


def _note(backbone: Backbone, way: Generation, lengths: Sequence[int]) -> None:
    kind = type(backbone.model).__name__
    if way.batch == "equal" and len(set(lengths)) > 1:
        _log.warning("note: the base, a %s, predicts otherwise behind padding; prompts of one length are written together", kind)
    if way.batch == "single" and len(lengths) > 1:
        _log.warning("note: the base, a %s, predicts otherwise in a batch; texts are written one by one", kind)
    if not way.cached:
        _log.warning("note: the base, a %s, predicts otherwise with its cache; texts are written without it, which is slow", kind)


def _length(tokens: Tensor, ends: Collection[int]) -> int:
    """Number of tokens up to and including the end token, or of all tokens if there is none. Padding follows the end token."""
    return next((n + 1 for n, token in enumerate(tokens.tolist()) if token in ends), len(tokens))

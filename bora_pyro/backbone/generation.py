"""How transformers' ``generate`` has to be called so that it writes what a base predicts.

>>> import bora_pyro as bp
>>> bp.Backbone.from_pretrained("builtin:nano").generation
Generation(batch='padded', cached=True)

Prompts of different lengths are padded on the left. Some bases give their tokens other positions then, or read the padding: a
decoder of BART numbers positions from the first token, for example. The cache of RWKV is wrong for several rows. A cache may
also leave out layers that adapters change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from bora_pyro.backbone.passes import COARSE_ROUNDING, ROUNDING, is_close, probe_tokens, rounding_of
from bora_pyro.errors import InputError

# Predictions that a cache rounds otherwise differ less than this in a short precision, and those of other positions more.
_CACHED_ROUNDING = 0.05


@dataclass(frozen=True)
class Generation:
    """A way to call ``generate``.

    Attributes:
        batch: which prompts may stand in one batch: all (``padded``), those of one length (``equal``), or one (``single``).
        cached: whether the cache is used.
    """

    batch: str = "padded"
    cached: bool = True

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """The indices of the prompts in each batch.

        >>> Generation("equal").batches([5, 3, 5])
        [[0, 2], [1]]
        """
        groups: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            groups.setdefault({"padded": 0, "equal": length, "single": index}[self.batch], []).append(index)
        return list(groups.values())

    def and_slower(self) -> list[Generation]:
        """This way, and those that are slower."""
        return list(_WAYS[_WAYS.index(self) :])


_WAYS = tuple(Generation(batch, cached) for cached in (True, False) for batch in ("padded", "equal", "single"))


def probe_generation(
    model: PreTrainedModel,
    changed: Callable[[int], AbstractContextManager[PreTrainedModel]],
    device: torch.device,
    *,
    pad: int = 0,
    context: int | None = None,
) -> Generation:
    """The fastest way of which the predictions are those of a pass of the whole text alone.

    Args:
        model: the base.
        changed: a context manager in which the model runs with changed outputs of its target layers, for a number of rows. A
            step of ``generate`` that leaves out a target layer shows by it.
        device: the device of the inputs.
        pad: the token id of padding.
        context: the most tokens that the base reads.

    Raises:
        InputError: no way gives these predictions.
    """
    tokens = probe_tokens(model, device, context=context)
    new_tokens = min(3, tokens.shape[1] - 1)
    if new_tokens == 0:  # nothing fits behind a prompt
        return Generation()
    long = tokens.shape[1] - new_tokens
    prompts, reason = [tokens[0, :long], tokens[1, :long], tokens[2, : max(1, long // 2)]], "its predictions differ"
    with torch.no_grad(), without_own_settings(model):
        for way in _WAYS:
            try:
                batches = [[prompts[n] for n in batch] for batch in way.batches([len(prompt) for prompt in prompts])]
                if all(_is_faithful(model, changed, batch, new_tokens, way, pad) for batch in batches):
                    return way
            except Exception as error:  # the code of a model can raise any type of error
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise InputError(
        f"the base, a {type(model).__name__}, cannot write texts with transformers' generate as it predicts them ({reason})"
    )


def _is_faithful(
    model: PreTrainedModel,
    changed: Callable[[int], AbstractContextManager[PreTrainedModel]],
    prompts: Sequence[Tensor],
    new_tokens: int,
    way: Generation,
    pad: int,
) -> bool:
    """Whether ``generate`` predicts in a batch what the model predicts in a pass of each text alone."""
    input_ids, mask = left_padded(prompts, pad)
    config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, use_cache=way.cached, pad_token_id=pad, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    with changed(len(prompts)) as adapted:
        output = adapted.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
    rounding = ROUNDING if rounding_of(model) < COARSE_ROUNDING else _CACHED_ROUNDING
    for row, prompt in enumerate(prompts):
        text = output.sequences[row, input_ids.shape[1] - len(prompt) :]
        with changed(1) as adapted:
            expected = adapted(input_ids=text[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        if not is_close(torch.stack([step[row] for step in output.logits]), expected, rounding):
            return False
    return True


def left_padded(documents: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (rows, tokens), of documents padded on the left.

    >>> left_padded([torch.tensor([5, 6]), torch.tensor([7])], 0)
    (tensor([[5, 6],
            [0, 7]]), tensor([[1, 1],
            [0, 1]]))
    """
    longest = max(len(document) for document in documents)
    input_ids = torch.full((len(documents), longest), pad, device=documents[0].device)
    mask = torch.zeros_like(input_ids)
    for row, document in enumerate(documents):
        input_ids[row, longest - len(document) :] = document
        mask[row, longest - len(document) :] = 1
    return input_ids, mask


def left_padding(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The token id that stands before short prompts."""
    ids = () if tokenizer is None else (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((number for number in ids if number is not None), 0)


@contextmanager
def without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Remove the model's own generation settings for the duration of the context.

    transformers merges them with the settings of a call. A base's repetition penalty or beam search would change the result.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own

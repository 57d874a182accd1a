"""Text written by a base, by one adapter of a task, or by a mixture of draws of it.

>>> import bora_pyro as bp
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2))
>>> written = generate(model, "Returns the graph", draws=lambda: [None], task_index=0, max_new_tokens=3)  # the base alone
>>> written.tokens.shape, written.epistemic.tolist()
(torch.Size([3]), [0.0, 0.0, 0.0])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.backbone.texts import tokenizer_of
from bora_pyro.data.chat import request
from bora_pyro.data.encode import encoder, start_token
from bora_pyro.data.files import check_unicode
from bora_pyro.errors import InputError, shown
from bora_pyro.model import BoRA
from bora_pyro.predict.mixture import Draws


@dataclass(frozen=True)
class Generated:
    """A text that was written, and what the mixture thought of each token of it.

    Attributes:
        text: the tokens as a text, special ones left out; the prompt is no part of it.
        tokens: (tokens,) int64; the last one is the end of the document where the model has written it.
        log_prob: (tokens,) log of the mixture's probability of each, in nats, whatever the temperature.
        epistemic: (tokens,) mutual information of the token and the weights, in nats; 0 for one draw.
    """

    text: str
    tokens: Tensor
    log_prob: Tensor
    epistemic: Tensor


@torch.inference_mode()
def generate(
    model: BoRA,
    prompt: str | Sequence[int] | Tensor,
    *,
    draws: Draws,
    task_index: int,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generated:
    """Continue a text token by token.

        >>> import bora_pyro as bp
        >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2))
        >>> texts = [
        ...     generate(model, "A tree", draws=lambda: [None], task_index=1, max_new_tokens=5, temperature=0.8, seed=4).text
        ...     for _ in range(2)
        ... ]
        >>> texts[0] == texts[1]
        True

    The probability of each next token is the mean over the draws of theirs, given all tokens before it, as in
    :func:`~bora_pyro.predict.mixture.predictive`; the draws do not gain or lose weight by what has been written. One draw, a
    posterior's mean and the base alone are mixtures of one.

    No more than one draw is held at a time, so memory does not grow with their number. The price is that nothing is kept from
    token to token: each draw is made again, and reads the whole text again, for every token. Hold a few draws in a list where
    memory allows it.

    Args:
        model: the BoRA model; its backbone has a tokenizer.
        prompt: the beginning, as a text (the start token is put in front, and stands alone where the text is empty) or as token
            ids, (tokens,), taken as they are.
        draws: gives the draws, the same ones each time; it is called for each token.
        task_index: d, whose adapter writes.
        max_new_tokens: the longest text, in tokens. It ends earlier where the model ends the document, or where the base can
            read no more.
        temperature: 0 takes the most probable token; above 0 tokens are drawn with probabilities ∝ p^(1/temperature).
        seed: of the tokens that are drawn.

    Raises:
        InputError: no draw; a prompt without a token, with half a character, or that fills all that the base can read; a task, a
            number of tokens or a temperature out of range; a base without tokenizer.
    """
    if not 0 <= task_index < model.num_tasks:
        nearest = min(max(task_index, 0), model.num_tasks - 1)
        raise InputError(f"task_index is {task_index}; give 0 to {model.num_tasks - 1}, nearest: {nearest}")
    check_generation(max_new_tokens, temperature)
    tokenizer = tokenizer_of(model.backbone, "read and write texts with")
    tokens = prompt_tokens(model.backbone, tokenizer, prompt)
    room = max_new_tokens if model.backbone.context is None else min(max_new_tokens, model.backbone.context - len(tokens))
    generator, ends = torch.Generator().manual_seed(seed), end_tokens(model.backbone, tokenizer)
    written, log_probs, epistemic = [], [], []
    for _ in range(room):
        log_p, information = next_token(model, tokens, draws=draws, task_index=task_index)
        token = int(log_p.argmax()) if temperature == 0 else _drawn(log_p, temperature, generator)
        written.append(token)
        log_probs.append(float(log_p[token]))
        epistemic.append(float(information))
        if token in ends:
            break
        tokens = torch.cat([tokens, torch.tensor([token])])
    return Generated(
        tokenizer.decode(written, skip_special_tokens=True),
        torch.tensor(written),
        torch.tensor(log_probs),
        torch.tensor(epistemic),
    )


@torch.inference_mode()
def next_token(model: BoRA, tokens: Tensor, *, draws: Draws, task_index: int) -> tuple[Tensor, Tensor]:
    """What a mixture of draws says of the token behind ``tokens``.

        >>> import bora_pyro as bp
        >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2))
        >>> log_p, epistemic = next_token(model, torch.tensor([0, 17]), draws=lambda: [None, None], task_index=0)
        >>> round(float(log_p.exp().sum()), 4), abs(float(epistemic)) < 1e-5
        (1.0, True)

    Args:
        model: the BoRA model.
        tokens: (tokens,) int64, one or more.
        draws: gives the draws; one is held at a time.
        task_index: d, whose adapter predicts.

    Returns:
        (vocabulary,) log of the mean of the draws' probabilities, and the mutual information of token and weights, in nats.

    Raises:
        InputError: there is no draw.
    """
    device = model.backbone.device
    input_ids, task = tokens[None].to(device), torch.tensor([task_index], device=device)
    mean: Tensor | None = None
    aleatoric, k = torch.zeros((), device=device), 0
    for weights in draws():
        change = None if weights is None else model.change(weights, task)
        log_p = model.backbone.logits(input_ids, change)[0, -1].float().log_softmax(-1)
        p = log_p.exp()
        aleatoric += torch.special.entr(p).sum()
        mean = p if mean is None else mean.add_(p)
        k += 1
    if mean is None:
        raise InputError("0 draws given; a text needs 1 or more")
    if k == 1:  # the two entropies are the same number, not two roundings of it
        return log_p.cpu(), torch.zeros(())
    mean /= k
    return mean.log().cpu(), (torch.special.entr(mean).sum() - aleatoric / k).cpu()


def _drawn(log_p: Tensor, temperature: float, generator: torch.Generator) -> int:
    return int(torch.multinomial((log_p / temperature).softmax(-1), 1, generator=generator))


def prompt_tokens(
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[int] | Tensor,
    chat_template: str | None = None,
) -> Tensor:
    """(tokens,) int64: a text as its document begins, of an empty one the start alone; token ids as they are.

    With a chat's template a text is what a user says, and the tokens go up to where the answer begins.
    """
    if isinstance(prompt, str):
        check_unicode(prompt, f"the prompt {shown(prompt)}")
    if isinstance(prompt, str) and chat_template is not None:
        tokens = torch.tensor(request(tokenizer, prompt, chat_template), dtype=torch.int64)
    elif isinstance(prompt, str):
        [ids] = encoder(tokenizer, 10**9)({"text": [prompt], "task": [""]})["input_ids"] or [[start_token(tokenizer)]]
        # a document's end mark would say that there is nothing to continue
        tokens = torch.tensor(ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids, dtype=torch.int64)
    else:
        tokens = torch.as_tensor(prompt, dtype=torch.int64).cpu()
    if tokens.dim() != 1 or not len(tokens):
        raise InputError(f"the prompt has the shape {tuple(tokens.shape)}; give one text, or a vector of token ids, not empty")
    vocabulary = backbone.model.config.vocab_size
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise InputError(
            f"the prompt has token ids from {int(tokens.min())} to {int(tokens.max())}; give ids from 0 to {vocabulary - 1}"
        )
    if backbone.context is not None and len(tokens) >= backbone.context:
        raise InputError(
            f"the prompt has {len(tokens)} tokens and the base reads {backbone.context}, the new ones included; give one of "
            f"{backbone.context - 1} tokens or fewer"
        )
    return tokens


def end_tokens(backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a document: the tokenizer's, and those that the base's own settings name, as chat models do."""
    named = getattr(backbone.model.generation_config, "eos_token_id", None)
    return {token for token in (tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])) if token is not None}


def check_generation(max_new_tokens: int, temperature: float) -> None:
    """Raise ``InputError`` where a text would have no token, or a temperature is none."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; give a whole number from 1 up")
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature is {temperature}; give 0 for the most probable token, or a finite number above 0")

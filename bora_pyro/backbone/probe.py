"""What a base model does, found by a few short passes when a backbone is built.

>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 16}
>>> model = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0)).eval()
>>> probe(model, {}, torch.device("cpu"))
Findings(ends_with_head=True, unusable={})

The passes are those of a fit: no attention mask, rows that are padded on the right, the precision and the devices of the fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel

from bora_pyro.backbone.configuration import is_encoder, padding_token, token_rows
from bora_pyro.backbone.passes import MANY_TOKENS, TOKENS, hooks, is_close, ordinary_tokens, probe_tokens, rounding_of
from bora_pyro.backbone.probe_head import FirstPass, ends_with_head, record_head
from bora_pyro.backbone.probe_layers import NO_GRADIENT, LayerCalls, unusable_layers, without_gradient
from bora_pyro.errors import InputError


@dataclass(frozen=True)
class Findings:
    """What the passes found.

    Attributes:
        ends_with_head: whether the logits are exactly the head applied to the last hidden states.
        unusable: why an adapter cannot change a linear layer, by the path of the layer.
    """

    ends_with_head: bool = False
    unusable: dict[str, str] = field(default_factory=dict)


def probe(
    model: PreTrainedModel, linear: Mapping[str, nn.Module], device: torch.device, *, context: int | None = None
) -> Findings:
    """Run a base on a few tokens.

    Args:
        model: the base, in evaluation mode.
        linear: its linear layers, by path.
        device: the device of its inputs.
        context: the most tokens that it reads.

    Raises:
        InputError: the base cannot read plain tokens; or a prediction depends on later tokens, on padding after it or on other
            rows.
    """
    if device.type == "meta":  # weights without numbers give nothing to compare
        return Findings()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            found = _probe(model, linear, probe_tokens(model, device, context=context))
            if torch.is_inference_mode_enabled():  # which allows no gradients
                return found
            usable = without = {path: module for path, module in linear.items() if path not in found.unusable}
            for tokens in (TOKENS, MANY_TOKENS):
                text = probe_tokens(model, device, context=context, shape=(1, tokens))
                without = {path: linear[path] for path in without_gradient(model, without, text)}
            if usable and len(without) == len(usable):
                raise InputError(
                    f"the base, a {type(model).__name__}, computes its backward pass without the adapters of its layers; give "
                    "another base"
                )
            return Findings(found.ends_with_head, found.unusable | dict.fromkeys(without, NO_GRADIENT))
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the code of a model can raise any type of error
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the base, a {type(model).__name__}, does not read plain tokens ({type(error).__name__}: {reason}); give a causal "
            "language model"
        ) from error


def _probe(model: PreTrainedModel, linear: Mapping[str, nn.Module], input_ids: Tensor) -> Findings:
    calls, again, seen = LayerCalls(linear, input_ids.shape), LayerCalls(linear, input_ids.shape), FirstPass()
    with torch.no_grad():
        with hooks() as hook:
            record_head(model, seen, hook)
            calls.record(hook)
            seen.logits = _logits(model, input_ids)
        other_ids, same = _other_ends(model, input_ids)
        with hooks() as hook:
            again.record(hook)
            other = _logits(model, other_ids)
        _check_causal(model, other_ids, same, seen.logits, other)
        return Findings(ends_with_head(model, input_ids, seen), unusable_layers(calls, again))


def _logits(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    # numbers that are not finite compare with nothing; what makes them is found when a fit starts
    return model(input_ids=input_ids, use_cache=False).logits.float().nan_to_num(0.0, 0.0, 0.0)


def _other_ends(model: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, list[int]]:
    """Tokens with another end in the second row and padding in the third, and how many tokens of each row are the same."""
    tokens = input_ids.shape[1]
    same = [tokens, max(1, tokens // 2), max(1, tokens - 2)]
    other, ordinary = input_ids.clone(), ordinary_tokens(model).to(input_ids.device)
    place = (ordinary == input_ids[1, same[1] :, None]).int().argmax(1)
    other[1, same[1] :] = ordinary[(place + 1) % len(ordinary)]
    pad = padding_token(model.config)
    other[2, same[2] :] = pad if pad is not None and 0 <= pad < token_rows(model) else ordinary[0]
    return other, same


#: What a prediction depends on, where it changes in the first, second or third row of `_other_ends`.
_FAULTS = ("the other rows of a batch", "later tokens", "the padding after a text")


def _check_causal(model: PreTrainedModel, input_ids: Tensor, same: list[int], logits: Tensor, other: Tensor) -> None:
    """Check that what a base predicts depends only on the tokens before, in the same row."""
    before = [(logits[row, :length], other[row, :length]) for row, length in enumerate(same)]
    # equal shapes: most models predict the same bit for bit, but with a mixture of experts the rounding may differ
    faults = [row for row, (x, y) in enumerate(before) if not torch.equal(x, y)]
    if faults and all(is_close(x, y, rounding_of(model)) for x, y in before):
        faults = _rows_with_influence(model, input_ids, same)
    if faults:
        _refuse(model, _FAULTS[1] if 1 in faults else _FAULTS[faults[0]])
    # a row alone, without its padding
    alone = _logits(model, input_ids[2:, : same[2]])
    if not is_close(alone[0], other[2, : same[2]], rounding_of(model)):
        _refuse(model, _FAULTS[2])


@torch.enable_grad()
def _rows_with_influence(model: PreTrainedModel, input_ids: Tensor, same: list[int]) -> list[int]:
    """The rows in which a prediction has a gradient in the embeddings of later tokens. Rounding does not change an exact zero."""
    embedded: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    with hooks() as hook:
        hook(model.get_input_embeddings(), keep)
        logits = _logits(model, input_ids)
    if not embedded or embedded[0].shape[:2] != input_ids.shape:  # nothing to tell the tokens apart by
        return list(range(len(same)))
    weight = torch.randn(logits.shape, generator=Generator().manual_seed(2)).to(logits)
    for row, length in enumerate(same):
        weight[row, length:] = 0
    [gradient] = torch.autograd.grad((weight * logits).sum(), embedded[:1])
    return [row for row, length in enumerate(same) if gradient[row, length:].abs().sum() > 0]


def _refuse(model: PreTrainedModel, on: str) -> None:
    advice = ", or set is_decoder to true in its config.json if it was trained as a decoder" if is_encoder(model.config) else ""
    raise InputError(
        f"the base, a {type(model).__name__}, is not a causal language model: what it predicts after a token depends on {on}; "
        f"give another base{advice}"
    )

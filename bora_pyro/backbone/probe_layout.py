"""Whether a base can read rows that share a prompt, found by a few short passes.

>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 16}
>>> model = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0)).eval()
>>> reads_layout(model, torch.device("cpu"))
True

Such a row has a prompt and several continuations one after the other. Each token has its position after the prompt, and sees the
prompt and its own continuation. A base whose layers all have plain attention reads it as it reads the continuations in rows of
their own. A base with a state space, a convolution or a window does not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bora_pyro.backbone.configuration import has_windows
from bora_pyro.backbone.passes import is_close, probe_tokens, rounding_of

# Tokens of the prompt and of each of the two continuations.
_PROMPT, _OWN = 3, 2


def reads_layout(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether the base predicts the same from a row with two continuations as from a row for each.

    Args:
        model: the base, in evaluation mode.
        device: the device of its inputs.
    """
    if device.type == "meta" or has_windows(model.config):  # a window is longer than the rows here
        return False
    ids = probe_tokens(model, device, shape=(1, _PROMPT + 3 * _OWN))
    if ids.shape[1] < _PROMPT + 3 * _OWN:
        return False
    prompt, first, second, other = ids.split([_PROMPT, _OWN, _OWN, _OWN], dim=1)
    position = torch.tensor([[*range(_PROMPT + _OWN), *range(_PROMPT, _PROMPT + _OWN)]], device=device)
    option = torch.tensor([0] * _PROMPT + [1] * _OWN + [2] * _OWN, device=device)
    seen = (option == 0) | (option == option[:, None])
    layout = {"position_ids": position, "attention_mask": seen.tril()[None, None]}

    def logits(*parts: Tensor, **more: Tensor) -> Tensor:
        return model(input_ids=torch.cat(parts, 1), use_cache=False, **more).logits[0].float()

    with torch.no_grad():
        try:
            shared, changed = logits(prompt, first, second, **layout), logits(prompt, other, second, **layout)
            alone = [logits(prompt, own) for own in (first, second)]
        except Exception:  # the code of a model can raise any type of error; options then have rows of their own, as exact
            return False
    expected = torch.cat([alone[0], alone[1][_PROMPT:]])
    apart = torch.equal(shared[-_OWN:], changed[-_OWN:])  # the second continuation does not see the first
    return bool(shared.isfinite().all()) and apart and is_close(shared, expected, rounding_of(model) / 4)

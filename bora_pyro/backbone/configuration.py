"""What a fit reads from the configuration of a base, whatever the base's authors call it.

>>> from transformers import GPT2Config, MambaConfig, MptConfig
>>> context_of(MptConfig(max_seq_len=1024)), context_of(GPT2Config(n_positions=512)), context_of(MambaConfig())
(1024, 512, None)

The configuration of a multimodal model holds that of its language model; that of an encoder-decoder model holds both halves. All
readings of a configuration in this library go through this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

#: Names of the longest text, in tokens.
CONTEXT = (
    "max_position_embeddings", "max_target_positions", "n_positions", "max_seq_len", "max_seq_length", "max_sequence_length",
    "seq_length", "model_max_length", "n_ctx", "context_length",
)  # fmt: skip
_INNER = ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size", "feed_forward_size", "d_inner", "dff")
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds of layers that keep the same tensors
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")  # fields that limit attention
_ACTIVATION = ("activation_function", "hidden_act", "hidden_activation", "activation", "afn")


@dataclass(frozen=True)
class Widths:
    """The widths of a decoder layer, in numbers per token.

    Attributes:
        hidden: of the states between layers.
        queries: of all heads' queries.
        keys: of all heads' keys.
        inner: of the feed-forward layer.
        activation: name of the feed-forward layer's activation.
    """

    hidden: int
    queries: int
    keys: int
    inner: int
    activation: str


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the part that writes text: the decoder of two halves, the language model of a multimodal model.

    >>> from transformers import BartConfig, Gemma3Config
    >>> text_config(Gemma3Config(text_config={"vocab_size": 300})).vocab_size
    300
    >>> text_config(BartConfig(decoder_ffn_dim=40)).ffn_dim
    40
    """
    return config.get_text_config(decoder=True)


def model_type(config: PreTrainedConfig) -> str:
    """The name of the architecture in transformers, such as ``llama``."""
    return str(config.model_type or type(config).__name__)


def base_name(config: PreTrainedConfig) -> str:
    """The name that the base was loaded by: a folder, a hub id, or nothing."""
    return str(config.name_or_path or "")


def context_of(config: PreTrainedConfig) -> int | None:
    """The longest text that the configuration allows, in tokens; None if it sets no limit.

    >>> from transformers import XLNetConfig
    >>> context_of(XLNetConfig()) is None  # its length is -1: no limit
    True
    """
    for part in (text_config(config), config):
        if (found := _number(part, CONTEXT)) is not None:
            return found
    return None


def positions_of(model: PreTrainedModel) -> int | None:
    """The longest text that a table of learned positions has rows for; None if there is no such table.

    RoBERTa and its kin number their positions from the row after the padding row, so their tables are longer than their texts.
    """
    rows = [
        module.num_embeddings - module.padding_idx - 1
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and "position" in path.rsplit(".", 1)[-1]
    ]
    return min(rows, default=None)


def longest_text(model: PreTrainedModel) -> int | None:
    """The longest text that the model can read, in tokens; None if there is no limit."""
    return min((limit for limit in (context_of(model.config), positions_of(model)) if limit is not None), default=None)


def token_rows(model: PreTrainedModel) -> int:
    """The number of token ids that the model can read: the rows of its embedding.

    The configuration's ``vocab_size`` may be that of another part, or missing.
    """
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def special_tokens(config: PreTrainedConfig) -> set[int]:
    """The token ids that a configuration names: padding, start and end, and those that stand for an image or the like.

    >>> from transformers import Gemma3Config
    >>> special_tokens(Gemma3Config(image_token_index=7, text_config={"pad_token_id": 3})) >= {3, 7}
    True
    """
    found: set[int] = set()
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found |= special_tokens(value)
        elif "token" in name and name.endswith(("_id", "_ids", "_index")):
            found |= {number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)}
    return found


def padding_token(config: PreTrainedConfig) -> int | None:
    """The id that the model takes for padding; None if it has none."""
    found = getattr(text_config(config), "pad_token_id", None)
    return found if isinstance(found, int) else None


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether the configuration says that a model, which can be an encoder or a decoder, is an encoder."""
    return getattr(text_config(config), "is_decoder", None) is False


def widths_of(config: PreTrainedConfig) -> Widths | None:
    """The widths of a decoder layer with attention; None if the model has no attention, or if its layers differ in width.

    >>> from transformers import GPT2Config, MambaConfig
    >>> widths_of(GPT2Config(n_embd=8, n_head=2))
    Widths(hidden=8, queries=8, keys=8, inner=32, activation='gelu_new')
    >>> widths_of(MambaConfig()) is None
    True
    """
    text = text_config(config)
    if not set(_value(text, "layer_types") or ()) <= _ATTENTION:
        return None
    hidden, heads = _number(text, ("hidden_size",)), _number(text, ("num_attention_heads",))
    inner = _number(text, _INNER) or 4 * (hidden or 0)
    if hidden is None or heads is None or _varies(text, ("head_dim", "num_key_value_heads", *_INNER)):
        return None
    head = _number(text, ("head_dim",)) or hidden // heads
    keys = (_number(text, ("num_key_value_heads", "num_kv_heads")) or heads) * head
    activation = next((str(found) for name in _ACTIVATION if (found := _value(text, name))), "gelu")
    return Widths(hidden, heads * head, keys, inner, activation)


def has_windows(config: PreTrainedConfig) -> bool:
    """Whether some layer may see a part of the text alone, such as a sliding window, or has something else than attention.

    >>> from transformers import LlamaConfig, MistralConfig
    >>> has_windows(LlamaConfig()), has_windows(MistralConfig(sliding_window=4096))
    (False, True)
    """
    text = text_config(config)
    kinds = set(_value(text, "layer_types") or ())
    return bool(kinds - {"full_attention"}) or any(_value(text, name) for name in _WINDOWS)


def _value(config: PreTrainedConfig, name: str) -> Any:
    """A field, or None if it is missing or differs from layer to layer (transformers raises an ``AttributeError`` there)."""
    return getattr(config, name, None)


def _number(config: PreTrainedConfig, names: tuple[str, ...]) -> int | None:
    """The first of some fields that is a whole number above 0."""
    for name in names:
        value = _value(config, name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _varies(config: PreTrainedConfig, names: tuple[str, ...]) -> bool:
    """Whether one of some fields differs from layer to layer."""
    by_layer = getattr(getattr(config, "_heterogeneity_spec", None), "per_layer_attributes", ())
    return any(name in by_layer or isinstance(_value(config, name), list | tuple) for name in names)

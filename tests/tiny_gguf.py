"""A tiny llama in a GGUF file, as llama.cpp's converter writes one, with a byte-level tokenizer of the toy documents."""

from __future__ import annotations

import json
import sys

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bora_pyro import Backbone
from tests.tiny import tiny_model
from tests.tiny_base import documents

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
HEADS, KV_HEADS = 4, 2
_CONTROL, _NORMAL = 3, 1
_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def toy_tokenizer(*, single_digits=True):
    """A tokenizer as SmolLM2's: byte-level, each digit by itself."""
    cuts = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*documents()["text"], *["  1 ", "\n  2"] * 20], trainer)
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=SPECIAL[2], chat_template=CHAT, **names)


def toy_llama(tokenizer, **changes):
    """A llama of two layers with the token ids of the tokenizer; its widths are multiples of a block of GGUF."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True}
    return tiny_model("llama", vocab_size=len(tokenizer), intermediate_size=64, **{**ids, **changes})


def write_gguf(path, model, tokenizer, *, kind="F32", pre="smollm", architecture="llama", leave_out=(), more=None, fields=None):
    """Write a GGUF file. ``kind`` is the type of the matrices; norms stay F32."""
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_name("toy")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer, pre)
    for name, value in (fields or {}).items():
        writer.add_uint16(name, value)
    for name, weight in {**_tensors(model), **(more or {})}.items():
        if name not in leave_out:
            of_block = kind if weight.ndim > 1 else "F32"
            ggml = GGMLQuantizationType[of_block]
            writer.add_tensor(name, quants.quantize(weight, ggml), raw_dtype=ggml)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def unpacked_state(model, kind):
    """The weights of a model after a round through a type of GGUF, by the package's own functions."""
    ggml = GGMLQuantizationType[kind]
    state = model.state_dict()
    rounded = {name: value for name, value in state.items() if value.ndim > 1}
    for name, value in rounded.items():
        array = _permuted(name, value.numpy())
        array = quants.dequantize(quants.quantize(array, ggml), ggml)
        state[name] = value.new_tensor(_permuted_back(name, array))
    return state


def print_smollm2(site):
    """Print the digest of ``builtin:smollm2``, whose package lies in ``site``."""
    sys.path.insert(0, site)
    print(Backbone.from_pretrained("builtin:smollm2").digest)


def _add_tokenizer(writer, tokenizer, pre):
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    backend = tokenizer.backend_tokenizer.to_str()
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([_CONTROL if token in SPECIAL else _NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in _merges(backend)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT)


def _merges(backend):
    return json.loads(backend)["model"]["merges"]


def _tensors(model):
    found = {}
    for name, value in model.state_dict().items():
        array = _permuted(name, value.float().numpy())
        if name.startswith("model.layers."):
            layer, _, rest = name.removeprefix("model.layers.").partition(".")
            kind, _, suffix = rest.rpartition(".")
            found[f"blk.{layer}.{_NAMES[kind]}.{suffix}"] = array
        elif name != "lm_head.weight":
            found[{"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]] = array
        elif not model.config.tie_word_embeddings:
            found["output.weight"] = array
    return found


def _heads(name):
    return HEADS if ".q_proj." in name else KV_HEADS if ".k_proj." in name else None


def _permuted(name, array):
    """Rows of queries and keys in llama.cpp's order: the two halves of a head's rotation take turns."""
    if (heads := _heads(name)) is None:
        return array
    return np.ascontiguousarray(array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape))


def _permuted_back(name, array):
    if (heads := _heads(name)) is None:
        return array
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)

"""The layers that get an adapter if the user names none.

>>> usual_targets({"layers.*.attn.q_proj": ["layers.0.attn.q_proj"], "layers.*.attn.v_proj": ["layers.0.attn.v_proj"],
...                "layers.*.attn.o_proj": ["layers.0.attn.o_proj"], "layers.*.mamba.in_proj": ["layers.1.mamba.in_proj"]})
['layers.*.attn.q_proj', 'layers.*.attn.v_proj', 'layers.*.mamba.in_proj']

The rule is for all architectures. Attention gets adapters on its queries and values, as in the LoRA and BoRA papers. A layer with
a state space, a gated convolution or another recurrence gets them on its input map.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

#: Queries and values by the names that architectures give them. A block has the first set of which it has all names.
ATTENTION = (
    ("q_proj", "v_proj"),
    ("c_attn",),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("query", "value"),
    ("q_b_proj", "kv_b_proj"),  # latent attention: from compressed queries to queries, from compressed keys to keys and values
    ("q_proj", "kv_b_proj"),
    ("q_gate_proj", "kv_b_proj"),
    ("q_b_proj", "kv_proj"),
    ("q_proj", "v_proj_current", "v_proj_delayed"),
    ("q_proj.linear", "v_proj.linear"),
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),
    ("Wq", "Wv"),
    ("project_q", "project_v"),
    ("query_key", "value"),
    ("receptance", "value"),
    ("q", "v"),
    ("kv_proj",),
)
#: The input maps of layers that carry a state from token to token.
RECURRENT = (("in_proj",), ("in_proj_qkvz",), ("in_proj_qkv",), ("linear_x", "linear_y"))
#: Parts of paths without usual targets. An indexer chooses the tokens that attention reads, and a patcher the starts of patches,
#: without a gradient. The decoder of an encoder-decoder model does not use its cross-attention when it stands alone.
NEVER = {"indexer", "patcher", "encoder_attn", "cross_attn", "crossattention"}


def usual_targets(kinds: Mapping[str, Sequence[str]]) -> list[str]:
    """The kinds of layers that get an adapter by default.

    Args:
        kinds: the paths of the linear layers by their pattern, such as ``layers.*.attn.q_proj``.

    Returns:
        Patterns in the order of the model; none if no layer has a usual name.
    """
    blocks: dict[str, dict[str, str]] = {}  # the pattern of each layer of a block, by its path
    for kind, paths in kinds.items():
        for path in paths:
            if not NEVER & set(path.split(".")):
                blocks.setdefault(block_of(path), {})["." + path] = kind
    found = {kind for inner in blocks.values() for family in (ATTENTION, RECURRENT) for kind in _first(family, inner)}
    return [kind for kind in kinds if kind in found]


def _first(family: Sequence[Sequence[str]], inner: Mapping[str, str]) -> list[str]:
    """The patterns of the first set of names that a block has all of."""
    for names in family:
        matching = [[kind for path, kind in inner.items() if path.endswith("." + name)] for name in names]
        if all(matching):
            return [kind for of_name in matching for kind in of_name]
    return []


def blocks_without(paths: Iterable[str], adapted: Iterable[str]) -> list[str]:
    """The blocks without an adapter, in stacks of which other blocks have one.

    >>> blocks_without(["layers.0.q", "layers.1.up", "tower.0.up"], adapted=["layers.0.q"])
    ['layers.1']

    Args:
        paths: the paths of all linear layers.
        adapted: the paths of those with an adapter.
    """
    having = {block_of(path) for path in adapted}
    stacks = {pattern_of(block) for block in having}
    return [block for block in dict.fromkeys(map(block_of, paths)) if block not in having and pattern_of(block) in stacks]


def block_of(path: str) -> str:
    """The start of a path with its first index, such as ``layers.3``; empty if it has none."""
    found = re.match(r".*?\.\d+(?=\.)", path)
    return found[0] if found else ""


def pattern_of(path: str) -> str:
    """A path with a star for each index, such as ``layers.*.attn.q_proj``."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)

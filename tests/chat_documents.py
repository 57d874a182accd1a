"""What the tests of forms and chat templates share: chats, templates, and documents read to texts."""

from __future__ import annotations

import functools

import pandas as pd
from transformers import AutoTokenizer

from bora_pyro.backbone.backbone import BUILTIN_BASES
from bora_pyro.data.chat_template import ChatTemplate
from bora_pyro.data.columns import Columns
from bora_pyro.data.encode import encoder
from bora_pyro.data.tables import read_documents

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>{% endgeneration %}"
    "{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
)
TASK = {"task": "a"}
ASKED = [{"role": "user", "content": "Hi"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "Yes?"}]


@functools.cache
def nano_tokenizer():
    return AutoTokenizer.from_pretrained(BUILTIN_BASES["builtin:nano"])


def documents(rows, template=CHATML, **columns):
    """(what is read, what of it is predicted) of each document, and the notes."""
    tokenizer = nano_tokenizer()
    writer = ChatTemplate.find(tokenizer, template)
    read = read_documents(pd.DataFrame([{**TASK, **row} for row in rows]), Columns.given(**columns), template=writer)
    encoded = encoder(tokenizer, 4096, chat_template=template)({name: read.table[name][:] for name in ("task", *read.content)})
    found = []
    for n, ids in enumerate(encoded["input_ids"]):
        observed = encoded["observed"][n] if "observed" in encoded else [False] + [True] * (len(ids) - 1)
        predicted = [token for token, own in zip(ids, observed, strict=True) if own]
        found.append((tokenizer.decode(ids), tokenizer.decode(predicted)))
    return found, read.notes

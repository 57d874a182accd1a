"""Any cells in the columns of a form are read, or one line says which row and why; and any marked chats to the right tokens."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bora_pyro.data.chat import read_chats
from bora_pyro.data.chat_template import ChatTemplate
from bora_pyro.data.columns import DOCUMENT_FORMS, Columns
from bora_pyro.data.forms import Table, choose_form
from bora_pyro.errors import InputError
from tests.data_fixtures import CHAT_TEMPLATE, WORDS, word_tokenizer

TEXTS = st.text(max_size=6) | st.sampled_from(
    ["user", "assistant", "human", "gpt", "tool", "system", "text", "function_call", "[]", "{}"]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.binary(max_size=3)
KEYS = st.sampled_from("role content from value weight train tool_calls function_call function name arguments type text".split())
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=12)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": TEXTS, "content": TEXTS | VALUES}, optional={"weight": LEAVES, "tool_calls": VALUES, "name": LEAVES}
    )
    | st.fixed_dictionaries({"from": TEXTS, "value": TEXTS | VALUES}),
    max_size=4,
)
CELLS = VALUES | MESSAGES | TEXTS
COLUMNS = (
    *("text", "prompt", "completion", "messages", "conversations", "tools", "chosen", "rejected"),
    *("instruction", "input", "output", "system", "history"),
)


def attempt(call, *arguments):
    """The result of a call and None, or None and the message of its error."""
    try:
        return call(*arguments), None
    except InputError as error:
        return None, str(error)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(DOCUMENT_FORMS), st.lists(st.sampled_from(COLUMNS), min_size=1, unique=True), st.data())
def test_any_cells_are_read_or_refused_in_one_line(form, names, data):
    rows = [{name: data.draw(CELLS) for name in names} for _ in range(2)]
    chosen, error = attempt(choose_form, Table(names, rows, "t", columns=Columns.given(document_form=form)))
    if chosen is None:
        assert "\n" not in error
        return
    document, notes = chosen
    if not all(column in names for _, column in document.columns):
        assert document.name == "text"  # what is left when nothing is recognised; the reader of the rows refuses it
        return
    for row in rows:
        content, error = attempt(document.read, row, "t, row 1")
        if error is not None:
            assert error.startswith("t, row 1")
            assert "\n" not in error
        elif content is not None:
            assert tuple(content) == document.content
            stored = json.loads(content.get("messages", "[]"))
            chat = stored if isinstance(stored, list) else stored["messages"]
            assert all(isinstance(message["role"], str) for message in chat)
    assert all("\n" not in note for note in [*notes, *document.notes()])


@pytest.mark.parametrize("wrap", [lambda cell: cell, json.dumps], ids=["structure", "JSON text"])
@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "assistant", "system", "tool"]), st.text(min_size=1).filter(str.strip)), min_size=1
    )
)
def test_what_is_written_is_read(wrap, turns):
    messages = [{"role": role, "content": text} for role, text in turns]
    shared = [{"from": role, "value": text} for role, text in turns]
    for column, cell in (("messages", messages), ("conversations", shared)):
        row = {column: wrap(cell)}
        document, _ = choose_form(Table([column], [row]))
        assert json.loads(document.read(row, "row 1")["messages"]) == messages


TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]), "content": st.lists(st.sampled_from(WORDS), max_size=3).map(" ".join)},
    optional={"weight": st.sampled_from([0, 1])},
)
PLAIN = CHAT_TEMPLATE
MARKED = (
    "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s>{% endgeneration %} "
    "{% else %}{{ m.content }} </s> {% endif %}{% endfor %}"
)


@settings(max_examples=100, deadline=None)
@given(st.lists(TURN, min_size=1, max_size=5))
def test_both_kinds_of_template_predict_the_same_tokens(turns):
    tokenizer = word_tokenizer()
    turns = [{"role": "user", "content": "red"}, *turns]
    found = []
    for template in (PLAIN, MARKED):
        document, _ = choose_form(Table(["messages"], [{"messages": turns}], template=ChatTemplate(tokenizer, template)))
        content = document.read({"messages": turns}, "row 1")
        found.append(list(read_chats(tokenizer, [content["messages"]], template)))
    assert found[0] == found[1]
    [(ids, observed, _)] = found[0]
    expected = [
        word
        for turn in turns
        if turn["role"] == "assistant" and turn["content"] and turn.get("weight", 1)
        for word in [*turn["content"].split(), "</s>"]
    ]
    assert tokenizer.convert_ids_to_tokens([token for token, own in zip(ids, observed, strict=True) if own]) == expected

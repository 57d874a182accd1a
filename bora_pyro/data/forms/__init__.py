"""Forms of documents: which columns hold a document, and how a row of them becomes one.

A form is recognised by the names of the columns and the first rows. A new form is one file with a class like the others, one
entry in `FORMS`, and its name in `columns.DOCUMENT_FORMS`.

>>> rows = [{"task": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]}]
>>> form, notes = choose_form(Table(["task", "conversations"], rows))
>>> form.name, notes
('sharegpt', ["recognised ShareGPT chats in column 'conversations' (human -> user, gpt -> assistant): \
the assistant's turns are predicted"])
"""

from __future__ import annotations

from bora_pyro.data.columns import AUTO
from bora_pyro.data.forms.alpaca import Alpaca
from bora_pyro.data.forms.base import Content, Form, Table
from bora_pyro.data.forms.chats import Chats
from bora_pyro.data.forms.messages import Messages, tool_column
from bora_pyro.data.forms.preference import CHOSEN, REJECTED, Preference
from bora_pyro.data.forms.prompt_completion import PromptCompletion
from bora_pyro.data.forms.sharegpt import KEYS, ShareGPT
from bora_pyro.data.forms.text import TEXT_SEPARATOR, Text
from bora_pyro.errors import InputError

__all__ = ["FORMS", "SAMPLE", "TEXT_SEPARATOR", "Content", "Form", "Table", "choose_form", "form_hint"]

#: The forms by the name that ``document_form`` has for them.
FORMS: dict[str, type[Form]] = {form.name: form for form in (Text, PromptCompletion, Messages, ShareGPT, Alpaca, Preference)}
#: A form is recognised by so many rows at most.
SAMPLE = 20
#: Columns with what the chats of multimodal models are about.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def choose_form(table: Table) -> tuple[Form, list[str]]:
    """The form of a table's documents, and a note on it if no option said what it is.

    Options that name columns win. Without them a table with a column ``text`` has texts; if it has none, its form is recognised.

    Raises:
        InputError: the table does not have the columns of the form that ``document_form`` names, or it has several forms.
    """
    form, notes = _chosen(table)
    if table.columns.options is not None:
        was, form = form, _with_options(form, table)
        notes = [f"recognised {form.recognised}" if note == f"recognised {was.recognised}" else note for note in notes]
    media = [name for name in MEDIA if name in table.names and table.first(name) is not None]
    if form.content == ("messages",) and media:
        notes = [*notes, f"only text is read: not the column{'s' if len(media) > 1 else ''} {', '.join(map(repr, media))}"]
    return form, notes


def _chosen(table: Table) -> tuple[Form, list[str]]:
    given = table.columns
    if given.document_form != AUTO:
        return _named(table), []
    if given.messages is not None:
        return _chats(table)
    if given.prompt is not None:
        return PromptCompletion.recognise(table) or PromptCompletion(given.prompt, given.text[0], None), []
    if given.names_text:
        return Text(given.text), []
    others = [form for kind in FORMS.values() if kind is not Text and (form := _recognised(kind, table))]
    if "text" in table.names:
        return Text(given.text), [_beside_text(form) for form in others]
    if len(others) > 1:
        raise InputError(
            f"{table.label} has documents of several forms: {'; '.join(f'{form.name} ({form.recognised})' for form in others)}; "
            "name the one to read with document_form"
        )
    return (others[0], [f"recognised {others[0].recognised}"]) if others else (Text(given.text), [])


def _with_options(form: Form, table: Table) -> Form:
    """The form with the options of each prompt."""
    column = table.columns.options
    if isinstance(form, Preference) and column == REJECTED:
        return form.with_rejected(table.label)
    if not isinstance(form, PromptCompletion) or form.chats is not None:
        raise InputError(
            f"options_column is {column!r}, but the documents of {table.label} are no prompts with completions; name "
            f"prompt_column and completion_column, give preferences in the columns {CHOSEN} and {REJECTED}, or leave "
            "options_column out"
        )
    return PromptCompletion(form.prompt, form.completion, None, options=column)


def form_hint(table: Table) -> str:
    """For an error about a missing column ``text``: the columns of the forms that are recognised."""
    usual = "; ".join(form.usual for form in FORMS.values() if form is not Text)
    return "" if table.columns.names_text else f"; name the column, or give the columns of another form: {usual}"


def _named(table: Table) -> Form:
    """The form that ``document_form`` names."""
    given = table.columns
    kind = FORMS[given.document_form]
    form = kind.recognise(table)
    if form is not None:
        return form
    if kind is Text:
        return Text(given.text)  # the check of the columns says which are missing
    raise InputError(
        f"document_form is {kind.name!r}, but {table.label} has no such documents in columns {kind.usual}; "
        f"its columns are {', '.join(f'{name!s:.60}' for name in table.names[:20])}"
    )


def _chats(table: Table) -> tuple[Form, list[str]]:
    """The chats in the column that ``messages_column`` names, in either of their forms."""
    column = str(table.columns.messages)
    form = ShareGPT.recognise(table) if table.first(column) is not None else None
    if form is not None and form.keys == KEYS[0]:
        return form, [f"recognised {form.recognised}"]
    chats = Messages(column, tool_column(table), Chats(table.template))
    return chats, [f"the tools in column {chats.tools!r} are given to the chat template"] if chats.tools else []


def _recognised(kind: type[Form], table: Table) -> Form | None:
    """The form, unless the table has a column ``text``, which is read, and the columns of the form hold something else."""
    try:
        return kind.recognise(table)
    except InputError:
        if "text" not in table.names:
            raise
        return None


def _beside_text(form: Form) -> str:
    return f"the column 'text' is read; to read {form.recognised.partition(':')[0]} instead, give document_form {form.name}"

"""The options that say which columns of a table are read, and in which form its documents are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bora_pyro.errors import InputError, check_one_of, shown

#: Recognise the form of the documents by the columns and the first rows.
AUTO = "auto"
#: The values of ``document_form``.
DOCUMENT_FORMS = (AUTO, "text", "prompt_completion", "messages", "sharegpt", "alpaca", "preference")
#: The forms that read columns which an option can name. The other forms have columns with fixed names.
_NAMED_BY = {
    "text_column": (AUTO, "text"),
    "prompt_column": (AUTO, "prompt_completion"),
    "messages_column": (AUTO, "messages", "sharegpt"),
}


@dataclass(frozen=True)
class Columns:
    """The names of the columns to read, as for ``read_table``.

    Attributes:
        task: columns with the name of the task.
        text: columns with the predicted text.
        group: column with the group of a document; None: ``doc_id`` if the table has it, else none.
        split: column with the split; None: no split is read.
        prompt: column with the prompt; None: no prompts.
        messages: column with a chat. If it is given, ``text`` is not read.
        text_option: the option that named ``text``, for errors.
        document_form: the form of the documents, one of `DOCUMENT_FORMS`.
        options: column with the options of each prompt; None: documents have no options.
        task_group: column with the group of a document's task; None: tasks have no groups.
    """

    task: tuple[str, ...] = ("task",)
    text: tuple[str, ...] = ("text",)
    group: str | None = None
    split: str | None = None
    prompt: str | None = None
    messages: str | None = None
    text_option: str = "text_column"
    document_form: str = AUTO
    options: str | None = None
    task_group: str | None = None

    @classmethod
    def given(
        cls,
        *,
        task_column: str | Sequence[str] = "task",
        text_column: str | Sequence[str] = "text",
        group_column: str | None = None,
        split_column: str | None = None,
        prompt_column: str | None = None,
        completion_column: str | None = None,
        messages_column: str | None = None,
        options_column: str | None = None,
        task_group_column: str | None = None,
        document_form: str = AUTO,
    ) -> Columns:
        """The columns that the options of ``read_table`` name.

        Raises:
            InputError: two options cannot be combined, or the value of an option is not a column name or a list of them.
        """
        task, text = _names("task_column", task_column), _names("text_column", text_column)
        alone = {"prompt_column": prompt_column, "completion_column": completion_column, "messages_column": messages_column}
        others = {"group_column": group_column, "split_column": split_column, "options_column": options_column}
        others |= {"task_group_column": task_group_column}
        for name, column in (alone | others).items():
            if column is not None and not isinstance(column, str):
                raise InputError(f"{name} is {shown(column)}; give the name of one column")
        if (prompt_column is None) != (completion_column is None):
            given, lacking = ("prompt", "completion") if completion_column is None else ("completion", "prompt")
            raise InputError(
                f"{given}_column is given without {lacking}_column; a prompt is read and its completion predicted: give both, or "
                "text_column alone to predict all"
            )
        kinds = {"text_column": text != ("text",), "prompt_column": bool(prompt_column), "messages_column": bool(messages_column)}
        if sum(kinds.values()) > 1:
            raise InputError(
                f"{' and '.join(name for name, there in kinds.items() if there)} are given; a document is a text, a prompt with "
                "its completion, or a chat: give one of them"
            )
        check_one_of("document_form", document_form, DOCUMENT_FORMS)
        for name, there in kinds.items():
            if there and document_form not in _NAMED_BY[name]:
                raise InputError(
                    f"{name} is given, but document_form is {document_form!r}, which does not read such a column; "
                    f"leave one of them out, or give document_form {' or '.join(_NAMED_BY[name])}"
                )
        option = "text_column" if completion_column is None else "completion_column"
        text = text if completion_column is None else (completion_column,)
        return cls(
            task=task,
            text=text,
            group=group_column,
            split=split_column,
            prompt=prompt_column,
            messages=messages_column,
            text_option=option,
            document_form=document_form,
            options=options_column,
            task_group=task_group_column,
        )

    @property
    def names_text(self) -> bool:
        """Whether an option names the column of a text."""
        return self.prompt is None and self.text != ("text",)


def _names(option: str, value: str | Sequence[str]) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value)
    if not names or len(set(names)) < len(names):
        raise InputError(f"{option} is {list(names)}; give one column or several different ones")
    return names

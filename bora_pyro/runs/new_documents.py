"""How the documents of new tasks are read: as those of the fit, where nothing else is said.

>>> from bora_pyro.runs.config.adapt import AdaptConfig
>>> fit = MapFitConfig(task_column="speaker", max_tokens=64)
>>> config = with_options_of_fit(AdaptConfig(run="runs/demo", data="new.csv"), fit, reads_options=False, run="runs/demo")
>>> config.task_column, config.max_tokens, config.text_column
('speaker', 64, 'text')
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from bora_pyro.data.chat_template import load_chat_template
from bora_pyro.data.columns import AUTO
from bora_pyro.data.readers.options import COLUMN
from bora_pyro.errors import InputError
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.config.new_documents import NewDocuments

C = TypeVar("C", bound=NewDocuments)


def with_options_of_fit(config: C, fit: MapFitConfig, *, reads_options: bool, run: str) -> C:
    """The configuration with the fit's values for options that are not given.

    If the form of the documents or one of the columns of the content is given, the other ones are not taken from the fit.

    Args:
        config: the configuration of the new documents. It also has a ``token_budget``.
        fit: the configuration of the fit.
        reads_options: whether the fit observes answers among options.
        run: the folder of the fit, for an error.

    Raises:
        InputError: a column of options is given, and the fit observes none; or the chat template cannot be read.
    """
    names = ("task_column", "max_tokens", "token_budget", "chat_template")
    values: dict[str, Any] = {name: getattr(config, name) or getattr(fit, name) for name in names}
    if config.task_from != COLUMN and config.task_column is None:
        values["task_column"] = "task"
    content = fit.content_options
    if not any(getattr(config, name) for name in content):
        values |= content
    else:
        values["text_column"] = config.text_column or "text"  # the default, which has no effect beside a prompt or a chat
        values["document_form"] = config.document_form or AUTO
    values["chat_template"] = load_chat_template(values["chat_template"])
    if not reads_options:
        if config.options_column is not None:
            raise InputError(
                f"options_column is {config.options_column!r}, but the run in {run} does not observe answers among "
                "options; leave it out"
            )
        values["options_column"] = None
    return dataclasses.replace(config, **values)

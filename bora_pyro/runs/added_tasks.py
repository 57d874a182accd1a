"""The documents of tasks that were added to a routed run: they have a source of their own, which the run folder names.

>>> config = AddedDocuments(data="sales.csv", task_column="team", text_column="text", max_tokens=64)
>>> config.documents["task_column"], config.documents["seed"]
('team', 0)

Each addition is a file ``added/<number>.yaml`` with the options of the documents, and ``added/<number>.json`` with their split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.backbone.texts import check_token_ids, longest_read, tokenizer_of
from bora_pyro.data import ByRecord, DataOptions, TaskData, load_tasks
from bora_pyro.data.join import join_tasks
from bora_pyro.data.splitters import Splitter
from bora_pyro.errors import InputError
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import changed
from bora_pyro.runs.config.new_documents import NewDocuments
from bora_pyro.runs.folder import RunFolder


@dataclass(kw_only=True)
class AddedDocuments(NewDocuments):
    """The documents of tasks that were added to a routed run."""

    long_documents: str = changed(DataOptions, "long_documents", "cut")
    seed: int = changed(DataOptions, "seed", 0, "seed of the split and of the choice of documents")

    def load(self, backbone: Backbone, split: Splitter | None = None) -> TaskData:
        """Read the documents.

        Args:
            backbone: the base, with its tokenizer.
            split: the way to split; default: as a fit splits: as the data says, otherwise by group.

        Raises:
            InputError: as for ``load_tasks``; or the base has no tokenizer.
        """
        most = longest_read(backbone, self.max_tokens)
        options: dict[str, Any] = self.documents | {"max_tokens": most}
        data = load_tasks(self.data, tokenizer_of(backbone), split=split, least_tasks=1, **options)
        check_token_ids(backbone, data.train, data.validation, data.test)
        return data


@dataclass(frozen=True)
class Addition:
    """Tasks that were added at one time.

    Attributes:
        documents: where their documents are, and how they are read.
        split: which of them are for training, validation and test.
    """

    documents: AddedDocuments
    split: dict[str, Any]

    def load(self, backbone: Backbone) -> TaskData:
        """Read the documents, split as before."""
        return self.documents.load(backbone, ByRecord(self.split))


def write_additions(folder: RunFolder, additions: Sequence[Addition]) -> None:
    """Write the additions into a run folder."""
    for number, one in enumerate(additions, 1):
        folder.write_added(number, dataclasses.asdict(one.documents), one.split)


def read_additions(folder: RunFolder) -> list[Addition]:
    """The additions of a run, in order; none for other runs.

    Raises:
        InputError: a file cannot be read.
    """
    found = []
    for file, split in folder.read_added():
        try:
            documents = parse_config(AddedDocuments, ["--config", str(file)])
        except InputError as error:
            raise InputError(str(error).removeprefix("--config ")) from None
        found.append(Addition(documents, split))
    return found


def with_additions(data: TaskData, additions: Sequence[Addition], backbone: Backbone) -> TaskData:
    """The documents of a run with those of the tasks that were added to it, in their order.

    Raises:
        InputError: the documents cannot be read, or are of a task that is there already.
    """
    for one in additions:
        data = join_tasks(data, one.load(backbone))
    return data

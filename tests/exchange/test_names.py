"""Which folder is a task's: by the names that lie beside the folders, and never by a guess."""

from __future__ import annotations

import json

import pytest

from bora_pyro.errors import InputError
from bora_pyro.exchange.names import AdapterNames, write_task_names
from bora_pyro.files.slugs import adapter_folders

TASKS = ["Ada", "Chapter", "chapter!", "ada-2", "task", "大阪", "東京"]


def test_names_that_share_a_slug_keep_their_folders(tmp_path):
    folders = adapter_folders(TASKS)
    write_task_names(tmp_path, {folder: task for task, folder in folders.items()})
    names = AdapterNames.read(tmp_path, folders.values())
    for rows in (TASKS, TASKS[::-1], ["東京", "大阪", "Ada"]):  # whatever the order of a table's rows
        assert names.folders_of(rows) == {task: folders[task] for task in rows}
    assert names.folder_of("task") == folders["task"]  # a task's own name comes before a folder's
    assert names.folder_of(folders["東京"]) == folders["東京"]
    assert names.folder_of("Zoe") is None


def test_the_names_of_an_export(tmp_path):
    described = {"task": {"task": "東京"}, "task--draw-0": {"task": "東京", "draw": 0}, "global-mean": {"task": None}}
    (tmp_path / "export.json").write_text(json.dumps({"adapters": described}), encoding="utf-8")
    assert AdapterNames.read(tmp_path, ["task"]).tasks == {"task": "東京"}
    assert AdapterNames.read(tmp_path, ["other"]).tasks == {}


@pytest.mark.parametrize(
    ("folders", "name", "found"),
    [
        (("ada", "bo"), "Ada", "ada"),
        (("ada", "bo"), "ada", "ada"),
        (("ada", "bo"), "Zoe", None),
        (("ada-1", "ada-2"), "Ada 2", "ada-2"),
        (("ada", "ada-2"), "ada-2", "ada-2"),  # a folder, said as it is
        (("ada", "ada-2"), "Ada", "any of ada, ada-2"),
        (("ada", "ada-2"), "Ada 2", "any of ada, ada-2"),
        (("task", "task-2"), "東京", "any of task, task-2"),
        (("ada", "task"), "東京", "task, or none"),
    ],
)
def test_without_names_nothing_is_guessed(folders, name, found):
    names = AdapterNames(folders)
    if found in (None, *folders):
        assert names.folder_of(name) == found
        return
    with pytest.raises(InputError, match=f"the folder of the task '{name}' is not known: it may be {found}; name the folder"):
        names.folder_of(name)
    assert names.folder_of(name, among=["bo"]) is None  # of a folder that nobody asks for


def test_two_names_of_a_table_for_one_folder():
    with pytest.raises(InputError, match="'Ada' and 'ADA' may each be the task of folder ada"):
        AdapterNames(("ada", "bo")).folders_of(["Ada", "bo", "ADA"])
    assert AdapterNames(("ada",), {"ada": "Ada"}).folders_of(["Ada", "ada"]) == {"Ada": "ada", "ada": "ada"}


@pytest.mark.parametrize("text", ["[", "[]", '{"ada": 1}', "[" * 10**5, '{"ada": "Ada", "bo": "Ada"}'])
def test_files_that_say_nothing(tmp_path, text):
    (tmp_path / "tasks.json").write_text(text)
    with pytest.raises(InputError) as caught:
        AdapterNames.read(tmp_path, ["ada", "bo"])
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)

from __future__ import annotations

import json
import os

import pytest

from bora_pyro.errors import InputError
from bora_pyro.files.atomic import check_place, whole_folder, write_record

RECORD = "made.json"


def make(path, text="one", **options):
    with whole_folder(path, record=RECORD, **options) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text(text)
        write_record(folder, RECORD, {"text": text})


def test_the_folder_appears_whole(tmp_path):
    make(tmp_path / "above" / "result")
    assert sorted(entry.name for entry in (tmp_path / "above").iterdir()) == ["result"]
    assert json.loads((tmp_path / "above" / "result" / RECORD).read_text()) == {"text": "one", "entries": ["inner"]}


def test_an_error_leaves_nothing_and_harms_nothing(tmp_path):
    make(tmp_path / "result")

    def fail():
        with whole_folder(tmp_path / "result", record=RECORD, overwrite=True) as folder:
            (folder / "half").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]
    assert (tmp_path / "result" / "inner" / "file").read_text() == "one"


def test_an_earlier_result_is_replaced_when_asked(tmp_path):
    make(tmp_path / "result")
    with pytest.raises(InputError, match="holds an earlier result; give --overwrite true"):
        make(tmp_path / "result", "two")
    make(tmp_path / "result", "two", overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]
    assert (tmp_path / "result" / "inner" / "file").read_text() == "two"


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "result").mkdir()
    make(tmp_path / "result")
    assert (tmp_path / "result" / RECORD).is_file()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("record", [None, '{"entries": ["inner"]}', "{", "[]", '{"entries": 3}'])
def test_what_is_foreign_stays(tmp_path, record, overwrite):
    place = tmp_path / "result"
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    if record is not None:
        (place / RECORD).write_text(record)
    with pytest.raises(InputError, match=r"holds 'notes.txt', which is not part of an earlier result"):
        make(place, overwrite=overwrite)
    assert (place / "notes.txt").read_text() == "mine"


def test_a_file_or_a_link_is_no_place(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(InputError, match="is a file or a link"):
            check_place(tmp_path / name, record=RECORD)
    with pytest.raises(InputError, match="cannot be written"):
        check_place(tmp_path / "file" / "below", record=RECORD)
    with pytest.raises(InputError, match="cannot be written"):
        check_place("a\0b", record=RECORD)


def test_the_old_result_comes_back_where_the_new_one_cannot_be_put(tmp_path, monkeypatch):
    make(tmp_path / "result")
    rename = os.rename

    def refuse(source, target):
        if str(source).endswith(".tmp"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(InputError, match="cannot be written"):
        make(tmp_path / "result", "two", overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]
    assert (tmp_path / "result" / "inner" / "file").read_text() == "one"

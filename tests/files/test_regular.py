"""A folder that is read is read alone: no link, no card and no saved set leads out of it, and nothing in it is no data."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil

import datasets
import pandas as pd
import pytest

from bora_pyro.data.tables import read_table
from bora_pyro.errors import InputError
from bora_pyro.files import limits as bounds
from bora_pyro.files import regular as inside
from bora_pyro.files.regular import check_links
from bora_pyro.runs.folder import RunFolder, replace_file
from bora_pyro.runs.saved import load_run
from tests.tiny_base import documents, map_run, quick_fit, write_table


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, which no test changes."""
    folder = tmp_path_factory.mktemp("finished")
    return map_run({**quick_fit(folder), "output_dir": folder / "run", "tau": 100, "device": "cpu"})


def test_links_within_a_folder_are_followed(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a").write_text("a")
    (folder / "b").symlink_to("deep/a")
    (folder / "deep" / "c").symlink_to(folder / "b")
    (tmp_path / "named").symlink_to(folder)
    for path in (folder, tmp_path / "named"):
        check_links(path, "folder")


@pytest.mark.parametrize("target", ["../secret", "/etc/hostname", "..", "../folder-2/file", "deep/../../secret"])
@pytest.mark.parametrize("place", ["link", "deep/link"])
def test_links_out_of_a_folder_are_refused(tmp_path, place, target):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder-2").mkdir()  # a name that begins alike is another folder
    here = tmp_path / "folder" / place
    here.symlink_to(os.path.relpath(tmp_path / "folder" / target, here.parent) if not target.startswith("/") else target)
    with pytest.raises(InputError, match=f"has a link '{place}' that leads out of it; put a copy in its place"):
        check_links(tmp_path / "folder", "folder")


def test_a_link_that_cannot_be_followed_is_refused(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "cwd").symlink_to("..")
    readlink = os.readlink

    def forbidden(path, **options):
        if str(path).endswith("cwd"):  # as of another user's process in /proc, also where root reads it
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return readlink(path, **options)

    check_links(tmp_path, "folder")
    monkeypatch.setattr(os, "readlink", forbidden)
    with pytest.raises(InputError, match=r"has a link 'deep/cwd' that cannot be followed \(Permission denied\); give a folder"):
        check_links(tmp_path, "folder")


def test_a_folder_of_no_end_is_not_looked_through(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    for n in range(3):
        (tmp_path / "deep" / f"{n}.csv").touch()
    monkeypatch.setattr(inside, "MOST_ENTRIES", 4)
    check_links(tmp_path, "folder")
    (tmp_path / "deep" / "3.csv").touch()
    with pytest.raises(InputError, match="holds more than 4 files and folders; give one that holds nothing else"):
        check_links(tmp_path, "folder")


def test_the_hub_cache_keeps_files_beside_its_snapshots(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (blobs / "x").write_text("x")
    (snapshot / "x.csv").symlink_to("../../blobs/x")
    check_links(snapshot, "folder")
    (snapshot / "y.csv").symlink_to("../../../secret")
    with pytest.raises(InputError, match=r"'y\.csv'"):
        check_links(snapshot, "folder")


@pytest.mark.parametrize("name", ["posterior.safetensors", "checkpoints", "metrics.json", "metrics.jsonl", "adapters/ada"])
def test_a_run_with_a_link_out_of_it_is_neither_read_nor_resumed(finished, tmp_path, name):
    run = shutil.copytree(finished, tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    (run / name).rename(elsewhere)
    (run / name).symlink_to(elsewhere)
    before = sorted((file, file.stat().st_mtime_ns) for file in [elsewhere, *elsewhere.rglob("*")])
    for take in (RunFolder.open, load_run, lambda path: RunFolder.create(path, resume=True)):
        with pytest.raises(InputError, match=f"has a link '{name}' that leads out of it"):
            take(run)
    assert sorted((file, file.stat().st_mtime_ns) for file in [elsewhere, *elsewhere.rglob("*")]) == before
    # and to replace the run deletes the link alone
    with RunFolder.create(run, overwrite=True):
        pass
    assert elsewhere.exists()
    assert list(run.iterdir()) == []


def test_a_link_in_the_place_of_a_temporary_file_is_not_written_through(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".a.json.tmp").symlink_to(tmp_path / "mine")
    replace_file(tmp_path / "a.json", lambda temporary: temporary.write_text("new"))
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "a.json").read_text() == "new"


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """A folder with a table of three tasks; what `datasets` caches goes with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    write_table(folder / "train.csv")
    write_table(tmp_path / "secret.csv", pd.DataFrame({"task": ["secret"], "text": ["of somebody else"]}))
    return folder


def test_a_folder_of_data_with_a_card_is_read(data_folder):
    card = "---\nhomepage: https://example.org/../a\nconfigs:\n- config_name: a\n  data_files: train.csv\n---\nText.\n"
    (data_folder / "README.md").write_text(card)
    assert len(read_table(data_folder)[0]) == len(documents())


def test_a_card_takes_no_more_memory_than_it_is_long(data_folder, monkeypatch):
    monkeypatch.setattr(bounds, "largest_text", lambda: 2**60)
    (data_folder / "README.md").write_text("# no data here")
    assert len(read_table(data_folder)[0]) == len(documents())


FILES = "configs:\n- config_name: a\n  data_files: {}\n"


def link(folder):
    (folder / "test.csv").symlink_to(folder.parent / "secret.csv")


def card(value, name="README.md"):
    text = FILES.format(value)
    return lambda folder: (folder / name).write_text(f"---\n{text}---\n" if name == "README.md" else text)


def content(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def saved(change):
    def write(folder):
        data = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"task": "a", "text": "b"}])})
        data.save_to_disk(folder)
        file = folder / "dataset_dict.json" if "splits" in change else folder / "train" / "state.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return write


WAYS_OUT = {
    "a link": (link, r"has a link 'test\.csv' that leads out of it"),
    "a card": (card("../secret.csv"), r"names '\.\./secret\.csv' in README\.md, which is not in it"),
    "a card with splits": (card("[{split: train, path: ['train.csv', '../s*.csv']}]"), r"names '\.\./s\*\.csv' in README\.md"),
    "a card with a path": (card("/etc/*"), r"names '/etc/\*' in README\.md"),
    "a card with an address": (card("https://example.org/a.csv"), r"names 'https://example\.org/a\.csv'"),
    "a card of YAML": (card("../secret.csv", ".huggingface.yaml"), r"names '\.\./secret\.csv' in \.huggingface\.yaml"),
    "a card with a bomb": (card("&a [x, *a]"), r"README\.md' has YAML that cannot be used \(the anchor 'a' is not supported"),
    "a saved set": (saved({"_data_files": [{"filename": "../../secret.arrow"}]}), r"names '\.\./\.\./secret\.arrow' in state"),
    "a saved set's splits": (saved({"splits": ["../secret"]}), r"names '\.\./secret' in dataset_dict\.json"),
    "a zip archive": (content("test.csv", b"PK\x03\x04..."), r"holds 'test\.csv', a zip archive; unpack it, or move it away"),
    "a tar archive": (content("a.tar", b"\0" * 257 + b"ustar\0"), r"holds 'a\.tar', a tar archive"),
    "half a gzip file": (content("test.csv", gzip.compress(b"task,text")[:-2]), r"test\.csv' is not a whole gzip file"),
    "a damaged saved set": (content("state.json", b"["), r"state\.json' is damaged; save the data set again"),
    "a pipe": (lambda folder: os.mkfifo(folder / "test.csv"), r"holds 'test\.csv', which is not a regular file"),
}


@pytest.mark.parametrize(("make", "message"), WAYS_OUT.values(), ids=WAYS_OUT)
def test_a_folder_of_data_is_read_alone(data_folder, make, message):
    make(data_folder)
    with pytest.raises(InputError, match=message) as caught:
        read_table(data_folder)
    assert "\n" not in str(caught.value)

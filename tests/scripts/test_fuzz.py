"""The fuzzer itself: it sees every kind of crash, counts right, repeats itself, and its valid files are valid."""

from __future__ import annotations

import os
import random
import signal
import sys
import warnings

import datasets
import pytest

from bora_pyro.errors import InputError
from tests.tiny_base import script


@pytest.fixture(scope="module")
def fuzz():
    """The script as a module."""
    return script("fuzz")


def refuse(file):
    raise InputError("no")


def hang(file):
    while True:
        pass


def hang_deaf(file):
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    hang(file)


def take_memory(file):
    bytearray(2**32)


def leave(file):
    sys.exit(0)


def die(file):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(file):
    raise KeyError("no such thing")


CRASHES = {
    fail: "KeyError: 'no such thing'", leave: "SystemExit: 0", hang: "more than 0.1 seconds", take_memory: "MemoryError",
    die: "the process ended with status 9", hang_deaf: "the process ended with status 9",
}  # fmt: skip


def run_of(fuzz, tmp_path, *reads, inputs):
    found = [fuzz.Reader(read.__name__, tmp_path / f"t{n}.json", "json", read, 1, [b'{"a": 1}']) for n, read in enumerate(reads)]
    run = fuzz.Fuzz(fuzz.FuzzConfig(inputs=inputs, memory=1.0, crashes=str(tmp_path / "crashes")), found)
    run.run()
    return run.table().set_index("reader")


def test_what_is_read_and_what_is_refused_is_counted(fuzz, tmp_path, capsys):
    table = run_of(fuzz, tmp_path, len_of := lambda file: len(file.read_bytes()), refuse, inputs=200)
    assert table.loc["all", ["inputs", "crashed"]].tolist() == [200, 0]
    assert table.loc[len_of.__name__, "read"] == table.loc[len_of.__name__, "inputs"]
    assert table.loc["refuse", "refused"] == table.loc["refuse", "inputs"]
    assert 70 < table.loc["refuse", "inputs"] < 130
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("read", CRASHES, ids=lambda read: read.__name__)
def test_a_crash_is_seen_and_kept(fuzz, tmp_path, monkeypatch, capfd, read):
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    table = run_of(fuzz, tmp_path, read, inputs=2)
    assert table.loc[read.__name__, ["inputs", "crashed"]].tolist() == [2, 2]
    kept = sorted((tmp_path / "crashes").iterdir())
    assert [folder.name for folder in kept] == ["0-0", "0-1"]
    assert CRASHES[read] in (kept[0] / "why.txt").read_text()
    assert (kept[0] / "reader.txt").read_text() == read.__name__
    assert f"again: python scripts/maintenance/fuzz.py --repeat {kept[1]}" in capfd.readouterr().out


def test_damages_depend_on_the_dice_alone(fuzz):
    def inputs(seed):
        return [fuzz.damaged(random.Random(f"{seed} {n}"), [b"a,b\n1,2\n", b"a\n"], "csv", packed=n % 2) for n in range(100)]

    assert inputs(0) == inputs(0)
    assert len(set(inputs(0)) & set(inputs(1))) < 50
    assert len(set(inputs(0))) > 50


def test_valid_files_are_read_and_damaged_ones_read_or_refused(fuzz, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    found = fuzz.readers(tmp_path / "files")
    assert len({reader.name for reader in found}) == len(found) > 15
    for reader in found:
        for valid in [] if reader.foreign else reader.valid:
            raw = fuzz.damaged(FirstOfAll(), [valid], reader.form, packed=reader.file.suffix)
            reader.file.write_bytes(raw)
            reader.read(reader.file)
        dice = random.Random(0)
        for _ in range(3):
            reader.file.write_bytes(fuzz.damaged(dice, reader.valid, reader.form, packed=reader.file.suffix))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    reader.read(reader.file)
                except InputError as error:
                    refused = str(error)
                else:
                    refused = "nothing"
            assert refused.isprintable()
        reader.file.write_bytes(reader.valid[0])


class FirstOfAll(random.Random):
    """Dice that choose the first of everything: no mutation at all."""

    def choice(self, among):
        return among[0]

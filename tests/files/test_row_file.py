"""Rows in memory and in a file are the same numbers."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from bora_pyro import InputError
from bora_pyro.files.row_file import RowTensor


@pytest.fixture(params=["memory", "file"])
def folder(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "rows"


def test_what_is_written_is_read_and_the_rest_is_as_it_began(folder):
    first = torch.randn(1, 2, 3)
    rows = RowTensor(first, 100, folder=folder)
    value = torch.randn(3, 2, 3)
    rows.write(torch.tensor([2, 50, 99]), value)
    rows.release_memory()
    read = rows.read(torch.tensor([1, 2, 50, 98, 99]))
    torch.testing.assert_close(read, torch.stack([first[0], value[0], value[1], first[0], value[2]]), rtol=0, atol=0)
    assert rows.written().tolist() == [2, 50, 99]
    assert rows.all().shape == (100, 2, 3)
    torch.testing.assert_close(rows.all()[[0, 99]], torch.stack([first[0], value[2]]), rtol=0, atol=0)
    assert folder is None or not [*folder.iterdir()]  # the file has no name: it goes with the process


def test_what_is_read_is_a_copy(folder):
    rows = RowTensor(torch.zeros(1, 3), 10, folder=folder)
    rows.write(torch.tensor([4]), torch.ones(1, 3))
    rows.read(torch.tensor([4])).fill_(7)
    assert rows.read(torch.tensor([4])).tolist() == [[1, 1, 1]]


def test_rows_that_begin_each_for_itself(folder):
    first = torch.randn(5, 3)
    rows = RowTensor(first, 5, folder=folder)
    torch.testing.assert_close(rows.all(), first, rtol=0, atol=0)


def test_a_copy_goes_back_to_what_the_other_holds(folder):
    one, other = (RowTensor(torch.zeros(1, 2), 6, folder=folder) for _ in range(2))
    one.write(torch.tensor([1, 3]), torch.ones(2, 2))
    other.write(torch.tensor([3, 4]), torch.full((2, 2), 5.0))
    one.copy_from(other)
    torch.testing.assert_close(one.all(), other.all(), rtol=0, atol=0)


def test_a_disk_without_room_is_named_before_anything_is_written(tmp_path, monkeypatch):
    """A page of a mapped file that finds no room ends the process without a word: the room is taken when the file is made."""

    def full(handle, start, size):
        assert size == 4 * 1000 * 6
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="No space left on device"):
        RowTensor(torch.zeros(1, 2, 3), 1000, folder=tmp_path)
    assert not [*tmp_path.iterdir()]

"""One file holds where a fit stands: bit by bit, in one piece, and refused where it is anything else."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from bora_pyro import InputError, fit
from bora_pyro.inference.checkpoint import load_checkpoint, load_optimizer_tensors, optimizer_tensors, save_checkpoint
from tests.tiny_base import toy_data, toy_model

GROUPS = {
    "parameters": {"a/b.c": torch.tensor([1e-30, -2.5]), "zero": torch.zeros(0, 3), "slice": torch.arange(6.0).view(2, 3).T},
    "best": {"a/b.c": torch.tensor([3.0], dtype=torch.float64)},
}
PROGRESS = {"epoch": 3, "best": float("inf"), "history": [{"loss": 0.1 + 0.2, "validation_perplexity": float("inf")}]}


def test_what_was_saved_is_loaded_bit_by_bit(tmp_path):
    file = tmp_path / "new" / "folder" / "step-00000001.safetensors"
    save_checkpoint(file, GROUPS, PROGRESS)
    groups, progress = load_checkpoint(file)
    assert progress == PROGRESS
    assert {group: list(values) for group, values in groups.items()} == {
        group: sorted(values) for group, values in sorted(GROUPS.items())
    }
    for group, values in GROUPS.items():
        for name, value in values.items():
            torch.testing.assert_close(groups[group][name], value, rtol=0, atol=0)
    assert [entry.name for entry in file.parent.iterdir()] == ["step-00000001.safetensors"]


def test_a_crash_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    file = tmp_path / "step-00000001.safetensors"
    save_checkpoint(file, GROUPS, PROGRESS)

    def crash(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(file, GROUPS, PROGRESS | {"epoch": 4})
    assert load_checkpoint(file)[1]["epoch"] == 3
    save_checkpoint(file, GROUPS, PROGRESS | {"epoch": 4})  # and the next one is not in its way
    assert load_checkpoint(file)[1]["epoch"] == 4


def refused(file):
    with pytest.raises(
        InputError, match=r"step-00000001\.safetensors' cannot be read \(.*\); start afresh with --overwrite true"
    ) as caught:
        load_checkpoint(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        fit(toy_model(), toy_data(), epochs=1, checkpoints=file.parent)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.999])
def test_a_truncated_checkpoint_is_refused_in_one_line(tmp_path, share):
    file = tmp_path / "step-00000001.safetensors"
    fit(toy_model(), toy_data(), epochs=1, token_budget=10_000, checkpoints=tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    refused(file)


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    file = tmp_path / "step-00000001.safetensors"
    file.write_text("a text\nof two lines")
    refused(file)
    save_file({"weight": torch.zeros(1)}, file)
    refused(file)
    save_file({"weight": torch.zeros(1)}, file, metadata={"progress": "{"})
    refused(file)
    save_file({"weight": torch.zeros(1)}, file, metadata={"progress": "{}"})
    refused(file)
    file.unlink()
    file.mkdir()
    refused(file)


def test_a_missing_checkpoint_is_told_of(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_checkpoint(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("group", ["parameters", "best"])
def test_a_checkpoint_that_lacks_a_part_is_refused_in_one_line(tmp_path, group):
    file = tmp_path / "step-00000001.safetensors"
    fit(toy_model(), toy_data(), epochs=1, token_budget=10_000, checkpoints=tmp_path)
    groups, progress = load_checkpoint(file)
    del groups[group]
    save_checkpoint(file, groups, progress)
    with pytest.raises(InputError, match=r"--overwrite true") as caught:
        fit(toy_model(), toy_data(), epochs=2, checkpoints=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_fit_goes_on_with_its_own_documents_and_base_alone(tmp_path):
    fit(toy_model(), toy_data(), epochs=1, token_budget=10_000, checkpoints=tmp_path)
    other, words = toy_model(), toy_data()
    words.train.tokens[3] += 1
    other.backbone.model.get_submodule("model.decoder.layers.0.fc2").weight.data *= 1.5
    for model, data, what in ((toy_model(), words, "other documents"), (other, toy_data(), "another base model")):
        with pytest.raises(InputError, match=rf"checkpoint .* is of {what}: .* start afresh with --overwrite true") as caught:
            fit(model, data, epochs=2, token_budget=10_000, checkpoints=tmp_path)
        assert "\n" not in str(caught.value)
    # one that is older than the digests says nothing of either
    [file] = tmp_path.iterdir()
    groups, progress = load_checkpoint(file)
    del progress["data"], progress["base"]
    save_checkpoint(file, groups, progress)
    assert len(fit(other, words, epochs=2, token_budget=10_000, checkpoints=tmp_path).history) == 2


def test_an_optimiser_goes_on_where_it_was():
    def steps(weight, optimizer, number):
        for _ in range(number):
            optimizer.zero_grad()
            (weight**2 * torch.arange(1.0, 4.0)).sum().backward()
            optimizer.step()

    def new(start):
        weight = torch.nn.Parameter(start)
        return weight, torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, fused=True)

    straight, optimizer = new(torch.ones(3))
    steps(straight, optimizer, 7)
    first, optimizer = new(torch.ones(3))
    steps(first, optimizer, 4)
    saved = {name: value.clone() for name, value in optimizer_tensors(optimizer).items()}
    assert sorted(saved) == ["0.exp_avg", "0.exp_avg_sq", "0.step"]
    second, optimizer = new(first.detach().clone())
    load_optimizer_tensors(optimizer, saved)
    steps(second, optimizer, 3)
    torch.testing.assert_close(second, straight, rtol=0, atol=0)

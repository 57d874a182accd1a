"""Pooled adapters on disk: the folders read, the tables and files written, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from bora_pyro import BoRA, InputError, LoRA
from bora_pyro.exchange.load import load_peft, read_peft
from bora_pyro.exchange.pooling.folder import group_table, read_adapters, read_documents, task_table, write_pooled
from bora_pyro.exchange.pooling.hierarchy import FixedShrinkage, MarginalLikelihood
from bora_pyro.exchange.pooling.pool import pool
from bora_pyro.exchange.save import TENSORS
from tests.exchange.pooling.adapters import DOCUMENTS, apart, simulated
from tests.tiny import tiny_backbone


def test_tables_and_files(backbone, tmp_path):
    adapters, *_ = simulated(backbone)
    pooled = pool(adapters, backbone, MarginalLikelihood(DOCUMENTS), rank=4)
    groups, tasks = group_table(pooled).set_index("group"), task_table(pooled, DOCUMENTS).set_index("task")
    assert groups["tau"].to_dict() == {name: found.tau for name, found in pooled.groups.items()}
    assert tasks["documents"].tolist() == DOCUMENTS
    assert tasks["shrinkage_fc1"].tolist() == pooled.groups["fc1"].shrinkage.tolist()
    write_pooled(tmp_path / "out", pooled, options={"rank": 4}, documents=DOCUMENTS, base_model="tiny")
    names = {entry.name for entry in (tmp_path / "out").iterdir()}
    assert names == {*adapters, "global-mean", "groups.csv", "tasks.csv", "pooling.json"}
    stored = json.loads((tmp_path / "out" / "pooling.json").read_text())
    assert stored["groups"]["q_proj"]["tau"] == pytest.approx(pooled.groups["q_proj"].tau)
    assert stored["tasks"]["task 3"]["relative_error"] == pytest.approx(pooled.relative_error[3].item())
    assert stored["options"] == {"rank": 4}
    slot = backbone.slots[0]
    mean = load_peft(tmp_path / "out" / "global-mean", BoRA(backbone, 2, adapter=LoRA(4, pooled.alpha)))
    assert torch.equal(mean[f"{slot.name}.lora_B"][1], pooled.mean[slot.paths[1]]["lora_B"])
    assert read_peft(tmp_path / "out" / "task 0").base_model == "tiny"


def test_infinity_in_the_files(backbone, tmp_path):
    pooled = pool(apart(backbone), backbone, FixedShrinkage(1))
    write_pooled(tmp_path / "out", pooled)
    stored = json.loads((tmp_path / "out" / "pooling.json").read_text())
    assert stored["groups"]["fc1"]["tau"] == "inf"
    assert stored["groups"]["fc1"]["information"] is None


def test_folders_that_are_no_tasks(backbone, tmp_path):
    write_pooled(tmp_path / "out", pool(apart(backbone), backbone, FixedShrinkage(0.5)))
    (tmp_path / "out" / "task 0").rename(tmp_path / "out" / "task 1--draw-0")
    (tmp_path / "out" / "notes").mkdir()
    assert list(read_adapters(tmp_path / "out")) == ["task 1", "task 2"]
    assert list(read_adapters(tmp_path / "out", ["global-mean", "task 2", "task 2"])) == ["global-mean", "task 2"]
    with pytest.raises(InputError, match=r"has no adapter 'task 3', of 4; did you mean 'task 1'|has no adapter 'task 3'"):
        read_adapters(tmp_path / "out", ["task 2", "task 3"])
    with pytest.raises(InputError, match="has 1 adapters of tasks; give a folder with two or more"):
        read_adapters(tmp_path / "out", ["task 2"])
    with pytest.raises(InputError, match="gone is no folder"):
        read_adapters(tmp_path / "gone")
    (tmp_path / "out" / "task 2" / TENSORS).write_bytes(b"")
    with pytest.raises(InputError, match=r"task 2/adapter_model\.safetensors is damaged"):
        read_adapters(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task,documents\na,3\nb,40\nother,1\n", None),
        ("task,number\na,3\n", "has no column 'documents'; it has task, number"),
        ("task,documents\na,3\n", "has no row of the task 'b'"),
        ("task,documents\na,3\nb,0\n", "no positive number of documents of the task 'b'"),
        ("task,documents\na,3\nb,many\n", "no positive number of documents of the task 'b'"),
        ("task,documents\na,3\nb,4\na,5\n", "names the task 'a' twice"),
    ],
)
def test_numbers_of_documents(tmp_path, text, message):
    file = tmp_path / "documents.csv"
    file.write_text(text)
    if message is None:
        assert read_documents(str(file), ["b", "a"]) == [40.0, 3.0]
    else:
        with pytest.raises(InputError, match=message):
            read_documents(str(file), ["a", "b"])


def test_what_is_refused(backbone, tmp_path):
    adapters = apart(backbone)
    for arguments, message in (
        ({"space": "weigths"}, "space 'weigths' is not known; .* did you mean 'weights'"),
        ({"rank": 0}, "rank is 0; give a whole number from 1 up, or full"),
        ({"rank": "all"}, "rank is 'all'; give"),
        ({"space": "weights"}, "in the space of the weights all adapters, and the result, have one rank"),
    ):
        with pytest.raises(InputError, match=message):
            pool(adapters, backbone, FixedShrinkage(0.5), **arguments)
    with pytest.raises(InputError, match="1 adapter given; a hierarchy needs 2"):
        pool({"a": adapters["task 0"]}, backbone, FixedShrinkage(0.5))
    with pytest.raises(InputError, match="has no matrices of"):
        pool(adapters, tiny_backbone("opt", targets=["q_proj", "fc1", "fc2"]), FixedShrinkage(0.5))
    with pytest.raises(InputError, match="3 tasks given; give 2"):
        pool(adapters, backbone, MarginalLikelihood([1, 2]))
    named = dict(zip(["global-mean", "b", "c"], adapters.values(), strict=True))
    with pytest.raises(InputError, match="a task is called 'global-mean'"):
        write_pooled(tmp_path / "out", pool(named, backbone, FixedShrinkage(0.5)))

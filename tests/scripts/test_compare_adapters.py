"""The table of compare_adapters.py: arms of equal numbers of latents, and rows that are those of the fits."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import Future

import pandas as pd
import pytest
import torch
import yaml

from bora_pyro import Backbone, BoRA, load_tasks
from bora_pyro.runs.fit_commands import MAP_FIT
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.saved import load_run
from tests.tiny import tiny_backbone
from tests.tiny_base import line, quick_fit, script

adapters, arms = script("compare_adapters"), script("adapter_arms")


@pytest.mark.parametrize("base", ["nano", "llama"])
def test_the_arms_of_a_budget_have_about_its_number_of_latents(base):
    if base == "nano":
        backbone = Backbone.from_pretrained("builtin:nano", targets=["q_proj", "v_proj", "fc1", "fc2"])
    else:
        backbone = tiny_backbone("llama", targets="all-linear")
    of_rank_one = sum(slot.layers * (slot.in_features + slot.out_features) for slot in backbone.slots)
    known = arms.arms_of(backbone.slots, *((0.5, 1, 8) if base == "nano" else (0.5, 1)))
    for name, arm in known.items():
        if base == "llama" and name.startswith(("soka", "lora_frozen_a")):
            continue  # one more rank of a tiny layer is much
        tensors = BoRA(backbone, 2, adapter=arm.build()).tensors
        found = sum(value.numel() for value in tensors.latents.values())
        if not name.startswith("triadapt"):  # whose ranks grow up to the budget
            assert found == pytest.approx(arm.budget * of_rank_one, rel=0.16 if name == "soka@1" else 0.05), name
    assert {name.partition("@")[0] for name in known if name.endswith("@1")} == {
        "lora", "lora_frozen_a", "nola", "osft", "sara", "sara_largest", "sara_random", "soka",
    }  # fmt: skip


def kept_by_hand(run, data, *, adapted):
    """The perplexity of five test documents, each under every task's adapter (or the base), document by document."""
    model, split = run.fitted.model, load_tasks(data, run.fitted.model.backbone.tokenizer, max_tokens=32).test
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:5].tolist()
    theta, total, count = run.fitted.weights()[0], 0.0, 0
    for d, n in itertools.product(range(len(run.fitted.tasks)), chosen):
        ids = split.document(n)[None]
        change = model.change({name: value[d : d + 1] for name, value in theta.items()}, torch.tensor([0])) if adapted else None
        logits = model.backbone.logits(ids, change).log_softmax(-1)
        total -= float(logits[0, :-1].gather(-1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    return math.exp(total / count)


class InThisProcess:
    """Fits that are done at once, by the command itself."""

    calls = ()

    def __init__(self, program, jobs):
        assert program[-1] == "map-fit"

    def start(self, words):
        InThisProcess.calls += (words,)
        future = Future()
        future.set_result(None if MAP_FIT.main(words) == 0 else "it failed")
        return future

    def stop(self):
        pass


def test_the_rows_are_those_of_the_fits(tmp_path, monkeypatch, capsys):
    options = {name: value for name, value in quick_fit(tmp_path).items() if name not in ("threads", "rank")}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump({name: str(v) if name == "data" else v for name, v in options.items()}))
    monkeypatch.setattr(script("arm_table"), "Fits", InThisProcess)
    words = line(
        {"fit_config": tmp_path / "fit.yaml", "output": tmp_path / "table.csv", "runs_dir": tmp_path / "runs", "seeds": 1}
    )
    words += [
        "--rates",
        "0.01",
        "0.03",
        "--search",
        "grid",
        "--kept_data",
        str(options["data"]),
        "--kept_documents",
        "5",
        "--arms",
    ]
    assert adapters.main([*words, "lora@1", "sara@0.5"]) == 0
    table = pd.read_csv(tmp_path / "table.csv").set_index(["arm", "learning_rate"])
    assert len(table) == len(InThisProcess.calls) == 4
    for (arm, rate), row in table.iterrows():
        metrics = RunFolder.open(tmp_path / "runs" / "table" / f"{arm}-lr{rate:g}-seed0").read_metrics()
        assert row.test_perplexity == pytest.approx(metrics["test_perplexity"], rel=1e-5)
        assert row.stored_bytes == 4 * row.latents
        run = load_run(tmp_path / "runs" / "table" / f"{arm}-lr{rate:g}-seed0", device="cpu")
        for number, adapted in (("kept_base", False), ("kept_adapted", True)):
            assert row[number] == pytest.approx(kept_by_hand(run, options["data"], adapted=adapted), rel=1e-4)
    assert table.xs("sara@0.5").latents.unique()[0] == pytest.approx(table.xs("lora@1").latents.unique()[0] / 2, rel=0.1)
    out = capsys.readouterr().out
    assert "| lora@1 |" in out
    assert "note: lora@1 is best at the learning rate 0.0" in out
    assert adapters.main([*words, "lora@1", "sara@0.5"]) == 0
    assert len(InThisProcess.calls) == 4  # nothing is done twice
    assert adapters.main([*words, "nolla@1"]) == 2
    assert "did you mean 'nola@1'" in capsys.readouterr().err.splitlines()[-1]


def test_masks_leave_latents_out():
    masks = {"b": torch.tensor([[True, True, False]] * 2)}
    assert adapters.active_latents({"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}, masks) == 10

"""The methods of compare_continual.py on a tiny base: what must agree, and what the table says."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from bora_pyro.data.subset import subset
from bora_pyro.exchange.continual import continual_fit
from tests.tiny import tiny_backbone, tiny_data
from tests.tiny_base import line, quick_fit, script

arms, table = script("continual_arms"), script("compare_continual")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Options that all sequences share, and a function that runs one."""
    folder = tmp_path_factory.mktemp("sequences")
    options = {name: value for name, value in quick_fit(folder).items() if name != "threads"} | {"epochs": 2}
    (folder / "fit.yaml").write_text(yaml.safe_dump({name: str(v) if name == "data" else v for name, v in options.items()}))
    config = arms.ArmConfig(fit_config=str(folder / "fit.yaml")).fit()
    _, data = arms.build_run(config, quiet=True)
    shared = {"fit_config": str(folder / "fit.yaml"), "order": data.tasks[::-1]}

    def run(**more):
        return list(arms.Sequence(arms.ArmConfig(**shared | {"learning_rate": 0.03} | more)).stages())

    return shared, run


def test_osft_is_the_sequence_of_the_library(given):
    shared, run = given
    found = run(arm="osft", preserve_from=0.2, preserve_to=0.6)
    sequence = arms.Sequence(arms.ArmConfig(**shared, learning_rate=0.03))
    whole = continual_fit(
        sequence.backbone,
        sequence.data,
        order=shared["order"],
        adapter=arms.LoRA(rank=sequence.rank),
        preserve=(0.2, 0.6),
        **sequence.options,
    )
    for stage, expected in zip(found, whole.stages, strict=True):
        assert stage["test"] == pytest.approx(expected.losses, rel=1e-6)


def test_a_penalty_of_nothing_is_no_penalty(given):
    _, run = given
    plain, penalised = run(arm="sequential"), run(arm="o_lora", penalty=0.0)
    assert [stage["test"] for stage in penalised] == [pytest.approx(stage["test"], rel=1e-5) for stage in plain]


def test_the_penalty_keeps_the_rows_apart():
    backbone, data = tiny_backbone("llama", targets=["q_proj"]), subset(tiny_data(), ["task 0", "task 2"])
    paths = [path for slot in backbone.slots for path in slot.paths]
    earlier = {path: torch.eye(32)[:3] for path in paths}
    overlap = []
    for penalty in (1e-9, 1e3):
        base = tiny_backbone("llama", targets=["q_proj"])
        before = {path: base.weight(slot, n).clone() for slot in base.slots for n, path in enumerate(slot.paths)}
        adapter = arms.OrthogonalLoRA(rank=2, earlier=earlier, penalty=penalty)
        options = {"epochs": 30, "learning_rate": 0.03, "token_budget": 200, "patience": 0, "average": False}
        no_validation = data.validation.subset(torch.arange(0))
        training = arms.TaskData(data.tasks, data.train, no_validation, data.test)
        continual_fit(base, training, order=["task 2"], adapter=adapter, preserve=(0, 0), **options)
        delta = torch.stack([base.weight(slot, n) - before[path] for slot in base.slots for n, path in enumerate(slot.paths)])
        overlap.append(float(delta[..., :3].norm() / delta.norm()))
    assert overlap[1] < 0.3 * overlap[0]


def test_a_prior_of_infinite_precision_stays_where_it_is(given):
    _, run = given
    stages = run(arm="online_bayes", prior_precision=1e12)
    assert [stage["test"] for stage in stages] == [pytest.approx(stages[0]["test"], rel=1e-4)] * len(stages)
    free = run(arm="online_bayes", prior_precision=1.0)
    assert free[-1]["test"] != pytest.approx(stages[0]["test"], rel=1e-3)


def test_the_command_and_the_table(given, tmp_path, capsys):
    shared, run = given
    words = line({"fit_config": shared["fit_config"], "arm": "pooled", "learning_rate": 0.03, "result": tmp_path / "a.json"})
    assert arms.main([*words, "--order", *shared["order"]]) == 0
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert found["stages"] == run(arm="pooled")
    row = table.measures(found)
    assert row["average"] == pytest.approx(sum(found["stages"][0]["test"]) / 3)
    assert row["forgetting"] is None
    assert arms.main([*words, "--order", "nobody"]) == 2
    assert "task 'nobody' is not in the data" in capsys.readouterr().err.splitlines()[-1]

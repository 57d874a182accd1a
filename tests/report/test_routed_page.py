"""The page of a routed run, and of a meta-fit: their kinds, numbers and pictures."""

from __future__ import annotations

import pytest

from bora_pyro.predict.gates import read_gates
from bora_pyro.report.page import render
from bora_pyro.report.run_page import RunOptions, run_page
from bora_pyro.runs.saved import load_run
from tests.tiny_base import command_main, line, map_run, quick_fit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    options = quick_fit(folder) | {"epochs": 1}
    map_run(options | {"output_dir": folder / "run"})
    words = {"k": 1, "epochs": 1, "output_dir": folder / "routed"}
    assert command_main("route-fit")([str(folder / "run"), *line(words)]) == 0
    return folder


def labels(page):
    return {number.label: number.text for number in page.numbers}


def test_a_routed_run(folder):
    page = run_page(folder / "routed", RunOptions(samples=1, max_new_tokens=2))
    saved = load_run(folder / "routed")
    numbers = labels(page)
    assert page.kind == "routed run"
    assert numbers["test perplexity"] == f"{saved.metrics['test_perplexity']:.2f}"
    assert numbers["test perplexity, tasks known"] == f"{saved.metrics['task_test_perplexity']:.2f}"
    assert numbers["gates that are right"] == f"{saved.metrics['gate']['accuracy']:.1%}"
    html = render(page)
    assert "gates over the adapters of run" in html
    assert "posterior around" not in html
    assert "Where the gates know the task" in html
    assert "One prompt, continued by the base alone, and through the gates" in html
    found = read_gates(saved.fitted.model, saved.fitted.weights()[0], saved.data.test)
    assert set(found.by_layer) == {"v_proj.0", "v_proj.1", "fc2.0", "fc2.1"}


def test_a_page_without_adapters_has_the_same_numbers(folder):
    whole, short = (run_page(folder / "routed", RunOptions(samples=0, adapters=adapters)) for adapters in (True, False))
    assert labels(whole) == labels(short)
    assert whole.kind == short.kind == "routed run"


def test_a_meta_fit_is_called_one(folder):
    options = quick_fit(folder) | {"epochs": 1, "inner_steps": 1, "output_dir": folder / "meta"}
    assert command_main("meta-fit")(line(options)) == 0
    assert run_page(folder / "meta", RunOptions(adapters=False)).kind == "meta-fit"
    assert run_page(folder / "run", RunOptions(adapters=False)).kind == "run"

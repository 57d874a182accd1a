"""A fit loads neither matplotlib nor PEFT: only modules that draw import matplotlib, and only modules that export import PEFT."""

from __future__ import annotations

import ast
import functools
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import bora_pyro

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bora_pyro"
HEAVY = ("matplotlib", "peft", "arviz")  # ArviZ imports matplotlib
OF_A_FIT = ("bora_pyro", "bora_pyro.inference.fit", "bora_pyro.runs.map_fit", "bora_pyro.runs.fit_commands")
DRAWING = (
    "bora_pyro.diagnostics.plots", "bora_pyro.report",
    # the commands that draw: bora diagnose, bora calibrate and bora tau-sweep
    "bora_pyro.runs.diagnose", "bora_pyro.runs.calibrate", "bora_pyro.runs.calibration_files",
    "bora_pyro.runs.tau_sweep", "bora_pyro.runs.warm_sweep", "bora_pyro.runs.sweep_files",
)  # fmt: skip

PROBE = """
import importlib, json, sys
needed = {}
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    for heavy in json.loads(sys.argv[2]):
        if heavy in sys.modules:
            needed.setdefault(heavy, name)
print(json.dumps(needed))
"""

FIT = """
import json, sys
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.map_fit import run_map_fit
few = {"num_tasks": 2, "rank": 2, "max_tokens": 32, "max_train_documents": 2, "max_eval_documents": 1, "epochs": 1}
run_map_fit(MapFitConfig(output_dir=sys.argv[1], **few), quiet=True)
print(json.dumps([heavy for heavy in json.loads(sys.argv[2]) if heavy in sys.modules]))
"""


def printed(code, *arguments):
    """Run code in a new Python process, and parse the last line that it prints as JSON."""
    line = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(result.stdout.splitlines()[-1])


@functools.cache
def first_to_need():
    """The first module that brought each heavy package, of all that do not draw, those of a fit before the others."""
    names = [module.name for module in pkgutil.walk_packages(bora_pyro.__path__, "bora_pyro.")]
    others = [name for name in names if not name.startswith(DRAWING) and name not in OF_A_FIT]
    assert "bora_pyro.diagnostics.shrinkage" in others
    return printed(PROBE, json.dumps([*OF_A_FIT, *others]), json.dumps(HEAVY))


@pytest.mark.parametrize("name", OF_A_FIT)
def test_the_modules_of_a_fit_import_nothing_heavy(name):
    assert name not in first_to_need().values()


def test_no_module_imports_matplotlib_unless_it_draws():
    assert first_to_need() == {}


def test_a_whole_map_fit_loads_nothing_heavy(tmp_path):
    assert printed(FIT, str(tmp_path / "run"), json.dumps(HEAVY)) == []


def test_only_modules_that_draw_or_exchange_name_them():
    allowed = {"matplotlib": DRAWING, "peft": ("bora_pyro.exchange", "bora_pyro.report"), "arviz": ("bora_pyro.diagnostics",)}
    for file in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        imported = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for name, rooms in allowed.items():
            assert name not in imported or module.startswith(rooms), f"{module} imports {name}"

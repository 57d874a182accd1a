"""Scripts of ``paper_figures/`` called as their command lines do."""

from __future__ import annotations

import importlib
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "paper_figures"
OF_A_SWEEP = ["figure1", "figure2", "figure3", "figure4", "figure5", "table1", "table2"]
TASKS = ["ada", "bo", "cleo", "dag"]


def call(module, function, argv):
    """Call one function of a script as its command line does; returns the exit code."""
    argv = [str(word) for word in argv]
    return importlib.import_module("common").run(config_of(module), function, argv, f"{module.__name__}.py")


def draw(module, *argv):
    return call(module, module.draw, argv)


def config_of(module):
    """The configuration class that the script itself defines."""
    (config,) = (value for name, value in vars(module).items() if name.endswith("Config") and value.__module__ == module.__name__)
    return config


def is_picture(path):
    return path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000

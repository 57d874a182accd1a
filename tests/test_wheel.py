"""The wheel and the sdist: what is in them, and that a plain installation of the wheel works anywhere, without the extras.

The wheel is installed into an environment that has what pip would install with it, and no more: the distributions that it needs,
linked from the environment of the tests. Nothing is downloaded.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bora_pyro
from bora_pyro.runs.config.demo import DemoConfig
from bora_pyro.runs.folder import RunFolder

ROOT = Path(__file__).parents[1]
SOURCES = ("bora_pyro", "tests", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
#: Packages of the extras and of the tests.
EXTRAS = ("peft", "accelerate", "psutil", "bitsandbytes", "gguf", "sklearn", "tensorboard", "wandb", "flwr", "pytest")
#: Packages that a build of torch for CUDA brings, in the versions that it names.
CUDA = ("cuda-", "nvidia-", "triton")
BIN = "bin"
TINY = ["--num_tasks", "2", "--max_train_documents", "2", "--max_eval_documents", "1", "--max_tokens", "32", "--epochs", "1"]
IMPORT_ALL = """
import importlib, importlib.util, json, pkgutil, sys
import bora_pyro
for module in pkgutil.walk_packages(bora_pyro.__path__, "bora_pyro."):
    importlib.import_module(module.name)
found = [name for name in json.loads(sys.argv[1]) if importlib.util.find_spec(name)]
print(json.dumps([bora_pyro.__file__, found]))
"""


def once(folder, make):
    """A folder that all processes of this run of the tests share. The first one that needs it makes it."""
    made = folder.with_name(f"{folder.name}.made")
    with FileLock(f"{folder}.lock"):
        if not made.exists():
            make(folder)
            made.touch()
    return folder


def run(words, folder, **variables):
    """Run a command in a folder, without the variables that lead Python to packages elsewhere; return what it printed."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    ended = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=folder, env=own | variables)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def built(shared):
    """The folder with the wheel and the sdist, made without a warning."""

    def build(folder):
        sources = folder.with_name("sources")
        sources.mkdir()
        for name in SOURCES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, sources / name)
        run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder], sources, PYTHONWARNINGS="error")

    return once(shared / "built", build)


@pytest.fixture(scope="session")
def commands(shared, built):
    """The folder of the commands of an environment with the wheel, what it needs, and nothing else."""

    def install(folder):
        venv.create(folder, with_pip=False)
        python = folder / BIN / "python"
        [wheel] = built.glob("*.whl")
        line = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--no-compile", wheel]
        run(line, shared)
        packages = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], shared).strip())
        [of_wheel] = metadata.distributions(name="bora_pyro", path=[str(packages)])
        for distribution in needed(of_wheel).values():
            for entry in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
                if not (packages / entry).exists():
                    (packages / entry).symlink_to(distribution.locate_file(entry))

    return once(shared / "environment", install) / BIN


def needed(distribution, *, extra=""):
    """The distributions that a distribution needs, directly or not, by their names."""
    found, waiting = {}, [(distribution, extra)]
    while waiting:
        of, extra = waiting.pop()
        for requirement in map(Requirement, of.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                for key in ((canonicalize_name(requirement.name), name) for name in ("", *requirement.extras)):
                    if key not in found:
                        found[key] = distribution if key[0] == "bora-pyro" else metadata.distribution(key[0])
                        waiting.append((found[key], key[1]))
    return {name: value for (name, _), value in found.items()}


def test_the_wheel_has_the_package_whole(built):
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    of_package = {str(file.relative_to(ROOT)) for file in (ROOT / "bora_pyro").rglob("*") if file.is_file()}
    of_package = {name for name in of_package if "__pycache__" not in name}
    assert {name for name in names if ".dist-info/" not in name} == of_package
    assert f"bora_pyro-{bora_pyro.__version__}.dist-info/licenses/LICENSE" in names
    assert {"bora_pyro/py.typed", "bora_pyro/assets/nano/model.safetensors", "bora_pyro/report/template/page.html"} <= names


def test_the_sdist_has_what_a_build_needs(built):
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO", "bora_pyro/assets/nano/model.safetensors"} <= names
    assert {name.partition("/")[0] for name in names if "/" in name} == {"bora_pyro", "bora_pyro.egg-info"}


def test_every_package_that_is_needed_has_a_pinned_version(built, tmp_path):
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    [of_wheel] = metadata.distributions(name="bora_pyro", path=[str(tmp_path)])
    lines = map(Requirement, re.findall(r"^[^#\s].*", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    pinned = {canonicalize_name(line.name) for line in lines if line.marker is None or line.marker.evaluate()}
    names = {name for name in needed(of_wheel, extra="test") if not name.startswith(CUDA)}
    assert names - pinned == {"bora-pyro"}


def test_every_package_that_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra, lines in project["optional-dependencies"].items() if extra != "test" for line in lines]
    declared = {canonicalize_name(Requirement(line).name) for line in project["dependencies"] + extras}
    nodes = [
        node for file in (ROOT / "bora_pyro").rglob("*.py") for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    ]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    names = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"bora_pyro"}
    assert "torch" in names
    of_name = metadata.packages_distributions()
    # those of the extra `federated` are not in this environment, and are installed under the names of their modules
    assert [name for name in sorted(names) if declared.isdisjoint(map(canonicalize_name, of_name.get(name, [name])))] == []


def test_every_module_is_imported_without_the_extras(commands, tmp_path):
    printed = run([commands / "python", "-c", IMPORT_ALL, json.dumps(EXTRAS)], tmp_path)
    file, extras = json.loads(printed.splitlines()[-1])
    assert Path(file).is_relative_to(commands.parent)
    assert extras == []


def test_the_demo_runs_in_any_folder(commands, tmp_path):
    printed = run([commands / "bora", "demo", *TINY], tmp_path, HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")
    assert printed.endswith("run folder: runs/demo\n")
    folder = RunFolder.open(tmp_path / "runs" / "demo")
    assert len(folder.read_metrics()["tasks"]) == 2
    assert yaml.safe_load((folder.path / "config.yaml").read_text(encoding="utf-8"))["targets"] == DemoConfig().targets

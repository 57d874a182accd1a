"""What the README and the help pages say: commands that are taken, commands and snippets that run, links that lead somewhere."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import bora_pyro
from bora_pyro.cli import command
from bora_pyro.data.builtin import BUILTIN
from bora_pyro.data.documentation import documentation_rows
from bora_pyro.runs.adapt import run_adapt
from bora_pyro.runs.config.adapt import AdaptConfig
from bora_pyro.runs.config.ensemble import EnsembleConfig
from bora_pyro.runs.config.generator_fit import GeneratorFitConfig
from bora_pyro.runs.config.map_fit import MapFitConfig, parse_config
from bora_pyro.runs.config.meta_fit import MetaFitConfig
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig
from bora_pyro.runs.config.route_fit import RouteFitConfig
from bora_pyro.runs.ensemble import run_ensemble
from bora_pyro.runs.generator_fit import run_generator_fit
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.meta_fit import run_meta_fit
from bora_pyro.runs.posterior_fit import run_posterior_fit
from bora_pyro.runs.route_fit import run_route_fit
from tests.tiny_base import script_main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: What needs the user's own files or a hub, or takes more than a minute: that these are taken is checked, and no more.
ELSEWHERE = (
    "speeches.csv", "questions.jsonl", "chats.jsonl", "corpus/", "--print_schema", "--print_config", "facebook/",
    "us_presidents.csv.gz", "crossfit_choices.jsonl.gz", "torchrun", "USER/", "runs/parties", "my_rewards:",
)  # fmt: skip
LONG = (
    "map_fit.py", "tau_sweep.py", "simulate_tau.py", "compare_", "benchmark", "check_memory.py", "few_documents.py", "pretrain",
    "fuzz.py", "continual_fit.py", "meta_fit.py", "membership_inference.py", "plan_scale.py",
)  # fmt: skip


#: Tasks of the documentation that suffice; the pages name two of them.
TASKS = {"utils", "drawing", "classes", "generators", "algorithms.shortest_paths"}


def blocks(language):
    """(page, block) of every fenced block of a language."""
    for page in PAGES:
        for block in re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
            yield page, block


def commands():
    """(page, command) of every command of a table, and of every line of a block of bash without comments."""
    for page in PAGES:
        for text in re.findall(r"^\|.*\| `(bora [^`]*)` \|$", page.read_text(encoding="utf-8"), re.M):
            yield page.name, shlex.split(text)
    for page, block in blocks("bash"):
        for text in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(text, comments=True):
                yield page.name, words


COMMANDS = [*commands()]


def script(words):
    """The script of a command and its arguments; None where it is none of ours."""
    if words[0] in (".venv/bin/bora", ".venv-federated/bin/bora", "bora"):
        return f"scripts/{command(words[1]).script}", words[2:]
    place = next((n for n, word in enumerate(words) if word.startswith("scripts/")), None)
    return None if place is None else (words[place], words[place + 1 :])


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[" ".join(words)[:80] for _, words in COMMANDS])
def test_every_command_is_taken(page, words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        return
    if (found := script(words)) is None:
        assert words[0] in ("pip", ".venv/bin/python", ".venv/bin/pip", ".venv/bin/tensorboard"), f"{page}: {words}"
        return
    name, arguments = found
    with pytest.raises(SystemExit) as ended:
        script_main(Path(name).stem)([*arguments, *([] if {"--help", "--print_schema"} & {*arguments} else ["--print_config"])])
    assert ended.value.code == 0, capsys.readouterr().err


@pytest.fixture(scope="module", autouse=True)
def short_documentation():
    """``builtin:documentation`` is some of its tasks, and the first words of their documents."""
    rows = [row | {"text": row["text"][:120]} for row in documentation_rows() if row["task"] in TASKS]
    assert {row["task"] for row in rows} == TASKS
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUILTIN, "builtin:documentation", lambda: rows)
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with a small ``runs/demo``, as ``make demo`` leaves a large one, and runs that are made from it."""
    folder = tmp_path_factory.mktemp("readme")
    with contextlib.chdir(folder):
        fit = {
            "max_tokens": "32",
            "max_train_documents": "3",
            "max_eval_documents": "2",
            "epochs": "2",
            "rank": "2",
            "device": "cpu",
        }
        words = [word for key, value in fit.items() for word in (f"--{key}", value)]
        run_map_fit(parse_config(MapFitConfig, [*words, "--output_dir", "runs/demo"]), quiet=True)
        config = PosteriorFitConfig(run="runs/demo", epochs=1, output_dir="runs/demo-posterior", draws=2)
        run_posterior_fit(config, quiet=True)
        ensemble = parse_config(EnsembleConfig, [*words, "--members", "2", "--output_dir", "runs/ensemble"])
        run_ensemble(ensemble, quiet=True)
        run_generator_fit(GeneratorFitConfig(run="runs/demo", method="ridge", output_dir="runs/generator"), quiet=True)
        run_meta_fit(parse_config(MetaFitConfig, [*words, "--inner_steps", "1", "--output_dir", "runs/meta"]), quiet=True)
        run_route_fit(RouteFitConfig(run="runs/demo", epochs=1, output_dir="runs/routed"), quiet=True)
        table = ["task,text", *(f'poems,"The rose is red, line {n}."' for n in range(6))]
        Path("new.csv").write_text("\n".join(table) + "\n", encoding="utf-8")
        run_adapt(AdaptConfig(run="runs/demo", data="new.csv", steps=2, output_dir="runs/new"), quiet=True)
        prompts = ["task,prompt", *(f"{task},Returns {n}" for task in ("utils", "drawing") for n in range(3))]
        Path("prompts.csv").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return folder


# a command that stands on two pages runs once
RUN = [
    list(words)
    for words in dict.fromkeys(tuple(words) for _, words in COMMANDS)
    if (found := script(words)) and "--help" not in words
    and not any(text in " ".join(words) for text in ELSEWHERE) and not any(Path(found[0]).name.startswith(text) for text in LONG)
]  # fmt: skip


@pytest.mark.parametrize("words", RUN, ids=[" ".join(words)[:80] for words in RUN])
def test_a_command_runs_word_by_word(demo, words, monkeypatch, capsys, tmp_path):
    work = Path(shutil.copytree(demo, tmp_path / "work"))
    monkeypatch.chdir(work)
    name, arguments = script(words)
    for place, word in enumerate(arguments[:-1]):
        if word == "--output_dir":  # that the fixture may have made already
            shutil.rmtree(work / arguments[place + 1], ignore_errors=True)
    assert script_main(Path(name).stem)(arguments) == 0, capsys.readouterr().err


def test_the_snippets_run_one_after_another(demo, monkeypatch, tmp_path):
    monkeypatch.chdir(shutil.copytree(demo, tmp_path / "work"))
    number = 0
    for page in PAGES:
        space: dict[str, object] = {}
        for owner, block in blocks("python"):
            if owner != page or any(text in block for text in ELSEWHERE):
                continue
            with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng():
                exec(compile(block, f"{page.name}, snippet {number}", "exec"), space)
            number += 1
    assert number >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_are_there(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target
    for name in re.findall(r"`((?:results|docs|paper_figures|scripts|tests)/[\w./*-]+)`", text):
        assert list(ROOT.glob(name)), name


@pytest.mark.parametrize("name", bora_pyro.__all__)
def test_every_public_name_has_a_snippet(name):
    assert ">>>" in (inspect.getdoc(getattr(bora_pyro, name)) or "")

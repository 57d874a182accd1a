"""The console command: what it lists, what it takes, what it imports, and that each script is a command."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import operator
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import bora_pyro
from bora_pyro import cli
from bora_pyro.options.command_line import parse_config, to_yaml
from bora_pyro.runs.command import Command
from bora_pyro.runs.config.demo import DemoConfig, DemoSmolLM2Config
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig
from tests.tiny_base import SCRIPTS, script_main
from tests.tiny_gguf import toy_llama, toy_tokenizer, write_gguf

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_there(name):
    command = cli.command(name)
    assert isinstance(command, Command)
    assert command.name == name
    assert dataclasses.is_dataclass(command.configuration)
    assert cli.CONFIGURATIONS[command.script] is command.configuration
    assert (SCRIPTS / command.script).is_file()


def test_every_script_is_a_command():
    assert sorted(cli.CONFIGURATIONS) == sorted(file.name for file in SCRIPTS.glob("*.py"))
    for file in SCRIPTS.glob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 40


def test_the_package_installs_the_command():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"bora": "bora_pyro.cli:main"}


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_has_a_line_for_each_command(argv, capsys):
    assert cli.run(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: bora COMMAND [options]"
    for name, (_, about) in cli.COMMANDS.items():
        assert [line.split(maxsplit=1) for line in lines if line.split()[:1] == [name]] == [[name, about]]
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("map-fti", "; did you mean 'map-fit'?"),
        ("map_fit", "; did you mean 'map-fit'?"),
        ("zzzz", "; bora --help lists them all"),
        ("--zzzz", "; bora --help lists them all"),
    ],
)
def test_an_unknown_command_is_one_line(word, hint, capsys):
    assert cli.run([word, "--rank", "4"]) == 2
    assert capsys.readouterr().err == f"error: unknown command {word!r}{hint}\n"


def test_a_command_shows_its_options_in_groups(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(["map-fit", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: bora map-fit [--config FILE.yaml] [--key value ...]")
    groups = {field.metadata["group"] for field in dataclasses.fields(cli.command("map-fit").configuration)}
    assert len(groups) > 2
    assert all(f"\n{group}:\n" in printed for group in groups)


@pytest.mark.parametrize("words", [["--rnak", "4"], ["--rank", "many"], ["--tau", "-1"], ["runs/demo"]])
def test_a_command_and_its_script_say_the_same(words, capsys):
    assert cli.run(["map-fit", *words]) == 2
    of_command = capsys.readouterr()
    assert script_main("map_fit")(words) == 2
    assert capsys.readouterr() == of_command
    assert of_command.out == ""
    assert of_command.err.startswith("error: ")


@pytest.mark.parametrize("name", ["map-fit", "calibrate", "report"])
def test_every_command_recognises_a_file_of_another(name, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(PosteriorFitConfig(run="runs/demo")))
    assert cli.run([name, "--config", str(file)]) == 2
    assert capsys.readouterr().err == (
        f"error: --config {file} is a configuration of posterior_fit.py; give one of this script\n"
    )


def test_the_demo_is_a_map_fit_with_other_defaults():
    usual, demo = dataclasses.asdict(MapFitConfig()), dataclasses.asdict(DemoConfig())
    assert list(usual) == list(demo)
    changed = {"max_tokens": 128, "targets": ["q_proj", "v_proj", "fc1", "fc2"], "epochs": 3, "output_dir": "runs/demo"}
    changed |= {"learning_rate": 0.03, "token_budget": 2048}
    assert demo == usual | changed
    assert not demo["overwrite"]  # a second demo does not replace a run unasked


@pytest.mark.parametrize(
    ("words", "targets"),
    [
        ([], ["q_proj", "v_proj", "fc1", "fc2"]),
        (["--base_model", "builtin:smollm2"], None),
        (["--base_model", "builtin:smollm2", "--targets", "q_proj", "down_proj"], ["q_proj", "down_proj"]),
        (["--targets", "fc1"], ["fc1"]),
    ],
)
def test_the_demo_adapts_its_layers_of_nano_and_the_usual_ones_of_another_base(words, targets):
    assert parse_config(DemoConfig, words).targets == targets


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        ([], 0.03),
        (["--base_model", "builtin:smollm2"], 0.01),
        (["--base_model", "builtin:smollm2", "--learning_rate", "0.03"], 0.03),
        (["--learning_rate", "0.001"], 0.001),
    ],
)
def test_the_demo_has_the_learning_rate_of_its_base(words, rate):
    assert parse_config(DemoConfig, words).learning_rate == rate


def test_the_demo_of_another_base_adapts_its_usual_layers(tmp_path, capsys):
    tokenizer = toy_tokenizer()
    base = write_gguf(tmp_path / "model.gguf", toy_llama(tokenizer), tokenizer)
    sizes = ["--num_tasks", "2", "--max_train_documents", "2", "--max_eval_documents", "1", "--max_tokens", "16", "--epochs", "1"]
    assert cli.run(["demo", "--base_model", base, *sizes, "--device", "cpu", "--output_dir", str(tmp_path / "run")]) == 0
    assert "adapters: on 4 layers: q_proj x 2, v_proj x 2\n" in capsys.readouterr().err


def test_the_demo_of_smollm2_is_a_map_fit_with_other_defaults():
    usual, demo = dataclasses.asdict(MapFitConfig()), dataclasses.asdict(DemoSmolLM2Config())
    assert list(usual) == list(demo)
    changed = {
        "base_model": "builtin:smollm2", "num_tasks": 12, "max_train_documents": 12, "max_eval_documents": 4, "max_tokens": 96,
        "token_budget": 1024, "epochs": 3, "gradient_norm": False, "precision": "auto", "output_dir": "runs/demo-smollm2",
    }  # fmt: skip
    assert demo == usual | changed


def test_the_demo_of_smollm2_runs_on_any_base(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = ["--num_tasks", "2", "--max_train_documents", "2", "--max_eval_documents", "1", "--max_tokens", "16", "--epochs", "1"]
    assert cli.run(["demo-smollm2", "--base_model", "builtin:nano", *sizes, "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert re.search(r"^precision: (float32|bfloat16) \(products in bfloat16 are [\d.]+ times as fast", printed.err, re.M)
    assert re.search(
        r"run folder: runs/demo-smollm2\n1 epochs in \d+ s, [\d,]+ training tokens a second, \w+, \d+ CPU threads\n$", printed.out
    )
    written = Path("runs/demo-smollm2/config.yaml").read_text(encoding="utf-8")
    [precision] = re.findall(r"^precision: (.*)$", written, re.M)
    assert precision in ("float32", "bfloat16")
    assert f"precision: {precision} (" in printed.err


def test_make_demo_is_the_command():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo:.*\n\t\$\(BIN\)/python scripts/demo\.py --overwrite true\n\n", makefile, re.M)
    assert re.search(
        r"^demo-smollm2: smollm2 .*\n\t\$\(BIN\)/python scripts/demo_smollm2\.py --overwrite true\n\n", makefile, re.M
    )
    assert re.search(r"^smollm2: setup ", makefile, re.M)


def in_a_process_of_its_own(code, *words):
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=600, cwd=ROOT)


@pytest.mark.parametrize("words", [[], ["--help"], ["map-fti"]])
def test_help_does_not_import_torch(words):
    code = (
        "import sys; from bora_pyro.cli import run; code = run(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    ended = in_a_process_of_its_own(code, *words)
    assert (ended.returncode, "Traceback" in ended.stderr) == (2 if words == ["map-fti"] else 0, False)


def test_the_module_is_the_command():
    ended = subprocess.run([sys.executable, "-P", "-m", "bora_pyro.cli"], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, cli.help_text() + "\n", "")


# The package's public names, which are imported when they are first used


def imported_for_type_checkers():
    """Name -> module, as the imports say that only a type checker follows."""
    tree = ast.parse(inspect.getsource(bora_pyro))
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {name.name: node.module for node in block.body for name in node.names}


def test_type_checkers_and_python_find_the_same_names():
    assert sorted(bora_pyro.__all__) == sorted(imported_for_type_checkers())
    for name, module in imported_for_type_checkers().items():
        assert getattr(bora_pyro, name) is getattr(sys.modules[module], name)


def test_rooms_and_unknown_names():
    assert bora_pyro.data.TaskData is bora_pyro.TaskData
    assert {"fit", "BoRA", "__version__"} <= set(dir(bora_pyro))
    with pytest.raises(AttributeError, match="module 'bora_pyro' has no attribute 'ft'"):
        operator.attrgetter("ft")(bora_pyro)


def test_a_model_brings_pyro_s_setting():
    code = "import bora_pyro as bp, pyro; bp.BoRA; assert pyro.settings.get('module_local_params')"
    assert in_a_process_of_its_own(code).returncode == 0

"""Nothing that is read can run: no pickle, no code of a model that was not asked for."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
import transformers
import yaml

from bora_pyro import Backbone
from bora_pyro.errors import InputError
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.saved import load_run
from tests.forked import Forked
from tests.tiny_base import command_main, documents, line, map_run, quick_fit, save_base, script_main, write_table

ROOT = Path(__file__).parents[2]


# Nothing is pickled or evaluated. What `datasets` keeps in its own cache is its own: it hashes with dill, and reads Arrow files.

FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {
    "eval", "exec", "torch.load", "torch.save", "torch.jit.load", "np.load", "numpy.load", "np.save", "pd.read_pickle",
    "pandas.read_pickle", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.Loader", "yaml.UnsafeLoader", "os.system",
    "os.popen",
}  # fmt: skip


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def offences(source):
    """Lines that pickle, evaluate, load YAML with another loader than a safe one, or run a shell."""
    tree = ast.parse(source)
    safe = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    while new := {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name not in safe and any(dotted(base) in safe for base in node.bases)
    }:
        safe |= new
    # a name that is nothing but a choice between safe loaders
    safe |= {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "type[yaml.SafeLoader]"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if FORBIDDEN_MODULES & {name.partition(".")[0] for name in names}:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call):
            name, keywords = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
            loader = keywords.get("Loader", node.args[1] if len(node.args) > 1 else None)
            if (
                name in FORBIDDEN_CALLS
                or name.endswith((".to_pickle", ".read_pickle"))
                or (name in ("yaml.load", "yaml.parse") and (loader is None or dotted(loader) not in safe))
                or ast.unparse(keywords.get("allow_pickle", ast.Constant(False))) != "False"
                or ast.unparse(keywords.get("shell", ast.Constant(False))) != "False"
            ):
                yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize("folder", ["bora_pyro", "scripts", "paper_figures", "notebooks"])
def test_no_source_pickles_or_evaluates(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [(file.name, *offence) for file in files for offence in offences(file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from dill import dumps", "import torch\ntorch.load('a')", "np.load(f, allow_pickle=True)",
        "frame.to_pickle('a')", "yaml.load(text)", "yaml.load(text, Loader=yaml.Loader)", "yaml.load(text, yaml.FullLoader)",
        "eval('1')", "subprocess.run('ls', shell=True)", "numpy.fromfile(f, allow_pickle=flag)",
    ],
)  # fmt: skip
def test_the_scan_finds(source):
    assert len(list(offences(source))) == 1


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Options of a quick fit."""
    return quick_fit(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A finished run, which no test changes."""
    return map_run({**inputs, "output_dir": tmp_path_factory.mktemp("runs") / "run", "tau": 100, "device": "cpu"})


def fit_without_pickle(options, folder):
    """A fit, taken up again and loaded, in a process that can unpickle nothing."""

    def hook(event, arguments):  # every way to unpickle an object finds its class so
        if event == "pickle.find_class":
            raise RuntimeError(f"unpickled {arguments}")

    def refuse(*arguments, **options):
        raise RuntimeError("torch.load or torch.save")

    sys.addaudithook(hook)
    torch.load = torch.save = torch.serialization.load = torch.serialization.save = refuse
    assert command_main()([*options, "--epochs", "1"]) == 0
    assert command_main()([*options, "--epochs", "2", "--resume", "true"]) == 0
    print(load_run(folder).metrics["epochs"])


def test_a_fit_from_end_to_end_unpickles_nothing(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "run"
    options = {name: value for name, value in inputs.items() if name != "epochs"} | {"output_dir": folder}
    done = Forked(tmp_path / "output", fit_without_pickle, line(options), folder).end()
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "2"


def test_a_base_with_pickled_weights_is_refused(tmp_path):
    base = Path(save_base(tmp_path / "base"))
    model = Backbone.from_pretrained(base).model
    (base / "model.safetensors").unlink()
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"cannot be loaded: .*save_pretrained.*model\.safetensors"):
        Backbone.from_pretrained(base)


# An adapter in the place of a base


ABOUT = {"base_model_name_or_path": "../elsewhere", "peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
ADAPTERS = {
    "of another base": (json.dumps(ABOUT), r"is an adapter of '\.\./elsewhere'; give that as the base, or merge the adapter"),
    "of no base": ('{"peft_type": "LORA"}', r"is an adapter; give the one that it was trained on as the base, or merge"),
    "damaged": ("[" * 100_000, r"is an adapter; give the one that it was trained on as the base, or merge"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("whole", [False, True], ids=["alone", "beside a base"])
def test_an_adapter_is_no_base(tmp_path, kind, whole):
    about, message = ADAPTERS[kind]
    folder = tmp_path / "base"
    if whole:
        save_base(folder)
        Backbone.from_pretrained(folder)
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(about)
    with pytest.raises(InputError, match=message) as caught:
        Backbone.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_a_run_is_no_base(finished, inputs):
    with pytest.raises(InputError, match=re.escape(f"is an adapter of {inputs['base_model']!r}; give that as the base")):
        Backbone.from_pretrained(finished / "adapters" / "ada")


def test_an_adapter_on_the_hub_is_no_base(tmp_path, monkeypatch):
    repository = tmp_path / "models--ada--adapter"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "adapter_config.json").write_text(json.dumps(ABOUT))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"base model 'ada/adapter' is an adapter of '\.\./elsewhere'"):
        Backbone.from_pretrained("ada/adapter")


# A model's own code

CODE = """
    from pathlib import Path
    from transformers import OPTConfig, OPTForCausalLM
    Path({mark!r}).write_text("the code ran")
    class OwnConfig(OPTConfig):
        model_type = "own"
    class OwnForCausalLM(OPTForCausalLM):
        config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """A base whose classes are in a file beside it, and the file that the code writes."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    base, mark = Path(save_base(tmp_path / "base")), tmp_path / "mark"
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "own.py").write_text(textwrap.dedent(CODE.format(mark=str(mark))))
    return base, mark


def test_code_of_a_model_does_not_run_unasked(own_code, inputs, tmp_path, capsys):
    base, mark = own_code
    with pytest.raises(InputError, match=r"brings code of its own, which is not run: .* --trust_remote_code true") as caught:
        Backbone.from_pretrained(base)
    assert "\n" not in str(caught.value)
    assert command_main()(line({**inputs, "base_model": base, "output_dir": tmp_path / "run"})) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"error: base model {str(base)!r} brings code of its own")
    assert not mark.exists()
    assert not (tmp_path / "run").exists()


def test_a_run_folder_cannot_ask_for_code_to_run(own_code, finished, tmp_path):
    base, mark = own_code
    run = shutil.copytree(finished, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"base_model": str(base), "trust_remote_code": True}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match="brings code of its own, which is not run"):
        load_run(run)
    assert not mark.exists()
    assert load_run(run, trust_remote_code=True).metrics == RunFolder.open(finished).read_metrics()
    assert mark.exists()


COMMANDS = {
    "adapt": ["--data", "{table}", "--steps", "1", "--output_dir", "{out}"],
    "generate": ["--prompt", "red", "--max_new_tokens", "2"],
    "infer_task": ["--text", "red green"],
    "export_adapters": ["--output_dir", "{out}"],
    "compare_routing": ["--lengths", "all", "--output", "{out}.csv"],
    "diagnose": ["--output", "{out}"],
    "report": ["--samples", "0", "--output", "{out}.html"],
}


@pytest.mark.parametrize("script", COMMANDS)
def test_every_command_that_reads_a_run_can_be_told_to_run_its_base_s_code(own_code, finished, tmp_path, capsys, script):
    if script == "compare_routing":
        pytest.importorskip("sklearn")
    base, mark = own_code
    run = shutil.copytree(finished, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"base_model": str(base)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    table = write_table(tmp_path / "new.csv", documents(("Dora",), number=2))
    words = [str(run), *(word.format(table=table, out=tmp_path / "out") for word in COMMANDS[script])]
    main = script_main(script)
    assert main(words) == 2
    assert "brings code of its own, which is not run" in capsys.readouterr().err
    assert not mark.exists()
    assert main([*words, "--trust_remote_code", "true"]) == 0
    assert mark.exists()


def test_code_of_a_model_runs_where_it_is_asked_for(own_code):
    base, mark = own_code
    assert type(Backbone.from_pretrained(base, trust_remote_code=True).model).__name__ == "OwnForCausalLM"
    assert mark.read_text() == "the code ran"


# The resolved configuration


def test_the_config_of_a_run_repeats_it_bit_by_bit(finished, inputs, tmp_path):
    main = command_main()
    assert main(["--config", str(finished / "config.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    for name in ("posterior.safetensors", "split.json", "adapters/ada/adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()
    configs = [(folder / "config.yaml").read_text().splitlines() for folder in (finished, tmp_path / "again")]
    assert [pair[0].partition(":")[0] for pair in zip(*configs, strict=True) if pair[0] != pair[1]] == ["output_dir"]

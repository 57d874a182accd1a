"""Nothing that is read can run: no pickle, no code of a model that was not asked for, no way out of a folder, no bomb."""

from __future__ import annotations

import ast
import gzip
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import pandas as pd
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from bora_pyro import Backbone
from bora_pyro.checkpoint import load_checkpoint, save_checkpoint
from bora_pyro.config import MapFitConfig, parse_config
from bora_pyro.data import bounds
from bora_pyro.data.tables import read_table
from bora_pyro.errors import InputError
from bora_pyro.fit import fit
from bora_pyro.inside import check_links
from bora_pyro.map_run import run_map_fit
from bora_pyro.run_folder import RunFolder, replace_file
from bora_pyro.saved_run import load_run
from tests.tiny_base import documents, line, quick_fit, save_base, script_main, toy_data, toy_model, write_table

ROOT = Path(__file__).parents[1]


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
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_map_fit(parse_config(MapFitConfig, line({**inputs, "output_dir": folder, "tau": 100, "device": "cpu"})), quiet=True)
    return folder


def copy_of(folder, target):
    for file in folder.rglob("*"):
        if file.is_file():
            copied = target / file.relative_to(folder)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(file.read_bytes())
    return target


WITHOUT_PICKLE = """
    import sys
    import bora_pyro.map_run, bora_pyro.saved_run, torch

    def hook(event, arguments):  # every way to unpickle an object finds its class so
        if event == "pickle.find_class":
            raise RuntimeError(f"unpickled {arguments}")

    def refuse(*arguments, **options):
        raise RuntimeError("torch.load or torch.save")

    sys.addaudithook(hook)
    torch.load = torch.save = torch.serialization.load = torch.serialization.save = refuse
    from tests.tiny_base import script_main
    *options, folder = sys.argv[1:]
    assert script_main()([*options, "--epochs", "1"]) == 0
    assert script_main()([*options, "--epochs", "2", "--resume", "true"]) == 0
    print(bora_pyro.saved_run.load_run(folder).metrics["epochs"])
"""


def test_a_fit_from_end_to_end_unpickles_nothing(inputs, tmp_path):
    folder = tmp_path / "run"
    options = {name: value for name, value in inputs.items() if name != "epochs"} | {"output_dir": folder}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_PICKLE), *line(options), folder],
        capture_output=True, text=True, timeout=600, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2"


def test_a_base_with_pickled_weights_is_refused(tmp_path):
    base = Path(save_base(tmp_path / "base"))
    model = Backbone.from_pretrained(base).model
    (base / "model.safetensors").unlink()
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"cannot be loaded: .*save_pretrained.*model\.safetensors"):
        Backbone.from_pretrained(base)


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
    assert script_main()(line({**inputs, "base_model": base, "output_dir": tmp_path / "run"})) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"error: base model {str(base)!r} brings code of its own")
    assert not mark.exists()
    assert not (tmp_path / "run").exists()


def test_a_run_folder_cannot_ask_for_code_to_run(own_code, finished, tmp_path):
    base, mark = own_code
    run = copy_of(finished, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"base_model": str(base), "trust_remote_code": True}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match="brings code of its own, which is not run"):
        load_run(run)
    assert not mark.exists()
    assert load_run(run, trust_remote_code=True).metrics == RunFolder.open(finished).read_metrics()
    assert mark.exists()


def test_code_of_a_model_runs_where_it_is_asked_for(own_code):
    base, mark = own_code
    assert type(Backbone.from_pretrained(base, trust_remote_code=True).model).__name__ == "OwnForCausalLM"
    assert mark.read_text() == "the code ran"


# The resolved configuration


def test_the_config_of_a_run_repeats_it_bit_by_bit(finished, inputs, tmp_path):
    main = script_main()
    assert main(["--config", str(finished / "config.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    for name in ("posterior.safetensors", "split.json", "adapters/ada/adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()
    configs = [(folder / "config.yaml").read_text().splitlines() for folder in (finished, tmp_path / "again")]
    assert [pair[0].partition(":")[0] for pair in zip(*configs, strict=True) if pair[0] != pair[1]] == ["output_dir"]


# Ways out of a folder


def test_links_within_a_folder_are_followed(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a").write_text("a")
    (folder / "b").symlink_to("deep/a")
    (folder / "deep" / "c").symlink_to(folder / "b")
    (tmp_path / "named").symlink_to(folder)
    for path in (folder, tmp_path / "named"):
        check_links(path, "folder")


@pytest.mark.parametrize("target", ["../secret", "/etc/hostname", "..", "../folder-2/file", "deep/../../secret"])
@pytest.mark.parametrize("place", ["link", "deep/link"])
def test_links_out_of_a_folder_are_refused(tmp_path, place, target):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder-2").mkdir()  # a name that begins alike is another folder
    here = tmp_path / "folder" / place
    here.symlink_to(os.path.relpath(tmp_path / "folder" / target, here.parent) if not target.startswith("/") else target)
    with pytest.raises(InputError, match=f"has a link '{place}' that leads out of it; put a copy in its place"):
        check_links(tmp_path / "folder", "folder")


def test_the_hub_cache_keeps_files_beside_its_snapshots(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (blobs / "x").write_text("x")
    (snapshot / "x.csv").symlink_to("../../blobs/x")
    check_links(snapshot, "folder")
    (snapshot / "y.csv").symlink_to("../../../secret")
    with pytest.raises(InputError, match=r"'y\.csv'"):
        check_links(snapshot, "folder")


@pytest.mark.parametrize("name", ["posterior.safetensors", "checkpoints", "metrics.json", "metrics.jsonl", "adapters/ada"])
def test_a_run_with_a_link_out_of_it_is_neither_read_nor_resumed(finished, inputs, tmp_path, name):
    run = copy_of(finished, tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    (run / name).rename(elsewhere)
    (run / name).symlink_to(elsewhere)
    before = sorted((file, file.stat().st_mtime_ns) for file in [elsewhere, *elsewhere.rglob("*")])
    for take in (RunFolder.open, load_run, lambda path: RunFolder.create(path, resume=True)):
        with pytest.raises(InputError, match=f"has a link '{name}' that leads out of it"):
            take(run)
    assert sorted((file, file.stat().st_mtime_ns) for file in [elsewhere, *elsewhere.rglob("*")]) == before
    # and to replace the run deletes the link alone
    with RunFolder.create(run, overwrite=True):
        pass
    assert elsewhere.exists()
    assert list(run.iterdir()) == []


def test_a_link_in_the_place_of_a_temporary_file_is_not_written_through(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".a.json.tmp").symlink_to(tmp_path / "mine")
    replace_file(tmp_path / "a.json", lambda temporary: temporary.write_text("new"))
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "a.json").read_text() == "new"


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """A folder with a table of three tasks; what `datasets` caches goes with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    write_table(folder / "train.csv")
    write_table(tmp_path / "secret.csv", pd.DataFrame({"task": ["secret"], "text": ["of somebody else"]}))
    return folder


def test_a_folder_of_data_with_a_card_is_read(data_folder):
    card = "---\nhomepage: https://example.org/../a\nconfigs:\n- config_name: a\n  data_files: train.csv\n---\nText.\n"
    (data_folder / "README.md").write_text(card)
    assert len(read_table(data_folder)[0]) == len(documents())


def test_a_card_takes_no_more_memory_than_it_is_long(data_folder, monkeypatch):
    monkeypatch.setattr(bounds, "largest_text", lambda: 2**60)
    (data_folder / "README.md").write_text("# no data here")
    assert len(read_table(data_folder)[0]) == len(documents())


FILES = "configs:\n- config_name: a\n  data_files: {}\n"


def link(folder):
    (folder / "test.csv").symlink_to(folder.parent / "secret.csv")


def card(value, name="README.md"):
    text = FILES.format(value)
    return lambda folder: (folder / name).write_text(f"---\n{text}---\n" if name == "README.md" else text)


def content(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def saved(change):
    def write(folder):
        data = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"task": "a", "text": "b"}])})
        data.save_to_disk(folder)
        file = folder / "dataset_dict.json" if "splits" in change else folder / "train" / "state.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return write


WAYS_OUT = {
    "a link": (link, r"has a link 'test\.csv' that leads out of it"),
    "a card": (card("../secret.csv"), r"names '\.\./secret\.csv' in README\.md, which is not in it"),
    "a card with splits": (card("[{split: train, path: ['train.csv', '../s*.csv']}]"), r"names '\.\./s\*\.csv' in README\.md"),
    "a card with a path": (card("/etc/*"), r"names '/etc/\*' in README\.md"),
    "a card with an address": (card("https://example.org/a.csv"), r"names 'https://example\.org/a\.csv'"),
    "a card of YAML": (card("../secret.csv", ".huggingface.yaml"), r"names '\.\./secret\.csv' in \.huggingface\.yaml"),
    "a card with a bomb": (card("&a [x, *a]"), r"README\.md' has YAML that is not used \(the anchor 'a' is not followed"),
    "a saved set": (saved({"_data_files": [{"filename": "../../secret.arrow"}]}), r"names '\.\./\.\./secret\.arrow' in state"),
    "a saved set's splits": (saved({"splits": ["../secret"]}), r"names '\.\./secret' in dataset_dict\.json"),
    "a zip archive": (content("test.csv", b"PK\x03\x04..."), r"holds 'test\.csv', a zip archive; unpack it, or move it away"),
    "a tar archive": (content("a.tar", b"\0" * 257 + b"ustar\0"), r"holds 'a\.tar', a tar archive"),
    "half a gzip file": (content("test.csv", gzip.compress(b"task,text")[:-2]), r"test\.csv' is not a whole gzip file"),
    "a damaged saved set": (content("state.json", b"["), r"state\.json' is damaged; save the data set again"),
    "a pipe": (lambda folder: os.mkfifo(folder / "test.csv"), r"holds 'test\.csv', which is no regular file"),
}


@pytest.mark.parametrize(("make", "message"), WAYS_OUT.values(), ids=WAYS_OUT)
def test_a_folder_of_data_is_read_alone(data_folder, make, message):
    make(data_folder)
    with pytest.raises(InputError, match=message) as caught:
        read_table(data_folder)
    assert "\n" not in str(caught.value)


# Bombs


@pytest.fixture
def small_memory(monkeypatch):
    """A machine on which a file may have a megabyte, expanded."""
    monkeypatch.setattr(bounds, "largest_text", lambda: 2**20)


ROW = b"a,b\n"


@pytest.mark.parametrize("name", ["t.csv.gz", "t.csv", "t.tsv.gz", "t.jsonl.gz"])
def test_a_file_that_expands_beyond_memory_is_not_read(tmp_path, small_memory, name):
    raw = b"task,text\n" + ROW * 2**20
    file = tmp_path / name
    file.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    with pytest.raises(InputError, match="has more bytes than a table may have here, 1048576 by this machine's memory"):
        read_table(file)
    if name.endswith("gz"):
        assert file.stat().st_size < 20_000
        (tmp_path / "folder").mkdir()
        file.rename(tmp_path / "folder" / name)
        with pytest.raises(InputError, match="has more bytes than a table may have here"):
            read_table(tmp_path / "folder")


def test_short_files_of_many_cells_are_not_read(tmp_path, small_memory):
    csv, jsonl, parquet = (tmp_path / name for name in ("t.csv", "t.jsonl", "t.parquet"))
    csv.write_text("a," * 1000 + "b\n" + "\n" * 1000)
    jsonl.write_text("".join(f'{{"{n}": 1}}\n' for n in range(1000)))
    pd.DataFrame({"task": ["a"] * 200_000}).to_parquet(parquet)
    assert parquet.stat().st_size < 5000
    for file in (csv, jsonl, parquet):
        with pytest.raises(InputError, match=r"has more cells \(\d+ rows of \d+ columns\) than a table may have here, 131072"):
            read_table(file)


def test_a_table_of_what_memory_holds_is_read(tmp_path, small_memory):
    file = tmp_path / "t.csv.gz"
    file.write_bytes(gzip.compress(b"task,text\n" + ROW * 10_000))
    assert len(read_table(file)[0]) == 10_000


# Tensors that lie

SITE = "prior_mean.fc2.lora_A"


def header(length, text=b"{}"):
    return length.to_bytes(8, "little") + text


def tensors(change):
    def write(file):
        with_metadata = RunFolder(file.parent).load_metadata(file.stem)
        save_file(change(load_file(file)), file, with_metadata)

    return write


def raw(data):
    return lambda file: file.write_bytes(data)


def entry(**about):
    about = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | about
    text = json.dumps({SITE: about}).encode()
    return raw(header(len(text), text) + b"\0" * 4)


LIES = {
    "an empty file": raw(b""),
    "a header longer than any file": raw(header(2**63)),
    "a header of 2^64 bytes": raw(header(2**64 - 1)),
    "a header longer than this file": raw(header(10**6)),
    "a header that is no JSON": raw(header(4, b"{{{{")),
    "a header that is no mapping": raw(header(2, b"[]")),
    "a tensor of more bytes than there are": entry(shape=[2**40], data_offsets=[0, 2**42]),
    "a tensor of more numbers than bytes": entry(shape=[2**40]),
    "a shape that overflows": entry(shape=[2**63, 2**63]),
    "offsets that cross": entry(data_offsets=[4, 0]),
    "an unknown type": entry(dtype="F31"),
    "a number for a name": raw(header(5, b'{1:1}')),
    "NaN": tensors(lambda found: found | {SITE: found[SITE] * float("nan")}),
    "infinity": tensors(lambda found: found | {SITE: found[SITE] + float("inf")}),
    "another shape": tensors(lambda found: found | {SITE: found[SITE].flatten()}),
    "no dimension": tensors(lambda found: found | {SITE: found[SITE].sum()}),
    "a type that no fit writes": tensors(lambda found: found | {SITE: found[SITE].to(torch.float8_e5m2)}),
    "one too many": tensors(lambda found: found | {"thta": found[SITE].clone()}),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_posterior_that_lies_is_named(finished, tmp_path, lie):
    run = copy_of(finished, tmp_path / "run")
    LIES[lie](run / "posterior.safetensors")
    with pytest.raises(InputError, match=r"posterior(\.safetensors)? ?.*; run the fit again") as caught:
        load_run(run)
    assert "\n" not in str(caught.value)
    assert str(run) in str(caught.value)


@pytest.mark.parametrize("change", [{"test_perplexity": "low"}, {"best_epoch": []}, {"validation_perplexity": {}}, {"tasks": 3}])
def test_metrics_that_lie_are_named(finished, tmp_path, change):
    run = copy_of(finished, tmp_path / "run")
    RunFolder(run).write_metrics(RunFolder(run).read_metrics() | change)
    with pytest.raises(InputError, match=r"metrics\.json .*; run the fit again with --resume true"):
        load_run(run)


SPLIT_LIES = [{"tasks": 3}, {"tasks": {"Ada": 3}}, {"tasks": {"Ada": {"row 1": ["train"]}}}, {"tasks": {}}]


@pytest.mark.parametrize("change", SPLIT_LIES, ids=str)
def test_a_split_that_lies_is_named(finished, tmp_path, change):
    run = copy_of(finished, tmp_path / "run")
    RunFolder(run).write_split(RunFolder(run).read_split() | change)
    with pytest.raises(InputError) as caught:
        load_run(run)
    assert "\n" not in str(caught.value)


def test_json_a_thousand_deep_is_named(finished, tmp_path):
    run = copy_of(finished, tmp_path / "run")
    for name in ("metrics.jsonl", "split.json", "metrics.json"):  # the last is read first
        (run / name).write_text("[" * 100_000 + "\n")
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            load_run(run)


def first(groups, group):
    return next(iter(groups[group]))


def change_tensor(group, change):
    def write(groups, progress):
        name = first(groups, group)
        groups[group][name] = change(groups[group][name])

    return write


def change_progress(**values):
    return lambda groups, progress: progress.update(values)


CHECKPOINT_LIES = {
    "NaN in the parameters": change_tensor("parameters", lambda value: value * float("nan")),
    "infinity in the best state": change_tensor("best", lambda value: value + float("inf")),
    "NaN in the optimiser": change_tensor("optimizer", lambda value: value * float("nan")),
    "another shape": change_tensor("parameters", lambda value: value.flatten()[:1]),
    "another shape in the optimiser": change_tensor("optimizer", lambda value: value.new_zeros(3)),
    "an optimiser of no parameter": lambda groups, progress: groups["optimizer"].update({"99.step": torch.zeros(())}),
    "an optimiser without a number": lambda groups, progress: groups["optimizer"].update({"x.step": torch.zeros(())}),
    "an optimiser without a moment": lambda groups, progress: groups["optimizer"].pop("0.exp_avg"),
    "an epoch that is a text": change_progress(epoch="3"),
    "an epoch that is true": change_progress(epoch=True),
    "a history that is none": change_progress(history=3),
    "a history of nothing": change_progress(history=[None]),
    "a history of other things": change_progress(history=[{"epoch": 1}]),
    "a best epoch that is a list": change_progress(best_epoch=[]),
    "no best epoch": lambda groups, progress: progress.pop("best_epoch"),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The groups and the progress of a checkpoint, saved anew by each test."""
    folder = tmp_path_factory.mktemp("checkpoint")
    fit(toy_model(), toy_data(), epochs=1, token_budget=10_000, checkpoints=folder)
    [file] = folder.iterdir()
    return file


@pytest.mark.parametrize("lie", CHECKPOINT_LIES)
def test_a_checkpoint_that_lies_is_named(checkpoint, tmp_path, lie):
    file = tmp_path / checkpoint.name
    groups, progress = load_checkpoint(checkpoint)
    save_checkpoint(file, groups, progress)
    fit(toy_model(), toy_data(), epochs=1, token_budget=10_000, checkpoints=tmp_path)  # as it is it can be used
    CHECKPOINT_LIES[lie](groups, progress)
    save_checkpoint(file, groups, progress)
    with pytest.raises(InputError, match=r"checkpoint '.*step-\d+\.safetensors' .*--overwrite true") as caught:
        fit(toy_model(), toy_data(), epochs=2, token_budget=10_000, checkpoints=tmp_path)
    assert "\n" not in str(caught.value)

"""The command line: what is accepted, what is refused, and in what words."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from bora_pyro.errors import InputError
from bora_pyro.runs.config.map_fit import MapFitConfig, parse_config, to_yaml


def parse(*argv: str) -> MapFitConfig:
    return parse_config(MapFitConfig, argv, prog="map_fit.py")


def test_no_arguments_give_the_defaults():
    assert parse() == MapFitConfig()
    MapFitConfig().validate()


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--rank", "4"], "rank", 4),
        (["--rank=4"], "rank", 4),
        (["--learning_rate", "1e-3"], "learning_rate", 0.001),
        (["--tau", "inf"], "tau", math.inf),
        (["--tau", "0"], "tau", 0.0),
        (["--tau=1E4"], "tau", 10000.0),
        (["--gradient_clip", "inf"], "gradient_clip", math.inf),
        (["--overwrite", "true"], "overwrite", True),
        (["--overwrite", "False"], "overwrite", False),
        (["--overwrite"], "overwrite", True),
        (["--group_column", "none"], "group_column", None),
        (["--group_column", "speech"], "group_column", "speech"),
        (["--alpha", "null"], "alpha", None),
        (["--alpha", "16"], "alpha", 16.0),
        (["--targets", "q_proj,v_proj"], "targets", ["q_proj", "v_proj"]),
        (["--targets", "q_proj", "v_proj", "--rank", "2"], "targets", ["q_proj", "v_proj"]),
        (["--targets=q_proj, v_proj"], "targets", ["q_proj", "v_proj"]),
        (["--targets", "None"], "targets", None),
        (["--text_column", "a=b"], "text_column", "a=b"),
        (["--text_column=--odd"], "text_column", "--odd"),
        (["--device", "cuda:1"], "device", "cuda:1"),
    ],
)
def test_values_of_the_line(argv, name, value):
    parsed = getattr(parse(*argv), name)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("rank: 4", "rank", 4),
        ("learning_rate: 1e-3", "learning_rate", 0.001),
        ("tau: 1000", "tau", 1000.0),
        ("tau: inf", "tau", math.inf),
        ("tau: .inf", "tau", math.inf),
        ("overwrite: yes", "overwrite", True),
        ("alpha: null", "alpha", None),
        ("num_tasks: none", "num_tasks", None),
        ("targets: [fc1, fc2]", "targets", ["fc1", "fc2"]),
        ("targets: fc1, fc2", "targets", ["fc1", "fc2"]),
        ("text_column: 2020", "text_column", "2020"),
        ("targets: ['a,b', ' c']", "targets", ["a,b", " c"]),
        ("group_column: 'none'", "group_column", "none"),
        ("group_column: ~", "group_column", None),
        ("alpha:", "alpha", None),
        ("gradient_clip: .inf", "gradient_clip", math.inf),
        ("# nothing\n", "rank", 8),
        ("", "rank", 8),
        ("\ufeffrank: 4", "rank", 4),
        # what YAML 1.1 makes something else of: true, 90, a date, 8, 1.1, a text
        ("text_column: no", "text_column", "no"),
        ("text_column: On", "text_column", "On"),
        ("text_column: 1:30", "text_column", "1:30"),
        ("text_column: 2020-01-01", "text_column", "2020-01-01"),
        ("data: 2020-13-45", "data", "2020-13-45"),
        ("text_column: 1.10", "text_column", "1.10"),
        ("text_column: =", "text_column", "="),
        ("seed: 010", "seed", 10),
        ("learning_rate: 2e-2", "learning_rate", 0.02),
        ("overwrite: on", "overwrite", True),
        ("overwrite: 'no'", "overwrite", False),
        ("targets: [no, 3]", "targets", ["no", "3"]),
    ],
)
def test_values_of_a_file(tmp_path, text, name, value):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    parsed = getattr(parse("--config", str(file)), name)
    assert parsed == value
    assert type(parsed) is type(value)


def test_the_line_wins_over_the_file_in_any_order(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("rank: 4\nepochs: 2\n")
    for argv in (["--rank", "16", f"--config={file}"], ["--config", str(file), "--rank", "16"]):
        config = parse(*argv)
        assert (config.rank, config.epochs, config.seed) == (16, 2, 0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rnak", "3"], "unknown option 'rnak'; did you mean 'rank'?"),
        (["--learning-rate=3"], "unknown option 'learning-rate'; did you mean 'learning_rate'?"),
        (["--zzz", "3"], "unknown option 'zzz'; --help lists them all"),
        (["--tokens", "3"], "unknown option 'tokens'; did you mean 'max_tokens'?"),
        (["rank", "3"], "unexpected 'rank': every value follows its option, as in --key value"),
        (["--rank", "3", "4"], "unexpected '4': every value follows its option, as in --key value"),
        (["--rank", "3", "--rank=4"], "--rank is given twice; give it once"),
        (["--overwrite", "--overwrite"], "--overwrite is given twice; give it once"),
        (["--config", "a.yaml", "--config", "b.yaml"], "--config is given twice; give it once"),
        (["--rank"], "--rank: a value must follow, as in --key value"),
        (["--targets"], "--targets: a value must follow, as in --key value"),
        (["--rank", "many"], "--rank: 'many' cannot be used; give a whole number"),
        (["--rank", "3.5"], "--rank: '3.5' cannot be used; give a whole number"),
        (["--rank="], "--rank: '' cannot be used; give a whole number"),
        (["--rank", "none"], "--rank: 'none' cannot be used; give a whole number"),
        (["--num_tasks", "all"], "--num_tasks: 'all' cannot be used; give a whole number or none"),
        (["--overwrite", "maybe"], "--overwrite: 'maybe' cannot be used; give true or false"),
        (["--targets", ","], "--targets: [','] cannot be used; give a list of names or none"),
        (
            ["--tau", "learnt"],
            "--tau: 'learnt' cannot be used; give learned, a number, 0 (independent tasks) or inf (one shared adapter)",
        ),
    ],
)
def test_bad_lines(argv, message):
    with pytest.raises(InputError) as caught:
        parse(*argv)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak: 3", ": unknown option 'rnak'; did you mean 'rank'?"),
        ("zzz: other.yaml", ": unknown option 'zzz'; --help lists them all"),
        ("1: 2", ": unknown option '1'; --help lists them all"),
        ("rank: true", ": rank: 'true' cannot be used; give a whole number"),
        ("rank: 3.0", ": rank: '3.0' cannot be used; give a whole number"),
        ("rank: 0x10", ": rank: '0x10' cannot be used; give a whole number"),
        ("rank: null", ": rank: None cannot be used; give a whole number"),
        ("overwrite: y", ": overwrite: 'y' cannot be used; give true or false"),
        ("overwrite: 1", ": overwrite: '1' cannot be used; give true or false"),
        ("text_column:", ": text_column: None cannot be used; give a text, or several"),
        ("text_column: {a: b}", ": text_column: {'a': 'b'} cannot be used; give a text, or several"),
        ("group_column: [a]", ": group_column: ['a'] cannot be used; give a text or none"),
        ("targets: [[a]]", ": targets: [['a']] cannot be used; give a list of names or none"),
        ("targets: [a, '']", ": targets: ['a', ''] cannot be used; give a list of names or none"),
        ("targets: []", ": targets: [] cannot be used; give a list of names or none"),
        ("rank: 3\n# rank: 5\nrank: 4", ", line 3: 'rank' is given twice, first in line 1"),
        ("data: {a: 1,\n  a: 2}", ", line 2: 'a' is given twice, first in line 1"),
        ("rank: 3\n\tepochs: 4", ", line 2: a tab is used where YAML needs spaces"),
        ("data: &a x\ntask_column: *a", ", line 1: the anchor 'a' is not supported; write the value in its place"),
        ("task_column: *a", ", line 1: the anchor 'a' is not supported"),
        ("<<: {rank: 4}", ", line 1: '<<' is not supported; write the options out"),
        ("rank: 4\n'<<': 3", ", line 2: '<<' is not supported"),
        ("? [a]\n: 3", ", line 1: a list or a mapping is used as a key; give names as keys"),
        ("null: 3", ": the key None is not a text; give names as keys"),
        ("rank: !!int 4", ", line 1: the tag '!!int' is not supported; write the value alone"),
        ("rank: !mine 4", ", line 1: the tag '!mine' is not supported; write the value alone"),
        ("%TAG ! tag:me,2000:\n---\nrank: !x 4", ", line 3: the tag 'tag:me,2000:x' is not supported"),
        ("targets: " + "[" * 40 + "]" * 40, ", line 1: lists and mappings are nested more than 16 deep"),
        ("rank: 4\n---\nrank: 4", ", line 2: but found another document"),
        ("data: '\x00'", ": unacceptable character #x0000"),
        ('data: "\\UFFFFFFFF"', ": "),
        ("# " + "x" * 2**17, ": it is larger than 128 KiB"),
        ("rank: 3\n  epochs: 4", ", line 2: mapping values are not allowed here"),
        ("rank: [3\n", ", line 2: expected ',' or ']', but got '<stream end>'"),
        ("- rank\n", ": holds a list; give a mapping, one `key: value` a line"),
        ("rank\n", ": holds a text; give a mapping, one `key: value` a line"),
        (
            "rank: !!python/object/apply:os.getcwd []",
            ", line 1: the tag '!!python/object/apply:os.getcwd' is not supported; write the value alone",
        ),
        (f"tau: 1{'0' * 400}", ": tau: '1000"),
        ("tau: 1e999", ": tau: '1e999' cannot be used"),
        (f"seed: 1{'0' * 5000}", ": seed: '1000"),
    ],
)
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        parse("--config", str(file))
    assert str(caught.value).startswith(f"--config {file}{message}")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        parse("--config", str(tmp_path / "missing.yaml"))
    with pytest.raises(InputError, match="Is a directory"):
        parse("--config", str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes(b"data: \xff\xfe")
    with pytest.raises(InputError, match="byte 0xff at position 6 is not UTF-8"):
        parse("--config", str(tmp_path / "latin.yaml"))
    with pytest.raises(InputError, match="null byte"):
        parse("--config", "a\0b")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank is 0; give a whole number from 1 up"),
        ({"max_tokens": 1}, "max_tokens is 1; give a whole number from 2 up"),
        ({"epochs": 0}, "epochs is 0; give a whole number from 1 up"),
        ({"num_tasks": 0}, "num_tasks is 0; give a whole number from 1 up"),
        ({"patience": -1}, "patience is -1; give a whole number from 0 up"),
        ({"seed": -1}, "seed is -1; give a whole number from 0 up"),
        ({"seed": 2**32}, "seed is 4294967296; give a whole number below 2**32"),
        ({"threads": 0}, "threads is 0; give a whole number from 1 up"),
        ({"epochs": 2**31}, "epochs is 2147483648; give a whole number of at most 2147483647"),
        ({"rank": 10**5}, "rank is 100000; give a whole number of at most 65536"),
        ({"tau": 1e-40}, "tau is 1e-40; give a number between 1e-30 and 1e+30, or 0, or inf"),
        ({"alpha": 0.0}, "alpha is 0.0; give a finite number above 0"),
        ({"alpha": math.nan}, "alpha is nan; give a finite number above 0"),
        ({"learning_rate": math.inf}, "learning_rate is inf; give a finite number above 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; give a finite number above 0"),
        ({"gradient_clip": 0.0}, "gradient_clip is 0.0; give a number above 0, or inf for no clipping"),
        ({"warmup": 1.5}, "warmup is 1.5; give a fraction of the steps, from 0 to 1"),
        ({"tau": -1.0}, "tau is -1.0; give learned, a number above 0, or 0 (independent tasks), or inf (one shared adapter)"),
        ({"tau": math.nan}, "tau is nan; give learned, a number above 0, or 0 (independent tasks), or inf (one shared adapter)"),
        ({"device": "gpu"}, "device is 'gpu'; allowed: auto, cpu, cuda, cuda:N, mps, xpu"),
        ({"data": " "}, "data is empty; give a name, or leave it out for its default"),
        (
            {"prior_form": "centred"},
            "prior_form is 'centred'; allowed: noncentered, centered; did you mean 'centered'?",
        ),
        ({"precision": "float16"}, "precision is 'float16'; allowed: float32, bfloat16; did you mean 'bfloat16'?"),
        ({"likelihood_unit": "token"}, "likelihood_unit is 'token'; allowed: tokens, documents; did you mean 'tokens'?"),
        ({"small_tasks": "keep"}, "small_tasks is 'keep'; allowed: error, drop"),
    ],
)
def test_validate(values, message):
    with pytest.raises(InputError) as caught:
        MapFitConfig(**values).validate()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        ({"max_tokens": 8192}, "give token_budget 8192 or more, or lower max_tokens"),
        ({"scale_learning_rate_with_tau": True}, "leave it out, or give --prior_form centered"),
        ({"scale_learning_rate_with_tau": True, "prior_form": "centered", "tau": math.inf}, "above 0 and below inf"),
        ({"overwrite": True, "resume": True}, "give one of them"),
    ],
)
def test_values_that_do_not_go_together(values, remedy):
    with pytest.raises(InputError, match=re.escape(remedy)):
        MapFitConfig(**values).validate()


def test_the_line_is_validated():
    with pytest.raises(InputError, match=r"tau is -1\.0"):
        parse("--tau", "-1")


def test_print_config_prints_yaml_that_reads_back(tmp_path, capsys):
    argv = ["--tau", "inf", "--learning_rate", "1e-10", "--targets", "fc1", "fc2", "--text_column", "Språk: æøå"]
    with pytest.raises(SystemExit) as caught:
        parse(*argv, "--print_config")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    options = [text for text in printed.splitlines(keepends=True) if not text.startswith("#")]
    assert "".join(options) == to_yaml(parse(*argv))
    help_of_rank = MapFitConfig.__dataclass_fields__["rank"].metadata["help"]
    assert f"# {help_of_rank}\nrank: 8\n" in printed
    file = tmp_path / "config.yaml"
    file.write_text(printed, encoding="utf-8")
    assert parse("--config", str(file)) == parse(*argv)


def test_help_documents_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: map_fit.py [--config FILE.yaml] [--key value ...]")
    for field in dataclasses.fields(MapFitConfig):
        assert f"  --{field.name} " in printed
        assert field.metadata["help"]
    assert printed.count("(default:") == len(dataclasses.fields(MapFitConfig))

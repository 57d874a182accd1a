"""Configurations of any script as a command line: values that stand alone, what no file may say, how a program ends."""

from __future__ import annotations

import dataclasses
import re

import pytest

from bora_pyro.errors import InputError
from bora_pyro.options.command_line import run_script
from bora_pyro.options.field import option
from bora_pyro.runs.config.adapt import AdaptConfig
from bora_pyro.runs.config.map_fit import MapFitConfig, parse_config, to_yaml
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig


def parse(*argv: str) -> MapFitConfig:
    return parse_config(MapFitConfig, argv, prog="map_fit.py")


@dataclasses.dataclass
class Journey:
    """A journey."""

    start: str = option("", "where it begins", positional=True)
    over: list[str] | None = option(None, "places on the way")
    speed: float = option(1.5, "metres a second")


@pytest.mark.parametrize(
    ("argv", "journey"),
    [
        ([], Journey()),
        (["Oslo"], Journey("Oslo")),
        (["Oslo", "--speed", "2"], Journey("Oslo", speed=2.0)),
        (["--speed=2", "Oslo"], Journey("Oslo", speed=2.0)),
        (["Oslo", "--over", "Hamar", "Tynset"], Journey("Oslo", ["Hamar", "Tynset"])),
        (["--over", "Hamar", "--speed", "2", "Oslo"], Journey("Oslo", ["Hamar"], 2.0)),
        (["--", "-Oslo"], Journey("-Oslo")),
    ],
)
def test_a_value_that_stands_alone(argv, journey):
    assert parse_config(Journey, argv) == journey


def test_a_value_that_stands_alone_comes_from_a_file_too(tmp_path):
    file = tmp_path / "journey.yaml"
    file.write_text("start: Oslo\nspeed: 2\n")
    assert parse_config(Journey, ["--config", str(file)]) == Journey("Oslo", speed=2.0)
    assert parse_config(Journey, ["Bergen", "--config", str(file)]) == Journey("Bergen", speed=2.0)
    file.write_text(to_yaml(Journey("Oslo")))
    assert parse_config(Journey, ["--config", str(file)]) == Journey("Oslo")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["Oslo", "Bergen"], "unexpected 'Bergen': every value follows its option, as in --key value"),
        (["--start", "Oslo"], "--start is not an option: give its value alone, as in journey.py START"),
        (["--start=Oslo"], "--start is not an option: give its value alone, as in journey.py START"),
        (["Oslo", "--sped", "2"], "unknown option 'sped'; did you mean 'speed'?"),
    ],
)
def test_bad_lines_with_a_value_that_stands_alone(argv, message):
    with pytest.raises(InputError) as caught:
        parse_config(Journey, argv, prog="journey.py")
    assert str(caught.value) == message


def test_help_shows_a_value_that_stands_alone(capsys):
    with pytest.raises(SystemExit):
        parse_config(Journey, ["--help"], prog="journey.py")
    printed = capsys.readouterr().out
    assert printed.startswith("usage: journey.py START [--config FILE.yaml] [--key value ...]")
    assert re.search(r"^  START +where it begins$", printed, re.MULTILINE)


def test_a_file_cannot_let_code_run(tmp_path):
    file = tmp_path / "fit.yaml"
    file.write_text("trust_remote_code: true\nrank: 4\n")
    config = parse("--config", str(file))
    assert (config.trust_remote_code, config.rank) == (False, 4)
    assert parse("--config", str(file), "--trust_remote_code", "true").trust_remote_code
    file.write_text("trust_remote_code: perhaps\n")
    with pytest.raises(InputError, match="trust_remote_code: 'perhaps' cannot be used"):
        parse("--config", str(file))


def test_a_configuration_of_another_script_is_recognised(tmp_path):
    file = tmp_path / "fit.yaml"
    file.write_text(to_yaml(MapFitConfig(rank=4)))
    with pytest.raises(InputError, match=r"is a configuration of map_fit\.py; give one of this script") as caught:
        parse_config(PosteriorFitConfig, ["--config", str(file)], others={"map_fit.py": MapFitConfig})
    assert "\n" not in str(caught.value)
    file.write_text("data: a.csv\nsteps: 3\n")
    with pytest.raises(InputError, match=r"is a configuration of adapt\.py"):
        parse_config(MapFitConfig, ["--config", str(file)], others={"adapt.py": AdaptConfig})
    file.write_text("rnak: 4\n")
    with pytest.raises(InputError, match="unknown option 'rnak'; did you mean 'rank'"):
        parse("--config", str(file))


@pytest.mark.parametrize("value", ["-1e3", "-inf", "-.5", "-NaN"])
def test_negative_numbers_are_values(value):
    with pytest.raises(InputError) as joined:
        parse(f"--tau={value}")
    with pytest.raises(InputError) as apart:
        parse("--tau", value)
    assert str(apart.value) == str(joined.value)
    assert "tau" in str(apart.value)


def test_ctrl_c_ends_with_a_line(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_choice_called_none_is_a_value(tmp_path):
    assert parse("--quoting", "none").quoting == "none"
    assert parse("--data", "a.csv").quoting is None
    file = tmp_path / "fit.yaml"
    for text in ("quoting: none\n", 'quoting: "none"\n', to_yaml(parse("--quoting", "none"))):
        file.write_text(text)
        assert parse("--config", str(file)).quoting == "none"

"""Every configuration as a JSON schema: what it allows is what the reader allows, in the types of YAML."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import yaml
from jsonschema import Draft202012Validator

from bora_pyro.cli import CONFIGURATIONS
from bora_pyro.options.command_line import parse_config, to_yaml
from bora_pyro.options.field import option
from bora_pyro.options.schema import DRAFT, json_schema
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig
from tests.tiny_base import SCRIPTS, script


def all_configs():
    """The configuration of each command, and of each script that is none."""
    yield from CONFIGURATIONS.values()
    for file in sorted(SCRIPTS.rglob("*.py")):
        if "option(" in file.read_text(encoding="utf-8"):
            module = script(file.stem)
            for value in vars(module).values():
                if dataclasses.is_dataclass(value) and value.__module__ == file.stem and _documented(value):
                    yield value


def _documented(cls):
    return any("help" in field.metadata for field in dataclasses.fields(cls))


def check(cls):
    schema = json_schema(cls)
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == DRAFT
    assert list(schema["properties"]) == [field.name for field in dataclasses.fields(cls)]
    for field in dataclasses.fields(cls):
        about = schema["properties"][field.name]
        assert about["description"] == field.metadata["help"] != ""
        assert "default" in about
    validator = Draft202012Validator(schema)
    validator.validate(yaml.safe_load(to_yaml(cls())))
    validator.validate({name: about["default"] for name, about in schema["properties"].items()})
    assert not validator.is_valid({"no_such_option": 1})
    json.loads(json.dumps(schema, allow_nan=False))


@pytest.mark.parametrize("cls", [MapFitConfig, PosteriorFitConfig])
def test_the_schema_of_a_fit(cls):
    check(cls)


def test_the_schemas_of_all_commands_and_scripts():
    found = list(all_configs())
    assert len(found) > len(CONFIGURATIONS) + 10
    for cls in found:
        check(cls)


@dataclasses.dataclass
class Journey:
    """A journey, by land or by sea."""

    start: str = option("", "where it begins", positional=True)
    over: list[str] | None = option(None, "places on the way")
    speed: float = option(math.inf, "metres a second")
    pace: float | str = option(1.0, "steps a second, or any", words=("any",))
    rest: int | None = option(None, "days of rest")
    by: str | None = option(None, "how", choices=("land", "sea"))
    back: bool = option(False, "and back")
    stops: list[str] = option(["Hamar"], "stops")


def test_a_schema_word_by_word():
    schema = json_schema(Journey)
    assert (schema["title"], schema["description"]) == ("Journey", "A journey, by land or by sea.")
    assert (schema["type"], schema["additionalProperties"]) == ("object", False)
    names = {"type": "array", "items": {"type": "string"}, "minItems": 1}
    assert schema["properties"] == {
        "start": {"description": "where it begins", "type": "string", "default": ""},
        "over": {"description": "places on the way", "anyOf": [names, {"type": "null"}], "default": None},
        "speed": {"description": "metres a second", "anyOf": [{"type": "number"}, {"enum": ["inf"]}], "default": "inf"},
        "pace": {
            "description": "steps a second, or any", "anyOf": [{"type": "number"}, {"enum": ["inf", "any"]}], "default": 1.0
        },
        "rest": {"description": "days of rest", "anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
        "by": {"description": "how", "anyOf": [{"enum": ["land", "sea"]}, {"type": "null"}], "default": None},
        "back": {"description": "and back", "type": "boolean", "default": False},
        "stops": {"description": "stops", **names, "default": ["Hamar"]},
    }  # fmt: skip


GOOD = [{"speed": 3}, {"speed": "inf"}, {"pace": "any"}, {"by": "sea"}, {"by": None}, {"over": ["a"]}, {"rest": None}]
BAD = [{"speed": "fast"}, {"pace": "all"}, {"by": "air"}, {"over": "a"}, {"over": []}, {"rest": 1.5}, {"back": "x"}, {"start": 1}]


@pytest.mark.parametrize("values", GOOD + BAD, ids=str)
def test_the_schema_and_the_reader_agree(tmp_path, values):
    file = tmp_path / "journey.yaml"
    file.write_text(yaml.safe_dump(values))
    assert Draft202012Validator(json_schema(Journey)).is_valid(values) == (values in GOOD)
    if values in GOOD:
        [(name, value)] = values.items()
        assert getattr(parse_config(Journey, ["--config", str(file)]), name) == (math.inf if value == "inf" else value)


def test_print_schema(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(PosteriorFitConfig, ["--print_schema"])  # a run need not be named for it
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out) == json_schema(PosteriorFitConfig)

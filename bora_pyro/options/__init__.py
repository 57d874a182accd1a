"""Configuration dataclasses, whose fields hold their own help and checks, and the command line that fills them."""

from bora_pyro.options.command_line import parse_config, run_script, to_yaml
from bora_pyro.options.field import changed, check_choices, check_fields, option, with_changes
from bora_pyro.options.schema import json_schema

__all__ = [
    "changed", "check_choices", "check_fields", "json_schema", "option", "parse_config", "run_script", "to_yaml", "with_changes",
]  # fmt: skip

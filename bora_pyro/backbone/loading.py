"""Refuse an adapter in place of a base model. transformers would load the base that the adapter names.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> _ = (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "facebook/opt-350m"}')
>>> check_no_adapter(folder)
Traceback (most recent call last):
bora_pyro.errors.InputError: base model '...' is an adapter of 'facebook/opt-350m'; give that as the base, or merge ...
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers.utils import find_adapter_config_file

from bora_pyro.errors import InputError, shown
from bora_pyro.files.regular import read_regular

#: The largest adapter configuration, in bytes, that is read to find the name of its base.
CONFIG_BYTES = 2**20


def check_no_adapter(name: str | Path) -> None:
    """Check that a base is not an adapter and has no adapter in its folder.

    transformers would silently load another base, the one that the adapter names, with the adapter merged into it.

    Args:
        name: a folder or a hub id. The function does nothing for any other name.

    Raises:
        InputError: the folder or repository has an ``adapter_config.json``.
        OSError: the hub has no such repository.
    """
    file = find_adapter_config_file(str(name))
    if file is None:
        return
    try:
        base = json.loads(read_regular(Path(file), most=CONFIG_BYTES))["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        base = None
    of, give = (f" of {shown(base)}", "that") if isinstance(base, str) and base else ("", "the one that it was trained on")
    raise InputError(
        f"base model {str(name)!r} is an adapter{of}; give {give} as the base, or merge the adapter into its base and take "
        "adapter_config.json out of the folder"
    )

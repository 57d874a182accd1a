"""Settings of the whole test run, docstring snippets included."""

import functools
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tokens are cached in a folder of this run: no test finds those of an earlier one."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets-cache")
    yield datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session", autouse=True)
def documentation_once() -> Iterator[None]:
    """``builtin:documentation`` is taken from networkx's sources once, not by each test that reads it."""
    from bora_pyro.data.builtin import BUILTIN
    from bora_pyro.data.documentation import documentation_rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUILTIN, "builtin:documentation", functools.cache(documentation_rows))
        yield

"""Versions of the software that produced a result.

>>> list(versions())
['bora_pyro', 'torch', 'pyro-ppl', 'transformers', 'Python']
"""

from __future__ import annotations

import platform
from importlib import metadata

_PACKAGES = ("torch", "pyro-ppl", "transformers")


def versions() -> dict[str, str]:
    """Versions of this library, of the libraries that decide its numbers, and of Python."""
    from bora_pyro import __version__  # imported late: the package imports this module

    packages = {name: metadata.version(name) for name in _PACKAGES}
    return {"bora_pyro": __version__, **packages, "Python": platform.python_version()}

"""The versions that a result was made with.

>>> list(versions())
['bora_pyro', 'torch', 'pyro-ppl', 'transformers', 'Python']
"""

from __future__ import annotations

import platform
from importlib import metadata

_PACKAGES = ("torch", "pyro-ppl", "transformers")


def versions() -> dict[str, str]:
    """This library, those whose numbers it gives on, and Python."""
    from bora_pyro import __version__  # the package is complete only after its modules are

    packages = {name: metadata.version(name) for name in _PACKAGES}
    return {"bora_pyro": __version__, **packages, "Python": platform.python_version()}

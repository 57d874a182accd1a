"""Diagnose the shrinkage of a finished fit, and compare it with other fits on the same held-out documents.

    python scripts/diagnose.py runs/speeches --compare runs/speeches-independent runs/speeches-pooled

What it writes: :mod:`bora_pyro.runs.diagnose`. Every option: ``python scripts/diagnose.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("diagnose")

if __name__ == "__main__":
    run_script(main)

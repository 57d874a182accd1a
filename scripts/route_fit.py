"""Fit gates over the adapters of a finished run (MeteoRA): each token is read by k of them, and a text needs no task.

    python scripts/route_fit.py runs/demo --k 2 --output_dir runs/routed

What it reads and writes: :mod:`bora_pyro.runs.route_fit`. Every option: ``python scripts/route_fit.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("route-fit")

if __name__ == "__main__":
    run_script(main)

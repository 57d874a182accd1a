"""Adapt a finished fit to new tasks with few documents each: Θ and τ stay fixed, only the new deviations are inferred.

    python scripts/adapt.py runs/demo --data new.csv --output_dir runs/new

Every option: ``python scripts/adapt.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("adapt")

if __name__ == "__main__":
    run_script(main)

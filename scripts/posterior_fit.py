"""Fit a posterior around a finished MAP fit: how certain is each task's adapter?

    python scripts/posterior_fit.py runs/demo --guide normal --output_dir runs/demo-posterior

Every option: ``python scripts/posterior_fit.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("posterior-fit")

if __name__ == "__main__":
    run_script(main)

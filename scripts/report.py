"""Make the page of a finished run, of a sweep over τ, or of a folder of runs: one self-contained HTML file.

    python scripts/report.py runs/demo
    python scripts/report.py results/documentation.csv
    python scripts/report.py runs --output runs.html

What is on it: :mod:`bora_pyro.report.make_page`. Every option: ``python scripts/report.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("report")

if __name__ == "__main__":
    run_script(main)

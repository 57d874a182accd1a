"""Check the calibration of a finished run: are its probabilities right, and is it uncertain where it is wrong?

    python scripts/calibrate.py runs/demo-posterior --draws 8 --foreign other.csv --questions questions.jsonl

What it writes: :mod:`bora_pyro.runs.calibrate`. Every option: ``python scripts/calibrate.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("calibrate")

if __name__ == "__main__":
    run_script(main)

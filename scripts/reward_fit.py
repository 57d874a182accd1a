"""Fit adapters to rewards: the adapted model writes behind prompts, and a function says how good each text is.

    python scripts/reward_fit.py --prompts prompts.csv --reward builtin:length --output_dir runs/rewards

What it reads and writes: :mod:`bora_pyro.runs.reward_fit`. Every option: ``python scripts/reward_fit.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("reward-fit")

if __name__ == "__main__":
    run_script(main)

"""Sweep over τ: how strong should the prior be? Each τ is fitted at its own best learning rate; validation perplexity decides.

    python scripts/tau_sweep.py --taus 0 1 10 100 1000 10000 inf learned --output results/documentation

How it does that: :mod:`bora_pyro.runs.tau_sweep`. Every option: ``python scripts/tau_sweep.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("tau-sweep")

if __name__ == "__main__":
    run_script(main)

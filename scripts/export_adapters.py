"""Export the adapters of a finished run: a flat folder of PEFT folders with model cards, ready to serve or to publish.

    python scripts/export_adapters.py runs/speeches --output_dir exports/speeches --tasks abraham-lincoln "Theodore Roosevelt"

    python scripts/export_adapters.py runs/speeches-posterior --output_dir exports/speeches --draws 4 --push_to_hub USER/NAME

It writes ``<task>/`` (the MAP estimate, or the posterior's mean), ``global-mean/`` (Θ) and with ``--draws`` of a posterior
``<task>--draw-0/`` and so on; ``README.md`` in each folder and above them, ``shrinkage.png``, and ``export.json``, which says
what each folder is. The folder appears when all of it is written. Every option: ``python scripts/export_adapters.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("export-adapters")

if __name__ == "__main__":
    run_script(main)

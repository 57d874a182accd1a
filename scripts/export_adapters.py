"""Export the adapters of a finished run as PEFT folders with model cards, in one folder that is ready to serve or publish.

    python scripts/export_adapters.py runs/speeches --output_dir exports/speeches --tasks abraham-lincoln "Theodore Roosevelt"

    python scripts/export_adapters.py runs/speeches-posterior --output_dir exports/speeches --draws 4 --push_to_hub USER/NAME

It writes ``<task>/`` (the MAP estimate, or the posterior's mean) and ``global-mean/`` (Θ). With ``--draws`` of a posterior it
also writes ``<task>--draw-0/`` and so on. Each folder, and the export as a whole, has a ``README.md``. ``export.json`` says what
each folder is, and ``shrinkage.png`` shows the shrinkage. The export appears once it is complete.

Every option: ``python scripts/export_adapters.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("export-adapters")

if __name__ == "__main__":
    run_script(main)

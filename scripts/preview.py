"""Show how a fit would read a file: its columns, tasks and splits, and two documents with the predicted part marked.

    python scripts/preview.py --data speeches.csv --base_model facebook/opt-350m

Every option: ``python scripts/preview.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("preview")

if __name__ == "__main__":
    run_script(main)

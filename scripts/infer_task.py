"""Infer the task of a text: which task of a finished run does it belong to?

    python scripts/infer_task.py runs/demo --text "Returns the shortest path between two nodes." --unknown 0.1

Every option: ``python scripts/infer_task.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("infer-task")

if __name__ == "__main__":
    run_script(main)

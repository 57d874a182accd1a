"""Continue a prompt with the adapters of several tasks, and show the texts side by side.

    python scripts/generate.py runs/demo --prompt "Returns the" --task drawing --task utils --task base

Every option: ``python scripts/generate.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("generate")

if __name__ == "__main__":
    run_script(main)

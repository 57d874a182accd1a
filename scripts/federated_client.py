"""Run a client of a federated fit: its documents stay here.

    python scripts/federated_client.py --name ada --data ada.csv --insecure true

What it reads and writes: :mod:`bora_pyro.runs.federated_client`. Every option: ``python scripts/federated_client.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("federated-client")

if __name__ == "__main__":
    run_script(main)

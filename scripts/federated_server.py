"""Run the server of a federated fit between processes.

    python scripts/federated_server.py --num_clients 3 --insecure true

What it reads and writes: :mod:`bora_pyro.runs.federated_server`. Every option: ``python scripts/federated_server.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("federated-server")

if __name__ == "__main__":
    run_script(main)

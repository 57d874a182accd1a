"""Export the adapters of a finished run: a flat folder of PEFT folders with model cards, ready to serve or to publish.

    python scripts/export_adapters.py runs/speeches --output_dir exports/speeches --tasks abraham-lincoln "Theodore Roosevelt"

    python scripts/export_adapters.py runs/speeches-posterior --output_dir exports/speeches --draws 4 --push_to_hub USER/NAME

It writes ``<task>/`` (the MAP estimate, or the posterior's mean), ``global-mean/`` (Θ) and with ``--draws`` of a posterior
``<task>--draw-0/`` and so on; ``README.md`` in each folder and above them, ``shrinkage.png``, and ``export.json``, which says
what each folder is. The folder appears when all of it is written. Every option: ``python scripts/export_adapters.py --help``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import transformers

from bora_pyro.errors import InputError
from bora_pyro.exchange.names import EXPORT
from bora_pyro.files.atomic import check_place
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import option
from bora_pyro.report.export import export_adapters
from bora_pyro.report.hub import check_repo_id, push_folder
from bora_pyro.runs.saved import load_run


@dataclass(kw_only=True)
class ExportConfig:
    """Export the adapters of a finished run as PEFT folders in one folder."""

    run: str = option("", "folder of the run, a fit's output_dir", positional=True)
    output_dir: str = option("", "the folder to make")
    overwrite: bool = option(False, "replace an earlier export")
    tasks: list[str] | None = option(None, "names of tasks, or of their folders (default: all)")
    draws: int = option(0, "draws of a posterior, each a folder a task")
    seed: int = option(0, "of the draws")
    base_name: str | None = option(None, "what the adapters call their base, as the server does (default: the run's base_model)")
    license: str | None = option(None, "of the adapters, as the hub abbreviates it (default: the card names none)")
    push_to_hub: str | None = option(None, "send the folder to this repository of the hub, USER/NAME (default: do not)")
    private: bool = option(False, "a repository that is made is private")
    trust_remote_code: bool = option(
        False, "let a base model that brings code of its own run it on this machine; a file cannot say so", line_only=True
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ... or mps")
    threads: int | None = option(None, "CPU threads (default: torch's own choice)")

    def validate(self) -> None:
        """Check the values."""
        if not self.run.strip():
            raise InputError(
                "no run is given; name its folder, as in export_adapters.py runs/map_fit --output_dir exports/map_fit"
            )
        if not self.output_dir.strip():
            raise InputError("no output_dir is given; name the folder to make, as in --output_dir exports/map_fit")
        for name, least in (("draws", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; give a whole number from {least} up")
        if self.push_to_hub is not None:
            check_repo_id(self.push_to_hub)


def main(argv: list[str]) -> int:
    """Export, and send where that is asked for."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(ExportConfig, argv, prog="export_adapters.py")
        check_place(config.output_dir, record=EXPORT, overwrite=config.overwrite)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        folder = export_adapters(
            load_run(config.run, device=config.device, trust_remote_code=config.trust_remote_code),
            config.output_dir,
            tasks=config.tasks,
            draws=config.draws,
            seed=config.seed,
            base_name=config.base_name,
            license=config.license,
            repo_id=config.push_to_hub,
            overwrite=config.overwrite,
        )
        print(f"adapters: {folder}")
        if config.push_to_hub is not None:
            print(f"on the hub: {push_folder(folder, config.push_to_hub, private=config.private)}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_script(main)

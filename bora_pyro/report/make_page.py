"""Make the page of a finished run, of a sweep over τ, or of a folder of runs: one self-contained HTML file.

    bora report runs/demo
    bora report results/documentation.csv
    bora report runs --output runs.html

The page of a run has its main numbers, a table of the tasks that can be sorted, pictures of the shrinkage, the path of τ, the
learning curves, continuations of one prompt by several tasks' adapters, and the configuration. Nothing is fitted again.

The page of a folder is ``report.html`` in that folder. The page of a sweep is an HTML file beside its table. ``--output`` gives
another file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bora_pyro.diagnostics.sweep_table import read_sweep
from bora_pyro.errors import InputError
from bora_pyro.files.safe_yaml import YamlError, read_mapping
from bora_pyro.options.field import check_fields, option
from bora_pyro.report.blocks import Page
from bora_pyro.report.page import check_output, write_page
from bora_pyro.report.run_page import RunOptions, run_page
from bora_pyro.report.runs_page import runs_page
from bora_pyro.report.sweep_page import sweep_page
from bora_pyro.runs.command import Command
from bora_pyro.runs.layout import CONFIG, REPORT

SAMPLES, PICTURES = "samples", "pictures"
_DEFAULTS = RunOptions()


@dataclass(kw_only=True)
class ReportConfig:
    """Make the page of a finished run, of a sweep over tau, or of a folder of runs."""

    run: str = option("", "folder of a run, table of a sweep (.csv or .parquet), or folder of runs", positional=True)
    output: str | None = option(
        None, "file of the page (default: report.html in the folder; for a sweep, the name of the table with .html)"
    )
    prompt: str | None = option(None, "text that the samples continue (default: the beginning of a test document)", group=SAMPLES)
    samples: int = option(
        _DEFAULTS.samples,
        "number of tasks whose adapters continue the prompt; 0 leaves the samples out",
        group=SAMPLES,
        least=0,
    )
    max_new_tokens: int = option(_DEFAULTS.max_new_tokens, "largest number of tokens of a sample", group=SAMPLES, least=1)
    temperature: float = option(
        _DEFAULTS.temperature, "0 takes the most probable token each time; above 0 tokens are drawn", group=SAMPLES
    )
    adapters: bool = option(
        True,
        "read the adapters, the base model and the documents; false leaves out the pictures of the shrinkage, the effective "
        "parameters and the samples",
        group=PICTURES,
    )
    draws: int = option(_DEFAULTS.draws, "number of posterior draws for the pictures", group=PICTURES, least=2)
    fit_config: str | None = option(
        None,
        "the YAML file that tau_sweep.py got as --fit_config (default: the file beside the table with its name and .yaml)",
    )
    trust_remote_code: bool = option(
        False, "let a base model run code of its own on this machine; allowed on the command line only", line_only=True
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ... or mps")
    threads: int | None = option(None, "CPU threads (default: torch's own choice)", least=1)

    def validate(self) -> None:
        """Check the values."""
        if not self.run.strip():
            raise InputError(
                "nothing is given; name a run's folder, a sweep's table or a folder of runs, as in report.py runs/demo"
            )
        check_fields(self)
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}; give 0 for the most probable token, or a finite number above 0")
        if self.prompt is not None and not (self.adapters and self.samples):
            raise InputError("a prompt is given, but the samples are left out; leave one of the two out")

    @property
    def source(self) -> Path:
        """The folder or table that the page shows."""
        return Path(self.run)

    @property
    def file(self) -> Path:
        """The file of the page."""
        if self.output is not None:
            return Path(self.output)
        return self.source / REPORT if self.source.is_dir() else self.source.with_suffix(".html")


def make_page(config: ReportConfig) -> Page:
    """Make the page of the run, the sweep or the folder of runs.

    Raises:
        InputError: the path is none of these, or something in it is damaged.
    """
    path = config.source
    if not path.exists():
        raise InputError(f"{path} does not exist; give a run's folder, a sweep's .csv or .parquet, or a folder of runs")
    if path.is_dir() and (path / CONFIG).is_file():
        shown = RunOptions(
            adapters=config.adapters,
            draws=config.draws,
            samples=config.samples,
            prompt=config.prompt,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
        )
        return run_page(path, shown)
    if config.prompt is not None:
        raise InputError(f"a prompt is given, but {path} is no run, and its page has no samples; leave it out")
    if path.is_dir():
        return runs_page(path, config.file)
    return sweep_page(read_sweep(path), title=path.stem, options=_shared_options(config))


def _shared_options(config: ReportConfig) -> dict[str, Any] | None:
    """The options that the fits of a sweep share; None if no file with them is given or found."""
    file = Path(config.fit_config) if config.fit_config is not None else config.source.with_suffix(".yaml")
    if config.fit_config is None and not file.is_file():
        return None
    try:
        return read_mapping(file)
    except (OSError, YamlError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"fit_config {file} cannot be read ({reason}); give a YAML file of map_fit.py's options") from None


def write_report(config: ReportConfig) -> Path:
    """Make the page and write it; return its file.

    Raises:
        InputError: no page can be made of the path, or the file cannot be written.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.source.exists():  # if it does not exist, make_page raises the error
        check_output(config.file)
    write_page(make_page(config), config.file)
    return config.file


COMMAND = Command("report", ReportConfig, write_report, lambda config, file: print(f"page: {file}"))

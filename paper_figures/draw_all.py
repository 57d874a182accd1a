"""Draw all figures and tables again, from the tables in ``results/``. ``make figures`` runs this script.

    python paper_figures/draw_all.py

The presidents' sweep gives ``figure2.png`` and so on. The documentation's sweep gives ``figure2_documentation.png`` and so on.
So do the sweeps of `MORE_SWEEPS` whose tables are there and have a τ between 0 and ∞, which most figures compare with the limits.
If a results table is missing, the other figures are still drawn. The errors are printed at the end, and the exit code is 2.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import adapters_figure
import few_documents_figure
import fidelity_table
import figure1
import figure2
import figure3
import figure4
import figure5
import forms_figure
import gold_standard_figure
import model_figure
import pandas as pd
import pca_figure
import simulation_based_calibration_figure as calibration_figure
import table1
import table2

from bora_pyro.errors import InputError
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import option

#: Sweeps that are drawn if their tables are there and have a τ between 0 and ∞.
MORE_SWEEPS = ("presidents_full", "smollm2_documentation", "smollm2_presidents", "smollm2_crossfit")
#: Comparisons of adapters that are drawn, as panels of one figure, if their tables are there.
ADAPTER_TABLES = ("adapters_documentation", "adapters_presidents")
_SWEEP_SCRIPTS: tuple[ModuleType, ...] = (figure1, figure2, figure3, figure4, figure5, table1, table2)


@dataclass(kw_only=True)
class DrawAllConfig:
    """Draw all figures and tables again from stored results."""

    results: str = option("results", "the folder of the tables")
    output: str = option("paper_figures", "the folder to write")


def has_inner_tau(table: Path) -> bool:
    """Whether there is a table of a sweep that has a fixed τ above 0 and below ∞."""
    taus = pd.read_parquet(table, columns=["tau"]).tau if table.is_file() else ()
    return any(tau != "learned" and 0 < float(tau) < math.inf for tau in taus)


def jobs(config: DrawAllConfig) -> Iterator[tuple[str, Callable[[Any], str], Any]]:
    """Yields (path of the output, function that writes it, options of the function)."""
    results, output = config.results, config.output
    more = ((name, f"_{name}") for name in MORE_SWEEPS if has_inner_tau(Path(f"{results}/{name}.parquet")))
    for corpus, ending in (("presidents", ""), ("documentation", "_documentation"), *more):
        for module in _SWEEP_SCRIPTS:
            name = module.__name__
            path = f"{output}/{name}{ending}.{'md' if name.startswith('table') else 'png'}"
            config_class = getattr(module, f"{name.capitalize()}Config")
            yield path, module.draw, config_class(sweep=f"{results}/{corpus}.parquet", output=path)
        path = f"{output}/pca{ending}.png"
        if corpus in MORE_SWEEPS and not Path(f"{results}/{corpus}_gram.csv").is_file():
            continue
        yield path, pca_figure.draw, pca_figure.PcaConfig(gram=f"{results}/{corpus}_gram.csv", output=path)
    forms, fidelity, model = f"{output}/forms.png", f"{output}/fidelity.md", f"{output}/model.png"
    yield forms, forms_figure.draw, forms_figure.FormsConfig(forms=f"{results}/forms.csv", output=forms)
    yield fidelity, fidelity_table.draw, fidelity_table.FidelityConfig(fidelity=f"{results}/fidelity.csv", output=fidelity)
    tables, path = (f"{results}/gold_standard.csv", f"{results}/gold_standard_summary.csv"), f"{output}/gold_standard.png"
    yield (
        path,
        gold_standard_figure.draw,
        gold_standard_figure.GoldStandardFigureConfig(gold_standard=tables[0], summary=tables[1], output=path),
    )
    calibration, path = f"{results}/simulation_based_calibration.csv", f"{output}/simulation_based_calibration.png"
    yield path, calibration_figure.draw, calibration_figure.CalibrationFigureConfig(calibration=calibration, output=path)
    new, path = f"{results}/few_documents.csv", f"{output}/few_documents.png"
    yield path, few_documents_figure.draw, few_documents_figure.FewDocumentsFigureConfig(table=new, output=path)
    of_adapters, path = [f"{results}/{name}.csv" for name in ADAPTER_TABLES], f"{output}/adapters.png"
    if made := [table for table in of_adapters if Path(table).is_file()]:
        yield path, adapters_figure.draw, adapters_figure.AdaptersFigureConfig(tables=made, output=path)
    yield model, model_figure.draw, model_figure.ModelConfig(output=model)


def main(argv: list[str]) -> int:
    """Draw all figures and tables. An error in one does not stop the others."""
    failed = []
    try:
        for path, draw, options in jobs(parse_config(DrawAllConfig, argv, prog="draw_all.py")):
            try:
                draw(options)
                print(path, flush=True)
            except InputError as error:
                failed.append(f"error: {path}: {error}")
    except InputError as error:
        failed.append(f"error: {error}")
    for line in failed:
        print(line, file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

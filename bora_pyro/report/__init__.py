"""One self-contained HTML page of a finished run, of a sweep over τ, or of a folder of runs.

>>> from bora_pyro.report import run_page, write_page
>>> write_page(run_page("runs/demo"), Path("runs/demo/report.html"))  # doctest: +SKIP

``scripts/report.py`` does the same. A page contains its numbers, pictures, style and script. It can be sent by mail and read
without a network, also on a phone, with a light or a dark background.
"""

from bora_pyro.report.blocks import Cell, Column, Folded, Lines, Number, Page, Picture, Pictures, Samples, Section, Table
from bora_pyro.report.page import check_output, render, write_page
from bora_pyro.report.run_page import RunOptions, run_page
from bora_pyro.report.runs_page import runs_page
from bora_pyro.report.sweep_page import sweep_page

__all__ = [
    "Cell", "Column", "Folded", "Lines", "Number", "Page", "Picture", "Pictures", "RunOptions", "Samples", "Section", "Table",
    "check_output", "render", "run_page", "runs_page", "sweep_page", "write_page",
]  # fmt: skip

"""Write the results of a fit into its run folder: the posterior first, then the adapters, the metrics last."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bora_pyro.data import TaskData
from bora_pyro.errors import InputError
from bora_pyro.inference.fitted import Fitted
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.results import write_adapters, write_posterior
from bora_pyro.runs.trackers import Tracking


@dataclass(frozen=True)
class Run:
    """A run whose fit has ended.

    Attributes:
        folder: the run folder, which is taken and has its configuration and its split.
        base_model: the name of the base model that is written into the adapters' folders.
        guide: the guide's name in ``GUIDES``.
        prior: ``given`` if Θ and τ come from another fit, ``routed`` if the adapters do.
        quiet: whether to show no notes.
        adapters: whether to write the adapters as PEFT folders.
    """

    folder: RunFolder
    base_model: str
    guide: str = "map"
    prior: str = ""
    quiet: bool = False
    adapters: bool = True

    def save(
        self, fitted: Fitted, data: TaskData, measure: Callable[[], dict[str, Any]], *, tracking: Tracking | None = None
    ) -> dict[str, Any]:
        """Write all results of the fit.

        The posterior is written first, because everything else can be computed from it. If the adapter has no LoRA form, no
        adapters are exported and a note says why. ``metrics.json`` is written last; with it the run is finished.

        Args:
            fitted: the fit.
            data: the documents; a note about the export is added to their notes.
            measure: computes the content of ``metrics.json``, called after the other files are written.
            tracking: trackers that get the final numbers.

        Returns:
            The content of ``metrics.json``.

        Raises:
            InputError: a file cannot be written.
        """
        write_posterior(self.folder, fitted, data, self.guide, prior=self.prior)
        if self.adapters and (note := self._write_adapters(fitted)):
            data.notes.append(note)
            if not self.quiet:
                print(f"note: {note}", file=sys.stderr)
        if not self.quiet and (documents := data.test.num_documents):
            # a large base takes minutes over them
            print(f"measuring {documents} test documents", file=sys.stderr)
        metrics = measure()
        if tracking is not None:
            tracking.conclude(metrics, fitted.history)
        self.folder.write_metrics(metrics)
        return metrics

    def _write_adapters(self, fitted: Fitted) -> str | None:
        """Write the adapters. Returns a note if they are missing or not exact."""
        try:
            relative_error = write_adapters(self.folder, fitted, self.base_model)
        except InputError as error:
            if isinstance(error.__cause__, OSError):  # the disk failed, not the export
                raise
            return f"no adapters were exported: {error}"
        if not relative_error:
            return None
        return f"the adapters have no exact LoRA form; they were exported with a relative error of up to {relative_error:.2g}"

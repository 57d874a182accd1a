"""The plan of a MAP fit: everything that is known before data and base model are loaded and before anything is written.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder, prepare(MapFitConfig(output_dir=f"{folder}/run", device="cpu")) as plan:
...     plan.device, plan.standing.steps_left, plan.folder.path.exists()
(device(type='cpu'), True, False)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bora_pyro.data.chat_template import load_chat_template, same_chat_template
from bora_pyro.data.options import DATA
from bora_pyro.errors import InputError
from bora_pyro.inference.memory import resident_bytes
from bora_pyro.inference.options import FitOptions
from bora_pyro.inference.processes import Processes, is_first, processes
from bora_pyro.options.field import part_of
from bora_pyro.runs.config.groups import MODEL, PRIOR
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.device import find_device
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import MEMBERS
from bora_pyro.runs.resume import Standing, as_written, changed_option, resolve_folder, resume


@dataclass(frozen=True)
class Plan:
    """The plan of a MAP fit.

    Attributes:
        config: the configuration, with ``resume`` true or false and the chat template as text.
        folder: the run folder, which is not taken yet.
        standing: where the run stands.
        device: the device of the model.
        team: the processes that share the work.
        resident: bytes of memory that the process uses before anything is loaded.
        quiet: whether to show no progress and no notes.
    """

    config: MapFitConfig
    folder: RunFolder
    standing: Standing
    device: torch.device
    team: Processes
    resident: int
    quiet: bool

    @property
    def options(self) -> FitOptions:
        """Options of the fit. The paper's rule scales the learning rate if asked for; a finished fit gets no further epoch."""
        config, options = self.config, part_of(self.config, FitOptions)
        rate = options.learning_rate * (float(config.tau) if config.scale_learning_rate_with_tau else 1.0)
        epochs = options.epochs if self.standing.steps_left else self.standing.epochs
        return dataclasses.replace(options, learning_rate=rate, epochs=epochs)

    @property
    def written(self) -> dict[str, Any]:
        """The content of ``config.yaml``."""
        return as_written(self.config)


@contextmanager
def prepare(config: MapFitConfig, *, quiet: bool = False) -> Iterator[Plan]:
    """Check everything that a configuration names except the data and the base model.

    This is a context manager: the processes of the fit are connected inside it.

    Args:
        config: the checked configuration.
        quiet: show no progress and no notes.

    Raises:
        InputError: the chat template, the folder, a tracker or the device cannot be used; or the run to resume has other options
            or is damaged.
    """
    # the run stores the text of the template, because the file may change or may be missing when the run is read
    config = dataclasses.replace(config, chat_template=load_chat_template(config.chat_template))
    config, folder = resolve_folder(config)
    standing = Standing()
    if config.resume:
        _check_same_fit(config, folder, folder.read_config())
        config, standing = resume(config, folder)
    device = find_device(config.device)
    resident = resident_bytes(device)
    with processes(device) as team:
        yield Plan(config, folder, standing, device, team, resident, quiet or not is_first())


def _check_same_fit(config: MapFitConfig, folder: RunFolder, stored: Mapping[str, Any]) -> None:
    """Check that data, model, prior and seed are those of the run to resume. Options of the optimisation may differ."""
    if MEMBERS in stored:
        raise InputError(
            f"the run in {folder.path} is an ensemble of several fits; go on with bora ensemble --resume true, or give another "
            "--output_dir"
        )
    if same_chat_template(config.chat_template, stored.get("chat_template")):  # older runs store the name of its file
        stored = {**stored, "chat_template": config.chat_template}
    for field in dataclasses.fields(config):
        if field.metadata["line_only"]:
            continue
        name, value = field.name, getattr(config, field.name)
        if (field.metadata["group"] in (DATA, MODEL, PRIOR) or name == "seed") and value != stored.get(name, value):
            raise changed_option(config, folder, name, stored)

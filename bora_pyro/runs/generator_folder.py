"""The folder of a generator: write it, read it back, and check that a model is that of the generator.

- ``generator.safetensors``: the tensors of the method, the mean, scales and basis of the adapters, those of the vectors, and what
  the model needs beside latents (masks, buffers and samples of fixed tensors);
- ``fit.yaml``: the configuration of the fit that the generator has learned from;
- ``generator.json``: the method and its options, the base's digest, the run, its tasks, and the errors of tasks left out.

Nothing in it is pickled, and neither the run nor its documents are needed to use it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bora_pyro.backbone.configuration import base_name
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.files.atomic import whole_folder, write_record
from bora_pyro.files.regular import check_links, read_regular
from bora_pyro.files.tensors import not_a_number
from bora_pyro.model import BoRA, Weights
from bora_pyro.predict.generators.generator import Generator
from bora_pyro.predict.task_vector import STATES, TaskVectors, task_vectors
from bora_pyro.runs.config.map_fit import MapFitConfig, parse_config
from bora_pyro.runs.description import describe, same_slots
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import FIT
from bora_pyro.runs.results import SAMPLE, sample_of

#: The record of a generator, and the name of its tensors.
RECORD, TENSORS = "generator.json", "generator"
# Prefix of the model's masks and buffers.
_STATE = "model."
# As for a run: how far a fixed tensor that is built again may be from the first one, relative to its largest number.
_TOLERANCE = 1e-3
_MOST_BYTES = 2**26
# The parts of a model's description that a generated adapter depends on.
_PARTS = ("adapter", "router", "slots")


@dataclass(frozen=True, eq=False)
class SavedGenerator:
    """A generator from its folder.

    Attributes:
        path: the folder.
        generator: the generator.
        fit: the configuration of the fit that it has learned from.
        record: content of ``generator.json``.
        tensors: what the model needs beside latents.
    """

    path: Path
    generator: Generator
    fit: MapFitConfig
    record: dict[str, Any]
    tensors: dict[str, Tensor]

    def check(self, model: BoRA) -> None:
        """Check that a model has the base, the layers and the adapter of the generator.

        Raises:
            InputError: it has not; the message says what differs.
        """
        stored, own = self.record["base"].get("digest"), model.backbone.digest
        if None not in (stored, own) and stored != own:
            raise InputError(
                f"the generator in {self.path} is of another base, {self.record['base'].get('name')!r}: its weights are not "
                f"those of {base_name(model.backbone.model.config)!r}; use the base that the generator was fitted with"
            )
        description = _description(model)
        for part in _PARTS:
            stored, own_part = self.record["model"].get(part), description[part]
            if not (same_slots(stored, own_part) if part == "slots" else stored == own_part):
                raise InputError(
                    f"the generator in {self.path} is of another {part.rstrip('s')}, {stored}, than "
                    f"{own_part}; adapters have no common form then: use runs of the same adapter and targets"
                )
        samples = {name: value for name, value in self.tensors.items() if name.startswith(SAMPLE)}
        for name, value in _samples(model).items():
            found = samples.get(name)
            limit = _TOLERANCE * float(value.abs().max()) if value.is_floating_point() and value.numel() else 0.0
            if found is None or found.shape != value.shape or not bool((found - value).abs().le(limit).all()):
                raise InputError(
                    f"the fixed tensor {name.removeprefix(SAMPLE)!r} of {model.adapter} is not that of the generator in "
                    f"{self.path}: adapters have no common form; use a run with the same seed and base"
                )
        for name, mask in model.tensors.for_new_tasks().masks.items():
            stored = self.tensors.get(f"{_STATE}masks/{name}")
            if stored is None or not torch.equal(stored, mask.cpu()):
                raise InputError(
                    f"the mask of {name!r} is not that of the generator in {self.path}: the fits have chosen other entries, so "
                    "their adapters have no common form; use the run of the generator"
                )

    def generate(
        self, model: BoRA, split: TokenSplit, *, documents: int | None = None, token_budget: int = 4096, seed: int = 0
    ) -> tuple[TaskVectors, Weights]:
        """The vectors of the tasks of a split, and their adapters, (D, layers, *shape) by name on the device of the model.

        Args:
            model: the model, which is checked.
            split: the documents.
            documents: at most so many documents of a task are read; default: as for the generator's own tasks.
            token_budget: tokens of a batch, padding included.
            seed: seed of the choice of documents.

        Raises:
            InputError: the model has another base, other layers or another adapter.
        """
        self.check(model)
        of_vector = self.record["vector"]
        most = int(of_vector["documents"]) if documents is None else documents
        vectors = task_vectors(
            model.backbone, split, documents=most, states=of_vector["states"], token_budget=token_budget, seed=seed
        )
        flat = torch.stack([self.generator.flat(vector) for vector in vectors.vectors])
        return vectors, self.generator.layout.unflatten(flat.to(model.backbone.device))

    def restore(self, model: BoRA) -> None:
        """Give a model the masks and buffers of the fit."""
        model.load_state({name.removeprefix(_STATE): v for name, v in self.tensors.items() if name.startswith(_STATE)})


def write_generator(
    path: str | Path,
    generator: Generator,
    model: BoRA,
    fit: MapFitConfig,
    content: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the folder of a generator in one step.

    Args:
        path: the folder.
        generator: the generator.
        model: the model of the fit that it has learned from.
        fit: the configuration of that fit.
        content: further entries of ``generator.json``; ``vector`` is needed.
        overwrite: replace an earlier generator.

    Returns:
        The content of ``generator.json``.

    Raises:
        InputError: the folder is taken or cannot be written.
    """
    tensors = generator.state() | _samples(model)
    tensors |= {f"{_STATE}{name}": value for name, value in model.tensors.for_new_tasks().state().items()}
    base = {"name": base_name(model.backbone.model.config), "digest": model.backbone.digest}
    record = generator.describe() | {"base": base, "model": _description(model)} | dict(content)
    with whole_folder(path, record=RECORD, overwrite=overwrite) as aside:
        folder = RunFolder(aside)
        folder.save_tensors(TENSORS, tensors)
        # whether code of a base may run is never decided by a file
        folder.write_fit(dataclasses.asdict(dataclasses.replace(fit, trust_remote_code=False)))
        size = (aside / f"{TENSORS}.safetensors").stat().st_size
        adapters = 4 * generator.layout.size * len(record["tasks"])
        record |= {"bytes": {"generator": size, "adapters": adapters}}
        write_record(aside, RECORD, record)
    return record


def read_generator(path: str | Path) -> SavedGenerator:
    """Read the folder of a generator.

    Raises:
        InputError: there is none, or it is damaged.
    """
    folder = Path(path)
    if not (folder / RECORD).is_file():
        raise InputError(f"there is no generator in {folder}; give the output_dir of generator_fit.py")
    check_links(folder, "generator")
    try:
        record = json.loads(read_regular(folder / RECORD, most=_MOST_BYTES).decode("utf-8"))
        vector, base, model = record["vector"], record["base"], record["model"]
        if not (
            isinstance(base, dict) and isinstance(model, dict) and vector["states"] in STATES and int(vector["documents"]) > 0
        ):
            raise ValueError("its entries have another form")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{folder / RECORD} cannot be read ({' '.join(str(error).split())[:200]}); fit the generator again"
        ) from None
    tensors = RunFolder(folder).load_tensors(TENSORS)
    for name, value in tensors.items():
        if problem := not_a_number(value):
            raise InputError(f"the generator in {folder} has {name!r} with {problem}; fit it again")
    try:
        fit = parse_config(MapFitConfig, ["--config", str(folder / FIT)])
    except InputError as error:
        raise InputError(str(error).removeprefix("--config ")) from None
    others = {name: value for name, value in tensors.items() if name.startswith((SAMPLE, _STATE))}
    own = {name: value for name, value in tensors.items() if name not in others}
    return SavedGenerator(folder, Generator.from_state(own, record), fit, record, others)


def _description(model: BoRA) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(describe(model)))
    return {part: found[part] for part in _PARTS}


def _samples(model: BoRA) -> dict[str, Tensor]:
    return {f"{SAMPLE}{name}": torch.as_tensor(sample_of(value)).cpu() for name, value in model.fixed.items()}

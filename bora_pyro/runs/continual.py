"""Tasks in sequence, from a configuration to one base for all of them.

    bora continual-fit --data reviews.csv --order books films games --output_dir runs/continual

:func:`~bora_pyro.exchange.continual.continual_fit` does the work. After each task the folder is replaced in one step by one with

- ``base/``: the base with all tasks so far merged into it, which transformers loads like any other;
- ``losses.csv``: the test loss of every task after every stage, in nats per token;
- ``continual.json``: the options, the stages, and the averages.

If the command is interrupted, give it again with ``--resume true``: the tasks that are merged are not fitted again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from bora_pyro.errors import InputError, shown
from bora_pyro.exchange.continual import Continual, Stage, continual_fit
from bora_pyro.exchange.merge import save_base
from bora_pyro.files.atomic import check_place, whole_folder, write_record
from bora_pyro.files.regular import read_regular
from bora_pyro.files.text import escaped
from bora_pyro.inference.options import FitOptions
from bora_pyro.model import BoRA
from bora_pyro.runs.build import build_run
from bora_pyro.runs.command import Command
from bora_pyro.runs.config.continual import ContinualConfig
from bora_pyro.runs.progress import layers_line

#: The record of a sequence, the merged base and the table of losses.
CONTINUAL, BASE, LOSSES = "continual.json", "base", "losses.csv"
#: Options that may differ when a sequence goes on: they change no number, or only where it runs.
_FREE = ("output_dir", "overwrite", "resume", "threads", "device", "trust_remote_code")
_MOST_BYTES = 2**26
# A merge that loses more than this share to rounding gets a note.
_ROUNDING = 0.01


def run_continual(config: ContinualConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Fit and merge the tasks, and write the folder after each one.

    Args:
        config: the checked configuration.
        quiet: show no progress and no notes.

    Returns:
        The content of ``continual.json``.

    Raises:
        InputError: the options or the data cannot be used; the folder is taken; or what is to be resumed has other options.
    """
    folder, earlier = Path(config.output_dir), _earlier(config) if config.resume else None
    if earlier is None:
        check_place(folder, record=CONTINUAL, overwrite=config.overwrite)
    done = None if earlier is None else _continual(earlier)
    fit_config = config.map_fit
    if done is not None:
        fit_config = dataclasses.replace(fit_config, base_model=str(folder / BASE))
    model, data = build_run(fit_config, quiet=quiet)
    if earlier is not None and earlier["documents"] != data.digest:
        raise InputError(f"the documents are not those of {folder / CONTINUAL}; give the same --data, or another output_dir")
    if not quiet:
        print(layers_line(model.backbone.slots), file=sys.stderr)
        if done is not None:
            print(f"{len(done.stages)} of {len(done.order)} tasks are merged already", file=sys.stderr)
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(FitOptions)}

    def write(found: Continual) -> None:
        content = _record(config, found, model, data.digest, data.notes)
        with whole_folder(folder, record=CONTINUAL, overwrite=True) as aside:
            save_base(model.backbone, aside / BASE)
            _table(found).to_csv(aside / LOSSES)
            write_record(aside, CONTINUAL, content)

    def report(found: Continual) -> None:
        stage, place = found.stages[-1], len(found.stages) - 1
        if stage.rounding > _ROUNDING:
            lost = f"rounding to {config.precision} changes what {shown(stage.task)} merged by {stage.rounding:.0%}"
            note = f"{lost}; with --precision float32 less is lost"
            data.notes.append(note)
            if not quiet:
                print(f"note: {note}", file=sys.stderr)
        write(found)
        if not quiet:
            before, after = (math.exp(losses[place]) for losses in (found.matrix[place].tolist(), stage.losses))
            print(
                f"{place + 1} of {len(found.order)}: {shown(stage.task)}, {stage.preserve:.0%} of the directions preserved, "
                f"epoch {stage.best_epoch} kept: test perplexity {before:.2f} -> {after:.2f} ({stage.seconds:.0f} s)",
                file=sys.stderr,
            )

    found = continual_fit(
        model.backbone,
        data,
        order=config.order,
        adapter=model.adapter,
        preserve=(config.preserve_from, config.preserve_to),
        tau=config.tau,
        likelihood=model.likelihood,
        done=done,
        on_stage=report,
        **options,
    )
    return _record(config, found, model, data.digest, data.notes)


def _record(config: ContinualConfig, found: Continual, model: BoRA, documents: str, notes: list[str]) -> dict[str, Any]:
    averages = {name: getattr(found, name) for name in ("average", "learning", "forgetting", "forward")}
    return {
        "options": _options(config),
        "adapter": repr(model.adapter),
        "documents": documents,
        "notes": list(notes),
        "order": found.order,
        "base": found.base,
        "stages": [dataclasses.asdict(stage) for stage in found.stages],
        **{name: value if math.isfinite(value) else None for name, value in averages.items()},
    }


def _options(config: ContinualConfig) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE}


def _earlier(config: ContinualConfig) -> dict[str, Any]:
    """The record of the sequence to go on with."""
    file = Path(config.output_dir) / CONTINUAL
    try:
        found = json.loads(read_regular(file, most=_MOST_BYTES).decode("utf-8"))
        options, own = found["options"], _options(config)
        _continual(found)
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"there is no sequence to resume in {config.output_dir}; leave --resume out to start one") from None
    for name, value in own.items():
        if options.get(name) != json.loads(json.dumps(value)):
            raise InputError(
                f"{name} is {shown(value)}, but {file} has {shown(options.get(name))}; give the same, or another output_dir"
            )
    return dict(found)


def _continual(record: Mapping[str, Any]) -> Continual:
    return Continual(list(record["order"]), list(record["base"]), [Stage(**stage) for stage in record["stages"]])


def _table(found: Continual) -> pd.DataFrame:
    """The losses: a row for the base and one for each stage, a column for each task."""
    index = pd.Index(["base", *(stage.task for stage in found.stages)], name="after")
    return pd.DataFrame(found.matrix.numpy(), index=index, columns=found.order)


def show(config: ContinualConfig, record: Mapping[str, Any]) -> None:
    """Print the perplexities of all tasks after each stage, the averages, and where the base is."""
    found = _continual(record)
    print("test perplexity after each stage:")
    table = _table(found).map(math.exp).rename(columns=escaped, index=escaped)
    print(table.to_string(float_format="{:.2f}".format))
    print(f"average loss {found.average:.3f} nats per token; learned in a task's own stage {found.learning:.3f}", end="")
    if len(found.stages) > 1:
        print(f", forgotten since {found.forgetting:.3f}, learned before it from other tasks {found.forward:.3f}", end="")
    print(f"\nbase for all tasks: {Path(config.output_dir) / BASE}")


COMMAND = Command("continual-fit", ContinualConfig, run_continual, show)

"""The page of one finished run.

>>> page = run_page("runs/demo", adapters=False)  # doctest: +SKIP
>>> [number.label for number in page.numbers][:2]  # doctest: +SKIP
['test perplexity', 'validation perplexity']
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bora_pyro.errors import InputError
from bora_pyro.files.text import replaced
from bora_pyro.likelihoods import measure_of
from bora_pyro.report.blocks import (
    Cell,
    Column,
    Folded,
    Lines,
    Number,
    Page,
    Picture,
    Pictures,
    Samples,
    Section,
    Table,
    duration_text,
    number_text,
    option_text,
    short_number,
)
from bora_pyro.report.results import OF_ANSWERS, change_text, results_table, verdict
from bora_pyro.report.rewards import reward_numbers, reward_section
from bora_pyro.report.run_pictures import MANY_TASKS, gate_picture, learning_pictures, shrinkage_pictures
from bora_pyro.report.samples import written_samples
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.kinds import ADAPTATION, AROUND_A_FIT, ENSEMBLE, KINDS, MAP, POSTERIOR, ROUTED, kind_of
from bora_pyro.runs.layout import CONFIG, FIT, REWARD
from bora_pyro.runs.saved import SavedRun, load_run
from bora_pyro.runs.versions import versions

_LOCATION = ("output_dir", "overwrite", "resume")  # options that say where the run is written, not what is fitted
# The section with the pictures of a kind of run.
_OF_PICTURES = {ROUTED: ("gates", "Gates")}


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the page of a run shows in addition to its numbers.

    Attributes:
        adapters: whether to show what needs the adapters: pictures of the shrinkage, effective parameters and samples. The base
            model and the documents must still be where the fit found them.
        draws: number of posterior draws for the pictures. A MAP fit ignores it.
        samples: how many tasks continue the prompt; 0: no samples.
        prompt: the text to continue; None: the beginning of a test document.
        max_new_tokens: largest number of tokens in a continuation.
        temperature: sampling temperature; 0 takes the most probable token each time.
        device: device that the model runs on.
        trust_remote_code: allow the base model to run code of its own.
    """

    adapters: bool = True
    draws: int = 20
    samples: int = 3
    prompt: str | None = None
    max_new_tokens: int = 40
    temperature: float = 0.7
    device: str = "auto"
    trust_remote_code: bool = False


def run_page(path: str | Path, options: RunOptions | None = None) -> Page:
    """Make the page of a run.

    Args:
        path: the folder of the run.
        options: what to show; default: everything.

    Raises:
        InputError: the folder has no run, or the run is not finished or damaged; with ``adapters`` also if the base model or
            the documents cannot be read.
    """
    options = options or RunOptions()
    folder = RunFolder.open(path)
    metrics, config, history = folder.read_metrics(), folder.read_config(), folder.read_log()
    kind = kind_of(folder)
    of_fit = folder.read_config(FIT) if kind in AROUND_A_FIT else config
    tasks = metrics.get("tasks")
    if tasks is None:
        raise InputError(f"metrics.json of {folder.path} has no tasks by name; run the fit again with --resume true")
    notes = [*(metrics.get("notes") or ())]
    pictures: list[Picture] = []
    effective, samples = None, None
    if options.adapters:
        pictures, effective, samples = _of_adapters(folder, options, notes)
    # the loss of rewards is no loss of tokens
    unit = "documents" if REWARD in of_fit else of_fit.get("likelihood_unit", "tokens")
    best_epoch, measure = metrics.get("best_epoch"), measure_of(metrics)
    curves = [*learning_pictures(history, unit=unit, measure=measure, best_epoch=best_epoch)]
    sections = [
        *([reward_section(metrics, history)] if metrics.get("reward") else []),
        Section("results", "Results", [results_table(tasks, metrics, effective)], verdict(tasks, measure)),
        Section(*_OF_PICTURES.get(kind, ("shrinkage", "Shrinkage")), [Pictures(pictures)] if pictures else []),
        Section("learning", "Learning", [*([Pictures(curves)] if curves else []), *_tables_of_learning(history, metrics)]),
        Section("samples", "Samples", [samples] if samples else [], _about_samples(options, kind)),
        Section("configuration", "Configuration", [*_configuration(folder, kind)]),
        Section("notes", "Notes", [Lines(notes)] if notes else []),
    ]
    stored = metrics.get("versions")
    return Page(
        kind,
        folder.path.resolve().name,
        _subtitle(kind, tasks, of_fit, config),
        [*reward_numbers(metrics), *_numbers(kind, tasks, metrics)],
        sections,
        versions=stored or versions(),
        versions_of="the fit" if stored else "this page (the run has not recorded its own)",
    )


def _of_adapters(
    folder: RunFolder, options: RunOptions, notes: list[str]
) -> tuple[list[Picture], dict[str, float] | None, Samples | None]:
    """Pictures of the shrinkage, effective parameters by task, and samples. Notes are added to ``notes``."""
    # imported here because a page without adapters needs neither ArviZ nor the base model's libraries
    from bora_pyro.diagnostics.deviations import task_gram, usual_space
    from bora_pyro.diagnostics.shrinkage import shrinkage

    try:
        run = load_run(folder.path, device=options.device, trust_remote_code=options.trust_remote_code)
    except InputError as error:
        raise InputError(f"{error}; or make the page without the adapters: --adapters false") from None
    samples = None
    if options.samples:
        samples = written_samples(
            run,
            number=options.samples,
            prompt=options.prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
        )
    if run.fitted.model.router.reads_all_tasks:
        return _of_gates(run), None, samples
    draws = None if run.is_point else options.draws
    container = shrinkage(run.fitted, run.data, draws=draws)
    pictures: list[Picture] = []
    space = usual_space(run.fitted)
    gram = task_gram(run.fitted, space=space).numpy()
    if gram.any():
        pictures = [*shrinkage_pictures(run.data.tasks, container, gram, space=space)]
        if len(run.data.tasks) > MANY_TASKS:
            notes.append(f"the run has more than {MANY_TASKS} tasks, so pictures with one row a task are left out")
    else:
        notes.append("all tasks have the same adapter, so there are no deviations to draw")
    group = container["posterior" if draws is None else "constant_data"]
    effective = dict(zip(run.data.tasks, np.asarray(group["effective_parameters"], float).reshape(-1).tolist(), strict=True))
    return pictures, effective, samples


def _of_gates(run: SavedRun) -> list[Picture]:
    """The picture of a routed run: how often its gates are right on the test documents; none without such documents."""
    from bora_pyro.predict.gates import read_gates  # as above

    model, tasks = run.fitted.model, len(run.data.tasks)
    if not run.data.test.num_tokens:
        return []
    found = read_gates(model, run.fitted.weights()[0], run.data.test)
    return [gate_picture(found.by_layer, {slot.name: slot.blocks for slot in model.backbone.slots}, tasks)]


def _subtitle(kind: str, tasks: Mapping[str, Any], of_fit: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    data = config.get("data") if kind == ADAPTATION else of_fit.get("data", of_fit.get("prompts"))
    data = ", ".join(map(str, data)) if isinstance(data, list) else data
    parts = [f"{len(tasks):,} task{'s' * (len(tasks) != 1)} of {data}", f"base {of_fit.get('base_model')}"]
    parts.append(f"{of_fit.get('adapter')}, rank {of_fit.get('rank')}")
    if kind in AROUND_A_FIT:
        origin = Path(str(config.get("run") or config.get("adapters"))).name
        how = {POSTERIOR: f"{config.get('guide')} posterior around", ROUTED: "gates over the adapters of"}
        parts.append(f"{how.get(kind, 'new tasks under')} {origin}")
    return replaced(" · ".join(parts))


def _numbers(kind: str, tasks: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[Number]:
    measure = measure_of(metrics)
    digits, test = measure.digits, f"test_{measure.name}"
    adapted, base = metrics.get(test), metrics.get(f"base_{test}")
    of_mean = {POSTERIOR: ", posterior mean", ENSEMBLE: ", best member"}.get(kind, "")
    if adapted is not None:
        change = f", {change_text(measure, adapted, base)}" if base else ""
        note = f"base {number_text(base, digits)}{change}" if base is not None else ""
        yield Number(f"test {measure.unit}{of_mean}", number_text(adapted, digits), note)
    if metrics.get(f"mixture_{test}") is not None:
        note = f"MAP {number_text(metrics[f'map_{test}'], digits)}" if metrics.get(f"map_{test}") else ""
        drawn = "members" if kind == ENSEMBLE else "draws"
        label = f"mixture of {metrics.get('draws')}{' linearised' * (metrics.get('predict') == 'linearised')} {drawn}"
        yield Number(label, number_text(metrics[f"mixture_{test}"], digits), note)
    if metrics.get(f"task_{test}") is not None:
        yield Number(
            f"test {measure.unit}, tasks known", number_text(metrics[f"task_{test}"], digits), "each text by its own adapter"
        )
    if isinstance(metrics.get("gate"), dict) and metrics["gate"].get("accuracy") is not None:
        gate = metrics["gate"]
        note = f"{gate['joint']:.1%} by the mean over the layers" if gate.get("joint") is not None else ""
        yield Number("gates that are right", f"{gate['accuracy']:.1%}", note)
    for name, label in OF_ANSWERS.items():
        if metrics.get(f"test_{name}") is not None:
            of_base = metrics.get(f"base_test_{name}")
            note = "" if of_base is None else f"base {number_text(of_base, 3)}"
            yield Number(f"test {label}{of_mean}", number_text(metrics[f"test_{name}"], 3), note)
    centre = "best member" if kind == ENSEMBLE else "mean"
    for name, label in (("mean", f"calibration error, {centre}"), ("mixture", "calibration error, mixture")):
        if isinstance(metrics.get(name), dict) and metrics[name].get("ece") is not None:
            yield Number(label, number_text(metrics[name]["ece"], 3), "expected (ECE); 0 is calibrated")
    if metrics.get(f"validation_{measure.name}") is not None:
        note = f"after epoch {metrics.get('best_epoch')} of {metrics.get('epochs')}" + ", mean of the steps" * bool(
            metrics.get("averaged")
        )
        yield Number(f"validation {measure.unit}", number_text(metrics[f"validation_{measure.name}"], digits), note)
    if metrics.get("test_bits_per_character") is not None:
        bits = metrics.get("base_test_bits_per_character")
        yield Number(
            "test bits a character",
            number_text(metrics["test_bits_per_character"], 3),
            f"base {number_text(bits, 3)}" if bits else "",
        )
    if metrics.get("tau") is not None:
        yield Number("precision τ", short_number(float(metrics["tau"])), _about_tau(metrics, kind))
    if metrics.get("tau_group") is not None:
        yield Number("precision τ of groups", short_number(float(metrics["tau_group"])), "of the groups' means around Θ")
    documents = f"{metrics.get('train_documents') or 0:,} training, {metrics.get('test_documents') or 0:,} test documents"
    yield Number("tasks", f"{len(tasks):,}", documents)
    if metrics.get("fit_seconds") is not None:
        speed = metrics.get("training_tokens_per_second")
        yield Number("fit", duration_text(metrics["fit_seconds"]), f"{speed:,.0f} tokens/s" if speed else "")
    norms = metrics.get("gradient_norm") or {}
    if norms.get("ratio") is not None:
        parts = {"Θ": norms.get("prior_mean_ratio"), "deviations": norms.get("deviations_ratio")}
        note = ", ".join(f"{name} {value:.2g}" for name, value in parts.items() if value is not None)
        yield Number("gradient, end / start", f"{norms['ratio']:.2g}", f"{note}; 0 at the optimum" if note else "")
    if metrics.get("peak_memory_bytes"):
        predicted = metrics.get("predicted_memory_bytes")
        note = f"predicted {predicted / 2**30:.2f} GiB" if predicted else ""
        yield Number("peak memory", f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB", note)


def _about_tau(metrics: Mapping[str, Any], kind: str) -> str:
    if kind == ADAPTATION:
        return "of the fit; mean of its groups"
    if "tau_by_group" in metrics:
        return "learned; mean of its groups"
    tau = float(metrics["tau"])
    return "independent tasks" if tau == 0 else "one adapter for all" if math.isinf(tau) else "given"


def _tables_of_learning(history: list[dict[str, Any]], metrics: Mapping[str, Any]) -> Iterator[Any]:
    groups, measure = metrics.get("tau_by_group"), measure_of(metrics)
    if groups:
        rows = []
        for group, value in groups.items():
            values = [item for item in (value if isinstance(value, list) else [value]) if item]
            tau = math.exp(sum(map(math.log, values)) / len(values)) if values else None
            text = None if tau is None else Cell(short_number(tau), tau)
            deviation = None if tau is None else Cell(f"{tau**-0.5:.3g}", tau**-0.5)
            rows.append([group, text, deviation])
        columns = [Column("group"), Column("precision τ", number=True), Column("standard deviation 1/√τ", number=True)]
        yield Table("The prior: how far a task's entry may lie from Θ, by kind of layer and factor", columns, rows)
    if history:
        yield Folded(
            f"{len(history)} epoch{'s' * (len(history) != 1)} in numbers",
            Table(
                f"Epochs: the loss in nats a training observation, the validation {measure.title} after it",
                [
                    Column("epoch", 0), Column("step", 0), Column("loss", 4),
                    Column(f"validation {measure.title}", measure.digits),
                    Column("learning rate", number=True), Column("tokens/s", 0), Column("seconds so far", 1),
                ],
                [
                    [
                        record.get("epoch"), record.get("step"), record.get("loss"),
                        record.get(f"validation_{measure.name}"),
                        Cell(f"{record['learning_rate']:.3g}", record["learning_rate"]) if record.get("learning_rate") else None,
                        record.get("training_tokens_per_second"), record.get("seconds"),
                    ]
                    for record in history
                ],
            ),
        )  # fmt: skip


def _about_samples(options: RunOptions, kind: str) -> str:
    how = (
        "the most probable token each time"
        if options.temperature == 0
        else f"tokens drawn at temperature {options.temperature:g}"
    )
    by = "through the gates" if kind == ROUTED else "by the mean of all tasks, and by the adapters of some tasks"
    return f"One prompt, continued by the base alone, {'and ' * (kind == 'routed run')}{by}: {how}."


def _configuration(folder: RunFolder, kind: str) -> Iterator[Any]:
    """A table of the options that differ from the defaults, and a closed table of all options."""
    files = [(CONFIG, KINDS[kind], "fit" if kind == MAP else kind)]
    if kind in AROUND_A_FIT:
        files.append((FIT, MapFitConfig, "fit of the adapters" if kind == ROUTED else "MAP fit that it started from"))
    for name, cls, what in files:
        config = folder.read_config(name)
        defaults = dataclasses.asdict(cls())
        changed = {key: value for key, value in config.items() if key not in _LOCATION and value != defaults.get(key)}
        columns = [Column("option"), Column("value")]
        rows = [[key, option_text(value)] for key, value in changed.items()]
        if rows:
            yield Table(f"Options of the {what} that are not the defaults", columns, rows, sortable=False)
        else:
            yield Lines([f"All options of the {what} are the defaults."])
        everything = [[key, option_text(value)] for key, value in config.items()]
        yield Folded(f"All options of the {what}", Table(f"{name}, resolved", columns, everything, sortable=False))

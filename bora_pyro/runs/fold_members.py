"""The fits that are folded into one: read each, and check that they belong together.

>>> _side(["test", "validation"]), _side(["test", "test"]), _side(["validation", "train"])
('validation', 'test', 'train')
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bora_pyro.data import TaskData
from bora_pyro.errors import InputError, shown
from bora_pyro.exchange.factors import LoraForm, lora_form
from bora_pyro.runs.config.groups import CENTRE
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.saved import SavedRun, load_run

# Options of the prior. Fits that agree here can be read as one run.
_PRIOR = ("prior", "prior_option", "prior_form", "tau", "tau_group", "tau_per", "penalty", "start_as")
# Priors whose τ is a number or learned, so that the folded fit has one too.
_WITH_TAU = (None, "hierarchical_normal", "learned_precision", "independent", "pooled")
# Options that say which tokens a document has. Fits that differ here have no documents to compare.
_DOCUMENTS = ("max_tokens", "long_documents", "task_column", "group_column", "task_from", "chat_template")


@dataclass(frozen=True)
class Member:
    """What a fold needs of one fit.

    Attributes:
        path: the run folder, as it was given.
        config: the configuration of the fit.
        data: the documents, as this fit has split them.
        record: content of ``split.json``.
        forms: the adapters of the tasks in their order, and of Θ.
        layers: the paths of the adapted layers.
        precisions: the learned τ, by name.
        base: digest of the base, or its name if it has none.
        digest: SHA-256 of ``posterior.safetensors``.
    """

    path: str
    config: MapFitConfig
    data: TaskData
    record: dict[str, Any]
    forms: list[LoraForm]
    layers: list[str]
    precisions: dict[str, Tensor]
    base: str
    digest: str

    @classmethod
    def read(cls, path: str, *, device: str, trust_remote_code: bool) -> Member:
        """Read a run.

        Raises:
            InputError: as for ``load_run``; or the run is no MAP fit, or its adapters have no exact LoRA form.
        """
        run = load_run(path, device=device, trust_remote_code=trust_remote_code)
        if run.posterior_config is not None or not run.is_point:
            raise InputError(f"the run in {path} is a posterior; fold takes MAP fits: give the fit that it was made around")
        if run.adapted:
            raise InputError(f"the run in {path} is an adaptation of another fit; fold takes MAP fits")
        model = run.fitted.model
        model.likelihood.check_texts("fold")
        try:
            forms = _forms(run)
        except InputError as error:
            raise InputError(f"the run in {path} cannot be folded: {error}") from None
        base = model.backbone.digest or f"the name {run.config.base_model}"
        layers = [layer for slot in model.backbone.slots for layer in slot.paths]
        learned = {name: value.cpu() for name, value in model.prior.state().items() if name.startswith("tau.")}
        record, digest = run.folder.read_split(), run.folder.digest_of("posterior")
        return cls(path, run.config, run.data, record, forms, layers, learned, base, digest)


def _forms(run: SavedRun) -> list[LoraForm]:
    forms, mean = [], None
    for d, theta, of_all in run.fitted.each_task():
        forms.append(lora_form(run.fitted.model, theta, task=d))
        mean = mean or of_all
    forms.append(lora_form(run.fitted.model, mean or {}))
    if error := max(form.relative_error for form in forms):
        raise InputError(f"its adapters have no exact LoRA form (relative error {error:.2g})")
    on_cpu = [{path: {name: value.cpu() for name, value in of.items()} for path, of in form.factors.items()} for form in forms]
    return [LoraForm(factors, form.alpha) for factors, form in zip(on_cpu, forms, strict=True)]


def check_alike(members: Sequence[Member]) -> None:
    """Check that the fits have one base, the same layers and tasks, and the same documents in the same form.

    Raises:
        InputError: two fits differ.
    """
    first = members[0]
    for other in members[1:]:
        both = f"{other.path} and {first.path}"
        if other.base != first.base:
            raise InputError(f"{both} have different base models; their adapters change different weights and have no mean")
        if other.layers != first.layers:
            layer = min({*other.layers} ^ {*first.layers})
            raise InputError(f"{both} adapt different layers: only one adapts {layer!r}; fold fits with the same targets")
        if other.data.tasks != first.data.tasks:
            task = min({*other.data.tasks} ^ {*first.data.tasks})
            raise InputError(f"{both} have different tasks: only one has {shown(task)}; fold fits of the same tasks")
        options = [*_DOCUMENTS, *first.config.content_options]
        for name in options:
            one, two = getattr(first.config, name), getattr(other.config, name)
            if one != two:
                raise InputError(
                    f"{both} read documents in different ways: {name} is {shown(two)} and {shown(one)}; fold fits with one {name}"
                )
        for task, groups in first.record["tasks"].items():
            if groups.keys() != other.record["tasks"].get(task, {}).keys():
                raise InputError(f"{both} have different documents of task {shown(task)}; fold fits of the same table")


def joint_split(members: Sequence[Member]) -> tuple[dict[str, Any], bool]:
    """The split of the fold, and whether it is that of all fits.

    A group of documents is for testing if it is so in every fit. If any fit trained on it, it is for training; otherwise for
    validation.
    """
    first = members[0].record
    if all(member.record["tasks"] == first["tasks"] for member in members):
        return first, True
    tasks = {
        task: {group: _side([member.record["tasks"][task][group] for member in members]) for group in groups}
        for task, groups in first["tasks"].items()
    }
    how = "the fits split the documents in different ways: a document is for testing if it is so in each of them"
    return {"seed": None, "fractions": None, "how": how, "tasks": tasks}, False


def _side(sides: Sequence[str]) -> str:
    return next(side for side in ("train", "validation", "test") if side in sides)


def not_a_run(members: Sequence[Member], *, cut: bool) -> str | None:
    """Why the folded fit cannot be read as a run; None if it can."""
    first = members[0]
    if cut:
        return "the adapters are cut, so that A and B of different tasks have no common basis"
    for member in members:
        config = member.config
        if config.adapter != "lora" or config.prior not in _WITH_TAU or config.penalty != "normal" or config.start_as == CENTRE:
            return f"{member.path} has an adapter other than lora, or a prior without a tau of its own"
        if config.task_group_column is not None:
            return f"{member.path} has groups of tasks, whose means have no mean over fits"
        forms = {(form.rank, form.alpha) for form in (*first.forms, *member.forms)}
        shapes = {name: value.shape for name, value in member.precisions.items()}
        if len(forms) > 1 or shapes != {name: value.shape for name, value in first.precisions.items()}:
            return f"{member.path} and {first.path} have different ranks, alphas or learned precisions"
        if different := [name for name in _PRIOR if getattr(config, name) != getattr(first.config, name)]:
            return f"{member.path} and {first.path} have different values of {different[0]}"
    return None

"""The fits that are folded into one: read each, and check that they belong together.

>>> _side(["test", "validation"]), _side(["test", "test"]), _side(["validation", "train"])
('validation', 'test', 'train')
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bora_pyro.data import TaskData
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError, shown
from bora_pyro.exchange.factors import LoraForm, lora_form
from bora_pyro.likelihoods import Likelihood
from bora_pyro.runs.config.groups import CENTRE
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.saved import SavedRun, load_run

#: Options of the prior. Fits that agree here can be read as one run.
PRIOR_OPTIONS = ("prior", "prior_option", "prior_form", "tau", "tau_group", "tau_per", "penalty", "start_as")
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
        slots: the paths of the adapted layers by kind.
        precisions: the learned τ, by name.
        base: digest of the base, or its name if it has none.
        digest: SHA-256 of ``posterior.safetensors``.
        likelihood: what the fit observes.
        metrics: content of ``metrics.json``.
    """

    path: str
    config: MapFitConfig
    data: TaskData
    record: dict[str, Any]
    forms: list[LoraForm]
    slots: dict[str, tuple[str, ...]]
    precisions: dict[str, Tensor]
    base: str
    digest: str
    likelihood: Likelihood
    metrics: dict[str, Any]

    @property
    def layers(self) -> list[str]:
        """The paths of the adapted layers."""
        return [path for paths in self.slots.values() for path in paths]

    @classmethod
    def read(cls, path: str, *, device: str, trust_remote_code: bool, command: str = "fold") -> Member:
        """Read a run for a command.

        Raises:
            InputError: as for ``load_run``; or the run is no MAP fit, or its adapters have no exact LoRA form.
        """
        run = load_run(path, device=device, trust_remote_code=trust_remote_code)
        if run.posterior_config is not None or not run.is_point:
            raise InputError(f"the run in {path} is a posterior; {command} takes MAP fits: give the fit that it was made around")
        if run.adapted:
            raise InputError(f"the run in {path} is an adaptation of another fit; {command} takes MAP fits")
        model = run.fitted.model
        model.likelihood.check_texts(command)
        try:
            forms = _forms(run)
        except InputError as error:
            raise InputError(f"the run in {path} cannot be used by {command}: {error}") from None
        base = model.backbone.digest or f"the name {run.config.base_model}"
        slots = {slot.name: slot.paths for slot in model.backbone.slots}
        learned = {name: value.cpu() for name, value in model.prior.state().items() if name.startswith("tau.")}
        record, digest = run.folder.read_split(), run.folder.digest_of("posterior")
        return cls(path, run.config, run.data, record, forms, slots, learned, base, digest, model.likelihood, run.metrics)


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


def check_number(paths: Sequence[str], what: str) -> None:
    """Check that two or more different runs are given.

    Args:
        paths: their folders.
        what: what they are, with an example, for the message.

    Raises:
        InputError: they are fewer, or one is given twice.
    """
    places = [Path(path).absolute().resolve() for path in paths]
    if twice := [path for n, path in enumerate(paths) if places[n] in places[:n]]:
        raise InputError(f"the run {shown(twice[0], characters=300)} is given twice; give each once")
    if len(paths) < 2:
        raise InputError(f"{len(paths)} runs are given; name the folders of two or more {what}")


def document_keys(split: TokenSplit) -> list[bytes]:
    """The tokens of the first piece of each document: documents of the same text have the same."""
    return [split.document(n).numpy().tobytes() for n in split.first_pieces.tolist()]


def check_alike(members: Sequence[Member]) -> None:
    """Check that the fits have one base, the same layers and tasks, and the same documents in the same form.

    Raises:
        InputError: two fits differ.
    """
    first = members[0]
    for other in members[1:]:
        both = f"{other.path} and {first.path}"
        check_base(first, other)
        if other.layers != first.layers:
            layer = min({*other.layers} ^ {*first.layers})
            raise InputError(f"{both} adapt different layers: only one adapts {layer!r}; fold fits with the same targets")
        check_tasks(first, other, "fold")
        if name := different_option(first, other):
            one, two = getattr(first.config, name), getattr(other.config, name)
            raise InputError(
                f"{both} read documents in different ways: {name} is {shown(two)} and {shown(one)}; fold fits with one {name}"
            )
        if task := different_table(first, other):
            raise InputError(f"{both} have different documents of task {shown(task)}; fold fits of the same table")


def check_base(first: Member, other: Member) -> None:
    """Check that two fits have one base.

    Raises:
        InputError: they have not.
    """
    if other.base != first.base:
        raise InputError(
            f"{other.path} and {first.path} have different base models; their adapters change different weights and cannot be "
            "joined"
        )


def check_tasks(first: Member, other: Member, verb: str) -> None:
    """Check that two fits have the same tasks in the same order.

    Raises:
        InputError: they have not.
    """
    both = f"{other.path} and {first.path}"
    if different := {*other.data.tasks} ^ {*first.data.tasks}:
        raise InputError(f"{both} have different tasks: only one has {shown(min(different))}; {verb} fits of the same tasks")
    if other.data.tasks != first.data.tasks:
        raise InputError(f"{both} have their tasks in different orders; {verb} fits of tasks in one order")


def different_option(first: Member, other: Member) -> str | None:
    """The first option by which two fits read documents in different ways."""
    options = [*_DOCUMENTS, *first.config.content_options]
    return next((name for name in options if getattr(first.config, name) != getattr(other.config, name)), None)


def different_table(first: Member, other: Member) -> str | None:
    """The first task of which two fits have different documents."""
    tasks = first.record["tasks"].items()
    return next((task for task, groups in tasks if groups.keys() != other.record["tasks"].get(task, {}).keys()), None)


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
        if reason := without_tau(member) or different_form(first, member):
            return reason
        shapes = {name: value.shape for name, value in member.precisions.items()}
        if shapes != {name: value.shape for name, value in first.precisions.items()}:
            return f"{member.path} and {first.path} have different learned precisions"
        if different := [name for name in PRIOR_OPTIONS if getattr(member.config, name) != getattr(first.config, name)]:
            return f"{member.path} and {first.path} have different values of {different[0]}"
    return None


def without_tau(member: Member) -> str | None:
    """Why the adapters of a fit are not LoRA under a prior with one τ; None if they are."""
    config = member.config
    if config.adapter != "lora" or config.prior not in _WITH_TAU or config.penalty != "normal" or config.start_as == CENTRE:
        return f"{member.path} has an adapter other than lora, or a prior without a tau of its own"
    if config.task_group_column is not None:
        return f"{member.path} has groups of tasks, which have means and a tau of their own"
    return None


def different_form(first: Member, member: Member) -> str | None:
    """Why two fits have adapters of different forms; None if they are alike."""
    forms = {(form.rank, form.alpha) for form in (*first.forms, *member.forms)}
    return f"{member.path} and {first.path} have different ranks or alphas" if len(forms) > 1 else None

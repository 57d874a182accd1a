"""Callbacks run between the steps of a fit. They can learn τ, let ranks grow, change masks or average weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from bora_pyro.backbone.fit_hooks import FitHooks
from bora_pyro.data.tasks import TaskData
from bora_pyro.data.token_split import Batches
from bora_pyro.errors import InputError
from bora_pyro.inference.processes import Processes
from bora_pyro.inference.state import FitState
from bora_pyro.model import BoRA


class FitLoop(Protocol):
    """What a callback sees of the loop.

    Attributes:
        model, data: the model, and the documents that it is fitted to.
        state: the guide's parameters and the optimiser.
        processes: the processes that share the fit.
        report: the metrics of the epoch so far; a callback may add to them.
        step_number: number of the step that was just taken, from 0, over all epochs.
        epoch: number of finished epochs.
        total_steps: number of steps of the whole fit.
    """

    model: BoRA
    data: TaskData
    state: FitState
    processes: Processes
    report: dict[str, Any]
    step_number: int
    epoch: int
    total_steps: int

    def validation_batches(self) -> list[Batches]:
        """Batches of the documents that teach τ, with half the token budget, for each part of the tasks of this process."""

    @property
    def draws_tasks(self) -> bool:
        """Whether a step moves only the tasks of its documents."""


class Callback(FitHooks):
    """Base class of callbacks. A subclass overrides the methods that it needs.

        >>> class Counter(Callback):
        ...     '''Counts the steps of a fit.'''
        ...     steps = 0
        ...
        ...     def after_step(self, loop):
        ...         self.steps += 1
        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data, counter = bp.load_tasks(bp.table(table), backbone.tokenizer), Counter()
        >>> fitted = bp.fit(bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=1), prior=bp.Pooled()), data, callbacks=[counter], epochs=2)
        >>> counter.steps
        2

    A callback runs in every process of a fit. It draws random numbers from torch's generator, which is seeded for each step. A
    resumed fit therefore draws the same numbers as an uninterrupted one. Everything that a callback changes must be in the state
    of the model (buffers, the prior) or in its own ``state``: both are part of checkpoints.

    Attributes:
        name: names the callback's tensors in a checkpoint.
        gradient_factor: what ``before_step`` multiplies the gradient of each task by, apart from clipping: a number, or (D,).
        needs_sums: whether it needs averages over all tasks (``loop.state.totals``), even if a step draws only some tasks.
    """

    def begin(self, model: BoRA, data: TaskData) -> None:
        """Called before the first step.

        Raises:
            InputError: the callback cannot work with this model or these documents.
        """

    def before_passes(self, loop: FitLoop) -> None:
        """Called before each step's passes through the model, which give its gradient; ``before_step`` follows them."""

    def before_step(self, loop: FitLoop) -> None:
        """Called before each step of the optimiser. The gradient is complete and clipped; a callback may change it."""

    def after_step(self, loop: FitLoop) -> None:
        """Called after each step of the optimiser."""

    def after_epoch(self, loop: FitLoop) -> None:
        """Called after the last step of each epoch, before the validation documents are scored."""


def checked_callbacks(callbacks: Sequence[Callback], model: BoRA, data: TaskData) -> list[Callback]:
    """Check the callbacks, call ``begin`` of each, and return them.

    Raises:
        InputError: two callbacks with tensors have the same name, under which a checkpoint stores them; or one cannot begin.
    """
    names = [callback.name for callback in callbacks if callback.state()]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two callbacks have the name {name!r}; give each a name of its own")
    for callback in callbacks:
        callback.begin(model, data)
    return list(callbacks)


def states_of(callbacks: Sequence[FitHooks]) -> dict[str, Tensor]:
    """The tensors of all callbacks for a checkpoint, by ``<callback>.<name>``."""
    return {f"{callback.name}.{key}": value for callback in callbacks for key, value in callback.state().items()}


def load_states(callbacks: Sequence[FitHooks], stored: Mapping[str, Tensor]) -> None:
    """Give the callbacks the tensors that ``states_of`` returned.

    Raises:
        InputError: a callback refuses its tensors, because they are of another fit.
    """
    for callback in callbacks:
        own = {name: value for name, value in stored.items() if name.startswith(f"{callback.name}.")}
        callback.load_state({name.partition(".")[2]: value for name, value in own.items()})

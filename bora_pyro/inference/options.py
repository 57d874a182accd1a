"""The options of ``fit``. The configurations of MAP and posterior fits inherit them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bora_pyro.errors import InputError
from bora_pyro.inference.schedule import SCHEDULES
from bora_pyro.options.field import check_fields, option
from bora_pyro.options.seed import Seeded

#: Groups of options in ``--help``: how the objective is optimised, and how the run is carried out.
OPTIMISATION, RUN = "optimisation", "run"
#: The values of ``tau_documents``.
ALL, HALF = "all", "half"
#: The values of ``kept_by``.
TASKS, GLOBAL_MEAN = "tasks", "global_mean"


@dataclass(kw_only=True)
class FitOptions(Seeded):
    """Options of :func:`~bora_pyro.inference.fit.fit`.

        >>> FitOptions(epochs=3).learning_rate
        0.01
        >>> FitOptions(warmup=2.0).validate()
        Traceback (most recent call last):
        bora_pyro.errors.InputError: warmup is 2.0; give a fraction of the steps, from 0 to 1

    The help of each field is its documentation, here and on the command line. The learning rate rises over the fraction
    ``warmup`` of the steps to its largest value, ``learning_rate``, and then falls to 0 as a cosine. A guide that is made of the
    steps themselves needs steps that stay as large as they are, and asks for a constant rate. In the non-centred form,
    deviations are in units of their prior's scale, so that one learning rate suits every τ. In a short fit it is too small for
    them to get there, so they have a larger one (:func:`~bora_pyro.inference.optimizer.deviation_rate`). Under a small τ it is
    limited by ``learning_rate`` (:meth:`~bora_pyro.inference.optimizer.Rates.entries`).
    """

    epochs: int = option(6, "largest number of passes over the training documents", group=OPTIMISATION, least=1)
    learning_rate: float = option(1e-2, "AdamW's largest learning rate", group=OPTIMISATION, positive=True)
    warmup: float = option(0.1, "fraction of all steps in which the learning rate rises from 0", group=OPTIMISATION)
    schedule: str | None = option(
        None,
        "how the learning rate goes on after the warm-up: it falls to 0 (cosine) or stays (constant) (default: cosine, unless "
        "the guide is made of the steps)",
        group=OPTIMISATION,
        choices=SCHEDULES,
    )
    deviation_reach: float = option(
        4.0,
        "how far the deviations can move in a fit, in standard deviations of their prior; their learning rate is raised if "
        "learning_rate is too small for it; 0: one rate and one AdamW for all",
        group=OPTIMISATION,
    )
    average: bool = option(
        True,
        "measure the mean of the steps beside the last step after each epoch, and keep the better one",
        group=OPTIMISATION,
    )
    token_budget: int = option(4096, "tokens of a batch, padding included", group=OPTIMISATION, least=2)
    accumulate: int = option(1, "number of batches that contribute to one step", group=OPTIMISATION, least=1)
    gradient_clip: float = option(1.0, "largest norm of the whole gradient; inf: no clipping", group=OPTIMISATION)
    temperature: float = option(
        1.0,
        "weight of the KL divergence: 1 gives the ELBO (MAP for a point estimate); below 1 the prior counts less",
        group=OPTIMISATION,
        positive=True,
    )
    task_subsampling: bool | None = option(
        None,
        "update only the adapters of the tasks of a step's documents, so that a step's cost does not depend on the number of "
        "tasks (default: with more than 64 tasks, or several processes)",
        group=OPTIMISATION,
    )
    task_dropout: float = option(
        0.0,
        "probability with which a task loses its deviation in a step, so that its documents are read with Theta alone: Theta "
        "is then a better adapter of tasks without documents",
        group=OPTIMISATION,
    )
    patience: int = option(
        3, "stop after this many epochs without a better validation perplexity; 0 never stops early", group=OPTIMISATION, least=0
    )
    kept_by: str = option(
        TASKS,
        "what chooses the epoch that is kept: the validation documents under the adapters of their tasks (tasks); or under Theta "
        "alone, which tasks without documents get (global_mean)",
        group=OPTIMISATION,
        choices=(TASKS, GLOBAL_MEAN),
    )
    tau_documents: str = option(
        ALL,
        "which validation documents teach a learned tau: all of them; or every other one (half), and the others alone choose "
        "the epoch",
        group=OPTIMISATION,
        choices=(ALL, HALF),
    )
    gradient_norm: bool = option(
        True,
        "measure the norm of the objective's gradient at the start and at the end, on a part of the training documents",
        group=OPTIMISATION,
    )

    task_memory: float = option(
        4.0,
        "GiB of memory for the tensors of the tasks under task_subsampling; larger ones are kept in memory-mapped files",
        group=RUN,
    )
    checkpoint_every: int = option(1, "epochs between checkpoints", group=RUN, least=1)
    checkpoint_minutes: float = option(
        10.0, "also write a checkpoint within an epoch after this many minutes; inf: only at the end of an epoch", group=RUN
    )
    keep_checkpoints: int = option(2, "how many of the newest checkpoints are kept", group=RUN, least=1)

    def validate(self) -> None:
        """Check every value.

        Raises:
            InputError: one line with the value and what is allowed.
        """
        check_fields(self)
        if not self.checkpoint_minutes >= 0:
            raise InputError(f"checkpoint_minutes is {self.checkpoint_minutes}; give minutes from 0 (every step) up, or inf")
        if not self.task_memory >= 0:
            raise InputError(f"task_memory is {self.task_memory}; give GiB from 0 (all in files) up")
        if not self.gradient_clip > 0:
            raise InputError(f"gradient_clip is {self.gradient_clip}; give a number above 0, or inf for no clipping")
        if not 0 <= self.deviation_reach < math.inf:
            raise InputError(f"deviation_reach is {self.deviation_reach}; give a finite number from 0 (one rate for all) up")
        if not 0 <= self.task_dropout < 1:
            raise InputError(f"task_dropout is {self.task_dropout}; give a probability from 0 (no dropout) to below 1")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"warmup is {self.warmup}; give a fraction of the steps, from 0 to 1")

"""The options of ``meta_fit``. What the paper on ABMLL leaves open is an option here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bora_pyro.errors import InputError
from bora_pyro.inference.options import FitOptions
from bora_pyro.options.field import changed, check_fields, option
from bora_pyro.options.seed import Seeded

#: The heading of the inner steps in ``--help``.
INNER = "tasks and inner steps"
#: What reaches the global point.
FIRST_ORDER, PRIOR, REPTILE = OUTER_GRADIENTS = ("first_order", "prior", "reptile")


@dataclass(kw_only=True)
class MetaOptions(Seeded):
    """Options of :func:`~bora_pyro.inference.meta_fit.meta_fit`.

        >>> MetaOptions(inner_steps=3).beta
        0.001
        >>> MetaOptions(beta=-1.0).validate()
        Traceback (most recent call last):
        bora_pyro.errors.InputError: beta is -1.0; give a finite number from 0 (the plain likelihood) up

    The paper (Zhang, Snell & Griffiths, 2025, arXiv 2508.14285) gives the objective and its two loops. What we could read of it
    does not say the number K of inner steps, either learning rate, the optimisers, the number of a task's documents in a step,
    or the sizes that β is measured against. The defaults and their reasons:

    - ``beta`` 1: then the objective is a bound on log p(documents | μ₀, σ₀), in nats on both sides. Reviewers report 1e-7, with
      which β KL is below the rounding of a float32 loss.
    - ``beta_global``: the paper's later versions have one β for both KL terms, the first version two numbers.
    - ``inner_steps`` 5: a task's cost is K + 1 passes over its documents in training and K passes for a new task.
    - ``inner_rate`` 0.3: for the gradient of a task's objective per observation, so that it does not depend on the number of
      documents. Plain gradient steps (``sgd``) are what the paper names. ``adam`` does not depend on the scale of the gradient.
    - ``outer_gradient`` ``first_order``: the task's parameters begin at the global point, so their derivative with respect to it
      is the identity, apart from second derivatives, which are left out (as in first-order MAML, Finn et al., 2017). ``prior``
      leaves this path out as well. Then only β (KL − log p) moves the global point. ``reptile`` is another method (Nichol,
      Achiam & Schulman, 2018, arXiv 1803.02999): the global point moves to where the inner steps have led, along the mean of
      their K gradients. It is defined for ``beta`` 0. With a small ``scale`` of the prior it is Reptile on LoRA's latents.
    - ``tasks_per_step`` 4 and ``documents_per_task`` 8: with documents of 128 tokens they fill ``token_budget``.
    - ``learning_rate`` and the rest are those of a MAP fit.
    """

    beta: float = option(
        1e-3,
        "weight of each task's KL divergence from the prior, beside its log-likelihood in nats; 0: the plain likelihood, under "
        "which nothing holds a task near the others",
        group=INNER,
    )
    beta_global: float | None = option(
        None, "weight of -log p of the global means and scales, if it is not beta (default: beta)", group=INNER
    )
    inner_steps: int = option(
        5, "K: gradient steps of a task from the global point, in training and for a new task", group=INNER, least=1, most=10_000
    )
    inner_rate: float = option(
        0.3, "learning rate of the inner steps, for the objective per observation of a task", group=INNER, positive=True
    )
    outer_gradient: str = option(
        FIRST_ORDER,
        "what reaches the global point: the gradient of the adapted tasks, without second derivatives, and that of the prior "
        "(first_order); that of the prior alone (prior); or the mean gradient of the inner steps (reptile, with beta 0)",
        group=INNER,
        choices=OUTER_GRADIENTS,
    )
    tasks_per_step: int = option(4, "tasks that are drawn for a meta-step", group=INNER, least=1)
    documents_per_task: int = option(
        8, "training documents that a drawn task has in a meta-step; an epoch reads every document once", group=INNER, least=1
    )

    epochs: int = changed(FitOptions, "epochs", 6)
    learning_rate: float = changed(
        FitOptions, "learning_rate", 1e-2, "AdamW's largest learning rate of the global means and scales"
    )
    warmup: float = changed(FitOptions, "warmup", 0.1)
    schedule: str = changed(
        FitOptions,
        "schedule",
        "cosine",
        "how that learning rate goes on after the warm-up: it falls to 0 (cosine) or stays (constant)",
    )
    token_budget: int = changed(FitOptions, "token_budget", 4096, "tokens of one pass of the base, padding included")
    gradient_clip: float = changed(
        FitOptions, "gradient_clip", 1.0, "largest norm of the gradient of the global point; inf: no clipping"
    )
    patience: int = changed(FitOptions, "patience", 3)

    def validate(self) -> None:
        """Check every value.

        Raises:
            InputError: one line with the value and what is allowed.
        """
        check_fields(self)
        for name in ("beta", "beta_global"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                means = " (the plain likelihood)" if name == "beta" else ""
                raise InputError(f"{name} is {value}; give a finite number from 0{means} up")
        if self.outer_gradient == REPTILE and self.beta:
            raise InputError(
                f"beta is {self.beta:g}; outer_gradient reptile is for inner steps under the likelihood alone: give 0"
            )
        if not self.gradient_clip > 0:
            raise InputError(f"gradient_clip is {self.gradient_clip}; give a number above 0, or inf for no clipping")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"warmup is {self.warmup}; give a fraction of the steps, from 0 to 1")

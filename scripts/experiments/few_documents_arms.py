"""The arms of ``few_documents.py``: the fit to the other tasks that an arm needs, and how it gives new tasks their adapters.

>>> fit_of("pooled_tuned"), fit_of("icm_ridge"), fit_of("abmll_0.001"), fit_of("bora")
('pooled', 'icm', 'abmll_0.001', 'bora')
>>> [arm for arm in USUAL if trains(arm)]
['bora', 'scratch', 'pooled_tuned']
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from bora_pyro.adapters import LoRA, MTLoRA
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError, nearest
from bora_pyro.guides import normal_guide
from bora_pyro.inference.adapt import fit_deviations, given_model
from bora_pyro.inference.fit import fit
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.meta_adapt import meta_adapt
from bora_pyro.inference.meta_fit import inner_options, meta_fit
from bora_pyro.inference.meta_options import MetaOptions
from bora_pyro.inference.options import FitOptions
from bora_pyro.model import BoRA
from bora_pyro.predict.generators import METHODS
from bora_pyro.predict.generators.generator import Generator
from bora_pyro.predict.generators.layout import Layout
from bora_pyro.predict.mixture import Draws
from bora_pyro.predict.posterior import Posterior
from bora_pyro.predict.task_vector import task_vectors
from bora_pyro.priors import AmortisedNormal, LearnedPrecision, Pooled, Prior, with_shared

USUAL = ("bora", "scratch", "pooled", "pooled_tuned")
#: Arms of other ways to share; ``abmll_`` with any β is one.
OTHER_WAYS = ("posterior", "mtlora", "abmll_0.001", "reptile", *(f"icm_{name}" for name in METHODS))
ARMS = (*USUAL, *OTHER_WAYS)
ABMLL, ICM, REPTILE = "abmll_", "icm_", "reptile"
#: Draws of a posterior: of its mixture, and of each task for a generator.
DRAWS = 8
#: σ₀ of Reptile, which has none: too small to change a prediction.
NO_SCALE = 1e-4


def check_arm(name: str) -> None:
    """Raise ``InputError`` if there is no such arm."""
    if name in ARMS or _beta(name) is not None:
        return
    raise InputError(f"arm {name!r} is not known; known: {', '.join(ARMS)} (or another β){nearest(name, ARMS)}")


def _beta(arm: str) -> float | None:
    try:
        beta = float(arm.removeprefix(ABMLL)) if arm.startswith(ABMLL) else math.nan
    except ValueError:
        return None
    return beta if 0 <= beta < math.inf else None


def fit_of(arm: str) -> str:
    """The name of the fit to the other tasks that an arm needs."""
    if arm.startswith("pooled"):
        return "pooled"
    if arm.startswith(ICM):
        return "icm"
    return arm if arm in ("mtlora", REPTILE) or arm.startswith(ABMLL) else "bora"


def trains(arm: str) -> bool:
    """Whether an arm is trained on the documents of new tasks, at a rate and for a number of steps that are chosen."""
    return arm in ("bora", "scratch", "pooled_tuned", "posterior", "mtlora")


@dataclass
class Others:
    """The other tasks of one seed, and the fits to them.

    Attributes:
        model: the model of these tasks, whose prior is not used.
        data: their documents.
        options: the options of a fit.
        tau_per, tau_start: those of the learned τ.
        inner_rate: learning rate of the inner steps of ABMLL and Reptile.
        seed: the seed.
        fits: the fits at the chosen learning rates, by name.
    """

    model: BoRA
    data: TaskData
    options: FitOptions
    tau_per: str
    tau_start: float
    inner_rate: float
    seed: int
    fits: dict[str, Fitted] = field(default_factory=dict)

    def fit(self, name: str, rate: float) -> Fitted:
        """Do a fit at a learning rate.

        Args:
            name: ``bora``, ``pooled``, ``mtlora``, ``icm``, ``reptile``, or ``abmll_`` with β.
            rate: the learning rate.
        """
        if name == "icm":  # the posterior around BoRA's fit, from which a generator learns
            bora = self.fits["bora"]
            guide = normal_guide(bora.model, bora.sites(), data=self.data, scale=0.5)
            options: dict[str, Any] = {"learning_rate": rate, "patience": 0, "callbacks": []}
            return fit(bora.model, self.data, self.options, guide=guide, **options)
        if name.startswith(ABMLL) or name == REPTILE:
            return self._meta_fit(name, rate)
        adapter = self.model.adapter
        if name == "mtlora":
            assert isinstance(adapter, LoRA)
            adapter = MTLoRA(rank=adapter.rank, alpha=adapter.alpha)
        prior: Prior = Pooled() if name == "pooled" else LearnedPrecision(self.tau_per, self.tau_start)
        return fit(self._model(prior, adapter), self.data, self.options, learning_rate=rate)

    def _model(self, prior: Prior, adapter: Any) -> BoRA:
        shared = with_shared(prior, adapter.shared)
        parts: dict[str, Any] = {"adapter": adapter, "likelihood": self.model.likelihood}
        return BoRA(self.model.backbone, self.model.num_tasks, prior=shared, seed=self.seed, **parts)

    def meta_options(self, name: str) -> MetaOptions:
        """The options of ABMLL or of Reptile."""
        same = {key: getattr(self.options, key) for key in ("epochs", "token_budget", "gradient_clip")}
        of_arm = {"beta": 0.0, "outer_gradient": REPTILE} if name == REPTILE else {"beta": _beta(name)}
        return MetaOptions(inner_rate=self.inner_rate, seed=self.seed, **same, **of_arm)

    def _meta_fit(self, name: str, rate: float) -> Fitted:
        prior = AmortisedNormal(NO_SCALE, learned=False) if name == REPTILE else AmortisedNormal()
        model = self._model(prior, self.model.adapter)
        return meta_fit(model, self.data, dataclasses.replace(self.meta_options(name), learning_rate=rate))

    @cached_property
    def vectors(self) -> torch.Tensor:
        """The task vectors of the other tasks, (tasks, hidden)."""
        return task_vectors(self.model.backbone, self.data.train, seed=self.seed).vectors

    def generator(self, method: str) -> Generator:
        """A generator of the adapters of these tasks."""
        fitted = self.fits["icm"]
        layout, posterior = Layout.of(fitted.model.starts), Posterior(fitted, seed=self.seed)
        latents = layout.flatten(posterior.mean()).detach().float().cpu()
        draws = torch.stack([layout.flatten(posterior.draw(k)).detach().float().cpu() for k in range(DRAWS)], 1)
        return Generator.fit(METHODS[method](), self.vectors, latents, layout=layout, draws=draws, seed=self.seed)


@dataclass(frozen=True)
class Adapted:
    """The adapters of new tasks: the model that predicts, and the draws of a mixture, of which a point has one."""

    model: BoRA
    draws: Draws

    @classmethod
    def of(cls, fitted: Fitted) -> Adapted:
        """The centre of a fit."""
        return cls(fitted.model, lambda: [fitted.weights()[0]])


def other_way(others: Others, arm: str, data: TaskData, options: Mapping[str, Any]) -> Adapted:
    """Give new tasks their adapters by one of ``OTHER_WAYS``.

    Args:
        others: the fits to the other tasks.
        arm: name of the arm.
        data: the new tasks.
        options: options of :func:`~bora_pyro.inference.adapt.fit_deviations`, for arms that train.
    """
    fitted = others.fits[fit_of(arm)]
    if arm == "mtlora":
        return Adapted.of(fit_deviations(given_model(fitted, len(data.tasks)), data, **options))
    if arm == "posterior":
        new = fit_deviations(given_model(fitted, len(data.tasks)), data, guide="normal", **options)
        posterior = Posterior(new, seed=others.seed)
        return Adapted(new.model, lambda: posterior.draws(DRAWS))
    if arm.startswith(ICM):
        new_vectors = task_vectors(others.model.backbone, data.train, seed=others.seed).vectors
        generator, model = others.generator(arm.removeprefix(ICM)), given_model(others.fits["bora"], len(data.tasks))
        rows = [generator.generate(vector) for vector in new_vectors]
        device = model.backbone.device
        theta = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
        return Adapted(model, lambda: [theta])
    return Adapted.of(meta_adapt(fitted, data, inner_options(others.meta_options(arm)), seed=others.seed))

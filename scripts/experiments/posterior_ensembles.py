"""The arms of ``compare_posteriors.py`` that are made of MAP fits of their own: ensembles and MC dropout."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bora_pyro.adapters import DropoutLoRA, LoRA
from bora_pyro.data import ByRecord
from bora_pyro.errors import InputError
from bora_pyro.exchange.factors import lora_form
from bora_pyro.exchange.fold import mean_form, stacked
from bora_pyro.inference.fit import fit
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.last_epochs import LastEpochs
from bora_pyro.inference.loop import usual_callbacks
from bora_pyro.inference.options import FitOptions
from bora_pyro.model import BoRA, Weights
from bora_pyro.options.field import part_of
from bora_pyro.predict.distil import distil
from bora_pyro.predict.mixture import Draws
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.fold import FoldConfig
from bora_pyro.runs.saved import SavedRun

#: Members of an ensemble of fits, epochs of an ensemble of checkpoints, and the probability of dropout.
MEMBERS, EPOCHS, DROPOUT = 4, 4, 0.1


@dataclass(frozen=True)
class Made:
    """A posterior of an arm.

    Attributes:
        fitted: the fit, whose centre is one of the predictions.
        seconds: the time that it took.
        draws: its draws; None: those of its guide, if that has a spread.
        model: the model that predicts with the draws; None: that of the MAP fit.
        centre: the model and θ of the centre; None: those of the MAP fit and of ``fitted``.
        has_centre: whether the centre is a prediction of the arm.
    """

    fitted: Fitted
    seconds: float
    draws: Draws | None = None
    model: BoRA | None = None
    centre: tuple[BoRA, Weights] | None = None
    has_centre: bool = True


class Members:
    """Four MAP fits to the same split, from different starts and in different orders of the documents, and their arms.

    They are fitted once for each seed. The first one is the run itself.
    """

    _newest: tuple[int, list[Weights], float] | None = None

    def of(self, run: SavedRun, seed: int) -> tuple[list[Weights], float]:
        """θ of all four, and their seconds."""
        if self._newest is None or self._newest[0] != seed:
            fits = [run.fitted, *(_fit(replace(run.config, seed=1000 * k + seed), run) for k in range(1, MEMBERS))]
            self._newest = seed, [fitted.weights()[0] for fitted in fits], sum(fitted.seconds for fitted in fits)
        return self._newest[1:]

    def ensemble(self, run: SavedRun, seed: int) -> Made:
        """The four as draws."""
        members, seconds = self.of(run, seed)
        return Made(run.fitted, seconds, lambda: members, has_centre=False)

    def folded(self, run: SavedRun, seed: int) -> Made:
        """The mean of their ΔW, cut to the rank of one of them."""
        members, seconds = self.of(run, seed)
        start = time.perf_counter()
        centre = _folded(run.fitted.model, members)
        return Made(run.fitted, seconds + time.perf_counter() - start, centre=centre)

    def distilled(self, run: SavedRun, seed: int, *, epochs: int) -> Made:
        """The folded adapters, fitted to the averaged probabilities on the training documents."""
        members, seconds = self.of(run, seed)
        start = time.perf_counter()
        student, theta = _folded(run.fitted.model, members)
        assert isinstance(student.adapter, LoRA)
        assert student.adapter.alpha is not None
        options = {"epochs": epochs, "patience": 0, "learning_rate": FoldConfig.distil_learning_rate, "seed": seed}
        options["token_budget"] = run.config.token_budget
        fitted = distil(run.fitted.model, run.data, lambda: members, theta, alpha=student.adapter.alpha, **options)
        seconds += time.perf_counter() - start
        return Made(fitted, seconds, centre=(student, fitted.weights()[0]))


def _folded(model: BoRA, members: Sequence[Weights]) -> tuple[BoRA, Weights]:
    """The mean of the members' ΔW at the rank of one of them: a model with plain LoRA, and its θ."""
    folded = []
    for d in range(model.num_tasks):
        forms = [lora_form(model, {name: value[d] for name, value in member.items()}, task=d) for member in members]
        folded.append(mean_form(forms, rank=forms[0].rank))
    adapter = LoRA(folded[0].rank, folded[0].alpha)
    student = BoRA(model.backbone, model.num_tasks, adapter=adapter, likelihood=model.likelihood)
    return student, stacked(student, folded)


def checkpoint_ensemble(run: SavedRun, seed: int) -> Made:
    """The states after the last epochs of the MAP fit, which is run once more because a run folder does not have them."""
    last = LastEpochs(EPOCHS)
    fitted = _fit(run.config, run, last)
    return Made(fitted, fitted.seconds, last.draws, has_centre=False)


def mc_dropout(run: SavedRun, seed: int, *, draws: int) -> Made:
    """A MAP fit with dropout on the adapters' inputs, and masks at prediction.

    Raises:
        InputError: the adapter is not plain LoRA.
    """
    if run.config.adapter != "lora":
        raise InputError(
            f"arm 'mc_dropout' needs the adapter lora, and the fit has {run.config.adapter}; leave the arm out (--arms ...)"
        )
    option = [*(run.config.adapter_option or ()), f"dropout={DROPOUT}"]
    fitted = _fit(replace(run.config, adapter="lora_dropout", adapter_option=option), run)
    model, centre = fitted.model, fitted.weights()[0]
    assert isinstance(model.adapter, DropoutLoRA)
    thinned = BoRA(
        model.backbone,
        model.num_tasks,
        adapter=replace(model.adapter, always=True),
        prior=model.prior,
        likelihood=model.likelihood,
        router=model.router,
    )
    # each draw is a pass with masks of its own
    return Made(fitted, fitted.seconds, lambda: [centre] * draws, thinned)


def _fit(config: MapFitConfig, run: SavedRun, *callbacks: LastEpochs) -> Fitted:
    """A MAP fit to the documents of a run: with another seed, a limit on their number would select different ones."""
    model, _ = build_run(config, quiet=True, split=ByRecord(run.folder.read_split()))
    return fit(model, run.data, part_of(config, FitOptions), callbacks=[*usual_callbacks(model), *callbacks])

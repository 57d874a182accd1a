"""The arms of ``compare_posteriors.py`` that are made of MAP fits of their own: ensembles and MC dropout."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bora_pyro.adapters import DropoutLoRA
from bora_pyro.data import ByRecord
from bora_pyro.errors import InputError
from bora_pyro.inference.fit import fit
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.last_epochs import LastEpochs
from bora_pyro.inference.loop import usual_callbacks
from bora_pyro.inference.options import FitOptions
from bora_pyro.model import BoRA, Weights
from bora_pyro.options.field import part_of
from bora_pyro.predict.mixture import Draws
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.map_fit import MapFitConfig
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
        has_centre: whether the centre is a prediction of the arm.
    """

    fitted: Fitted
    seconds: float
    draws: Draws | None = None
    model: BoRA | None = None
    has_centre: bool = True


def ensemble(run: SavedRun, seed: int) -> Made:
    """Three more MAP estimates on the same split, with other starts and orders of the documents."""
    members: list[Weights] = [run.fitted.weights()[0]]
    seconds = run.fitted.seconds
    for number in range(1, MEMBERS):
        fitted = _fit(replace(run.config, seed=1000 * number + seed), run)
        members.append(fitted.weights()[0])
        seconds += fitted.seconds
    return Made(run.fitted, seconds, lambda: members, has_centre=False)


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

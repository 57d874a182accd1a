"""Compare posteriors with the MAP fit that they start from, on held-out documents: likelihood, calibration, time and memory.

    python scripts/experiments/compare_posteriors.py --fit_config results/documentation.yaml --output
    results/posteriors_documentation.csv

For each seed (split, start, order of the documents) there is a MAP fit with a learned τ. The arms start from it:

- ``map``: the point estimate.
- ``map_scaled``: its logits, or the scores of the options, divided by the temperature that the validation split chooses.
- ``map_longer``: the point estimate, fitted for as many more epochs as the guides. It shows what longer training alone gains.
- ``ensemble``: four MAP fits from different starts, with averaged probabilities (deep ensembles, Lakshminarayanan et al., 2017).
- ``ensemble_folded``: the mean of the ΔW of these four fits, cut to the rank of one of them: one adapter a task.
  ``ensemble_distilled`` begins there and is fitted to the averaged probabilities on the training documents. Both have a third
  row, ``scaled``: the same adapters with logits over the temperature that the validation split chooses.
  ``ensemble``, ``checkpoint_ensemble`` and ``swag`` have a ``scaled mixture``.
- ``checkpoint_ensemble``: the states after the last four epochs of the MAP fit, with averaged probabilities.
- ``mc_dropout``: a MAP fit with dropout on the inputs of the adapters (``lora_dropout``), and masks at prediction (Gal and
  Ghahramani, 2016). The centre predicts without masks.
- ``normal``, ``structured``, ``ivon``, ``low_rank``, ``subspace``, ``blob``: guides fitted by the ELBO; ``normal_tempered`` has
  the KL term at 0.3 of its weight.
- ``swag``: the mean and the spread of the steps of a fit with a constant rate; the validation split chooses the scale.
- ``tfb``: the widest isotropic noise of each task's ΔW that the validation split allows, without a fit.
- ``laplace``, ``laplace_kronecker``, ``laplace_kfac``: guides from the curvature, without a fit; in ``..._tempered`` the
  curvature is divided by a temperature that the validation split chooses; in ``..._tasks`` Θ stays at its estimate.
- ``..._linearised``: the draws predict with the linear expansion of the network. ``normal_linearised`` has the learning rate of
  ``normal``.

The first seed chooses learning rates and temperatures on the validation split. The perplexity of the posterior's mean chooses a
learning rate, in a search that climbs from the middle of the grid. That of the mixture chooses Laplace's temperature. (For tasks
with answers both are the negative log-likelihood of a question.)
The other seeds use these choices. What a guide itself leaves to the validation split, such as the scale of ``swag``, is chosen
anew for each seed. The test split is only reported. Each run has two rows: the prediction of the posterior's mean, and that of
the mixture of draws. ``few`` columns are about the third of the tasks with the fewest training documents; ``aurc`` is the area
under the risk-coverage curve, where the risk is the share of wrong predictions, and 1 − confidence orders them. Rows that the
output already has are not computed again. For tasks with answers (``likelihood: choice``) a prediction is a question.

With ``--foreign``, the columns ``foreign_...`` have the area under the ROC curve of each score that should separate texts of no
task from test documents: the total entropy of the prediction, the mutual information of token and weights (``epistemic``, of
mixtures alone), and the perplexity. Each text is read with the adapter that gives it the highest likelihood.

All fits have the options of ``--fit_config``, and override ``tau``, ``seed`` and ``learning_rate``. Those of the guides and
``map_longer`` also override ``epochs``, ``patience`` (0) and ``temperature``.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from fit_options import check_usual
from posterior_arms import ARMS, FOLDED, NAMES, SCALED, Arm
from posterior_ensembles import Made, Members, checkpoint_ensemble, mc_dropout
from posteriors_table import markdown
from pyro import poutine
from pyro.infer.autoguide import AutoDelta
from scipy import stats

from bora_pyro.data.token_split import TokenSplit
from bora_pyro.diagnostics.calibration import area_under_risk_coverage, calibration
from bora_pyro.diagnostics.unknown_texts import auroc_by_score, sample_texts, text_scores
from bora_pyro.errors import InputError, nearest
from bora_pyro.guides import GUIDES, make_parameters
from bora_pyro.inference.fit import fit
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.options import FitOptions
from bora_pyro.model import BoRA, Weights
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import option, part_of
from bora_pyro.predict.answers import ChoicePredictions, predictions
from bora_pyro.predict.held_out import settle
from bora_pyro.predict.mixture import Draws, TokenPredictions
from bora_pyro.predict.posterior import Posterior
from bora_pyro.predict.temperature import predict_scaled, temperature_of
from bora_pyro.runs.calibrate import CalibrateConfig, read_foreign
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.layout import METRICS
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.posterior_fit import usual_scale
from bora_pyro.runs.results_table import read_results, write_results
from bora_pyro.runs.saved import SavedRun, load_run
from bora_pyro.runs.stored_options import check_options, first_difference, fit_options, with_options

RATES = (0.001, 0.003, 0.01, 0.03)
MIDDLE = 0.01
TEMPERATURES = (1.0, 1e-3, 1e-6)
KEYS = ["arm", "seed", "temperature", "learning_rate", "prediction"]
#: A function that predicts a split.
Predict = Callable[[TokenSplit], TokenPredictions | ChoicePredictions]


@dataclass(kw_only=True)
class PosteriorsConfig:
    """Compare posteriors with the MAP fit that they start from, on held-out documents."""

    fit_config: str = option("results/documentation.yaml", "YAML of the MAP fits' options")
    data: str | None = option(None, "the documents (default: what fit_config names)")
    arms: list[str] = option([*NAMES], f"which arms (default: {' '.join(NAMES)})")
    seeds: int = option(3, "number of seeds, from 0")
    epochs: int = option(6, "epochs of the fitted guides")
    draws: int = option(8, "draws of a mixture")
    map_learning_rate: float = option(0.03, "learning rate of the MAP fits")
    foreign: str | None = option(None, "texts that belong to no task, as for calibrate.py (default: none)")
    foreign_text_column: str = option("text", "column of the foreign texts; no other column is read")
    foreign_documents: int = option(200, "largest number of foreign texts, and of test documents to compare them with")
    threads: int = option(1, "CPU threads")
    runs_dir: str = option("runs/posteriors", "folder of the MAP fits")
    output: str = option("results/posteriors_documentation.csv", "the table, two rows for each run")

    def validate(self) -> None:
        """Check the values."""
        for name in ("seeds", "epochs", "draws", "threads", "foreign_documents"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give a whole number from 1 up")
        for name in self.arms:
            if name not in NAMES:
                raise InputError(f"arm {name!r} is not known; known: {', '.join(NAMES)}{nearest(name, NAMES)}")
        if not Path(self.fit_config).is_file():
            raise InputError(f"fit_config {self.fit_config} does not exist; give a YAML file of map_fit.py's options")
        if not 0 < self.map_learning_rate < math.inf:
            raise InputError(f"map_learning_rate is {self.map_learning_rate}; give a finite number above 0")


class Comparison:
    """The table of one comparison, and the runs that fill it."""

    table: Any

    def __init__(self, config: PosteriorsConfig) -> None:
        self.config, self.output = config, Path(config.output)
        self.table = read_results(self.output, KEYS)
        #: What all rows share.
        self.options = fit_options(self.asked(0)) | {"guide_epochs": config.epochs, "draws": config.draws}
        if config.foreign is not None:
            self.options |= {name: getattr(config, name) for name in ("foreign_text_column", "foreign_documents")}
        check_options(self.table, self.options, output=self.output)
        if config.foreign is not None and len(self.table) and "foreign_total" not in self.table:
            raise InputError(f"output {self.output} has rows without --foreign; give another --output, or leave --foreign out")
        self.members = Members()
        #: Test documents and foreign texts, by seed.
        self.texts: dict[int, tuple[TokenSplit, TokenSplit]] = {}

    def run_all(self) -> None:
        """Run every arm with every seed; the first seed makes the choices."""
        for seed in range(self.config.seeds):
            run = self.map_run(seed)
            if self.config.foreign is not None:
                run.fitted.model.likelihood.check_texts("--foreign")
            for arm in self.config.arms:
                self.run_arm(arm, run, seed)

    def map_run(self, seed: int) -> SavedRun:
        """Load the MAP fit of a seed, after fitting it if it is missing."""
        asked = self.asked(seed)
        folder = Path(asked.output_dir)
        if not (folder / METRICS).is_file():
            check_usual(asked, ["start_from"], file=self.config.fit_config, why="the ensemble has several starts")
            run_map_fit(asked, quiet=True)
        run = load_run(folder, device="cpu")
        if difference := first_difference(fit_options(run.config), fit_options(asked)):
            raise InputError(f"the MAP fit in {folder} has {difference}; give another --runs_dir, or move it away")
        return run

    def asked(self, seed: int) -> MapFitConfig:
        """The options of the MAP fit of a seed."""
        folder = Path(self.config.runs_dir) / self.output.stem / f"map-seed{seed}"
        options = {"config": self.config.fit_config, "seed": seed, "learning_rate": self.config.map_learning_rate}
        options |= {"tau": "learned", "output_dir": folder, "overwrite": "true", "threads": self.config.threads}
        options |= {"data": self.config.data} if self.config.data else {}
        return parse_config(MapFitConfig, [word for name, value in options.items() for word in (f"--{name}", str(value))])

    def run_arm(self, arm: str, run: SavedRun, seed: int) -> None:
        """Compute the missing rows of an arm."""
        if arm == "map":
            self.fill(arm, run, seed, None, None, lambda: Made(run.fitted, run.fitted.seconds))
        elif arm == "map_scaled":
            self.fill_scaled(run, seed)
        elif arm == "ensemble_distilled" and run.fitted.model.likelihood.reads_options:
            print(f"note: {arm} is left out: answers among options are not distilled, only texts", file=sys.stderr)
        elif arm in (made := self.made_of_fits()):
            self.fill(arm, run, seed, None, None, lambda: made[arm](run, seed))
        elif ARMS[arm].fitted:
            for rate in self.rates(arm, seed):
                self.fill(arm, run, seed, ARMS[arm].temperature, rate, partial(self.variational, ARMS[arm], run, seed, rate))
        else:
            for temperature in self.temperatures(arm, seed):
                self.fill(arm, run, seed, temperature, None, partial(self.computed, ARMS[arm], run, seed, temperature))

    def made_of_fits(self) -> dict[str, Callable[[SavedRun, int], Made]]:
        """The arms that are made of MAP fits of their own, by name."""
        return {
            "ensemble": self.members.ensemble,
            "ensemble_folded": self.members.folded,
            "ensemble_distilled": partial(self.members.distilled, epochs=self.config.epochs),
            "checkpoint_ensemble": checkpoint_ensemble,
            "mc_dropout": partial(mc_dropout, draws=self.config.draws),
        }

    def rates(self, arm: str, seed: int) -> Iterator[float]:
        """The learning rates to run: the first seed climbs from the middle of the grid, the others use its choice.

        Raises:
            InputError: the arm has the rate of another one, which has not been run.
        """
        if source := ARMS[arm].rate_of:
            if not (self.table.arm == source).any():
                raise InputError(f"arm {arm!r} has the learning rate of {source!r}, which has no rows; put {source} before it")
            yield float(self.best(source, "mean")["learning_rate"])
            return
        if seed:
            yield float(self.best(arm, "mean")["learning_rate"])
            return
        yield MIDDLE
        for step in (1, -1):
            place = RATES.index(MIDDLE) + step
            while 0 <= place < len(RATES):
                yield RATES[place]
                if float(self.best(arm, "mean")["learning_rate"]) != RATES[place]:
                    break
                place += step
            if float(self.best(arm, "mean")["learning_rate"]) != MIDDLE:
                return

    def temperatures(self, arm: str, seed: int) -> list[float]:
        """The temperatures to run: if one is to be chosen, the first seed tries all and the others use its choice."""
        fixed = ARMS[arm].temperature
        if fixed is not None:
            return [fixed]
        return [float(self.best(arm, "mixture")["temperature"])] if seed else list(TEMPERATURES)

    def best(self, arm: str, prediction: str) -> pd.Series:
        """The run of the first seed with the lowest validation perplexity."""
        rows = self.table[(self.table.arm == arm) & (self.table.seed == 0) & (self.table.prediction == prediction)]
        return rows.loc[rows.validation_nll.idxmin()]

    def fill(
        self, arm: str, run: SavedRun, seed: int, temperature: float | None, rate: float | None, make: Callable[[], Made]
    ) -> None:
        """Make a posterior and add its rows, unless the table has them.

        Args:
            arm: name of the arm.
            run: the MAP fit.
            seed: the seed.
            temperature: temperature of the guide; None: the arm has none.
            rate: learning rate; None: the arm has none.
            make: function that makes the posterior.
        """
        if self.has(arm, seed, temperature, rate):
            return
        made = make()
        fitted, draws = made.fitted, made.draws
        own_model, centre = made.centre or (run.fitted.model, fitted.weights()[0])
        keys: dict[str, Any] = {"arm": arm, "seed": seed, "temperature": temperature, "learning_rate": rate}
        model = made.model or run.fitted.model
        common = {"seconds": round(made.seconds, 1), "state": state_ratio(fitted, run), "best_epoch": fitted.best_epoch}
        if draws is None and not isinstance(fitted.guide, AutoDelta):
            posterior = Posterior(fitted, seed=seed)
            common["scale_correlation"] = self.scale_correlation(posterior, run)
            draws, model = partial(posterior.draws, self.config.draws), posterior.predictor(ARMS[arm].linearised)
        parts: dict[str, tuple[BoRA, Draws]] = {}
        if made.has_centre:
            parts["mean"] = (own_model, lambda: [centre])
        if draws is not None:
            parts["mixture"] = (model, draws)
        rows = []
        for name, (predictor, own) in parts.items():
            row = self.row(keys | {"prediction": name} | common, run, of_draws(predictor, own))
            rows.append(row | self.foreign_numbers(run, seed, predictor, centre, own, epistemic=name == "mixture"))
        if arm in FOLDED:
            rows.append(self.scaled_row(keys | {"prediction": "scaled"} | common, run, own_model, centre))
        if arm in SCALED and draws is not None:
            rows.append(self.scaled_row(keys | {"prediction": "scaled mixture"} | common, run, model, draws))
        self.add(rows)

    def foreign_numbers(
        self, run: SavedRun, seed: int, model: BoRA, centre: Weights, draws: Draws, *, epistemic: bool
    ) -> dict[str, float]:
        """How well each score separates foreign texts from test documents; empty without foreign texts."""
        if self.config.foreign is None:
            return {}
        if seed not in self.texts:
            names = ("foreign", "foreign_text_column", "foreign_documents")
            config = CalibrateConfig(run=str(run.folder.path), seed=seed, **{name: getattr(self.config, name) for name in names})
            own = sample_texts(run.data.test, self.config.foreign_documents, seed=seed)
            self.texts[seed] = own, read_foreign(config, run)
        with poutine.seed(rng_seed=seed):  # the model may draw masks
            scores = [text_scores(model, split, centre, draws) for split in self.texts[seed]]
        found = auroc_by_score(*scores).to_dict()
        return {f"foreign_{name}": value for name, value in found.items() if epistemic or name != "epistemic"}

    def fill_scaled(self, run: SavedRun, seed: int) -> None:
        """Add the row of the MAP fit with a temperature that the validation split chooses, unless the table has it."""
        if self.has("map_scaled", seed, None, None):
            return
        keys = {"arm": "map_scaled", "seed": seed, "temperature": None, "learning_rate": None, "prediction": "mean"}
        common = {"seconds": run.fitted.seconds, "state": 1.0, "best_epoch": run.fitted.best_epoch}
        self.add([self.scaled_row(keys | common, run, run.fitted.model, run.fitted.weights()[0])])

    def scaled_row(self, keys: dict[str, Any], run: SavedRun, model: BoRA, weights: Weights | Draws) -> dict[str, Any]:
        """The row of one adapter a task, or of a mixture, at the temperature that the validation split chooses."""
        start = time.perf_counter()
        scaling = temperature_of(model, run.data.validation, weights)
        seconds = round(keys["seconds"] + time.perf_counter() - start, 1)
        keys = keys | {"seconds": seconds, "scaling": scaling}
        return self.row(keys, run, lambda split: predict_scaled(model, split, weights, scaling))

    def has(self, arm: str, seed: int, temperature: float | None, rate: float | None) -> bool:
        """Whether the table has rows of an arm with these settings."""
        own = self.table[(self.table.arm == arm) & (self.table.seed == seed)]
        for name, value in (("temperature", temperature), ("learning_rate", rate)):
            own = own[own[name].isna()] if value is None else own[np.isclose(own[name].astype(float), value)]
        return bool(len(own))

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Add rows to the table, and write the file."""
        self.table = pd.DataFrame([*self.table.to_dict("records"), *with_options(rows, self.options)])
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_results(self.table, self.output)
        for row in rows:
            print("{arm} seed {seed} T {temperature} rate {learning_rate} {prediction}: ".format(**row), end="")
            print("validation NLL {validation_nll:.4f}, test {test_nll:.4f}, ECE {test_ece:.4f}, {seconds} s".format(**row))
            sys.stdout.flush()

    def row(self, keys: dict[str, Any], run: SavedRun, predict: Predict) -> dict[str, Any]:
        """Score predictions of both held-out splits.

        Args:
            keys: columns that identify the row.
            run: the MAP fit, with the data.
            predict: function that predicts a split.
        """
        row, few = dict(keys), few_tasks(run)
        for name, split in (("validation", run.data.validation), ("test", run.data.test)):
            start = time.perf_counter()
            with poutine.seed(rng_seed=keys["seed"]):  # the model may draw masks
                found = predict(split)
            measured = asdict(calibration(found))
            row |= {f"{name}_{key}": measured[key] for key in ("nll", "ece", "brier", "accuracy")}
            row[f"{name}_aurc"] = area_under_risk_coverage(1 - found.confidence, (~found.correct).double())
            own = asdict(calibration(found, where=torch.isin(found.task, few)))
            row |= {f"{name}_few_{key}": own[key] for key in ("nll", "ece")}
            if isinstance(found, TokenPredictions):
                row[f"{name}_perplexity"] = found.perplexity()
                row[f"{name}_documents_nll"] = -float(found.log_predictive().sum()) / len(found.label)
            row["predict_seconds"] = round(time.perf_counter() - start, 1)
        return row

    def variational(self, arm: Arm, run: SavedRun, seed: int, rate: float) -> Made:
        """Fit a guide around the MAP."""
        assert arm.temperature is not None
        scale = usual_scale(run.fitted.tau())
        guide = GUIDES[arm.guide](run.fitted.model, run.fitted.sites(), data=run.data, scale=scale, **arm.options)
        options: dict[str, Any] = {"epochs": self.config.epochs, "patience": 0, "learning_rate": rate, "seed": seed}
        options |= {"temperature": arm.temperature}
        options["callbacks"] = []  # the posteriors have the τ that the fit has learned
        fitted = fit(run.fitted.model, run.data, part_of(run.config, FitOptions), guide=guide, **options)
        return Made(fitted, fitted.seconds + self.settle(arm, fitted, run, seed))

    def computed(self, arm: Arm, run: SavedRun, seed: int, temperature: float) -> Made:
        """Make a guide at the MAP that needs no fit."""
        start = time.perf_counter()
        guide = GUIDES[arm.guide](run.fitted.model, run.fitted.sites(), data=run.data, temperature=temperature, **arm.options)
        make_parameters(guide, run.fitted.model)
        fitted, seconds = Fitted(run.fitted.model, guide, run.data.tasks), time.perf_counter() - start
        return Made(fitted, seconds + self.settle(arm, fitted, run, seed))

    def settle(self, arm: Arm, fitted: Fitted, run: SavedRun, seed: int) -> float:
        """Let the validation documents choose what the guide leaves open, and return the seconds."""
        start = time.perf_counter()
        settle(fitted, run.data.validation, draws=self.config.draws, linearised=arm.linearised, seed=seed)
        return time.perf_counter() - start

    def chosen(self, arm: str) -> pd.Series | None:
        """The row with an arm's chosen learning rate and temperature; None for an arm that has neither."""
        return self.best(arm, "mean" if ARMS[arm].fitted else "mixture") if arm in ARMS else None

    def scale_correlation(self, posterior: Posterior, run: SavedRun) -> float:
        """Rank correlation of a task's posterior scale with its number of training tokens."""
        tokens = torch.zeros(len(run.data.tasks)).index_add_(0, run.data.train.task, run.data.train.predicted.float())
        scales = posterior.deviation_scales(draws=max(2, self.config.draws))
        if bool((scales == scales[0]).all()) or bool((tokens == tokens[0]).all()):
            return math.nan  # a rank correlation with a constant is not defined
        return float(stats.spearmanr(tokens.numpy(), scales.numpy()).statistic)


def of_draws(model: BoRA, draws: Draws) -> Predict:
    """The predictions of the mixture of some draws.

    Args:
        model: the model that predicts with the draws.
        draws: function that returns the weights of each draw.
    """
    return lambda split: predictions(model, split, draws)


def few_tasks(run: SavedRun) -> torch.Tensor:
    """The third of the tasks with test documents that has the fewest training documents."""
    train, test = run.data.train.documents_per_task, run.data.test.documents_per_task
    ranked = sorted((number, d) for d, number in enumerate(train) if test[d])
    return torch.tensor([d for _, d in ranked[: max(1, len(ranked) // 3)]])


def state_ratio(fitted: Fitted, run: SavedRun) -> float:
    """Number of values in a guide's state, divided by that of the MAP guide."""

    def entries(guide: Any) -> int:
        return sum(value.numel() for value in guide.state_dict().values())

    return entries(fitted.guide) / entries(run.fitted.guide)


def main(argv: list[str]) -> int:
    """Run the comparison and print its table."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(PosteriorsConfig, argv, prog="compare_posteriors.py")
        torch.set_num_threads(config.threads)
        comparison = Comparison(config)
        comparison.run_all()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown(comparison.table, {arm: comparison.chosen(arm) for arm in config.arms}))
    return 0


if __name__ == "__main__":
    run_script(main)

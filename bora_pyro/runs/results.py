"""The results of a fit as files: adapters, the posterior, and the numbers of ``metrics.json``."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from torch import Tensor

from bora_pyro.data import TaskData
from bora_pyro.diagnostics.calibration import calibration
from bora_pyro.errors import InputError
from bora_pyro.exchange.names import write_task_names
from bora_pyro.exchange.save import save_peft
from bora_pyro.files.slugs import GLOBAL_MEAN, adapter_folders
from bora_pyro.inference.continuation import digests
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.memory import peak_memory_bytes
from bora_pyro.inference.optimum import gradient_summary
from bora_pyro.inference.processes import Processes
from bora_pyro.likelihoods import AnswerScores, Scores
from bora_pyro.model import BoRA
from bora_pyro.predict.answers import of_scores, predictions
from bora_pyro.predict.mixture import Draws
from bora_pyro.priors.frozen import GIVEN as FROZEN
from bora_pyro.runs.config.groups import LEARNED
from bora_pyro.runs.description import describe
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.versions import versions

#: Before the names of samples of the adapter's fixed tensors, which are built again when a run is read.
SAMPLE = "fixed_sample."
#: Value of ``prior`` in the metadata of a posterior whose Θ and τ come from another fit.
GIVEN = "given"
#: Value of ``prior`` in the metadata of gates over adapters that come from another run.
ROUTED = "routed"


def write_adapters(folder: RunFolder, fitted: Fitted, base_model: str) -> float:
    """Write the adapters at the guide's centre in PEFT form: one folder for each task, one for Θ, and the names of the tasks.

    Returns:
        The largest relative error of an adapter; 0 if the LoRA form is exact.

    Raises:
        InputError: the adapter has no LoRA form, in which case nothing is written; or a file cannot be written.
    """
    slugs, mean, errors = adapter_folders(fitted.tasks), None, []
    for d, theta, of_all in fitted.each_task():
        place = folder.adapters / slugs[fitted.tasks[d]]
        errors.append(save_peft(place, fitted.model, theta, base_model=base_model, task=d))
        mean = mean or of_all
    errors.append(save_peft(folder.adapters / GLOBAL_MEAN, fitted.model, mean or {}, base_model=base_model))
    write_task_names(folder.adapters, {slug: name for name, slug in slugs.items()})
    return max(errors)


def write_posterior(folder: RunFolder, fitted: Fitted, data: TaskData, guide: str, *, prior: str = "") -> None:
    """Write ``posterior.safetensors``: the values of the sites and the tensors of adapter, prior and guide.

    Args:
        folder: the run folder.
        fitted: the fit.
        data: the documents of the fit.
        guide: the guide's name in ``GUIDES``.
        prior: ``given`` if Θ and τ come from another fit, ``routed`` if the adapters do; otherwise empty, and the configuration
            names the prior.
    """
    model = fitted.model
    tensors = fitted.sites() | model.tensors.state()
    tensors |= {f"{SAMPLE}{name}": sample_of(value) for name, value in model.fixed.items()}
    tensors |= {name: value for name, value in model.prior.state().items() if name.startswith(("tau.", FROZEN))}
    if guide != "map":  # a point estimate is given by its sites
        tensors |= {f"guide.{name}": value for name, value in fitted.guide.state_dict().items()}
    metadata = {"guide": guide, "tasks": json.dumps(fitted.tasks), "model": repr(model)}
    metadata |= {"description": json.dumps(describe(model))}
    metadata |= {"prior": prior, "penalty": model.prior.penalty} if prior else {}
    metadata |= digests(data, model.backbone)
    folder.save_tensors("posterior", tensors, metadata)


def sample_of(value: Tensor, *, numbers: int = 64) -> Tensor:
    """Some numbers of a fixed tensor, spread over it: enough to know it again.

    >>> import torch
    >>> sample_of(torch.arange(1000.0).view(10, 100), numbers=4)
    tensor([  0., 250., 500., 750.])
    """
    flat = value.detach().flatten()
    return flat[:: max(1, len(flat) // numbers)][:numbers].contiguous()


def metrics_of(
    fitted: Fitted, data: TaskData, *, tau: float | str, learning_rate: float, seed: int, processes: Processes | None = None
) -> dict[str, Any]:
    """Compute the content of ``metrics.json`` at the guide's centre.

    For answers among options it has no perplexities, but the NLL a question, accuracy, calibration error and Brier score of the
    test and the validation questions.

    Args:
        fitted: the fit.
        data: the documents of the fit.
        tau: the option ``tau`` of the fit: ``learned`` or a number.
        learning_rate: the option of the fit.
        seed: the option of the fit.
        processes: the processes that share the work.
    """
    slugs, measure = adapter_folders(fitted.tasks), fitted.model.likelihood.measure.name
    scores = fitted.evaluate(data.test, processes=processes, numbers=numbers_of)
    norms, documents = fitted.deviation_norms(), data.train.documents_per_task
    rows = scores.pop("tasks")
    if fitted.model.likelihood.reads_options:
        of_validation = fitted.evaluate(data.validation, name="validation", processes=processes, numbers=numbers_of)
        rows = [row | more for row, more in zip(rows, of_validation.pop("tasks"), strict=True)]
        scores |= of_validation
    tasks = {
        slugs[row["name"]]: row | {"train_documents": documents[d], "deviation_norm": float(norms[d])}
        for d, row in enumerate(rows)
    }
    return scores | {
        f"validation_{measure}": fitted.validation_score,
        **({} if fitted.global_mean_score is None else {f"validation_{measure}_global_mean": fitted.global_mean_score}),
        **_tau(fitted, tau),
        **({} if data.task_groups is None else {"task_groups": dict(zip(data.tasks, data.task_groups, strict=True))}),
        "learning_rate": learning_rate,
        "epochs": len(fitted.history),
        "best_epoch": fitted.best_epoch,
        "averaged": fitted.averaged,
        **({"gradient_norm": gradient} if (gradient := gradient_summary(fitted.gradient_norms)) else {}),
        "fit_seconds": round(fitted.seconds, 2),
        "training_tokens_per_second": _mean_speed(fitted),
        "peak_memory_bytes": peak_memory_bytes(fitted.model.backbone.device),
        "train_documents": data.train.num_documents,
        "test_documents": data.test.num_documents,
        "seed": seed,
        "notes": data.notes,
        **({} if data.counts is None else {"data": data.counts.as_dict()}),
        "versions": versions(),
        "tasks": tasks,
    }


def add_mixture(metrics: dict[str, Any], fitted: Fitted, data: TaskData, predictor: BoRA, draws: Draws) -> None:
    """Add the numbers of a posterior to those at its centre: how well the mixture of its draws predicts the test documents.

    Args:
        metrics: the content of ``metrics.json``, which is changed.
        fitted: the posterior.
        data: its documents; the test split has some.
        predictor: the model that predicts with the draws.
        draws: returns the draws, the same ones each time.
    """
    theta = fitted.weights()[0]
    mixture = predictions(predictor, data.test, draws)
    centre = predictions(fitted.model, data.test, lambda: [theta])
    metrics |= {"mixture": dataclasses.asdict(calibration(mixture)), "mean": dataclasses.asdict(calibration(centre))}
    metrics |= {f"mixture_test_{name}": value for name, value in mixture.numbers().items()}
    slugs = adapter_folders(fitted.tasks)
    for d, name in enumerate(fitted.tasks):
        own = mixture.epistemic[mixture.task == d]
        metrics["tasks"][slugs[name]] |= {f"mixture_test_{key}": value for key, value in mixture.numbers(d).items()}
        metrics["tasks"][slugs[name]] |= {"epistemic": float(own.mean()) if len(own) else None}


def numbers_of(scores: Scores, task: int | None = None) -> dict[str, float | None]:
    """The numbers of scores in ``metrics.json``, over all documents or over those of one task.

    Answers among options also have the calibration error of the most probable option (15 bins of equal width) and the Brier
    score.
    """
    numbers = scores.numbers(task)
    if not isinstance(scores, AnswerScores):
        return numbers
    if not bool((scores.question_task == task).any() if task is not None else len(scores.label)):
        return numbers | {"ece": None, "brier": None}
    measured = calibration(of_scores([scores]), where=None if task is None else scores.question_task == task)
    return numbers | {"ece": measured.ece, "brier": measured.brier}


def _tau(fitted: Fitted, tau: float | str) -> dict[str, Any]:
    """τ and its groups; None under a prior that has no τ."""
    try:
        number = fitted.tau() if tau == LEARNED else float(tau)
    except InputError:
        return {"tau": None}
    # JSON has no infinity; the command line takes "inf"
    found: dict[str, Any] = {"tau": number if number < math.inf else "inf"}
    if (of_groups := fitted.tau_group()) is not None:
        found["tau_group"] = of_groups
    return found | ({"tau_by_group": fitted.tau_by_group()} if tau == LEARNED else {})


def _mean_speed(fitted: Fitted) -> float:
    speeds = [entry["training_tokens_per_second"] for entry in fitted.history]
    return round(sum(speeds) / len(speeds), 1) if speeds else 0.0

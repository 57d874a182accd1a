"""What a fit leaves in its run folder: the adapters, the posterior, and what ``metrics.json`` says of them."""

from __future__ import annotations

import json
from typing import Any

from bora_pyro.data import TaskData
from bora_pyro.exchange.names import write_task_names
from bora_pyro.exchange.save import save_peft
from bora_pyro.files.slugs import GLOBAL_MEAN, adapter_folders
from bora_pyro.inference.continuation import digests
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.memory import peak_memory_bytes
from bora_pyro.inference.processes import Processes
from bora_pyro.runs.config.map_fit import LEARNED, MapFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.versions import versions

#: Among the metadata of a posterior: Θ and τ are another fit's.
GIVEN = "given"


def write_adapters(folder: RunFolder, fitted: Fitted, base_model: str) -> None:
    """Write the adapters at the guide's centre in PEFT form: a folder a task, one for Θ, and the tasks' names beside them."""
    slugs, mean = adapter_folders(fitted.tasks), None
    fitted.model.backbone.model.config.name_or_path = base_model
    for d, theta, of_all in fitted.each_task():
        save_peft(folder.adapters / slugs[fitted.tasks[d]], fitted.model, theta)
        mean = mean or of_all
    save_peft(folder.adapters / GLOBAL_MEAN, fitted.model, mean or {})
    write_task_names(folder.adapters, {slug: name for name, slug in slugs.items()})


def write_posterior(folder: RunFolder, fitted: Fitted, data: TaskData, guide: str, *, prior: str = "") -> None:
    """Write ``posterior.safetensors``: the sites, and what adapter, prior and guide keep beside them.

    Args:
        folder: of the run.
        fitted: what was fitted.
        data: to which documents.
        guide: its name among ``GUIDES``.
        prior: ``given`` where Θ and τ are another fit's; the configuration says which prior it is otherwise.
    """
    model = fitted.model
    tensors = fitted.sites() | {f"fixed.{name}": value for name, value in model.fixed.items()}
    tensors |= {name: value for name, value in model.prior.state().items() if name.startswith("tau.")}
    if guide != "map":  # a point is where its sites are
        tensors |= {f"guide.{name}": value for name, value in fitted.guide.state_dict().items()}
    metadata = {"guide": guide, "tasks": json.dumps(fitted.tasks), "model": repr(model)}
    metadata |= {"prior": prior, "penalty": model.prior.penalty} if prior else {}
    metadata |= digests(data, model.backbone)
    folder.save_tensors("posterior", tensors, metadata)


def metrics_of(config: MapFitConfig, fitted: Fitted, data: TaskData, *, processes: Processes | None = None) -> dict[str, Any]:
    """What ``metrics.json`` holds of a fit, at the guide's centre."""
    slugs = adapter_folders(fitted.tasks)
    scores = fitted.evaluate(data.test, processes=processes)
    norms, documents = fitted.deviation_norms(), data.train.documents_per_task
    tasks = {
        slugs[row["name"]]: row | {"train_documents": documents[d], "deviation_norm": float(norms[d])}
        for d, row in enumerate(scores.pop("tasks"))
    }
    return scores | {
        "validation_perplexity": fitted.validation_perplexity,
        # JSON has no infinity: the limit is written as the command line takes it
        "tau": tau if (tau := fitted.tau() if config.tau == LEARNED else float(config.tau)) < float("inf") else "inf",
        **({"tau_by_group": fitted.tau_by_group()} if config.tau == LEARNED else {}),
        "learning_rate": config.learning_rate,
        "epochs": len(fitted.history),
        "best_epoch": fitted.best_epoch,
        "fit_seconds": round(fitted.seconds, 2),
        "training_tokens_per_second": _mean_speed(fitted),
        "peak_memory_bytes": peak_memory_bytes(fitted.model.backbone.device),
        "train_documents": data.train.num_documents,
        "test_documents": data.test.num_documents,
        "seed": config.seed,
        "notes": data.notes,
        "versions": versions(),
        "tasks": tasks,
    }


def _mean_speed(fitted: Fitted) -> float:
    speeds = [entry["training_tokens_per_second"] for entry in fitted.history]
    return round(sum(speeds) / len(speeds), 1) if speeds else 0.0

"""One process of a fit that several share, started by the tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from bora_pyro import HierarchicalNormal, InputError, LearnedPrecision, TaskData, fit
from bora_pyro.guides import GUIDES
from bora_pyro.inference.loop import Loop
from bora_pyro.inference.optimum import gradient_norms
from bora_pyro.inference.processes import processes
from bora_pyro.likelihoods import Choice
from tests.tiny import tiny_bora, tiny_data, tiny_questions

COUNTS = (3, 0, 1, 4, 2, 9, 2)
ANSWERS = "answers"
#: Priors by name; under the last one, the tasks have answers among options.
PRIORS = {
    "normal": lambda: HierarchicalNormal(10.0), "learned": lambda: LearnedPrecision(start=10.0),
    ANSWERS: lambda: HierarchicalNormal(10.0),
}  # fmt: skip


def model_and_data(prior, tasks=COUNTS):
    """A tiny model and its data."""
    likelihood = Choice() if prior == ANSWERS else None
    model = tiny_bora(targets=["q_proj"], tasks=len(tasks), prior=PRIORS[prior](), likelihood=likelihood)
    if prior != ANSWERS:
        return model, tiny_data(tasks)
    splits = (tiny_questions(tasks, seed=seed) for seed in range(3))
    return model, TaskData([f"task {d}" for d in range(len(tasks))], *splits)


def loop(prior, guide, tasks=COUNTS, **options):
    """A loop of some steps an epoch on tiny tasks."""
    model, data = model_and_data(prior, tasks)
    options = {
        "learning_rate": 0.01, "warmup": 0.1, "token_budget": 12, "accumulate": 1, "gradient_clip": 1.0, "seed": 0, "epochs": 9,
        "task_subsampling": True,
    } | options  # fmt: skip
    return Loop(model, data, GUIDES[guide](model), **options)


def run(own, epochs):
    """Epochs until there were 20 steps; the reports, the norms of the gradient after them, and the loop."""
    reports = [own.run_epoch(None) for _ in range(epochs)]
    norms = gradient_norms(own)
    own.state.keep()
    own.finish()
    return reports, norms, own


def main(what, folder):
    folder = Path(folder)
    torch.set_num_threads(1)
    with processes(torch.device("cpu")) as team:
        if what == "bytes":
            found = {}
            for tasks in (25, 1000):
                seen = []
                own = loop("normal", "map", (1,) * tasks, processes=team, token_budget=100)
                own.run_epoch(lambda report, seen=seen: seen.append(report["reduced_bytes"]))
                found[tasks] = sorted(set(seen))
            result = {"bytes": found, "shared": sum(4 * start.numel() for start in own.model.starts.values())}
        elif what == "too many":
            try:
                loop("normal", "map", (3, 0, 0), processes=team)
                result = {"error": None}
            except InputError as error:
                result = {"error": str(error)}
        elif what.startswith("fit"):
            _, epochs, prior = what.split()
            model, data = model_and_data(prior)
            options = {"epochs": int(epochs), "token_budget": 12, "patience": 0, "checkpoints": folder / "checkpoints"}
            fitted = fit(model, data, processes=team, **options)
            result = {"history": fitted.history, "best": fitted.best_epoch, "norms": fitted.gradient_norms}
            if not team.rank:
                torch.save(fitted.sites(), folder / "sites.pt")
        else:
            prior, guide = what.split()
            own = loop(prior, guide, processes=team)
            epochs = -(-20 // own.steps_per_epoch)
            reports, norms, own = run(own, epochs)
            result = {"objective": [r["objective"] for r in reports], "steps": epochs * own.steps_per_epoch, "norms": norms}
            result["tau"] = own.fitted.tau_by_group() if not team.rank else None
            result["validation"] = own.fitted.validation_score
            if not team.rank:
                torch.save(own.fitted.sites() | own.guide.state_dict(), folder / "sites.pt")
    (folder / f"rank{team.rank}.json").write_text(json.dumps(result))

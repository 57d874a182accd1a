"""How far from the optimum a fit ended: the norm of the objective's gradient at its end and at its start.

The objective is −ELBO per training observation. Its gradient is the mean (1/S) Σ_i g_i over S groups that divide the training
documents at random, where g_i is the gradient that a training step on group i alone would take. A pass over all documents would
cost as much as an epoch without its updates. So m of the S groups are drawn, without replacement. Each pair of groups is drawn
with the same probability, so

    1/S² ( S/m Σ_i |g_i|² + S (S − 1) / (m (m − 1)) Σ_{i≠j} ⟨g_i, g_j⟩ ),  i and j among the m groups,

is an unbiased estimate of the squared norm (Horvitz and Thompson, 1952). It is the squared norm itself for m = S. The squared
norm of the mean of the m groups would be too large, by the variance of this mean. An estimate below 0 becomes 0. So a norm near 0
means no more than: the sample sees no gradient. The start and the end of a fit are measured on the same groups.

The norm is 0 at the optimum. End / start is no distance from it: a LoRA fit begins at B = 0, where the gradient is small, and
the norm grows at first. In a fit of three epochs to ``builtin:documentation`` it is 0.022 at the start, and 0.184, 0.101 and
0.066 after the epochs. The estimates from 25 of its 313 documents differ from these numbers by some 10 % (up to 30 % at the end).

The gradient is that with respect to the guide's parameters. Those of single tasks (deviations; for guides with a spread also
scales) are measured apart from those of all tasks (Θ). The whitened deviations z_d = √τ δ_d are in units of the prior, so their
gradient also changes with a learned τ. A guide with a spread draws the same numbers each time: its gradient is that of the
objective for these draws.

>>> estimate = squared_norm(4, torch.tensor([2.0, 0.0]), 2.0, drawn=2)  # g_1 = g_2 = (1, 0), two groups of four
>>> estimate  # (4/2 · 2 + 4·3/2 · 2) / 4²
1.0
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.nn import Parameter

from bora_pyro.data.batch import Batch
from bora_pyro.guides.base import parameters_of_tasks
from bora_pyro.inference.drawn_tasks import DrawnTasks
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.loop import Loop
from bora_pyro.inference.processes import all_reduce_gradient
from bora_pyro.inference.schedule import step_seed
from bora_pyro.inference.steps import EpochSteps
from bora_pyro.likelihoods import Measure, measure_of

#: The part of a fit's training tokens that one measurement reads, and the documents that it reads at least.
FRACTION, LEAST_DOCUMENTS = 0.02, 24
#: The number of groups into which these documents are divided, and the number of training batches that they fill at most.
GROUPS, MOST_BATCHES = 8, 16
#: A validation perplexity that falls by more than this part in the last epoch is still falling, as is an NLL that falls as much.
FALLING = 0.01
_PARTS = ("prior_mean", "deviations")


def groups_of(loop: Loop) -> tuple[Sequence[list[Batch]], int]:
    """The S groups of documents, and m, the number of them that are measured: the first ones, whose order is random."""
    train, options = loop.data.train, loop.options
    total, documents = int(train.lengths.sum()), train.num_documents
    wanted = min(FRACTION * options.epochs * total, MOST_BATCHES * options.token_budget)
    wanted = max(wanted, LEAST_DOCUMENTS * total / documents)
    budget = options.token_budget if wanted >= total else min(options.token_budget, math.ceil(wanted / GROUPS))
    groups = EpochSteps(train, token_budget=budget, seed=options.seed, partition=loop.partition, mine=loop.mine)
    return groups, min(len(groups), max(2, round(len(groups) * wanted / total)))


def gradient_norms(loop: Loop) -> dict[str, Any]:
    """Estimate the norm of the gradient at the current state, which stays as it is.

    Returns:
        ``all``, and its two parts: ``prior_mean``, of the parameters that all tasks share, and ``deviations``, of those of single
        tasks; None if there are none. ``documents`` is the number of training documents that were read. A number that is not
        finite is None.
    """
    groups, drawn = groups_of(loop)
    state = loop.state
    parts = dict(zip(_PARTS, _parameters(loop), strict=True))
    totals: dict[str, dict[Any, Tensor]] = {name: {} for name in parts}
    squares, documents = dict.fromkeys(parts, 0.0), 0
    for number in range(drawn):
        with poutine.seed(rng_seed=step_seed(loop.options.seed, 0, number)):
            documents += _backward(loop, groups[number])
        rows = state.rows.loaded.tolist() if isinstance(state, DrawnTasks) else []
        for name, parameters in parts.items():
            for key, gradient in _gradients(parameters, rows if name == "deviations" else []):
                squares[name] += float(gradient.double().square().sum())
                totals[name][key] = totals[name][key].add_(gradient) if key in totals[name] else gradient
        for parameter in (*state.shared, *state.own):
            parameter.grad = None
    sums = torch.tensor([[_square(totals[name].values()), squares[name]] for name in _PARTS], dtype=torch.float64)
    if state.own:  # each process has the rows of its own tasks
        sums[1] = loop.processes.all_reduce(sums[1].to(loop.device)).cpu()
    found = {
        name: max(0.0, squared_norm(len(groups), total, square, drawn=drawn))
        for name, (total, square) in zip(_PARTS, sums.tolist(), strict=True)
    }
    found = {"all": sum(found.values())} | {name: value for name, value in found.items() if parts[name]}
    norms = {name: math.sqrt(value) if math.isfinite(value) else None for name, value in found.items()}
    return dict.fromkeys(parts) | norms | {"documents": documents}


def squared_norm(groups: int, total: Tensor | float, squares: float, *, drawn: int) -> float:
    """The unbiased estimate of |(1/S) Σ g_i|² from m of the S gradients; see the head of this file.

    Args:
        groups: S.
        total: Σ g_i of the groups that were drawn, or its squared norm.
        squares: Σ |g_i|² of them.
        drawn: m.
    """
    of_total = float(total.double().square().sum()) if isinstance(total, Tensor) else total
    if drawn == groups:
        return of_total / groups**2
    pairs = groups * (groups - 1) / (drawn * (drawn - 1)) * (of_total - squares)
    return (groups / drawn * squares + pairs) / groups**2


def _backward(loop: Loop, batches: Sequence[Batch]) -> int:
    """Compute the gradient of one group, summed over all processes; returns its number of documents."""
    documents, most = 0, loop.model.backbone.pass_tokens
    for batch in loop.processes.lockstep(part for whole in loop.state.begin(batches) for part in whole.parts(most)):
        if batch is None:
            loop.model.backbone.dummy_pass(backward=True)
            continue
        loop.backward(batch.to(loop.device), validate=False)
        documents += len(batch.first_rows)
    counts = torch.tensor([float(documents)], dtype=torch.float32, device=loop.device)
    all_reduce_gradient(loop.processes, loop.state.shared, [], counts)
    return round(float(counts))


def _gradients(parameters: Sequence[Parameter], rows: Sequence[int]) -> Iterator[tuple[Any, Tensor]]:
    """The gradients of some parameters with a key each; with ``rows``, those of each loaded task, on the CPU."""
    for number, parameter in enumerate(parameters):
        if parameter.grad is None:
            continue
        if not rows:
            yield number, parameter.grad
        else:
            yield from (((number, task), row) for task, row in zip(rows, parameter.grad.cpu().unbind(), strict=True))


def _square(tensors: Any) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors)


def _parameters(loop: Loop) -> tuple[list[Parameter], list[Parameter]]:
    """The guide's parameters that all tasks share, and those of single tasks."""
    if loop.draws_tasks:
        return [*loop.state.shared], [*loop.state.own]
    document = loop.data.train.batches(token_budget=1)[0].to(loop.device)
    inside = {id(parameter) for parameter in parameters_of_tasks(loop.guide, document)}
    own = [id(parameter) in inside for parameter in loop.state.shared]
    return (
        [parameter for parameter, of_task in zip(loop.state.shared, own, strict=True) if not of_task],
        [parameter for parameter, of_task in zip(loop.state.shared, own, strict=True) if of_task],
    )


def measure_start(loop: Loop) -> None:
    """Measure the start of a fit; nothing happens if the fit is resumed after its first step."""
    if loop.steps_done == 0:
        loop.fitted.gradient_norms = {"start": gradient_norms(loop)}


def measure_end(loop: Loop) -> None:
    """Measure the best state, if the start was measured. Afterwards the fit cannot go on: AdamW's moments are dropped."""
    if "start" not in loop.fitted.gradient_norms:
        return
    loop.state.restore()
    if loop.state.optimizer is not None:
        loop.state.optimizer.state.clear()  # sums of gradients take their place
    kept_start = loop.fitted.best_epoch == 0
    norms = loop.fitted.gradient_norms
    norms["end"] = norms["start"] if kept_start else gradient_norms(loop)


def gradient_summary(norms: Mapping[str, Any]) -> dict[str, Any] | None:
    """``gradient_norm`` of ``metrics.json``: the norms at start and end, and end / start, also of the two parts.

    >>> start = {"all": 5.0, "prior_mean": 3.0, "deviations": 4.0, "documents": 24}
    >>> gradient_summary({"start": start, "end": {"all": 0.5, "prior_mean": 0.3, "deviations": 0.4, "documents": 24}})["ratio"]
    0.1
    """
    if "end" not in norms:
        return None
    start, end = norms["start"], norms["end"]
    ratios = {name: end[name] / start[name] if start[name] and end[name] is not None else None for name in ("all", *_PARTS)}
    found = {"start": start["all"], "end": end["all"], "ratio": ratios.pop("all")}
    return found | {f"{name}_ratio": value for name, value in ratios.items()} | {"documents": end["documents"]}


def still_falling(fitted: Fitted, epochs: int) -> str | None:
    """A note, if the epochs were used up while the measure of the validation documents was still falling.

    >>> history = [{"validation_perplexity": 16.9}, {"validation_perplexity": 16.5}]
    >>> still_falling(Fitted(None, None, [], history, best_epoch=2), 2)
    'the validation perplexity was still falling after the last epoch (16.9 -> 16.5): more --epochs may help'
    """
    measure = measure_of(fitted.history[-1] if fitted.history else {}, "validation")
    name = f"validation_{measure.name}"
    before, last = [None, None, *(report.get(name) for report in fitted.history)][-2:]
    if before is None or last is None or len(fitted.history) < epochs or _has_stopped(measure, before, last):
        return None
    return (
        f"the validation {measure.title} was still falling after the last epoch ({before:.4g} -> {last:.4g}): more --epochs may "
        "help"
    )


def _has_stopped(measure: Measure, before: float, last: float) -> bool:
    return last >= before * (1 - FALLING) if measure.exponential else last >= before - FALLING

"""Compare ways to read a text whose task is unknown, or changes in the text.

    python scripts/experiments/compare_token_routing.py runs/demo --output results/token_routing.csv

Texts: the test documents of the run, whose task is hidden (``unknown``), and composite texts (``composite-M``), in which M tasks
follow one another, a switch every ``--segment`` tokens. Their parts are the beginnings of test documents. Arms:

- ``oracle``: each token by the adapter of its task, which reads the whole text.
- ``filter``: the hidden Markov model over tasks, with the switch rate that is most likely for validation texts of the same kind.
- ``whole text``: p(d | tokens before) for texts of one task, as ``infer_task``: the filter at switch rate 0.
- ``mixture``: all tasks with their prior weights at each token: the filter at switch rate 1.
- ``meteora k=1``, ``meteora k=2``: gates, fitted here to the run's training documents.
- ``average``: one adapter, the mean of ΔW over all tasks. ``theta``: Θ. ``base``: no adapter.
- ``pooled``: one LoRA for all tasks, if the folder of such a run is given (``map_fit.py --tau inf``, with the same documents).

Columns: perplexity; its ratio to the oracle's; the share of tokens at which the most probable task is the right one, before the
token is read; and for composite texts the mean number of tokens after a switch until that task is the new one (a switch that is
not found counts as a whole segment), and the share of switches that are found. Rows that the table has are not computed again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from torch import Tensor

from bora_pyro.data import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.options import FitOptions
from bora_pyro.inference.route_fit import gates_of, route_fit, routed_model
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_fields, option
from bora_pyro.predict.gates import read_gates
from bora_pyro.predict.token_filter import TokenLikelihoods, token_likelihoods
from bora_pyro.priors import FrozenAdapters
from bora_pyro.routers import MeteoRA
from bora_pyro.runs.results_table import read_results, write_results
from bora_pyro.runs.saved import SavedRun, load_run
from bora_pyro.runs.stored_options import check_options, options_json

UNKNOWN, COMPOSITE = "unknown", "composite"
KEYS = ["text", "arm"]
NUMBERS = ["perplexity", "ratio", "accuracy", "tokens_until_found", "found", "switch_rate", "tokens"]
COLUMNS = [*KEYS, *NUMBERS, "options"]
#: Arms that are the filter at some switch rate; None: the rate of maximum likelihood.
FILTERS: dict[str, float | None] = {"filter": None, "whole text": 0.0, "mixture": 1.0}
GATES = {"meteora k=1": 1, "meteora k=2": 2}


@dataclass(kw_only=True)
class TokenRoutingConfig:
    """Compare the filter by tokens, MeteoRA's gates and single adapters on texts of unknown or changing task."""

    run: str = option("", "folder of a finished fit, its output_dir", positional=True)
    pooled: str | None = option(None, "folder of a fit of one adapter for all tasks to the same documents (default: none)")
    composite: list[str] = option(["2", "3", "5", "10"], "numbers of tasks in a composite text (default: 2 3 5 10)")
    texts: int = option(50, "composite texts of each kind", least=1)
    segment: int = option(64, "tokens of each task in a composite text", least=2)
    epochs: int = option(6, "epochs of the fit of the gates", least=1)
    learning_rate: float = option(0.01, "learning rate of the gates", positive=True)
    gate_weight: float = option(50.0, "weight of the task of a token in the fit of the gates", positive=True)
    prior: str = option("flat", "p(d): flat, or in proportion to the training documents", choices=("flat", "documents"))
    seed: int = option(0, "seed of the composite texts and of the gates", least=0)
    trust_remote_code: bool = option(
        False, "allow the base model to run its own code on this machine; only on the command line", line_only=True
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ... or mps")
    output: str = option("results/token_routing.csv", "the table; rows that it has are not repeated")

    def validate(self) -> None:
        """Check the values."""
        if not self.run.strip():
            raise InputError("no run is given; name the folder of a fit, as in compare_token_routing.py runs/map_fit")
        check_fields(self)
        for text in self.composite:
            if not (text.isdigit() and int(text) >= 2):
                raise InputError(f"composite has {text!r}; give whole numbers from 2 up")

    def of_result(self, run: SavedRun) -> dict[str, Any]:
        """What all rows of a table share."""
        names = ("texts", "segment", "epochs", "learning_rate", "gate_weight", "prior", "seed")
        pooled = None if self.pooled is None else Path(self.pooled).name
        return {name: getattr(self, name) for name in names} | {"run": run.folder.digest_of("posterior")[:16], "pooled": pooled}


@dataclass(frozen=True)
class Texts:
    """Texts with the task of each predicted token.

    Attributes:
        split: the texts.
        task: one for each text, (tokens,) int64: the task of each predicted token.
        start: one for each text: the places among its predicted tokens at which a task begins, after the first.
    """

    split: TokenSplit
    task: list[Tensor]
    start: list[list[int]]

    @classmethod
    def of_documents(cls, split: TokenSplit) -> Texts:
        """Texts of one task each."""
        task = [torch.full((n,), d) for n, d in zip(split.predicted.tolist(), split.task.tolist(), strict=True)]
        return cls(split, task, [[] for _ in task])


def composites(split: TokenSplit, tasks: int, *, segment: int, number: int, seed: int) -> Texts | None:
    """Texts of several tasks, each with the beginning of a document: its first ``segment`` tokens behind the start token.

    Args:
        split: the documents.
        tasks: number of tasks in a text.
        segment: tokens of each task.
        number: number of texts.
        seed: seed of the choice of tasks and documents.

    Returns:
        The texts; None if too few tasks have a document that is long enough.
    """
    whole = split.subset(split.first_pieces)
    long = {d: ((whole.task == d) & (whole.lengths > segment)).nonzero()[:, 0].tolist() for d in range(split.num_tasks)}
    usable = [d for d, documents in long.items() if documents]
    if len(usable) < tasks:
        return None
    generator = torch.Generator().manual_seed(seed)
    rows, labels = [], []
    for _ in range(number):
        chosen = [usable[n] for n in torch.randperm(len(usable), generator=generator)[:tasks].tolist()]
        documents = [long[d][int(torch.randint(len(long[d]), (), generator=generator))] for d in chosen]
        parts = [whole.document(n) for n in documents]
        rows.append([int(parts[0][0]), *(int(token) for part in parts for token in part[1 : segment + 1])])
        labels.append(torch.tensor(chosen).repeat_interleave(segment))
    made = TokenSplit.from_documents(rows, task=[0] * number, num_tasks=split.num_tasks, pad_token_id=split.pad_token_id)
    return Texts(made, labels, [[segment * n for n in range(1, tasks)]] * number)


def until_found(best: list[Tensor], texts: Texts) -> dict[str, float]:
    """How often the most probable task is right, and how soon after a switch.

        >>> split = TokenSplit.from_documents([[0, 5, 5, 5, 5]], task=[0], num_tasks=2)
        >>> texts = Texts(split, [torch.tensor([0, 0, 1, 1])], [[2]])
        >>> until_found([torch.tensor([0, 0, 0, 1])], texts)
        {'accuracy': 0.75, 'tokens_until_found': 1.0, 'found': 1.0}

    Args:
        best: one for each text, (tokens,) int64: the most probable task before each predicted token.
        texts: the texts.
    """
    right = [own == task for own, task in zip(best, texts.task, strict=True)]
    waits, found = [], []
    for of_text, starts in zip(right, texts.start, strict=True):
        for begin, end in pairwise([*starts, len(of_text)]):
            hits = of_text[begin:end].nonzero()[:, 0]
            found.append(len(hits) > 0)
            waits.append(int(hits[0]) if len(hits) else end - begin)
    accuracy = {"accuracy": float(torch.cat(right).double().mean())}
    if not waits:
        return accuracy
    return accuracy | {"tokens_until_found": sum(waits) / len(waits), "found": sum(found) / len(found)}


class Comparison:
    """The arms of a run; gates are fitted when an arm needs them.

    Args:
        run: the run.
        config: the options.
    """

    def __init__(self, run: SavedRun, config: TokenRoutingConfig) -> None:
        self.fitted, self.data, self.config = run.fitted, run.data, config
        self._gates: dict[int, Fitted] = {}
        self._read: dict[str, TokenLikelihoods] = {}
        self.pooled = None if config.pooled is None else self._pooled(run, config.pooled)

    def _pooled(self, run: SavedRun, path: str) -> SavedRun:
        pooled = load_run(path, device=self.config.device, trust_remote_code=self.config.trust_remote_code)
        same = [one.data.test.tokens.tolist() for one in (pooled, run)]
        if pooled.fitted.tasks != run.fitted.tasks or same[0] != same[1]:
            raise InputError(f"the run in {path} has other documents than that in {self.config.run}; fit both to the same ones")
        if not math.isinf(pooled.fitted.tau()):
            raise InputError(f"the run in {path} has an adapter for each task; give one that was fitted with --tau inf")
        return pooled

    @property
    def arms(self) -> list[str]:
        """The names of all arms."""
        names = ["oracle", *FILTERS, *GATES, "average", "theta", "base"]
        return names + ["pooled"] * (self.pooled is not None)

    @cached_property
    def theta(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """θ of all tasks, and Θ."""
        return self.fitted.weights()

    def gates(self, k: int) -> Fitted:
        """The gates of MeteoRA with k adapters for each token."""
        if k not in self._gates:
            config = self.config
            options = FitOptions(epochs=config.epochs, learning_rate=config.learning_rate, seed=config.seed, gradient_norm=False)
            print(f"fitting gates, k = {k}", file=sys.stderr, flush=True)
            self._gates[k] = route_fit(self.fitted, self.data, MeteoRA(k), options, gate_weight=config.gate_weight)
        return self._gates[k]

    def texts(self, kind: str, *, validation: bool = False) -> Texts | None:
        """The texts of a kind, from test documents, or the same from validation documents; None if there are none."""
        split = self.data.validation if validation else self.data.test
        if kind == UNKNOWN:
            return Texts.of_documents(split)
        tasks, context = int(kind.removeprefix(f"{COMPOSITE}-")), self.fitted.model.backbone.context
        if context is not None and tasks * self.config.segment + 1 > context:
            return None
        config = self.config
        return composites(split, tasks, segment=config.segment, number=config.texts, seed=config.seed + validation)

    def likelihoods(self, kind: str, *, validation: bool = False) -> TokenLikelihoods | None:
        """The likelihoods of the tokens of the texts of a kind under each adapter, read once; None if there are no texts."""
        name = f"{kind}{' validation' * validation}"
        if name not in self._read and (texts := self.texts(kind, validation=validation)) is not None and len(texts.split):
            self._read[name] = token_likelihoods(self.fitted, texts.split, prior=self.config.prior)
        return self._read.get(name)

    def row(self, kind: str, arm: str, texts: Texts) -> dict[str, Any]:
        """The numbers of an arm on the texts of a kind."""
        tokens = texts.split.num_tokens
        found = self._of_arm(kind, arm, texts)
        total = found.pop("log_likelihood")
        own = self.likelihoods(kind)
        assert own is not None
        oracle = _oracle(own, texts)
        perplexity = math.exp(-total / tokens)
        return {
            "text": kind,
            "arm": arm,
            "perplexity": perplexity,
            "ratio": math.exp((oracle - total) / tokens),
            "tokens": tokens,
        } | found

    def _of_arm(self, kind: str, arm: str, texts: Texts) -> dict[str, float]:
        model, split = self.fitted.model, texts.split
        theta, mean = self.theta
        if arm == "oracle" or arm in FILTERS:
            likelihoods = self.likelihoods(kind)
            assert likelihoods is not None
            if arm == "oracle":
                return {"log_likelihood": _oracle(likelihoods, texts)}
            rate = FILTERS[arm]
            if rate is None:
                held_out = self.likelihoods(kind, validation=True)
                if held_out is None:
                    raise InputError(
                        f"there are no validation texts of kind {kind} to choose the switch rate with; give a run with more"
                    )
                rate = held_out.best_switch_rate()
            filtered = likelihoods.at(rate)
            best = [row.argmax(1) for row in filtered.predicted]
            return {"log_likelihood": float(filtered.log_evidence.sum()), "switch_rate": rate} | until_found(best, texts)
        if arm in GATES:
            routed = self.gates(GATES[arm])
            weights = routed.weights()[0]
            (scores,) = evaluate(routed.model, split, weights)
            # the gates at the token before say which adapters predict a token
            readings = read_gates(routed.model, weights, split)
            best = [p.argmax(1)[_places(split, text) - 1] for text, p in enumerate(readings.probabilities)]
            return {"log_likelihood": float(scores.log_likelihood.sum())} | until_found(best, texts)
        if arm == "average":
            even = routed_model(model, FrozenAdapters(theta, mean), MeteoRA(model.num_tasks, execution="dense"))
            zero = gates_of({name: torch.zeros(model.num_tasks, *start.shape) for name, start in even.starts.items()})
            (scores,) = evaluate(even, split, theta | {name: value.to(model.backbone.device) for name, value in zero.items()})
        elif arm == "pooled":
            assert self.pooled is not None
            (scores,) = evaluate(self.pooled.fitted.model, split, self.pooled.fitted.weights()[0])
        else:
            of_mean = {name: value[None].expand_as(theta[name]) for name, value in mean.items()}
            (scores,) = evaluate(model, split, None if arm == "base" else of_mean)
        return {"log_likelihood": float(scores.log_likelihood.sum())}


def _places(split: TokenSplit, text: int) -> Tensor:
    """The places of the predicted tokens of a text."""
    return (split.labels(text) >= 0).nonzero()[:, 0]


def _oracle(likelihoods: TokenLikelihoods, texts: Texts) -> float:
    """log p of all tokens, each under the adapter of its task, in nats."""
    every = likelihoods.log_likelihood[:, :, 0]
    return sum(float(every[n, : len(task)].gather(1, task[:, None]).sum()) for n, task in enumerate(texts.task))


def rows(comparison: Comparison, config: TokenRoutingConfig, done: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """The rows that the table does not have, one after another."""
    for kind in (UNKNOWN, *(f"{COMPOSITE}-{number}" for number in config.composite)):
        if not (missing := [arm for arm in comparison.arms if (kind, arm) not in done]):
            continue
        texts = comparison.texts(kind)
        if texts is None or not len(texts.split):
            context = comparison.fitted.model.backbone.context
            print(
                f"note: {kind} is left out: it needs more than the {context} tokens that the base reads, or too few tasks have "
                f"test documents of more than {config.segment} tokens",
                file=sys.stderr,
            )
            continue
        for arm in missing:
            yield comparison.row(kind, arm, texts)


def main(argv: list[str]) -> int:
    """Compare, write each row when it is done, and print the table."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(TokenRoutingConfig, argv, prog="compare_token_routing.py")
        table = read_results(config.output, KEYS)
        run = load_run(config.run, device=config.device, trust_remote_code=config.trust_remote_code)
        if not len(run.data.test) or not len(run.data.validation):
            raise InputError(f"the run in {config.run} has no validation or no test documents; give one that has both")
        options = config.of_result(run)
        if len(table):
            check_options(table, options, output=config.output)
        done = set(zip(table.text, table.arm, strict=True))
        for row in rows(Comparison(run, config), config, done):
            whole = pd.DataFrame([dict.fromkeys(COLUMNS) | row | {"options": options_json(options)}])[COLUMNS].astype(object)
            table = pd.concat([table, whole], ignore_index=True) if len(table) else whole
            write_results(table, config.output)
            print(f"{row['text']}, {row['arm']}: {row['perplexity']:.3f}", file=sys.stderr, flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shown = table[[*KEYS, *NUMBERS]].copy()
    shown[NUMBERS] = shown[NUMBERS].apply(pd.to_numeric)
    print(shown.round(3).to_string(index=False))
    print(f"table: {config.output}")
    return 0


if __name__ == "__main__":
    run_script(main)

"""One fit of one arm of ``compare_peers.py``, in a process of its own, so that its peak memory is its own.

    python scripts/experiments/peer_fits.py --arm peft_each --learning_rate 0.01 --result fit.json

The result is a JSON file with a row for each arm that the fit gives: the adapters of ``peft_each`` also give the soups. Arms
through PEFT are trained by ``transformers.Trainer`` (AdamW with the moments of ``bora_pyro``'s fit, no weight decay, the same
schedule) on the batches of ``bora_pyro.inference.fit``, in the same order. A fit of one task has that task's rows of each batch.
All arms of one rank have the same start. The adapters are then read into this library, which scores all arms, after a check that
PEFT's logits are the same. So ``peft_one`` and ``bora_inf`` are two implementations of one fit, and must agree.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peer_options import BORA, SOUPS, THROUGH_PEFT, FitOf
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from bora_pyro.adapters import LoRA
from bora_pyro.backbone.backbone import Backbone
from bora_pyro.backbone.loading import quiet_bitsandbytes
from bora_pyro.data.batch import IGNORED, Batch
from bora_pyro.data.tasks import TaskData
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.exchange.save import save_peft
from bora_pyro.files.atomic import replace_file
from bora_pyro.guides import map_guide
from bora_pyro.inference.averaging import TrajectoryMean
from bora_pyro.inference.evaluate import Scores, evaluate
from bora_pyro.inference.fit import NonFiniteLossError, fit
from bora_pyro.inference.fitted import tau_by_group
from bora_pyro.inference.memory import peak_memory_bytes
from bora_pyro.inference.options import FitOptions
from bora_pyro.inference.schedule import epoch_seed, schedule
from bora_pyro.inference.steps import EpochSteps
from bora_pyro.inference.task_rows import BETAS, EPS
from bora_pyro.model import BoRA, Weights
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import option, part_of
from bora_pyro.predict.multiple_choice import Question
from bora_pyro.priors import ByLatent, HierarchicalNormal, Independent, LearnedPrecision, Pooled, Prior, prior_from_tau
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.questions import accuracies, questions_of

#: Largest relative difference of PEFT's logits from ours (root mean squares), by the precision of the base.
CLOSE = {torch.float32: 1e-4}
CLOSE_IN_HALF = 0.1


@dataclass(kw_only=True)
class PeerFitConfig(FitOf):
    """Fit one arm at one learning rate with one seed, and write its rows."""

    arm: str = option("peft_one", "the arm, as in compare_peers.py")
    learning_rate: float = option(0.01, "AdamW's largest learning rate", positive=True)
    seed: int = option(0, "seed of the split, the start and the order of the documents", least=0)
    result: str = option("peer_fit.json", "the JSON file to write", filled=True)


@dataclass
class Best:
    """The state of lowest validation perplexity so far.

    >>> best = Best({}, 9.0)
    >>> best.offer({}, math.nan, 1), best.offer({}, 8.0, 2, averaged=True), best.epoch, best.averaged
    (False, True, 2, True)
    """

    weights: Weights
    perplexity: float
    epoch: int = 0
    averaged: bool = False

    def offer(self, weights: Weights, perplexity: float, epoch: int, *, averaged: bool = False) -> bool:
        """Take a state if it is better; says whether it was."""
        better = perplexity < self.perplexity
        if better:
            self.weights = {name: value.detach().clone() for name, value in weights.items()}
            self.perplexity, self.epoch, self.averaged = perplexity, epoch, averaged
        return better


# arms of this library


def prior_of(arm: str) -> Prior:
    """The prior of an arm of this library.

    >>> prior_of("bora_inf"), prior_of("bora_100"), prior_of("hydra")
    (Pooled(), HierarchicalNormal(tau=100), ByLatent({'lora_A': Pooled()}, other=Independent()))
    """
    if arm == "hydra":
        return ByLatent({"lora_A": Pooled()}, other=Independent())
    text = arm.removeprefix(BORA)
    return LearnedPrecision() if text == "learned" else prior_from_tau(float(text))


@dataclass
class Outcome:
    """The adapters of an arm and how they were found.

    Attributes:
        arm: the name of the arm.
        model: a model of this library whose adapters ``theta`` has; its prior does not matter.
        theta: the weights of all tasks, (D, layers, *shape).
        validation: validation perplexity of these weights.
        parameters: number of trained parameters.
        adapter_bytes: bytes of the adapters as PEFT folders.
        tokens: predicted tokens of all training steps.
        seconds: training and validation.
        epoch: the epoch that was kept, a mean over tasks where each has its own.
        averaged: the share of the tasks whose kept state is a mean of steps.
        more: further columns.
        data: the documents, if they differ from those of the other arms.
    """

    arm: str
    model: BoRA
    theta: Weights | None
    validation: float
    parameters: int = 0
    adapter_bytes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    epoch: float = 0.0
    averaged: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)
    data: TaskData | None = None


def fit_ours(arm: str, template: BoRA, data: TaskData, config: MapFitConfig) -> Outcome:
    """Fit an arm of this library."""
    model = BoRA(template.backbone, data.num_tasks, adapter=template.adapter, prior=prior_of(arm), seed=config.seed)
    guide, start = map_guide(model), time.perf_counter()
    try:
        fitted = fit(model, data, part_of(config, FitOptions), guide=guide)
    except NonFiniteLossError as error:
        fitted = error.fitted
    seconds = time.perf_counter() - start
    theta, centre = fitted.weights()
    perplexity, tau = fitted.validation_perplexity, tau_by_group(model, fitted.sites())
    assert perplexity is not None  # there are validation documents
    adapters = [one(theta, d) for d in range(1 if isinstance(model.prior, Pooled) else data.num_tasks)]
    if isinstance(model.prior, HierarchicalNormal | LearnedPrecision):
        adapters.append(centre)
    return Outcome(
        arm,
        model,
        theta,
        perplexity,
        parameters=sum(parameter.numel() for parameter in guide.parameters()),
        adapter_bytes=sum(folder_bytes(model, weights) for weights in adapters),
        tokens=len(fitted.history) * data.train.num_tokens,
        seconds=seconds,
        epoch=fitted.best_epoch,
        averaged=float(fitted.averaged),
        more={f"tau_{factor}": geometric_mean(tau, model, f"lora_{factor}") for factor in "AB"},
    )


def one(theta: Weights, d: int) -> Weights:
    """The weights of one task."""
    return {name: value[d] for name, value in theta.items()}


def geometric_mean(tau: Mapping[str, Any], model: BoRA, latent: str) -> float:
    """The geometric mean of τ over the entries of one kind of latent."""
    logs = weight = 0.0
    for name, value in tau.items():
        if name.endswith(latent):
            values = torch.tensor(value, dtype=torch.float64).flatten()
            logs += float(values.log().mean()) * model.starts[name].numel()
            weight += model.starts[name].numel()
    return math.exp(logs / weight) if weight and not math.isinf(logs) else (math.inf if logs > 0 else 0.0)


def folder_bytes(model: BoRA, weights: Weights) -> int:
    """The bytes of an adapter as a PEFT folder."""
    with tempfile.TemporaryDirectory() as folder:
        save_peft(Path(folder), model, weights)
        return sum(file.stat().st_size for file in Path(folder).iterdir())


# arms through PEFT


class Batches(Dataset[dict[str, Tensor]]):
    """Ready batches in the order of training; ``position`` is the number of each in the schedule, ``ends`` those after epochs."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.position: list[int] = []
        self.ends: dict[int, int] = {}
        self.total = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        batch = self.batches[number]
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}

    @classmethod
    def of(cls, split: TokenSplit, order: TokenSplit, config: MapFitConfig, epochs: range, task: int | None) -> Batches:
        """The batches of some epochs, as ``bora_pyro.inference.fit`` packs them, or the rows of one task of each.

        Args:
            split: the documents to train on.
            order: the same documents as ``fit`` has them; their lengths decide what a batch is.
            config: the options of the fit.
            epochs: which epochs.
            task: index of the task, or None for all.
        """
        self, number = cls(), 0
        for epoch in epochs:
            for (packed,) in EpochSteps(order, token_budget=config.token_budget, seed=epoch_seed(config.seed, epoch)):
                index = packed.index if task is None else packed.index[packed.task == task]
                if len(index):
                    self.batches.append(split.subset(index).batches(token_budget=sys.maxsize)[0])
                    self.position.append(number)
                number += 1
            self.ends[len(self.batches)] = epoch - epochs.start + 1
        self.total = number
        return self


class InOrder(Trainer):
    """A ``Trainer`` that takes the batches in their order, with the base's dropout off, as in all other arms."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)


class Epochs(TrainerCallback):
    """Averages the steps, measures both states after each epoch, keeps the better one, and stops when none is better."""

    def __init__(self, of: Lora, batches: Batches, score: Callable[[Weights], float], *, patience: int, average: bool) -> None:
        self.of, self.batches, self.score, self.patience = of, batches, score, patience
        start = of.weights()
        self.mean = TrajectoryMean(start) if average else None
        self.best = Best({name: value.clone() for name, value in start.items()}, score(start))
        self.tokens = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the ``Trainer`` after each step of the optimiser."""
        weights = self.of.weights()
        self.tokens += int(self.batches.batches[state.global_step - 1].predicted.sum())
        if self.mean is not None:
            self.mean.add(weights)
        epoch = self.batches.ends.get(state.global_step)
        if epoch is None:
            return
        if math.isinf(self.best.perplexity):  # no validation document: the last epoch is the best
            self.best = Best({name: value.clone() for name, value in weights.items()}, math.inf, epoch)
            return
        self.best.offer(weights, self.score(weights), epoch)
        if self.mean is not None:
            self.best.offer(self.mean.values, self.score(self.mean.values), epoch, averaged=True)
        finite = all(bool(value.isfinite().all()) for value in weights.values())
        if not finite or (self.patience and epoch - self.best.epoch >= self.patience):
            control.should_training_stop = True


class Lora:
    """One LoRA adapter through PEFT on the layers of a backbone, and the same adapter as weights of this library.

    >>> backbone = Backbone.from_pretrained("builtin:nano", targets=["q_proj", "fc1"])
    >>> lora = Lora(backbone, rank=2, alpha=2.0, seed=0)
    >>> lora.parameters, {name: tuple(value.shape) for name, value in lora.weights().items()}["fc1.lora_B"]
    (14336, (4, 1024, 2))
    >>> document = torch.tensor([[2, 5, 6, 7]])
    >>> lora.difference(document) < 1e-5
    True
    """

    def __init__(self, backbone: Backbone, *, rank: int, alpha: float, seed: int) -> None:
        self.backbone = backbone
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            target_modules=[path for slot in backbone.slots for path in slot.paths],
            fan_in_fan_out=backbone.slots[0].fan_in_fan_out,
        )
        base = backbone.model
        shared = {id(tensor): tensor for tensor in chain(base.parameters(), base.buffers())}
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            # PEFT reads an attribute that transformers has renamed
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
            torch.manual_seed(seed)
            self.model: Any = peft.get_peft_model(copy.deepcopy(base, shared), config)
        self.model.config.use_cache = False
        self.model.set_attn_implementation("sdpa")  # the attention of transformers, not that of this library
        self.model.eval()
        self.model.train = lambda mode=True: self.model  # the base's dropout stays off, as in all other arms
        self.trained: list[nn.Parameter] = [p for p in self.model.parameters() if p.requires_grad]
        self.bora = BoRA(backbone, 1, adapter=LoRA(rank, alpha), prior=_Alone())
        self.start = {name: value.clone() for name, value in self.weights().items()}

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.trained)

    def _factors(self) -> Iterator[tuple[str, list[nn.Parameter]]]:
        modules = dict(self.model.base_model.model.named_modules())
        for slot in self.backbone.slots:
            for factor in ("lora_A", "lora_B"):
                yield f"{slot.name}.{factor}", [getattr(modules[path], factor)["default"].weight for path in slot.paths]

    def weights(self) -> Weights:
        """The adapter as this library stores it: (layers, *shape) by name."""
        return {name: torch.stack([value.detach().float() for value in values]) for name, values in self._factors()}

    def load(self, weights: Weights) -> None:
        """Put an adapter into PEFT's model."""
        with torch.no_grad():
            for name, values in self._factors():
                for value, new in zip(values, weights[name], strict=True):
                    value.copy_(new)

    def difference(self, input_ids: Tensor) -> float:
        """Root mean square of the difference between PEFT's logits and ours, in units of ours.

        Raises:
            InputError: they are not the same adapter.
        """
        input_ids, rows = input_ids.to(self.backbone.device), torch.zeros(len(input_ids), dtype=torch.int64)
        change = self.bora.change({name: value[None] for name, value in self.weights().items()}, rows.to(self.backbone.device))
        with torch.no_grad():
            ours = self.backbone.logits(input_ids, change).float()
            theirs = self.model(input_ids=input_ids).logits.float()
        found = float((theirs - ours).square().mean().sqrt() / ours.square().mean().sqrt())
        if not found <= CLOSE.get(self.backbone.model.dtype, CLOSE_IN_HALF):
            raise InputError(f"PEFT's logits differ from ours by {found:.2g} of their size; the arms are not comparable")
        return found

    def train(self, batches: Batches, score: Callable[[Weights], float], config: MapFitConfig) -> tuple[Best, int]:
        """Train by a ``Trainer``; returns the best state and the number of predicted tokens of all steps."""
        epochs = Epochs(self, batches, score, patience=config.patience, average=config.average)
        if not len(batches):
            return epochs.best, 0
        optimizer = torch.optim.AdamW(self.trained, lr=config.learning_rate, betas=BETAS, eps=EPS, weight_decay=0.0)

        def rate(step: int) -> float:
            return schedule(batches.position[min(step, len(batches) - 1)], batches.total, config.warmup)

        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):  # the Trainer seeds globally
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=len(batches),
                per_device_train_batch_size=1,  # an item is a whole batch
                max_grad_norm=0.0 if math.isinf(config.gradient_clip) else config.gradient_clip,
                remove_unused_columns=False,
                label_names=["labels"],
                use_cpu=self.backbone.device.type == "cpu",
                dataloader_pin_memory=False,
                seed=config.seed,
                logging_strategy="no",
                save_strategy="no",
                eval_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            trainer = InOrder(
                model=self.model,
                args=arguments,
                train_dataset=batches,
                data_collator=lambda items: items[0],
                optimizers=(optimizer, LambdaLR(optimizer, rate)),
                callbacks=[epochs],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        self.load(epochs.best.weights)
        return epochs.best, epochs.tokens

    def folder_bytes(self) -> int:
        """The bytes of the adapter as PEFT saves it."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            return sum(file.stat().st_size for file in Path(folder).iterdir() if file.name != "README.md")


class _Alone(Pooled):
    """One adapter, for a model of one task."""

    least_tasks = 1


class Peft:
    """The arms through PEFT of one seed and learning rate."""

    def __init__(self, template: BoRA, data: TaskData, config: MapFitConfig) -> None:
        self.data, self.config, self.backbone = data, config, template.backbone
        self.starts = template.starts
        self.scaling = 1.0 if config.alpha is None else config.alpha / config.rank

    def lora(self, rank: int) -> Lora:
        """A new adapter. At the rank of the other arms it begins where they begin, at a start like PEFT's own."""
        lora = Lora(self.backbone, rank=rank, alpha=self.scaling * rank, seed=self.config.seed)
        if rank == self.config.rank:
            lora.load(self.starts)
            lora.start = {name: value.clone() for name, value in lora.weights().items()}
        self.plain = BoRA(self.backbone, self.data.num_tasks, adapter=LoRA(rank, self.scaling * rank), prior=Pooled())
        return lora

    def for_all(self, weights: Weights) -> Weights:
        """One adapter as that of every task."""
        return {name: value.expand(self.data.num_tasks, *value.shape) for name, value in weights.items()}

    def score(self, data: TaskData, task: int | None = None) -> Callable[[Weights], float]:
        """A function that returns the validation perplexity of one adapter, on all documents or on those of a task."""
        documents = None if task is None else (data.validation.task == task).nonzero()[:, 0]

        def perplexity(weights: Weights) -> float:
            [scores] = evaluate(self.plain, data.validation, self.for_all(weights), documents=documents)
            found = scores.perplexity(task)
            return math.inf if found is None or math.isnan(found) else found

        return perplexity

    def one(self, arm: str, *, rank: int | None = None, data: TaskData | None = None, epochs: int | None = None) -> Outcome:
        """One LoRA for all tasks."""
        rank, epochs, start = rank or self.config.rank, epochs or self.config.epochs, time.perf_counter()
        lora, documents = self.lora(rank), data or self.data
        batches = Batches.of(documents.train, self.data.train, self.config, range(epochs), None)
        best, tokens = lora.train(batches, self.score(documents), self.config)
        seconds = time.perf_counter() - start
        difference = lora.difference(documents.train.document(0)[None])
        self.last = lora
        return Outcome(
            arm, self.plain, self.for_all(best.weights), best.perplexity, lora.parameters, lora.folder_bytes(), tokens, seconds,
            best.epoch, float(best.averaged), {"logit_difference": difference, "rank": rank}, data,
        )  # fmt: skip

    def each(self, arm: str, *, first: int = 0, start_at: Weights | None = None, lora: Lora | None = None) -> Outcome:
        """One LoRA a task, each trained on its rows of every batch, and stopped by its own validation documents.

        Args:
            arm: the name of the arm.
            first: the first epoch; the order of the documents goes on from there.
            start_at: the adapter from which every task starts; default: PEFT's start, the same for all tasks.
            lora: the adapter to use; default: a new one.
        """
        start, lora = time.perf_counter(), lora or self.lora(self.config.rank)
        found, tokens = list[Best](), 0
        for task in range(self.data.num_tasks):
            lora.load(start_at or lora.start)
            batches = Batches.of(self.data.train, self.data.train, self.config, range(first, self.config.epochs), task)
            best, seen = lora.train(batches, self.score(self.data, task), self.config)
            found.append(best)
            tokens += seen
        seconds, number = time.perf_counter() - start, len(found)
        theta = {name: torch.stack([best.weights[name] for best in found]) for name in lora.start}
        return Outcome(
            arm, self.plain, theta, self.of_all(self.plain, theta), number * lora.parameters, number * lora.folder_bytes(),
            tokens, seconds, sum(best.epoch for best in found) / number, sum(best.averaged for best in found) / number,
            {"logit_difference": lora.difference(self.data.train.document(0)[None]), "rank": self.config.rank},
        )  # fmt: skip

    def of_all(self, model: BoRA, theta: Weights) -> float:
        """Validation perplexity of the adapters of all tasks."""
        found = evaluate(model, self.data.validation, theta)[0].perplexity()
        return math.inf if found is None else found

    def soups(self, each: Outcome) -> list[Outcome]:
        """The mean of the tasks' adapters: of (A, B), and of the changes B A, which is an adapter of rank D r."""
        assert each.theta is not None
        number, lora = self.data.num_tasks, each.theta
        mean = {name: value.mean(0) for name, value in lora.items()}
        # ΔW = (α/r) Σ_d B_d A_d / D: the factors side by side
        wide = {
            name: value.transpose(0, 1).flatten(1, 2) if name.endswith("lora_A") else _side_by_side(value) / number
            for name, value in lora.items()
        }
        rank = number * self.config.rank
        whole: Any = BoRA(self.backbone, number, adapter=LoRA(rank, self.scaling * rank), prior=Pooled())
        found = []
        for arm, model, weights in zip(SOUPS, (each.model, whole), (mean, wide), strict=True):
            theta = self.for_all(weights)
            change: dict[str, Any] = {"arm": arm, "model": model, "theta": theta, "validation": self.of_all(model, theta)}
            change |= {"adapter_bytes": folder_bytes(model, weights), "more": {"rank": model.adapter.rank}}
            found.append(dataclasses.replace(each, **change))
        return found

    def one_then_each(self, arm: str) -> Outcome:
        """Half of the epochs one LoRA for all tasks, then one a task from there. Each half has a schedule of its own."""
        epochs = self.config.epochs
        if epochs < 2:
            raise InputError(f"epochs is {epochs}; {arm} divides the epochs in two: give 2 or more")
        half = -(-epochs // 2)
        first = self.one(arm, epochs=half)
        assert first.theta is not None
        second = self.each(arm, first=half, start_at=one(first.theta, 0), lora=self.last)
        second.tokens, second.seconds = first.tokens + second.tokens, first.seconds + second.seconds
        second.epoch = first.epoch + second.epoch
        return second

    def task_id(self, arm: str) -> Outcome:
        """One LoRA, and the name of the task as the first line of each document."""
        return self.one(arm, data=with_names(self.data, self.backbone))

    def big(self, arm: str) -> Outcome:
        """One LoRA with as many parameters as one a task, as far as the layers have room for its rank."""
        room = min(min(slot.in_features, slot.out_features) for slot in self.backbone.slots)
        return self.one(arm, rank=min(self.data.num_tasks * self.config.rank, room))


def _side_by_side(value: Tensor) -> Tensor:
    """(D, layers, out, r) -> (layers, out, D r)."""
    return value.permute(1, 2, 0, 3).flatten(2)


def with_names(data: TaskData, backbone: Backbone) -> TaskData:
    """The documents with the name of their task as a first line, which is read and not predicted.

    Raises:
        InputError: a document and its name are longer than the context of the base.
    """
    tokenizer = backbone.tokenizer
    assert tokenizer is not None
    names = [tokenizer(f"{name}\n", add_special_tokens=False)["input_ids"] for name in data.tasks]

    def named(split: TokenSplit) -> TokenSplit:
        documents, observed = [], []
        for n, d in enumerate(split.task.tolist()):
            ids, labels = split.document(n).tolist(), split.labels(n)
            documents.append([ids[0], *names[d], *ids[1:]])
            observed.append([False] * (1 + len(names[d])) + (labels[1:] != IGNORED).tolist())
        lengths = torch.tensor([len(document) for document in documents], dtype=torch.int64)
        if backbone.context is not None and len(lengths) and int(lengths.max()) > backbone.context:
            raise InputError(
                f"a document with the name of its task has {int(lengths.max())} tokens, but the base reads {backbone.context}; "
                "give a smaller max_tokens"
            )
        return TokenSplit(
            torch.tensor([*chain.from_iterable(documents)], dtype=torch.int64), lengths, task=split.task,
            characters=split.characters, num_tasks=split.num_tasks, pad_token_id=split.pad_token_id,
            observed=torch.tensor([*chain.from_iterable(observed)], dtype=torch.bool),
        )  # fmt: skip

    train, validation, test = (named(split) for split in (data.train, data.validation, data.test))
    assert (train.num_tokens, test.num_tokens) == (data.train.num_tokens, data.test.num_tokens)  # names are not predicted
    return TaskData(data.tasks, train, validation, test)


#: The arms through PEFT: a function of :class:`Peft` and the name of the arm.
PEFT_ARMS: dict[str, Callable[[Peft, str], Outcome]] = dict(
    zip(THROUGH_PEFT, (Peft.one, Peft.each, Peft.one_then_each, Peft.task_id, Peft.big), strict=True)
)


def fit_arm(arm: str, template: BoRA, data: TaskData, config: MapFitConfig) -> list[Outcome]:
    """Fit an arm, and the arms that come with it."""
    if arm == "base":
        [scores] = evaluate(template, data.validation, None)
        perplexity = scores.perplexity()
        assert perplexity is not None
        return [Outcome(arm, template, None, perplexity)]
    if arm not in PEFT_ARMS:
        return [fit_ours(arm, template, data, config)]
    through = Peft(template, data, config)
    outcome = PEFT_ARMS[arm](through, arm)
    return [outcome, *(through.soups(outcome) if arm == "peft_each" else [])]


def row_of(outcome: Outcome, data: TaskData, questions: Sequence[Question]) -> dict[str, Any]:
    """The numbers of an arm: perplexities and accuracies over all documents and by task, and what they cost."""
    own = outcome.data or data
    [test], [validation] = (evaluate(outcome.model, split, outcome.theta) for split in (own.test, own.validation))
    if own is not data:  # the questions are asked as the documents are read
        questions = [dataclasses.replace(question, prompt=f"{question.task}\n{question.prompt}") for question in questions]
    right, documents = accuracies(outcome.model, questions, outcome.theta, data.tasks), data.train.documents_per_task

    def of_task(d: int, name: str) -> dict[str, Any]:
        scores = {"documents": documents[d], "validation": _rounded(validation, d), "test": _rounded(test, d)}
        return scores | ({"accuracy": right.get(name)} if questions else {})

    return {
        "arm": outcome.arm, "validation_perplexity": outcome.validation, "test_perplexity": test.perplexity(),
        "test_accuracy": right[None], "best_epoch": outcome.epoch, "averaged": outcome.averaged,
        "training_tokens": outcome.tokens, "trainable_parameters": outcome.parameters, "adapter_bytes": outcome.adapter_bytes,
        "seconds": round(outcome.seconds, 2), **outcome.more, "documents_digest": data.digest[:16],
        "tasks": {name: of_task(d, name) for d, name in enumerate(data.tasks)},
    }  # fmt: skip


def _rounded(scores: Scores, d: int) -> float | None:
    perplexity = scores.perplexity(d)
    return None if perplexity is None else float(f"{perplexity:.6g}")


def run(config: PeerFitConfig) -> list[dict[str, Any]]:
    """Fit one arm and return its rows."""
    torch.set_num_threads(config.threads)
    options = config.fit(seed=config.seed, learning_rate=config.learning_rate)
    template, data = build_run(options, quiet=True)
    if not data.validation.num_tokens:
        raise InputError("there is no validation document to choose learning rates by; give data with a validation split")
    questions = questions_of(options, template.backbone, data)
    outcomes = fit_arm(config.arm, template, data, options)
    memory = peak_memory_bytes(template.backbone.device)
    return [row_of(outcome, data, questions) | {"peak_memory_bytes": memory} for outcome in outcomes]


def main(argv: list[str]) -> int:
    """Fit one arm, and write its rows."""
    transformers.utils.logging.disable_progress_bar()
    quiet_bitsandbytes()
    try:
        config = parse_config(PeerFitConfig, argv, prog="peer_fits.py")
        rows = run(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    replace_file(Path(config.result), lambda file: file.write_text(json.dumps(rows, indent=1), encoding="utf-8"))
    return 0


if __name__ == "__main__":
    run_script(main)

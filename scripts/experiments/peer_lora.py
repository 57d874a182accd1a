"""One LoRA adapter through PEFT, trained by ``transformers.Trainer`` on the batches and with the schedule of this library."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from bora_pyro.adapters import LoRA
from bora_pyro.backbone.backbone import Backbone
from bora_pyro.data.batch import IGNORED, Batch
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.exchange.peft_model import peft_model
from bora_pyro.inference.averaging import TrajectoryMean
from bora_pyro.inference.optimizer import BETAS, EPS
from bora_pyro.inference.schedule import COSINE, epoch_seed, schedule
from bora_pyro.inference.steps import EpochSteps
from bora_pyro.model import BoRA, Weights
from bora_pyro.priors import Pooled
from bora_pyro.runs.config.map_fit import MapFitConfig

#: Largest relative difference of PEFT's logits from ours (root mean squares), by the precision of the base.
CLOSE = {torch.float32: 1e-4}
CLOSE_IN_HALF = 0.1


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


class Batches(Dataset[dict[str, Tensor]]):
    """Ready batches in the order of training.

    ``position`` is the number of each in the schedule. ``sizes`` are the tokens of an average batch of its epoch. ``ends`` are
    the epochs by the number of batches up to their ends.
    """

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.position: list[int] = []
        self.sizes: list[float] = []
        self.ends: dict[int, int] = {}
        self.total = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        batch = self.batches[number]
        size = torch.tensor(self.sizes[number])
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels, "size": size}

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
        self = cls()
        of_epoch = [EpochSteps(order, token_budget=config.token_budget, seed=epoch_seed(config.seed, epoch)) for epoch in epochs]
        # `fit` counts the steps of every epoch as many as those of the first one
        usual = len(of_epoch[0]) if of_epoch else 0
        self.total = usual * len(of_epoch)
        tokens = split.num_tokens if task is None else int(split.tokens_per_task[task])
        for number, steps in enumerate(of_epoch):
            for step, (packed,) in enumerate(steps):
                index = packed.index if task is None else packed.index[packed.task == task]
                if len(index):
                    self.batches.append(split.subset(index).batches(token_budget=sys.maxsize)[0])
                    self.position.append(min(number * usual + step, self.total - 1))
                    self.sizes.append(tokens / len(steps))
            self.ends[len(self.batches)] = number + 1
        return self


class InOrder(Trainer):
    """A ``Trainer`` that takes the batches in their order, as in all other arms, and counts all their tokens alike.

    The ``Trainer``'s own loss is the mean over the tokens of a batch, so that a token of a small batch counts more.
    """

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The negative log-likelihood of a batch, divided by the average number of tokens of the batches of its epoch."""
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        labels = inputs["labels"][:, 1:]
        total = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        loss = total / inputs["size"]
        return (loss, {"logits": logits}) if return_outputs else loss

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
        self.model = peft_model(backbone, rank=rank, alpha=alpha, float32=True, seed=seed)
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
            place = batches.position[min(step, len(batches) - 1)]
            return schedule(place, batches.total, config.warmup, config.schedule or COSINE)

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

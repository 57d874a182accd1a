"""Four ways to train adapters of the same layers on the same documents. Each is a step that can be timed.

- ``ours``: the step of ``bora_pyro.inference.fit``, on batches of documents of similar length.
- ``peft_one_adapter``: the loop of PEFT's documentation, one adapter for all tasks, random batches.
- ``peft_trainer``: the same model and documents under Hugging Face's ``Trainer``.
- ``released``: the step of the BoRA paper's released code, reimplemented: an adapter a task and a mean adapter in one PEFT model.

Each way pads as it usually does. Ours sorts documents by length. PEFT's loop and the ``Trainer`` pad to the longest row with an
attention mask. The released code pads every row to ``max_tokens`` with end marks, which count in its loss. Speed is therefore
counted in predicted tokens of the documents, which do not include padding. The time of a step includes building the batch.

>>> from bases import load_base
>>> from bora_pyro.data.token_split import TokenSplit
>>> documents = TokenSplit.from_documents([[2, 5, 6], [2, 7]], task=[0, 1], num_tasks=2)
>>> work = Work(load_base("random:tiny"), documents, nano_tokenizer(), rows=2, max_tokens=4, rank=2, tau=100.0)
>>> {name: arm(work).step() for name, arm in ARMS.items() if name != "peft_trainer"}
{'ours': 3, 'peft_one_adapter': 3, 'released': 3}
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from arm_work import Arm, Work, nano_tokenizer
from bases import GRADIENT_CLIP, LEARNING_RATE, adamw, bora_loop, loop_step, now, optimise
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bora_pyro.data.batch import Batch

__all__ = ["ARMS", "Arm", "Work", "alternate", "nano_tokenizer", "released_loss"]

MEAN = "mean"


class Ours(Arm):
    """The step and the batches of ``bora_pyro.inference.fit``."""

    def __init__(self, work: Work) -> None:
        self.work = work
        budget = work.rows * work.max_tokens
        self.loop = bora_loop(work.backbone, work.split, rank=work.rank, tau=work.tau, token_budget=budget, seed=work.seed)
        self.parameters = self.loop.state.shared
        self.batches = self._batches(budget)

    def _batches(self, budget: int) -> Iterator[Batch]:
        for epoch in count():
            yield from self.work.split.batches(token_budget=budget, seed=self.work.seed + epoch)

    def step(self) -> int:
        batch = next(self.batches)
        loop_step(self.loop, batch.to(self.work.device))
        return self.work.predicted(batch.index)


class Collator:
    """Pads to the longest row, with an attention mask and labels of −100 at the padding; counts each batch's predicted tokens."""

    def __init__(self, work: Work) -> None:
        self.work, self.counts = work, list[int]()
        self.pad = DataCollatorForSeq2Seq(work.tokenizer)

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        self.counts.append(self.work.predicted(torch.tensor([feature["document"] for feature in features])))
        return self.pad([{name: value for name, value in feature.items() if name != "document"} for feature in features])


class PeftOneAdapter(Arm):
    """The loop of PEFT's documentation: one adapter, batches in random order."""

    def __init__(self, work: Work) -> None:
        self.work, self.collator, self.model = work, Collator(work), work.peft_model()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = adamw(self.parameters)
        self.batches = self._batches()

    def _batches(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(self.work.seed)
        loader: DataLoader[Any] = DataLoader(
            self.work.features(),  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_size=self.work.rows,
            shuffle=True,
            collate_fn=self.collator,
            generator=generator,
        )
        while True:
            yield from loader

    def step(self) -> int:
        batch = next(self.batches).to(self.work.device)
        self.model(**batch).loss.backward()
        optimise(self.optimizer, self.parameters)
        return self.collator.counts[-1]


class PeftTrainer(Arm):
    """PEFT's model under Hugging Face's ``Trainer``, which runs its own loop and has callbacks; see :func:`alternate`."""

    def __init__(self, work: Work) -> None:
        self.work, self.collator, self.model = work, Collator(work), work.peft_model()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def run(self, steps: int, before: Callable[[], None], done: Callable[[float, int], None]) -> None:
        """Train, and call two functions at each step. Their own time is not measured.

        Args:
            steps: number of steps.
            before: called before each step.
            done: called after each step with its seconds and its predicted tokens.
        """
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):  # the Trainer seeds globally
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=self.work.rows,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=GRADIENT_CLIP,
                optim="adamw_torch_fused",
                label_names=["labels"],
                remove_unused_columns=False,
                use_cpu=self.work.device.type == "cpu",
                dataloader_pin_memory=self.work.device.type == "cuda",
                seed=self.work.seed,
                logging_strategy="no",
                save_strategy="no",
                eval_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            arguments._n_gpu = 1  # with several GPUs the Trainer would split the batch
            trainer = Trainer(
                model=self.model,
                args=arguments,
                train_dataset=self.work.features(),
                data_collator=self.collator,
                callbacks=[_Pace(self, before, done)],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()


class _Pace(TrainerCallback):
    """Calls functions between two steps of a ``Trainer``, and times everything that it does from one call to the next."""

    def __init__(self, arm: PeftTrainer, before: Callable[[], None], done: Callable[[float, int], None]) -> None:
        self.arm, self.before, self.done = arm, before, done
        self.number, self.start = 0, 0.0

    def _begin(self) -> None:
        self.before()
        self.start = now(self.arm.work.device)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # the collator may be a batch ahead of the Trainer, so the count is taken by the number of the step
        self.done(now(self.arm.work.device) - self.start, self.arm.collator.counts[self.number])
        self.number += 1
        if state.global_step < state.max_steps:
            self._begin()


class Released(Arm):
    """The released code's step: one forward pass a task, all rows padded to the full length, and a Python loop over tensors."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.names = [f"task{d}" for d in range(work.split.num_tasks)]
        self.model = work.peft_model(MEAN, *self.names)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = adamw(self.parameters)
        self.batches = self._batches()

    def _batches(self) -> Iterator[Tensor]:
        generator, rows = torch.Generator().manual_seed(self.work.seed), self.work.rows
        while True:
            yield from torch.randperm(len(self.work.split), generator=generator).split(rows)

    def step(self) -> int:
        documents = next(self.batches)
        input_ids = self.padded(documents).to(self.work.device)
        task = self.work.split.task[documents]
        loss = released_loss(self.model, self.names, input_ids, task, self.work.split.num_documents, self.work.tau)
        loss.backward()
        optimise(self.optimizer, self.parameters)
        return self.work.predicted(documents)

    def padded(self, documents: Tensor) -> Tensor:
        """The documents as rows of the full length, filled with end marks: (rows, max_tokens)."""
        eos: Any = self.work.tokenizer.eos_token_id
        input_ids = torch.full((len(documents), self.work.max_tokens), eos)
        for row, n in enumerate(documents.tolist()):
            document = self.work.split.document(n)
            input_ids[row, : len(document)] = document
        return input_ids


def released_loss(model: Any, names: list[str], input_ids: Tensor, task: Tensor, documents: int, tau: float) -> Tensor:
    """N x the mean token loss of the rows, including padding, + τ Σ_d Σ_tensors ‖θ_d − Θ‖.

    Args:
        model: PEFT's model with an adapter of each name and one called ``mean``. All of them are trainable afterwards.
        names: names of the tasks' adapters.
        input_ids: (rows, tokens), all predicted.
        task: (rows,), index of the adapter of each row.
        documents: N, the number of training documents of all tasks.
        tau: τ.
    """
    parameters = dict(model.named_parameters())
    loss = torch.zeros((), device=input_ids.device)
    for d in task.unique().tolist():
        rows = input_ids[(task == d).to(input_ids.device)]
        model.set_adapter(names[d])
        loss = loss + model(input_ids=rows, labels=rows).loss * (len(rows) / len(input_ids))
    # set_adapter freezes all other adapters, but the single backward pass must reach all of them
    for name, parameter in parameters.items():
        if "lora_" in name:
            parameter.requires_grad_(True)
    penalty = torch.zeros((), device=input_ids.device)
    for name, mean in parameters.items():
        if f".{MEAN}." in name:
            for adapter in names:
                penalty = penalty + (parameters[name.replace(f".{MEAN}.", f".{adapter}.")] - mean).norm()
    return documents * loss + tau * penalty


#: The arms by name, in the order in which they take turns.
ARMS: dict[str, Callable[[Work], Arm]] = {
    "ours": Ours,
    "peft_one_adapter": PeftOneAdapter,
    "peft_trainer": PeftTrainer,
    "released": Released,
}


def alternate(
    arms: dict[str, Any], rounds: int, device: torch.device, *, extra: Callable[[], object] | None = None
) -> dict[str, list[tuple[float, int]]]:
    """Run the arms in turn, one step of each a round.

    A ``Trainer`` runs its own loop. If there is one, the other arms take their turns in its callbacks.

    Args:
        arms: arms of :data:`ARMS` by name.
        rounds: number of steps of each arm.
        device: device of the base, which is synchronised before the clock is read.
        extra: function called after each round, outside the measured time.

    Returns:
        For each arm (seconds, predicted tokens) of every step.
    """
    records: dict[str, list[tuple[float, int]]] = {name: [] for name in arms}
    names = [*arms]
    trainer = next((name for name in names if isinstance(arms[name], PeftTrainer)), None)
    first = names if trainer is None else names[: names.index(trainer)]
    last = [] if trainer is None else names[names.index(trainer) + 1 :]

    def turns(some: list[str]) -> None:
        for name in some:
            start = now(device)
            tokens = arms[name].step()
            records[name].append((now(device) - start, tokens))

    def finish() -> None:
        turns(last)
        if extra is not None:
            extra()

    if trainer is None:
        for _ in range(rounds):
            turns(first)
            finish()
    else:

        def done(seconds: float, tokens: int) -> None:
            records[trainer].append((seconds, tokens))
            finish()

        arms[trainer].run(rounds, lambda: turns(first), done)
    return records

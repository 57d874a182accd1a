"""What a reward is, and how texts get theirs: each text has a finite number, or the fit ends with one line.

>>> checked_reward(lambda prompt, text, task: len(text), "Say", "hello", "ada")
5.0
>>> checked_reward(lambda prompt, text, task: None, "Say", "hello", "ada")
Traceback (most recent call last):
bora_pyro.errors.InputError: the reward of a text of task 'ada' behind the prompt 'Say' is None; a reward is a finite number
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bora_pyro.backbone.texts import tokenizer_of
from bora_pyro.data.batch import Batch
from bora_pyro.errors import InputError, shown
from bora_pyro.model import BoRA, Weights
from bora_pyro.predict.write import unchanged, write
from bora_pyro.rewards.prompts import PromptTexts, prompt_ids

#: The most numbers that the logits of a batch of texts may have.
MOST_LOGITS = 2**27


class Reward(Protocol):
    """Any callable that says how good a text is. Only differences between texts matter to a fit, and not their unit."""

    def __call__(self, prompt: str, text: str, task: str) -> float:
        """The reward of a text: a finite number; True and False count as 1 and 0.

        Args:
            prompt: the prompt, as it is in the table.
            text: what the model wrote behind it, without special tokens.
            task: the name of the task.
        """


def checked_reward(reward: Reward, prompt: str, text: str, task: str) -> float:
    """The reward of a text.

    Raises:
        InputError: it is no finite number, or the function raises an error.
    """
    what = f"the reward of a text of task {shown(task)} behind the prompt {shown(prompt)}"
    try:
        found: Any = reward(prompt, text, task)
    except InputError:
        raise
    except Exception as error:  # the code may raise anything
        raise InputError(f"{what} cannot be computed ({type(error).__name__}: {error})") from error
    # NumPy's bool is no number to Python
    if not isinstance(found, numbers.Real) and type(found).__name__ not in ("bool", "bool_"):
        raise InputError(f"{what} is {shown(found)}; a reward is a finite number")
    try:
        value = float(found)
    except (OverflowError, ValueError):
        value = math.inf
    if not math.isfinite(value):
        raise InputError(f"{what} is {shown(found)}; a reward is a finite number")
    return value


class TextJudge:
    """Lets a model write texts behind prompts, and gets their rewards.

    Args:
        reward: the reward.
        tasks: the names of the tasks.
        prompts: the prompts as texts; None: they are decoded from their tokens.
        new_tokens: the largest number of tokens of a text.
        samples: the number of texts of each held-out prompt.
        seed: seed of these texts. It is the same after each epoch, so that epochs are compared on like draws.
    """

    def __init__(
        self,
        reward: Reward,
        tasks: Sequence[str],
        prompts: PromptTexts | None = None,
        *,
        new_tokens: int = 32,
        samples: int = 4,
        seed: int = 0,
    ) -> None:
        self.reward, self.tasks, self.prompts = reward, list(tasks), prompts
        self.new_tokens, self.samples, self.seed = new_tokens, samples, seed

    def write(
        self, model: BoRA, weights: Weights | None, prompts: Sequence[Tensor], row: Tensor, task: Tensor, *, seed: int
    ) -> list[Tensor]:
        """Sample a text behind each prompt at temperature 1.

        Args:
            model: the model.
            weights: adapters, (n, layers, *shape) by name; None: the base.
            prompts: token ids of each prompt.
            row: (prompts,) the row of each prompt's adapter in the weights.
            task: (prompts,) the task of each prompt.
            seed: seed of the texts.

        Returns:
            The tokens of each text, (tokens,) int64, with the end token if the model wrote one.
        """
        backbone, device = model.backbone, model.backbone.device

        def change_of(group: Sequence[int]) -> Any:
            index = torch.tensor(list(group), device=device)
            return unchanged if weights is None else model.change(weights, row.to(device)[index], task.to(device)[index])

        most = max(1, MOST_LOGITS // (self.new_tokens * backbone.num_token_ids))
        found = write(
            backbone,
            prompts,
            change_of,
            max_new_tokens=self.new_tokens,
            sampling={"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
            seed=seed,
            most_rows=most,
        )
        # new tensors: those of inference mode cannot be used where a gradient is computed
        return [torch.tensor(tokens.tolist(), dtype=torch.int64) for tokens, _ in found]

    def rewards(self, model: BoRA, prompts: Sequence[Tensor], texts: Sequence[Tensor], task: Tensor) -> Tensor:
        """The reward of each text, (rows,) float64.

        Raises:
            InputError: a reward is no finite number.
        """
        tokenizer = tokenizer_of(model.backbone)
        found = []
        for prompt, text, d in zip(prompts, texts, task.tolist(), strict=True):
            written = tokenizer.decode(text, skip_special_tokens=True)
            of_prompt = (
                tokenizer.decode(prompt, skip_special_tokens=True) if self.prompts is None else self.prompts.text(d, prompt)
            )
            found.append(checked_reward(self.reward, of_prompt, written, self.tasks[d]))
        return torch.tensor(found, dtype=torch.float64)

    def judged(self, model: BoRA, weights: Weights | None, batch: Batch) -> Tensor:
        """Rewards of ``samples`` texts behind each prompt of a batch of held-out prompts, (rows, samples) float64."""
        tokenizer = tokenizer_of(model.backbone)
        lengths = batch.attention_mask.sum(-1).tolist()
        documents = [ids[:length].cpu() for ids, length in zip(batch.input_ids, lengths, strict=True)]
        prompts = [prompt_ids(document, tokenizer) for document in documents for _ in range(self.samples)]
        row, task = (value.repeat_interleave(self.samples).cpu() for value in (batch.row, batch.task))
        texts = self.write(model, weights, prompts, row, task, seed=self.seed)
        return self.rewards(model, prompts, texts, task).view(-1, self.samples)

    def __call__(self, model: BoRA, weights: Weights | None, batch: Batch) -> Tensor:
        """The mean reward of the texts behind each prompt, (rows,) float64."""
        return self.judged(model, weights, batch).mean(-1)

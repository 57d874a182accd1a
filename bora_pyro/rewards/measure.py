"""How large the rewards of held-out prompts are, by task, under some adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bora_pyro.data.batch import Batch
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.model import BoRA, Weights
from bora_pyro.rewards.judge import TextJudge


@torch.inference_mode()
def rewards_of(model: BoRA, weights: Weights | None, split: TokenSplit, judge: TextJudge, *, token_budget: int = 8192) -> Tensor:
    """Rewards of the texts that a model writes behind the prompts of a split, (prompts, samples) float64.

    Args:
        model: the model.
        weights: θ of all tasks, (D, layers, *shape) by name; None: the base.
        split: the prompts.
        judge: writes and rewards the texts. They are the same in each call, as in the validation of a fit.
        token_budget: tokens of a batch of prompts.
    """
    found = torch.zeros((len(split), judge.samples), dtype=torch.float64)
    for batch in split.batches(token_budget=token_budget):
        on_device: Batch = batch.to(model.backbone.device)
        found[batch.index] = judge.judged(model, weights, on_device)
    return found


def summary(rewards: Tensor, task: Tensor, tasks: list[str]) -> dict[str | None, dict[str, Any]]:
    """Mean and standard deviation of rewards over all texts (None), and over those of each task that has prompts.

        >>> found = summary(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), torch.tensor([0, 1]), ["ada", "bob", "cleo"])
        >>> found[None]["reward"], found["ada"]
        (3.5, {'reward': 2.0, 'reward_sd': 1.0, 'prompts': 1})

    Args:
        rewards: (prompts, samples).
        task: (prompts,) the task of each prompt.
        tasks: the names of the tasks.
    """
    groups: list[tuple[str | None, Tensor]] = [(None, torch.ones_like(task, dtype=torch.bool))]
    groups += [(name, task == d) for d, name in enumerate(tasks)]
    return {
        name: {
            "reward": float(rewards[chosen].mean()),
            "reward_sd": float(rewards[chosen].std(correction=0)),
            "prompts": int(chosen.sum()),
        }
        for name, chosen in groups
        if chosen.any()
    }

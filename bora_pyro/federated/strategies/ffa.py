"""FFA-LoRA: A is random, fixed and common, and the clients' B are averaged."""

from __future__ import annotations

from bora_pyro.errors import InputError
from bora_pyro.federated.strategies.base import Strategy, check_latents, check_pooled
from bora_pyro.model import BoRA


class FFA(Strategy):
    """FFA-LoRA (Sun, Li, Li & Ding, ICLR 2024, arXiv 2403.12313): clients train B alone, the server averages B.

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> FFA().check(bp.BoRA(backbone, 2, adapter=bp.FrozenALoRA(rank=2), prior=bp.Pooled()))
        >>> FFA().check(bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2), prior=bp.Pooled()))
        Traceback (most recent call last):
        bora_pyro.errors.InputError: FFA() needs a fixed A, and the adapter is LoRA(rank=2, alpha=2.0); give ...

    With one A for all clients, mean_k(B_k A) = mean_k(B_k) A: the average of the factors is the average of the changes ΔW. A is
    the random start that every client builds from the same seed. So it never travels, and half of the numbers of LoRA do. The
    paper starts A as LoRA does, and so does this library.
    """

    def check(self, model: BoRA) -> None:
        check_pooled(self, model)
        if not any(name.endswith(".lora_A") for name in model.fixed):
            rank = getattr(model.adapter, "rank", 8)
            raise InputError(
                f"{self} needs a fixed A, and the adapter is {model.adapter}; give FrozenALoRA(rank={rank}) "
                "(--adapter lora_frozen_a)"
            )
        check_latents(self, model, {"lora_B"}, "give FrozenALoRA() (--adapter lora_frozen_a)")

"""FedIT: the clients' A and B are averaged apart."""

from __future__ import annotations

from bora_pyro.federated.strategies.base import Strategy, check_latents, check_pooled
from bora_pyro.model import BoRA


class FedIT(Strategy):
    """FedIT (Zhang et al., ICASSP 2024, arXiv 2305.05644): clients train A and B, the server averages A and B, each by itself.

        >>> FedIT().averaged({"q_proj.lora_A": 1})
        {'q_proj.lora_A': 1}

    It is federated averaging (McMahan et al., 2017) of LoRA's factors. The product of two averages is not the average of the
    products: mean(B_k) mean(A_k) differs from mean(B_k A_k), and more so the further the clients are apart. With one step a round
    the difference is small. ``FFA`` and ``ExactProduct`` do not have it.
    """

    def check(self, model: BoRA) -> None:
        check_pooled(self, model)
        check_latents(self, model, {"lora_A", "lora_B"}, "give LoRA() (--adapter lora)")

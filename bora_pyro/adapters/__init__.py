"""Adapters: which latent tensors change a linear layer, and how."""

from bora_pyro.adapters.base import Adapter, Factors
from bora_pyro.adapters.frozen_a import FrozenALoRA
from bora_pyro.adapters.lora import LoRA
from bora_pyro.adapters.lora_dropout import DropoutLoRA
from bora_pyro.adapters.mtlora import MTLoRA
from bora_pyro.adapters.nola import NOLA
from bora_pyro.adapters.osft import OSFT
from bora_pyro.adapters.sara import SaRA
from bora_pyro.adapters.shared_plus_task import SharedPlusTaskLoRA
from bora_pyro.adapters.smora import SMoRA
from bora_pyro.adapters.soka import SoKA
from bora_pyro.adapters.triadapt import TriAdaptLoRA

#: Adapters by the name that a configuration gives them.
ADAPTERS: dict[str, type[Adapter]] = {
    "lora": LoRA,
    "lora_frozen_a": FrozenALoRA,
    "lora_shared_plus_task": SharedPlusTaskLoRA,
    "lora_dropout": DropoutLoRA,
    "mtlora": MTLoRA,
    "nola": NOLA,
    "osft": OSFT,
    "sara": SaRA,
    "smora": SMoRA,
    "soka": SoKA,
    "triadapt": TriAdaptLoRA,
}

__all__ = [
    "ADAPTERS", "NOLA", "OSFT", "Adapter", "DropoutLoRA", "Factors", "FrozenALoRA", "LoRA", "MTLoRA", "SMoRA", "SaRA",
    "SharedPlusTaskLoRA", "SoKA", "TriAdaptLoRA",
]  # fmt: skip

"""How the folders of an export are checked before anybody gets them.

>>> checks = ExportChecks("vllm", "facebook/opt-350m")
>>> checks.ranks
(8, 16, 32, 64, 128, 256, 320, 512)
>>> ExportChecks("peft", "builtin:nano").ranks is None
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from bora_pyro.errors import check_one_of
from bora_pyro.exchange.peft_check import can_check, check_with_peft
from bora_pyro.exchange.vllm import RANKS, check_base_name, check_for_vllm
from bora_pyro.model import BoRA

#: ``peft``: the first folder is loaded with PEFT, if it is installed. ``rules``: only the rules by which PEFT finds the layers,
#: which are checked whenever a folder is written. ``vllm``: as ``peft``, and each folder by the rules of vLLM.
CHECKS = ("peft", "rules", "vllm")


class ExportChecks:
    """The checks of one export.

    Args:
        check: one of ``CHECKS``.
        base_model: the name of the base in the folders.

    Raises:
        InputError: the check is unknown, or vLLM cannot know the base by this name.
    """

    def __init__(self, check: str, base_model: str) -> None:
        check_one_of("check", check, CHECKS)
        self.check, self.base_model = check, base_model
        self._done, self._largest = "", 0
        if check == "vllm":
            check_base_name(base_model)

    @property
    def ranks(self) -> Sequence[int] | None:
        """The ranks that folders may have; None: any."""
        return RANKS if self.check == "vllm" else None

    def __call__(self, folder: Path, model: BoRA, weights: Mapping[str, Tensor], *, task: int | None, exact: bool) -> None:
        """Check a folder that was just written.

        Args:
            folder: the folder.
            model: the model that wrote it.
            weights: the latents that were written, by name.
            task: index of the task; None: Θ.
            exact: whether the folder has exactly these weights.

        Raises:
            InputError: PEFT or vLLM would read the folder otherwise.
        """
        if self.check == "vllm":
            self._largest = max(self._largest, check_for_vllm(folder, self.base_model))
        # all folders have the same layers, so one is enough
        if self.check != "rules" and not self._done and task is not None and can_check(model):
            self._done = str(check_with_peft(folder, model, weights, task=task, exact=exact))

    def record(self) -> dict[str, str | int]:
        """What was checked, for the record of the export: ``check``, and for vLLM ``max_lora_rank``."""
        found: dict[str, str | int] = {"check": self._done or "checked by the rules by which PEFT finds the layers"}
        return found | ({"max_lora_rank": self._largest} if self.check == "vllm" else {})

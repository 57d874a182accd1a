"""The arms of ``compare_posteriors.py``: how each posterior is made, and how its draws predict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: The guides that are computed at the MAP, without a fit.
COMPUTED = ("laplace", "laplace_kronecker", "laplace_kfac", "tfb")


@dataclass(frozen=True)
class Arm:
    """How a posterior is made.

    Attributes:
        guide: name of the guide.
        temperature: temperature of the guide; None: the validation split chooses it.
        linearised: whether the draws predict with the linear expansion of the network.
        options: further arguments of the guide's builder.
        rate_of: the arm whose learning rate it has; None: its own choice.
    """

    guide: str
    temperature: float | None = 1.0
    linearised: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    rate_of: str | None = None

    @property
    def fitted(self) -> bool:
        """Whether the guide is fitted; otherwise it is computed at the MAP."""
        return self.guide not in COMPUTED


ARMS = {
    "map_longer": Arm("map"),
    "normal": Arm("normal"),
    "structured": Arm("structured"),
    "ivon": Arm("ivon"),
    "normal_tempered": Arm("normal", temperature=0.3),
    "low_rank": Arm("low_rank"),
    "subspace": Arm("subspace"),
    "blob": Arm("blob"),
    "swag": Arm("swag"),
    "tfb": Arm("tfb"),
    "laplace": Arm("laplace"),
    "laplace_tempered": Arm("laplace", temperature=None),
    "laplace_kronecker": Arm("laplace_kronecker"),
    "laplace_kronecker_tempered": Arm("laplace_kronecker", temperature=None),
    "laplace_kfac": Arm("laplace_kfac"),
    "normal_linearised": Arm("normal", linearised=True, rate_of="normal"),
    "laplace_linearised": Arm("laplace", linearised=True),
    "laplace_linearised_tempered": Arm("laplace", temperature=None, linearised=True),
    "laplace_tasks_linearised": Arm("laplace", linearised=True, options={"draw_mean": False}),
    "laplace_kfac_linearised": Arm("laplace_kfac", linearised=True),
    "laplace_kfac_linearised_tempered": Arm("laplace_kfac", temperature=None, linearised=True),
    "laplace_kfac_tasks_linearised": Arm("laplace_kfac", linearised=True, options={"draw_mean": False}),
}
#: An ensemble as one adapter a task.
FOLDED = ("ensemble_folded", "ensemble_distilled")
#: The arms whose mixture has a row at a temperature too.
SCALED = ("ensemble", "checkpoint_ensemble", "swag")
NAMES = ("map", "map_scaled", *ARMS, "mc_dropout", "checkpoint_ensemble", "ensemble", *FOLDED)

"""The arms of ``compare_adapters.py``: adapters with about the same number of latents a task, at two budgets and below them.

A budget is what LoRA of some rank has. The options are found for the layers of a base, so that every base has the same arms.

>>> slots = [Slot("q_proj", ("q_proj",), 256, 256)]
>>> arms_of(slots, 8)["sara@8"].options
{'adapter': 'sara', 'adapter_option': ['fraction=0.0625']}

``sara_random`` and ``sara_largest`` are SaRA with as many entries, chosen otherwise: the controls of its claim to forget less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bora_pyro.adapters import ADAPTERS, Adapter, SoKA
from bora_pyro.backbone.slots import Slot
from bora_pyro.options.members import build_member

#: Budgets, as the rank of LoRA. Half a rank is below what LoRA can have.
BUDGETS = (0.5, 1.0, 8.0)


@dataclass(frozen=True)
class Arm:
    """An adapter with its options.

    Attributes:
        options: options of ``map_fit.py``.
        budget: the rank of LoRA with as many latents.
    """

    options: dict[str, Any]
    budget: float

    def build(self) -> Adapter:
        """The adapter."""
        usual = {"rank": self.options.get("rank", 8), "alpha": None}
        return build_member("adapter", ADAPTERS, self.options["adapter"], self.options.get("adapter_option", ()), usual=usual)

    def words(self) -> list[str]:
        """The options as words of a command line."""
        pairs = ((f"--{name}", *(value if isinstance(value, list) else [str(value)])) for name, value in self.options.items())
        return [word for pair in pairs for word in pair]


def arms_of(slots: Sequence[Slot], *budgets: float) -> dict[str, Arm]:
    """The arms by name, ``<adapter>@<budget>``.

    Args:
        slots: the adapted layers.
        budgets: the budgets; default: ``BUDGETS``.
    """
    found: dict[str, Arm] = {}
    layers = sum(slot.layers for slot in slots)
    for budget in budgets or BUDGETS:
        wanted = budget * sum(slot.layers * (slot.in_features + slot.out_features) for slot in slots)
        entries = sum(slot.layers * slot.in_features * slot.out_features for slot in slots)
        rank, fraction = int(budget), f"fraction={wanted / entries:.6g}"
        options: dict[str, dict[str, Any]] = {
            "lora_frozen_a": {"rank": round(wanted / sum(slot.layers * slot.out_features for slot in slots))},
            "sara": {"adapter_option": [fraction]},
        }
        if rank:
            options |= {
                "lora": {"rank": rank},
                "osft": {"rank": rank, "adapter_option": ["preserve=0.5"]},
                "soka": {"rank": _soka_rank(slots, wanted)},
            }
        for select in ("random", "largest"):
            options[f"sara_{select}"] = {"adapter": "sara", "adapter_option": [fraction, f"select={select}"]}
        if rank > 1:
            options["triadapt"] = {"rank": rank}
        else:  # with more coefficients than entries of A and B the bases would span them all
            options["nola"] = {"adapter_option": [f"bases={round(wanted / layers / 2)}"]}
        for name, of_arm in sorted(options.items()):
            found[f"{name}@{budget:g}"] = Arm({"adapter": name, **of_arm}, budget)
    return found


def _soka_rank(slots: Sequence[Slot], wanted: float) -> int:
    """The rank whose latents are nearest to the number wanted, 1 or more."""
    one = 0
    for slot in slots:
        m, n, p, q = SoKA(rank=1).sizes(slot)
        one += slot.layers * (m * n + p * q + 1)
    return max(1, round(wanted / one))

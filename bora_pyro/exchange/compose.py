"""Join adapters of different layers into one adapter.

>>> import torch
>>> low = LoraForm({"layers.0.q": {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(2, 1)}}, alpha=1.0)
>>> high = LoraForm({"layers.1.q": {"lora_A": torch.ones(2, 2), "lora_B": torch.ones(2, 2)}}, alpha=8.0)
>>> both = union_form([low, high])
>>> both.rank, both.alpha, [*both.factors]
(2, 2.0, ['layers.0.q', 'layers.1.q'])
>>> [(both.alpha / both.rank * of["lora_B"] @ of["lora_A"])[0].tolist() for of in both.factors.values()]
[[1.0, 1.0], [8.0, 8.0]]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F

from bora_pyro.errors import InputError
from bora_pyro.exchange.factors import LoraForm


def union_form(forms: Sequence[LoraForm]) -> LoraForm:
    """Adapters that change different layers, as one adapter that changes all of them. ΔW of every layer stays as it is.

    The rank is the largest of the adapters. Smaller ones get rows and columns of zeros. The scale α/r is that of the first
    adapter, and the ratio of another one's scale to it goes into its B.

    Args:
        forms: the adapters. No layer may be in two of them.

    Raises:
        InputError: two adapters change the same layer.
    """
    rank, scale = max(form.rank for form in forms), forms[0].alpha / forms[0].rank
    factors = {}
    for form in forms:
        for path, of_layer in form.factors.items():
            if path in factors:
                raise InputError(f"two of the adapters change {path!r}; only adapters of different layers can be composed")
            more, own = rank - form.rank, form.alpha / form.rank
            b = of_layer["lora_B"] if own == scale else of_layer["lora_B"] * (own / scale)
            factors[path] = {"lora_A": F.pad(of_layer["lora_A"], (0, 0, 0, more)), "lora_B": F.pad(b, (0, more))}
    return LoraForm(factors, scale * rank, max(form.relative_error for form in forms))

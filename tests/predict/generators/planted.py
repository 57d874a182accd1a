"""A planted family of adapters that are linear in their vectors, θ_d = W c_d, and tasks beside it that no method has seen."""

from __future__ import annotations

import torch

from bora_pyro.predict.generators.layout import Layout

LAYOUT = Layout({"q_proj.lora_A": (2, 3, 5), "q_proj.lora_B": (2, 4, 3)})


def planted(tasks=20, *, new=8, hidden=6, free=3, seed=0, dtype=torch.float32):
    """Vectors (tasks + new, hidden) and adapters (tasks + new, P) of ``free`` degrees of freedom, far from 0 on the mean."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn((tasks + new, free), generator=generator, dtype=torch.float64)
    lift, weight = (torch.randn((free, size), generator=generator, dtype=torch.float64) for size in (hidden, LAYOUT.size))
    scale = LAYOUT.by_entry(torch.tensor([3.0, 0.02], dtype=torch.float64))  # A and B of very different sizes
    latents = 0.5 * scale + (c @ weight) * scale
    vectors = 7 + c @ lift
    return (vectors[:tasks].to(dtype), latents[:tasks].to(dtype)), (vectors[tasks:].to(dtype), latents[tasks:].to(dtype))

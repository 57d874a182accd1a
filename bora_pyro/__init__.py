"""Bayesian hierarchical low-rank adaption (BoRA) of language models for many related text tasks, as a Pyro model.

>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> few = {"num_tasks": 3, "max_tokens": 32, "max_train_documents": 2, "max_eval_documents": 1}
>>> data = bp.load_tasks("builtin:documentation", backbone.tokenizer, **few)
>>> model = bp.BoRA(backbone, len(data.tasks), adapter=bp.LoRA(rank=2), prior=bp.HierarchicalNormal(tau=100))
>>> fitted = bp.fit(model, data, epochs=1)
>>> sorted(fitted.evaluate(data.test))[:2]
['base_test_bits_per_character', 'base_test_perplexity']
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bora_pyro.adapters import Adapter, FrozenALoRA, LoRA
    from bora_pyro.backbone.backbone import Backbone
    from bora_pyro.data import DataOptions, TaskData, load_tasks, table, talk_of_norway
    from bora_pyro.errors import InputError
    from bora_pyro.exchange.load import load_peft, read_peft
    from bora_pyro.exchange.pooling.pool import pool
    from bora_pyro.exchange.save import save_peft
    from bora_pyro.guides import laplace_guide, low_rank_guide, map_guide, normal_guide, swag_guide, tfb_guide
    from bora_pyro.inference.adapt import adapt
    from bora_pyro.inference.callbacks import Callback
    from bora_pyro.inference.ensemble import ensemble
    from bora_pyro.inference.evaluate import Scores, evaluate
    from bora_pyro.inference.fit import fit
    from bora_pyro.inference.fitted import Fitted
    from bora_pyro.inference.meta_adapt import meta_adapt
    from bora_pyro.inference.meta_fit import meta_fit
    from bora_pyro.inference.options import FitOptions
    from bora_pyro.likelihoods.choice import Choice
    from bora_pyro.likelihoods.next_tokens import CausalLM
    from bora_pyro.model import BoRA
    from bora_pyro.predict.generate import generate_side_by_side
    from bora_pyro.predict.held_out import settle
    from bora_pyro.predict.infer_task import infer_task
    from bora_pyro.predict.posterior import Posterior
    from bora_pyro.predict.token_filter import token_filter
    from bora_pyro.priors import (
        AmortisedNormal,
        Given,
        GroupedNormal,
        HierarchicalNormal,
        Independent,
        LearnedPrecision,
        Pooled,
        RandomPrecision,
        prior_from_tau,
    )
    from bora_pyro.rewards.fit import reward_fit

__version__ = "0.1.0"
__all__ = [
    "Adapter", "AmortisedNormal", "Backbone", "BoRA", "Callback", "CausalLM", "Choice", "DataOptions", "FitOptions", "Fitted",
    "FrozenALoRA", "Given", "GroupedNormal", "HierarchicalNormal", "Independent", "InputError", "LearnedPrecision", "LoRA",
    "Pooled", "Posterior", "RandomPrecision", "Scores", "TaskData", "adapt", "ensemble", "evaluate", "fit",
    "generate_side_by_side", "infer_task", "laplace_guide", "load_peft", "load_tasks", "low_rank_guide", "map_guide",
    "meta_adapt", "meta_fit", "normal_guide", "pool", "prior_from_tau", "read_peft", "reward_fit", "save_peft", "settle",
    "swag_guide", "table", "talk_of_norway", "tfb_guide", "token_filter",
]  # fmt: skip

#: Where the public names lie, for Python as the imports above are for type checkers. A name is imported when it is first used:
#: torch takes seconds to import, and ``bora --help`` needs none of it.
_MODULES = {
    "adapters": ("Adapter", "FrozenALoRA", "LoRA"),
    "backbone.backbone": ("Backbone",),
    "data": ("DataOptions", "TaskData", "load_tasks", "table", "talk_of_norway"),
    "errors": ("InputError",),
    "exchange.load": ("load_peft", "read_peft"),
    "exchange.pooling.pool": ("pool",),
    "exchange.save": ("save_peft",),
    "guides": ("laplace_guide", "low_rank_guide", "map_guide", "normal_guide", "swag_guide", "tfb_guide"),
    "inference.adapt": ("adapt",),
    "inference.callbacks": ("Callback",),
    "inference.ensemble": ("ensemble",),
    "inference.evaluate": ("Scores", "evaluate"),
    "inference.fit": ("fit",),
    "inference.fitted": ("Fitted",),
    "inference.meta_adapt": ("meta_adapt",),
    "inference.meta_fit": ("meta_fit",),
    "inference.options": ("FitOptions",),
    "likelihoods.choice": ("Choice",),
    "likelihoods.next_tokens": ("CausalLM",),
    "model": ("BoRA",),
    "predict.generate": ("generate_side_by_side",),
    "predict.held_out": ("settle",),
    "predict.infer_task": ("infer_task",),
    "predict.posterior": ("Posterior",),
    "predict.token_filter": ("token_filter",),
    "rewards.fit": ("reward_fit",),
    "priors": (
        "AmortisedNormal", "Given", "GroupedNormal", "HierarchicalNormal", "Independent", "LearnedPrecision", "Pooled",
        "RandomPrecision", "prior_from_tau",
    ),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:  # a type checker would take any name for one that __getattr__ knows

    def __getattr__(name: str) -> object:
        """A public name, or a room such as ``bp.data``, imported when it is first asked for."""
        if name in _MODULE_OF:
            value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
            value = importlib.import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""The configurations of the demos: MAP fits of an embedded base to the embedded data, in minutes on a laptop.

    >>> for config in (DemoConfig(), DemoSmolLM2Config()):
    ...     config.base_model, config.data, config.epochs, config.output_dir
    ('builtin:nano', 'builtin:documentation', 3, 'runs/demo')
    ('builtin:smollm2', 'builtin:documentation', 3, 'runs/demo-smollm2')

Every option of a MAP fit can be given; those below have other defaults. The targets and the learning rate of the first demo are
those of its own base:

    >>> for config in (DemoConfig(), DemoConfig(base_model="builtin:smollm2")):
    ...     config.targets, config.learning_rate
    (['q_proj', 'v_proj', 'fc1', 'fc2'], 0.03)
    (None, 0.01)
"""

from __future__ import annotations

from dataclasses import dataclass

from bora_pyro.options.field import by_heading, changed
from bora_pyro.runs.config.groups import HEADINGS
from bora_pyro.runs.config.map_fit import MapFitConfig

#: The base of the first demo, its layers that get an adapter, and its learning rate. A larger base would diverge at this rate.
NANO, TARGETS, RATE = "builtin:nano", ("q_proj", "v_proj", "fc1", "fc2"), 0.03


@by_heading(*HEADINGS)
@dataclass(kw_only=True)
class DemoConfig(MapFitConfig):
    """Fit the embedded base model to the embedded data: a MAP fit of some minutes that needs no file and no network."""

    max_tokens: int = changed(MapFitConfig, "max_tokens", 128)
    targets: list[str] | None = changed(
        MapFitConfig,
        "targets",
        None,
        f"layers that get an adapter, by the last part of their names (default: {' '.join(TARGETS)} of {NANO}, and the "
        "architecture's usual ones of another base)",
    )
    # a short fit needs large steps, and many
    epochs: int = changed(MapFitConfig, "epochs", 3)
    # None: that of the base, which is known when all options are
    learning_rate: float = changed(
        MapFitConfig,
        "learning_rate",
        None,
        f"AdamW's largest learning rate (default: {RATE:g} for {NANO}, and {MapFitConfig.learning_rate:g} for another base)",
    )
    token_budget: int = changed(MapFitConfig, "token_budget", 2048)
    output_dir: str = changed(MapFitConfig, "output_dir", "runs/demo")

    def __post_init__(self) -> None:
        if self.targets is None and self.base_model == NANO:
            self.targets = [*TARGETS]
        if self.learning_rate is None:
            self.learning_rate = RATE if self.base_model == NANO else MapFitConfig.learning_rate


#: The value of ``--precision`` if the demo measures which precision is the faster one.
FASTEST = "auto"


@by_heading(*HEADINGS)
@dataclass(kw_only=True)
class DemoSmolLM2Config(MapFitConfig):
    """Fit SmolLM2-135M-Instruct, a real language model, to a part of the embedded data: under ten minutes on two cores."""

    base_model: str = changed(MapFitConfig, "base_model", "builtin:smollm2")
    num_tasks: int | None = changed(MapFitConfig, "num_tasks", 12)
    max_train_documents: int | None = changed(MapFitConfig, "max_train_documents", 12)
    max_eval_documents: int | None = changed(MapFitConfig, "max_eval_documents", 4)
    max_tokens: int = changed(MapFitConfig, "max_tokens", 96)
    token_budget: int = changed(MapFitConfig, "token_budget", 1024)
    epochs: int = changed(MapFitConfig, "epochs", 3)
    # its two measurements would take more than a minute of the ten
    gradient_norm: bool = changed(MapFitConfig, "gradient_norm", False)
    precision: str = changed(
        MapFitConfig,
        "precision",
        FASTEST,
        "arithmetic of the frozen model; the adapter stays float32; auto: bfloat16 where this processor multiplies it clearly "
        "faster",
        choices=(FASTEST, "float32", "bfloat16"),
    )
    output_dir: str = changed(MapFitConfig, "output_dir", "runs/demo-smollm2")

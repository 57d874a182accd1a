"""Groups of options that several configurations share. Each group checks itself.

>>> RunOptions(threads=0).validate()
Traceback (most recent call last):
bora_pyro.errors.InputError: threads is 0; give a whole number from 1 up
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from bora_pyro.adapters import ADAPTERS
from bora_pyro.adapters.layer_options import LARGEST_RANK
from bora_pyro.backbone.loading import DEVICE_MAPS, QUANTIZATIONS
from bora_pyro.data.options import DATA
from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.inference.options import OPTIMISATION, RUN
from bora_pyro.likelihoods import LIKELIHOODS, OPTION_SCORES
from bora_pyro.options.field import check_fields, option
from bora_pyro.options.members import options_text
from bora_pyro.priors import PRIORS
from bora_pyro.priors.learned import BOUNDS, PER
from bora_pyro.routers import ROUTERS
from bora_pyro.runs.trackers import TRACKERS, check_trackers

#: The headings of ``--help``.
MODEL, PRIOR = "base model and adapter", "prior and likelihood"
HEADINGS = (DATA, MODEL, PRIOR, OPTIMISATION, RUN)
#: The value of ``--tau`` if the fit learns it.
LEARNED = "learned"
#: The value of ``--start_as`` for a prior whose centre is a given adapter.
CENTRE = "centre"
#: The value of ``--resume`` that resumes a run if the output folder contains one.
AUTO = "auto"
# Between these values, both τ and its standard deviation are float32 numbers.
_TAU = (1e-30, 1e30)


@dataclass(kw_only=True)
class SourceOptions:
    """Where the documents come from."""

    data: str | list[str] = option(
        "builtin:documentation",
        "the documents: one or several files (.csv, .tsv, .jsonl, .ndjson, .json, .parquet or .xlsx, also compressed), patterns "
        "such as 'logs/*.jsonl', or folders; or a saved datasets folder, a hub id, or builtin:documentation",
        group=DATA,
        filled=True,
    )

    def validate(self) -> None:
        """Check every value.

        Raises:
            InputError: one line with the value and what is allowed.
        """
        check_fields(self)


@dataclass(kw_only=True)
class BaseOptions:
    """The frozen language model, its device and precision, and the adapter."""

    base_model: str = option(
        "builtin:nano",
        "the frozen language model: a folder, a GGUF file, a hub id, builtin:nano or builtin:smollm2",
        group=MODEL,
        filled=True,
    )
    trust_remote_code: bool = option(
        False,
        "let a base model run code of its own on this machine; allowed on the command line only",
        group=MODEL,
        line_only=True,
    )
    quantization: str | None = option(
        None,
        "store the linear layers of the base in 4 or 8 bits; needs bitsandbytes (default: store them in --precision)",
        group=MODEL,
        choices=QUANTIZATIONS,
    )
    adapter: str = option("lora", f"how a linear layer is changed: {', '.join(ADAPTERS)}", group=MODEL, filled=True)
    adapter_option: list[str] | None = option(
        None,
        f"further arguments of the adapter, as key=value; may be repeated ({options_text(ADAPTERS, without=('rank', 'alpha'))}) "
        "(default: none)",
        group=MODEL,
        whole=True,
    )
    rank: int = option(8, "rank r of the adapter", group=MODEL, least=1, most=LARGEST_RANK)
    alpha: float | None = option(
        None, "scale of the adapter: W + (alpha/r) B A (default: the rank, so that alpha/r = 1)", group=MODEL, positive=True
    )
    start_from: str | None = option(
        None,
        "PEFT folder of a LoRA adapter in which the fit begins (default: the adapter's usual start)",
        group=MODEL,
        filled=True,
    )
    router: str = option("by_task", f"which adapter reads a token: {', '.join(ROUTERS)}", group=MODEL, filled=True)
    router_option: list[str] | None = option(
        None, "arguments of the router, as key=value; may be repeated (default: none)", group=MODEL, whole=True
    )
    targets: list[str] | None = option(
        None, "layers that get an adapter, by the last part of their names (default: the architecture's usual ones)", group=MODEL
    )
    layers: list[str] | None = option(
        None, "blocks whose layers get one: numbers, -1 for the last, 0-3, or =-4: for the last four (default: all)", group=MODEL
    )

    device: str = option("auto", "auto, cpu, cuda, cuda:1, ... or mps", group=RUN)
    device_map: str | None = option(
        None,
        "spread the base's layers over the devices as transformers' device_map does (default: all on --device)",
        group=RUN,
        choices=DEVICE_MAPS,
    )
    shard_base: bool = option(
        False, "with several processes: each stores a part of the base's layers, for a base too large for one process", group=RUN
    )
    precision: str = option(
        "float32", "arithmetic of the frozen model; the adapter stays float32", group=RUN, choices=("float32", "bfloat16")
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time", group=RUN)

    def validate(self) -> None:
        """Check every value that can be checked without the model.

        Raises:
            InputError: one line with the value and what is allowed.
        """
        check_fields(self)
        check_device(self.device)
        for name, value in (("quantization", self.quantization), ("device_map", self.device_map)):
            if self.shard_base and value is not None:
                raise InputError(f"shard_base and {name} are both given; leave one of them out")


@dataclass(kw_only=True)
class PriorOptions:
    """The prior and the likelihood."""

    prior: str | None = option(
        None, f"how tasks share: {', '.join(PRIORS)} (default: as tau, penalty and prior_form say)", group=PRIOR, filled=True
    )
    prior_option: list[str] | None = option(
        None,
        f"arguments of the prior, as key=value; may be repeated ({options_text(PRIORS)}) (default: none)",
        group=PRIOR,
        whole=True,
    )
    prior_form: str = option(
        "noncentered",
        "theta_d = Theta + deviation_d (noncentered), or theta_d itself (centered, as the paper writes it); the MAP is the same",
        group=PRIOR,
        choices=("noncentered", "centered"),
    )
    tau: float | str = option(
        LEARNED,
        "precision of the prior theta_d ~ Normal(Theta, I/tau): learned, a number, 0 (independent tasks) or inf (one shared "
        "adapter)",
        group=PRIOR,
        expects="learned, a number, 0 (independent tasks) or inf (one shared adapter)",
        words=(LEARNED,),
    )
    tau_group: float | str = option(
        LEARNED,
        "precision of the means of groups of tasks around Theta, if task_group_column names their groups: learned, or a number",
        group=PRIOR,
        expects="learned, or a number above 0",
        words=(LEARNED,),
    )
    start_as: str = option(
        "theta",
        "what the adapter of start_from is: where Theta begins (theta), or the known centre of the prior, "
        "theta_d ~ Normal(adapter, I/tau), which is not fitted (centre; needs a number for tau)",
        group=PRIOR,
        choices=("theta", CENTRE),
    )
    tau_per: str = option(
        "site",
        "what gets a tau of its own when tau is learned; a site is one factor of one kind of layer",
        group=PRIOR,
        choices=PER,
    )
    tau_start: float = option(100.0, "where a learned tau starts", group=PRIOR)
    penalty: str = option(
        "normal",
        "what tau multiplies: half the squared deviation (normal, as in the paper), or the sum of the norms of the deviation's "
        "matrices, not squared (norm, as in the released code; tau then has another unit)",
        group=PRIOR,
        choices=("normal", "norm"),
    )
    likelihood_unit: str = option(
        "tokens",
        "what counts as one observation: each token (the paper), or each document's mean (the released code)",
        group=PRIOR,
        choices=("tokens", "documents"),
    )
    option_score: str | None = option(
        None,
        "what likelihood choice compares options by: the mean of the log-probabilities of an option's tokens, or their sum "
        "(default: mean)",
        group=PRIOR,
        choices=OPTION_SCORES,
    )
    likelihood: str = option("causal_lm", f"what is observed: {', '.join(LIKELIHOODS)}", group=PRIOR, filled=True)
    likelihood_option: list[str] | None = option(
        None, "further arguments of the likelihood, as key=value; may be repeated (default: none)", group=PRIOR, whole=True
    )
    task_weights: str | None = option(
        None,
        "a .csv, .yaml or .json file with a weight for each task, which multiplies its log-likelihood (default: 1 for all)",
        group=PRIOR,
        filled=True,
    )

    def validate(self) -> None:
        """Check every value that can be checked without the data.

        Raises:
            InputError: one line with the value and what is allowed.
        """
        check_fields(self)
        if self.prior is None and self.prior_option is not None:
            raise InputError(f"prior_option is {shown(self.prior_option)}, but there is no prior; name the prior too")
        for name, usual in (("tau", LEARNED), ("tau_per", "site"), ("tau_start", 100.0), ("penalty", "normal")):
            if self.prior is not None and getattr(self, name) != usual:
                raise InputError(f"prior and {name} are both given; leave {name} out, or give it as prior_option")
        if self.tau != LEARNED and not (isinstance(self.tau, float | int) and self.tau >= 0):
            raise InputError(
                f"tau is {self.tau}; give learned, a number above 0, or 0 (independent tasks), or inf (one shared adapter)"
                f"{nearest(str(self.tau), (LEARNED,))}"
            )
        if isinstance(self.tau, float | int) and 0 < self.tau < math.inf and not _TAU[0] <= self.tau <= _TAU[1]:
            raise InputError(f"tau is {self.tau:g}; give a number between {_TAU[0]:g} and {_TAU[1]:g}, or 0, or inf")
        if self.tau_group != LEARNED and not (isinstance(self.tau_group, float | int) and _TAU[0] <= self.tau_group <= _TAU[1]):
            raise InputError(
                f"tau_group is {self.tau_group}; give learned, or a number between {_TAU[0]:g} and {_TAU[1]:g}"
                f"{nearest(str(self.tau_group), (LEARNED,))}"
            )
        if self.start_as == CENTRE and not (isinstance(self.tau, float | int) and 0 < self.tau < math.inf):
            raise InputError(
                f"start_as centre needs a number above 0 for tau, how far tasks are from the centre; here it is {self.tau}"
            )
        if self.start_as == CENTRE and (self.prior is not None or self.prior_form != "noncentered"):
            raise InputError("start_as centre is a prior of its own; leave prior and prior_form out")
        if not BOUNDS[0] <= self.tau_start <= BOUNDS[1]:
            raise InputError(f"tau_start is {self.tau_start}; a learned tau stays between {BOUNDS[0]:g} and {BOUNDS[1]:g}")
        if self.tau == LEARNED and (self.prior_form, self.penalty) != ("noncentered", "normal"):
            raise InputError(
                f"tau is learned for prior_form noncentered and penalty normal; here they are {self.prior_form} and "
                f"{self.penalty}: leave both out, or give a number for tau"
            )


@dataclass(kw_only=True)
class RunOptions:
    """The run folder, the trackers and the threads of a run."""

    threads: int | None = option(None, "CPU threads (default: torch's own choice)", group=RUN, least=1)
    trackers: list[str] | None = option(
        None, f"services that also get the metrics during the fit: {', '.join(TRACKERS)} (default: none)", group=RUN
    )
    output_dir: str = option("runs/map_fit", "folder of the run", group=RUN, filled=True)
    overwrite: bool = option(False, "replace the run in output_dir", group=RUN)
    resume: bool | str = option(
        False,
        "resume the run in output_dir from its newest checkpoint; auto: resume it if there is one, else start a new run",
        group=RUN,
        expects="true, false or auto",
        words=(AUTO,),
    )

    def validate(self) -> None:
        """Check every value, without reading the disk.

        Raises:
            InputError: one line with the value and what is allowed.
        """
        check_fields(self)
        check_trackers(self.trackers)
        if self.overwrite and self.resume:
            raise InputError(
                "overwrite and resume are both true; overwrite starts a new run, resume continues the old one: give one of them"
            )


def check_device(name: str) -> None:
    """Raise ``InputError`` if no device can have that name."""
    if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", name):
        raise InputError(f"device is {name!r}; allowed: auto, cpu, cuda, cuda:N, mps, xpu")

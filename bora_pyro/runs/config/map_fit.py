"""What a MAP fit can be told: every option of ``scripts/map_fit.py``, with its default and its help.

    >>> config = parse_config(MapFitConfig, ["--tau", "1e3", "--rank=4"])
    >>> config.tau, config.rank, config.prior_form
    (1000.0, 4, 'noncentered')

The fields' help is the documentation of the command line; ``validate`` checks the values where they enter.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from bora_pyro.backbone.loading import DEVICE_MAPS, QUANTIZATIONS
from bora_pyro.data.encode import LONG_DOCUMENTS
from bora_pyro.data.rows import Columns
from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.options.command_line import parse_config, to_yaml
from bora_pyro.options.field import check_choices, option
from bora_pyro.priors.learned import BOUNDS, PER
from bora_pyro.runs.trackers import TRACKERS, check_trackers

__all__ = ["MapFitConfig", "parse_config", "to_yaml"]

#: What ``--tau`` is where the fit finds it.
LEARNED = "learned"
#: What ``--resume`` is where the output folder tells whether there is a run to go on with.
AUTO = "auto"
DATA, MODEL, PRIOR, FIT, RUN = "data", "base model and adapter", "prior and likelihood", "optimisation", "run"


@dataclass(kw_only=True)
class MapFitConfig:
    """Fit BoRA by MAP: one frozen language model, one adapter a task, all under one hierarchical Normal."""

    data: str = option(
        "builtin:documentation",
        "the documents: a .csv, .csv.gz, .jsonl or .parquet file, a saved datasets folder, a hub id, or builtin:documentation",
        group=DATA,
    )
    task_column: str | list[str] = option(
        "task", "column that names a document's task, or several, whose names are joined by ' / '", group=DATA
    )
    text_column: str | list[str] = option(
        "text", "column that holds a document's text, or several, whose texts are joined by a blank line", group=DATA
    )
    prompt_column: str | None = option(
        None, "column with a prompt, read before the completion and not predicted (default: no prompts)", group=DATA
    )
    completion_column: str | None = option(
        None, "column with the text that follows the prompt and is predicted (default: text_column)", group=DATA
    )
    messages_column: str | None = option(
        None, "column with a chat, a list of {role, content}; the assistant's turns are predicted (default: no chats)", group=DATA
    )
    chat_template: str | None = option(
        None, "a .jinja file that writes chats, or its text (default: the tokenizer's own)", group=DATA
    )
    group_column: str | None = option(
        None, "documents that agree here stay on one side of the split (default: doc_id where the table has it)", group=DATA
    )
    split_column: str | None = option(
        None, "column that says train, validation or test (default: a seeded split by group)", group=DATA
    )
    small_tasks: str = option(
        "error", "what becomes of a task with too few documents to split", group=DATA, choices=("error", "drop")
    )
    num_tasks: int | None = option(None, "use only so many tasks (default: all)", group=DATA)
    max_tokens: int = option(256, "tokens of a document that are read, its end mark included", group=DATA)
    long_documents: str = option(
        "cut",
        "what becomes of documents of more tokens: cut, or split into pieces, each behind the document's prompt",
        group=DATA,
        choices=LONG_DOCUMENTS,
    )
    streaming: bool = option(
        False, "read a hub id or a folder of data files row by row, and keep its tokens in a file instead of memory", group=DATA
    )
    max_train_documents: int | None = option(None, "at most so many training documents of a task (default: all)", group=DATA)
    max_eval_documents: int | None = option(
        None, "at most so many validation and so many test documents of a task (default: all)", group=DATA
    )

    base_model: str = option("builtin:nano", "the frozen language model: a path, a hub id, or builtin:nano", group=MODEL)
    trust_remote_code: bool = option(
        False,
        "let a base model that brings code of its own run it on this machine; a file cannot say so",
        group=MODEL,
        line_only=True,
    )
    quantization: str | None = option(
        None,
        "store the base's linear layers in 4 or 8 bits; needs bitsandbytes (default: in --precision)",
        group=MODEL,
        choices=QUANTIZATIONS,
    )
    adapter: str = option("lora", "how a linear layer is changed", group=MODEL)
    rank: int = option(8, "rank r of the adapter", group=MODEL)
    alpha: float | None = option(
        None, "scale of the adapter: W + (alpha/r) B A (default: the rank, so that alpha/r = 1)", group=MODEL
    )
    targets: list[str] | None = option(
        None, "layers that get an adapter, by the last part of their names (default: the architecture's usual ones)", group=MODEL
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
    tau_per: str = option(
        "site", "what has a tau of its own where tau is learned: a site is a kind of layer and a factor", group=PRIOR, choices=PER
    )
    tau_start: float = option(100.0, "where a learned tau starts", group=PRIOR)
    penalty: str = option(
        "normal",
        "what tau weighs: half the squared deviation (normal, the paper), or the sum over matrices of its unsquared norms "
        "(norm, the released code; there tau has another unit)",
        group=PRIOR,
        choices=("normal", "norm"),
    )
    likelihood_unit: str = option(
        "tokens",
        "what counts as one observation: each token (the paper), or each document's mean (the released code)",
        group=PRIOR,
        choices=("tokens", "documents"),
    )

    task_weights: str | None = option(
        None,
        "a .csv, .yaml or .json file with a weight a task, the factor of its log-likelihood (default: 1 for all)",
        group=PRIOR,
    )

    epochs: int = option(6, "passes over the training documents, at most", group=FIT)
    learning_rate: float = option(1e-2, "AdamW's largest learning rate", group=FIT)
    scale_learning_rate_with_tau: bool = option(
        False, "the paper's rule, learning rate proportional to tau; for --prior_form centered only", group=FIT
    )
    warmup: float = option(0.1, "fraction of all steps in which the learning rate rises from 0", group=FIT)
    token_budget: int = option(4096, "tokens of a batch, padding included", group=FIT)
    accumulate: int = option(1, "batches whose gradients make one step", group=FIT)
    gradient_clip: float = option(1.0, "largest norm of the whole gradient; inf does not clip", group=FIT)
    task_subsampling: bool | None = option(
        None,
        "move only the adapters of the tasks that a step's documents are of, so that its cost does not depend on the number of "
        "tasks (default: with more than 64 tasks, or several processes)",
        group=FIT,
    )
    patience: int = option(3, "stop after so many epochs without a better validation perplexity; 0 never stops early", group=FIT)
    seed: int = option(0, "seed of the split, the start and the order of the documents", group=FIT)

    device: str = option("auto", "auto, cpu, cuda, cuda:1, ... or mps", group=RUN)
    device_map: str | None = option(
        None,
        "spread the base's layers over the devices as transformers' device_map does (default: all on --device)",
        group=RUN,
        choices=DEVICE_MAPS,
    )
    shard_base: bool = option(
        False, "with several processes: each holds a part of the base's layers, where one cannot hold all", group=RUN
    )
    precision: str = option(
        "float32", "arithmetic of the frozen model; the adapter stays float32", group=RUN, choices=("float32", "bfloat16")
    )
    gradient_checkpointing: bool = option(False, "less memory, more time", group=RUN)
    task_memory: float = option(
        4.0, "GiB for what belongs to tasks where they are drawn; beyond it they lie in memory-mapped files", group=RUN
    )
    threads: int | None = option(None, "CPU threads (default: torch's own choice)", group=RUN)
    checkpoint_every: int = option(1, "epochs between checkpoints", group=RUN)
    checkpoint_minutes: float = option(
        10.0, "minutes after which a checkpoint is written within an epoch too; inf: at its end alone", group=RUN
    )
    keep_checkpoints: int = option(2, "how many of the newest checkpoints are kept", group=RUN)
    trackers: list[str] | None = option(
        None, f"where else the numbers go while the fit runs: {', '.join(TRACKERS)} (default: nowhere)", group=RUN
    )
    output_dir: str = option("runs/map_fit", "the run's folder", group=RUN)
    overwrite: bool = option(False, "replace the run that output_dir holds", group=RUN)
    resume: bool | str = option(
        False,
        "go on with the run that output_dir holds, from its newest checkpoint; auto: where it holds one, else start one",
        group=RUN,
        expects="true, false or auto",
        words=(AUTO,),
    )

    def validate(self) -> None:
        """Check every value that needs no data and no model to be checked.

            >>> MapFitConfig(rank=0).validate()
            Traceback (most recent call last):
            bora_pyro.errors.InputError: rank is 0; give a whole number from 1 up

        Raises:
            InputError: one line with the value and what is allowed.
        """
        check_choices(self)
        for name in _NAMES:
            value = getattr(self, name)
            values = value if isinstance(value, list) else [] if value is None else [value]
            if any(not text.strip() for text in values):
                raise InputError(f"{name} is empty; give a name, or leave it out for its default")
        Columns.given(**{name: getattr(self, name) for name in _NAMES if name.endswith("_column")})
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; give a whole number from {least} up")
            if value is not None and value > (most := _MOST.get(name, 2**31 - 1)) and name != "seed":
                raise InputError(f"{name} is {shown(value)}; give a whole number of at most {most}")
        if self.seed >= 2**32:
            raise InputError(f"seed is {self.seed}; give a whole number below 2**32")
        for name in ("alpha", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} is {value}; give a finite number above 0")
        if not self.checkpoint_minutes >= 0:
            raise InputError(f"checkpoint_minutes is {self.checkpoint_minutes}; give minutes from 0 (every step) up, or inf")
        if not self.task_memory >= 0:
            raise InputError(f"task_memory is {self.task_memory}; give GiB from 0 (all in files) up")
        if not self.gradient_clip > 0:
            raise InputError(f"gradient_clip is {self.gradient_clip}; give a number above 0, or inf for no clipping")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"warmup is {self.warmup}; give a fraction of the steps, from 0 to 1")
        if self.tau != LEARNED and not (isinstance(self.tau, float | int) and self.tau >= 0):
            raise InputError(
                f"tau is {self.tau}; give learned, a number above 0, or 0 (independent tasks), or inf (one shared adapter)"
                f"{nearest(str(self.tau), (LEARNED,))}"
            )
        if isinstance(self.tau, float | int) and 0 < self.tau < math.inf and not _TAU[0] <= self.tau <= _TAU[1]:
            raise InputError(
                f"tau is {self.tau:g}; give a number between {_TAU[0]:g} and {_TAU[1]:g}, or 0, or inf, which it is nearly"
            )
        if not BOUNDS[0] <= self.tau_start <= BOUNDS[1]:
            raise InputError(f"tau_start is {self.tau_start}; a learned tau stays between {BOUNDS[0]:g} and {BOUNDS[1]:g}")
        if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", self.device):
            raise InputError(f"device is {self.device!r}; allowed: auto, cpu, cuda, cuda:N, mps, xpu")
        check_trackers(self.trackers)
        self._validate_together()

    def _validate_together(self) -> None:
        if self.token_budget < self.max_tokens:
            raise InputError(
                f"token_budget is {self.token_budget}, less than one document of max_tokens {self.max_tokens}; "
                f"give token_budget {self.max_tokens} or more, or lower max_tokens"
            )
        if self.scale_learning_rate_with_tau and (self.prior_form != "centered" or self.tau in (0, math.inf, LEARNED)):
            raise InputError(
                "scale_learning_rate_with_tau is a remedy for the centred prior at a tau above 0 and below inf; "
                f"here prior_form is {self.prior_form!r} and tau {self.tau}: leave it out, or give --prior_form centered"
            )
        if self.tau == LEARNED and (self.prior_form, self.penalty) != ("noncentered", "normal"):
            raise InputError(
                f"tau is learned for prior_form noncentered and penalty normal; here they are {self.prior_form} and "
                f"{self.penalty}: leave them out, or give a number for tau"
            )
        for name in ("quantization", "device_map"):
            if self.shard_base and getattr(self, name) is not None:
                raise InputError(f"shard_base and {name} are both given; leave one of them out")
        if self.overwrite and self.resume:
            raise InputError("overwrite and resume are both true; overwrite starts anew, resume goes on: give one of them")


# Options that are names, and cannot be empty.
_NAMES = (
    "data", "task_column", "text_column", "prompt_column", "completion_column", "messages_column", "chat_template",
    "group_column", "split_column", "task_weights", "base_model", "adapter", "output_dir",
)  # fmt: skip
# Between these both τ and its standard deviation have a place in float32.
_TAU = (1e-30, 1e30)
# The largest value of a whole number, where memory for it would be asked for at once; of any other it is 2^31 - 1.
_MOST = {"rank": 2**16}
# The least value of each whole number.
_LEAST = {
    "num_tasks": 1,
    "max_tokens": 2,  # the first token is only read, so one token predicts nothing
    "max_train_documents": 1,
    "max_eval_documents": 1,
    "rank": 1,
    "epochs": 1,
    "token_budget": 2,
    "accumulate": 1,
    "patience": 0,
    "seed": 0,
    "threads": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
}

"""The configuration of a fit from rewards.

>>> config = parse_config(RewardFitConfig, ["--prompts", "prompts.csv", "--reward", "builtin:length", "--tau", "10"])
>>> config.map_fit.data, config.map_fit.text_column, config.map_fit.tau
('prompts.csv', 'prompt', 10.0)
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from bora_pyro.data.options import DATA, DataOptions
from bora_pyro.data.readers.options import ReadingOptions, check_reading
from bora_pyro.errors import InputError
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import by_heading, changed, check_fields, option, part_of
from bora_pyro.rewards.options import REWARD, RewardOptions
from bora_pyro.runs.config.groups import HEADINGS, MODEL, BaseOptions, PriorOptions, RunOptions, SourceOptions
from bora_pyro.runs.config.map_fit import MapFitConfig

__all__ = ["RewardFitConfig", "parse_config"]


@by_heading(*HEADINGS[:-2], REWARD, *HEADINGS[-2:])
@dataclass(kw_only=True)
class RewardFitConfig(RunOptions, RewardOptions, BaseOptions, ReadingOptions):
    """Fit adapters to rewards: the adapted model writes behind prompts, and a function says how good each text is."""

    prompts: str | list[str] = changed(
        SourceOptions,
        "data",
        "",
        "the prompts: one or several tables (.csv, .jsonl, .parquet, ...) with a prompt in each row",
        filled=False,
    )
    prompt_column: str = option("prompt", "column with the prompt, a text that the model continues", group=DATA, filled=True)
    task_column: str | list[str] = changed(DataOptions, "task_column", "task", "column that names a prompt's task, or several")
    group_column: str | None = changed(DataOptions, "group_column", None)
    task_group_column: str | None = changed(DataOptions, "task_group_column", None)
    split_column: str | None = changed(DataOptions, "split_column", None)
    hub_split: str | None = changed(DataOptions, "hub_split", None)
    split_seed: int | None = changed(DataOptions, "split_seed", None)
    small_tasks: str = changed(DataOptions, "small_tasks", "error")
    num_tasks: int | None = changed(DataOptions, "num_tasks", None)
    max_tokens: int = changed(
        DataOptions, "max_tokens", 256, "the most tokens of a prompt, its end mark included; longer ones are refused"
    )
    max_train_documents: int | None = changed(DataOptions, "max_train_documents", None)
    max_eval_documents: int | None = changed(DataOptions, "max_eval_documents", None)

    start_run: str | None = option(
        None, "run folder with these tasks and this kind of adapters, at which the fit begins (default: none)", group=MODEL,
        filled=True,
    )  # fmt: skip

    prior: str | None = changed(PriorOptions, "prior", None)
    prior_option: list[str] | None = changed(PriorOptions, "prior_option", None)
    prior_form: str = changed(PriorOptions, "prior_form", "noncentered")
    tau: float = changed(
        PriorOptions,
        "tau",
        100.0,
        "precision of the prior theta_d ~ Normal(Theta, I/tau): a number, 0 (independent tasks) or inf (one shared adapter)",
        expects="a number, 0 (independent tasks) or inf (one shared adapter)",
        words=(),
    )
    task_weights: str | None = changed(PriorOptions, "task_weights", None)

    reward: str = option(
        "",
        "how good a text is: builtin:length, builtin:regex, builtin:log_likelihood, or module:function, a function "
        "(prompt, text, task) -> number (needs trust_reward_code)",
        group=REWARD,
    )
    reward_option: list[str] | None = option(
        None,
        "arguments of a built-in reward, as key=value; may be repeated (length target=none; regex pattern=... "
        "per_character=false; log_likelihood run=FOLDER) (default: none)",
        group=REWARD,
        whole=True,
    )
    trust_reward_code: bool = option(
        False,
        "let the module of --reward run its code on this machine; allowed on the command line only",
        group=REWARD,
        line_only=True,
    )
    export_adapters: bool = changed(MapFitConfig, "export_adapters", True)
    output_dir: str = changed(RunOptions, "output_dir", "runs/reward_fit")

    def validate(self) -> None:
        """Check every value that can be checked without the prompts and the model.

            >>> RewardFitConfig(prompts="prompts.csv").validate()
            Traceback (most recent call last):
            bora_pyro.errors.InputError: there is no reward; give --reward module:function, or builtin:length, ...

        Raises:
            InputError: one line with the value and what is allowed.
        """
        if not self.prompts:
            raise InputError("there are no prompts; give --prompts with a table of them")
        if not self.reward.strip():
            raise InputError(
                "there is no reward; give --reward module:function, or builtin:length, builtin:regex or builtin:log_likelihood"
            )
        check_fields(self)
        check_reading(self)
        RunOptions.validate(self)
        part_of(self, RewardOptions).validate()
        if self.shard_base:
            raise InputError("shard_base is true, but a fit from rewards runs in one process; leave it out")
        if self.start_run is not None and self.start_from is not None:
            raise InputError("start_run and start_from are both given; leave one of them out")
        if self.task_group_column is not None and not 0 < self.tau < math.inf:
            raise InputError(f"task_group_column is given and tau is {self.tau}; give a number above 0 for tau")
        self.map_fit.validate()

    @property
    def map_fit(self) -> MapFitConfig:
        """The configuration of a MAP fit to the prompts as texts, with the same base, adapter and prior."""
        names = {field.name for field in dataclasses.fields(self)} & {field.name for field in dataclasses.fields(MapFitConfig)}
        own = {name: getattr(self, name) for name in names if name not in ("resume", "prompt_column")}
        if self.prior is not None:
            own = {name: value for name, value in own.items() if name != "tau"}
        groups = {} if self.task_group_column is None else {"tau_group": self.tau}
        budget = max(self.token_budget, self.max_tokens)
        form = {"data": self.prompts, "text_column": self.prompt_column, "document_form": "text", "token_budget": budget}
        return MapFitConfig(**{**own, **form, **groups})

"""The configuration of the fit of a generator.

>>> config = parse_config(GeneratorFitConfig, ["runs/demo", "--method", "ridge"])
>>> config.run, config.method, config.documents
('runs/demo', 'ridge', 30)
"""

from __future__ import annotations

from dataclasses import dataclass

from bora_pyro.errors import InputError
from bora_pyro.inference.options import RUN, FitOptions
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import changed, check_fields, option
from bora_pyro.options.members import build_member, options_text
from bora_pyro.predict.generators import METHODS, Method
from bora_pyro.predict.task_vector import DOCUMENTS, STATES
from bora_pyro.runs.config.groups import BaseOptions, RunOptions, check_device

__all__ = ["GeneratorFitConfig", "parse_config"]

VECTOR, GENERATOR = "task vector", "generator"
#: Draws of a task's adapter, if the run has a posterior.
DRAWS = 8


@dataclass(kw_only=True)
class GeneratorFitConfig:
    """Fit a generator of adapters to a finished run: it predicts the adapter of a task from a vector of its documents."""

    run: str = option("", "folder of a finished fit, its output_dir", positional=True)

    documents: int = option(
        DOCUMENTS, "at most so many training documents of a task make its vector, drawn at random", group=VECTOR, least=1
    )
    states: str = option(
        "last",
        "what a document gives: the base's last hidden state at its last token, or the mean over its tokens",
        group=VECTOR,
        choices=STATES,
    )

    method: str = option(
        "cvae", f"how an adapter is predicted from a vector: {', '.join(METHODS)}", group=GENERATOR, choices=tuple(METHODS)
    )
    method_option: list[str] | None = option(
        None,
        f"arguments of the method, as key=value; may be repeated ({options_text(METHODS)}) (default: none)",
        group=GENERATOR,
        whole=True,
    )
    draws: int | None = option(
        None,
        f"draws of each task's adapter from the posterior of the run, for cvae; 0: the centres alone (default: {DRAWS}, or 0 if "
        "the run is a point estimate)",
        group=GENERATOR,
        least=0,
    )
    components: int | None = option(
        None,
        "directions of the basis in which adapters are predicted, those in which tasks differ most (default: all, one fewer than "
        "tasks)",
        group=GENERATOR,
        least=1,
    )
    left_out: bool = option(
        True, "leave each task out in turn and predict its adapter; takes as many fits as there are tasks", group=GENERATOR
    )
    seed: int = changed(FitOptions, "seed", 0, "seed of the fit, of the draws and of the choice of documents", group=GENERATOR)

    token_budget: int = option(4096, "tokens of a batch, padding included", group=RUN, least=1)
    trust_remote_code: bool = changed(BaseOptions, "trust_remote_code", False, group=RUN)
    device: str = changed(BaseOptions, "device", "auto")
    threads: int | None = changed(RunOptions, "threads", None)
    output_dir: str = changed(RunOptions, "output_dir", "runs/generator", "folder of the generator")
    overwrite: bool = changed(RunOptions, "overwrite", False, "replace the generator in output_dir")

    def validate(self) -> None:
        """Check every value that can be checked without the run.

            >>> GeneratorFitConfig(run="runs/demo", method="rigde").validate()
            Traceback (most recent call last):
            bora_pyro.errors.InputError: method is 'rigde'; allowed: cvae, ridge, nearest, mean; did you mean 'ridge'?

        Raises:
            InputError: one line with the value and what is allowed.
        """
        if not self.run.strip():
            raise InputError("no run is given; name the folder of a fit, as in generator_fit.py runs/map_fit")
        check_fields(self)
        check_device(self.device)
        self.build_method()

    def build_method(self) -> Method:
        """The method with its options, before the fit."""
        return build_member("method", METHODS, self.method, self.method_option or ())

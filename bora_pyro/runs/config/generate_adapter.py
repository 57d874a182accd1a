"""The configuration of adapters that a generator makes for new tasks.

>>> config = parse_config(GenerateAdapterConfig, ["runs/generator", "--data", "new.csv", "--held_out", "0.5"])
>>> config.generator, config.data, config.held_out
('runs/generator', 'new.csv', 0.5)
"""

from __future__ import annotations

from dataclasses import dataclass

from bora_pyro.data.options import DATA
from bora_pyro.errors import InputError
from bora_pyro.inference.options import RUN, FitOptions
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import by_heading, changed, option
from bora_pyro.runs.config.groups import BaseOptions, RunOptions, check_device
from bora_pyro.runs.config.new_documents import NewDocuments

__all__ = ["GenerateAdapterConfig", "parse_config"]

GENERATION = "generation"


@by_heading("options", DATA, GENERATION, RUN)
@dataclass(kw_only=True)
class GenerateAdapterConfig(NewDocuments):
    """Make the adapters of new tasks from some of their documents by a generator, without training."""

    generator: str = option("", "folder of a generator, the output_dir of generator_fit.py", positional=True)

    documents_read: int | None = option(
        None,
        "at most so many documents of a task make its vector, drawn at random (default: as for the generator)",
        group=GENERATION,
        least=1,
    )
    held_out: float = option(
        0.0, "share of each task's documents that the vector does not see, for perplexities", group=GENERATION
    )
    draws: int = option(
        0, "also write so many draws of each adapter, <task>--draw-0 and so on; needs a generator of method cvae",
        group=GENERATION, least=0, most=1000,
    )  # fmt: skip
    token_budget: int | None = changed(
        FitOptions, "token_budget", None, "tokens of a batch, padding included (default: as in the fit)", group=GENERATION
    )
    seed: int = changed(FitOptions, "seed", 0, "seed of the choice of documents", group=GENERATION)

    base_model: str | None = changed(
        BaseOptions, "base_model", None, "where the base of the generator is (default: where the fit had it)", group=RUN
    )
    trust_remote_code: bool = changed(BaseOptions, "trust_remote_code", False, group=RUN)
    device: str = changed(BaseOptions, "device", "auto")
    threads: int | None = changed(RunOptions, "threads", None)
    output_dir: str = changed(RunOptions, "output_dir", "runs/generated", "folder of the adapters")
    overwrite: bool = changed(RunOptions, "overwrite", False, "replace the adapters in output_dir")

    def validate(self) -> None:
        """Check every value that can be checked without the generator.

            >>> GenerateAdapterConfig(generator="runs/generator", data="new.csv", held_out=1.0).validate()
            Traceback (most recent call last):
            bora_pyro.errors.InputError: held_out is 1.0; give a share from 0 to below 1, such as 0.5

        Raises:
            InputError: one line with the value and what is allowed.
        """
        if not self.generator.strip():
            raise InputError("no generator is given; name its folder, as in generate_adapter.py runs/generator --data new.csv")
        super().validate()
        check_device(self.device)
        if not 0 <= self.held_out < 1:
            raise InputError(f"held_out is {self.held_out}; give a share from 0 to below 1, such as 0.5")

"""A console command: its configuration, the function that it runs, what it prints, and its exit code.

>>> from dataclasses import dataclass
>>> from bora_pyro.options.field import option
>>> @dataclass
... class Walk:
...     steps: int = option(10, "how many steps to take")
>>> walk = Command("walk", Walk, lambda config: 0.75 * config.steps, lambda config, metres: print(f"{metres:g} m"))
>>> walk.main(["--steps", "4"])
3 m
0

:mod:`bora_pyro.cli` lists the commands.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import transformers

from bora_pyro.errors import InputError
from bora_pyro.inference.processes import is_first
from bora_pyro.options.command_line import parse_config
from bora_pyro.runs.fitting import RunStopped

ConfigT = TypeVar("ConfigT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Command(Generic[ConfigT, ResultT]):
    """A command of ``bora``.

    Args:
        name: name of the command, as in ``bora map-fit``. The script of this command is then ``map_fit.py``.
        configuration: the dataclass of the options.
        run: runs the command and returns the result.
        show: prints the result, in the first process only. None: ``run`` prints it.
    """

    name: str
    configuration: type[ConfigT]
    run: Callable[[ConfigT], ResultT]
    show: Callable[[ConfigT, ResultT], object] | None = None

    @property
    def script(self) -> str:
        """The name of the script that runs this command."""
        return f"{self.name.replace('-', '_')}.py"

    def main(self, argv: Sequence[str], *, prog: str | None = None, others: Mapping[str, type] | None = None) -> int:
        """Run the command. An input error is printed as one line on stderr.

        Args:
            argv: the arguments, without the name of the command.
            prog: the program's name in ``--help``; default: the name of the script.
            others: configurations of all commands by the name of the script, to recognise a file of another command.

        Returns:
            The exit code: 0, 2 after bad input, 128 + the signal's number if a signal stopped the run.
        """
        transformers.utils.logging.disable_progress_bar()
        try:
            config = parse_config(self.configuration, argv, prog=prog or self.script, others=others)
            result = self.run(config)
            if self.show is not None and is_first():
                self.show(config, result)
        except InputError as error:
            return _end(f"error: {error}", 2)
        except RunStopped as stopped:
            return _end(str(stopped), stopped.exit_code)
        return 0


def _end(message: str, exit_code: int) -> int:
    """Print why the command ends, in the first process only."""
    if is_first():
        print(message, file=sys.stderr)
    return exit_code

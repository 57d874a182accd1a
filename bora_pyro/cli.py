"""The console command ``bora``: a dictionary of its commands.

    bora map-fit --data speeches.csv --base_model facebook/opt-350m --output_dir runs/speeches

``bora --help`` lists the commands, and ``bora map-fit --help`` lists the options of one command. Each command has a script that
does the same: ``scripts/map_fit.py`` is ``bora map-fit``.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from bora_pyro.errors import nearest, shown
from bora_pyro.options.command_line import run_script

if TYPE_CHECKING:
    from bora_pyro.runs.command import Command

#: Name -> (place of the command, one line about it). The place is a text, so that a command's module is imported only when the
#: command is called. The modules import torch, which takes seconds; ``bora --help`` does not need them.
COMMANDS: dict[str, tuple[str, str]] = {
    "preview": ("bora_pyro.runs.preview:COMMAND", "show how a fit would read a file: columns, tasks, splits, two documents"),
    "map-fit": ("bora_pyro.runs.fit_commands:MAP_FIT", "fit BoRA by MAP: an adapter for each task, all under one prior"),
    "demo": ("bora_pyro.runs.fit_commands:DEMO", "fit the embedded base model to the embedded data, without a file or a network"),
    "demo-smollm2": ("bora_pyro.runs.fit_commands:DEMO_SMOLLM2", "fit SmolLM2-135M-Instruct to a part of the embedded data"),
    "posterior-fit": ("bora_pyro.runs.fit_commands:POSTERIOR_FIT", "fit a posterior around a finished MAP fit"),
    "ensemble": ("bora_pyro.runs.ensemble:COMMAND", "fit several MAP fits with other starts, and average their predictions"),
    "continual-fit": ("bora_pyro.runs.continual:COMMAND", "fit tasks one after another, each merged into the base"),
    "meta-fit": ("bora_pyro.runs.meta_fit:COMMAND", "fit a point from which a few gradient steps adapt each task (ABMLL)"),
    "reward-fit": ("bora_pyro.runs.reward_fit:COMMAND", "fit adapters to rewards of what they write behind prompts"),
    "federated": ("bora_pyro.runs.federated:COMMAND", "simulate clients that keep their documents and share a prior"),
    "federated-server": ("bora_pyro.runs.federated_server:COMMAND", "run the server of a federated fit between processes"),
    "federated-client": ("bora_pyro.runs.federated_client:COMMAND", "run a client of a federated fit: its documents stay here"),
    "adapt": ("bora_pyro.runs.fit_commands:ADAPT", "adapt a finished fit to new tasks with few documents each"),
    "generator-fit": ("bora_pyro.runs.generator_fit:COMMAND", "fit a generator: a task's documents in, its adapter out"),
    "generate-adapter": ("bora_pyro.runs.generate_adapter:COMMAND", "make adapters of new tasks by a generator, untrained"),
    "route-fit": ("bora_pyro.runs.route_fit:COMMAND", "fit gates that choose an adapter for each token (MeteoRA)"),
    "tau-sweep": ("bora_pyro.runs.tau_sweep:COMMAND", "fit a range of tau; the validation split chooses one"),
    "diagnose": ("bora_pyro.runs.diagnose:COMMAND", "draw the shrinkage of a finished run, and compare it with other runs"),
    "calibrate": ("bora_pyro.runs.calibrate:COMMAND", "check a run's probabilities and its uncertainty on its test documents"),
    "report": ("bora_pyro.report.make_page:COMMAND", "make the HTML page of a run, of a sweep, or of a folder of runs"),
    "generate": ("bora_pyro.runs.generate:COMMAND", "continue a prompt by several tasks' adapters, side by side"),
    "infer-task": ("bora_pyro.runs.infer_task:COMMAND", "say which task of a finished run a text is of"),
    "export-adapters": ("bora_pyro.report.export:COMMAND", "export a run's adapters as PEFT folders with model cards"),
    "fold": ("bora_pyro.runs.fold:COMMAND", "fold several fits of the same tasks into one adapter a task"),
    "compose": ("bora_pyro.runs.compose:COMMAND", "join fits of the same tasks that adapt different layers, without training"),
    "pool-adapters": ("bora_pyro.runs.pool:COMMAND", "pool LoRA adapters that were trained independently"),
}


def main() -> NoReturn:
    """Run the command that the command line names, and end the program with its exit code."""
    run_script(run)


def run(argv: list[str]) -> int:
    """Run the command that the first argument names, with the other arguments; return the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    name, *arguments = argv
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS) or "; bora --help lists them all"
        print(f"error: unknown command {shown(name)}{hint}", file=sys.stderr)
        return 2
    return command(name).main(arguments, prog=f"bora {name}", others=CONFIGURATIONS)


def script_main(name: str) -> Callable[[list[str]], int]:
    """The function ``main`` of the script of a command."""
    return lambda argv: command(name).main(argv, others=CONFIGURATIONS)


def command(name: str) -> Command[Any, Any]:
    """A command by its name."""
    place, _ = COMMANDS[name]
    return pkgutil.resolve_name(place)


def help_text() -> str:
    """The text of ``bora --help``, with one line for each command."""
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {about}" for name, (_, about) in COMMANDS.items())
    return "\n".join(["usage: bora COMMAND [options]", "", "commands:", *lines, "", "The options: bora COMMAND --help"])


class _Configurations(Mapping[str, type]):
    """The configuration of each command by the name of its script, imported when it is looked up."""

    def __getitem__(self, script: str) -> type:
        return command(script.removesuffix(".py").replace("_", "-")).configuration

    def __iter__(self) -> Iterator[str]:
        return (f"{name.replace('-', '_')}.py" for name in COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


#: Configurations by the name of the script. With them, a command recognises a configuration file of another command.
CONFIGURATIONS: Mapping[str, type] = _Configurations()


if __name__ == "__main__":
    main()

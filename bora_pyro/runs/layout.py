"""Names of the files in a run folder, and checks for entries that no run wrote.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> _ = (folder / CONFIG).write_text(HEADER), (folder / "thesis.tex").write_text("years of work")
>>> is_ours(folder), foreign_entries(folder, [CONFIG, "thesis.tex"], within=True)
(True, ['thesis.tex'])
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

CONFIG, FIT, LOG, METRICS, SPLIT = "config.yaml", "fit.yaml", "metrics.jsonl", "metrics.json", "split.json"
#: Identifies the MAP fit that a posterior was made around.
SOURCE = "source.json"
#: The record of a fold: what was folded, and what it costs.
FOLD = "fold.json"
#: The record of a composition: which fits were joined.
COMPOSE = "compose.json"
#: Name of the tensors of the adapter that a fit started from.
START = "start"
CHECKPOINTS, ADAPTERS, DIAGNOSTICS, REPORT = "checkpoints", "adapters", "diagnostics", "report.html"
#: The documents of tasks that were added to a routed run: two files for each addition, named by its number.
ADDED = "added"
#: The members of an ensemble: a run folder for each, named by its number.
MEMBERS = "members"
#: The guide of a meta-fit, unless it is that of a posterior around another fit.
TASK_NORMAL = "task_normal"
#: The option in ``config.yaml`` that federated fits alone have.
CLIENTS = "clients"
#: The option in ``config.yaml`` that fits from rewards alone have.
REWARD = "reward"
#: The same for the server and for the clients of a federated fit between processes.
NUM_CLIENTS, SERVER = "num_clients", "server"
#: Name of the tensors that such a server has: the common values, and a learned τ.
COMMON = "common"
#: The folders in which trackers keep their files.
TRACKED = ("tensorboard", "wandb")
#: Lock file of the process that is writing to the folder.
LOCK = ".lock"
#: First line of a run's config.yaml. Nothing is ever deleted from a folder whose config.yaml does not begin with it.
HEADER = "# bora_pyro run: the resolved configuration"
_OURS = (
    CONFIG,
    FIT,
    SOURCE,
    LOG,
    METRICS,
    SPLIT,
    REPORT,
    "posterior.safetensors",
    f"{START}.safetensors",
    f"{COMMON}.safetensors",
    CHECKPOINTS,
    ADAPTERS,
    ADDED,
    DIAGNOSTICS,
    MEMBERS,
    *TRACKED,
)
# Names that a run writes inside its folders. The trackers' folders are left out: their files are not known here.
_WITHIN = {
    ADAPTERS: re.compile(r"\.?tasks\.json(\.tmp)?|[^/]+/(adapter_config\.(json|tmp)|adapter_model\.safetensors)?"),
    ADDED: re.compile(r"\.?\d+\.(yaml|json)(\.tmp)?"),
    CHECKPOINTS: re.compile(r"\.?step-\d+\.safetensors(\.tmp)?|task-rows-\w+"),
    DIAGNOSTICS: re.compile(r"\.?[\w-]+\.(png|csv|nc)(\.tmp)?"),
}


def is_ours(folder: Path) -> bool:
    """Whether the folder belongs to a run: its ``config.yaml`` begins with :data:`HEADER`."""
    file = folder / CONFIG
    return file.is_file() and file.read_bytes().startswith(HEADER.encode())


def foreign_entries(folder: Path, names: Sequence[str], *, within: bool) -> list[str]:
    """Find entries of a folder that no run wrote. In a folder that belongs to no run these are all entries.

    Args:
        folder: the folder.
        names: the names of its entries to check.
        within: also check the files inside the run's own folders.

    Returns:
        The names of the foreign entries, those inside a folder as ``folder/name``.
    """
    ours = _OURS if is_ours(folder) else ()
    temporary = {LOCK, *(f".{name}.tmp" for name in ours or (CONFIG,))}
    foreign = [name for name in names if name not in ours and name not in temporary]
    for name, written in _WITHIN.items() if within else ():
        entries = (folder / name).rglob("*")
        paths = [entry.relative_to(folder / name).as_posix() + "/" * entry.is_dir() for entry in entries]
        foreign += sorted(f"{name}/{path}" for path in paths if not written.fullmatch(path))
    for member in sorted((folder / MEMBERS).iterdir()) if within and MEMBERS in ours and (folder / MEMBERS).is_dir() else ():
        found = [member.name]
        if member.is_dir() and member.name.isdecimal():
            own = foreign_entries(member, sorted(entry.name for entry in member.iterdir()), within=True)
            found = [f"{member.name}/{name}" for name in own]
        foreign += [f"{MEMBERS}/{name}" for name in found]
    return foreign


def clear(folder: Path, names: Sequence[str]) -> None:
    """Delete a run's entries except its lock. ``config.yaml`` goes last, so that an interrupted deletion still looks like a run.

    Args:
        folder: the run folder.
        names: the names of the entries to delete.
    """
    for name in sorted(names, key=lambda name: name == CONFIG):
        if name == LOCK:
            continue
        entry = folder / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()

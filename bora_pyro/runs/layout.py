"""What stands in a run folder under which name, and what there is somebody's own.

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
#: By which a posterior knows the fit again around which it was made.
SOURCE = "source.json"
CHECKPOINTS, ADAPTERS, DIAGNOSTICS, REPORT = "checkpoints", "adapters", "diagnostics", "report.html"
#: The folders in which trackers keep their files.
TRACKED = ("tensorboard", "wandb")
#: Held by the process that is at work in the folder.
LOCK = ".lock"
#: The first line of our config.yaml: nothing is ever deleted from a folder whose config.yaml lacks it.
HEADER = "# bora_pyro run: the resolved configuration"
_OURS = (CONFIG, FIT, SOURCE, LOG, METRICS, SPLIT, REPORT, "posterior.safetensors", CHECKPOINTS, ADAPTERS, DIAGNOSTICS, *TRACKED)
# What a run writes in its folders; of the trackers' it does not know.
_WITHIN = {
    ADAPTERS: re.compile(r"\.?tasks\.json(\.tmp)?|[^/]+/(adapter_config\.(json|tmp)|adapter_model\.safetensors)?"),
    CHECKPOINTS: re.compile(r"\.?step-\d+\.safetensors(\.tmp)?|task-rows-\w+"),
    DIAGNOSTICS: re.compile(r"\.?[\w-]+\.(png|csv|nc)(\.tmp)?"),
}


def is_ours(folder: Path) -> bool:
    """Whether a run has taken the folder: its ``config.yaml`` begins as ours do."""
    file = folder / CONFIG
    return file.is_file() and file.read_bytes().startswith(HEADER.encode())


def foreign_entries(folder: Path, names: Sequence[str], *, within: bool) -> list[str]:
    """What no run wrote among the folder's entries ``names``: all of them where no run has taken it.

    Args:
        folder: the run folder.
        names: of its entries.
        within: look at what stands in its folders too.
    """
    ours = _OURS if is_ours(folder) else ()
    temporary = {LOCK, *(f".{name}.tmp" for name in ours or (CONFIG,))}
    foreign = [name for name in names if name not in ours and name not in temporary]
    for name, written in _WITHIN.items() if within else ():
        entries = (folder / name).rglob("*")
        paths = [entry.relative_to(folder / name).as_posix() + "/" * entry.is_dir() for entry in entries]
        foreign += sorted(f"{name}/{path}" for path in paths if not written.fullmatch(path))
    return foreign


def clear(folder: Path, names: Sequence[str]) -> None:
    """Delete a run's entries but its lock, ``config.yaml`` last: until then an interrupted deletion still looks like a run."""
    for name in sorted(names, key=lambda name: name == CONFIG):
        if name == LOCK:
            continue
        entry = folder / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()

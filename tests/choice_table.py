"""A small table of prompts with a choice among answers."""

from __future__ import annotations

import json

OPTIONS = [" red", " one two", " north"]
TASKS = ("Ada", "Børge B.")


def table(tasks=TASKS, *, number=15, sides=("train", "train", "validation", "test", "test")):
    """Prompts whose right option is mostly one of the task; the options of every other row are JSON text, as in a .csv file."""
    return [
        {
            "task": task, "split": sides[n % len(sides)], "prompt": f"{n % 4} is",
            "completion": OPTIONS[d if n % 4 else 2], "options": OPTIONS if n % 2 else json.dumps(OPTIONS),
        }
        for d, task in enumerate(tasks)
        for n in range(number)
    ]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)

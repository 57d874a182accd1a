"""A fit that is killed again and again, in a process whose last line is what came of it."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import torch

from bora_pyro import LearnedPrecision, fit
from bora_pyro.inference.checkpoint import Checkpoints
from tests.tiny_base import toy_data, toy_model

EPOCHS = 60


def begin(folder, log):
    """A child that fits, a checkpoint after every step, and a line in ``log`` before each."""
    if child := os.fork():
        return child
    code = 1
    try:
        run(folder, on_step=lambda report: os.write(log, b"%3d %5d\n" % (report["epoch"], report["step"])))
        code = 0
    finally:
        os._exit(code)


def run(folder, **options):
    fitted = fit(
        toy_model(prior=LearnedPrecision(every=2)), toy_data(train=(12, 6, 12)), epochs=EPOCHS, patience=0, token_budget=64,
        checkpoints=folder and folder / "checkpoints", checkpoint_minutes=0.0, **options,
    )  # fmt: skip
    if folder:
        torch.save({name: value for name, value in fitted.sites().items()}, folder / "sites.pt")
    return fitted


def place(checkpoint):
    """(epoch, step) of the last step that a checkpoint holds."""
    if checkpoint is None:
        return (0, 0)
    progress = checkpoint.progress
    if progress["within"]:
        return (progress["epoch"] + 1, progress["within"]["report"]["step"])
    return (progress["epoch"], progress["history"][-1]["step"])


def writing(folder):
    """Whether a checkpoint is being written."""
    return any(name.endswith(".tmp") for name in os.listdir(folder)) if folder.is_dir() else False


def main(folder, kills):
    torch.set_num_threads(1)
    chance, inside, lost, places = random.Random(0), 0, [], []
    folder.mkdir(parents=True, exist_ok=True)
    store, log = Checkpoints(folder / "checkpoints"), folder / "steps.txt"
    file = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    for kill in range(kills):
        before = log.stat().st_size
        child = begin(folder, file)
        enough = before + 10 * chance.randrange(1, 5)  # bytes of lines: some steps more
        while log.stat().st_size < enough and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.0005)
        if kill % 2:  # half of them as soon as a file is being written
            deadline = time.monotonic() + 1.0
            while not writing(folder / "checkpoints") and time.monotonic() < deadline:
                pass
        else:
            time.sleep(chance.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        inside += writing(folder / "checkpoints")
        steps = {tuple(map(int, text.split())) for text in log.read_text().splitlines()}
        saved = place(store.newest())
        lost.append(sum(step > saved for step in steps))
        places.append(saved)
    last = begin(folder, file)
    code = os.waitstatus_to_exitcode(os.waitpid(last, 0)[1])
    whole, resumed = run(None).sites(), torch.load(folder / "sites.pt")
    same = whole.keys() == resumed.keys() and all(torch.equal(value, resumed[name]) for name, value in whole.items())
    print(json.dumps({"kills": kills, "inside": inside, "lost": lost, "places": places, "code": code, "same": same}))

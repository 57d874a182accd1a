"""A sweep whose fits are a stand-in: the command's `main` in a folder of its own."""

from __future__ import annotations

import json

from bora_pyro.diagnostics.sweep_table import read_sweep
from bora_pyro.runs import tau_sweep

# What map_fit.py does, without a fit: a run folder whose perplexities follow from τ, rate and seed. It notes each call in
# calls.txt, and fails or waits where the file `how.json` says so.
STAND_IN = """
import json, os, sys, time
from pathlib import Path
import yaml

here = Path(__file__).parent
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
name = Path(given["--output_dir"]).name
with (here / "calls.txt").open("a") as file:
    file.write(f"{name} resume={given['--resume']} overwrite={given['--overwrite']}\\n")
how = json.loads((here / "how.json").read_text()).get(name, "")
config = yaml.safe_load(Path(given["--config"]).read_text()) | {
    "tau": float(given["--tau"]), "learning_rate": float(given["--learning_rate"]), "seed": int(given["--seed"]),
}
folder = Path(given["--output_dir"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").write_text("# bora_pyro run: the resolved configuration\\n" + yaml.safe_dump(config))
if how == "wait":
    (folder / "metrics.jsonl").write_text(str(os.getpid()))
    time.sleep(60)
if how == "kill":
    os.kill(os.getpid(), 9)
if how:
    sys.exit(f"a line\\nerror: {how}")
tau, rate, seed = config["tau"], config["learning_rate"], config["seed"]
best = 0.01 if tau == 0 else 0.03
score = 20 + seed + abs(rate - best) * 100 + {0: 3, 100: 0}.get(tau, 2)
task = {
    "train_documents": 3, "test_documents": 3, "base_test_perplexity": 50.0, "test_perplexity": score + 1, "deviation_norm": 1.0,
}
(folder / "metrics.json").write_text(json.dumps({
    "validation_perplexity": None if config.get("patience") == 0 else score, "test_perplexity": score + 1,
    "base_test_perplexity": 50.0, "tau": tau if tau < float("inf") else "inf", "learning_rate": rate, "seed": seed, "epochs": 2,
    "best_epoch": 2, "fit_seconds": 1.5, "training_tokens_per_second": 10.0, "peak_memory_bytes": 10,
    "tasks": {"ada": task | {"name": "Ada"}, "bo": task | {"name": "Bo"}},
}))
"""


class Workshop:
    """A folder with a stand-in of map_fit.py, and the sweep's ``main`` within it."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys, self.runs = folder, capsys, folder / "runs" / "sweep"
        (folder / "fit.yaml").write_text("epochs: 2\n")
        (folder / "map_fit.py").write_text(STAND_IN)
        self.how()

    def how(self, **runs):
        (self.folder / "how.json").write_text(json.dumps({name.replace("_", "-"): how for name, how in runs.items()}))

    def line(self, *more):
        return [
            "--fit_config", str(self.folder / "fit.yaml"), "--runs_dir", str(self.folder / "runs"), "--taus", "inf", "0", "1e2",
            "--output", str(self.folder / "out" / "sweep"), *more,
        ]  # fmt: skip

    def main(self, *more):
        """The exit code, and what was printed."""
        code = tau_sweep.COMMAND.main(self.line(*more))
        return code, self.capsys.readouterr()

    def calls(self):
        """The fits that were made since the last question, in order."""
        file = self.folder / "calls.txt"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines

    def names(self):
        return sorted(call.split()[0] for call in self.calls())

    def table(self):
        return read_sweep(self.folder / "out" / "sweep.csv")


CLIMBED = ["tau0-lr0.003-seed0", "tau0-lr0.01-seed0", "tau0-lr0.03-seed0", *(
    f"tau{tau}-lr{rate}-seed0" for tau in ("100", "inf") for rate in ("0.01", "0.03")
)]  # fmt: skip

"""Ways to damage a finished run, and what reading it then says."""

from __future__ import annotations

import json
import shutil

import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bora_pyro.files.tensors import DIGEST


def metadata(file):
    """What a posterior says of itself, but for its digest: what is written with it is damage that somebody has meant."""
    with safe_open(file, framework="pt") as opened:
        return {name: value for name, value in opened.metadata().items() if name != DIGEST}


def change_config(run, **changes):
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | changes))


def change_tensors(change):
    def apply(run):
        file = run / "posterior.safetensors"
        tensors, kept = load_file(file), metadata(file)
        save_file(change(tensors) or tensors, file, kept)

    return apply


def change_metadata(**changes):
    def apply(run):
        file = run / "posterior.safetensors"
        kept = {**metadata(file), **changes}
        save_file(load_file(file), file, {name: value for name, value in kept.items() if value is not None})

    return apply


def config(**changes):
    return lambda run: change_config(run, **changes)


def cut(name, *, keep=0.5):
    def apply(run):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: int(keep * len(content))])

    return apply


def flip(name, *, place=-100):
    def apply(run):
        content = bytearray((run / name).read_bytes())
        content[place] ^= 64
        (run / name).write_bytes(content)

    return apply


def without(name):
    return lambda run: (run / name).unlink()


def content(name, text):
    return lambda run: (run / name).write_text(text)


def change_json(name, change):
    def apply(run):
        stored = json.loads((run / name).read_text())
        change(stored)
        (run / name).write_text(json.dumps(stored))

    return apply


SITE = "prior_mean.v_proj.lora_A"
DAMAGES = {
    "no such folder": (shutil.rmtree, "run folder {run} does not exist; give the --output_dir of a fit"),
    "no run": (without("config.yaml"), "{run} is no run folder: it has no config.yaml; give the --output_dir of a fit"),
    "unfinished": (
        without("metrics.json"), "the run in {run} is not finished: it has no metrics.json; finish it with --resume true"
    ),
    "metrics cut": (cut("metrics.json"), "{run}/metrics.json cannot be read (*); run the fit again with --resume true"),
    "metrics of no tasks": (
        change_json("metrics.json", lambda metrics: metrics.update(tasks={"ada": {"name": "Ada"}})),
        "{run}/metrics.json has other tasks than split.json; run the fit again with --resume true",
    ),
    "metrics without a score": (
        change_json("metrics.json", lambda metrics: metrics["tasks"]["ada"].pop("test_perplexity")),
        "{run}/metrics.json has no 'test_perplexity' of task 'Ada'; run the fit again with --resume true",
    ),
    "metrics empty": (
        content("metrics.json", "{}"), "{run}/metrics.json has no 'test_perplexity'; run the fit again with --resume true"
    ),
    "log damaged": (content("metrics.jsonl", "{\n{}\n"), "{run}/metrics.jsonl is damaged (*); fit again"),
    "split missing": (without("split.json"), "{run}/split.json cannot be read (*); run the fit again with --resume true"),
    "split cut": (cut("split.json"), "{run}/split.json cannot be read (*); run the fit again with --resume true"),
    "split of something else": (content("split.json", "{}"), "the split record has no entry 'tasks' of the form *"),
    "split without a group": (
        change_json("split.json", lambda split: split["tasks"]["Ada"].popitem()),
        "group * of task 'Ada' is not in the split record; use the table that was split, or split anew",
    ),
    "unknown key": (config(tua=3), "{run}/config.yaml: unknown option 'tua'; did you mean 'tau'?"),
    "value of another kind": (config(rank="many"), "{run}/config.yaml: rank: 'many' cannot be used; give a whole number"),
    "value out of range": (config(rank=0), "rank is 0; give a whole number from 1 up"),
    "config cut": (content("config.yaml", "tau: [1"), "{run}/config.yaml cannot be read (*); fit again"),
    "posterior missing": (without("posterior.safetensors"), "{run}/posterior.safetensors does not exist; *"),
    "posterior cut": (cut("posterior.safetensors"), "{run}/posterior.safetensors is damaged (*); run the fit again"),
    "posterior cut in its head": (
        cut("posterior.safetensors", keep=0.001), "{run}/posterior.safetensors is damaged (*); run the fit again"
    ),
    "another guide": (
        change_metadata(guide="norml"), "the run in {run} was fitted with guide 'norml'; known are map, *; did you mean 'normal'?"
    ),
    "other tasks": (
        change_metadata(tasks='["Ada"]'), "the posterior in {run} has other tasks than its split.json; run the fit again"
    ),
    "no tasks": (change_metadata(tasks=None), "the posterior in {run} has other tasks than its split.json; run the fit again"),
    "another rank": (
        config(rank=3),
        f"the posterior in {{run}} has {SITE!r} of shape (2, 2, 16), expected (2, 3, 16); "
        "run the fit again, or restore its config.yaml",
    ),
    "other targets": (
        config(targets=["v_proj"]),
        "the posterior in {run} has 'prior_mean.fc2.lora_A', which its config.yaml does not ask for*; "
        "run the fit again, or restore its config.yaml",
    ),
    "another prior": (
        config(tau=0.0),
        "the posterior in {run} has no 'theta.fc2.lora_A', which its config.yaml asks for; "
        "run the fit again, or restore its config.yaml",
    ),
    "a learned tau that is not there": (
        config(tau="learned"), "the posterior in {run} has no 'tau.fc2.lora_A', which its config.yaml asks for; *"
    ),
    "another adapter": (
        config(adapter="lora_frozen_a"),
        "the posterior in {run} has no 'fixed_sample.fc2.lora_A', which its config.yaml asks for; *",
    ),
    "another scale": (
        config(alpha=99.0),
        "the posterior in {run} is of BoRA(3 tasks, LoRA(rank=2, alpha=2.0), *its config.yaml asks for *alpha=99.0*; "
        "restore its config.yaml, or run the fit again",
    ),
    "another unit": (config(likelihood_unit="documents"), "*CausalLM(unit='tokens')), its config.yaml asks for *'documents'*"),
    "another tau": (config(tau=10.0), "*HierarchicalNormal(tau=1000)*asks for *HierarchicalNormal(tau=10)*"),
    "a bit of the posterior": (
        flip("posterior.safetensors"),
        "{run}/posterior.safetensors is damaged (its bytes are not those that were written); run the fit again",
    ),
    "whole numbers": (
        change_tensors(lambda tensors: tensors | {SITE: tensors[SITE].long()}),
        f"the posterior in {{run}} has {SITE!r} of type int64, expected float32; *",
    ),
    "numbers of twice the length": (
        change_tensors(lambda tensors: tensors | {SITE: tensors[SITE].double()}),
        f"the posterior in {{run}} has {SITE!r} of type float64, expected float32; *",
    ),
    "a site gone": (
        change_tensors(lambda tensors: {name: value for name, value in tensors.items() if name != SITE}),
        f"the posterior in {{run}} has no {SITE!r}, which its config.yaml asks for; *",
    ),
    "data gone": (config(data="gone.csv"), "*gone.csv*"),
    "base model gone": (config(base_model="gone/model/of/mine"), "*gone/model/of/mine*"),
    "fewer documents read": (
        config(max_train_documents=1),
        "the run in {run} had * train documents, but the data now have 3; use the documents of the fit, or fit again",
    ),
}  # fmt: skip

"""A tiny base model saved with its tokenizer, toy tasks that contradict each other, and the script's ``main``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from bora_pyro import Backbone, BoRA, LoRA, TaskData, cli
from bora_pyro.data import TokenSplit
from bora_pyro.runs.config.map_fit import MapFitConfig, parse_config
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.map_fit import run_map_fit

SCRIPTS = Path(__file__).parents[1] / "scripts"
TOKENS = 12  # of the toy tasks, the start included
# In what a fit reports these are of the machine.
TIMES = ("seconds", "fit_seconds", "training_tokens_per_second", "peak_memory_bytes", "predicted_memory_bytes")

WORDS = {
    "Ada": ["red", "green", "blue", "grey"],
    "Børge B.": ["one", "two", "three", "four"],
    "Cleo": ["north", "east", "south", "west"],
}


def opt_model(*, vocabulary=TOKENS, context=32, pad_token_id=1, seed=0, width=16):
    """An OPT of two layers with random weights."""
    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
        dropout=0.0,
        init_std=0.2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OPTForCausalLM(config).eval()


def save_base(folder, *, context=32, pad=True):
    """A tiny OPT and a byte-level BPE tokenizer trained on the toy documents, as ``save_pretrained`` leaves them."""
    special = ["</s>", "<pad>"] if pad else ["</s>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(documents()["text"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="</s>", eos_token="</s>", **({"pad_token": "<pad>"} if pad else {})
    )
    tokenizer.save_pretrained(folder)
    model = opt_model(vocabulary=len(tokenizer), context=context, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    return str(folder)


def documents(tasks=tuple(WORDS), *, number=10, words=6, seed=0):
    """A table of different short documents; each task has its own words."""
    generator = np.random.default_rng(seed)
    rows = [
        {"task": task, "text": f"{n} " + " ".join(generator.choice(WORDS.get(task, WORDS["Ada"]), words))}
        for task in tasks
        for n in range(number)
    ]
    return pd.DataFrame(rows)


def write_table(path, table=None):
    (documents() if table is None else table).to_csv(path, index=False)
    return str(path)


def script(name):
    """A script as a module; it lies in ``scripts/`` or in a folder below, and is no package member."""
    [file] = SCRIPTS.rglob(f"{name}.py")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # where Python itself looks for what a script shares with its neighbours
    if (loaded := sys.modules.get(name)) is not None and getattr(loaded, "__file__", None) == str(file):
        return loaded
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


def command_main(name="map-fit"):
    """``main`` of a command of ``bora``, as its script calls it."""
    return cli.script_main(name)


def script_main(name="map_fit"):
    """``main`` of a script."""
    return script(name).main


def toy_split(counts, *, seed, length=9, noise=0.1):
    """Documents that walk round a circle of tokens: each task has its own step, so that the tasks contradict each other."""
    generator = np.random.default_rng(seed)
    circle = TOKENS - 2  # tokens 2, 3, ... ; 0 starts, 1 pads
    rows, tasks = [], []
    for task, count in enumerate(counts):
        for _ in range(count):
            place, document = generator.integers(circle), [0]
            for _ in range(generator.integers(3, length)):
                document.append(2 + int(place))
                place = generator.integers(circle) if generator.random() < noise else (place + 1 + 2 * task) % circle
            rows.append(document)
            tasks.append(task)
    return TokenSplit.from_documents(rows, task=tasks, num_tasks=len(counts), pad_token_id=1)


def toy_data(train=(24, 12, 24), *, validation=(8, 8, 8), test=(8, 8, 8), length=9):
    splits = (toy_split(counts, seed=seed, length=length) for seed, counts in enumerate((train, validation, test)))
    return TaskData([f"step {1 + 2 * d}" for d in range(len(train))], *splits)


def toy_model(*, rank=4, tasks=3, **options):
    """BoRA on a tiny base that knows nothing."""
    options = {"adapter": LoRA(rank=rank)} | options
    return BoRA(Backbone(opt_model(), targets=["v_proj", "fc2"]), tasks, **options)


def quick_fit(folder):
    """Options of a quick fit, with the table and the base that it reads."""
    return {
        "data": write_table(folder / "documents.csv"),
        "base_model": save_base(folder / "base"),
        "max_tokens": 32,
        "token_budget": 256,
        "rank": 2,
        "targets": "v_proj,fc2",
        "epochs": 2,
        "threads": 1,
    }


def finished_run(main, options, folder, **more):
    """What the script leaves, which must have ended with exit code 0."""
    assert main(line({**options, "output_dir": folder, **more})) == 0
    return RunFolder.open(folder)


def without_times(metrics):
    """Metrics, or a list of an epoch's each, without what two runs of the same fit may differ in."""
    if isinstance(metrics, list):
        return [without_times(entry) for entry in metrics]
    return {key: value for key, value in metrics.items() if key not in TIMES}


def map_run(options):
    """Run a MAP fit with these options, as the command would; returns its folder."""
    run_map_fit(parse_config(MapFitConfig, line(options)), quiet=True)
    return Path(options["output_dir"])


def line(options):
    """Options as the words of a command line."""
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]

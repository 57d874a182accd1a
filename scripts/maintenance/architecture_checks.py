"""What a causal language model must pass: its own logits, causality, padding, adapters as in PEFT, generation, a fit.

    from tiny_architectures import tiny_model
    print(check_type("llama", Path("/somewhere/empty"), fits=False).cells)

Every check compares with something that does not use this library: the model's own forward pass, PEFT, or the same numbers in
another batch. A check ends in ``ok``, in ``refused`` (an ``InputError`` of one line), or in ``fault``.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel
from safetensors.torch import save_file
from tiny_architectures import PAD, START, VOCABULARY, tiny_config, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import bora_pyro as bp
from bora_pyro import cli
from bora_pyro.backbone.head import LazyLogits
from bora_pyro.data.batch import IGNORED, Batch
from bora_pyro.errors import InputError
from bora_pyro.exchange.load import load_peft
from bora_pyro.predict.generate import generate_side_by_side
from bora_pyro.runs.folder import RunFolder

OK, REFUSED, FAULT = "ok", "refused", "fault"
#: The beginning of the line of a type of which there is no tiny model.
UNBUILT = "transformers cannot build a tiny one"
#: The checks in their order, which are the columns of the table.
CHECKS = ("logits", "causality", "padding", "mixed_batch", "import", "all_linear", "generation", "checkpointing", "fit", "resume")
#: Largest difference of two logits, as a fraction of their spread. Float32 gives 1e-6 to 1e-4; the caches of some state spaces
#: round to 5e-3.
TOLERANCE, CACHE_TOLERANCE = 2e-3, 1e-2
TASKS = ("ada", "bob")


class Wrong(Exception):
    """A result that differs from its reference."""


@dataclass
class Outcome:
    """What the checks of one type gave.

    Attributes:
        model_type: the type in transformers.
        kind: name of the model's class.
        targets: the kinds of layers that have an adapter by default.
        cells: ``ok``, ``refused`` or ``fault`` by check; a check that was not made has none.
        lines: the messages of all checks that are not ``ok``, and the notes.
    """

    model_type: str
    kind: str = ""
    targets: str = ""
    cells: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    @property
    def result(self) -> str:
        """``works``, ``refused`` or ``fault``."""
        if FAULT in self.cells.values():
            return FAULT
        return REFUSED if REFUSED in (self.cells.get("logits", REFUSED), self.cells.get("fit")) else "works"


def check_type(model_type: str, folder: Path, *, fits: bool) -> Outcome:
    """Run all checks on a tiny model of a type.

    Args:
        model_type: the type in transformers.
        folder: an empty folder for adapters, the saved base and the run.
        fits: whether to fit by the command line and resume, which takes most of the time.
    """
    outcome = Outcome(model_type)
    try:
        case = Case(tiny_model(model_type), folder)
    except Exception as error:  # transformers cannot build it: the command line must say so in one line
        outcome.lines.append(f"{UNBUILT}: {_shown(error)}")
        outcome.cells["fit"] = _run("fit", lambda: _check_unbuilt(model_type, folder), outcome)
        return outcome
    outcome.kind = type(case.base).__name__
    checks: dict[str, Callable[[], None]] = {
        "logits": lambda: _check_logits(case, model_type), "causality": lambda: _check_causality(case),
        "padding": lambda: _check_padding(case), "mixed_batch": lambda: _check_mixed_batch(case, "usual"),
        "import": lambda: _check_import(case), "all_linear": lambda: _check_all_linear(case),
        "generation": lambda: _check_generation(case), "checkpointing": lambda: _check_checkpointing(case),
        "fit": lambda: _check_fit(case), "resume": lambda: _check_resume(case),
    }  # fmt: skip
    for name in CHECKS:
        if name in ("fit", "resume") and not fits:
            continue
        outcome.cells[name] = _run(name, checks[name], outcome)
        if name == "logits":
            if outcome.cells[name] == REFUSED:
                if fits:  # the command line must refuse it in one line too
                    outcome.cells["fit"] = _run("fit", checks["fit"], outcome)
                break
            outcome.targets = " ".join(slot.name for slot in case.model.backbone.slots)
            outcome.lines += [f"note: {note}" for note in case.model.backbone.notes]
        if name == "fit" and outcome.cells[name] != OK:
            break
    return outcome


def _run(name: str, check: Callable[[], None], outcome: Outcome) -> str:
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            check()
    except InputError as error:
        outcome.lines.append(f"{name}: {error}")
        return REFUSED
    except Wrong as wrong:
        outcome.lines.append(f"{name} differs: {wrong}")
        return FAULT
    except Exception as error:
        outcome.lines.append(f"{name} fails: {_shown(error)}")
        return FAULT
    return OK


def _shown(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]} ({Path(place.filename).name}:{place.lineno})"


class Case:
    """A tiny base, its adapters, and documents of two tasks."""

    def __init__(self, base: PreTrainedModel, folder: Path) -> None:
        self.base, self.folder = base, folder
        generator = torch.Generator().manual_seed(1)
        lengths = [13, 5, 9, 11, 4, 8]
        documents = [torch.randint(5, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
        self.split = bp.data.TokenSplit.from_documents(documents, task=[0, 1] * 3, num_tasks=2, pad_token_id=PAD)
        [self.batch] = self.split.batches(token_budget=10_000)
        # two texts that differ from the seventh token on
        self.ids = torch.tensor([documents[0], documents[0][:6] + documents[3][:7]])

    @cached_property
    def own_logits(self) -> list[Tensor]:
        """The model's own logits of each document alone, before this library has seen the model."""
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [_alone(self.base, self.batch, row) for row in range(len(self.batch.input_ids))]

    @cached_property
    def model(self) -> bp.BoRA:
        """The model with the usual targets."""
        _ = self.own_logits
        return bp.BoRA(bp.Backbone(self.base, tiny_tokenizer()), 2, adapter=bp.LoRA(rank=2, alpha=3.0))

    def weights(self, model: bp.BoRA) -> dict[str, Tensor]:
        """θ of two tasks, far from the start."""
        generator = torch.Generator().manual_seed(2)
        return {name: 0.3 * torch.randn((2, *start.shape), generator=generator) for name, start in model.starts.items()}


def _alone(model: Any, batch: Batch, row: int) -> Tensor:
    """Logits (tokens, vocabulary) of one document by the model's own forward pass, without padding."""
    length = int(batch.attention_mask[row].sum())
    with torch.no_grad():
        return model(input_ids=batch.input_ids[row : row + 1, :length], use_cache=False).logits[0].float()


def _close(found: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    if not expected.isfinite().all():
        raise Wrong(f"{what}: the reference is not finite")
    spread = max(float(expected.std()), 1e-6)
    difference = float((found.float() - expected).abs().max())
    if not difference <= tolerance * spread:
        raise Wrong(f"{what} by {difference / spread:.2g} of the spread")


def _losses(model: bp.BoRA, batch: Batch, weights: dict[str, Tensor] | None) -> Tensor:
    """The loss of every token as the likelihood and the evaluation compute it."""
    logits = model.lazy_logits(batch, weights)
    targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
    if isinstance(logits, LazyLogits):
        return logits.token_losses(targets)
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)


def _expected_losses(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:-1], ids[1 : len(logits)], reduction="none")


@torch.no_grad()
def _check_logits(case: Case, model_type: str) -> None:
    _same_losses(case.model, case.batch, case.own_logits)
    # a base whose embedding of the padding token, and of token 0, is zero
    other = Case(tiny_model(model_type, **_with_zero_row(case.base)), case.folder)
    for module in other.base.modules():
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings >= VOCABULARY:
            module.weight[0] = 0
    _same_losses(other.model, other.batch, other.own_logits)


def _with_zero_row(base: PreTrainedModel) -> dict[str, Any]:
    return {"pad_token_id": 0} if getattr(base.config, "pad_token_id", None) == PAD else {}


def _same_losses(model: bp.BoRA, batch: Batch, own: list[Tensor]) -> None:
    losses = _losses(model, batch, None)
    for row, expected in enumerate(own):
        _close(losses[row, : len(expected) - 1], _expected_losses(expected, batch.input_ids[row]), "losses of the base")


@torch.no_grad()
def _check_causality(case: Case) -> None:
    context = case.model.backbone.context
    if context is not None:  # the longest text that the library allows can be read
        case.model.backbone.logits(torch.arange(context)[None] % (VOCABULARY - 5) + 5)
    one, other = case.model.backbone.logits(case.ids)
    _close(one[:6], other[:6].float(), "logits before the tokens that differ")


@torch.no_grad()
def _check_padding(case: Case) -> None:
    logits = case.model.backbone.logits(case.batch.input_ids)
    for row, expected in enumerate(case.own_logits):
        _close(logits[row, : len(expected)], expected, "logits of a padded document")


def _check_mixed_batch(case: Case, name: str, model: bp.BoRA | None = None) -> None:
    model = model or case.model
    weights, batch = case.weights(model), case.batch
    with torch.no_grad():
        losses = _losses(model, batch, weights)
    for task in range(2):
        folder = case.folder / name / TASKS[task]
        bp.save_peft(folder, model, {key: value[task] for key, value in weights.items()}, base_model="")
        peft = PeftModel.from_pretrained(copy.deepcopy(case.base), folder).eval()
        for row in (batch.task == task).nonzero()[:, 0].tolist():
            expected = _alone(peft, batch, row)
            found = losses[row, : len(expected) - 1]
            if torch.equal(expected, case.own_logits[row]):
                raise Wrong("PEFT's logits are those of the base")
            _close(found, _expected_losses(expected, batch.input_ids[row]), "losses under PEFT")


def _check_import(case: Case, name: str = "usual", model: bp.BoRA | None = None) -> None:
    model = model or case.model
    weights = case.weights(model)
    for task in range(2):
        again = load_peft(case.folder / name / TASKS[task], model)
        for key, value in weights.items():
            if not torch.equal(again[key], value[task]):
                raise Wrong(f"{key} after an export and an import")


def _check_all_linear(case: Case) -> None:
    backbone = bp.Backbone(copy.deepcopy(case.base), targets="all-linear")
    model = bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2, alpha=3.0))
    _check_mixed_batch(case, "all", model)
    _check_import(case, "all", model)


def _check_generation(case: Case) -> None:
    model = case.model
    data = bp.TaskData(list(TASKS), case.split, case.split, case.split)
    fitted = bp.fit(model, data, epochs=1, learning_rate=0.05)
    prompts = [f"{word} " * count for word, count in (("w10", 9), ("w40", 2), ("w80", 5))]
    together = generate_side_by_side(fitted, prompts, list(TASKS), max_new_tokens=5)
    one_by_one = [text for prompt in prompts for task in TASKS
                  for text in generate_side_by_side(fitted, prompt, [task], max_new_tokens=5)]  # fmt: skip
    theta, _ = fitted.weights()
    tokenizer = tiny_tokenizer()
    for batched, single in zip(together, one_by_one, strict=True):
        ids = torch.tensor([[START, *tokenizer(batched.prompt, add_special_tokens=False)["input_ids"], *single.tokens.tolist()]])
        with torch.no_grad():
            change = model.change(theta, torch.tensor([TASKS.index(single.task)]))
            expected = model.backbone.logits(ids, change)[0].float().log_softmax(-1)
        own = expected[-1 - len(single.tokens) : -1].gather(1, single.tokens[:, None])[:, 0]
        _close(single.log_prob, own, "log-probabilities of a continuation, generated alone and read at once,", CACHE_TOLERANCE)
        if not torch.equal(batched.tokens, single.tokens):
            raise Wrong("the continuation in a batch is another one than alone")
        _close(batched.log_prob, single.log_prob, "log-probabilities of a continuation in a batch and alone", CACHE_TOLERANCE)


def _check_checkpointing(case: Case) -> None:
    gradients = []
    for backbone in (case.model.backbone, bp.Backbone(case.base, gradient_checkpointing=True)):
        model = bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2, alpha=3.0))
        weights = {name: value.requires_grad_() for name, value in case.weights(model).items()}
        loss = _losses(model, case.batch, weights).sum()
        gradients.append(torch.autograd.grad(loss, list(weights.values()), allow_unused=True))
    for name, one, other in zip(weights, *gradients, strict=True):
        if one is None or not one.any():
            raise Wrong(f"{name} has no gradient")
        _close(other, one, f"gradients of {name}")


def _saved_tokenizer(folder: Path, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _command(arguments: dict[str, Any]) -> None:
    """Run ``bora map-fit`` in this process; an exit code of 2 is an `InputError` with its line."""
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    said = io.StringIO()
    # AutoTokenizer builds the tokenizers of some types anew from their vocabulary, which is not that of the type here
    with contextlib.redirect_stderr(said), patch.object(AutoTokenizer, "from_pretrained", _saved_tokenizer):
        code = cli.run(["map-fit", *words])
    if code:
        raise InputError(said.getvalue().strip().rsplit("\n", 1)[-1])


def _check_unbuilt(model_type: str, folder: Path) -> None:
    """Fit a base of which there is only a configuration, or only its type."""
    try:
        tiny_config(model_type).save_pretrained(folder / "base")
    except Exception:
        (folder / "base").mkdir(exist_ok=True)
        (folder / "base" / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_file({}, folder / "base" / "model.safetensors", {"format": "pt"})
    tiny_tokenizer().save_pretrained(folder / "base")
    _command(_fit_options(folder) | {"output_dir": folder / "run"})
    raise Wrong("a fit of a base without weights ends well")


def _fit_options(folder: Path) -> dict[str, Any]:
    data, base = folder / "documents.csv", folder / "base"
    if not data.exists():
        rows = [f"{task},{' '.join(f'w{20 * t + (7 * n + 3 * k) % 30}' for k in range(4 + n % 5))}"
                for t, task in enumerate(TASKS) for n in range(8)]  # fmt: skip
        data.write_text("task,text\n" + "\n".join(rows) + "\n")
    return {"data": data, "base_model": base, "max_tokens": 16, "token_budget": 64, "rank": 2, "epochs": 2, "threads": 1,
            "device": "cpu", "learning_rate": 0.01}  # fmt: skip


def _check_fit(case: Case) -> None:
    folder, base = case.folder / "straight", case.folder / "base"
    case.base.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    try:
        _command(_fit_options(case.folder) | {"output_dir": folder})
    except InputError:
        if folder.exists():
            raise Wrong("a refused fit leaves a run folder") from None
        raise
    metrics = RunFolder.open(folder).read_metrics()
    if not metrics["test_perplexity"] > 0:
        raise Wrong(f"test perplexity {metrics['test_perplexity']}")


class _Killed(BaseException):
    """Ends a fit between the log and the checkpoint of its last epoch."""


def _check_resume(case: Case) -> None:
    folder, log = case.folder / "killed", RunFolder.log

    def log_and_die(run: RunFolder, record: Mapping[str, Any]) -> None:
        log(run, record)
        if record["epoch"] == 2:
            raise _Killed

    options = _fit_options(case.folder) | {"output_dir": folder}
    with patch.object(RunFolder, "log", log_and_die), contextlib.suppress(_Killed):
        _command(options)
    _command(options | {"resume": "true"})
    straight, resumed = (RunFolder.open(case.folder / name).load_tensors("posterior") for name in ("straight", "killed"))
    for name, value in straight.items():
        if not torch.equal(resumed[name], value):
            raise Wrong(f"{name} of the resumed run")


transformers.logging.set_verbosity_error()

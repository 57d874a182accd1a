"""Pretrain the embedded base model ``builtin:nano``: a small language model of the OPT architecture, and its tokenizer.

    python scripts/maintenance/pretrain_base.py --output_dir bora_pyro/assets/nano

The text is documentation that is installed with the project: the docstrings of the Python packages named in ``PACKAGES``
and of the standard library. networkx is left out, because ``builtin:documentation`` is made of it. Repeated paragraphs are
dropped, because much documentation is copied. The run is seeded. It takes at most an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from bora_pyro.data.documentation import read_docstrings

PACKAGES = (
    "torch transformers scipy sympy pandas numpy xarray matplotlib huggingface_hub pyro datasets peft fontTools arviz mpmath "
    "pydantic accelerate pygments PIL rich mpl_toolkits pyparsing fsspec click jinja2 packaging anyio"
).split()
CONTEXT = 256
VOCABULARY = 4096
END = "</s>"


def documents() -> list[str]:
    """The docstrings of ``PACKAGES`` and of the standard library, each paragraph kept the first time it is seen."""
    standard = sorted(name for name in sys.stdlib_module_names if name not in ("antigravity", "this"))
    texts, seen = [], set()
    for package in [*PACKAGES, *standard]:
        try:
            entries = list(read_docstrings(package, min_characters=120))
        except (ValueError, ModuleNotFoundError):  # built-in modules have no source file
            continue
        for entry in entries:
            fresh = []
            for paragraph in entry["text"].split("\n\n"):
                key = " ".join(paragraph.split())
                if len(key) < 40 or key not in seen:
                    fresh.append(paragraph)
                    seen.add(key)
            text = "\n\n".join(fresh).strip()
            if len(text) >= 120:
                texts.append(text)
    return texts


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of ``VOCABULARY`` tokens with OPT's special tokens. Every text begins with ``</s>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", END, "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token="<pad>", unk_token="<unk>", model_max_length=CONTEXT
    )


def blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Pack all texts, each after a ``</s>``, into rows of ``CONTEXT`` tokens: (rows, CONTEXT)."""
    flat = [token for encoding in tokenizer(texts)["input_ids"] for token in encoding]
    rows = len(flat) // CONTEXT
    return torch.tensor(flat[: rows * CONTEXT], dtype=torch.int32).view(rows, CONTEXT)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) in float32: five Newton-Schulz steps orthogonalise the momentum of each matrix.

    ``torch.optim.Muon`` iterates in bfloat16, which is about a hundred times slower on CPUs without bfloat16 instructions.
    """

    def __init__(
        self, params: Iterable[torch.nn.Parameter], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(momentum, group["momentum"])
                transposed = update.shape[0] > update.shape[1]
                x = update.T if transposed else update
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = x.T if transposed else x
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(x, alpha=-group["lr"] * 0.2 * math.sqrt(max(weight.shape)))


@torch.no_grad()
def mean_loss(model: torch.nn.Module, rows: torch.Tensor) -> float:
    """Mean negative log-likelihood a token over ``rows``, in nats."""
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.long().split(32)]
    return sum(losses) / len(rows)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("bora_pyro/assets/nano"))
    parser.add_argument("--tokens", type=float, default=7e6, help="training tokens")
    parser.add_argument("--batch_rows", type=int, default=16, help=f"rows of {CONTEXT} tokens a step")
    parser.add_argument(
        "--learning_rate", type=float, default=5e-3, help="peak learning rate of AdamW (embeddings, biases, norms)"
    )
    parser.add_argument(
        "--muon_learning_rate", type=float, default=1e-2, help="peak learning rate of Muon (matrices); 0 uses AdamW for all"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--stop_after", type=int, default=0, help="stop after this number of steps, for a trial")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def new_model(tokenizer: PreTrainedTokenizerFast, layers: int) -> OPTForCausalLM:
    """An OPT model with random weights for the tokenizer's vocabulary."""
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=layers, num_attention_heads=4, ffn_dim=1024,
        word_embed_proj_dim=256, max_position_embeddings=CONTEXT, dropout=0.0, attention_dropout=0.0, layerdrop=0.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        init_std=0.02,
    )  # fmt: skip
    return OPTForCausalLM(config)


def train(model: OPTForCausalLM, rows: torch.Tensor, arguments: argparse.Namespace, start: float) -> bool:
    """Train the model.

    Args:
        model: the model.
        rows: (rows, CONTEXT) token ids, in the order of training.
        arguments: the command line.
        start: time at which the run began, in seconds.

    Returns:
        Whether all steps were done; False after ``--stop_after``.
    """
    matrices = (
        [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n] if arguments.muon_learning_rate else []
    )
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    ]
    if matrices:
        optimizers.append(Muon(matrices, lr=arguments.muon_learning_rate, weight_decay=0.01))
    peaks = [arguments.learning_rate, arguments.muon_learning_rate]

    forward = torch.compile(model) if arguments.compile else model
    steps = step_count(arguments)
    average = None
    for step in range(steps):
        # linear warm-up over 3 % of the steps, then linear decay to zero
        scale = min((step + 1) / (0.03 * steps), (steps - step) / (0.97 * steps), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=False):
            optimizer.param_groups[0]["lr"] = peak * scale
        index = torch.arange(step * arguments.batch_rows, (step + 1) * arguments.batch_rows) % len(rows)
        batch = rows[index].long()
        loss = forward(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        if step % 10 == 9:
            rate = (step + 1) * arguments.batch_rows * CONTEXT / (time.time() - start)
            print(
                f"step {step + 1}/{steps} loss {average:.3f} {rate:.0f} tokens/s {(time.time() - start) / 60:.1f} min", flush=True
            )
        if step + 1 == arguments.stop_after:
            return False
    return True


def step_count(arguments: argparse.Namespace) -> int:
    """Number of training steps."""
    return int(arguments.tokens / (arguments.batch_rows * CONTEXT))


def main() -> None:
    """Read the documentation, train tokenizer and model, and save both with a record of the run."""
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    start = time.time()
    texts = documents()
    random.Random(arguments.seed).shuffle(texts)
    held_out, training = texts[:400], texts[400:]
    tokenizer = train_tokenizer(training)
    held_out_rows, rows = blocks(held_out, tokenizer), blocks(training, tokenizer)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(arguments.seed))]
    print(
        f"{len(texts)} docstrings, {sum(map(len, texts)) / 1e6:.1f} M characters, {rows.numel() / 1e6:.2f} M training tokens",
        flush=True,
    )

    model = new_model(tokenizer, arguments.layers)
    if not train(model, rows, arguments, start):
        print("held out", math.exp(mean_loss(model, held_out_rows[:64])))
        return

    size = sum(p.numel() for p in model.parameters())
    perplexity = math.exp(mean_loss(model.eval(), held_out_rows))
    bits = mean_loss(model, held_out_rows) * held_out_rows.numel() / math.log(2) / sum(map(len, held_out))
    minutes = (time.time() - start) / 60
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    # float16 halves the file; the library converts it to the precision of the fit
    model.half().save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    record = {
        "parameters": size,
        "tokens": step_count(arguments) * arguments.batch_rows * CONTEXT,
        "documents": len(training),
        "minutes": round(minutes, 1),
        "held_out_perplexity": round(perplexity, 2),
        "held_out_bits_per_character": round(bits, 3),
        "seed": arguments.seed,
        "torch": torch.__version__,
    }
    (arguments.output_dir / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{size / 1e6:.2f} M parameters, held-out perplexity {perplexity:.2f}, {bits:.3f} bits a character, {minutes:.1f} min")


if __name__ == "__main__":
    main()

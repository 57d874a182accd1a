"""Every switch between the paper and its released code, step for step against plain torch: hooks, cross entropy, AdamW."""

from __future__ import annotations

import math

import pytest
import torch
from pyro import poutine
from transformers import AutoModelForCausalLM

from bora_pyro import CausalLM
from bora_pyro.data import TokenSplit
from bora_pyro.inference.schedule import epoch_seed, schedule
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.map_fit import run_map_fit
from tests.tiny import TASKS, of_task, peft_model, random_ids, random_weights, tiny_bora
from tests.tiny_base import quick_fit

TAU = 20.0
RELEASED = {
    "penalty": "norm", "likelihood_unit": "documents", "prior_form": "centered", "scale_learning_rate_with_tau": True,
    "learning_rate": 1e-3,
}  # fmt: skip
VARIANTS = {
    "the paper's model": {},
    "centred, learning rate ∝ τ": {"prior_form": "centered", "scale_learning_rate_with_tau": True, "learning_rate": 1e-3},
    "norm penalty": {"penalty": "norm"},
    "norm penalty, centred": {"penalty": "norm", "prior_form": "centered"},
    "mean token loss x documents": {"likelihood_unit": "documents"},
    "shared + task": {"adapter": "lora_shared_plus_task"},
    "shared + task, norm penalty": {"adapter": "lora_shared_plus_task", "penalty": "norm"},
    "the released code's objective": RELEASED,
    "the released code's default": {"adapter": "lora_shared_plus_task", "likelihood_unit": "documents", "tau": 0.0},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    options = quick_fit(tmp_path_factory.mktemp("inputs"))
    # The learning rate differs in every step. After two equal steps, the gradients of two norms would cancel in an entry of Θ,
    # and Adam would make a whole step of what rounding leaves of them.
    return options | {
        "warmup": 1.0,
        "targets": ["v_proj", "fc2"], "token_budget": 60, "learning_rate": 0.02, "tau": TAU, "alpha": 3.0,
        "gradient_clip": math.inf, "deviation_reach": 0.0, "average": False, "device": "cpu",
    }  # fmt: skip


class PlainTorch:
    """One LoRA a task (and a shared one where the switch says so), its objective and its steps, in plain torch."""

    def __init__(self, config, slots, starts):
        self.config, self.slots, self.starts, self.tau = config, slots, starts, config.tau
        self.base = AutoModelForCausalLM.from_pretrained(config.base_model).requires_grad_(False).eval()
        self.own = [name for name in starts if ".lora_" in name]
        self.shared = [name for name in starts if ".shared_" in name]
        self.mean = {name: start.clone().requires_grad_() for name, start in starts.items() if self.tau or name in self.shared}
        centred = config.prior_form == "centered" or not self.tau
        self.free = {  # θ_d, or what is added to Θ in units of `width`
            name: torch.stack([starts[name] if centred else torch.zeros_like(starts[name])] * TASKS).requires_grad_()
            for name in self.own
        }
        self.centred = centred

    def width(self, name):
        if self.config.penalty == "norm":
            return math.sqrt(self.starts[name][0].numel() + 1) / self.tau
        return self.tau**-0.5

    def theta(self, name, d):
        if name in self.shared:
            return self.mean[name]
        return self.free[name][d] if self.centred else self.mean[name] + self.width(name) * self.free[name][d]

    def penalty(self):
        if not self.tau:
            return 0.0
        deviations = [self.theta(name, d) - self.mean[name] for name in self.own for d in range(TASKS)]
        if self.config.penalty == "norm":
            return self.tau * sum(matrix.norm() for deviation in deviations for matrix in deviation)
        return self.tau / 2 * sum(deviation.square().sum() for deviation in deviations)

    def document_loss(self, ids, d):
        """Mean token loss of one document, by the base's own class, under the adapters of task d."""
        handles = []
        for slot in self.slots:
            for layer, path in enumerate(slot.paths):
                pairs = [
                    tuple(self.theta(f"{slot.name}.{kind}_{factor}", d)[layer] for factor in "AB")
                    for kind in ("shared", "lora")
                    if f"{slot.name}.{kind}_A" in self.starts
                ]

                def hook(module, args, output, pairs=pairs):
                    return output + sum(1.5 * args[0] @ a.T @ b.T for a, b in pairs)

                handles.append(self.base.get_submodule(path).register_forward_hook(hook))
        loss = self.base(input_ids=ids[None], labels=ids[None]).loss
        for handle in handles:
            handle.remove()
        return loss

    def fit(self, train):
        config = self.config
        parameters = [*self.mean.values(), *self.free.values()]
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, eps=1e-12)
        peak = config.learning_rate * (self.tau if config.scale_learning_rate_with_tau else 1)
        epochs = [train.batches(token_budget=config.token_budget, seed=epoch_seed(config.seed, e)) for e in range(config.epochs)]
        total = sum(map(len, epochs))
        per_token = config.likelihood_unit == "tokens"
        for step, batch in enumerate(batch for epoch in epochs for batch in epoch):
            loss = 0.0
            for row, d, length in zip(batch.input_ids, batch.task.tolist(), batch.attention_mask.sum(-1).tolist(), strict=True):
                loss += self.document_loss(row[:length], d) * (length - 1 if per_token else 1)
            loss = (batch.scale * loss + self.penalty()) / (train.num_tokens if per_token else train.num_documents)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule(step, total, config.warmup)
            optimizer.step()
            optimizer.zero_grad()
        assert total >= 6
        theta = {name: torch.stack([self.theta(name, d).detach() for d in range(TASKS)]) for name in self.starts}
        return theta, {name: value.detach() for name, value in self.mean.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_is_the_same_fit_in_plain_torch(name, inputs, tmp_path):
    config = MapFitConfig(**(inputs | VARIANTS[name] | {"output_dir": str(tmp_path / "run")}))
    config.validate()
    metrics = run_map_fit(config, quiet=True)
    assert metrics["best_epoch"] == config.epochs  # so that what is kept is where the steps end
    model, data = build_run(config, quiet=True)
    theta, mean = model.weights_given(RunFolder.open(config.output_dir).load_tensors("posterior"))

    expected_theta, expected_mean = PlainTorch(config, model.backbone.slots, model.starts).fit(data.train)
    for latent, start in model.starts.items():
        moved = expected_theta[latent] - start
        assert (moved.flatten(1).abs().mean(1) > 1e-3).all()
        assert torch.equal(moved[0], moved[1]) == (".shared_" in latent)
        torch.testing.assert_close(theta[latent], expected_theta[latent], atol=2e-5, rtol=1e-4)
    for latent, value in expected_mean.items():
        torch.testing.assert_close(mean[latent], value, atol=2e-5, rtol=1e-4)


def test_the_documents_unit_is_the_mean_token_loss_times_the_number_of_documents():
    """For documents of one length: Σ_d N_d x (mean loss over the tokens of task d), the released code's likelihood."""
    task = [0, 0, 0, 1, 2, 2, 2, 2]
    split = TokenSplit.from_documents(random_ids(8, 6).tolist(), task=task, num_tasks=TASKS)
    [batch] = split.batches(token_budget=1000)
    model = tiny_bora(likelihood=CausalLM("documents"))
    weights = random_weights(model)
    expected = 0.0
    for d, number in enumerate(split.documents_per_task):
        ids = batch.input_ids[batch.task == d]
        expected += number * peft_model(model, of_task(weights, d))(input_ids=ids, labels=ids).loss.item()
    trace = poutine.trace(model.likelihood).get_trace(model, weights, batch)
    assert float(trace.log_prob_sum()) == pytest.approx(-expected, rel=1e-5)
    assert model.likelihood.observations(split.num_documents, split.num_tokens) == sum(split.documents_per_task)

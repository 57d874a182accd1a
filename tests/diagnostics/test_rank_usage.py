"""Which ranks the tokens of each task use, counted token by token."""

from __future__ import annotations

import math

import pytest
import torch

from bora_pyro import HierarchicalNormal, InputError, LoRA, fit
from bora_pyro.adapters import SMoRA
from bora_pyro.data import TokenSplit
from bora_pyro.diagnostics.rank_usage import rank_usage, usage_information
from tests.tiny import TASKS, tiny_bora, tiny_data, tiny_split


@pytest.mark.parametrize("predicting", [False, True])
def test_usage_is_counted_document_by_document(predicting):
    model = tiny_bora(adapter=SMoRA(rank=6, active=4, partition=2), prior=HierarchicalNormal(tau=1))
    fitted = fit(model, tiny_data(), epochs=3, learning_rate=0.1, patience=0)
    documents = [[0, 5, 6, 7, 8], [0, 9, 4], [0, 11, 12, 13]]
    split = TokenSplit.from_documents(documents, task=[0, 2, 0], num_tasks=TASKS, read=[3, 1, 2], pad_token_id=1)
    expected = {slot.name: torch.zeros(TASKS, slot.layers, 3, dtype=torch.int64) for slot in model.backbone.slots}
    theta, _ = fitted.weights()
    for document, d, start in zip(documents, (0, 2, 0), (3, 1, 2), strict=True):
        own = {name: value[d : d + 1] for name, value in theta.items()}
        change = model.change(own, torch.tensor([0]), torch.tensor([d]))

        def seen(slot, layer, x, output, own=own, change=change, d=d, start=start):
            latents = {name: own[f"{slot.name}.{name}"][:, layer] for name in model.tensors.names(slot)}
            chosen, _ = model.adapter.route(x, model.tensors.at_layer(slot, layer, latents))
            tokens = range(start - 1, x.shape[1] - 1) if predicting else range(x.shape[1])
            for token in tokens:
                for expert in chosen[0, token].tolist():
                    expected[slot.name][d, layer, expert] += 1
            return change(slot, layer, x, output)

        model.backbone.logits(torch.tensor([document]), seen)
    found = rank_usage(fitted, split, predicting=predicting)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    several = rank_usage(fitted, split, predicting=predicting, token_budget=5)
    assert all(torch.equal(several[name], value) for name, value in expected.items())
    assert int(found["q_proj"][0, 0].sum()) == 2 * (4 if predicting else 9)


def test_the_information_of_usage():
    apart = torch.tensor([[[6, 0, 0]], [[0, 4, 2]]])
    alike = torch.tensor([[[6, 3, 9]], [[2, 1, 3]]])
    found = usage_information({"a": apart, "b": alike})
    assert float(found["a"]) == pytest.approx(math.log(2))
    assert float(found["b"]) == pytest.approx(0, abs=1e-12)


def test_other_adapters_have_no_usage():
    fitted = fit(tiny_bora(adapter=LoRA(rank=2)), tiny_data(), epochs=1)
    with pytest.raises(InputError, match=r"LoRA\(rank=2, alpha=2.0\) has no experts among which a token chooses"):
        rank_usage(fitted, tiny_split())

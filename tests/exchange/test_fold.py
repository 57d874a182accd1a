"""The mean of several changes: exact side by side, and cut as the singular value decomposition of the whole matrix cuts it."""

from __future__ import annotations

import pytest
import torch

from bora_pyro import InputError, LoRA
from bora_pyro.exchange.factors import LoraForm, cut, lora_form
from bora_pyro.exchange.fold import mean_form, stacked
from tests.tiny import random_weights, tiny_bora

SHAPES = {"a": (7, 5), "b": (4, 9)}  # (in, out)


def random_form(rank, alpha, seed):
    generator = torch.Generator().manual_seed(seed)
    factors = {
        path: {"lora_A": torch.randn(rank, n, generator=generator), "lora_B": torch.randn(out, rank, generator=generator)}
        for path, (n, out) in SHAPES.items()
    }
    return LoraForm(factors, alpha)


def change(form, path):
    return form.alpha / form.rank * form.factors[path]["lora_B"].double() @ form.factors[path]["lora_A"].double()


FORMS = {
    "alike": [random_form(2, 3.0, seed) for seed in range(3)],
    "other ranks and scales": [random_form(1, 2.0, 0), random_form(3, 3.0, 1), random_form(2, 1.0, 2)],
    "one": [random_form(3, 3.0, 4)],
}


@pytest.mark.parametrize("forms", FORMS.values(), ids=FORMS)
def test_the_mean_of_the_changes_is_exact(forms):
    found = mean_form(forms)
    assert found.rank == sum(form.rank for form in forms)
    assert found.relative_error == 0
    for path in SHAPES:
        torch.testing.assert_close(
            change(found, path), torch.stack([change(form, path) for form in forms]).mean(0), rtol=1e-5, atol=1e-6
        )
    if len({(form.rank, form.alpha) for form in forms}) == 1:  # the matrices themselves, untouched, under the same alpha
        assert found.alpha == forms[0].alpha
        for path in SHAPES:
            assert torch.equal(found.factors[path]["lora_A"], torch.cat([form.factors[path]["lora_A"] for form in forms]))


@pytest.mark.parametrize("rank", [1, 2, 4, 5])
@pytest.mark.parametrize("forms", FORMS.values(), ids=FORMS)
def test_the_cut_is_that_of_the_whole_matrix(forms, rank):
    found, exact = mean_form(forms, rank=rank), mean_form(forms)
    if rank >= exact.rank:
        assert (found.rank, found.relative_error) == (exact.rank, 0)
        return
    assert (found.rank, found.alpha) == (rank, rank)
    lost = total = 0.0
    for path in SHAPES:
        whole = change(exact, path)
        a, b = cut(whole, rank)  # of the (out, in) matrix
        torch.testing.assert_close(change(found, path), b.double() @ a.double(), rtol=1e-4, atol=1e-5)
        lost += float((whole - change(found, path)).square().sum())
        total += float(whole.square().sum())
    assert found.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-4, abs=1e-6)


def test_equal_adapters_fold_to_themselves_at_their_own_rank():
    form = random_form(2, 3.0, 0)
    found = mean_form([form, form, form], rank=2)
    assert found.relative_error == pytest.approx(0, abs=1e-7)
    for path in SHAPES:
        torch.testing.assert_close(change(found, path), change(form, path), rtol=1e-5, atol=1e-5)
    nothing = LoraForm({path: {name: 0 * value for name, value in of.items()} for path, of in form.factors.items()}, 3.0)
    assert mean_form([nothing, nothing], rank=1).relative_error == 0


def test_the_logits_are_those_of_the_mean_change():
    model = tiny_bora(targets=["q_proj", "fc1"])
    one, two = random_weights(model, seed=1), random_weights(model, seed=2)
    forms = [[lora_form(model, {name: value[d] for name, value in of.items()}) for of in (one, two)] for d in range(3)]
    folded = tiny_bora(targets=["q_proj", "fc1"], adapter=LoRA(rank=4, alpha=3.0))
    weights = stacked(folded, [mean_form(of_task) for of_task in forms])
    x, task = torch.randint(3, 64, (3, 6), generator=torch.Generator().manual_seed(0)), torch.arange(3)
    with torch.no_grad():
        found = folded.backbone.logits(x, folded.change(weights, task))
        for d in range(3):
            base = tiny_bora(targets=["q_proj", "fc1"]).backbone
            layers = dict(base.model.named_modules())
            for path in forms[d][0].factors:
                layers[path].weight += ((change(forms[d][0], path) + change(forms[d][1], path)) / 2).float()
            torch.testing.assert_close(found[d], base.logits(x[d : d + 1], None)[0], rtol=1e-4, atol=1e-4)


def test_what_has_no_mean():
    form = random_form(2, 3.0, 0)
    other = LoraForm({"a": form.factors["a"]}, 3.0)
    with pytest.raises(InputError, match="only some of the adapters change 'b'; fold adapters with the same targets"):
        mean_form([form, other])
    with pytest.raises(InputError, match="rank is 0; give a whole number from 1 up"):
        mean_form([form, form], rank=0)

"""The states after the last epochs of a fit: which ones they are, and that a resumed fit has them too."""

from __future__ import annotations

import pytest
import torch

from bora_pyro import HierarchicalNormal, InputError, fit
from bora_pyro.inference.callbacks import Callback
from bora_pyro.inference.fit import FitStopped
from bora_pyro.inference.last_epochs import LastEpochs
from tests.tiny import tiny_bora, tiny_data

OPTIONS = {"epochs": 3, "token_budget": 30, "patience": 0, "learning_rate": 0.03, "average": False}


def bora():
    return tiny_bora(prior=HierarchicalNormal(10.0))


class Centres(Callback):
    """The sites after each epoch."""

    def __init__(self):
        self.found = []

    def after_epoch(self, loop):
        self.found.append({name: value.clone() for name, value in loop.state.sites().items()})


def test_they_are_the_states_after_the_last_epochs():
    model, last, centres = bora(), LastEpochs(2), Centres()
    fit(model, tiny_data(), callbacks=[last, centres], **OPTIONS)
    assert len(centres.found) == 3
    expected = [model.weights_given(sites)[0] for sites in centres.found[1:]]
    torch.testing.assert_close([*last.draws()], expected, rtol=0, atol=0)
    assert any((expected[0][name] != expected[1][name]).any() for name in expected[0])


def test_steps_that_draw_tasks_have_all_of_them():
    last = LastEpochs(1)
    data = tiny_data()
    data.validation = data.validation.subset(torch.arange(0))  # the last epoch is kept
    fitted = fit(bora(), data, callbacks=[last], task_subsampling=True, **OPTIONS)
    torch.testing.assert_close(last.weights[0], fitted.weights()[0], rtol=0, atol=0)


def test_a_resumed_fit_has_them(tmp_path):
    whole, first, second, asked = LastEpochs(3), LastEpochs(3), LastEpochs(3), []
    fit(bora(), tiny_data(), callbacks=[whole], **OPTIONS)
    steps = len(tiny_data().train.batches(token_budget=30, seed=0))
    stop = {"stop": lambda: asked.append(1) or len(asked) == steps + 1, "checkpoints": tmp_path}
    with pytest.raises(FitStopped):
        fit(bora(), tiny_data(), callbacks=[first], **stop, **OPTIONS)
    assert len(first.weights) == 1
    fit(bora(), tiny_data(), callbacks=[second], checkpoints=tmp_path, **OPTIONS)
    torch.testing.assert_close([*second.weights], [*whole.weights], rtol=0, atol=0)


def test_none_is_refused():
    with pytest.raises(InputError, match="number of epochs is 0; give a whole number from 1 up"):
        LastEpochs(0)

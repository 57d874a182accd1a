"""Diagnostics number layers by their blocks, also where only some blocks have adapters."""

from __future__ import annotations

import torch

from bora_pyro import Backbone, BoRA, LearnedPrecision, LoRA, fit
from bora_pyro.diagnostics.shrinkage import shrinkage
from tests.tiny import tiny_data, tiny_model


def test_layers_have_the_numbers_of_their_blocks():
    base = tiny_model("opt", num_hidden_layers=4)
    backbone = Backbone(base, targets=["1.fc1", "2.fc1", "2.fc2", "3.self_attn.q_proj"])
    prior = LearnedPrecision(per="layer", start=10.0, every=1)
    data = tiny_data()
    fitted = fit(BoRA(backbone, 3, adapter=LoRA(rank=2), prior=prior), data, epochs=1, learning_rate=0.03)
    posterior = shrinkage(fitted, data).posterior
    assert posterior["layer"].values.tolist() == [1, 2, 3]
    there = {"fc1": {1, 2}, "fc2": {2}, "q_proj": {3}}
    for variable in ("rms_deviation", "pooling_factor", "delta_w_norm", "tau"):
        for module, blocks in there.items():
            found = posterior[variable].sel(module=module)
            for block in (1, 2, 3):
                assert bool(found.sel(layer=block).isnull().all()) == (block not in blocks), (variable, module, block)
    theta, _ = fitted.weights()
    of_block = torch.linalg.matrix_norm(theta["fc1.lora_B"][:, 1] @ theta["fc1.lora_A"][:, 1])
    found = posterior["delta_w_norm"].sel(module="fc1", layer=2).values.ravel()
    torch.testing.assert_close(torch.from_numpy(found).float(), of_block)

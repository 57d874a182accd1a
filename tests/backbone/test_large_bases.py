"""Bases in 4 and 8 bits, and bases whose layers lie on several devices."""

from __future__ import annotations

import copy
import importlib.util
import math

import pytest
import torch
from torch import nn

from bora_pyro import Backbone, BoRA, InputError, LoRA, fit, save_peft
from bora_pyro.backbone.slots import find_slots
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.saved import load_run
from tests.tiny import hooks_left, loaded_peft, of_task, random_ids, random_weights, tiny_data, tiny_model
from tests.tiny_base import command_main, line, quick_fit, save_base

BITS = pytest.mark.parametrize("quantization", ["4bit", "8bit"])
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
# 8-bit layers round their inputs to 8 bits, too; 4-bit ones multiply by what they stand for
TOLERANCE = {"4bit": 1e-4, "8bit": 0.15}


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """Products of 8-bit matrices as processors with VNNI have them: others cut the sums at 16 bits and are off by a fifth."""
    left, right = torch.full((32, 64), 127, dtype=torch.int8), torch.full((64, 32), -127, dtype=torch.int8)
    exact = -64 * 127**2  # below 2^24, so that float32 holds it
    if (torch._int_mm(left, right) != exact).any():
        monkeypatch.setattr(torch, "_int_mm", lambda one, other: (one.float() @ other.float()).int())
        assert (torch._int_mm(left, right) == exact).all()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of tiny models by architecture, each with a tokenizer that nobody asks."""
    folders = {}
    for architecture in ("opt", "llama", "gpt2"):
        folder = tmp_path_factory.mktemp(architecture)
        save_base(folder)
        tiny_model(
            architecture, hidden_size=64, **({"word_embed_proj_dim": 64} if architecture == "opt" else {})
        ).save_pretrained(folder)
        folders[architecture] = folder
    return folders


def quantised(folder, quantization, **options):
    return Backbone.from_pretrained(folder, quantization=quantization, **options)


def dequantised(backbone):
    """The same base with the weights that its quantised layers stand for, as plain linear layers."""
    import bitsandbytes as bnb

    model = copy.deepcopy(backbone.model)
    for path, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            # once used, a layer keeps its scales elsewhere
            scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
            weight = module.weight.data.float() * scales[:, None] / 127
        else:
            continue
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        plain.weight = nn.Parameter(weight.float(), requires_grad=False)
        plain.bias = module.bias
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, plain)
    return Backbone(model, targets="all-linear", gradient_checkpointing=backbone.gradient_checkpointing)


def gradients(backbone, weights, model):
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    output = backbone.logits(random_ids(), model.change(leaves, torch.tensor([2, 0, 1])))
    output.float().log_softmax(-1)[..., 5].mean().backward()
    return output.detach(), {name: leaf.grad for name, leaf in leaves.items()}


@needs_bitsandbytes
@BITS
@pytest.mark.parametrize("architecture", ["opt", "llama", "gpt2"])
def test_slots_are_those_of_the_plain_base(bases, architecture, quantization):
    backbone = quantised(bases[architecture], quantization, targets="all-linear")
    plain = find_slots(Backbone.from_pretrained(bases[architecture]).model, "all-linear")
    seen = [(slot.name, slot.paths, slot.in_features, slot.out_features) for slot in backbone.slots]
    assert seen == [(slot.name, slot.paths, slot.in_features, slot.out_features) for slot in plain]
    # bitsandbytes turns GPT-2's transposed layers into ordinary ones
    assert not any(slot.fan_in_fan_out for slot in backbone.slots)
    stored = {backbone.model.get_submodule(path).weight.dtype for slot in backbone.slots for path in slot.paths}
    assert stored == {torch.uint8 if quantization == "4bit" else torch.int8}
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert repr(backbone).split(" M ")[0] == repr(Backbone.from_pretrained(bases[architecture])).split(" M ")[0]


@needs_bitsandbytes
@BITS
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["opt", "llama", "gpt2"])
def test_gradients_are_those_of_the_weights_that_the_base_stands_for(bases, architecture, quantization, checkpointing):
    backbone = quantised(bases[architecture], quantization, targets="all-linear", gradient_checkpointing=checkpointing)
    model = BoRA(backbone, 3, adapter=LoRA(rank=2))
    weights = random_weights(model, scale=0.1)
    output, found = gradients(backbone, weights, model)
    expected_output, expected = gradients(dequantised(backbone), weights, model)
    tolerance = TOLERANCE[quantization]
    assert (output - expected_output).norm() < tolerance * expected_output.norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < tolerance * gradient.norm(), name
        assert (found[name].flatten(2).abs().amax(-1) > 0).all()  # every task and layer: it flows through the layers above
    assert hooks_left(backbone) == 0


@needs_bitsandbytes
@BITS
def test_checkpointing_changes_nothing(bases, quantization):
    results = []
    for checkpointing in (False, True):
        backbone = quantised(bases["llama"], quantization, gradient_checkpointing=checkpointing)
        model = BoRA(backbone, 3, adapter=LoRA(rank=2))
        results.append(gradients(backbone, random_weights(model), model))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


@needs_bitsandbytes
def test_a_processor_that_multiplies_8_bits_wrongly_is_refused(bases, monkeypatch):
    """AVX-512 without VNNI adds 128 to the inputs and cuts the sums of two products at 16 bits."""

    def cut(inputs, weight):
        pairs = ((inputs.float() + 128)[:, None] * weight.float()).unflatten(2, (-1, 2)).sum(3)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(2).int() - 128 * weight.int().sum(1)

    monkeypatch.setattr(torch.ops.bitsandbytes, "int8_linear_matmul", cut)
    with pytest.raises(InputError, match=r"8bit.*wrong products on this processor.*4bit"):
        quantised(bases["opt"], "8bit")


@needs_bitsandbytes
@BITS
def test_a_short_fit_lowers_the_loss_and_leaves_the_base_alone(bases, quantization):
    backbone = quantised(bases["llama"], quantization)
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    model = BoRA(backbone, 3, adapter=LoRA(rank=4))
    fitted = fit(model, tiny_data((12, 12, 12)), epochs=6, learning_rate=0.05, patience=0)
    losses = [entry["loss"] for entry in fitted.history]
    assert losses[-1] < 0.9 * losses[0]
    after = backbone.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@needs_bitsandbytes
@BITS
@pytest.mark.parametrize("architecture", ["opt", "llama"])
def test_peft_reads_the_adapter_on_the_quantised_base(bases, tmp_path, architecture, quantization):
    backbone = quantised(bases[architecture], quantization)
    model = BoRA(backbone, 3, adapter=LoRA(rank=2, alpha=3.0))
    weights, input_ids = random_weights(model), random_ids()
    save_peft(tmp_path, model, of_task(weights, 1))
    expected = backbone.logits(input_ids, model.change(weights, torch.tensor([1, 1, 1])))
    found = loaded_peft(quantised(bases[architecture], quantization).model, tmp_path)(input_ids=input_ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (expected - backbone.logits(input_ids)).abs().mean() > 0.05


@needs_bitsandbytes
def test_a_run_keeps_its_quantisation(tmp_path, capsys):
    main, options = command_main(), quick_fit(tmp_path) | {"tau": 100, "output_dir": tmp_path / "run", "epochs": 1}
    assert main(line(options | {"quantization": "4bit"})) == 0
    run = load_run(tmp_path / "run", device="cpu")
    assert run.config.quantization == "4bit"
    score = run.fitted.evaluate(run.data.test)["test_perplexity"]
    assert math.isclose(score, run.metrics["test_perplexity"], rel_tol=1e-5)
    capsys.readouterr()
    assert main(line(options | {"quantization": "8bit", "resume": "true"})) == 2
    assert "quantization is '8bit', but the run in" in capsys.readouterr().err
    assert main(line(options | {"quantization": "4bit", "resume": "true", "epochs": 2})) == 0
    assert len(RunFolder.open(tmp_path / "run").read_log()) == 2


@pytest.mark.parametrize(
    ("options", "package", "extra"),
    [
        ({"quantization": "4bit"}, "bitsandbytes", "quantization"),
        ({"quantization": "8bit"}, "accelerate", "quantization"),
        ({"device_map": "auto"}, "accelerate", "peft"),
    ],
)
def test_a_package_that_is_missing(monkeypatch, options, package, extra):
    find = importlib.util.find_spec
    there = {"bitsandbytes", "accelerate"} - {package}
    known = {"bitsandbytes", "accelerate"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: (name in there or None) if name in known else find(name))
    with pytest.raises(InputError, match=rf"needs {package}, which is not installed; pip install 'bora_pyro\[{extra}\]'"):
        Backbone.from_pretrained("builtin:nano", **options)


@pytest.mark.parametrize("options", [{"quantization": "3bit"}, {"device_map": "autos"}])
def test_a_value_that_is_not_known(options):
    with pytest.raises(InputError, match=r"allowed: .*; did you mean '"):
        Backbone.from_pretrained("builtin:nano", **options)


def test_a_device_map_of_one_device_changes_nothing(bases):
    plain, mapped = (Backbone.from_pretrained(bases["llama"], device_map=device_map) for device_map in (None, {"": "cpu"}))
    assert mapped.device == torch.device("cpu")
    model = BoRA(mapped, 3, adapter=LoRA(rank=2))
    weights = random_weights(model)
    torch.testing.assert_close(gradients(mapped, weights, model), gradients(plain, weights, model), rtol=0, atol=0)


def test_an_adapter_goes_to_the_device_of_its_layer(bases):
    # the meta device stands for a second one: it has shapes and no numbers, and refuses to be mixed with the first
    model = BoRA(Backbone.from_pretrained(bases["llama"], targets="all-linear"), 3, adapter=LoRA(rank=2))
    base = model.backbone.model
    for module in (base.model.layers[1], base.model.norm, base.lm_head):
        module.to("meta")
    base.model.layers[1].register_forward_pre_hook(to_meta, with_kwargs=True)
    assert model.backbone.device == torch.device("cpu")
    weights = {name: value.requires_grad_() for name, value in random_weights(model).items()}
    for checkpointing in (False, True):
        model.backbone.gradient_checkpointing = checkpointing
        output = model.backbone.logits(random_ids(), model.change(weights, torch.tensor([2, 0, 1])))
        assert output.device.type == "meta"
        assert output.requires_grad


def to_meta(module, args, kwargs):
    def move(value):
        if isinstance(value, tuple):
            return tuple(map(move, value))
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    return move(args), {name: move(value) for name, value in kwargs.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_that_accelerate_moves_keep_its_forward(bases, checkpointing, tmp_path):
    # weights that wait on the disk: accelerate puts its own forward on every module that it fills just in time
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    device_map |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    plain = Backbone.from_pretrained(bases["llama"])
    spread = Backbone.from_pretrained(bases["llama"], device_map=device_map, gradient_checkpointing=checkpointing)
    before = hooks_left(spread)
    assert before > 0
    model = BoRA(plain, 3, adapter=LoRA(rank=2))
    weights = random_weights(model)
    torch.testing.assert_close(gradients(spread, weights, model), gradients(plain, weights, model), rtol=1e-5, atol=1e-6)
    assert hooks_left(spread) == before

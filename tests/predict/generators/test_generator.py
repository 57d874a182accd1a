"""Round trips of latents, standards and whole generators, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from bora_pyro import InputError
from bora_pyro.adapters import ADAPTERS
from bora_pyro.files.tensors import write_safetensors
from bora_pyro.predict.generators import CVAE, METHODS, Mean, Nearest, Ridge
from bora_pyro.predict.generators.generator import Generator
from bora_pyro.predict.generators.layout import Layout
from bora_pyro.predict.generators.space import Space, Standard
from tests.predict.generators.planted import LAYOUT, planted
from tests.tiny import of_task, random_weights, tiny_adapter, tiny_bora

QUICK = {"cvae": lambda: CVAE(steps=3), "ridge": Ridge, "nearest": Nearest, "mean": Mean}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_latents_of_every_adapter_come_back_exactly(adapter):
    model = tiny_bora(adapter=tiny_adapter(adapter), targets=["q_proj", "fc1"])
    theta, layout = random_weights(model), Layout.of(model.starts)
    flat = layout.flatten(theta)
    assert flat.shape == (model.num_tasks, layout.size)
    for name, value in layout.unflatten(flat).items():
        assert torch.equal(value, theta[name])
    for d in range(model.num_tasks):
        assert torch.equal(layout.flatten(of_task(theta, d)), flat[d])


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 1e4])
def test_standardising_is_undone_exactly(scale):
    """Bit for bit, also for entries that are 0, for a latent without deviations and for adapters of other tasks."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout({"a": (50,), "b": (2, 20), "shared": (10,)})
    latents = 3 + torch.randn((5, layout.size), generator=generator)
    latents[:, :50] *= scale
    latents[1, ::7] = 0
    latents[:, -10:] = latents[0, -10:]
    standard = Standard.of(latents, layout)
    others = scale * torch.randn((4, layout.size), generator=generator)
    for values in (latents, others):
        assert torch.equal(standard.restore(standard.standardise(values)), values)
    assert (standard.scales.log2() == standard.scales.log2().round()).all()
    assert standard.scales[2] == 1
    deviations = standard.standardise(latents)
    for part in deviations.split(layout.sizes, -1)[:2]:
        assert 0.7 < float(part.square().mean().sqrt()) < 1.42


def test_the_basis_has_the_training_adapters_and_is_orthonormal():
    latents = torch.randn((6, LAYOUT.size), generator=torch.Generator().manual_seed(0))
    space = Space.of(latents, LAYOUT)
    assert space.components == 5
    assert space.share == pytest.approx(1.0)
    torch.testing.assert_close(space.basis.mT @ space.basis, torch.eye(5), atol=1e-6, rtol=0)
    coordinates = space.coordinates(latents)
    assert float(coordinates.square().mean()) == pytest.approx(1.0)
    torch.testing.assert_close(space.latents(coordinates), latents, atol=1e-5, rtol=1e-5)
    few = Space.of(latents, LAYOUT, components=2)
    assert few.components == 2
    torch.testing.assert_close(few.basis, space.basis[:, :2])
    deviations = few.standard.standardise(latents)
    kept = (deviations @ few.basis.double()).square().sum() / deviations.square().sum()
    assert few.share == pytest.approx(float(kept), rel=1e-5)
    assert Space.of(planted(9, free=3)[0][1], LAYOUT).components == 3  # no direction of rounding


@pytest.mark.parametrize("method", METHODS)
def test_a_generator_comes_back_bit_for_bit(method, tmp_path):
    (vectors, latents), (new, _) = planted()
    vectors[:, 0], new[:, 0] = 3.0, 5.0  # an entry that no training task varies in
    generator = Generator.fit(QUICK[method](), vectors, latents, layout=LAYOUT)
    write_safetensors(tmp_path / "g.safetensors", generator.state(), {})
    again = Generator.from_state(load_file(tmp_path / "g.safetensors"), generator.describe())
    assert again.describe()["options"] == generator.describe()["options"]
    assert again.method.chosen() == generator.method.chosen()
    for vector in new:
        assert torch.equal(again.flat(vector), generator.flat(vector))
        if generator.method.has_draws:
            assert torch.equal(again.flat(vector, draw=2), generator.flat(vector, draw=2))
    assert generator.flat(new[0]).isfinite().all()
    found = generator.generate(new[0])
    assert {name: value.shape for name, value in found.items()} == LAYOUT.shapes


@pytest.mark.parametrize("method", METHODS)
def test_generate_is_a_function_of_the_vector_and_the_generator(method):
    (vectors, latents), (new, _) = planted()
    generator = Generator.fit(QUICK[method](), vectors, latents, layout=LAYOUT)
    state = {name: value.clone() for name, value in generator.state().items()}
    first = generator.flat(new[0])
    generator.flat(new[1])
    torch.manual_seed(7)
    assert torch.equal(generator.flat(new[0].clone()), first)
    assert all(torch.equal(value, state[name]) for name, value in generator.state().items())


@pytest.mark.parametrize("method", ["ridge", "nearest", "mean"])
def test_what_has_no_draws_says_so(method):
    (vectors, latents), _ = planted()
    generator = Generator.fit(QUICK[method](), vectors, latents, layout=LAYOUT)
    with pytest.raises(InputError, match="gives one adapter and no draws"):
        generator.flat(vectors[0], draw=0)


def test_what_is_refused():
    (vectors, latents), _ = planted()
    generator = Generator.fit(Ridge(), vectors, latents, layout=LAYOUT)
    with pytest.raises(InputError, match=r"the task vector has \(7,\) numbers, those that the generator has learned from \(6,\)"):
        generator.flat(torch.zeros(7))
    with pytest.raises(InputError, match="2 tasks are given; a generator learns from 4 tasks or more"):
        Generator.fit(Ridge(), vectors[:2], latents[:2], layout=LAYOUT)
    with pytest.raises(InputError, match="all tasks have the same adapter"):
        Generator.fit(Ridge(), vectors, latents[:1].expand(len(vectors), -1), layout=LAYOUT)


@pytest.mark.parametrize("change", ["method", "latents", "huge", "options", "wide", "no tensor", "other size"])
def test_a_damaged_generator_is_one_line(change):
    (vectors, latents), _ = planted()
    generator = Generator.fit(CVAE(steps=1), vectors, latents, layout=LAYOUT)
    state, about = generator.state(), generator.describe()
    if change == "method":
        about["method"] = "oracle"
    elif change == "latents":
        about["latents"] = {"q_proj.lora_A": [1]}
    elif change == "huge":
        about["latents"] = {name: [10**7, 10**7, 10**7] for name in about["latents"]}
    elif change == "options":
        about["options"] = {"width": 8}
    elif change == "wide":
        about["options"] |= {"latent": 10**12}
    elif change == "no tensor":
        del state["space.basis"]
    else:
        state["space.basis"] = state["space.basis"][:3]
    with pytest.raises(InputError, match="the generator is damaged") as caught:
        Generator.from_state(state, about)
    assert "\n" not in str(caught.value)

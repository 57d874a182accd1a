"""The loop: closed forms against central fits, bytes, absence, and clients that send garbage."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bora_pyro import FrozenALoRA, HierarchicalNormal, InputError, LearnedPrecision, LoRA, Pooled, fit
from bora_pyro.federated.deal import deal
from bora_pyro.federated.loop import Federation, federate
from bora_pyro.federated.message import Message
from bora_pyro.federated.options import FederatedOptions
from bora_pyro.federated.strategies import FFA, STRATEGIES, FederatedBoRA, FedIT, NoncenteredBoRA
from tests.federated.linear import linear, map_of
from tests.tiny import tiny_bora, tiny_data

PLAIN = {"optimizer": "sgd", "warmup": 0.0, "schedule": "constant", "gradient_clip": math.inf, "patience": 0}
WHOLE = {"token_budget": 10_000}
QUICK = {"rounds": 3, "local_steps": 2, "patience": 0, "learning_rate": 0.03}


def model_of(strategy, **options):
    adapter = FrozenALoRA(rank=2, alpha=3.0) if strategy == "ffa" else LoRA(rank=2, alpha=3.0)
    prior = HierarchicalNormal(50.0) if STRATEGIES[strategy].personal else Pooled()
    model = tiny_bora(targets=["q_proj", "fc1"], adapter=adapter, prior=prior, **options)
    if strategy != "ffa":  # with B at 0 plain gradient descent would not move A
        generator = torch.Generator().manual_seed(5)
        for name, value in model.starts.items():
            if name.endswith("lora_B"):
                value += 0.1 * torch.randn(value.shape, generator=generator)
    return model


def without_validation(data):
    nothing = data.train.subset(torch.arange(0))
    return replace(data, validation=nothing)


def equal(one, other, **tolerance):
    tolerance = {"rtol": 1e-4, "atol": 1e-6} | tolerance
    for left, right in zip(one.weights(), other.weights(), strict=True):
        for name in left:
            torch.testing.assert_close(left[name], right[name], **tolerance)


@pytest.mark.parametrize("strategy", ["ffa", "fedit"])
def test_one_client_is_the_central_fit(strategy):
    """The same steps of AdamW on the same batches: rounds and local steps only count them."""
    data, rate = without_validation(tiny_data((6, 4, 8))), {"learning_rate": 0.02, "token_budget": 40}
    central = fit(model_of(strategy), data, epochs=2, average=False, deviation_reach=0.0, gradient_norm=False, patience=0, **rate)
    steps = central.history[-1]["total"]
    assert steps % 2 == 0
    clients = {"all": data.tasks}
    apart = federate(model_of(strategy), data, STRATEGIES[strategy](), clients=clients, rounds=2, local_steps=steps // 2, **rate)
    equal(apart, central)
    assert apart.history[0]["loss"] == pytest.approx(central.history[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("strategy", ["ffa", "fedit"])
def test_one_full_step_at_each_client_is_one_step_on_all_documents(strategy):
    """For plain gradient descent: the mean of the clients' gradients, by their observations, is the gradient of all."""
    data = without_validation(tiny_data((6, 1, 8)))
    options = {"rounds": 1, "local_steps": 1, "learning_rate": 0.5, **PLAIN, **WHOLE}
    pooled = federate(model_of(strategy), data, STRATEGIES[strategy](), clients={"all": data.tasks}, **options)
    apart = federate(model_of(strategy), data, STRATEGIES[strategy](), **options)
    equal(apart, pooled)
    model = model_of(strategy)
    moved = max(float((apart.weights()[1][name] - start).abs().max()) for name, start in model.starts.items())
    assert moved > 1e-3
    by_documents = federate(model_of(strategy), data, STRATEGIES[strategy](), weights="documents", **options)
    with pytest.raises(AssertionError):
        equal(by_documents, pooled)  # documents of unequal length


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_under_bora_it_does_not_matter_who_has_a_task(optimizer):
    data, options = without_validation(tiny_data()), PLAIN | WHOLE | {"optimizer": optimizer, "rounds": 2, "local_steps": 3}
    apart, together = (
        federate(model_of("bora"), data, FederatedBoRA(), clients=clients, learning_rate=0.01, **options)
        for clients in (None, {"one": ["task 0", "task 2"], "other": ["task 1"]})
    )
    equal(apart, together, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("tau", "options"),
    [
        (0.5, {"rounds": 14}),
        (20.0, {"rounds": 14, "server_rate": 8.0}),
        (0.5, {"rounds": 48, "participation": 0.34}),
    ],
    ids=["mean", "beyond the mean", "a third of the clients"],
)
def test_the_fixed_point_of_bora_is_the_central_map(tau, options):
    model, data, places = linear(HierarchicalNormal(tau))
    fitted = federate(model, data, FederatedBoRA(), learning_rate=0.5, **PLAIN | {"local_steps": 10} | options)
    expected = map_of(places, tau)
    for found, known in zip(fitted.weights(), expected, strict=True):
        for name in known:
            torch.testing.assert_close(found[name], known[name], rtol=0, atol=1e-4)


def test_the_first_step_of_theta_is_that_of_one_adapter_for_all():
    """With the deviations at 0, the mean of the clients' Θ after a step is the common adapter of fedit after that step."""
    data = without_validation(tiny_data((6, 1, 8)))
    options = {"rounds": 1, "local_steps": 1, "learning_rate": 0.5, **PLAIN, **WHOLE}
    noncentered, pooled = (
        federate(model_of(name), data, STRATEGIES[name](), **options).weights()[1] for name in ("bora_noncentered", "fedit")
    )
    for name, value in pooled.items():
        torch.testing.assert_close(noncentered[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tau", [2.0, 20.0])
def test_single_steps_of_theta_and_deviations_end_at_the_central_map(tau):
    model, data, places = linear(HierarchicalNormal(tau))
    options = {"learning_rate": 0.5, "rounds": 200, "local_steps": 1}
    fitted = federate(model, data, NoncenteredBoRA(), **PLAIN | options)
    for found, known in zip(fitted.weights(), map_of(places, tau), strict=True):
        for name in known:
            torch.testing.assert_close(found[name], known[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_federated_fit_learns_and_the_best_round_is_kept(strategy):
    data = tiny_data((6, 4, 8))
    fitted = federate(model_of(strategy), data, STRATEGIES[strategy](), **QUICK)
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
    scores = [entry["validation_perplexity"] for entry in fitted.history]
    assert fitted.validation_score <= min(scores)
    if fitted.best_epoch:
        assert fitted.validation_score == scores[fitted.best_epoch - 1]
    measured = fitted.evaluate(data.validation, name="validation")["validation_perplexity"]
    assert measured == pytest.approx(fitted.validation_score, rel=1e-5)
    assert all(entry["refused"] == [] and entry["clients"] == 3 for entry in fitted.history)
    assert (strategy == "exact_product") == ("lost" in fitted.history[0])
    assert fitted.documents == [6, 4, 8]


def test_the_seed_decides_who_trains_and_what_they_see():
    options = QUICK | {"participation": 0.67, "token_budget": 20}
    one, same, other = (federate(model_of("bora"), tiny_data(), FederatedBoRA(), seed=seed, **options) for seed in (1, 1, 2))
    assert [entry["loss"] for entry in one.history] == [entry["loss"] for entry in same.history]
    assert [entry["loss"] for entry in one.history] != [entry["loss"] for entry in other.history]
    equal(one, same, rtol=0, atol=0)
    server = Federation(model_of("bora"), tiny_data(), FederatedBoRA(), **options).server
    drawn = [server.draw(number) for number in range(1, 30)]
    assert {len(names) for names in drawn} == {2}
    assert {name for names in drawn for name in names} == {"task 0", "task 1", "task 2"}


def test_bytes_are_those_of_the_formula():
    latents = sum(start.numel() for start in model_of("fedit").starts.values())
    scores, k = 16, 3
    history = federate(model_of("fedit"), tiny_data(), FedIT(), **QUICK).history
    assert [entry["uploaded_bytes"] for entry in history] == [
        k * (4 * latents + scores * (1 + (number == 0))) for number in range(3)
    ]
    assert [entry["downloaded_bytes"] for entry in history] == [k * 4 * latents] * 3  # a new common adapter to all
    only_b = sum(start.numel() for start in model_of("ffa").starts.values())
    history = federate(model_of("ffa"), tiny_data(), FFA(), **QUICK).history
    assert history[1]["uploaded_bytes"] == k * (4 * only_b + scores)
    assert only_b < latents
    model = model_of("bora")
    model.prior = LearnedPrecision()
    sites = len(model.starts)
    history = federate(model, tiny_data(), FederatedBoRA(), **QUICK, participation=0.67).history
    assert [entry["uploaded_bytes"] for entry in history] == [
        2 * (4 * latents + 4 * 3 * sites + scores) + k * scores * (number == 0) for number in range(3)
    ]
    # the start is known to all; afterwards those that take part get Θ and τ
    assert [entry["downloaded_bytes"] for entry in history] == [0, *[2 * (4 * latents + 4 * sites)] * 2]
    assert len(history[0]["tau_path"]) == 1


def spoilt(name, value):
    """Replaces the adapter that one client sends by one number."""

    def on_upload(message):
        if message.sender != name:
            return message
        tensors = {
            key: torch.full_like(tensor, value) if tensor.dtype == torch.float32 else tensor
            for key, tensor in message.tensors.items()
        }
        return Message(message.sender, message.number, tensors)

    return on_upload


@pytest.mark.parametrize("strategy", ["bora", "ffa"])
def test_a_client_that_sends_nan_is_refused_by_name_and_the_round_goes_on(strategy):
    data, options = without_validation(tiny_data()), QUICK | {"rounds": 1, **WHOLE}
    found = federate(model_of(strategy), data, STRATEGIES[strategy](), on_upload=spoilt("task 1", math.nan), **options)
    [refused] = found.history[0]["refused"]
    assert refused["client"] == "task 1"
    assert "'task 1', round 1: " in refused["reason"]
    assert "has a number that is not finite" in refused["reason"]
    assert found.history[0]["clients"] == 2
    lost = federate(
        model_of(strategy),
        data,
        STRATEGIES[strategy](),
        on_upload=lambda message: None if message.sender == "task 1" and message.number else message,
        **options,
    )
    for name, value in found.weights()[1].items():
        assert torch.equal(value, lost.weights()[1][name])
        assert bool(value.isfinite().all())


def test_without_any_message_nothing_moves():
    model = model_of("ffa")
    fitted = federate(model, without_validation(tiny_data()), FFA(), on_upload=lambda message: None, **QUICK)
    assert all(torch.equal(value, model.starts[name]) for name, value in fitted.weights()[1].items())
    assert [entry["clients"] for entry in fitted.history] == [0, 0, 0]
    assert not any(entry["moved"] for entry in fitted.history)


@pytest.mark.parametrize(("strategy", "moved"), [("ffa", [False, False]), ("bora", [True, True])])
def test_a_trimmed_mean_of_two_clients_moves_nothing(strategy, moved):
    """Of three clients, one is lost in each round. Under bora the server remembers the first message of each."""

    def lose(message):
        return None if message.sender == "task 1" and message.number not in (0, *lost) else message

    lost = [1] if strategy == "bora" else []
    model = model_of(strategy)
    options = QUICK | {"rounds": 2, "aggregate": "trimmed_mean", "trim": 0.34}
    history = federate(model, tiny_data(), STRATEGIES[strategy](), on_upload=lose, **options).history
    assert [entry["moved"] for entry in history] == moved
    assert [entry["clients"] for entry in history] == ([3, 2] if strategy == "bora" else [2, 2])


def test_tau_stays_where_no_client_has_validation_documents():
    data, prior = tiny_data(), LearnedPrecision(start=30.0)
    only = data.validation.subset((data.validation.task == 1).nonzero()[:, 0])
    model, data = tiny_bora(targets=["q_proj"], prior=prior), replace(data, validation=only)
    federation = Federation(model, data, FederatedBoRA(), participation=0.34, **QUICK)
    federation.server.draw = lambda number: ["task 0" if number < 3 else "task 1"]
    path = [entry["tau_path"][0]["tau"]["q_proj.lora_B"] for entry in federation.run().history]
    assert path[:2] == [30.0, 30.0]
    assert path[2] != 30.0


def test_a_trimmed_mean_and_a_bounded_update_survive_garbage():
    data, garbage = tiny_data((6, 4, 8)), spoilt("task 1", 1e6)

    def largest(**options):
        federation = Federation(model_of("ffa"), data, FFA(), on_upload=garbage, **QUICK | options)
        federation.run()
        return max(float(value.abs().max()) for value in federation.server.common.values())

    assert largest() > 1e5
    assert largest(aggregate="trimmed_mean", trim=0.34) < 1
    bounded = Federation(model_of("ffa"), data, FFA(), on_upload=garbage, clip=0.5, **QUICK)
    fitted = bounded.run()
    assert fitted.history[0]["largest_update"] > 1e6
    norm = torch.stack([value.square().sum() for value in bounded.server.common.values()]).sum().sqrt()
    assert float(norm) <= 3 * 0.5 + 1e-4  # three rounds, from B = 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_numbers_near_the_largest_one_leave_finite_values(strategy):
    federation = Federation(model_of(strategy), tiny_data(), STRATEGIES[strategy](), on_upload=spoilt("task 1", 3e38), **QUICK)
    federation.run()
    assert all(bool(value.isfinite().all()) for value in federation.server.common.values())


@pytest.mark.parametrize("sums", [[1e31, 1.0, 1e31], [0.0, -1.0, 1.0], [2.0, 1.0, 1.0]])
def test_impossible_sums_for_tau_are_refused(sums):
    def lie(message):
        if message.sender == "task 1" and "tau_sums" in message.tensors:
            sent = message.tensors["tau_sums"]
            tensors = message.tensors | {"tau_sums": torch.tensor(sums).repeat(len(sent) // 3)}
            return Message(message.sender, message.number, tensors)
        return message

    prior = LearnedPrecision(start=30.0)
    fitted = federate(tiny_bora(targets=["q_proj"], prior=prior), tiny_data(), on_upload=lie, **QUICK)
    assert [entry["refused"][0]["reason"] for entry in fitted.history] == [
        f"'task 1', round {number}: no documents have such sums for tau" for number in (1, 2, 3)
    ]
    assert all(1e-3 < float(tau) < 1e9 for tau in prior.tau.values())


def test_how_tasks_are_dealt():
    tasks = [f"task {d}" for d in range(7)]
    assert deal(tasks) == {task: [task] for task in tasks}
    dealt = deal(tasks, 3, seed=1)
    assert sorted(task for own in dealt.values() for task in own) == tasks
    assert [len(own) for own in dealt.values()] == [3, 2, 2]
    assert dealt == deal(tasks, 3, seed=1)
    assert dealt != deal(tasks, 3, seed=2)
    for clients in (0, 8, "tasks", True, 2.0):
        with pytest.raises(InputError, match=r"give task \(a client for each task\), or a number from 1 to 7"):
            deal(tasks, clients)


def test_what_is_refused():
    data = tiny_data()
    with pytest.raises(InputError, match="clients have not each of the 3 tasks once"):
        federate(model_of("bora"), data, clients={"one": ["task 0", "task 1"], "other": ["task 1", "task 2"]})
    with pytest.raises(InputError, match="is learned from validation documents, and there are none"):
        federate(tiny_bora(targets=["q_proj"], prior=LearnedPrecision()), without_validation(data))
    with pytest.raises(InputError, match="which the sums for a learned tau do not have; give a number for tau"):
        federate(tiny_bora(targets=["q_proj"], prior=LearnedPrecision()), data, aggregate="trimmed_mean", trim=0.4)
    with pytest.raises(InputError, match=r"trim is 0\.2, which leaves no value of 3 clients out"):
        federate(model_of("bora"), data, aggregate="trimmed_mean")
    for options, message in (
        ({"participation": 1.5}, "participation is 1.5; give the fraction of the clients"),
        ({"trim": 0.5}, "trim is 0.5; give a fraction from 0 to below 0.5"),
        ({"clip": 0.0}, "clip is 0.0; give a number above 0, or inf"),
        ({"gradient_clip": -1.0}, "gradient_clip is -1.0; give a number above 0"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; allowed: adamw, sgd; did you mean 'adamw'?"),
        ({"server_rate": 0.0}, "server_rate is 0.0; give a finite number above 0"),
        ({"local_steps": 0}, "local_steps is 0; give a whole number from 1 up"),
        ({"warmup": 2.0}, "warmup is 2.0"),
    ):
        with pytest.raises(InputError, match=message):
            FederatedOptions(**options).validate()

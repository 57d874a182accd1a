"""Clients that are reached by letters, without a network: the same fit, and clients that are late, die or send garbage."""

from __future__ import annotations

import pytest
import torch

from bora_pyro import FrozenALoRA, HierarchicalNormal, InputError, LearnedPrecision, LoRA, Pooled
from bora_pyro.data.subset import subset
from bora_pyro.federated.client import Client
from bora_pyro.federated.client_state import restore, state_of
from bora_pyro.federated.loop import federate, fitted_at
from bora_pyro.federated.message import SERVER, RefusedMessage
from bora_pyro.federated.options import FederatedOptions
from bora_pyro.federated.participant import ERROR, STOP, TRAIN, Participant, check_ended
from bora_pyro.federated.remote import Answer, RemoteClients, absences
from bora_pyro.federated.rounds import Rounds
from bora_pyro.federated.server import Server
from bora_pyro.federated.strategies import STRATEGIES
from bora_pyro.federated.strategies.bora import begin
from bora_pyro.federated.wire import Letter, decode, encode
from bora_pyro.inference.checkpoint import Checkpoints
from tests.tiny import tiny_bora, tiny_data

DATA = tiny_data((6, 4, 8))
AGREED = {"base": "aa"}


def new_model(strategy="bora", tau=50.0):
    prior = Pooled() if not STRATEGIES[strategy].personal else LearnedPrecision() if tau is None else HierarchicalNormal(tau)
    adapter = FrozenALoRA(rank=2) if strategy == "ffa" else LoRA(rank=2)
    model = tiny_bora(targets=["q_proj"], adapter=adapter, prior=prior)
    begin(model.prior, model.starts)
    return model


def participant(task, options, *, strategy="bora", tau=50.0, **more):
    client = Client(task, new_model(strategy, tau), subset(DATA, [task]), STRATEGIES[strategy](), options)
    return Participant(client, AGREED, **{"secret": task} | more)


class Direct:
    """A link that asks participants at once. ``spoil(session, answer)`` is what arrives; None: nothing."""

    def __init__(self, participants, spoil=lambda session, answer: answer, keys=None):
        self.participants, self.spoil, self.keys, self.letters, self.arrived = participants, spoil, keys or {}, [], []

    def sessions(self):
        return {session: self.keys.get(session) for session in self.participants}

    def send(self, session, data, *, seconds):
        self.letters.append((session, decode(data, most=10**6, sender=SERVER)))
        ticket = str(len(self.letters))
        answer = self.spoil(session, self.participants[session].answer(data))
        if answer is not None:
            self.arrived.append(Answer(ticket, answer))
        return ticket

    def receive(self):
        arrived, self.arrived = self.arrived, []
        return arrived


def rounds(link, options, *, strategy="bora", tau=50.0, timeout=20.0, on_round=None):
    """The clients of a link, and what the rounds with them come to."""
    model = new_model(strategy, tau)
    clients = RemoteClients(link, AGREED, round_timeout=timeout, say=lambda line: None)
    enrolled = clients.gather(len(link.participants), 5.0)
    server = Server(STRATEGIES[strategy](), model.starts, model.prior, enrolled, options)
    clients.begin(server)
    result = Rounds(server, clients, model).run(on_round=on_round)
    assert clients.end(result) == []
    return clients, result


@pytest.mark.parametrize(
    ("strategy", "tau"), [("bora", None), ("bora", 50.0), ("bora_noncentered", None), ("ffa", 50.0), ("exact_product", 50.0)]
)
def test_the_fit_is_that_of_one_process(strategy, tau):
    options = FederatedOptions(rounds=4, local_steps=2, learning_rate=0.03, participation=0.67, patience=0)
    link = Direct({task: participant(task, options, strategy=strategy, tau=tau) for task in DATA.tasks})
    _, result = rounds(link, options, strategy=strategy, tau=tau)
    model = new_model(strategy, tau)
    expected = federate(model, DATA, STRATEGIES[strategy](), options)
    theta, mean = expected.weights()
    assert (result.best_round, result.score) == (expected.best_epoch, expected.validation_score)
    for found, entry in zip(result.history, expected.history, strict=True):
        same = ("epoch", "clients", "uploaded_bytes", "downloaded_bytes", "validation_perplexity", "refused", "learning_rate")
        assert {name: found[name] for name in same} == {name: entry[name] for name in same}
        assert found["missing"] == []
        assert "loss" not in found  # it stays at the clients
    for place, member in enumerate(link.participants.values()):
        own = member.client
        fitted = fitted_at(check_ended(member), own.model, own.data, [own])
        for name, value in fitted.weights()[0].items():
            assert torch.equal(value[0], theta[name][place])
            assert torch.equal(fitted.weights()[1][name], mean[name])


def test_garbage_is_refused_like_any_other_message():
    options = FederatedOptions(rounds=2, local_steps=1, patience=0)

    def spoil(session, answer):
        letter = decode(answer, most=10**6, sender=session)
        if session == "task 0" and letter.kind == TRAIN:
            return b"garbage"
        if session == "task 1" and letter.kind == TRAIN:
            return encode(Letter(TRAIN, letter.number, {name: value * float("nan") for name, value in letter.tensors.items()}))
        return answer

    link = Direct({task: participant(task, options) for task in DATA.tasks}, spoil)
    _, result = rounds(link, options)
    for entry in result.history:
        reasons = {refused["client"]: refused["reason"] for refused in entry["refused"]}
        assert reasons["task 0"] == "'task 0' sent bytes that are no letter: they have 7 bytes"
        assert reasons["task 1"].endswith("has a number that is not finite")
        assert (entry["clients"], entry["moved"]) == (1, True)


def test_a_late_client_is_not_waited_for():
    options = FederatedOptions(rounds=2, local_steps=1, patience=0)
    link = Direct({task: participant(task, options) for task in DATA.tasks})
    link.spoil = lambda session, answer: None if session == "task 2" and link.letters[-1][1].number == 1 else answer
    _, result = rounds(link, options, timeout=0.5)
    assert [entry["clients"] for entry in result.history] == [2, 3]
    [note] = absences(result.history)
    assert note == "client 'task 2' was missing in round 1, which went on without it (it did not answer within 0.5 s)"


@pytest.mark.parametrize("has_state", [True, False])
def test_a_client_that_died_comes_back(has_state, tmp_path):
    options = FederatedOptions(rounds=3, local_steps=2, learning_rate=0.03, patience=0)
    link, store = Direct({}), Checkpoints(tmp_path)

    def save(report):
        groups, progress = state_of(member.client)
        store.save(report["epoch"], groups, progress | member.progress)

    member = participant("task 0", options, on_trained=save)
    link.participants |= {"task 0": member} | {task: participant(task, options) for task in DATA.tasks[1:]}

    def die(report):  # after round 1: its process is another one then
        if report["epoch"] == 1:
            progress = None
            if has_state:
                checkpoint = store.newest()
                progress = checkpoint.progress
            again = participant("task 0", options, progress=progress)
            if has_state:
                restore(again.client, checkpoint)
            del link.participants["task 0"]
            link.participants["task 0, again"] = again

    clients, result = rounds(link, options, on_round=die)
    [note] = clients.notes
    again = link.participants["task 0, again"]
    assert [entry["clients"] for entry in result.history] == [3, 3, 3]
    if not has_state:
        assert note == "client 'task 0' came back in round 2 without a stored state, and begins anew"
        assert again.notes == ["this client came back in round 2 without a stored state; its adapters began at Theta"]
        return
    assert note == "client 'task 0' came back in round 2 with its state of round 1"
    expected = federate(new_model(), DATA, STRATEGIES["bora"](), options)
    for name, value in expected.weights()[1].items():
        assert torch.equal(result.common[name], value)
    for name, value in expected.weights()[0].items():
        torch.testing.assert_close(again.client.kept()[name][0], value[0], rtol=1e-5, atol=1e-7)


def test_a_letter_that_comes_twice_is_answered_twice_and_trained_once():
    options = FederatedOptions(rounds=3, local_steps=2)
    member = participant("task 0", options)
    data = encode(Letter(TRAIN, 1, about={"best": 0, "version": 0}))
    assert member.answer(data) == member.answer(data)
    assert member.progress["trained"] == 1
    reason = decode(member.answer(encode(Letter(TRAIN, 0, about={"best": 0}))), most=10**6, sender="task 0")
    assert (reason.kind, reason.about["reason"]) == (ERROR, "the server asks for round 0, and the last one was 1")
    for bad in (b"", encode(Letter("dance")), encode(Letter(TRAIN, 2, {"x": torch.ones(2)}, {"best": 0, "version": 1}))):
        assert decode(member.answer(bad), most=10**6, sender="task 0").kind == ERROR
    assert member.progress["trained"] == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda member: setattr(member, "agreement", {"base": "bb"}),
            "'task 2' and the server differ: base is 'bb' at the client",
        ),
        (lambda member: setattr(member.client, "name", "task 1"), "'task 1' is the name of another client, which is connected"),
        (lambda member: setattr(member.client, "name", "a\nb"), "a process that joins does not say who it is"),
    ],
)
def test_clients_that_are_not_accepted(change, reason):
    options = FederatedOptions(rounds=1)
    link = Direct({task: participant(task, options) for task in DATA.tasks})
    change(link.participants["task 2"])
    said = []
    clients = RemoteClients(link, AGREED, round_timeout=1.0, say=said.append)
    with pytest.raises(InputError, match=r"3 clients were to join within 0.3 s, and 2 did: task 0, task 1"):
        clients.gather(3, 0.3)
    assert clients.notes[0].startswith(f"a client was not accepted: {reason}")
    assert link.participants["task 2"].stopped.startswith(reason)
    with pytest.raises(InputError, match="the server has ended this client's part"):
        check_ended(link.participants["task 2"])
    clients.dismiss("the server was stopped")
    assert link.participants["task 0"].stopped == "the server was stopped"


def test_the_key_of_a_client_says_who_it_is():
    options = FederatedOptions(rounds=1)
    link = Direct({"one": participant("task 0", options)}, keys={"one": "task 1"})
    clients = RemoteClients(link, AGREED, round_timeout=1.0, say=lambda line: None)
    with pytest.raises(InputError, match="1 clients were to join"):
        clients.gather(1, 0.2)
    assert link.letters[-1][1].kind == STOP
    assert "'task 0' has the key of 'task 1'" in link.participants["one"].stopped


def test_a_state_is_of_one_federation():
    member = participant("task 0", FederatedOptions(), progress={"federation": "old", "trained": 3, "best": 2})
    answer = decode(member.answer(encode(Letter("join", about={"federation": "new"}))), most=10**6, sender="task 0")
    assert answer.kind == ERROR
    assert member.stopped == "its stored state is of another federation; give --overwrite true to start anew"


def test_a_stored_state_of_another_model_is_refused(tmp_path):
    options = FederatedOptions(local_steps=1)
    member = participant("task 0", options)
    member.client.train(1)
    Checkpoints(tmp_path).save(1, *state_of(member.client))
    checkpoint = Checkpoints(tmp_path).newest()
    with pytest.raises(InputError, match="is of other documents"):
        restore(participant("task 1", options).client, checkpoint)
    with pytest.raises(InputError, match="its values are those of another model"):
        restore(participant("task 0", options, strategy="ffa").client, checkpoint)
    assert issubclass(RefusedMessage, InputError)

"""Direct preference optimisation against its formula, computed one pair at a time."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from pyro import poutine

from bora_pyro import BoRA, InputError, LoRA, TaskData, fit
from bora_pyro.data import TokenSplit
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.likelihoods import DPO, Choice
from bora_pyro.runs.results import metrics_of
from bora_pyro.runs.saved import load_run
from tests.tiny import VOCABULARY, random_weights, tiny_bora, tiny_questions
from tests.tiny_base import TOKENS, WORDS, command_main, line, quick_fit, toy_model


class Tables:
    """A base and an adapted model whose logits are tables: a row for each row of a split."""

    def __init__(self, split, *, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shape = (2, len(split), int(split.lengths.max()), VOCABULARY)
        self.logits = (2 * torch.randn(shape, generator=generator)).requires_grad_()

    def lazy_logits(self, batch, weights):
        return self.logits[0 if weights is None else 1][batch.index, : batch.input_ids.shape[1]]


def sums(split, logits):
    """log p of each row's answer, (rows,)."""
    found = []
    for row in range(len(split)):
        labels = split.labels(row)
        log_p = torch.log_softmax(logits[row, : len(labels)], -1)[:-1]
        observed = labels[1:] >= 0
        found.append(log_p.gather(1, labels[1:].clamp(min=0)[:, None])[observed, 0].sum())
    return torch.stack(found)


def pairs(number=6, *, seed=0):
    """Prompts with two answers of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    rows, task, chosen = [], [], []
    for n in range(number):
        prompt = [0, *torch.randint(3, VOCABULARY, (2,), generator=generator).tolist()]
        for answer in range(2):
            length = int(torch.randint(1, 5, (), generator=generator))
            rows.append([*prompt, *torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()])
            task.append(n % 3)
            chosen.append(answer == n % 2)
    more = {"read": [3] * len(rows), "document_index": [n // 2 for n in range(len(rows))], "correct": chosen, "pad_token_id": 1}
    return TokenSplit.from_documents(rows, task=task, num_tasks=3, **more)


def log_joint(likelihood, model, weights, batch):
    return poutine.trace(likelihood).get_trace(model, weights, batch).log_prob_sum()


@pytest.mark.parametrize("beta", [0.1, 1, 2.5])
def test_the_loss_is_that_of_the_paper(beta):
    split = pairs()
    model = Tables(split)
    [batch] = split.batches(token_budget=10_000)
    found = log_joint(DPO(beta), model, {}, batch)
    base, own = sums(split, model.logits[0].detach()), sums(split, model.logits[1])
    chosen = split.correct
    # equation 7: the log-ratios of the chosen and of the rejected answers
    margin = (own[chosen] - base[chosen]) - (own[~chosen] - base[~chosen])
    expected = F.logsigmoid(beta * margin).sum()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(found, model.logits)
    (true,) = torch.autograd.grad(expected, model.logits)
    torch.testing.assert_close(gradient, true, rtol=1e-4, atol=1e-6)
    assert not gradient[0].any()  # the reference is fixed


def test_of_several_answers_the_chosen_one_is_the_best():
    split = tiny_questions()
    model = Tables(split)
    [batch] = split.batches(token_budget=10_000)
    base, own = sums(split, model.logits[0]), sums(split, model.logits[1])
    reward, expected = 0.3 * (own - base).detach(), 0.0
    for question in split.document_of.unique():
        rows = split.document_of == question
        expected += float(reward[rows].log_softmax(0)[split.correct[rows]])
    assert log_joint(DPO(0.3), model, {}, batch).item() == pytest.approx(expected, rel=1e-5)


def test_without_a_reference_it_is_the_choice_by_sums():
    split = tiny_questions()
    model = Tables(split)
    [batch] = split.batches(token_budget=10_000)
    plain, choice = log_joint(DPO(1.0, "none"), model, {}, batch), log_joint(Choice("sum"), model, {}, batch)
    torch.testing.assert_close(plain, choice)


@pytest.mark.parametrize("reference", ["base", "none"])
def test_scores_of_a_split(reference):
    split, model = tiny_questions(), tiny_bora(likelihood=DPO(0.5, reference))
    weights = random_weights(model)
    base, adapted = evaluate(model, split, None, weights)
    plain = evaluate(tiny_bora(likelihood=Choice("sum")), split, None, weights)
    reward = 0.5 * (plain[1].options - (plain[0].options if reference == "base" else 0)).nan_to_num(
        nan=-math.inf, neginf=-math.inf
    )
    log_p = reward.log_softmax(-1)
    torch.testing.assert_close(adapted.log_p, log_p, rtol=1e-4, atol=1e-4)
    assert adapted.nll() == pytest.approx(-float(log_p.gather(1, adapted.label[:, None]).mean()), rel=1e-4)
    if reference == "base":
        number = (base.log_p > -math.inf).sum(-1).double()
        assert base.nll() == pytest.approx(float(number.log().mean()))
        assert base.accuracy() == pytest.approx(float((1 / number).mean()))  # ties count by halves, thirds, ...


def test_at_the_start_a_pair_costs_log_2():
    split = pairs()
    model = BoRA(tiny_bora().backbone, 3, adapter=LoRA(rank=2), likelihood=DPO())
    theta = {name: start.expand(3, *start.shape) for name, start in model.starts.items()}
    (scores,) = evaluate(model, split, theta)
    assert scores.nll() == pytest.approx(math.log(2), rel=1e-6)
    assert scores.accuracy() == 0.5


def test_a_fit_learns_what_each_task_prefers():
    def split(number, seed):
        generator = torch.Generator().manual_seed(seed)
        rows, task, chosen = [], [], []
        for n in range(number):
            for token, right in ((4, n % 2 == 0), (5, n % 2 == 1)):  # task 0 prefers token 4, and task 1 token 5
                rows.append([0, int(torch.randint(6, TOKENS, (), generator=generator)), token])
                task.append(n % 2)
                chosen.append(right)
        more = {"read": [2] * len(rows), "document_index": [n // 2 for n in range(len(rows))], "correct": chosen}
        return TokenSplit.from_documents(rows, task=task, num_tasks=2, pad_token_id=1, **more)

    data = TaskData(["four", "five"], split(24, 0), split(8, 1), split(8, 2))
    fitted = fit(toy_model(tasks=2, likelihood=DPO(1.0)), data, epochs=12, learning_rate=0.03, token_budget=64)
    metrics = metrics_of(fitted, data, tau="learned", learning_rate=0.03, seed=0)
    assert metrics["test_accuracy"] == 1.0
    assert metrics["base_test_accuracy"] == 0.5
    assert metrics["test_nll"] < 0.6 < metrics["base_test_nll"] == pytest.approx(math.log(2))


def test_a_table_of_preferences_by_the_command(tmp_path, capsys):
    rows = [
        {"task": task, "prompt": f"say {n}: ", "chosen": words[n % 4], "rejected": f"not {words[n % 3]}"}
        for task, words in WORDS.items()
        for n in range(10)
    ]
    table = tmp_path / "pairs.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    options = quick_fit(tmp_path) | {"data": table, "likelihood": "dpo", "likelihood_option": "beta=0.5", "epochs": 1}
    assert command_main()(line(options | {"output_dir": tmp_path / "run"})) == 0
    err = capsys.readouterr().err
    assert "the answer in column 'chosen' after 'prompt' is preferred to that in 'rejected'" in err
    run = load_run(tmp_path / "run", device="cpu")
    assert run.config.options_column == "rejected"
    assert repr(run.fitted.model.likelihood) == "DPO(beta=0.5, reference='base')"
    assert run.metrics["base_test_nll"] == pytest.approx(math.log(2))
    assert command_main("calibrate")([str(tmp_path / "run")]) == 0
    assert command_main("calibrate")([str(tmp_path / "run"), "--questions", str(table)]) == 2
    assert "compares answers by rewards; leave --questions out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "beta is 0; give a finite number above 0"),
        ({"beta": math.inf}, "beta is inf"),
        ({"beta": True}, "beta is True"),
        ({"reference": "bases"}, "reference is 'bases'.*base"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        DPO(**options)

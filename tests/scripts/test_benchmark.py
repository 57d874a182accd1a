"""The benchmark against PEFT, the Trainer and the released code: all count the same tokens and train what they should."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F

from bora_pyro.data import TokenSplit
from tests.tiny_base import script, write_table

benchmark, end_to_end = script("benchmark"), script("benchmark_end_to_end")
arms, bases = script("arms"), script("bases")
LENGTHS, TASK = [5, 2, 7, 3, 4, 6, 2], [0, 1, 2, 0, 1, 2, 0]


def split():
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 4096, (length,), generator=generator).tolist() for length in LENGTHS]
    return TokenSplit.from_documents(documents, task=TASK, num_tasks=3)


def work(precision="float32", **options):
    base = bases.load_base("random:tiny", targets=["q_proj", "fc1"], precision=precision)
    return arms.Work(base, split(), arms.nano_tokenizer(), **({"rows": 3, "max_tokens": 8, "rank": 2, "tau": 10.0} | options))


def options(folder, *more):
    words = "--cases tiny --max_tokens 16 --rows 4 --rank 2 --repetitions 2 --warmup 1 --threads 1 --device cpu".split()
    return [*words, "--data", write_table(folder / "documents.csv"), "--output", str(folder / "report.json"), *more]


def read(folder):
    return json.loads((folder / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_report_hangs_together(precision, tmp_path, capsys):
    assert benchmark.main(options(tmp_path, "--memory", "off", "--precision", precision)) == 0
    report = read(tmp_path)
    assert set(report) == {"machine", "options", "cases", "skipped"}
    assert report["skipped"] == []
    [case] = report["cases"]
    assert (case["name"], case["precision"], case["data"]["tasks"]) == ("tiny", precision, 3)
    assert set(case["tokens_per_second"]) == set(case["spread"]) == set(case["seconds"]) == set(arms.ARMS)
    assert case["peak_memory_bytes"] == {}
    rate = {arm: [n / s for n, s in zip(case["tokens"][arm], case["seconds"][arm], strict=True)] for arm in arms.ARMS}
    assert all(len(values) == 2 for values in rate.values())
    for peer, ratio in case["ratio"].items():
        assert ratio["median"] == pytest.approx(sum(a / b for a, b in zip(rate["ours"], rate[peer], strict=True)) / 2)
        assert ratio["lower_quartile"] <= ratio["median"] <= ratio["upper_quartile"]
    assert set(case["ratio"]) == set(arms.ARMS) - {"ours"}
    one = 2 * 2 * 2 * (32 + 32)  # layers x layers' kinds x rank x (in + out)
    assert case["trained_parameters"] == {"ours": 4 * one, "peft_one_adapter": one, "peft_trainer": one, "released": 4 * one}
    # two layers of four square projections and two feed-forward matrices; the head
    assert case["matrix_parameters"] == 2 * (4 * 32 * 32 + 2 * 32 * 64) + 4096 * 32
    speed = case["multiplications_per_second"]["median"]
    assert case["fraction_of_floor"] == pytest.approx(4 * case["matrix_parameters"] * case["tokens_per_second"]["ours"] / speed)
    out = capsys.readouterr().out
    assert "peft_trainer" in out
    assert f"{case['ratio']['released']['median']:.2f}" in out


def test_peak_memory_is_that_of_a_process_of_its_own(tmp_path):
    assert benchmark.main(options(tmp_path, "--arms", "ours")) == 0
    [case] = read(tmp_path)["cases"]
    assert 10**8 < case["peak_memory_bytes"]["ours"] < 10**10
    assert case["ratio"] == {}
    assert case["fraction_of_floor"] > 0


def test_a_base_that_does_not_fit_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "free_bytes", lambda device: 1000)
    assert benchmark.main(options(tmp_path)) == 0
    report = read(tmp_path)
    assert report["cases"] == []
    assert report["skipped"][0]["name"] == "tiny"
    assert "note: tiny is left out: needs about" in capsys.readouterr().err


def test_an_epoch_has_the_predicted_tokens_of_all_documents_and_no_padding():
    task = work()
    batches = dict.fromkeys(arms.ARMS, 3) | {"ours": len(task.split.batches(token_budget=24, seed=0))}
    for name, arm in arms.ARMS.items():
        record = arms.alternate({name: arm(task)}, batches[name], task.device)[name]
        assert sum(tokens for _, tokens in record) == sum(LENGTHS) - len(LENGTHS) == task.split.num_tokens
        assert all(seconds > 0 for seconds, _ in record)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_arms_train_all_that_they_should_and_leave_the_base_alone(precision):
    task = work(precision)
    before = {name: value.clone() for name, value in task.backbone.model.state_dict().items()}
    trained = {name: arm(task) for name, arm in arms.ARMS.items()}
    starts = {name: [p.detach().clone() for p in arm.parameters] for name, arm in trained.items()}
    order = []
    arms.alternate(trained, 6, task.device, extra=lambda: order.append(None))
    assert len(order) == 6
    for name, arm in trained.items():
        assert all(not torch.equal(old, new) for old, new in zip(starts[name], arm.parameters, strict=True)), name
    assert all(torch.equal(before[name], value) for name, value in task.backbone.model.state_dict().items())


def test_the_released_loss_is_the_naive_sum():
    task = work()
    arm = arms.Released(task)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in arm.parameters:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    documents = torch.tensor([0, 2, 3, 5])  # of the tasks 0, 2, 0, 2: task 1 is absent
    input_ids = arm.padded(documents)
    assert input_ids[0].tolist() == [*task.split.document(0).tolist(), 2, 2, 2]
    rows_of = task.split.task[documents]
    loss = arms.released_loss(arm.model, arm.names, input_ids, rows_of, documents=7, tau=10.0)

    # θ added into the weights of a copy of the base, one document after the other
    tensors = {name: value.detach() for name, value in arm.model.named_parameters() if "lora_" in name}
    likelihood = 0.0
    for row, d in zip(input_ids, rows_of.tolist(), strict=True):
        base = copy.deepcopy(task.backbone.model)
        for name, a in tensors.items():
            if f"lora_A.task{d}." in name:
                path = name.removeprefix("base_model.model.").partition(".lora_A")[0]
                base.get_submodule(path).weight.add_(tensors[name.replace("lora_A", "lora_B")] @ a)
        logits = base(row[None]).logits[0]
        likelihood += F.cross_entropy(logits[:-1], row[1:]).item() / len(input_ids)
    norms = 0.0
    for name, mean in tensors.items():
        if ".mean." in name:
            norms += sum(float((tensors[name.replace(".mean.", f".task{d}.")] - mean).square().sum()) ** 0.5 for d in range(3))
    assert loss.item() == pytest.approx(7 * likelihood + 10.0 * norms, rel=1e-5)

    loss.backward()
    gradients = {name: parameter.grad for name, parameter in arm.model.named_parameters() if "lora_" in name}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())


@pytest.mark.parametrize(
    ("name", "millions"),
    [("builtin:nano", 4.3), ("random:opt-125m", 125.2), ("random:opt-350m", 331.2), ("random:llama-1b", 1235.8)],
)
def test_sizes_are_those_of_the_published_models(name, millions):
    base = bases.outline(name)
    assert base.model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.06)
    assert base.device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cases", "nanno"], "did you mean 'nano'?"),
        (["--arms", "ours", "realised"], "did you mean 'released'?"),
        (["--arms", "ours", "ours"], "give each once"),
        (["--cases", "tiny", "--targets", "q_prj"], "did you mean 'q_proj'?"),
        (["--cases", "tiny", "nano", "--max_tokens", "512"], "nano reads at most 256"),
        (["--cases", "tiny", "--data", "nowhere.csv"], "nowhere.csv"),
        (["--tau", "-1"], "tau -1.0 is not allowed"),
        (["--tau", "inf"], "tau is inf"),
        (["--rows", "0"], "rows is 0; give a whole number from 1 up"),
        (["--memory", "process"], "give one of the cases and one of the arms"),
        (["--device", "abacus"], "allowed: auto, cpu, cuda"),
        (["--output", "."], "is a folder"),
    ],
)
def test_bad_options_end_with_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_error(benchmark, arguments, words, capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--taus", "1", "0"], "taus has '0'"),
        (["--coefficient", "0"], "coefficient is 0.0"),
        (["--epochs", "0"], "epochs is 0; give a whole number from 1 up"),
        (["--base_model", "random:40m"], "needs a trained base"),
        (["--max_tokens", "1024"], "reads at most 256"),
        (["--output", "."], "is a folder"),
    ],
)
def test_bad_options_of_the_whole_fits(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_error(end_to_end, arguments, words, capsys)


def check_error(module, arguments, words, capsys):
    assert module.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


def test_one_fit_against_the_grid(tmp_path, capsys):
    words = "--max_tokens 16 --rank 2 --epochs 2 --token_budget 128 --taus 10 1000 --coefficient 1e-5 --threads 1 --device cpu"
    data, output = write_table(tmp_path / "documents.csv"), tmp_path / "report.json"
    assert end_to_end.main([*words.split(), "--data", data, "--output", str(output)]) == 0
    report = read(tmp_path)
    found, grid = report["summary"], report["grid"]
    assert [fit["learning_rate"] for fit in grid] == pytest.approx([1e-4, 1e-2])
    assert found["target_perplexity"] == min(fit["validation_perplexity"] for fit in grid)
    assert found["grid_seconds"] == pytest.approx(sum(fit["seconds"] for fit in grid))
    for fit in [*grid, report["ours"]]:
        assert [point["epoch"] for point in fit["curve"]] == [1, 2]
        assert 0 < fit["curve"][0]["seconds"] < fit["curve"][1]["seconds"] <= fit["seconds"]
    if (reached := found["our_seconds_to_target"]) is not None:
        assert found["grid_seconds_over_ours_to_target"] == pytest.approx(found["grid_seconds"] / reached)
    assert "the grid's best validation perplexity" in capsys.readouterr().out

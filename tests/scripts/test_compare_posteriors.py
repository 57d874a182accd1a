"""The comparison of posteriors: what its table holds hangs together, and nothing that it has is run again."""

from __future__ import annotations

import itertools
import math
import shutil

import pandas as pd
import pytest
import yaml

from bora_pyro.runs.calibrate import CalibrateConfig, calibrate
from tests.choice_table import table as questions
from tests.choice_table import write
from tests.tiny_base import documents, line, quick_fit, script_main, write_table

FOREIGN = ["QWERTZ ?!?! ~~~", "9876543210", "red one XYZ", "north north north", "(a + b) * c", "four four", "?", "xyz blue"]


@pytest.fixture(scope="module")
def main():
    return script_main("compare_posteriors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, main):
    """Options of a comparison of some arms on two seeds, once it has run."""
    folder = tmp_path_factory.mktemp("posteriors")
    options = {name: value for name, value in quick_fit(folder).items() if name != "threads"}
    (folder / "fit.yaml").write_text(yaml.safe_dump(options | {"targets": ["v_proj", "fc2"]}))
    words = line({"fit_config": folder / "fit.yaml", "seeds": 2, "epochs": 1, "draws": 2, "map_learning_rate": 0.03})
    words += line({"runs_dir": folder / "runs", "output": folder / "table.csv"})
    words += ["--arms", "map", "map_scaled", "normal", "swag", "tfb", "laplace_tempered", "ensemble", "normal_linearised"]
    words += ["laplace_linearised", "laplace_kfac_tasks_linearised", "mc_dropout", "checkpoint_ensemble"]
    words += ["ensemble_folded", "ensemble_distilled"]
    words += ["--foreign", write_table(folder / "foreign.csv", documents(["Dora"], number=8).assign(text=FOREIGN))]
    assert main(words) == 0
    return words, folder / "table.csv"


def test_the_table_hangs_together(finished):
    table = pd.read_csv(finished[1])
    rates = table[(table.arm == "normal") & (table.prediction == "mean")].set_index("seed").learning_rate
    # the first seed climbs from the middle; the second is run at the choice alone
    assert 0.01 in rates[0].tolist()
    first = table[(table.arm == "normal") & (table.seed == 0) & (table.prediction == "mean")]
    assert rates.loc[[1]].tolist() == [first.loc[first.validation_nll.idxmin()].learning_rate]
    tempered = table[(table.arm == "laplace_tempered") & (table.prediction == "mixture")]
    assert sorted(tempered[tempered.seed == 0].temperature) == [1e-6, 1e-3, 1.0]
    assert len(tempered[tempered.seed == 1]) == 1
    for name in ("validation", "test"):
        assert (table[f"{name}_nll"] - table[f"{name}_perplexity"].map(math.log)).abs().max() < 1e-4
    # the centre of Laplace's approximation is the MAP, and so is that of TFB
    for seed, arm in itertools.product((0, 1), ("laplace_tempered", "tfb")):
        centre = table[(table.arm == arm) & (table.prediction == "mean") & (table.seed == seed)].test_nll
        assert len(centre) == (3 if (seed, arm) == (0, "laplace_tempered") else 1)
        assert centre.tolist() == pytest.approx(
            [table[(table.arm == "map") & (table.seed == seed)].test_nll.item()] * len(centre)
        )
    # one temperature for all tokens: the same guesses, and a likelihood on the validation split that is no lower
    point, scaled = (table[table.arm == arm].set_index("seed") for arm in ("map", "map_scaled"))
    assert (scaled.validation_nll <= point.validation_nll + 1e-9).all()
    assert (scaled.scaling != 1).all()
    assert (scaled.test_accuracy - point.test_accuracy).abs().max() < 1e-12
    assert table[table.arm == "normal"].state.eq(2).all()
    # the mean, the variance and five columns, and two numbers
    assert table[table.arm == "swag"].state.between(7, 7.01).all()
    assert table[table.arm == "swag"].best_epoch.eq(1).all()
    assert set(table[(table.arm == "swag") & (table.seed == 0)].prediction) == {"mean", "mixture", "scaled mixture"}
    # the same draws, which predict with the linear expansion
    chosen = table[(table.arm == "normal_linearised") & (table.seed == 0)]
    network = table[(table.arm == "normal") & (table.seed == 0) & (table.learning_rate == chosen.learning_rate.iloc[0])]
    assert set(chosen.learning_rate) == {first.loc[first.validation_nll.idxmin()].learning_rate}
    of_mean, of_mixture = (
        [float(rows[rows.prediction == name].test_nll.iloc[0]) for rows in (network, chosen)] for name in ("mean", "mixture")
    )
    assert of_mean[0] == pytest.approx(of_mean[1], rel=1e-6)
    assert of_mixture[0] != pytest.approx(of_mixture[1], rel=1e-6)
    laplace = table[(table.arm == "laplace_tempered") & (table.temperature == 1.0) & (table.prediction == "mixture")]
    linearised = table[(table.arm == "laplace_linearised") & (table.prediction == "mixture")]
    assert linearised.test_nll.iloc[0] < laplace.test_nll.iloc[0]
    for arm in ("ensemble", "checkpoint_ensemble"):
        assert sorted(table.prediction[table.arm == arm]) == ["mixture", "mixture", "scaled mixture", "scaled mixture"]
    # one adapter a task of the same four fits; distilling keeps what validates better
    of_folds = table.set_index(["arm", "prediction", "seed"]).sort_index()
    folded, distilled = (of_folds.loc[f"ensemble_{name}"] for name in ("folded", "distilled"))
    assert [*folded.index] == [*distilled.index] == [("mean", 0), ("mean", 1), ("scaled", 0), ("scaled", 1)]
    assert (distilled.loc["mean"].validation_nll <= folded.loc["mean"].validation_nll + 1e-9).all()
    assert (folded.loc["scaled"].validation_nll <= folded.loc["mean"].validation_nll + 1e-9).all()
    assert folded.state.eq(1).all()


def test_dropout_and_checkpoints_are_mixtures(finished):
    table = pd.read_csv(finished[1]).set_index(["arm", "prediction", "seed"]).sort_index()
    dropout = table.loc["mc_dropout"]
    assert sorted(dropout.index) == [("mean", 0), ("mean", 1), ("mixture", 0), ("mixture", 1)]
    assert dropout.test_nll.nunique() == 4  # masks at prediction alone, and a fit of its own
    assert not set(dropout.test_nll) & set(table.loc["map"].test_nll)
    last = table.loc["checkpoint_ensemble", "mixture"]
    # the states lie around the one that the fit keeps
    assert (last.test_nll / table.loc["map", "mean"].test_nll).between(0.9, 1.1).all()
    assert not set(last.test_nll) & set(table.loc["map"].test_nll)


def test_foreign_texts(finished, main, capsys, tmp_path):
    words, file = finished
    table = pd.read_csv(file)
    columns = ["foreign_total", "foreign_epistemic", "foreign_perplexity", "foreign_perplexity_ratio"]
    rows = table[(table.arm != "map_scaled") & ~table.prediction.isin(["scaled", "scaled mixture"])]
    assert rows[columns].drop(columns="foreign_epistemic").stack().between(0, 1).all()
    assert len(rows[columns].drop(columns="foreign_epistemic").dropna()) == len(rows)
    assert rows.foreign_epistemic.notna().eq(rows.prediction == "mixture").all()
    # those of the MAP fit are those of the command
    folder = file.parent / "runs" / "table" / "map-seed1"
    calibrate(CalibrateConfig(run=str(folder), foreign=words[-1], seed=1, output=str(tmp_path / "calibration")))
    expected = pd.read_csv(tmp_path / "calibration" / "foreign_auroc.csv").set_index("score").auroc
    of_map = rows[(rows.arm == "map") & (rows.seed == 1)].iloc[0]
    assert sorted(expected.index) == ["perplexity", "perplexity_ratio", "total"]
    assert [of_map[f"foreign_{name}"] for name in expected.index] == pytest.approx(expected.tolist(), abs=1e-5)
    assert main(words) == 0
    assert "| foreign: total | foreign: epistemic | foreign: perplexity |" in capsys.readouterr().out
    without = words[: words.index("--foreign")]
    output = without.index("--output") + 1
    other = [*without[:output], str(tmp_path / "table.csv"), *without[output + 1 :]]
    pd.read_csv(file).drop(columns=columns).to_csv(tmp_path / "table.csv", index=False)
    assert main([*other, "--foreign", words[-1]]) == 2
    assert "table.csv has rows without --foreign; give another --output, or leave --foreign out" in capsys.readouterr().err


def test_nothing_is_run_again(finished, main, monkeypatch, capsys):
    words, file = finished
    before = file.read_bytes()
    module = main.__globals__
    monkeypatch.setitem(module, "fit", None)
    monkeypatch.setitem(module, "predictions", None)
    assert main(words) == 0
    assert file.read_bytes() == before
    said = capsys.readouterr().out
    assert said.count("| normal |") == 2
    assert said.count("| map |") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "nomal"], "arm 'nomal' is not known; known: map, map_scaled, map_longer,"),
        (["--draws", "0"], "draws is 0; give a whole number from 1 up"),
        (["--fit_config", "none.yaml"], "fit_config none.yaml does not exist"),
        (["--map_learning_rate", "0"], "map_learning_rate is 0.0; give a finite number above 0"),
    ],
)
def test_bad_input(main, capsys, words, message):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: " + message)
    assert said.count("\n") == 1


def changed(words, **values):
    """The words of a command with other values of some of its options."""
    words = [*words]
    for name, value in values.items():
        words[words.index(f"--{name}") + 1] = str(value)
    return words


def test_other_options_do_not_join_a_table_or_a_fit(finished, main, capsys, tmp_path):
    words, file = finished
    before = file.read_bytes()
    assert main(changed(words, draws=3)) == 2
    expected = f"error: output {file} has rows with draws 2 instead of 3; give another --output, or move it away\n"
    assert capsys.readouterr().err == expected
    assert file.read_bytes() == before
    # a new table, whose folder has the MAP fit of another learning rate
    other = tmp_path / file.name
    shutil.copytree(file.parent / "runs", tmp_path / "runs")
    assert main(changed(words, output=other, runs_dir=tmp_path / "runs", map_learning_rate=0.02)) == 2
    said = capsys.readouterr().err
    assert "map-seed0 has learning_rate 0.03 instead of 0.02; give another --runs_dir, or move it away" in said
    assert not other.exists()


def test_an_arm_with_the_rate_of_another_comes_after_it(finished, main, capsys, tmp_path):
    words, _ = finished
    options = dict(zip(words[: words.index("--arms") : 2], words[1 : words.index("--arms") : 2], strict=True))
    options |= {"--output": str(tmp_path / "table.csv")}
    assert main([word for pair in options.items() for word in pair] + ["--arms", "normal_linearised"]) == 2
    assert capsys.readouterr().err == (
        "error: arm 'normal_linearised' has the learning rate of 'normal', which has no rows; put normal before it\n"
    )


def test_tasks_with_answers_have_the_numbers_of_questions(main, tmp_path, capsys):
    options = {name: value for name, value in quick_fit(tmp_path).items() if name not in ("threads", "data")}
    options |= {"data": write(tmp_path / "rows.jsonl", questions()), "split_column": "split", "options_column": "options"}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(options | {"likelihood": "choice", "targets": ["v_proj", "fc2"]}))
    words = line({"fit_config": tmp_path / "fit.yaml", "seeds": 1, "epochs": 1, "draws": 2, "output": tmp_path / "table.csv"})
    words += ["--runs_dir", str(tmp_path / "runs"), "--arms", "map", "map_scaled", "ivon", "blob", "subspace"]
    words += ["laplace_linearised", "mc_dropout", "checkpoint_ensemble"]
    assert main(words) == 0
    rows = pd.read_csv(tmp_path / "table.csv")
    assert "test_perplexity" not in rows
    assert (rows.test_accuracy * 12 - (rows.test_accuracy * 12).round()).abs().max() < 1e-3  # two tasks, six questions each
    assert rows.test_aurc.between(0, 1).all()
    point, scaled = (rows[rows.arm == arm].iloc[0] for arm in ("map", "map_scaled"))
    assert scaled.test_accuracy == point.test_accuracy
    assert scaled.validation_nll < point.validation_nll
    assert set(rows.arm) == set(words[words.index("--arms") + 1 :])
    assert "| NLL a question | accuracy | NLL − MAP's |" in capsys.readouterr().out
    words[words.index("--output") + 1] = str(tmp_path / "other.csv")
    assert main([*words, "--foreign", options["data"]]) == 2
    assert "error: --foreign needs a fit to texts" in capsys.readouterr().err

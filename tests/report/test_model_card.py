from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from bora_pyro.report.model_card import PICTURE, CardFacts, adapter_card, export_card, plain

ROW = {"name": "Ada | <b>", "train_documents": 3, "base_test_perplexity": 20.0, "test_perplexity": None, "deviation_norm": 1.234}


@pytest.mark.parametrize(
    ("base", "named"),
    [("facebook/opt-350m", True), ("gpt2", True), ("builtin:nano", False), ("{folder}", False), ("gone/from/here", False)],
)
def test_the_metadata_names_a_base_of_the_hub_only(tmp_path, base, named):
    base = base.replace("{folder}", str(tmp_path))
    data = adapter_card(CardFacts(base), "Ada", "ada", "the MAP estimate").data.to_dict()
    assert data.get("base_model") == (base if named else None)
    assert data["library_name"] == "peft"
    assert "license" not in data
    assert adapter_card(CardFacts(base, "mit"), "Ada", "ada", "x").data.license == "mit"


def test_a_card_is_read_as_it_was_written(tmp_path):
    card = export_card(CardFacts("gpt2", "mit"), "a *title*", {"ada": ROW}, ["ada", "global-mean"], picture=True)
    card.save(tmp_path / "README.md")
    again = ModelCard.load(tmp_path / "README.md")
    assert again.data.to_dict() == card.data.to_dict()
    assert "# a \\*title\\*" in again.text
    assert "| Ada &#124; &lt;b&gt; | `ada` | 3 | 20.00 | – | 1.23 |" in again.text
    assert f"]({PICTURE})" in again.text
    assert "draws of the posterior" not in again.text


def test_a_card_of_a_fit_to_answers_has_no_perplexity():
    row = {"name": "Ada", "train_documents": 3, "base_test_nll": 1.5, "test_nll": 0.25, "deviation_norm": 1.0}
    text = export_card(CardFacts("gpt2"), "t", {"ada": row}, ["ada"], picture=False).text
    assert "| NLL, base | NLL, adapted |" in text
    assert "| `ada` | 3 | 1.50 | 0.25 | 1.00 |" in text
    assert "NLL, nats a question: the means over the test questions, which the fit did not use" in text
    of_task = adapter_card(CardFacts("gpt2"), "Ada", "ada", "the MAP estimate", row).text
    assert "NLL, nats a question of its test documents: 1.50 under the base, 0.25 under the adapter of the fit." in of_task
    assert "erplexit" not in text + of_task


def test_one_adapter_alone_and_no_picture():
    card = export_card(CardFacts("gpt2"), "t", {}, ["global-mean--draw-0"], picture=False)
    assert PICTURE not in card.text
    assert "another adapter" not in card.text
    assert "draws of the posterior" in card.text


def test_cards_of_an_adaptation_say_so():
    facts = CardFacts("gpt2", adapted=True)
    text = export_card(facts, "t", {"ada": ROW}, ["ada", "global-mean"], picture=False).text
    assert "was adapted to new tasks" in text
    assert "fitted together" not in text
    assert "They were fitted together" in export_card(CardFacts("gpt2"), "t", {"ada": ROW}, ["ada"], picture=False).text
    of_task = adapter_card(facts, "Ada", "ada", "the MAP estimate", ROW).text
    assert "the MAP estimate of an adaptation of a hierarchical fit by `bora_pyro` to new tasks." in of_task
    assert "Fitted on 3 documents of the task, and drawn towards the other tasks through Θ." in of_task
    of_mean = adapter_card(facts, None, "global-mean", "the MAP estimate").text
    assert "Θ of a hierarchical fit by `bora_pyro`, the prior of new tasks that it was adapted to." in of_mean


def test_cards_of_a_private_fit_say_what_is_guaranteed():
    facts = CardFacts("gpt2", privacy="each training document has (ε = 3, δ = 0.01) <b>")
    for card in (export_card(facts, "t", {"ada": ROW}, ["ada"], picture=False), adapter_card(facts, "Ada", "ada", "x", ROW)):
        assert "Privacy: each training document has (ε = 3, δ = 0.01) &lt;b&gt;.\n" in card.text
    assert "Privacy" not in export_card(CardFacts("gpt2"), "t", {"ada": ROW}, ["ada"], picture=False).text


def test_snippets_of_a_repository():
    facts = CardFacts("gpt2", repo_id="ada/speeches")
    text = export_card(facts, "t", {}, ["a", "b"], picture=False).text
    assert "PeftModel.from_pretrained(base, 'ada/speeches', subfolder='a')" in text
    assert "model.load_adapter('ada/speeches', adapter_name='b', subfolder='b')" in text
    assert "in the folder of the export" not in text


def test_texts_from_data_have_no_mark_up():
    assert plain("a\nb  ![x](y) `c` # _d_ \\ &") == r"a b \!\[x\](y) \`c\` \# \_d\_ \\ &amp;"

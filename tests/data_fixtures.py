"""What the tests of the data axis share: a tiny tokenizer and a small table."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

START, END, UNKNOWN = 0, 1, 2
WORDS = ["red", "green", "blue", "one", "two", "three"]
PRESIDENTS = Path(__file__).parents[2] / "shared" / "data" / "us_presidents.csv.gz"

CHAT = [
    {"role": "user", "content": "red"},
    {"role": "assistant", "content": "green blue"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)


def word_tokenizer(*, bos: bool = True, eos: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    """A token a word, ids 3 to 8; `template` such as "<s> $A </s>" makes the tokenizer itself add special tokens."""
    vocabulary = {"<s>": START, "</s>": END, "?": UNKNOWN, **{word: 3 + n for n, word in enumerate(WORDS)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template is not None:
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", START), ("</s>", END)])
    special = ({"bos_token": "<s>"} if bos else {}) | ({"eos_token": "</s>"} if eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", model_max_length=5, **special)


def table_rows(tasks: str = "abc", *, groups: int = 5, documents: int = 2) -> list[dict[str, str]]:
    """Rows with unequal, distinct texts; every task has `groups` groups of `documents` documents."""
    return [
        {"task": task, "text": f"{task}{g}{n} " + " ".join(WORDS[: 1 + (2 * g + n) % 5]), "group": f"{task} speech {g}"}
        for task in tasks
        for g in range(groups)
        for n in range(documents)
    ]


class SlowWords(PreTrainedTokenizer):
    """A tokenizer in Python, which knows no offsets."""

    def __init__(self):
        self.words = ["<s>", "</s>", "?", *WORDS]
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="?")

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return {word: n for n, word in enumerate(self.words)}

    def _tokenize(self, text, **kwargs):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.words.index(token) if token in self.words else UNKNOWN

    def _convert_id_to_token(self, index):
        return self.words[index]

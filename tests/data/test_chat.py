"""The template: equal to transformers', its mask to an independent recomputation, safe against bodies."""

import random

import pytest
from tokenizers import Tokenizer

from cqlora.base import Base
from cqlora.data.chat import CHAT_TEMPLATE, ChatEncoder, render_turns
from cqlora.data.encode import EncodeSettings, RecordEncoder
from cqlora.data.records import Conversation, Turn
from cqlora.data.tokenizer import PlainTokenizer
from cqlora.errors import ModelError

WORDS = [
    "长江",
    "发源于",
    "青藏高原",
    "。",
    "hello",
    " world",
    "\n",
    "𠀀",
    "😀",
    "def f(x):\n    return x",
    " ",
    "！",
    "42",
]
HOSTILE = [
    "<|im_end|>",
    "<|im_start|>",
    "<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>",
    "</s>",
    "<s>",
]


def random_conversation(rng: random.Random, words: list[str]) -> list[Turn]:
    def body() -> str:
        return ("x" + "".join(rng.choices(words, k=rng.randrange(1, 12)))).strip()

    turns = [Turn("system", body())] if rng.random() < 0.3 else []
    for _ in range(rng.randrange(1, 4)):
        turns += [Turn("user", body()), Turn("assistant", body())]
    return turns


def recompute_mask(tokenizer: Tokenizer, ids: list[int]) -> list[bool]:
    """The mask from the ids alone: walk the turns, read the role, mark an assistant's words and end."""
    start, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
    mask, position = [False] * len(ids), 0
    while position < len(ids):
        if ids[position] != start:
            position += 1
            continue
        close = ids.index(end, position)
        header = position + 1
        while "\n" not in tokenizer.decode(ids[position + 1 : header], skip_special_tokens=False):
            header += 1
        role = tokenizer.decode(ids[position + 1 : header], skip_special_tokens=False).strip()
        if role == "assistant":
            mask[header : close + 1] = [True] * (close + 1 - header)
        position = close + 1
    return mask


@pytest.mark.parametrize("seed", range(200))
def test_mask_marks_exactly_the_assistants_words_and_end_tokens(byte_base: Base, seed: int):
    rng = random.Random(seed)
    turns = random_conversation(rng, WORDS + HOSTILE)
    settings = EncodeSettings(folder=str(byte_base.path), sequence_length=1 << 20, all_tokens=False)
    encoder = RecordEncoder(settings)
    batch = encoder.encode([Conversation(turns)])
    expected = recompute_mask(Tokenizer.from_file(str(byte_base.tokenizer_file)), batch.tokens.tolist())
    assert batch.labels.astype(bool).tolist() == expected
    said = "".join(turn.text for turn in turns if turn.role == "assistant")
    assert batch.characters.tolist() == [len(said)]
    assert batch.utf8_bytes.tolist() == [len(said.encode())]


def test_control_tokens_in_a_body_train_as_plain_text(any_base: Base):
    plain = PlainTokenizer(any_base.path)
    body = "<|im_end|><|im_start|>system"
    encoded = ChatEncoder(plain).encode_turns([Turn("user", body), Turn("assistant", body)])
    ids = [token for turn in encoded for token in turn.ids]
    special = plain.special
    assert ids.count(special.turn_start) == 2
    assert ids.count(special.turn_end) == 2
    for turn in encoded:
        inside = turn.ids[1 : turn.ids.index(special.turn_end)]
        assert body in plain.text.decode(inside, skip_special_tokens=True)
    labels = [bool(label) for turn in encoded for label in turn.labels]
    assert labels == recompute_mask(plain.text, ids)


def test_control_tokens_in_raw_text_train_as_plain_text(any_base: Base):
    plain = PlainTokenizer(any_base.path)
    settings = EncodeSettings(folder=str(any_base.path), sequence_length=4096, all_tokens=True)
    from cqlora.data.records import Document

    ids = RecordEncoder(settings).encode([Document("a <|endoftext|></s><s><|im_start|> b")]).tokens.tolist()
    controls = {
        plain.special.document_start,
        plain.special.document_end,
        plain.special.turn_start,
        plain.special.turn_end,
    }
    assert not controls & set(ids[1:-1])


def test_not_special_flagged_control_tokens_stay_plain_too(byte_base: Base, tmp_path):
    import json
    import shutil

    folder = tmp_path / "base"
    shutil.copytree(byte_base.path, folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    for token in document["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(document))
    plain = PlainTokenizer(folder)
    ids = ChatEncoder(plain).encode_turns([Turn("user", "<|im_end|>")])[0].ids
    assert ids.count(plain.special.turn_end) == 1


@pytest.mark.parametrize("seed", range(20))
def test_ids_equal_those_of_transformers_chat_template(any_base: Base, seed: int):
    from transformers import PreTrainedTokenizerFast

    names = PlainTokenizer(any_base.path)
    bos = None if names.special.bos is None else names.text.id_to_token(names.special.bos)
    stock = PreTrainedTokenizerFast(tokenizer_file=str(any_base.tokenizer_file), bos_token=bos)
    turns = random_conversation(random.Random(seed), WORDS)
    messages = [{"role": turn.role, "content": f" {turn.text}\n"} for turn in turns]

    text = stock.apply_chat_template(messages, chat_template=CHAT_TEMPLATE, tokenize=False)
    assert text == (bos or "") + render_turns(turns)
    as_text = [{"role": turn.role, "text": turn.text} for turn in turns]
    assert stock.apply_chat_template(as_text, chat_template=CHAT_TEMPLATE, tokenize=False) == text

    expected = stock.apply_chat_template(messages, chat_template=CHAT_TEMPLATE, return_dict=False)
    chat = ChatEncoder(names)
    assert [*chat.bos, *(token for turn in chat.encode_turns(turns) for token in turn.ids)] == expected

    asked = stock.apply_chat_template(
        messages[:-1], chat_template=CHAT_TEMPLATE, add_generation_prompt=True, return_dict=False
    )
    assert chat.encode_prompt(turns[:-1]) == asked


def test_bos_that_is_the_turn_start_is_not_put_twice():
    from jinja2 import Environment

    template = Environment().from_string(CHAT_TEMPLATE)
    message = {"role": "user", "content": "hi"}
    assert template.render(messages=[message], bos_token="<|im_start|>").count("<|im_start|>") == 1
    assert template.render(messages=[message], bos_token="<s>").startswith("<s><|im_start|>")


def test_a_base_without_chat_tokens_is_refused_with_the_verb_that_adds_them(tmp_path):
    from tests.data.conftest import sentence_tokenizer, write_base

    tokenizer = sentence_tokenizer()
    import json

    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if "im_" not in token["content"]]
    for name in ("<|im_start|>", "<|im_end|>"):
        document["model"]["vocab"][f"removed {name}"] = document["model"]["vocab"].pop(name)
    base = write_base(tmp_path / "bare", Tokenizer.from_str(json.dumps(document)), "<s>", "</s>")
    with pytest.raises(ModelError, match="cqlora extend"):
        ChatEncoder(PlainTokenizer(base.path))

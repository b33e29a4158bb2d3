"""Extended tokenizers of each kind: what is added, what stays, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from cqlora.errors import ConfigError, DataError, ModelError
from cqlora.vocab.config import VocabConfig, VocabKind
from cqlora.vocab.corpus import chinese_words, open_corpus
from cqlora.vocab.extension import Extension, extend_tokenizer
from cqlora.vocab.files import read_tokenizer_files
from cqlora.vocab.merge import cjk_characters, merge_pieces
from cqlora.vocab.parity import PROBES, check_parity
from cqlora.vocab.train import train_sentencepiece
from tests.vocab.bases import CHINESE, ENGLISH


def extend(base: Path, output: Path, corpus: Path | None, kind: str, **options: object) -> Extension:
    """Extend with the small corpus, or the bundled text; every piece that occurs twice counts."""
    output.mkdir(exist_ok=True)
    size = len(Tokenizer.from_file(str(base / "tokenizer.json")).get_vocab())
    learned = {"bpe": {"size": 200, "min_frequency": 2}, "auto": {"size": 200, "min_frequency": 2}}
    learned["sentencepiece"] = {"size": 200}
    defaults = learned.get(kind, {}) | {"corpus": [str(corpus)] if corpus else []} | options
    return extend_tokenizer(base, output, VocabConfig(kind=VocabKind[kind], **defaults), size)


def load(folder: Path) -> Tokenizer:
    """The fast tokenizer of a folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def ids(folder: Path, text: str) -> list[int]:
    """Ids of a text without special tokens."""
    found: list[int] = load(folder).encode(text, add_special_tokens=False).ids
    return found


def test_bpe_leaves_text_without_new_merges_as_it_was(ranks_base: Path, corpus: Path, tmp_path: Path) -> None:
    extension = extend(ranks_base, tmp_path, corpus, "bpe")
    assert extension.report.pieces_added > 50
    for text in (*ENGLISH, *(probe for probe in PROBES if probe.isascii()), "ひらがな", "😀"):
        assert ids(tmp_path, text) == ids(ranks_base, text)
    for text in CHINESE:
        assert len(ids(tmp_path, text)) < 0.5 * len(ids(ranks_base, text))
        assert load(tmp_path).decode(ids(tmp_path, text)) == text


def test_bpe_keeps_the_bases_merges_and_appends_its_own(ranks_base: Path, corpus: Path, tmp_path: Path) -> None:
    extend(ranks_base, tmp_path, corpus, "bpe")
    before, after = (json.loads((folder / "tokenizer.json").read_text()) for folder in (ranks_base, tmp_path))
    own = before["model"]["merges"]
    assert after["model"]["merges"][: len(own)] == own
    assert {p: after["model"]["vocab"][p] for p in before["model"]["vocab"]} == before["model"]["vocab"]
    assert after["pre_tokenizer"] == before["pre_tokenizer"]


def test_a_base_that_brings_text_to_nfc_is_extended_and_still_does(
    ranks_base: Path, corpus: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(ranks_base, base)
    document = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    (base / "tokenizer.json").write_text(json.dumps(document | {"normalizer": {"type": "NFC"}}), encoding="utf-8")
    assert extend(base, tmp_path / "extended", corpus, "bpe").report.pieces_added > 50
    assert ids(tmp_path / "extended", "e\u0301") == ids(base, "\u00e9") != ids(ranks_base, "e\u0301")


def test_bpe_adds_exactly_the_size_asked_for(ranks_base: Path, corpus: Path, tmp_path: Path) -> None:
    assert extend(ranks_base, tmp_path, corpus, "bpe", size=60).report.pieces_added == 60


def test_learned_pieces_occur_often_enough(ranks_base: Path, corpus: Path, tmp_path: Path) -> None:
    few, many = (tmp_path / name for name in ("few", "many"))
    extend(ranks_base, few, corpus, "bpe", size=5000, min_frequency=20)
    extend(ranks_base, many, corpus, "bpe", size=5000, min_frequency=2)
    assert load(few).get_vocab_size() < load(many).get_vocab_size() < 5000


def test_learning_is_the_same_every_time(ranks_base: Path, corpus: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        extend(ranks_base, tmp_path / name, corpus, "bpe")
    one, two = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("kind", ["cjk", "sentencepiece"])
def test_pieces_equal_sentencepiece_and_keep_english(
    kind: str, pieces_base: Path, corpus: Path, tmp_path: Path
) -> None:
    extension = extend(pieces_base, tmp_path, corpus, kind)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    fast = AutoTokenizer.from_pretrained(tmp_path)
    assert len(fast) == processor.vocab_size() == extension.report.tokens
    for text in (*PROBES, *CHINESE):
        assert fast.encode(text, add_special_tokens=False) == processor.encode(text)
        assert fast.decode(processor.encode(text)) == text
    for text in ENGLISH:
        assert ids(tmp_path, text) == ids(pieces_base, text)
    assert extension.report.english_tokens_changed == 0


def test_sentencepiece_model_of_someone_else_is_merged(pieces_base: Path, corpus: Path, tmp_path: Path) -> None:
    words = chinese_words(open_corpus([str(corpus)], 0.1), 10**6)
    proto = train_sentencepiece(words, 150)
    (tmp_path / "other.model").write_bytes(proto.SerializeToString())
    extension = extend(pieces_base, tmp_path / "out", corpus, "path", model=str(tmp_path / "other.model"))
    known = {piece.piece for piece in read_tokenizer_files(pieces_base).pieces.pieces}
    new = [piece.piece for piece in proto.pieces if piece.type == 1 and piece.piece not in known]
    assert extension.report.pieces_added == len(new)
    after = read_tokenizer_files(tmp_path / "out").pieces
    first = extension.first_row
    assert [piece.piece for piece in after.pieces[first : first + len(new)]] == new


def test_new_scores_lie_below_the_bases(pieces_base: Path) -> None:
    files = read_tokenizer_files(pieces_base)
    lowest = min(piece.score for piece in files.pieces.pieces if piece.type == 1)
    first = len(files.pieces.pieces)
    merge_pieces(files, ["中国", "人工"])
    assert [piece.score < lowest for piece in files.pieces.pieces[first:]] == [True, True]


def test_cjk_adds_the_20292_characters_that_llamas_700_lack(pieces_base: Path) -> None:
    files = read_tokenizer_files(pieces_base)
    held = {piece.piece for piece in files.pieces.pieces}
    merge_pieces(files, [c for c in cjk_characters() if c not in held][: 700 - len(held & {*cjk_characters()})])
    assert len(cjk_characters()) == 20_992
    new = merge_pieces(files, cjk_characters())
    assert (len(new), 32_000 + len(new)) == (20_292, 52_292)


def test_cjk_makes_every_character_one_token_of_a_byte_level_bpe(
    ranks_base: Path, corpus: Path, tmp_path: Path
) -> None:
    extend(ranks_base, tmp_path, corpus, "cjk")
    tokenizer = load(tmp_path)
    for character in "一丁人龘鿿":
        assert len(tokenizer.encode(character, add_special_tokens=False).ids) == 1


def test_control_tokens_and_padding(pieces_base: Path, corpus: Path, tmp_path: Path) -> None:
    extension = extend(pieces_base, tmp_path, corpus, "cjk")
    fast = AutoTokenizer.from_pretrained(tmp_path)
    for token in ("<|im_start|>", "<|im_end|>", "<|end-paragraph|>", "<|pad|>"):
        assert len(fast.encode(token, add_special_tokens=False)) == 1
    assert fast.pad_token == "<|pad|>"
    assert fast.pad_token_id not in (0, fast.eos_token_id)
    assert extension.matrix_rows % 64 == 0
    assert extension.padding_rows == extension.matrix_rows - len(fast)
    assert extension.first_row + len(extension.new) == len(fast)


def test_control_tokens_are_not_added_twice(ranks_base: Path, corpus: Path, tmp_path: Path) -> None:
    once = extend(ranks_base, tmp_path / "once", corpus, "bpe", size=20)
    twice = extend(tmp_path / "once", tmp_path / "twice", corpus, "bpe", size=20)
    assert (once.report.control_tokens_added, twice.report.control_tokens_added) == (4, 0)
    assert twice.first_row == once.report.tokens


def test_control_tokens_can_be_left_out(pieces_base: Path, corpus: Path, tmp_path: Path) -> None:
    extension = extend(pieces_base, tmp_path, corpus, "cjk", control_tokens=False, pad_to_multiple_of=1)
    assert extension.report.control_tokens_added == extension.padding_rows == 0


def test_token_added_behind_a_sentencepiece_model_keeps_its_id(pieces_base: Path, corpus: Path, tmp_path: Path) -> None:
    files = read_tokenizer_files(pieces_base)
    token = {"id": files.size, "content": "[EXTRA]", "single_word": False, "lstrip": False, "rstrip": False}
    files.document["added_tokens"].append(token | {"normalized": False, "special": True})
    files.write(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((pieces_base / "tokenizer.model").read_bytes())
    (tmp_path / "out").mkdir()
    extension = extend(tmp_path, tmp_path / "out", corpus, "cjk")
    assert extension.first_row == token["id"] + 1
    assert load(tmp_path / "out").token_to_id("[EXTRA]") == token["id"]


def test_unfit_kinds_are_refused(ranks_base: Path, pieces_base: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use vocab=bpe"):
        extend(ranks_base, tmp_path, corpus, "sentencepiece")
    with pytest.raises(ConfigError, match="use vocab=sentencepiece"):
        extend(pieces_base, tmp_path, corpus, "bpe")
    with pytest.raises(ModelError, match="no SentencePiece model"):
        extend(pieces_base, tmp_path, corpus, "path", model=str(corpus))


def test_corpus_without_chinese_or_without_files_is_an_error(ranks_base: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("only English here\n")
    with pytest.raises(DataError, match="no Chinese text"):
        extend(ranks_base, tmp_path / "out", tmp_path / "en.txt", "bpe")
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist"):
        extend(ranks_base, tmp_path / "out", tmp_path / "nowhere.txt", "bpe")


def test_merge_that_differs_from_sentencepiece_is_an_error(pieces_base: Path) -> None:
    files = read_tokenizer_files(pieces_base)
    merge_pieces(files, ["鑫", "淼", "鑫淼"])
    files.document["model"]["merges"] = [
        merge for merge in files.document["model"]["merges"] if "".join(merge) != "鑫淼"
    ]
    with pytest.raises(ModelError, match="differs from SentencePiece"):
        check_parity(files, files.build(), ["鑫淼"])


def test_tokenizer_that_loses_text_is_an_error(ranks_base: Path) -> None:
    files = read_tokenizer_files(ranks_base)
    files.document["normalizer"] = {"type": "Lowercase"}
    with pytest.raises(ModelError, match="gives back"):
        check_parity(files, files.build(), [])


def test_report_counts_what_a_recount_finds(ranks_base: Path, corpus: Path, tmp_path: Path) -> None:
    report = extend(ranks_base, tmp_path, corpus, "bpe").report
    documents = list(open_corpus([str(corpus)], 0.1).split(held_out=True))
    runs = [run for text in documents for run in __import__("re").findall("[\u4e00-\u9fff]+", text)]
    characters = sum(map(len, runs))
    assert report.chinese_characters == characters > 0
    for folder, counted in (
        (ranks_base, report.tokens_per_chinese_character_before),
        (tmp_path, report.tokens_per_chinese_character_after),
    ):
        assert counted == pytest.approx(sum(len(ids(folder, run)) for run in runs) / characters)
    assert json.loads((tmp_path / "vocab_report.json").read_text()) == report.as_json()


def test_bundled_sample_is_enough_to_learn_from(ranks_base: Path, tmp_path: Path) -> None:
    extension = extend(ranks_base, tmp_path, None, "auto", size=8000, min_frequency=4)
    assert 1000 < extension.report.pieces_added < 8000


def test_a_vocabulary_is_learned_from_the_columns_of_a_table_too(tmp_path: Path):
    (tmp_path / "a.csv").write_text("instruction,output,id\n长江在哪里？,在中国。,7\n", encoding="utf-8")
    corpus = open_corpus([str(tmp_path)], held_out_fraction=0.0)
    assert list(corpus.documents()) == ["长江在哪里？\n在中国。"]

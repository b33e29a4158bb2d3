"""Whatever a disk or a hand did to a model's files: one sentence or the very same result, and work that ends.

Cases are made by class from fixed seeds: flipped bits, cut ends, and in JSON other types, other numbers, deletions.
"""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cqlora.base import fingerprint_tokenizer, fingerprint_weights, read_base, read_card, seal_card
from cqlora.config.choices import GgufType, ModelFormat
from cqlora.data.tokenizer import PlainTokenizer
from cqlora.errors import CqloraError, ModelError
from cqlora.inference.architecture import read_architecture
from cqlora.system.companions import COMPANIONS, UNSEAL
from cqlora.vocab.config import VocabConfig
from cqlora.weights.convert import convert
from cqlora.weights.extend import extend
from cqlora.weights.gguf import GgufModel
from cqlora.weights.gguf_tokenizer import write_gguf_tokenizer
from cqlora.weights.merge import check_what_goes_along
from tests.vocab.bases import write_base
from tests.weights.adapters import write_tiny_base
from tests.weights.test_merge_lineage import merge, plan, trained

SECONDS = 20
"""A case that takes longer is a hang; on an idle machine the slowest takes a tenth of one."""
VALUES: list[Any] = [None, "x", "", True, -1, 0, 3, 10**9, 2**40, 10**30, 1e300, -0.5, [], {}, [[]], {"a": 1}, "\ud800"]
TEXTS = ["", "[]", "null", "{", "\x00" * 9, "[" * 100_000, "9" * 5000, '{"a": NaN}', '{"a": 1e999}', "\ufeff{}"]


def damage(file: Path, how: str, number: int) -> None:
    """Damage a file in place; every number is another case."""
    rng = random.Random(f"{file.name} {how} {number}")
    content = file.read_bytes()
    if how == "flip":
        place = rng.randrange(min(len(content), 4096) if rng.random() < 0.5 else len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
    elif how == "cut":
        file.write_bytes(content[: rng.randrange(len(content))])
    elif how == "text":
        file.write_text(TEXTS[number % len(TEXTS)], encoding="utf-8")
    else:
        document = json.loads(content)
        change(document, rng)
        file.write_text(json.dumps(document), encoding="utf-8")


def change(document: Any, rng: random.Random) -> None:
    """Put another value, or none, somewhere in a JSON document."""
    while True:
        key = rng.choice(list(document) if isinstance(document, dict) else range(len(document)))
        inner = document[key]
        if not (isinstance(inner, dict | list) and inner) or rng.random() < 0.3:
            break
        document = inner
    if rng.random() < 0.2:
        del document[key]
    else:
        document[key] = rng.choice(VALUES)


@contextmanager
def one_sentence() -> Iterator[list[str]]:
    """Let the block pass, or end in one sentence, within a time in which nothing that is well takes long."""

    def stop(*_: object) -> None:
        raise AssertionError(f"more than {SECONDS} s")

    sentences: list[str] = []
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield sentences
    except CqloraError as error:
        sentences.append(str(error))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert all("\n" not in sentence and len(sentence) < 1500 for sentence in sentences), sentences


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A sealed base with an adapter, its merge, a base of pieces, its raw files, a GGUF file."""
    folder = tmp_path_factory.mktemp("models")
    base = write_tiny_base(folder / "base")
    card = {"weights_sha256": fingerprint_weights(base), "tokenizer_sha256": fingerprint_tokenizer(base)}
    seal_card(base, card | {"first_added_row": 300, "added_rows": 10})
    adapter = trained(base, folder / "adapter", 1, trainable_token_indices=[300, 301])
    merge(base, folder / "merged", adapter)
    write_base(folder / "pieces", "pieces", shard=20_000)
    gguf = merge(base, folder / "gguf", adapter, format=ModelFormat.gguf, gguf_type=GgufType.f16)
    next(gguf.glob("*.gguf")).rename(folder / "model.gguf")
    return folder


def damaged(models: Path, name: str, scratch: Path) -> Path:
    shutil.rmtree(scratch, ignore_errors=True)
    return Path(shutil.copytree(models / name, scratch / name))


JSON_OF_BASE = ["config.json", "tokenizer.json", "tokenizer_config.json", "cqlora.json"]
CASES = [(file, how) for file in JSON_OF_BASE for how in ("flip", "cut", "value", "text")]
CASES += [("model.safetensors", "flip"), ("model.safetensors", "cut"), ("generation_config.json", "value")]


@pytest.mark.parametrize("file, how", CASES)
def test_a_damaged_base_merges_to_the_same_or_not_at_all(file, how, models, tmp_path):
    right = read_card(models / "merged")
    for number in range(10):
        base = damaged(models, "base", tmp_path / "scratch")
        damage(base / file, how, number)
        output = tmp_path / f"out{number}"
        with one_sentence() as sentences:
            check_what_goes_along(plan(base, models / "adapter"), UNSEAL)
            merge(base, output, models / "adapter")
        if sentences:
            assert not output.exists()
        else:
            assert file not in COMPANIONS or (base / file).read_bytes() == (models / "base" / file).read_bytes()
            assert {key: read_card(output)[key] for key in right if key.endswith("sha256")} == {
                key: right[key] for key in right if key.endswith("sha256")
            }
            assert read_card(output)["first_added_row"] == 300
            weights = (output / "model.safetensors").read_bytes()
            assert weights == (models / "merged" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("how", ["flip", "cut", "value", "text"])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "cqlora.json"])
def test_a_damaged_adapter_merges_to_the_same_or_not_at_all(file, how, models, tmp_path):
    if file.endswith("safetensors") and how in ("value", "text"):
        pytest.skip("no JSON")
    for number in range(15):
        adapter = damaged(models, "adapter", tmp_path / "scratch")
        damage(adapter / file, how, number)
        output = tmp_path / f"out{number}"
        with one_sentence() as sentences:
            merge(models / "base", output, adapter)
        if not sentences:
            weights = (output / "model.safetensors").read_bytes()
            assert weights == (models / "merged" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("how", ["flip", "cut", "value", "text"])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_without_a_card_is_one_sentence_or_goes_in(file, how, models, tmp_path):
    if file.endswith("safetensors") and how in ("value", "text"):
        pytest.skip("no JSON")
    for number in range(12):
        adapter = damaged(models, "adapter", tmp_path / "scratch")
        (adapter / "cqlora.json").unlink()
        damage(adapter / file, how, number)
        with one_sentence():
            merge(models / "base", tmp_path / f"out{number}", adapter)


@pytest.mark.parametrize("file, how", [*CASES, ("model.safetensors.index.json", "value")])
def test_a_base_without_fingerprints_is_read_and_extended_or_refused(file, how, models, tmp_path):
    source = "pieces" if file.endswith("index.json") else "base"
    for number in range(8):
        base = damaged(models, source, tmp_path / "scratch")
        if file != "cqlora.json":
            (base / "cqlora.json").unlink()
        damage(base / file, how, number)
        with one_sentence():
            found = read_base(base)
            read_architecture(found.config, base)
            PlainTokenizer(base).segment.encode("长江 is <|im_end|>")
        if number < 2:  # extending what is well takes a hundred times as long as reading it
            with one_sentence():
                extend(base, tmp_path / f"out{number}", VocabConfig(), 10**9, copy=True)


@pytest.mark.parametrize("how", ["flip", "cut", "value", "text"])
@pytest.mark.parametrize("file", ["params.json", "tokenizer.model", "consolidated.00.pth"])
def test_damaged_raw_weights_are_converted_or_refused(file, how, models, tmp_path):
    if file != "params.json" and how in ("value", "text"):
        pytest.skip("no JSON")
    for number in range(12):
        raw = damaged(models, "pieces-raw", tmp_path / "scratch")
        damage(raw / file, how, number)
        with one_sentence():
            convert(raw, tmp_path / f"out{number}", "", "auto", 10**9, VocabConfig())


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_a_damaged_gguf_file_is_read_or_refused(how, models, tmp_path):
    for number in range(60):
        file = Path(shutil.copyfile(models / "model.gguf", tmp_path / "model.gguf"))
        damage(file, how, number)
        with one_sentence():
            model = GgufModel(file)
            model.config()
            write_gguf_tokenizer(model, tmp_path)
            for name in model.specs:
                sum(len(block) for block in model.blocks(name))


def set_keys(file: Path, **changed: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


BOUNDED: dict[str, tuple[Callable[[Path], None], str]] = {
    "layers": (lambda raw: set_keys(raw / "params.json", n_layers=10**8), "n_layers=100000000"),
    "width": (lambda raw: set_keys(raw / "params.json", dim=10**12), "dim=1000000000000"),
    "heads": (lambda raw: set_keys(raw / "params.json", n_heads=0), "n_heads=0"),
    "kind": (lambda raw: set_keys(raw / "params.json", norm_eps="x"), "norm_eps='x'"),
    "lacking": (lambda raw: set_keys(raw / "params.json", norm_eps=None), "norm_eps=None"),
}  # fmt: skip


@pytest.mark.parametrize("change, words", BOUNDED.values(), ids=BOUNDED)
def test_params_json_out_of_bounds_is_refused_before_any_work(change, words, models, tmp_path):
    raw = damaged(models, "pieces-raw", tmp_path / "scratch")
    change(raw)
    with pytest.raises(ModelError, match=words):
        convert(raw, tmp_path / "out", "", "auto", 10**9, VocabConfig())


def test_an_array_of_2_to_the_40_in_a_gguf_file_is_refused_by_what_is_left_of_the_file(models, tmp_path):
    content = (models / "model.gguf").read_bytes()
    key = b"tokenizer.ggml.tokens"
    place = content.index(key) + len(key) + 8
    (tmp_path / "model.gguf").write_bytes(content[:place] + (2**40).to_bytes(8, "little") + content[place + 8 :])
    with one_sentence() as sentences:
        GgufModel(tmp_path / "model.gguf")
    assert "promises 1,099,511,627,776 things" in sentences[0]


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json", "cqlora.json"]
)
def test_a_pipe_in_a_folder_is_refused_and_not_waited_for(name, models, tmp_path):
    base = damaged(models, "base", tmp_path / "scratch")
    (base / name).unlink()
    os.mkfifo(base / name)
    with one_sentence() as sentences:
        merge(base, tmp_path / "out", models / "adapter")
    assert sentences and not (tmp_path / "out").exists()


def test_a_pipe_beside_the_model_is_left_where_it_is(models, tmp_path):
    base = damaged(models, "base", tmp_path / "scratch")
    os.mkfifo(base / "pipe.txt")
    with one_sentence() as sentences:
        merge(base, tmp_path / "out", models / "adapter")
    assert not sentences and not (tmp_path / "out" / "pipe.txt").exists()


def test_extending_a_tokenizer_of_more_tokens_than_rows_is_one_sentence(models, tmp_path):
    base = damaged(models, "base", tmp_path / "scratch")
    (base / "cqlora.json").unlink()
    document = json.loads((base / "tokenizer.json").read_text())
    for token_id in range(320, 330):
        document["added_tokens"].append(document["added_tokens"][0] | {"id": token_id, "content": f"<{token_id}>"})
    (base / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match=r"'<329>' the id 329 and the model has 320 rows"):
        extend(base, tmp_path / "out", VocabConfig(), 10**9, copy=True)


def test_a_gguf_tokenizer_is_written_or_refused_with_all_its_columns(models, tmp_path):
    model = GgufModel(models / "model.gguf")
    model._fields.pop("tokenizer.ggml.merges")
    with one_sentence() as sentences:
        write_gguf_tokenizer(model, tmp_path)
    assert "tokenizer.ggml.merges" in sentences[0]

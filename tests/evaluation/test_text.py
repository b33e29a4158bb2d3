"""Losses of held-out text: equal to stock transformers', to closed forms, and whatever the batch."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cqlora.data.held_out import HeldOutText, read_files, take_whole
from cqlora.engine import LlamaEngine
from cqlora.errors import DataError
from cqlora.evaluation.statistics import mean, ratio
from cqlora.evaluation.text import BITS, Windows, cut_windows, score_text
from tests.evaluation.conftest import CHINESE
from tests.inference.conftest import load_stock, peft_model

SHORT = Windows(window=48, stride=16, batch_tokens=200)


def score(engine: LlamaEngine, text: HeldOutText, windows: Windows = SHORT):
    return score_text(engine, text, windows, lambda done: None)


def recompute(model, ids: list[int], windows: Windows) -> float:
    """Nats of a document by transformers, window after window, in float64 from the logits on."""
    nats = 0.0
    for start, scored, end in cut_windows(len(ids), windows.window, windows.stride):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[start : end - 1]]), use_cache=False).logits[0].double()
        targets = torch.tensor(ids[scored:end])
        nats += float(torch.nn.functional.cross_entropy(logits[-len(targets) :], targets, reduction="sum"))
    return nats


def test_a_document_costs_what_transformers_says_window_by_window(base, engine, chinese):
    found = score(engine, chinese)
    expected = [recompute(load_stock(base), engine.encode_document(text), SHORT) for text in CHINESE]
    assert found.nats == pytest.approx(expected, rel=1e-5)
    assert found.tokens == sum(len(engine.encode_document(text)) - 1 for text in CHINESE)
    assert len(engine.encode_document(CHINESE[0])) > SHORT.window + SHORT.stride, "the first one needs several windows"


def test_an_adapter_costs_what_transformers_and_peft_say(base, adapter, chinese):
    engine = LlamaEngine(adapter, base, dtype="float32")
    expected = [recompute(peft_model(base, adapter), engine.encode_document(text), SHORT) for text in CHINESE]
    assert score(engine, chinese).nats == pytest.approx(expected, rel=1e-5)


def test_the_same_numbers_come_twice_to_the_last_digit(engine, chinese):
    assert score(engine, chinese).nats.tolist() == score(engine, chinese).nats.tolist()


@pytest.mark.parametrize("batch_tokens", [1, 97, 5000])
def test_another_batch_size_changes_bits_by_less_than_a_millionth(batch_tokens, engine, chinese):
    other = score(engine, chinese, Windows(SHORT.window, SHORT.stride, batch_tokens))
    ours = score(engine, chinese)
    assert other.bits_per_character.value == pytest.approx(ours.bits_per_character.value, abs=1e-6)
    assert other.nats == pytest.approx(ours.nats, rel=1e-6)


def rewrite(base: Path, folder: Path, change) -> Path:
    """The base with its tensors changed."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_uniform_model_over_v_tokens_needs_log2_v_bits_for_each(base, chinese, tmp_path):
    folder = rewrite(base, tmp_path / "uniform", lambda tensors: tensors["lm_head.weight"].zero_())
    found = score(LlamaEngine(folder, "", use_lora=False, dtype="float32"), chinese)
    assert found.loss * BITS == pytest.approx(math.log2(448), abs=1e-6)
    assert found.perplexity == pytest.approx(448, rel=1e-5)
    assert found.bits_per_character.value == pytest.approx(math.log2(448) * found.tokens / chinese.characters, rel=1e-6)


def test_unused_new_tokens_cost_the_share_that_they_take_of_the_sum(base, engine, chinese, tmp_path):
    """K rows of zeros have logits of 0: every token's loss rises by log(1 + K / sum of e to the old logits)."""
    added = 64
    folder = tmp_path / "extended"

    def extend(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.zeros(added, tensors[name].shape[1])])

    rewrite(base, folder, extend)
    config = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(config.replace('"vocab_size": 448', '"vocab_size": 512'), encoding="utf-8")
    found = score(LlamaEngine(folder, "", use_lora=False, dtype="float32"), chinese)

    model, rise = load_stock(base), np.zeros(len(CHINESE))
    for number, text in enumerate(CHINESE):
        ids = engine.encode_document(text)
        for start, scored, end in cut_windows(len(ids), SHORT.window, SHORT.stride):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids[start : end - 1]]), use_cache=False).logits[0].double()
            rise[number] += float(torch.log1p(added / logits[scored - end :].exp().sum(dim=1)).sum())
    before = score(engine, chinese)
    assert found.tokens == before.tokens
    assert found.nats - before.nats == pytest.approx(rise, rel=1e-4)
    assert found.difference(before)["bits_per_character_difference"] == pytest.approx(
        rise.sum() * BITS / chinese.characters, rel=1e-4
    )


@pytest.mark.parametrize(("count", "window", "stride"), [(2, 4, 2), (5, 4, 4), (23, 8, 3), (400, 64, 1), (9, 8, 8)])
def test_windows_predict_each_token_once_and_read_no_more_than_they_may(count, window, stride):
    predicted = []
    for start, scored, end in cut_windows(count, window, stride):
        assert end - 1 - start <= window
        assert start < scored < end
        assert scored == 1 or end - 1 - start == window or end == count
        predicted += range(scored, end)
    assert predicted == list(range(1, count))


def test_a_ratios_error_is_that_of_a_clustered_sample():
    """Against the spread of the estimate over many samples, which the formula promises."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(20, 200, size=(2000, 60))
    nats = sizes * generator.normal(2.0, 0.3, sizes.shape)
    estimates = [ratio(n, s) for n, s in zip(nats, sizes, strict=True)]
    spread = np.std([each.value for each in estimates])
    assert np.mean([each.error for each in estimates]) == pytest.approx(spread, rel=0.05)


def test_a_mean_has_the_textbooks_error():
    values = [1.0, 2.0, 4.0, 9.0]
    assert mean(values) == pytest.approx((4.0, np.std(values, ddof=1) / 2))
    assert ratio([3.0], [2.0]) == (1.5, None)


def test_a_model_beside_itself_differs_by_nothing(engine, chinese):
    found = score(engine, chinese)
    assert set(found.difference(found).values()) == {0.0}


def test_documents_are_taken_whole():
    assert take_whole(["aaaa", "bb", "cc"], 5) == ["aaaa", "bb"]
    assert take_whole(["aaaa", "bb"], 0) == ["aaaa", "bb"]
    assert take_whole(["aaaa", "bb"], 1) == ["aaaa"]


def test_files_are_sources_and_documents_tell_their_language(tmp_path):
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"text": "河流很长。"}\n{"text": "A long river."}\n', encoding="utf-8")
    plain = tmp_path / "plain.txt"
    plain.write_text("第一行。\n第二行。\n", encoding="utf-8")
    found = read_files([str(mixed), str(plain)], "\n", 0)
    assert found == [
        HeldOutText("mixed", "en", ["A long river."]),
        HeldOutText("mixed", "zh", ["河流很长。"]),
        HeldOutText("plain", "zh", ["第一行。", "第二行。"]),
    ]


def test_files_that_cannot_be_told_apart_or_read_are_refused(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(DataError, match=r"broken.jsonl, line 2: broken JSON"):
        read_files([str(broken)], "", 0)
    broken.write_bytes('{"text": "长江发源于青藏高原"}'.encode("gbk"))
    with pytest.raises(DataError, match="line 1: GB18030 and not UTF-8, to which `iconv"):
        read_files([str(broken)], "", 0)
    broken.write_text('{"text": "half \\ud800 a pair"}')
    assert read_files([str(broken)], "", 0) == [HeldOutText("broken", "en", ["half \ufffd a pair"])]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "broken.txt").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match="two files broken"):
        read_files([str(broken), str(tmp_path / "other" / "broken.txt")], "", 0)

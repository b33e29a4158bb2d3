"""A snapshot is mapped, holds what was computed, and is found by nothing but the same model."""

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import torch

from cqlora.errors import ModelError
from cqlora.inference.linear import tensors_of
from cqlora.inference.opening import Request, open_decoder
from cqlora.system.durable import staged_file
from tests.cards import change_card
from tests.inference.conftest import build_adapter

IDS = list(range(20, 60))


def open_cached(adapter: Path, base: Path | None, dtype: str = "auto") -> torch.Tensor:
    decoder, _ = open_decoder(Request(adapter, base, "auto", dtype, cache=True, device=torch.device("cpu")))
    return decoder.all_logits(IDS)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "cqlora" / "engine").glob("*"))


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_the_second_load_quantises_and_merges_nothing(options, dtype, base, tmp_path, monkeypatch):
    adapter = build_adapter(base, tmp_path / "adapter", quantized=True, **options)
    first = open_cached(adapter, base, dtype)
    assert len(files(tmp_path)) == 1

    def forbidden(*_):
        raise AssertionError("this work was done by the first load")

    for name in ("quantise_rows", "pack_for_kernel", "join_low_rank", "read_parts"):
        monkeypatch.setattr(f"cqlora.inference.weights.{name}", forbidden)
    monkeypatch.setattr("cqlora.inference.opening.open_model", forbidden)
    assert torch.equal(open_cached(adapter, base, dtype), first)


def test_every_matrix_begins_at_a_cache_lines_edge(base, nf4_adapter, tmp_path):
    open_cached(nf4_adapter, base)
    decoder, _ = open_decoder(Request(nf4_adapter, base, "auto", "auto", cache=True, device=torch.device("cpu")))
    tensors = [tensor for layer in decoder.weights.layers for tensor in tensors_of(layer.gate_up).values()]
    assert tensors and all(tensor.data_ptr() % 64 == 0 for tensor in [*tensors, decoder.weights.embedding])


def test_another_adapter_scaling_or_type_has_another_snapshot(base, nf4_adapter, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(nf4_adapter, other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16}))
    change_card(other)
    monkeypatch.setenv("CQLORA_CPU_FEATURES", "plain")
    logits = [open_cached(nf4_adapter, base, dtype) for dtype in ("float32", "bfloat16")]
    assert len(files(tmp_path)) == 2
    assert not torch.equal(logits[0], logits[1])
    torch.testing.assert_close(logits[0], logits[1], atol=0.1, rtol=0.1)
    assert not torch.allclose(logits[0], open_cached(other, base, "float32"), atol=0.1)
    assert len(files(tmp_path)) == 3
    for features in ("plain", "bfloat16"):
        monkeypatch.setenv("CQLORA_CPU_FEATURES", features)
        open_cached(nf4_adapter, base, "auto")
    assert len(files(tmp_path)) == 3, "`auto` is one of the two types"


def test_a_snapshot_lets_no_other_tokenizer_through(base, nf4_adapter, tmp_path):
    open_cached(nf4_adapter, base)
    changed = Path(shutil.copytree(base, tmp_path / "changed"))
    tokenizer = (changed / "tokenizer.json").read_text(encoding="utf-8")
    (changed / "tokenizer.json").write_text(tokenizer.replace("<pad>", "<filler>"), encoding="utf-8")
    with pytest.raises(ModelError, match="another tokenizer"):
        open_cached(nf4_adapter, changed)


def test_a_damaged_snapshot_is_reported_and_a_full_disk_is_done_without(
    base, nf4_adapter, tmp_path, monkeypatch, caplog
):
    expected = open_cached(nf4_adapter, base)
    (file,) = files(tmp_path)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ModelError, match=r"damaged.*delete it"):
        open_cached(nf4_adapter, base)
    file.unlink()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cqlora.inference.snapshot.write_shard", refuse)
    with caplog.at_level(logging.WARNING, "cqlora"):
        logits = open_cached(nf4_adapter, base)
    assert "No space left" in caplog.text and files(tmp_path) == []
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_no_flipped_bit_of_a_snapshot_changes_what_is_computed_in_silence(base, nf4_adapter, tmp_path):
    expected = open_cached(nf4_adapter, base, "float32")
    (file,) = files(tmp_path)
    whole, dice = file.read_bytes(), random.Random(1)
    header = int.from_bytes(whole[:8], "little")
    places = [dice.randrange(8 + header) for _ in range(60)] + [dice.randrange(len(whole)) for _ in range(60)]
    unharmed, sentences = 0, set()
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << dice.randrange(8)
        file.write_bytes(damaged)
        try:
            found = open_cached(nf4_adapter, base, "float32")
        except ModelError as error:
            sentences.add(str(error))
        else:
            unharmed += 1
            assert torch.equal(found, expected), place
    assert unharmed < 20 and all("delete it and start again" in sentence for sentence in sentences)


def test_what_an_ended_process_left_half_written_is_removed(base, nf4_adapter, tmp_path):
    folder = tmp_path / "cache" / "cqlora" / "engine"
    folder.mkdir(parents=True)
    (folder / f".a.{'0' * 16}.partial").touch()
    with staged_file(folder / "b") as kept:
        open_cached(nf4_adapter, base)
        assert [file for file in files(tmp_path) if file.suffix == ".partial"] == [kept]


def test_a_model_that_is_not_quantised_is_not_kept_a_second_time(base, adapter, merged, tmp_path):
    open_cached(adapter, base)
    open_cached(merged, None)
    assert files(tmp_path) == []

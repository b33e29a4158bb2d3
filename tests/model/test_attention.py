"""Packed documents against separate runs of each, on every attention back end that runs here."""

import importlib.util
import sys
import warnings
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from cqlora.config.choices import Attention
from cqlora.errors import ModelError
from cqlora.model.attention import (
    DOCUMENTS,
    FLASH,
    VARLEN,
    attend_by_document,
    attend_by_flash,
    attend_in_one_call,
    document_kwargs,
    name_attention,
)

VOCABULARY = 64
BACKENDS = ["documents", "sdpa", "eager"]
HEADS = {"grouped": (6, 2), "multi-head": (4, 4)}
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}

PACKS = {
    "several": [[5, 9, 2]],
    "equal": [[4, 4, 4, 4]],
    "one fills all": [[16]],
    "length 1": [[1, 6, 1, 1, 3]],
    "rows of their own": [[5, 7], [3, 3, 6]],
    "padded rows": [[5, 4, 3], [8, 4]],
}
PADDING = {"padded rows": [3, 4]}
"""Tokens at the end of each row that no gradient comes from."""


def build_model(backend: str, heads: str = "grouped") -> LlamaForCausalLM:
    query_heads, key_heads = HEADS[heads]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8 * query_heads,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=query_heads,
        num_key_value_heads=key_heads,
        attn_implementation=name_attention(Attention(backend), "cpu"),
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).train()
    for parameter in model.parameters():
        # Untrained scores are so small that attending to the wrong document would hardly show.
        parameter.data.mul_(10.0 if parameter.dim() == 2 else 1.0)
    return model


def pack_inputs(rows: list[list[int]]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])
    return {"input_ids": torch.randint(0, VOCABULARY, positions.shape), "position_ids": positions}


def gradients_of(model: LlamaForCausalLM, outputs: list[Tensor], weights: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    sum((output.tanh() * weight).sum() for output, weight in zip(outputs, weights, strict=True)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def run_separately(model: LlamaForCausalLM, ids: Tensor, rows: list[list[int]]) -> tuple[list[Tensor], list[slice]]:
    """Logits of each document run alone, and where it lies in the flattened batch."""
    logits, spans, begin = [], [], 0
    for length in [length for row in rows for length in row]:
        spans.append(slice(begin, begin + length))
        logits.append(model(input_ids=ids.reshape(1, -1)[:, spans[-1]], use_cache=False).logits[0])
        begin += length
    return logits, spans


def assert_packed_equals_separate(model: LlamaForCausalLM, pack: str) -> None:
    rows = PACKS[pack]
    inputs = pack_inputs(rows)
    separate, spans = run_separately(model, inputs["input_ids"], rows)
    packed = model(**inputs, use_cache=False, **document_kwargs(rows, "cpu")).logits.flatten(0, 1)
    torch.testing.assert_close(packed, torch.cat(separate), **TOLERANCE)

    weights = torch.randn(packed.shape)
    for row, padding in enumerate(PADDING.get(pack, [])):
        weights[(row + 1) * inputs["input_ids"].shape[1] - padding :][:padding] = 0.0
    expected = gradients_of(model, separate, [weights[span] for span in spans])
    for name, gradient in gradients_of(model, [packed], [weights]).items():
        torch.testing.assert_close(gradient, expected[name], **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("pack", PACKS)
def test_packed_documents_equal_separate_runs(backend: str, heads: str, pack: str) -> None:
    assert_packed_equals_separate(build_model(backend, heads), pack)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pack", ["several", "rows of their own"])
def test_packed_documents_equal_separate_runs_with_activation_checkpointing(backend: str, pack: str) -> None:
    model = build_model(backend)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_packed_equals_separate(model, pack)


def attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn by its documentation, a document at a time, without its kernel."""
    assert cu_seq_q.dtype is cu_seq_k.dtype is torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k == int(cu_seq_q.diff().max()) and window_size == (-1, 0)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    outputs = []
    for begin, end in pairwise(cu_seq_q.tolist()):
        states = (each[None, begin:end].transpose(1, 2) for each in (query, key, value))
        attended = F.scaled_dot_product_attention(*states, is_causal=True, scale=scale, enable_gqa=enable_gqa)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


def attend_as_flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """flash_attn.flash_attn_varlen_func by its documentation, which shares key heads unasked."""
    assert causal and dropout_p == 0 and window_size == (-1, -1)
    bounds, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    shares = query.shape[1] != key.shape[1]
    return attend_plainly(
        query, key, value, *bounds, *longest, scale=softmax_scale, window_size=(-1, 0), enable_gqa=shares
    )


@pytest.mark.parametrize("name", [VARLEN, FLASH])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("pack", PACKS)
def test_all_documents_in_one_call_equal_separate_runs(
    name: str, heads: str, pack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def attend(*arguments: Any, **options: Any) -> Tensor:
        calls.append(len(arguments[3]) - 1)
        return (attend_plainly if name == VARLEN else attend_as_flash_attn)(*arguments, **options)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attend)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=attend))
    model = build_model("documents", heads)
    model.set_attn_implementation(name)
    assert_packed_equals_separate(model, pack)
    # Once a layer, whatever the documents' lengths; runs of one document go the other way.
    assert calls == [len([length for row in PACKS[pack] for length in row])] * 2


def test_flash_attn_is_told_of_windows_and_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def attend(query: Tensor, *arguments: Any, **options: Any) -> Tensor:
        told.update(options)
        return query

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=attend))
    states = [torch.randn(1, 2, 16, 8) for _ in range(3)]
    packed = document_kwargs([12, 4], "cpu")
    output, _ = attend_by_flash(torch.nn.Module(), *states, None, 0.1, 0.5, sliding_window=8, **packed)
    # Its bounds are inclusive: a window of 8 is the token itself and 7 before it.
    assert told == {"window_size": (7, 0), "dropout_p": 0.1, "softmax_scale": 0.5, "causal": True}
    assert torch.equal(output, states[0].transpose(1, 2))
    with pytest.raises(ModelError, match="add up to 16 where the batch has 1 rows of 15"):
        attend_by_flash(torch.nn.Module(), *(each[:, :, 1:] for each in states), None, **packed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's kernel for documents of all lengths needs a GPU")
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("pack", PACKS)
def test_torch_s_own_kernel_attends_as_documents_one_by_one(heads: str, pack: str) -> None:
    name_attention(Attention.varlen, "cuda")
    query_heads, key_heads = HEADS[heads]
    rows = PACKS[pack]
    states = [
        torch.randn(len(rows), count, sum(rows[0]), 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for count in (query_heads, key_heads, key_heads)
    ]
    found = []
    for attend in (attend_by_document, attend_in_one_call):
        output, _ = attend(torch.nn.Module(), *states, None, scaling=0.1, **document_kwargs(rows, "cuda"))
        found.append([output, *torch.autograd.grad(output.float().tanh().sum(), states)])
    for one_by_one, in_one in zip(*found, strict=True):
        torch.testing.assert_close(in_one, one_by_one, atol=3e-2, rtol=3e-2)


def test_one_call_refuses_a_window_that_documents_exceed_and_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attend_plainly)
    states = [torch.randn(1, 2, 16, 8) for _ in range(3)]
    packed = document_kwargs([12, 4], "cpu")
    with pytest.raises(ModelError, match=r"12 tokens is longer than the layer's window of 8; .*sequence_length=8"):
        attend_in_one_call(torch.nn.Module(), *states, None, sliding_window=8, **packed)
    with pytest.raises(ModelError, match=r"attention_dropout is 0.1; use model\.attention=documents"):
        attend_in_one_call(torch.nn.Module(), *states, None, dropout=0.1, **packed)


@pytest.mark.gpu
@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None or not torch.cuda.is_available(),
    reason="flash attention needs a GPU and the package flash-attn",
)
@pytest.mark.parametrize("pack", PACKS)
def test_flash_attention_by_document_equals_separate_runs(pack: str) -> None:
    model = build_model("documents").to("cuda", torch.bfloat16)
    inputs = {name: tensor.cuda() for name, tensor in pack_inputs(PACKS[pack]).items()}
    boundaries = document_kwargs(PACKS[pack], "cuda")
    expected = model(**inputs, use_cache=False, **boundaries).logits
    model.set_attn_implementation(name_attention(Attention.flash, "cuda"))
    packed = model(**inputs, use_cache=False, **boundaries).logits
    torch.testing.assert_close(packed, expected, atol=0.1, rtol=0.05)


def test_documents_do_attend_across_without_boundaries() -> None:
    """The packs above would show it if they did."""
    model, inputs = build_model("sdpa"), pack_inputs([[5, 9, 2]])
    separate, _ = run_separately(model, inputs["input_ids"], [[5, 9, 2]])
    mixed = model(**inputs, use_cache=False, attention_mask=torch.ones(1, 16)).logits[0]
    assert (mixed - torch.cat(separate)).abs().max() > 0.1


class Allocations(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def largest_tensor(backend: str, lengths: list[int]) -> int:
    model, inputs = build_model(backend, "multi-head"), pack_inputs([lengths])
    with Allocations() as allocations:
        model(**inputs, use_cache=False, **document_kwargs(lengths, "cpu")).logits.sum().backward()
    return allocations.largest


def test_no_tensor_of_the_square_of_the_pack_is_made() -> None:
    length = 512
    lengths = [length // 4] * 4
    assert largest_tensor("documents", lengths) <= length * VOCABULARY
    assert largest_tensor("sdpa", lengths) >= length * length


def test_the_model_does_not_warn_about_the_attention_or_its_mask(caplog: pytest.LogCaptureFixture) -> None:
    rows = [[5, 9, 2]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        model = build_model("documents")
        model(**pack_inputs(rows), use_cache=False, **document_kwargs(rows, "cpu")).logits.sum().backward()
    assert model.config._attn_implementation == DOCUMENTS
    assert not caplog.records


def test_boundaries_read_off_position_ids_equal_those_of_the_lengths() -> None:
    rows = [[5, 1, 1, 5], [12]]
    from_lengths = document_kwargs(rows, "cpu")
    from_positions = document_kwargs(pack_inputs(rows)["position_ids"], "cpu")
    assert from_lengths["cu_seq_lens_q"].tolist() == [0, 5, 6, 7, 12, 24]
    assert from_lengths["cu_seq_lens_q"].dtype is torch.int32
    assert from_positions["cu_seq_lens_k"].tolist() == from_lengths["cu_seq_lens_k"].tolist()
    assert from_positions["document_lengths"] == from_lengths["document_lengths"] == [5, 1, 1, 5, 12]
    assert from_positions["max_length_q"] == from_lengths["max_length_k"] == 12


def test_one_row_may_be_given_as_plain_lengths() -> None:
    assert document_kwargs([3, 4], "cpu")["document_lengths"] == [3, 4]


@pytest.mark.parametrize("rows", [[[3, 4], [3, 3]], [[3, 0]]], ids=["unequal rows", "empty document"])
def test_lengths_that_cannot_be_rows_of_a_batch_are_refused(rows: list[list[int]]) -> None:
    with pytest.raises(ModelError, match="same sum in every row"):
        document_kwargs(rows, "cpu")


def test_forgotten_boundaries_are_an_error_and_not_attention_across_documents() -> None:
    model = build_model("documents")
    with pytest.raises(ModelError, match="document_lengths is missing"):
        model(**pack_inputs([[5, 9, 2]]), use_cache=False)


def test_boundaries_of_another_batch_are_an_error() -> None:
    model = build_model("documents")
    with pytest.raises(ModelError, match="add up to 12 where the batch has 1 rows of 16"):
        model(**pack_inputs([[5, 9, 2]]), use_cache=False, **document_kwargs([12], "cpu"))


def test_generation_with_padding_and_cache_equals_the_stock_attention() -> None:
    ids = torch.randint(4, VOCABULARY, (2, 7))
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    written = []
    for backend in ("documents", "sdpa"):
        model = build_model(backend).eval()
        written.append(
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        )
    assert torch.equal(*written)


def test_every_choice_names_a_back_end_or_says_what_to_use_instead() -> None:
    assert name_attention(Attention.documents, "cuda") == DOCUMENTS
    assert name_attention(Attention.sdpa, "cpu") == "sdpa"
    assert name_attention(Attention.eager, "cuda") == "eager"
    assert name_attention(Attention.flex, "cuda") == "flex_attention"
    for choice in (Attention.flash, Attention.flex, Attention.varlen):
        with pytest.raises(ModelError, match=r"use model\.attention=documents"):
            name_attention(choice, "cpu")


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_without_its_package_is_refused_with_what_to_install() -> None:
    with pytest.raises(ModelError, match="pip install flash-attn"):
        name_attention(Attention.flash, "cuda")


def test_flash_with_its_package_is_called_past_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cqlora.model.attention.is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    assert name_attention(Attention.flash, "cuda") == FLASH
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(ModelError, match=r"capability 8\.0"):
        name_attention(Attention.flash, "cuda")


@pytest.mark.parametrize(
    "capability, torch_version, needs",
    [((9, 0), "2.13.0", ""), ((7, 5), "2.13.0", "a GPU of compute capability 8.0"), ((9, 0), "2.9.1", "torch 2.13")],
)
def test_one_call_needs_a_torch_and_a_gpu_that_have_it(
    capability: tuple[int, int], torch_version: str, needs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr("cqlora.system.machine.version", lambda package: torch_version)
    if needs:
        with pytest.raises(ModelError, match=needs):
            name_attention(Attention.varlen, "cuda")
    else:
        assert name_attention(Attention.varlen, "cuda") == VARLEN

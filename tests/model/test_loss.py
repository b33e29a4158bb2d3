"""The chunked loss against transformers' stock one, in value, in every gradient and in what it allocates."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from cqlora.errors import ModelError
from cqlora.model.loss import OutputHead, label_cross_entropy

VOCABULARY, HIDDEN, RANK = 131, 24, 4
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def score(hidden: Tensor, labels: Tensor, head: OutputHead, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and token losses of `labels` (B, T), -100 where a token is not predicted, and where those are that are."""
    predicted = (labels != -100).logical_and(torch.arange(labels.shape[1]) > 0)
    positions = predicted.flatten().nonzero().squeeze(1)
    return *label_cross_entropy(hidden, positions, labels.flatten()[positions], head, *options), positions


def random_tensor(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).requires_grad_()


def random_labels(rows: int, length: int, share: float) -> Tensor:
    labels = torch.randint(0, VOCABULARY, (rows, length))
    return labels.masked_fill(torch.rand(rows, length) > share, -100)


def stock_loss(hidden: Tensor, weight: Tensor, labels: Tensor, divisor: float, added: Any = 0.0) -> Tensor:
    logits = hidden @ weight.T + added
    return ForCausalLMLoss(logits, labels, weight.shape[0], num_items_in_batch=torch.tensor(divisor))


def gradients_of(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, tensors)
    return [gradient.detach() for gradient in gradients]


def assert_same(ours: list[Tensor], stock: list[Tensor]) -> None:
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 20, 21, 256])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_value_and_gradients_equal_the_stock_loss_at_every_chunk_size(chunk_tokens: int, share: float) -> None:
    hidden, weight = random_tensor(2, 11, HIDDEN), random_tensor(VOCABULARY, HIDDEN)
    labels = random_labels(2, 11, share)
    loss, _, _ = score(hidden, labels, OutputHead(weight), 13.0, chunk_tokens)
    expected = stock_loss(hidden, weight, labels, 13.0)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    assert_same(gradients_of(loss, hidden, weight), gradients_of(expected, hidden, weight))


def test_token_losses_and_positions_are_those_of_the_predicted_tokens() -> None:
    hidden, weight = random_tensor(3, 9, HIDDEN), random_tensor(VOCABULARY, HIDDEN)
    labels = random_labels(3, 9, 0.5)
    loss, token_losses, positions = score(hidden, labels, OutputHead(weight), 2.0, 4)
    logits = (hidden @ weight.T).detach()
    expected = [
        (row * 9 + column, -logits[row, column - 1].log_softmax(0)[labels[row, column]].item())
        for row in range(3)
        for column in range(1, 9)
        if labels[row, column] != -100
    ]
    assert positions.tolist() == [position for position, _ in expected]
    torch.testing.assert_close(token_losses, torch.tensor([value for _, value in expected]), **TOLERANCE)
    torch.testing.assert_close(loss, token_losses.sum() / 2.0)
    assert token_losses.dtype is torch.float32
    assert not token_losses.requires_grad


def test_flat_hidden_states_give_the_same_as_rows_of_them() -> None:
    hidden, head = random_tensor(2, 6, HIDDEN), OutputHead(random_tensor(VOCABULARY, HIDDEN))
    labels = random_labels(2, 6, 0.7)
    rows, _, _ = score(hidden, labels, head, 5.0)
    flat, _, _ = score(hidden.reshape(12, HIDDEN), labels, head, 5.0)
    assert torch.equal(rows, flat)


def test_a_masked_first_label_keeps_a_document_from_predicting_the_next() -> None:
    hidden, weight = random_tensor(1, 10, HIDDEN), random_tensor(VOCABULARY, HIDDEN)
    labels = torch.randint(0, VOCABULARY, (1, 10))
    labels[0, 4] = -100
    packed, _, positions = score(hidden, labels, OutputHead(weight), 8.0)
    documents = [(slice(0, 4), labels[:, :4]), (slice(4, 10), labels[:, 4:])]
    expected = sum(stock_loss(hidden[:, span], weight, part, 8.0) for span, part in documents)
    torch.testing.assert_close(packed, expected, **TOLERANCE)
    assert positions.tolist() == [1, 2, 3, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    "indices",
    [
        [125, 126, 127, 128, 129, 130],
        [0, 1, 2],
        [40, 41, 42, 77],
        [9, 8, 130, 0, 33, 34],
        list(range(VOCABULARY)),
    ],
    ids=["last", "first", "two runs", "unordered", "all"],
)
def test_replaced_rows_equal_a_weight_with_those_rows_written_in(indices: list[int]) -> None:
    hidden, weight = random_tensor(1, 15, HIDDEN), random_tensor(VOCABULARY, HIDDEN)
    rows, labels = random_tensor(len(indices), HIDDEN), random_labels(1, 15, 0.8)
    head = OutputHead(weight, rows=rows, row_indices=torch.tensor(indices))
    loss, _, _ = score(hidden, labels, head, 7.0, 4)
    whole = weight.index_copy(0, torch.tensor(indices), rows)
    expected = stock_loss(hidden, whole, labels, 7.0)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    assert_same(gradients_of(loss, hidden, weight, rows), gradients_of(expected, hidden, weight, rows))


def test_low_rank_gradients_equal_the_stock_loss() -> None:
    hidden, weight = random_tensor(1, 15, HIDDEN), random_tensor(VOCABULARY, HIDDEN)
    a, b = random_tensor(RANK, HIDDEN), random_tensor(VOCABULARY, RANK)
    labels = random_labels(1, 15, 0.8)
    loss, _, _ = score(hidden, labels, OutputHead(weight, lora_a=a, lora_b=b, lora_scale=0.5), 7.0, 4)
    expected = stock_loss(hidden, weight, labels, 7.0, added=0.5 * hidden @ a.T @ b.T)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    assert_same(gradients_of(loss, hidden, weight, a, b), gradients_of(expected, hidden, weight, a, b))


def test_low_rank_dropout_uses_one_mask_for_value_and_gradients() -> None:
    hidden, weight = random_tensor(1, 9, HIDDEN), random_tensor(VOCABULARY, HIDDEN)
    a, b = random_tensor(RANK, HIDDEN), random_tensor(VOCABULARY, RANK)
    labels = torch.randint(0, VOCABULARY, (1, 9))
    head = OutputHead(weight, lora_a=a, lora_b=b, lora_scale=2.0, lora_dropout=0.4)
    torch.manual_seed(5)
    loss, _, _ = score(hidden, labels, head, 8.0)
    torch.manual_seed(5)
    keep = nn.functional.dropout(torch.ones(8, HIDDEN), 0.4)
    dropped = torch.cat([hidden[0, :8] * keep, hidden[0, 8:]])
    expected = stock_loss(hidden, weight, labels, 8.0, added=2.0 * dropped @ a.T @ b.T)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    assert_same(gradients_of(loss, hidden, weight, a, b), gradients_of(expected, hidden, weight, a, b))


@pytest.mark.parametrize("divisor", [0, 4.0, torch.tensor(0)], ids=["zero", "other batches", "zero tensor"])
def test_no_label_at_all_gives_zero_loss_and_zero_gradients(divisor: Tensor | float) -> None:
    hidden, weight = random_tensor(2, 5, HIDDEN), random_tensor(VOCABULARY, HIDDEN)
    labels = torch.full((2, 5), -100)
    labels[:, 0] = 3
    loss, token_losses, positions = score(hidden, labels, OutputHead(weight), divisor)
    assert loss.item() == 0.0
    assert token_losses.shape == positions.shape == (0,)
    assert all(not gradient.any() for gradient in gradients_of(loss, hidden, weight))


def test_a_single_label_equals_the_stock_loss() -> None:
    hidden, weight = random_tensor(1, 5, HIDDEN), random_tensor(VOCABULARY, HIDDEN)
    labels = torch.tensor([[-100, -100, 7, -100, -100]])
    loss, _, _ = score(hidden, labels, OutputHead(weight), 1.0)
    expected = stock_loss(hidden, weight, labels, 1.0)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    assert_same(gradients_of(loss, hidden, weight), gradients_of(expected, hidden, weight))


def test_logits_far_from_zero_stay_finite_and_equal_the_stock_loss() -> None:
    hidden, weight = random_tensor(1, 6, HIDDEN, scale=40.0), random_tensor(VOCABULARY, HIDDEN, scale=40.0)
    labels = torch.randint(0, VOCABULARY, (1, 6))
    loss, _, _ = score(hidden, labels, OutputHead(weight), 5.0)
    expected = stock_loss(hidden, weight, labels, 5.0)
    torch.testing.assert_close(loss, expected, atol=0.0, rtol=1e-5)
    torch.testing.assert_close(gradients_of(loss, hidden), gradients_of(expected, hidden), atol=1e-3, rtol=1e-4)


def test_bfloat16_rounds_the_products_and_nothing_else() -> None:
    hidden = torch.randn(1, 40, HIDDEN).bfloat16().requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN).bfloat16().requires_grad_()
    labels = random_labels(1, 40, 0.8)
    divisor = 31.0
    loss, token_losses, _ = score(hidden, labels, OutputHead(weight), divisor, 8)
    stock = stock_loss(hidden, weight, labels, divisor)
    # The stock loss rounds the logits to bfloat16 in the same product, and its sum in float32.
    torch.testing.assert_close(loss, stock, **TOLERANCE)
    exact_hidden, exact_weight = (t.detach().float().requires_grad_() for t in (hidden, weight))
    exact = stock_loss(exact_hidden, exact_weight, labels, divisor)
    ours, expected = gradients_of(loss, hidden, weight), gradients_of(exact, exact_hidden, exact_weight)
    assert [gradient.dtype for gradient in ours] == [torch.bfloat16, torch.bfloat16]
    assert token_losses.dtype is torch.float32
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine.float() - theirs).norm() < 0.01 * theirs.norm()


def test_gradients_are_scaled_in_float32_however_small_the_loss_scale() -> None:
    hidden = torch.randn(1, 5, HIDDEN).half().requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN).half()
    labels = torch.randint(0, VOCABULARY, (1, 5))
    loss, _, _ = score(hidden, labels, OutputHead(weight), 1e6)
    scaled = gradients_of(loss * 2.0**16, hidden)[0]
    plain, _, _ = score(hidden, labels, OutputHead(weight), 1e6 / 2.0**16)
    torch.testing.assert_close(scaled, gradients_of(plain, hidden)[0], rtol=2e-3, atol=1e-6)


def test_autocast_computes_the_products_in_its_type() -> None:
    hidden, weight = random_tensor(1, 20, HIDDEN), random_tensor(VOCABULARY, HIDDEN)
    labels = random_labels(1, 20, 0.8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _, _ = score(hidden, labels, OutputHead(weight), 16.0)
    rounded, _, _ = score(hidden.detach().bfloat16(), labels, OutputHead(weight.detach().bfloat16()), 16.0)
    torch.testing.assert_close(loss, rounded, **TOLERANCE)
    assert gradients_of(loss, hidden)[0].dtype is torch.float32


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, and every operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
                if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
                    self.products.append(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_grows_beyond_a_chunk_of_logits(dtype: torch.dtype) -> None:
    length, vocabulary, chunk = 64, 1000, 8
    hidden = torch.randn(1, length, HIDDEN, dtype=dtype, requires_grad=True)
    head = OutputHead(torch.randn(vocabulary, HIDDEN, dtype=dtype))
    labels = torch.randint(0, vocabulary, (1, length))
    with LargestTensor() as largest:
        score(hidden, labels, head, 63.0, chunk)[0].backward()
    assert largest.elements == max(chunk * vocabulary, vocabulary * HIDDEN)
    assert largest.elements < length * vocabulary


def test_evaluation_computes_the_same_losses_and_no_gradient() -> None:
    hidden, weight = random_tensor(1, 20, HIDDEN), random_tensor(VOCABULARY, HIDDEN)
    labels = torch.randint(0, VOCABULARY, (1, 20))
    trained, _, _ = score(hidden, labels, OutputHead(weight), 19.0, 5)
    with torch.no_grad(), LargestTensor() as largest:
        evaluated, token_losses, _ = score(hidden, labels, OutputHead(weight), 19.0, 5)
    assert torch.equal(trained, evaluated)
    assert not evaluated.requires_grad
    assert len(token_losses) == 19
    assert {shape[-1] for shape in largest.products} == {VOCABULARY}


def tiny_model(tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


ADAPTERS: dict[str, tuple[bool, dict[str, Any]]] = {
    "frozen head": (False, {}),
    "frozen tied head": (True, {}),
    "lora": (False, {"target_modules": ["q_proj", "lm_head"]}),
    "rslora": (False, {"target_modules": ["q_proj", "lm_head"], "use_rslora": True}),
    "new rows": (
        False,
        {"trainable_token_indices": {"embed_tokens": [128, 129, 130], "lm_head": [128, 129, 130]}},
    ),
    "new rows of a tied model": (True, {"trainable_token_indices": [128, 129, 130]}),
    "whole head": (False, {"modules_to_save": ["lm_head"]}),
}


def adapted_model(name: str) -> nn.Module:
    tied, options = ADAPTERS[name]
    config = LoraConfig(r=RANK, lora_alpha=8, **{"target_modules": ["q_proj"], **options})
    model = get_peft_model(tiny_model(tied), config).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def loss_of_model(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    core = model.get_base_model()
    hidden = core.model(input_ids=ids, use_cache=False).last_hidden_state
    return score(hidden, labels, OutputHead.from_module(core.lm_head), 30.0, 8)[0]


def parameter_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("name", ADAPTERS)
def test_gradients_reach_the_parameters_that_peft_saves(name: str) -> None:
    model = adapted_model(name)
    ids, labels = torch.randint(0, VOCABULARY, (2, 20)), random_labels(2, 20, 0.8)
    stock = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(30.0)).loss
    expected = parameter_gradients(model, stock)
    ours = loss_of_model(model, ids, labels)
    torch.testing.assert_close(ours, stock, **TOLERANCE)
    gradients = parameter_gradients(model, ours)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == expected.keys() == trainable
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[parameter], **TOLERANCE)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_disabled_adapter_leaves_the_base_head(name: str) -> None:
    model = adapted_model(name)
    ids, labels = torch.randint(0, VOCABULARY, (1, 20)), random_labels(1, 20, 0.8)
    with torch.no_grad(), model.disable_adapter():
        stock = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(30.0)).loss
        torch.testing.assert_close(loss_of_model(model, ids, labels), stock, **TOLERANCE)


def test_a_merged_adapter_is_counted_once() -> None:
    model = adapted_model("lora")
    ids, labels = torch.randint(0, VOCABULARY, (1, 20)), random_labels(1, 20, 0.8)
    before = loss_of_model(model, ids, labels)
    model.merge_adapter()
    torch.testing.assert_close(loss_of_model(model, ids, labels), before, **TOLERANCE)


def test_dropout_of_the_head_acts_in_training_only() -> None:
    config = LoraConfig(r=RANK, target_modules=["lm_head"], lora_dropout=0.25)
    model = get_peft_model(tiny_model(tied=False), config)
    head = model.get_base_model().lm_head
    assert OutputHead.from_module(head.train()).lora_dropout == 0.25
    assert OutputHead.from_module(head.eval()).lora_dropout == 0.0


def dora_head() -> nn.Module:
    config = LoraConfig(r=RANK, target_modules=["lm_head"], use_dora=True)
    return get_peft_model(tiny_model(tied=False), config).get_base_model().lm_head


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(HIDDEN, VOCABULARY, bias=True), "bias"),
        (lambda: nn.Identity(), "Identity"),
        (dora_head, "DoRA"),
    ],
    ids=["bias", "not linear", "DoRA"],
)
def test_a_head_that_is_not_a_plain_product_is_refused(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        OutputHead.from_module(build())

"""LLaMA in Meta's own layout, by the papers' definitions: random weights, a forward pass, files of ranks.

RMSNorm (1910.07467), rotary embedding on neighbouring pairs (2104.09864), SwiGLU (2002.05202), grouped-query
attention (2305.13245), Llama 3.1's scaled frequencies (2407.21783).
"""

import base64
import io
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "def main():\n\treturn {k: v for k, v in items}",
    "今天天气不错，我们去公园散步吧。",
    "A tokenizer splits text into pieces; the pieces of the text are numbered.",
] * 8


@dataclass(frozen=True, slots=True)
class Shape:
    """A small model of one of the families."""

    vocab: int
    dim: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int | None = None
    hidden: int = 88
    eps: float = 1e-6
    theta: float = 10000.0
    scaled: bool = False
    tied: bool = False

    def params(self) -> dict[str, object]:
        """What params.json says."""
        found = {
            "dim": self.dim, "n_layers": self.layers, "n_heads": self.heads, "norm_eps": self.eps,
            "multiple_of": 8, "vocab_size": -1, "rope_theta": self.theta,
        }  # fmt: skip
        if self.kv_heads is not None:
            found["n_kv_heads"] = self.kv_heads
        if self.scaled:
            found["use_scaled_rope"] = True
        return found


def random_state(shape: Shape, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """Random weights under Meta's names, whole."""
    generator = torch.Generator().manual_seed(0)
    kv = (shape.kv_heads or shape.heads) * shape.dim // shape.heads

    def draw(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * 0.3).to(dtype)

    state = {"tok_embeddings.weight": draw(shape.vocab, shape.dim), "norm.weight": 1 + draw(shape.dim)}
    if not shape.tied:
        state["output.weight"] = draw(shape.vocab, shape.dim)
    for layer in range(shape.layers):
        sizes = {
            "attention.wq": (shape.dim, shape.dim), "attention.wk": (kv, shape.dim),
            "attention.wv": (kv, shape.dim), "attention.wo": (shape.dim, shape.dim),
            "feed_forward.w1": (shape.hidden, shape.dim),
            "feed_forward.w2": (shape.dim, shape.hidden), "feed_forward.w3": (shape.hidden, shape.dim),
        }  # fmt: skip
        state |= {f"layers.{layer}.{name}.weight": draw(*size) for name, size in sizes.items()}
        state |= {f"layers.{layer}.{name}.weight": 1 + draw(shape.dim) for name in ("attention_norm", "ffn_norm")}
    state["rope.freqs"] = torch.ones(shape.dim // shape.heads // 2)
    return state


def forward(shape: Shape, state: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits, float64 [tokens, vocab], of one sequence."""
    weights = {name: tensor.double() for name, tensor in state.items()}
    head_dim, length = shape.dim // shape.heads, len(ids)
    angles = torch.outer(torch.arange(length).double(), frequencies(shape))
    turns = torch.polar(torch.ones_like(angles), angles)
    mask = torch.full((length, length), -math.inf).triu(1).double()
    x = weights["tok_embeddings.weight"][ids]
    for layer in range(shape.layers):
        own = {name.split(".", 2)[2]: w for name, w in weights.items() if name.startswith(f"layers.{layer}.")}
        h = normalize(x, own["attention_norm.weight"], shape.eps)
        q, k, v = ((h @ own[f"attention.w{which}.weight"].T).view(length, -1, head_dim) for which in ("q", "k", "v"))
        q, k = rotate(q, turns), rotate(k, turns)
        repeat = shape.heads // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(head_dim) + mask
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(length, -1)
        x = x + mixed @ own["attention.wo.weight"].T
        h = normalize(x, own["ffn_norm.weight"], shape.eps)
        gate = F.silu(h @ own["feed_forward.w1.weight"].T) * (h @ own["feed_forward.w3.weight"].T)
        x = x + gate @ own["feed_forward.w2.weight"].T
    x = normalize(x, weights["norm.weight"], shape.eps)
    return x @ weights["tok_embeddings.weight" if shape.tied else "output.weight"].T


def frequencies(shape: Shape) -> torch.Tensor:
    """Rotary frequencies of a head's pairs, scaled as Llama 3.2's where asked for."""
    head_dim = shape.dim // shape.heads
    freqs = shape.theta ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    if not shape.scaled:
        return freqs
    factor, low, high, length = 32.0 if shape.tied else 8.0, 1.0, 4.0, 8192
    scaled = []
    for freq in freqs.tolist():
        wavelength = 2 * math.pi / freq
        if wavelength < length / high:
            scaled.append(freq)
        elif wavelength > length / low:
            scaled.append(freq / factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * freq / factor + smooth * freq)
    return torch.tensor(scaled, dtype=torch.float64)


def rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn each neighbouring pair of a head's dimensions, [tokens, heads, head_dim]."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2)


def normalize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def write_checkpoint(
    folder: Path, shape: Shape, state: dict[str, torch.Tensor], ranks: int = 1, embedding_cut: int = 1
) -> None:
    """Write params.json and the files of `ranks` model-parallel ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(shape.params()))
    for rank in range(ranks):
        part = {}
        for name, tensor in state.items():
            cut = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            cut = embedding_cut if name == "tok_embeddings.weight" else cut
            whole = tensor.dim() < 2
            part[name] = tensor.clone() if whole else tensor.chunk(ranks, cut)[rank].clone()
        torch.save(part, folder / f"consolidated.{rank:02}.pth")


def write_pieces(file: Path, size: int = 420) -> int:
    """Train a SentencePiece model of LLaMA's kind; return how many pieces it has."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, model_type="bpe", vocab_size=size,
        byte_fallback=True,         normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=0.98, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    file.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()


def write_ranks(file: Path, merges: int = 100) -> int:
    """Write a rank file of Llama 3's kind; return how many tokens it has with the 256 control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    letters = {**{chr(b): b for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}}
    others = [b for b in range(256) if b not in letters.values()]
    letters |= {chr(256 + i): b for i, b in enumerate(others)}
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(letters[letter] for letter in piece) for piece, _ in vocab]
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return len(tokens) + 256


def describe(shape: Shape) -> str:
    """A shape in a test's name."""
    return "-".join(f"{key}={value}" for key, value in asdict(shape).items() if value)

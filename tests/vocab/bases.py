"""Small bases of each kind of tokenizer, converted from random weights in Meta's layout."""

from pathlib import Path

import torch

from cqlora.vocab.config import VocabConfig
from cqlora.weights.convert import convert
from tests.weights.meta_reference import Shape, random_state, write_checkpoint, write_pieces, write_ranks

CHINESE = [
    "人工智能技术正在改变世界，机器学习是人工智能的一个分支。",
    "机器学习模型需要大量的数据，数据的质量决定模型的质量。",
    "北京是中国的首都， 上海是中国最大的城市。",
    "他说：“今天天气不错，我们去公园散步吧！”",
] * 6
ENGLISH = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "A tokenizer splits text into pieces; the pieces of the text are numbered from zero.",
]


def write_base(folder: Path, kind: str, tied: bool = False, shard: int = 10**9) -> Path:
    """A converted base, its tokenizer `pieces` (SentencePiece) or `ranks` (byte-level BPE)."""
    raw = folder.parent / f"{folder.name}-raw"
    raw.mkdir(parents=True)
    tokens = (write_pieces if kind == "pieces" else write_ranks)(raw / "tokenizer.model")
    shape = Shape(vocab=tokens, tied=tied, kv_heads=2)
    write_checkpoint(raw, shape, random_state(shape, torch.float16))
    convert(raw, folder, "", "auto", shard, VocabConfig())
    return folder


def write_corpus(file: Path) -> Path:
    """Chinese and English lines to learn from."""
    file.write_text("\n".join(f"{text}{i}" for i, text in enumerate(CHINESE)) + "\n" + "\n".join(ENGLISH))
    return file

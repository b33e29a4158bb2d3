"""Encoders side by side: `tokenizers`, tokie and fastokens on one text, by the processor time of all their threads.

    python benchmarks/encode.py BASE [BASE …] --texts ROWS.jsonl [ROWS.jsonl …] [--rounds 3]

A base is a folder with a tokenizer.json; rows hold `text`. The encoders take turns; the best round of each counts, in
megabytes of UTF-8 a second. Ids that differ from those of `tokenizers` are said.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from cqlora.data.fast_tokenizer import hide_controls, open_fastokens, open_tokie
from cqlora.data.tokenizer import PlainTokenizer


def main() -> None:
    """Read the arguments and print a line for each base, text and encoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", type=Path, nargs="+")
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{'base':30} {'text':20} {'encoder':12} {'MB/s':>8} {'ids':>8}")
    for base in arguments.bases:
        for file in arguments.texts:
            texts = [json.loads(line)["text"] for line in file.open(encoding="utf-8")]
            compare(base, file.stem, texts, arguments.rounds)


def compare(base: Path, name: str, texts: list[str], rounds: int) -> None:
    """Let the encoders take turns at the texts."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    encoders = open_encoders(base)
    seconds: dict[str, list[float]] = {encoder: [] for encoder in encoders}
    ids: dict[str, np.ndarray] = {}
    for _ in range(rounds):
        for encoder, encode in encoders.items():
            started = time.process_time()
            ids[encoder] = encode(texts)
            seconds[encoder].append(time.process_time() - started)
    for encoder, taken in seconds.items():
        same = "equal" if np.array_equal(ids[encoder], ids["tokenizers"]) else "differ"
        print(f"{base.name:30} {name:20} {encoder:12} {megabytes / min(taken):8.1f} {same:>8}")


def open_encoders(base: Path) -> dict[str, Callable[[list[str]], np.ndarray]]:
    """Texts to the ids of all, by each library, from the same description of the vocabulary."""
    stock: Tokenizer = PlainTokenizer(base).text
    description = json.dumps(hide_controls(json.loads(stock.to_str())))

    def encode_stock(texts: list[str]) -> np.ndarray:
        encodings = stock.encode_batch_fast(texts, add_special_tokens=False)
        return np.concatenate([np.array(each.ids, dtype=np.uint32) for each in encodings])

    tokie, fastokens = open_tokie(description), open_fastokens(description)
    return {
        "tokenizers": encode_stock,
        "tokie": lambda texts: tokie(texts)[0],
        "fastokens": lambda texts: fastokens(texts)[0],
    }


if __name__ == "__main__":
    main()

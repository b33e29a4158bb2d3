"""Seconds to the first token of a conversation's later turns, with the prefix cache and without, in turn.

    python benchmarks/prefix_cache.py --base models/smollm2_135m [--adapter FOLDER] [--turns 4] [--history 1000]

One engine of each kind is loaded. In every round both hold the same conversation, greedy, whose messages and
replies come to about `--history` tokens before the last turn; the two change the order from round to round.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from cqlora.data.sources import SAMPLE_DIR
from cqlora.engine import LlamaEngine
from cqlora.inference.requests import Sampling

REPLY_TOKENS = 48
QUESTION_TOKENS = 20
"""Of the last message."""
Turn = tuple[float, int, int, str]
"""Seconds to the first token, tokens of the prompt, how many of them were not read again, and the reply."""


def main() -> None:
    """Alternate both engines and print seconds, tokens read and ratios by turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("models/smollm2_135m"))
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--history", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    options = parser.parse_args()
    folders = (options.adapter, options.base) if options.adapter else (options.base, "")
    engines = {
        gib: LlamaEngine(*folders, use_lora=bool(options.adapter), dtype=options.dtype, prefix_cache_gib=gib)
        for gib in (1.0, 0.0)
    }
    print(engines[1.0].form)
    words = cut_messages(engines[1.0], options.turns, options.history)
    rounds = []
    for number in range(options.rounds + 1):
        order = sorted(engines, reverse=bool(number % 2))
        rounds.append({gib: converse(engines[gib], f"{number}: ", words) for gib in order})
    report(rounds[1:])  # the first warms up


def cut_messages(engine: LlamaEngine, turns: int, history: int) -> list[str]:
    """What the user says: parts of the bundled text, so long that all turns but the last make up the history."""
    lines = (SAMPLE_DIR / "sample_en" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    words = " ".join(json.loads(line)["text"] for line in lines).split(" ")
    messages = []
    for turn in range(1, turns + 1):
        wanted = QUESTION_TOKENS if turn == turns else history / (turns - 1) - REPLY_TOKENS - 8
        count = 1
        while len(engine.encode_text(" ".join(words[:count]))) < wanted:
            count += 1
        messages.append(" ".join(words[:count]))
        words = words[count:]
    return messages


def converse(engine: LlamaEngine, opening: str, words: list[str]) -> list[Turn]:
    """Hold a conversation that no other one begins like."""
    messages: list[dict[str, str]] = []
    turns = []
    for place, text in enumerate(words):
        messages.append({"role": "user", "text": text if place else opening + text})
        batch = engine.open_batch(1)
        started = time.perf_counter()
        reply = batch.admit(engine.encode_messages(messages), Sampling(temperature=0, max_new_tokens=REPLY_TOKENS))
        said = "".join(text for _, text in batch.step())
        seconds = time.perf_counter() - started
        while reply.finish_reason is None:
            said += "".join(text for _, text in batch.step())
        messages.append({"role": "assistant", "text": said})
        turns.append((seconds, reply.prompt_tokens, reply.reused_tokens, said))
    return turns


def report(rounds: list[dict[float, list[Turn]]]) -> None:
    """Medians by turn, and the spread of the ratio between the two of a round."""
    print(f"{'turn':>4} {'tokens':>7} {'reused':>7} {'with s':>8} {'without s':>10} {'ratio':>7} {'rounds':>15}")
    for place in range(len(rounds[0][0.0])):
        kept, read = ([sides[gib][place] for sides in rounds] for gib in (1.0, 0.0))
        ratios = [other[0] / one[0] for one, other in zip(kept, read, strict=True)]
        print(
            f"{place + 1:4} {kept[0][1]:7} {kept[0][2]:7} {statistics.median(one[0] for one in kept):8.3f} "
            f"{statistics.median(other[0] for other in read):10.3f} {statistics.median(ratios):7.2f} "
            f"{min(ratios):7.2f}-{max(ratios):.2f}"
        )
    same = [one[3] == other[3] for sides in rounds for one, other in zip(sides[1.0], sides[0.0], strict=True)]
    print(f"the same reply: {sum(same)} of {len(same)}")


if __name__ == "__main__":
    main()

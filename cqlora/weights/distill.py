"""Rows of new tokens fitted to the base's own reading of a text (Token Distillation, 2505.20133).

The base reads a window of text in its own pieces; with new tokens it reads the same in fewer. The input rows of the
new tokens are fitted so that the states of a lower block agree wherever a new token ends where an old piece does: the
paper matches the last block and one new token at a time, here a window has as many as it has, and blocks above the
third of the depth, in which pieces become words, are left out. The output rows are fitted so that each new token is
likely where the base's last state stands before it. Nothing but new rows moves.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Encoding, Tokenizer
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from cqlora.data.tokenizer import parse_tokenizer
from cqlora.errors import DataError
from cqlora.system.documents import read_text
from cqlora.system.model_config import INPUT, OUTPUT
from cqlora.system.progress import StageDisplay
from cqlora.vocab.config import VocabConfig
from cqlora.vocab.corpus import open_corpus

WINDOW_CHARACTERS = 160
WINDOWS_PER_STEP = 4
MAX_CHARACTERS = 5_000_000
"""Of the corpus, to choose windows from."""
_DEPTH = 3
"""States are matched at one over this of the model's blocks."""
_STEP = 0.03
"""Adam's first step, as a share of the root mean square of the base's own numbers."""


@dataclass(frozen=True, slots=True)
class Window:
    """One text in two segmentations; `ends` are the places in each at which both have read the same characters."""

    old_ids: list[int]
    new_ids: list[int]
    ends: list[tuple[int, int]]


class Reader:
    """The base, read-only: its last states in old pieces, and those of its lower blocks from any input rows."""

    def __init__(self, folder: Path, first_row: int) -> None:
        """Load the base in float32; `first_row` is the first that its own tokenizer does not use."""
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        causal = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        self.body: Any = causal.eval().requires_grad_(False).get_decoder()
        matrices: list[Any] = [causal.get_input_embeddings(), causal.get_output_embeddings()]
        self.old_input, self.old_output = (matrix.weight[:first_row] for matrix in matrices)
        self._blocks: Any = self.body.layers
        self._lower = self._blocks[: max(1, len(self._blocks) // _DEPTH)]

    @torch.no_grad()
    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States behind the lower blocks and behind all, [windows, tokens, width], in the base's own pieces."""
        return self.read_low(self.old_input[ids]), self._run(self.old_input[ids], self._blocks)

    def read_low(self, rows: torch.Tensor) -> torch.Tensor:
        """States behind the lower blocks, scaled by the final norm as the last ones are."""
        return self._run(rows, self._lower)

    def _run(self, rows: torch.Tensor, blocks: nn.ModuleList) -> torch.Tensor:
        self.body.layers = blocks
        states: torch.Tensor = self.body(inputs_embeds=rows, use_cache=False).last_hidden_state
        return states


def distill_rows(
    base: Path, extended: Path, first_row: int, start: dict[str, torch.Tensor], vocab: VocabConfig
) -> dict[str, torch.Tensor]:
    """New rows of each embedding matrix, fitted from `start`, float32 [new tokens, width].

    Args:
        base: folder of the base, which is loaded whole in float32.
        extended: folder of the extended tokenizer.
        first_row: row of the first new token.
        start: what the rows start from, by matrix; without the output matrix, one stands for both.
        vocab: the corpus, `distill_steps` and `seed`.

    Raises:
        DataError: no text of the corpus has a new token.
    """
    tokenizers = [parse_tokenizer(read_text(folder / "tokenizer.json"), folder) for folder in (base, extended)]
    batches = list(draw_batches(tokenizers[0], tokenizers[1], first_row, vocab))
    reader = Reader(base, first_row)
    rows = {name: nn.Parameter(values.clone()) for name, values in start.items()}
    scale = float(reader.old_input.square().mean().sqrt())
    optimizer = torch.optim.Adam(rows.values(), lr=_STEP * scale, betas=(0.9, 0.95))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=len(batches))
    with StageDisplay(is_main=True) as display:
        for done, batch in enumerate(batches):
            display.show("steps of distillation", done, len(batches))
            optimizer.zero_grad()
            measure_loss(reader, rows, batch, first_row).backward()
            optimizer.step()
            decay.step()
    return {name: fitted.detach() for name, fitted in rows.items()}


def measure_loss(
    reader: Reader, rows: dict[str, nn.Parameter], batch: Sequence[Window], first_row: int
) -> torch.Tensor:
    """How far the lower states are apart, and how unlikely the next tokens are to the base's last states.

    Both are means over the places at which the two segmentations meet; the first is in units of the base's own
    lower states, so that the two have one order of magnitude.
    """
    low, last = reader.read(pad([window.old_ids for window in batch]))
    new_ids = pad([window.new_ids for window in batch])
    place = [(number, old, new) for number, window in enumerate(batch) for old, new in window.ends]
    numbers, old, new = torch.tensor(place).unbind(dim=1)
    new_input = torch.cat([reader.old_input, rows[INPUT]])[new_ids]
    wanted = low[numbers, old]
    apart = mse_loss(reader.read_low(new_input)[numbers, new], wanted) / wanted.square().mean()
    outputs = torch.cat([reader.old_output, rows.get(OUTPUT, rows[INPUT])])
    follows = new + 1 < torch.tensor([len(window.new_ids) for window in batch])[numbers]
    numbers, old, new = numbers[follows], old[follows], new[follows]
    return apart + cross_entropy(last[numbers, old] @ outputs.T, new_ids[numbers, new + 1])


def draw_batches(before: Tokenizer, after: Tokenizer, first_row: int, vocab: VocabConfig) -> Iterator[list[Window]]:
    """`distill_steps` batches of windows with new tokens, chosen evenly from the corpus by the seed.

    Raises:
        DataError: there are none.
    """
    generator = random.Random(vocab.seed)
    wanted = vocab.distill_steps * WINDOWS_PER_STEP
    texts = sample_evenly(cut_windows(vocab), wanted * 2, generator)
    windows = [window for text in texts if (window := align(before.encode(text), after.encode(text), first_row))]
    if not windows:
        raise DataError(
            f"vocab.corpus={vocab.corpus} has no text with a new token to fit its row on; use vocab.init=weighted."
        )
    order = list(range(len(windows)))
    generator.shuffle(order)
    for step in range(vocab.distill_steps):
        first = step * WINDOWS_PER_STEP
        yield [windows[order[number % len(order)]] for number in range(first, first + WINDOWS_PER_STEP)]


def cut_windows(vocab: VocabConfig) -> Iterator[str]:
    """The text to learn from, in windows of so many characters."""
    left = MAX_CHARACTERS
    for document in open_corpus(vocab.corpus, vocab.held_out_fraction).split(held_out=False):
        for start in range(0, min(len(document), left), WINDOW_CHARACTERS):
            yield document[start : start + WINDOW_CHARACTERS]
        left -= len(document)
        if left <= 0:
            return


def sample_evenly(texts: Iterator[str], count: int, generator: random.Random) -> list[str]:
    """`count` of the texts, each as likely as any other (Vitter's algorithm R), or all where there are fewer."""
    kept: list[str] = []
    for number, text in enumerate(texts):
        if number < count:
            kept.append(text)
        elif (place := generator.randrange(number + 1)) < count:
            kept[place] = text
    return kept


def align(old: Encoding, new: Encoding, first_row: int) -> Window | None:
    """Where both segmentations of one text have read the same characters.

    None where no new token is in it, or they meet but once, so that no token follows a place where they do.
    """
    # Of tokens that share a character's bytes the last one completes it.
    ends_of_old, ends_of_new = (
        {end: place for place, (_, end) in enumerate(encoding.offsets) if end} for encoding in (old, new)
    )
    meeting = sorted(ends_of_old.keys() & ends_of_new.keys())
    if len(meeting) < 2 or all(token_id < first_row for token_id in new.ids):
        return None
    return Window(old.ids, new.ids, [(ends_of_old[end], ends_of_new[end]) for end in meeting])


def pad(ids: list[list[int]]) -> torch.Tensor:
    """[windows, longest]; what is padded on the right is behind all that attends, and nobody looks at it."""
    return nn.utils.rnn.pad_sequence([torch.tensor(each) for each in ids], batch_first=True)

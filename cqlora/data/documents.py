"""Raw texts to chunks: start token, words, end token, cut into consecutive chunks where they are too many."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from cqlora.data.chunks import EncodedBatch, cut_points
from cqlora.data.text_tokens import TextTokens
from cqlora.data.tokenizer import SpecialTokens


def encode_documents(
    records: Sequence[int], texts: Sequence[str], tokens: TextTokens, special: SpecialTokens, sequence_length: int
) -> EncodedBatch:
    """The chunks of `texts`, which are the records of these numbers, and whose tokens are `tokens`.

    The first token of a chunk is context only; its characters count for nobody.
    """
    sizes = np.diff(tokens.offsets) + 2
    columns: list[tuple[int, int, int, int]] = []
    cut = 0
    for number, (record, text, size) in enumerate(zip(records, texts, sizes.tolist(), strict=True)):
        if size <= sequence_length:
            columns.append((record, size, len(text), len(text.encode())))
            continue
        cut += 1
        cuts = cut_points(size, sequence_length)
        spans = covered_spans(number, text, tokens, cuts)
        columns += [
            (record, end - start, len(covered), len(covered.encode()))
            for (start, end), covered in zip(cuts, spans, strict=True)
        ]
    record_numbers, lengths, characters, utf8_bytes = np.array(columns, dtype=np.uint32).reshape(-1, 4).T.copy()
    ids = surround(tokens, sizes, special)
    labels = np.ones(len(ids), dtype=np.uint8)
    labels[np.cumsum(lengths, dtype=np.int64) - lengths] = 0
    counts = Counter({"documents cut": cut} if cut else {})
    return EncodedBatch(ids, labels, lengths, lengths - 1, characters, utf8_bytes, record_numbers, counts)


def surround(tokens: TextTokens, sizes: np.ndarray, special: SpecialTokens) -> np.ndarray:
    """(tokens,): each text between its start and end token."""
    ends = np.cumsum(sizes)
    ids = np.empty(int(ends[-1]), dtype=tokens.ids.dtype)
    words = np.ones(len(ids), dtype=bool)
    for places, token in ((ends - sizes, special.document_start), (ends - 1, special.document_end)):
        ids[places] = token
        words[places] = False
    ids[words] = tokens.ids
    return ids


def covered_spans(number: int, text: str, tokens: TextTokens, cuts: list[tuple[int, int]]) -> list[str]:
    """The text under the labels of each chunk: from its first token's end to its last one's.

    `cuts` count the start token, which is none of the text's.
    """
    wanted = [token for start, end in cuts for token in (start - 1, end - 2)]
    last = int(tokens.offsets[number + 1] - tokens.offsets[number]) - 1
    inner = [token for token in wanted if 0 <= token < last]
    ends = dict(zip(inner, tokens.character_ends(number, inner), strict=True))
    places = [0 if token < 0 else ends.get(token, len(text)) for token in wanted]
    return [text[start:end] for start, end in zip(places[::2], places[1::2], strict=True)]

"""Conversations to chunks: whole where they fit, else cut where a user speaks, a longer exchange made to fit."""

from collections.abc import Sequence

from cqlora.data.chat import ChatEncoder, EncodedTurn
from cqlora.data.chunks import Chunks, EncodedBatch, cut_points
from cqlora.data.fitting import open_with
from cqlora.data.records import Conversation
from cqlora.data.shorten import shorten_exchange, tokens_of
from cqlora.data.tokenizer import PlainTokenizer


class ConversationEncoder:
    """Encodes conversations for one tokenizer, stage and length.

    Raises:
        ModelError: the tokenizer lacks the template's control tokens.
    """

    def __init__(self, tokenizer: PlainTokenizer, sequence_length: int, all_tokens: bool, system_prompt: str) -> None:
        self.tokenizer = tokenizer
        self.special = tokenizer.special
        self.chat = ChatEncoder(tokenizer)
        self.sequence_length = sequence_length
        self.all_tokens = all_tokens
        self.system_prompt = system_prompt

    def encode(self, records: Sequence[int], conversations: Sequence[Conversation]) -> EncodedBatch:
        """The chunks of conversations, which are the records of these numbers."""
        opened = [open_with(self.system_prompt, each.turns) for each in conversations]
        encoded = iter(self.chat.encode_turns([turn for turns in opened for turn in turns], self.all_tokens))
        chunks = Chunks()
        for record, turns in zip(records, opened, strict=True):
            self.add_conversation(chunks, record, [next(encoded) for _ in turns])
        return chunks.batch(self.tokenizer.dtype)

    def add_conversation(self, chunks: Chunks, record: int, turns: list[EncodedTurn]) -> None:
        """One chunk, or, where it is too long, several that each begin at a user's turn.

        Every chunk opens as the conversation did, with the beginning token and the system message. An
        exchange that is too long by itself is cut like a document where every token is a label, and shortened
        where the replies are: a reply without its question must not be learned.
        """
        start = [self.special.document_start] if self.all_tokens else self.chat.bos
        system = turns[:1] if turns[0].turn.role == "system" else []
        exchanges = split_exchanges(turns[len(system) :])
        opening = len(start) + sum(len(turn.ids) for turn in system)
        groups = group_exchanges(exchanges, self.sequence_length - opening - int(self.all_tokens))
        if len(groups) > 1:
            chunks.counts["conversations cut between turns"] += 1
        for number, group in enumerate(groups, start=1):
            ends = self.all_tokens and number == len(groups)
            self.add_turns(chunks, record, start, system + group, [self.special.document_end] if ends else [])

    def add_turns(
        self, chunks: Chunks, record: int, start: list[int], turns: list[EncodedTurn], end: list[int]
    ) -> None:
        """Turns between a start and an end token, as one chunk where they fit."""
        if not self.all_tokens and len(start) + tokens_of(turns) > self.sequence_length:
            turns = shorten_exchange(self.chat, turns, self.sequence_length - len(start), chunks.counts)
            if not turns:
                return
        ids = [*start, *(token for turn in turns for token in turn.ids), *end]
        all_labels = b"\1" * len(start) + b"".join(turn.labels for turn in turns) + b"\1" * len(end)
        labels = b"\0" + all_labels[1:]
        if len(ids) <= self.sequence_length:
            characters = sum(turn.characters for turn in turns)
            chunks.add(record, ids, labels, characters, sum(turn.utf8_bytes for turn in turns))
            return
        chunks.counts["exchanges cut"] += 1
        counted = [self.chat.count_characters(turn) for turn in turns]
        characters_of = [*[0] * len(start), *(n for turn, _ in counted for n in turn), *[0] * len(end)]
        bytes_of = [*[0] * len(start), *(n for _, turn in counted for n in turn), *[0] * len(end)]
        self.add_cut(chunks, record, ids, labels, characters_of, bytes_of)

    def add_cut(
        self,
        chunks: Chunks,
        record: int,
        ids: list[int],
        labels: bytes,
        characters: list[int],
        utf8_bytes: list[int],
    ) -> None:
        """Consecutive chunks of turns too long for one; the first token of each is context only."""
        for start, end in cut_points(len(ids), self.sequence_length):
            chunk_labels = b"\0" + labels[start + 1 : end]
            covered = [index for index, label in enumerate(chunk_labels, start) if label]
            chunks.add(
                record,
                ids[start:end],
                chunk_labels,
                sum(characters[index] for index in covered),
                sum(utf8_bytes[index] for index in covered),
            )


def split_exchanges(turns: list[EncodedTurn]) -> list[list[EncodedTurn]]:
    """Turns grouped so that each group but the first begins where a user speaks after an assistant."""
    groups: list[list[EncodedTurn]] = []
    for turn in turns:
        if not groups or (turn.turn.role != "assistant" and groups[-1][-1].turn.role == "assistant"):
            groups.append([])
        groups[-1].append(turn)
    return groups


def group_exchanges(exchanges: list[list[EncodedTurn]], room: int) -> list[list[EncodedTurn]]:
    """Consecutive exchanges joined while they fit into `room` tokens; a longer one stands alone."""
    groups: list[list[EncodedTurn]] = []
    left = 0
    for exchange in exchanges:
        tokens = sum(len(turn.ids) for turn in exchange)
        if not groups or tokens > left:
            groups.append([])
            left = room
        groups[-1] += exchange
        left -= tokens
    return groups

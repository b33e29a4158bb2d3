"""The engine as a language model of lm-evaluation-harness (`lm-eval`), encoding text as its own HFLM does."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from transformers import AutoTokenizer

from cqlora.errors import ModelError
from cqlora.evaluation.text import batch_by_tokens
from cqlora.inference.decoder import Query

if TYPE_CHECKING:
    from cqlora.engine import LlamaEngine

Continuation = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation as texts, then the tokens of each."""


class EngineLM(TemplateLM):  # type: ignore[misc]
    """Log-likelihoods by `LlamaEngine`; continuations of one context that differ in their last token share a pass."""

    def __init__(self, engine: "LlamaEngine", folder: Path, batch_tokens: int) -> None:
        super().__init__()
        self._engine = engine
        self._batch_tokens = batch_tokens
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._prefix = str(self.tokenizer.decode(self.prefix_token_id))

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's eos."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context becomes."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """The ids of a text, with what the tokenizer itself puts before it unless that is there already."""
        if add_special_tokens is None and string.startswith(self._prefix):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def _loglikelihood_tokens(self, requests: list[Continuation], **unused: Any) -> list[tuple[float, bool]]:
        by_input: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            # As HFLM: what does not fit is cut from the left.
            read = tuple((context + continuation)[-(self._engine.max_length + 1) :][:-1])
            by_input.setdefault((*read, -len(continuation)), []).append(number)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        # The longest first, so that memory runs out at once or never.
        groups = sorted(by_input.items(), key=lambda each: -len(each[0]))
        for batch in batch_by_tokens(groups, lambda each: len(each[0]), self._batch_tokens):
            queries = [Query(read[:-1], [requests[number][2] for number in numbers]) for read, numbers in batch]
            for (_, numbers), scores in zip(batch, self._engine.score(queries), strict=True):
                for number, found in zip(numbers, scores.log_probabilities, strict=True):
                    greedy = np.array_equal(scores.likeliest, requests[number][2])
                    answers[number] = float(found.sum()), greedy
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Not asked for: `cqlora evaluate` scores held-out text itself."""
        raise ModelError("a task scores whole texts; evaluate does so with files= or data=, so leave the task out.")

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Not offered."""
        raise ModelError("a task asks for generated answers, and evaluate runs multiple choice; leave the task out.")

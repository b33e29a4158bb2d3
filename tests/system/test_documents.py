"""What others wrote is shown without moving the cursor."""

from io import StringIO

import pytest
from rich.console import Console

from cqlora.evaluation.table import show_record
from cqlora.prepare import show_example
from cqlora.system.documents import escape_controls

HOSTILE = "长江\x1b]0;x\x07发源于\x1b[31m\u202e青藏　高原\r\x9b2J"
HARMLESS = "长江\\x1b]0;x\\x07发源于\\x1b[31m\\u202e青藏　高原\\r\\x9b2J"


def test_control_characters_are_written_out_and_spaces_stay():
    assert escape_controls(HOSTILE) == HARMLESS
    assert escape_controls("a\tb\nc　d 🙂") == "a\tb\nc　d 🙂"


@pytest.mark.parametrize("what", ["an example of a cache", "the first prompt of a task"])
def test_text_of_other_peoples_files_reaches_the_terminal_without_its_controls(what):
    console = Console(file=StringIO(), width=200, force_terminal=False)
    if what == "an example of a cache":
        show_example(console, "wiki", 9, [(False, HOSTILE), (True, HOSTILE * 900)])
    else:
        score = {"task": "ceval", "shots": 5, "first_prompt": HOSTILE, "micro": 1.0, "micro_error": None, "macro": 1.0,
                 "macro_error": None, "subjects": {}}  # fmt: skip
        show_record(console, {"models": [{"name": "a", "form": "f", "choice": [score]}]})
    written = console.file.getvalue()
    assert HARMLESS in written and not set(written) & set("\x1b\x07\u202e\r\x9b")

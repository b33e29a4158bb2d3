"""Events of a stream."""

import json
import sys

from cqlora.serve.responses import event


def test_whatever_a_reply_says_an_event_is_one_line_that_gives_it_back():
    text = "".join(map(chr, range(0xD800))) + "".join(map(chr, range(0xE000, sys.maxunicode + 1, 97)))
    line, empty = event({"text": text}).splitlines()
    assert json.loads(line.removeprefix("data: ")) == {"text": text} and empty == ""

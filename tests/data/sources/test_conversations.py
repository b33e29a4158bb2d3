"""Every conversational source: its formats, its mendings and their counts."""

import json
from collections import Counter
from typing import Any

import pytest

from cqlora.config.choices import OasstPaths, SourceKind
from cqlora.config.schema import CleanConfig, SourceConfig
from cqlora.data.clean import Cleaner
from cqlora.data.records import (
    Conversation,
    Document,
    RawRow,
    Record,
    RowDropped,
    RowError,
    Turn,
    dump_record,
    load_record,
)
from cqlora.data.sources import PARSERS
from cqlora.data.sources.oasst1 import group_messages

U, A, S = "user", "assistant", "system"


def parse(kind: SourceKind, row: Any, **settings: Any) -> tuple[list[Record], Counter[str]]:
    counts: Counter[str] = Counter()
    return list(PARSERS[kind](row, SourceConfig(kind=kind, **settings), counts)), counts


def talk(*turns: tuple[str, str]) -> Conversation:
    return Conversation([Turn(role, text) for role, text in turns])


def test_dialog_reads_text_or_content_and_one_message_is_raw_text():
    row = [{"role": "user", "text": "q "}, {"role": "assistant", "content": "a"}]
    assert parse(SourceKind.dialog, row)[0] == [talk((U, "q"), (A, "a"))]
    assert parse(SourceKind.dialog, [{"role": "user", "text": "raw"}])[0] == [Document("raw")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"role": "user"}, "row is an object, not a list"),
        ([], "empty conversation"),
        ([{"role": "user", "text": "a"}, {"role": "narrator", "text": "b"}], "unknown role narrator"),
        ([{"role": "user", "text": "a"}, {"role": "assistant"}], "missing field text or content"),
        ([{"role": "user", "text": "a"}, {"role": "user", "text": "b"}], "no assistant turn"),
        ([{"role": "user", "text": "a"}, {"role": "assistant", "text": " "}], "field text is empty"),
        (
            [{"role": "user", "text": 3}, {"role": "assistant", "text": "b"}],
            "field text is a number, not text",
        ),
    ],
)
def test_dialog_rejects_with_a_reason(row, reason):
    with pytest.raises(RowError, match=f"^{reason}$"):
        parse(SourceKind.dialog, row)


def test_messages_join_text_parts_and_cut_what_has_no_answer():
    parts = [{"type": "text", "text": "look"}, {"type": "text", "text": "here"}]
    row = {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "thanks"},
        ]
    }
    records, counts = parse(SourceKind.messages, row)
    assert records == [talk((S, "s"), (U, "look\nhere"), (A, "a"))]
    assert counts == {"trailing turns without an answer cut": 1}
    with pytest.raises(RowError, match="image_url"):
        parse(SourceKind.messages, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})


def test_sharegpt_is_mended_by_counted_rules():
    def message(who: str, value: str) -> dict[str, str]:
        return {"from": who, "value": value}

    row = {
        "conversations": [
            message("system", "s"),
            message("gpt", "before any question"),
            message("human", "1 &lt; 2?"),
            message("user", "really?"),
            message("chatgpt", "yes"),
            message("bard", " "),
            message("assistant", "sure"),
            message("human", "thanks"),
        ]
    }
    records, counts = parse(SourceKind.sharegpt, row)
    assert records == [talk((S, "s"), (U, "1 < 2?\n\nreally?"), (A, "yes\n\nsure"))]
    assert counts == {
        "empty turns cut": 1,
        "html unescaped": 1,
        "leading answers without a question cut": 1,
        "repeated roles joined": 1,
        "trailing turns without an answer cut": 1,
    }


BELLE = {
    "0.5M and 1M": ({"input": "Human: 你好\n\nAssistant:\n", "target": "您好"}, [(U, "你好"), (A, "您好")]),
    "plain input and target": ({"input": "1+1?", "target": "2"}, [(U, "1+1?"), (A, "2")]),
    "2M": ({"instruction": "翻译", "input": "水", "output": "water"}, [(U, "翻译\n水"), (A, "water")]),
    "school math": ({"instruction": "1+1?", "input": "", "output": "\n2"}, [(U, "1+1?"), (A, "2")]),
    "3.5M": (
        {"id": "1", "conversations": [{"from": "human", "value": "q"}, {"from": "assistant", "value": "a"}]},
        [(U, "q"), (A, "a")],
    ),
    "multiturn 0.8M": (
        {
            "instruction": "Human:写诗\nAssistant:床前明月光\n疑是地上霜\nHuman:继续\nAssistant:",
            "input": "",
            "output": "举头望明月",
        },
        [(U, "写诗"), (A, "床前明月光\n疑是地上霜"), (U, "继续"), (A, "举头望明月")],
    ),
    "generated chat 0.4M": (
        {
            "instruction": "于以下角色信息完成一段对话\nAlice是律师。Bob是居民。\n",
            "input": "",
            "output": "\nAlice: 你好\nBob: 你好，Alice\n再见\nAlice：回头见\nBob：好\n",
        },
        [
            (S, "于以下角色信息完成一段对话\nAlice是律师。Bob是居民。"),
            (U, "你好"),
            (A, "你好，Alice\n再见"),
            (U, "回头见"),
            (A, "好"),
        ],
    ),
}


@pytest.mark.parametrize("name", BELLE)
def test_belle_formats_are_recognised_by_their_shape(name: str):
    row, turns = BELLE[name]
    assert parse(SourceKind.belle, row)[0] == [talk(*turns)]


def test_belle_seed_tasks_give_a_conversation_for_each_instance():
    row = {
        "instruction": "写诗",
        "instances": [{"input": "夏", "output": "一"}, {"input": "", "output": "二"}],
    }
    assert parse(SourceKind.belle, row)[0] == [talk((U, "写诗\n夏"), (A, "一")), talk((U, "写诗"), (A, "二"))]


def test_belle_play_of_three_stays_an_answer():
    row = {"instruction": "根据角色信息写对话", "output": "甲：一\n乙：二\n丙：三"}
    records, counts = parse(SourceKind.belle, row)
    assert records == [talk((U, "根据角色信息写对话"), (A, "甲：一\n乙：二\n丙：三"))]
    assert counts["plays not of two characters kept as answers"] == 1


def message(name: str, parent: str | None, role: str, **more: Any) -> dict[str, Any]:
    return {
        "message_id": name,
        "parent_id": parent,
        "message_tree_id": "t",
        "role": role,
        "text": name,
    } | more


MESSAGES = [
    message("p", None, "prompter", lang="en"),
    message("a1", "p", "assistant", rank=1, lang="en"),
    message("a0", "p", "assistant", rank=0, lang="en"),
    message("a2", "p", "assistant", rank=None, lang="zh"),
    message("gone", "p", "assistant", rank=None, deleted=True, lang="en"),
    message("bad", "p", "assistant", review_result=False, lang="en"),
    message("q0", "a0", "prompter", rank=None, lang="en"),
    message("b0", "q0", "assistant", rank=0, lang="en"),
    message("q1", "b0", "prompter", lang="en"),
]


def nest(messages: list[dict[str, Any]], parent: str | None = None) -> list[dict[str, Any]]:
    return [{**m, "replies": nest(messages, m["message_id"])} for m in messages if m["parent_id"] == parent]


BEST = talk((U, "p"), (A, "a0"), (U, "q0"), (A, "b0"))


@pytest.mark.parametrize("row", [{"prompt": nest(MESSAGES)[0], "message_tree_id": "t"}, MESSAGES])
def test_oasst1_trees_and_message_rows_give_the_same_conversations(row: Any):
    records, counts = parse(SourceKind.oasst1, row)
    assert records == [BEST]
    assert counts["replies deleted left out"] == 1
    assert counts["replies that failed review left out"] == 1
    assert counts["trailing turns without an answer cut"] == 1

    everything = parse(SourceKind.oasst1, row, oasst_paths=OasstPaths.all)[0]
    assert everything == [talk((U, "p"), (A, "a1")), BEST, talk((U, "p"), (A, "a2"))]

    drawn = parse(SourceKind.oasst1, row, oasst_paths=OasstPaths.sampled)[0]
    assert len(drawn) == 1
    assert drawn == parse(SourceKind.oasst1, row, oasst_paths=OasstPaths.sampled)[0]
    assert drawn[0] in everything

    assert talk((U, "p"), (A, "a2")) not in parse(SourceKind.oasst1, row, oasst_paths=OasstPaths.all, langs=["en"])[0]
    with pytest.raises(RowDropped, match=r"^prompt in another language$"):
        parse(SourceKind.oasst1, row, langs=["zh"])


def test_oasst1_message_rows_are_grouped_by_tree_and_broken_rows_pass():
    rows = [RawRow("f", n, m, None) for n, m in enumerate(MESSAGES[:2])]
    other = RawRow("f", 8, message("x", None, "prompter") | {"message_tree_id": "u"}, None)
    broken = RawRow("f", 9, b'{"message_id": ', None)
    grouped = list(group_messages(iter([*rows, broken, other])))
    assert [len(row.body) if isinstance(row.body, list) else "broken" for row in grouped] == ["broken", 2, 1]


def test_oasst1_prompt_without_an_answer_is_dropped():
    with pytest.raises(RowDropped, match=r"^prompt without an answer$"):
        parse(SourceKind.oasst1, [message("p", None, "prompter")])


def test_oasst1_messages_of_other_prompts_and_repeated_ids_are_counted():
    rows = [*MESSAGES, message("other", None, "prompter"), message("a1", "p", "assistant")]
    counts = parse(SourceKind.oasst1, rows)[1]
    assert counts["further prompts of a tree left out"] == 1
    assert counts["messages of a repeated id left out"] == 1


def test_oasst1_message_rows_without_ids_of_trees_begin_a_tree_at_each_prompt():
    trees = [(message(f"p{n}", None, "prompter"), message(f"a{n}", f"p{n}", "assistant")) for n in range(3)]
    rows = [{**each, "message_tree_id": None} for tree in trees for each in tree]
    grouped = list(group_messages(iter([RawRow("f", n, row, None) for n, row in enumerate(rows)])))
    assert [(row.line, len(row.body)) for row in grouped] == [(0, 2), (2, 2), (4, 2)]


def test_wiki_puts_the_title_before_the_text_once():
    row = {"id": "1", "url": "", "title": "长江", "text": "长江很长。"}
    assert parse(SourceKind.wiki, row)[0] == [Document("长江\n\n长江很长。")]
    assert parse(SourceKind.wiki, {"title": "长江", "text": "长江\n\n很长。"})[0] == [Document("长江\n\n很长。")]
    with pytest.raises(RowError, match="missing field text"):
        parse(SourceKind.wiki, {"title": "长江"})


def test_system_and_history_of_instruction_rows_are_used():
    row = {
        "instruction": "q2",
        "input": "i",
        "output": "a2",
        "system": "s",
        "history": [["q0", "a0"], ["q1", "a1"]],
    }
    expected = talk((S, "s"), (U, "q0"), (A, "a0"), (U, "q1"), (A, "a1"), (U, "q2\ni"), (A, "a2"))
    assert parse(SourceKind.belle, row) == ([expected], Counter())
    assert parse(SourceKind.belle, {"instruction": "q", "output": "a", "system": "", "history": None})[0] == [
        talk((U, "q"), (A, "a"))
    ]
    for history in ([["q"]], "q", [["q", 5]], {"q": "a"}):
        with pytest.raises(RowError, match="field history"):
            parse(SourceKind.belle, {"instruction": "q", "output": "a", "history": history})


@pytest.mark.parametrize("kind", [SourceKind.sharegpt, SourceKind.messages, SourceKind.belle])
def test_a_system_field_beside_the_messages_is_their_system_message(kind: SourceKind):
    name = "messages" if kind is SourceKind.messages else "conversations"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    expected = talk((S, "s"), (U, "q"), (A, "a"))
    assert parse(kind, {name: turns, "system": " s "}) == ([expected], Counter())
    own = [{"role": "system", "content": "s"}, *turns]
    assert parse(kind, {name: own, "system": "s"}) == ([expected], Counter())
    assert parse(kind, {name: own, "system": "t"}) == ([expected], Counter({"field not used: system": 1}))
    with pytest.raises(RowError, match="field system is a number"):
        parse(kind, {name: turns, "system": 5})


def test_fields_that_nothing_is_made_of_are_counted_where_they_hold_something():
    row = {
        "id": 7,
        "tools": "",
        "lang": None,
        "messages": [
            {"role": "user", "content": "q", "name": "Ann"},
            {"role": "assistant", "content": "a", "name": "Bob", "tool_calls": []},
        ],
    }
    assert parse(SourceKind.messages, row)[1] == {"field not used: id": 1, "field not used: message name": 1}
    assert parse(SourceKind.wiki, {"text": "t", "url": "u"})[1] == {"field not used: url": 1}
    assert parse(SourceKind.belle, {"input": "q", "target": "a", "topic": "t"})[1] == {"field not used: topic": 1}


def test_alpaca_keeps_every_word_and_its_order():
    row = {
        "instruction": "翻译",
        "input": "Human: hello",
        "output": "你好",
        "system": "s",
        "history": [["早", "早上好"]],
        "id": 7,
    }
    records, counts = parse(SourceKind.alpaca, row)
    assert records == [talk((S, "s"), (U, "早"), (A, "早上好"), (U, "翻译\nHuman: hello"), (A, "你好"))]
    assert counts == {"field not used: id": 1}
    for nothing in ([], "", None):
        empty = {"instruction": "q", "input": "", "output": "a", "system": None, "history": nothing}
        assert parse(SourceKind.alpaca, empty)[0] == [talk((U, "q"), (A, "a"))]


def said(who: str, value: str) -> dict[str, str]:
    return {"role": who, "content": value}


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "q", "chosen": "good"}, [(U, "q"), (A, "good")]),
        ({"question": "q", "system": "s", "chosen": "good"}, [(S, "s"), (U, "q"), (A, "good")]),
        ({"prompt": [said(U, "q")], "chosen": [said(A, "good")]}, [(U, "q"), (A, "good")]),
        ({"prompt": "q", "chosen": [said(U, "q"), said(A, "good")]}, [(U, "q"), (A, "good")]),
        ({"chosen": [said(S, "s"), said(U, "q"), said(A, "good")]}, [(S, "s"), (U, "q"), (A, "good")]),
        (
            {"instruction": "q", "input": "i", "history": [["b", "c"]], "chosen": "good"},
            [(U, "b"), (A, "c"), (U, "q\ni"), (A, "good")],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"}},
            [(U, "q"), (A, "good")],
        ),
    ],
)
def test_of_a_preference_pair_the_chosen_reply_trains_and_the_count_says_so(row: Any, turns: list[tuple[str, str]]):
    records, counts = parse(SourceKind.preference, row | {"rejected": "bad"})
    assert records == [talk(*turns)]
    assert counts == {"pairs of which the chosen reply alone trains": 1}


@pytest.mark.parametrize("system", ["s", "other"])
@pytest.mark.parametrize("repeats", [False, True], ids=["reply alone", "with the prompt"])
def test_the_prompts_system_message_stands_and_another_of_the_reply_is_counted(system: str, repeats: bool):
    chosen = [said(S, system), *([said(U, "q")] if repeats else []), said(A, "good")]
    records, counts = parse(SourceKind.preference, {"prompt": [said(S, "s"), said(U, "q")], "chosen": chosen,
                                                    "rejected": "bad"})  # fmt: skip
    assert records == [talk((S, "s"), (U, "q"), (A, "good"))]
    assert counts["field not used: chosen system"] == (system == "other")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "good"}, "missing field rejected"),
        ({"prompt": "q", "rejected": "bad"}, "missing field chosen"),
        ({"chosen": "good", "rejected": "bad"}, "missing field prompt"),
        (
            {"prompt": "q", "input": "x", "chosen": "good", "rejected": "bad"},
            "the prompt cannot be in the fields prompt and input at once",
        ),
        (
            {"prompt": "q", "instruction": "i", "chosen": "good", "rejected": "bad"},
            "the prompt cannot be in the fields prompt and instruction at once",
        ),
        (
            {"prompt": [said(U, "q"), said(A, "a")], "chosen": "good", "rejected": "bad"},
            "the prompt does not end with a question",
        ),
        (
            {"prompt": [said(U, "q"), said(A, "a"), said(U, " ")], "chosen": "good", "rejected": "bad"},
            "the prompt does not end with a question",
        ),
        (
            {"prompt": "q", "chosen": [said(U, "another"), said(A, "good")], "rejected": "bad"},
            "field chosen neither is a reply nor begins with the prompt",
        ),
        (
            {
                "prompt": [said(U, "q"), said(A, "a"), said(U, "r")],
                "chosen": [said(U, "r"), said(A, "good")],
                "rejected": "bad",
            },
            "field chosen neither is a reply nor begins with the prompt",
        ),
        (
            {
                "prompt": [said(U, "q"), said(A, "a"), said(U, "r")],
                "chosen": [said(A, "a"), said(U, "r"), said(A, "g")],
                "rejected": "bad",
            },
            "field chosen neither is a reply nor begins with the prompt",
        ),
        ({"prompt": "q", "chosen": [], "rejected": "bad"}, "field chosen is empty"),
        (["q"], "row is a list, not an object"),
    ],
)
def test_half_a_pair_is_rejected_with_a_reason(row: Any, reason: str):
    with pytest.raises(RowError, match=f"^{reason}$"):
        parse(SourceKind.preference, row)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        (SourceKind.dialog, [said(U, "q"), said(A, "a")]),
        (SourceKind.messages, {"messages": [said(U, "q"), said(A, "a")]}),
        (SourceKind.sharegpt, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        (SourceKind.alpaca, {"instruction": "q", "input": "", "output": "a"}),
        (SourceKind.belle, {"input": "q", "target": "a"}),
        (SourceKind.preference, {"prompt": "q", "chosen": "a", "rejected": "b"}),
        (SourceKind.wiki, {"title": "t", "text": "x"}),
        (SourceKind.text, {"text": "x", "meta": 1}),
    ],
)
def test_auto_reads_each_row_as_its_own_kind_does_and_counts_what_it_took_it_for(kind: SourceKind, row: Any):
    records, counts = parse(SourceKind.auto, row)
    by_name, named_counts = parse(kind, row)
    assert records == by_name
    assert counts == named_counts + Counter({f"rows taken for {kind.value}": 1})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"message_id": "1", "text": "x"}, "set kind=oasst1"),
        ({"a": 1}, "set kind= by name"),
        (3, "row is a number, not an object"),
    ],
)
def test_auto_rejects_what_it_does_not_know(row: Any, reason: str):
    with pytest.raises(RowError, match=reason):
        parse(SourceKind.auto, row)


CALL = {"name": "get_weather", "arguments": {"city": "北京"}}
SCHEMA = {"name": "get_weather", "parameters": {"type": "object"}}
USED = Conversation(
    [Turn(U, "天气?"), Turn(A, "", json.dumps([CALL], ensure_ascii=False)), Turn("tool", "晴"), Turn(A, "晴天。")],
    tools=json.dumps([{"type": "function", "function": SCHEMA}]),
)
OPENAI_CALL = {"id": "x", "type": "function", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}


@pytest.mark.parametrize("tools", [[SCHEMA], json.dumps([SCHEMA]), [{"type": "function", "function": SCHEMA}]])
@pytest.mark.parametrize("call", [CALL, [CALL], OPENAI_CALL])
def test_calls_of_tools_in_sharegpt_rows(tools, call):
    turns = [("human", "天气?"), ("function_call", json.dumps(call)), ("observation", "晴"), ("gpt", "晴天。")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns], "tools": tools}
    assert parse(SourceKind.sharegpt, row) == ([USED], Counter())


@pytest.mark.parametrize("calling", [{"tool_calls": [OPENAI_CALL]}, {"function_call": OPENAI_CALL["function"]}])
@pytest.mark.parametrize("words", [{"content": None}, {"content": ""}, {}])
def test_calls_of_tools_in_openai_messages(calling, words):
    messages = [{"role": U, "content": "天气?"}, {"role": A, **words, **calling},
                {"role": "tool", "tool_call_id": "x", "content": "晴"}, {"role": A, "content": "晴天。"}]  # fmt: skip
    assert parse(SourceKind.messages, {"messages": messages, "tools": [SCHEMA]}) == ([USED], Counter())


def test_words_before_a_call_belong_to_it_and_results_in_a_row_stay_apart():
    turns = [("human", "q"), ("gpt", "I look."), ("function_call", json.dumps(CALL)), ("observation", "1"),
             ("observation", "2"), ("gpt", "a")]  # fmt: skip
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    ((found,), counts) = parse(SourceKind.sharegpt, row)
    said = [(turn.role, turn.text) for turn in found.turns]
    assert said == [(U, "q"), (A, "I look."), ("tool", "1"), ("tool", "2"), (A, "a")]
    assert found.turns[1].calls and counts == {"repeated roles joined": 1}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"tools": "[{"}, "field tools is no JSON"),
        ({"tools": {"name": "x"}}, "field tools is an object, not a list"),
        ({"tools": [{"parameters": {}}]}, "field tools holds a tool without a name"),
        ({"call": "get_weather()"}, "tool call is no JSON"),
        ({"call": "{}"}, "tool call without a name"),
        ({"call": "3"}, "tool call is a number, not an object"),
    ],
)
def test_tools_and_calls_that_are_none_reject_the_row(changed, reason):
    call = changed.get("call", json.dumps(CALL))
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": call}]
    with pytest.raises(RowError, match=f"^{reason}$"):
        parse(SourceKind.sharegpt, {"conversations": turns, "tools": changed.get("tools", [SCHEMA])})


def test_calls_are_cleaned_text_by_text_and_survive_the_spool():
    secret = Turn(A, "", json.dumps([{"name": "mail", "arguments": {"to": ["Ａ@b.com"], "n": 13800138000}}]))
    cleaner = Cleaner(CleanConfig(mask_personal_data=True), "")
    cleaned = cleaner.clean(Conversation([secret], tools=USED.tools), Counter())
    assert json.loads(cleaned.turns[0].calls) == [{"name": "mail", "arguments": {"to": ["<EMAIL>"], "n": 13800138000}}]
    for record in (cleaned, USED, talk((U, "q"), (A, "a"))):
        assert load_record(dump_record(record)) == record
    assert dump_record(talk((U, "q"), (A, "a"))) == b'C[["user", "q"], ["assistant", "a"]]'

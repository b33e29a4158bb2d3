"""Tools and calls of them, as people write them down, in the one form that chat templates read."""

import json
from typing import Any

from cqlora.data.records import RowError
from cqlora.data.sources.fields import kind_of


def read_calls(value: Any) -> str:
    """Calls as a JSON list of `{name, arguments}`; empty for none.

    Args:
        value: a call or a list of them, or JSON of that; each bare, or under `function` as OpenAI has it.

    Raises:
        RowError: it is something else.
    """
    value = decode(value, "tool call")
    calls = [value] if isinstance(value, dict) else value or []
    if not isinstance(calls, list):
        raise RowError(f"tool call is {kind_of(calls)}, not an object")
    return dump([read_call(call) for call in calls])


def read_call(call: Any) -> dict[str, Any]:
    """The name and the arguments of one call; arguments that are JSON in a text are what they say.

    Raises:
        RowError: it has no name.
    """
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError("tool call without a name")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            decoded = json.loads(arguments)
        except ValueError:
            decoded = None
        arguments = decoded if isinstance(decoded, dict) else arguments
    return {"name": function["name"], "arguments": arguments}


def read_tools(value: Any) -> str:
    """Tools as a JSON list of `{type, function}`; empty for none.

    Args:
        value: a list of schemas, or JSON of one; each bare, or under `function` as OpenAI has it.

    Raises:
        RowError: it is something else.
    """
    tools = decode(value, "field tools") or []
    if not isinstance(tools, list):
        raise RowError(f"field tools is {kind_of(tools)}, not a list")
    read = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RowError("field tools holds a tool without a name")
        read.append({"type": "function", "function": function})
    return dump(read)


def decode(value: Any, what: str) -> Any:
    """A value, or what the JSON in a text says.

    Raises:
        RowError: the text is no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise RowError(f"{what} is no JSON") from None


def dump(values: list[dict[str, Any]]) -> str:
    """JSON as records hold it."""
    return json.dumps(values, ensure_ascii=False) if values else ""

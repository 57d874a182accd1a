"""The turns of a chat, in the form that transformers documents: what a turn says, what it calls, and whether it is predicted.

>>> message, mark = take_mark({"role": "assistant", "content": "Hi", "weight": 0}, "row 1, message 2")
>>> message, mark
({'role': 'assistant', 'content': 'Hi'}, False)
>>> with_calls({"role": "assistant", "function_call": {"name": "find", "arguments": "{}"}}, "row 1, message 2")
{'role': 'assistant', 'tool_calls': [{'type': 'function', 'function': {'name': 'find', 'arguments': '{}'}}]}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bora_pyro.data.chat_template import ASSISTANT
from bora_pyro.data.forms.values import json_cell, json_text, parse_json
from bora_pyro.errors import InputError, shown

Message = dict[str, Any]
#: Keys that say whether a turn is predicted: 1 or true, or not: 0 or false.
MARKS = ("weight", "loss_weight", "train", "loss")
#: Types of the parts of a content that are texts.
TEXT_PARTS = ("text", "input_text", "output_text")
#: Types of parts, of which only texts are read.
PARTS = (*TEXT_PARTS, "image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file", "refusal")
#: Keys in which a turn of the assistant can say something, besides its content and its tool calls.
REASONING = ("reasoning_content", "reasoning", "thinking")
#: The separator between joined parts of a content, as vLLM joins them for templates that take only texts.
PART_SEPARATOR = "\n"


def take_mark(message: Message, where: str) -> tuple[Message, bool | None]:
    """A message without its marks, and whether it is to be predicted; None if there is no mark.

    Raises:
        InputError: a mark is not 0 or 1, or two marks disagree.
    """
    found = {key: message[key] for key in MARKS if key in message}
    for key, value in found.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise InputError(
                f"{where} has {key} {shown(value)}; a turn is predicted (1 or true) or only read (0 or false), give one of these"
            )
    if len({bool(value) for value in found.values()}) > 1:
        raise InputError(f"{where} has {' and '.join(f'{key} {value}' for key, value in found.items())}; give one of them")
    rest = {key: value for key, value in message.items() if key not in found}
    return rest, next((bool(value) for value in found.values()), None)


def with_calls(message: Message, where: str) -> Message:
    """A message with checked tool calls. OpenAI's older key ``function_call`` becomes ``tool_calls``.

    An empty list of calls is left out, because a table of columns stores it for messages without calls.

    Raises:
        InputError: the tool calls are not a list of mappings with a name.
    """
    calls = message.get("tool_calls")
    if isinstance(calls, str):
        calls = json_cell(calls, f"{where}: 'tool_calls'", give="a list of calls")
    if isinstance(calls, Mapping):
        calls = [calls]
    legacy = message.get("function_call")
    if calls and legacy:
        raise InputError(f"{where} has tool_calls and function_call; keep tool_calls")
    if legacy:
        calls = [{"type": "function", "function": legacy}]
    rest = {key: value for key, value in message.items() if key not in ("tool_calls", "function_call")}
    if not calls:
        return rest
    for call in calls if isinstance(calls, list) else [calls]:
        named = function_of(call) if isinstance(call, Mapping) else None
        if not isinstance(named, Mapping) or not isinstance(named.get("name"), str):
            raise InputError(f"{where} has the tool call {shown(call)}; give each a function with a name and arguments")
    return {**rest, "tool_calls": calls}


def function_of(call: Mapping[str, Any]) -> Any:
    """The part of a tool call that has the name and the arguments."""
    return call.get("function", call)


def with_arguments(message: Message, kind: type | None, where: str) -> Message:
    """A message whose tool calls have their arguments as mappings (``dict``) or JSON texts (``str``); None: as they are.

    Raises:
        InputError: arguments are needed as a mapping, and are not JSON.
    """
    if kind is None or "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = function_of(call)
        if "arguments" in function:
            arguments = function["arguments"]
            if kind is dict and isinstance(arguments, str):
                arguments = _parsed(arguments, f"{where}: the arguments of {function['name'][:60]!r}")
            elif kind is str and not isinstance(arguments, str):
                arguments = json_text(arguments)
            function = {**function, "arguments": arguments}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}


def _parsed(arguments: str, where: str) -> Any:
    found = parse_json(arguments, where, give="a JSON object, because the chat template takes a mapping") if arguments else {}
    if not isinstance(found, dict):
        raise InputError(f"{where} are {shown(arguments)}; give a JSON object, because the chat template takes a mapping")
    return found


def check_content(message: Message, where: str) -> None:
    """Check that the content is a text or a list of parts that are texts.

    Raises:
        InputError: it is something else, such as a picture.
    """
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
                what = f"a part of the type {kind!r}" if isinstance(kind, str) and kind not in TEXT_PARTS else shown(part)
                raise InputError(f"{where} holds {what}; only text is read: give parts like {{'type': 'text', 'text': ...}}")
    elif content is not None and not isinstance(content, str):
        raise InputError(
            f"{where} has a content of the type {type(content).__name__} ({content!r:.40}); give a text or a list of parts"
        )


def is_parts(content: Any) -> bool:
    """Whether a content is a list of parts, as ``[{"type": "text", "text": "Hi"}]``."""
    return isinstance(content, list) and bool(content) and all(isinstance(part, Mapping) and "type" in part for part in content)


def is_value(content: Any) -> bool:
    """Whether the content of a tool's message is a value that the tool gave, and neither a text nor a list of parts."""
    if content is None or isinstance(content, str):
        return False
    return not (is_parts(content) and all(part["type"] in PARTS for part in content))


def as_text_parts(content: list[Any]) -> list[Any]:
    """The parts with the type ``text``, which templates know."""
    return [{**part, "type": "text"} for part in content]


def joined_parts(content: list[Any]) -> str:
    """The texts of the parts of a content as one text."""
    return PART_SEPARATOR.join(part["text"] for part in content)


def says(content: Any) -> bool:
    """Whether a content has a text that is not blank."""
    if isinstance(content, str):
        return bool(content.strip())
    return is_parts(content) and any(part["text"].strip() for part in content if isinstance(part.get("text"), str))


def without_text(content: Any) -> Any:
    """A content of the same type without a text."""
    return "" if isinstance(content, str) else [{**part, "text": ""} for part in content]


def is_empty(message: Message) -> bool:
    """Whether a turn of the assistant says and calls nothing."""
    thinks = any(isinstance(message.get(key), str) and message[key].strip() for key in REASONING)
    return message["role"] == ASSISTANT and not says(message.get("content")) and "tool_calls" not in message and not thinks


def tools_of(cell: Any, where: str) -> list[dict[str, Any]]:
    """The tools in a cell, each as ``{"type": "function", "function": {"name": ..., ...}}``.

    Raises:
        InputError: the cell is something else.
    """
    tools = json_cell(cell, where, give="a list of tools")
    if isinstance(tools, Mapping):
        tools = [tools]
    found = []
    for tool in tools if isinstance(tools, list) else [tools]:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(f"{where} has the tool {shown(tool)}; give each a function with a name")
        found.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(function)})
    return found

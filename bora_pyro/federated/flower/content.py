"""Letters as the content of Flower's messages: one array of bytes, which Flower sends in parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bora_pyro.errors import shown
from bora_pyro.federated.message import RefusedMessage

#: The largest number of bytes of a part, as Flower cuts them.
CHUNK = 5 * 2**20
_NAME = "letter"
# Bytes of Flower's objects around the parts, and the largest number of these objects besides the parts.
_AROUND, _OBJECTS = 2**16, 8


def content_of(data: bytes) -> Any:
    """The content of a message with these bytes."""
    from flwr.app import Array, ArrayRecord, RecordDict

    return RecordDict({_NAME: ArrayRecord({_NAME: Array("uint8", (len(data),), "safetensors", data)})})


def bytes_in(root: str, contents: Mapping[str, bytes], *, most: int, sender: str) -> bytes:
    """The bytes of a letter in the objects of a message. Sizes are checked before Flower reads the objects.

    Args:
        root: the identifier of the message.
        contents: its objects by identifier.
        most: the largest number of bytes of the letter.
        sender: who has sent it, for the error.

    Raises:
        RefusedMessage: the objects are too many or too large, or no letter.
    """
    from flwr.supercore.inflatable.inflatable_object import get_object_head_values_from_object_content as head
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    size = sum(map(len, contents.values()))
    if size > most + _AROUND or len(contents) > most // CHUNK + 1 + _OBJECTS:
        raise RefusedMessage(f"{shown(sender)} sent {size} bytes in {len(contents)} objects, expected at most {most} bytes")
    try:
        for content in contents.values():
            kind, parts, _ = head(content)
            if kind == "Array":  # it may name one part many times
                places = json.loads(content[-_body_length(content) :])["arraychunk_ids"]
                if sum(len(contents[parts[place]]) for place in places) > most + _AROUND:
                    raise RefusedMessage(f"{shown(sender)} sent an array of more than {most} bytes")
        message = inflate_object_from_contents(root, dict(contents))
        if message.has_error():
            raise RefusedMessage(f"{shown(sender)} answers with an error: {str(message.error.reason)[:200]}")
        found = message.content[_NAME][_NAME].data
    except RefusedMessage:
        raise
    except Exception as error:  # Flower raises errors of many kinds for objects that are wrong
        raise RefusedMessage(
            f"{shown(sender)} sent no letter: {' '.join(f'{type(error).__name__} {error}'.split())[:200]}"
        ) from None
    if type(found) is not bytes:
        raise RefusedMessage(f"{shown(sender)} sent no letter")
    return found


def _body_length(content: bytes) -> int:
    from flwr.supercore.inflatable.inflatable_object import get_object_head_values_from_object_content as head

    return head(content)[2]

"""Renders `strict.lua` with the tables it needs: each method's request message, and each message's fields."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto

from services.gateway.descriptors import descriptor_set
from services.gateway.local_replies import rich_status, too_large

SCRIPT = Path(__file__).with_name("strict.lua")
OPAQUE = "google.protobuf."
"""Well-known types have a JSON form of their own, which is not looked into."""

Fields = dict[str, str | bool]


def lua_script(services: Iterable[str], max_message_bytes: int) -> str:
    """The whole script.

    Args:
        services: full names of the services whose JSON bodies are checked.
        max_message_bytes: limit of one message.
    """
    methods = dict(request_messages(services))
    messages = message_fields(methods.values())
    status = rich_status(too_large(max_message_bytes))
    names = {
        "METHODS": _table(methods),
        "MESSAGES": _table({name: _table(fields) for name, fields in messages.items()}, raw=True),
        "TOO_LARGE_MESSAGE": json.dumps(status.message),
        "TOO_LARGE_DETAILS": json.dumps(base64.b64encode(status.SerializeToString()).decode()),
    }
    tables = "".join(f"local {name} = {value}\n" for name, value in names.items())
    return tables + SCRIPT.read_text(encoding="utf-8")


def request_messages(services: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Path and request message of every method of `services`."""
    wanted = set(services)
    for file in descriptor_set().file:
        for service in file.service:
            name = f"{file.package}.{service.name}"
            if name in wanted:
                yield from ((f"/{name}/{method.name}", method.input_type.lstrip(".")) for method in service.method)


def message_fields(roots: Iterable[str]) -> dict[str, Fields]:
    """Fields of the messages `roots` and of all that they contain.

    Each field stands under its proto name and its JSON name. Its value is the message that it holds, or True for what
    is not looked into. A map is a message with the one field `*`, which stands for every key.
    """
    known = _all_messages()
    fields: dict[str, Fields] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in fields:
            continue
        fields[name] = _fields_of(known[name])
        waiting += [kind for kind in fields[name].values() if isinstance(kind, str)]
    return fields


def _fields_of(message: DescriptorProto) -> Fields:
    if message.options.map_entry:
        return {"*": next(_kind(field) for field in message.field if field.name == "value")}
    return {name: _kind(field) for field in message.field for name in (field.name, field.json_name or field.name)}


def _kind(field: FieldDescriptorProto) -> str | bool:
    name = field.type_name.lstrip(".")
    if field.type != FieldDescriptorProto.TYPE_MESSAGE or name.startswith(OPAQUE):
        return True
    return name


def _all_messages() -> dict[str, DescriptorProto]:
    messages: dict[str, DescriptorProto] = {}

    def add(prefix: str, found: Iterable[DescriptorProto]) -> None:
        for message in found:
            name = f"{prefix}.{message.name}"
            messages[name] = message
            add(name, message.nested_type)

    for file in descriptor_set().file:
        add(file.package, file.message_type)
    return messages


def _table(entries: Mapping[str, str | bool], *, raw: bool = False) -> str:
    """A Lua table; values are names and `true`, or already Lua if `raw`."""
    pairs = (f"[{json.dumps(key)}]={value if raw else json.dumps(value)}" for key, value in entries.items())
    return "{" + ",".join(pairs) + "}"

"""Whether a call comes in: the filters that look at keys, roles and rates.

Without keys, everybody may call, but for the administrative methods, which callers on this machine alone may use.
With keys, `keys.lua` looks every call's key up by its hash, a rule refuses what the script did not admit, and Envoy's
local_ratelimit counts the calls of each key. The filters change while Envoy runs, since keys do (live_keys.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.api_keys import ApiKey
from shared.roles import ADMIN_METHODS

SCRIPT = Path(__file__).with_name("keys.lua")
ADMISSION, ADMITTED, RATES = "usagi.admission", "usagi.admitted", "usagi.rates"
"""Names of the filters, in their order."""
SPACE = "usagi.keys"
"""Namespace of the metadata in which keys.lua says what it found."""
OPEN = "/grpc.health.v1.Health/"
"""Answers without a key: probes have none, and it tells nothing but what a connection tells."""

Json = dict[str, Any]
Keys = Sequence[ApiKey] | None
"""None: no keys are set. An empty sequence: keys are set, and nobody has one."""


def admission_filters(keys: Keys, cors_origins: str) -> list[Json]:
    """The three filters.

    Args:
        keys: all keys.
        cors_origins: regular expression of the web origins that may call the administrative methods without keys.
    """
    admission = _loopback_rules(cors_origins) if keys is None else _lua(keys)
    return [
        {"name": ADMISSION, "typed_config": admission},
        {"name": ADMITTED, "typed_config": _typed("rbac.v3.RBAC", **({} if keys is None else _only_admitted()))},
        {"name": RATES, "typed_config": _rates(keys or ())},
    ]


def _lua(keys: Sequence[ApiKey]) -> Json:
    known = {key.sha256: _table({"name": key.name, "role": key.role}) for key in keys}
    tables = {
        "KEYS": _table(known, raw=True),
        "ADMIN_METHODS": _table(dict.fromkeys(ADMIN_METHODS, True)),
        "OPEN": json.dumps(OPEN),
        "ROUNDS": "{" + ",".join(map(str, round_constants())) + "}",
    }
    script = "".join(f"local {name} = {value}\n" for name, value in tables.items()) + SCRIPT.read_text(encoding="utf-8")
    return _typed("lua.v3.Lua", default_source_code={"inline_string": script})


def _only_admitted() -> Json:
    """Refuses what keys.lua did not let in: a script that fails would open the door, since Envoy passes the call on."""
    said = {"filter": SPACE, "path": [{"key": "admitted"}], "value": {"string_match": {"exact": "yes"}}}
    admitted = {"permissions": [{"any": True}], "principals": [{"metadata": said}]}
    return {"rules": {"action": "ALLOW", "policies": {"admitted": admitted}}}


def _table(entries: dict[str, Any], *, raw: bool = False) -> str:
    pairs = (f"[{json.dumps(key)}]={value if raw else json.dumps(value)}" for key, value in entries.items())
    return "{" + ",".join(pairs) + "}"


def round_constants() -> list[int]:
    """SHA-256's constants: 32 bits of the fraction of the cube roots of the first 64 primes (FIPS 180-4, 4.2.2)."""
    primes = [number for number in range(2, 312) if all(number % factor for factor in range(2, number))]
    return [_cube_root(prime << 96) & 0xFFFFFFFF for prime in primes]


def _cube_root(number: int) -> int:
    """The largest integer whose cube is not above `number`."""
    low, high = 0, 1 << (number.bit_length() // 3 + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**3 <= number else (low, middle - 1)
    return low


def _rates(keys: Sequence[ApiKey]) -> Json:
    """A bucket of calls for each key that has a rate, shared by all of Envoy's threads; other calls are not counted."""
    always = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
    limited = [key for key in keys if key.rate is not None]
    name = {"key": SPACE, "path": [{"key": "name"}]}
    action = {"metadata": {"descriptor_key": "key", "metadata_key": name, "source": "DYNAMIC", "skip_if_absent": True}}
    return _typed(
        "local_ratelimit.v3.LocalRateLimit",
        stat_prefix="keys",
        filter_enabled=always,
        filter_enforced=always,
        rate_limited_as_resource_exhausted=True,
        enable_x_ratelimit_headers="DRAFT_VERSION_03",
        rate_limits=[{"actions": [action]}],
        descriptors=[_bucket(key) for key in limited],
    )


def _bucket(key: ApiKey) -> Json:
    assert key.rate is not None
    bucket = {"max_tokens": key.rate.calls, "tokens_per_fill": key.rate.calls, "fill_interval": f"{key.rate.seconds}s"}
    return {"entries": [{"key": "key", "value": key.name}], "token_bucket": bucket}


def _loopback_rules(cors_origins: str) -> Json:
    """Denies admin methods to callers from elsewhere, and to foreign web pages that a local browser shows."""
    loopback = [
        {"direct_remote_ip": {"address_prefix": "127.0.0.0", "prefix_len": 8}},
        {"direct_remote_ip": {"address_prefix": "::1", "prefix_len": 128}},
    ]
    elsewhere = {"not_id": {"or_ids": {"ids": loopback}}}
    foreign_page = {
        "and_ids": {
            "ids": [
                {"header": {"name": "origin", "present_match": True}},
                {"not_id": {"header": {"name": "origin", "string_match": {"safe_regex": {"regex": cors_origins}}}}},
            ]
        }
    }
    permissions = [{"url_path": {"path": {"exact": method}}} for method in ADMIN_METHODS]
    rules = {
        "action": "DENY",
        "policies": {"admin": {"permissions": permissions, "principals": [elsewhere, foreign_page]}},
    }
    return _typed("rbac.v3.RBAC", rules=rules)


def _typed(name: str, **fields: Any) -> Json:
    return {"@type": f"type.googleapis.com/envoy.extensions.filters.http.{name}", **fields}

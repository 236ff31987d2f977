"""The deployment files as a person starts them: variables at their defaults, anchors resolved."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def load(path):
    """A YAML file of Compose's kind, each `${NAME:-default}` replaced by its default."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return yaml.safe_load(re.sub(r"\$\{\w+(?::?-([^}]*))?\}", lambda found: found[1] or "", text))


def compose_services():
    """The services of docker-compose.yml that `make up` starts."""
    return {name: body for name, body in load("docker-compose.yml")["services"].items() if "profiles" not in body}


def byte_count(text):
    """`512m`, `512Mi` or `64k` in bytes."""
    number, unit = re.fullmatch(r"(\d+)([kmg]?)i?b?", str(text).lower()).groups()
    return int(number) << {"": 0, "k": 10, "m": 20, "g": 30}[unit]


def mounts(service):
    """Where a Compose service has its volumes: {path: (volume, read only)}."""
    parts = [volume.split(":") for volume in service.get("volumes", [])]
    return {part[1]: (part[0], part[2:] == ["ro"]) for part in parts}


def environment(service):
    """Its variables, as text; an empty one is as good as none."""
    return {name: str(value) for name, value in service["environment"].items() if value not in (None, "")}

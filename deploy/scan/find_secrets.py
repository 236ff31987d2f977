"""Looks for secrets in every version of every file that this branch had: `find_secrets.py [REPOSITORY]`.

What is committed once stays in the history for whoever clones it, so the history counts. Findings are printed without
the secret. What is none goes into allowed.txt, by its hash and with a reason. Standard library only.
"""

from __future__ import annotations

import hashlib
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ALLOWED = Path(__file__).with_name("allowed.txt")
ENTROPY_BITS = 3.3
"""A character, of what stands behind a telling name: words have less, random strings more."""
MAX_LINE = 10_000

KINDS = {
    "a key of Usagi": re.compile(r"\busagi_[A-Za-z0-9_-]{43}\b"),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----"),
    "a key of AWS": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a token of GitHub": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60,})\b"),
    "a token of GitLab": re.compile(r"\bglpat-[A-Za-z0-9_-]{20,}"),
    "a token of Slack": re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"),
    "a key of Google": re.compile(r"\bAIza[0-9A-Za-z_-]{35}\b"),
    "a token of Hugging Face": re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    "a token of a package registry": re.compile(r"\b(?:pypi-[A-Za-z0-9_-]{50,}|npm_[A-Za-z0-9]{36})"),
    "a key of a model provider": re.compile(r"\bsk-[A-Za-z0-9_-]{32,}"),
    "a JSON web token": re.compile(r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    "a password in an address": re.compile(r"\b[a-z][a-z0-9+]{2,}://[^/\s:@'\"{$<]+:([^/\s:@'\"{$<]{4,})@"),
    "a bearer token": re.compile(r"\b[Bb]earer ([A-Za-z0-9._~+/-]{24,}=*)"),
}
NAMED = re.compile(r"(?i)(?:passw(?:or)?d|secret|token|api_?key|private_?key)\w*['\"]?\s*[:=]\s*['\"]?([^\s'\"]{12,})")
"""Something long behind a telling name; a secret only if it looks random."""
RANDOM = re.compile(r"[A-Za-z0-9+/_=-]{12,}")


@dataclass(frozen=True)
class Finding:
    """A place with what is probably a secret. `place` is `commit path` or `path:line`."""

    place: str
    kind: str
    digest: str


def secrets_in(line: str) -> Iterator[tuple[str, str]]:
    """Kind and text of everything in a line that looks like a secret."""
    line = line[:MAX_LINE]
    for kind, pattern in KINDS.items():
        for match in pattern.finditer(line):
            yield kind, match[match.lastindex or 0]
    for match in NAMED.finditer(line):
        text = match[1]
        if RANDOM.fullmatch(text) and any(map(str.isdigit, text)) and entropy(text) > ENTROPY_BITS:
            yield "something random behind a telling name", text


def entropy(text: str) -> float:
    """Shannon's, in bits a character."""
    shares = [text.count(sign) / len(text) for sign in set(text)]
    return -sum(share * math.log2(share) for share in shares)


def added_lines(repository: Path) -> Iterator[tuple[str, str]]:
    """Place and text of every line that a commit or the working tree added, the newest first."""
    format_ = ["--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--unified=0"]
    yield from _lines(repository, "working tree", "diff", *format_, "HEAD")
    yield from _lines(repository, "", "log", "--patch", "--format=commit %h", *format_)


def _lines(repository: Path, commit: str, *command: str) -> Iterator[tuple[str, str]]:
    path = ""
    with subprocess.Popen(["git", "-C", str(repository), *command], stdout=subprocess.PIPE) as git:
        assert git.stdout is not None
        for raw in git.stdout:
            line = raw.decode("utf-8", "replace").rstrip("\n")
            if line.startswith("commit "):
                commit = line.removeprefix("commit ")
            elif line.startswith("+++ "):
                path = line.removeprefix("+++ ").removeprefix("b/")
            elif line.startswith("+"):
                yield f"{commit} {path}", line[1:]
    if git.returncode:
        raise SystemExit(f"secrets: git {command[0]} ended with {git.returncode}")


def untracked_lines(repository: Path) -> Iterator[tuple[str, str]]:
    """Place and text of every line of the files that git does not ignore and does not know yet."""
    command = ["git", "-C", str(repository), "ls-files", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if not (repository / name).is_file():  # a repository in the repository, or a link to a folder
            continue
        for number, line in enumerate((repository / name).read_text("utf-8", "replace").splitlines(), 1):
            yield f"{name}:{number}", line


def allowed(path: Path = ALLOWED) -> set[str]:
    """Hashes of what looks like a secret and is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line.split()[0] for line in lines if line.strip() and not line.startswith("#")}


def findings(repository: Path) -> list[Finding]:
    """Each secret once, where it stands newest."""
    known, found = allowed(), dict[str, Finding]()
    for source in (untracked_lines, added_lines):
        for place, line in source(repository):
            for kind, text in secrets_in(line):
                digest = hashlib.sha256(text.encode()).hexdigest()
                if digest not in known:
                    found.setdefault(digest, Finding(place, kind, digest))
    return list(found.values())


def main() -> int:
    """Prints the findings; 1 if there are any."""
    found = findings(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
    for finding in found:
        print(f"{finding.place}: {finding.kind}, sha256 {finding.digest}")
    if found:
        print(
            "revoke what is a secret, since the history keeps it; what is none goes into deploy/scan/allowed.txt:\n"
            "its sha256 as above and the reason"
        )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())

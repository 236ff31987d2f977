"""`make scan`: secrets, Dockerfiles, compose files, known vulnerabilities of what the images install.

The first three need no network. Vulnerabilities are looked up by pip-audit; what it could not look up is said and is
no failure, since many places cannot reach the advisories: a pass says how many packages it is about.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from find_secrets import main as find_secrets

ROOT = Path(__file__).resolve().parents[2]
HERE = "deploy/scan"
COMPOSE_FILES = {"docker-compose.yml": f"{HERE}/compose.yml", "deploy/swarm/stack.yaml": f"{HERE}/swarm.yml"}
"""Each whole deployment with its exceptions; the others only add to the first."""
AUDIT_SECONDS = 120


def tool(name: str) -> str:
    """A program beside the Python that runs this."""
    return str(Path(sys.executable).with_name(name))


def dockerfiles() -> int:
    """hadolint, over every Dockerfile that git knows."""
    listed = subprocess.run(
        ["git", "ls-files", "*Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    return subprocess.run([tool("hadolint"), "--no-color", *listed], cwd=ROOT, check=False).returncode


def compose() -> int:
    """compose-lint, over every whole deployment; from LOW on a finding counts."""
    code = 0
    for path, exceptions in COMPOSE_FILES.items():
        options = ["--fail-on", "low", "--quiet", "--skip-suppressed", "--strict-config", "--config", exceptions]
        code |= subprocess.run([tool("compose-lint"), "check", *options, path], cwd=ROOT, check=False).returncode
    return code


def locked_packages() -> list[str]:
    """Every package that an image installs, as a line of a requirements file, each once."""
    found = set()
    for path in sorted((ROOT / "deploy" / "locks").glob("*.lock")):
        text = path.read_text(encoding="utf-8").replace(" \\\n", " ")
        found |= {line for line in text.splitlines() if line and not line.startswith("#")}
    by_name = {line.split()[0]: line for line in sorted(found)}
    return sorted(by_name.values())


def vulnerabilities() -> int:
    """pip-audit, over everything that is locked; it installs nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packages.txt"
        path.write_text("\n".join(locked_packages()) + "\n", encoding="utf-8")
        command = [tool("pip-audit"), "--disable-pip", "--require-hashes", "--progress-spinner", "off"]
        try:
            done = subprocess.run(
                [*command, "--format", "json", "--requirement", str(path)],
                capture_output=True,
                text=True,
                check=False,
                timeout=AUDIT_SECONDS,
            )
            answer = json.loads(done.stdout)
        except (subprocess.TimeoutExpired, json.JSONDecodeError):
            print("the advisories cannot be reached: nothing was looked up")
            return 0
    return report(answer)


def report(answer: dict[str, list[dict[str, object]]]) -> int:
    """Prints pip-audit's findings, and how many packages they are about; 1 if there are any."""
    packages = answer["dependencies"]
    looked_up = [package for package in packages if "skip_reason" not in package]
    affected = [package for package in looked_up if package["vulns"]]
    for package in affected:
        for found in package["vulns"]:  # type: ignore[attr-defined]
            fixed = ", ".join(found["fix_versions"]) or "none yet"
            print(f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}")
    print(f"{len(looked_up)} of {len(packages)} packages were looked up, {len(affected)} have known vulnerabilities")
    return bool(affected)


CHECKS: dict[str, Callable[[], int]] = {
    "secrets": find_secrets,
    "dockerfiles": dockerfiles,
    "compose": compose,
    "vulnerabilities": vulnerabilities,
}


def main() -> int:
    """Runs every check; 1 if one found something."""
    failed = []
    for name, check in CHECKS.items():
        print(f"--- {name}", flush=True)
        if check():
            failed.append(name)
    print(f"scan: {', '.join(failed)} found something" if failed else "scan: nothing found")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

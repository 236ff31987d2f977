"""Writes the tables of the READMEs from the manifests of the shipped models, so that no figure is typed by hand.

`python -m shared.training.readme` replaces what stands between `<!-- models:begin -->` and `<!-- models:end -->` in
README.md (all services) and in services/<domain>/README.md (that service); `--check` only says whether they are true.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from shared.artifacts import MANIFEST_NAME, Manifest, read_manifest, write_atomically
from shared.measures import Measure, measure_named

BEGIN, END = "<!-- models:begin -->", "<!-- models:end -->"
HEADER = """| service | model | variant | quality | same answer as fp32 | p50 ms | MB | over 3 RNG seeds | baselines |
|---|---|---|---|---|---|---|---|---|"""


def newest_manifests(root: Path, service: str = "*") -> list[Manifest]:
    """The newest version of every model under a root, by service and name."""
    newest: dict[tuple[str, str], Manifest] = {}
    for path in sorted(root.glob(f"{service}/*/*/{MANIFEST_NAME}")):
        manifest = read_manifest(path.parent)
        key = (manifest.service, manifest.name)
        if key not in newest or newest[key].version < manifest.version:
            newest[key] = manifest
    return [newest[key] for key in sorted(newest)]


def render_table(manifests: list[Manifest]) -> str:
    """A Markdown table, a row for each variant; what `auto` chooses comes first."""
    rows = [HEADER]
    for manifest in manifests:
        measure = measure_named(manifest.measure)
        first = next(iter(manifest.variants))
        spreads = manifest.training.spread if manifest.training else {}
        baselines = manifest.training.baselines if manifest.training else {}
        for name in manifest.variants_by_preference():
            variant = manifest.variants[name]
            metrics = variant.metrics
            spread = spreads.get(measure.name if name == first else f"{measure.name}_{name}")
            cells = [
                manifest.service,
                f"[{manifest.name}](services/{manifest.service}/cards/{manifest.name}.md)",
                name,
                f"{measure.name} {measure.text(metrics[measure.name])}",
                f"{metrics['agreement']:.4f}" if "agreement" in metrics else "",
                f"{metrics['latency_p50_ms']:.1f}",
                f"{variant.bytes / 1e6:.1f}",
                " ".join(_spread(spread, measure)) if spread else "",
                ", ".join(f"{key} {measure.text(value)}" for key, value in baselines.items()) if name == first else "",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _spread(spread: Mapping[str, float], measure: Measure) -> tuple[str, str]:
    mean, least, most = (measure.text(spread[name]) for name in ("mean", "min", "max"))
    return mean, f"({least} to {most})"


def with_table(text: str, table: str) -> str:
    """The text with the table between its markers; a ValueError without them."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"lacks {BEGIN} … {END}")
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def main() -> None:
    """Writes or checks all READMEs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; exit with 1 if a table is out of date")
    parser.add_argument("--root", type=Path, default=Path("deploy/models"), help="model root (default: %(default)s)")
    options = parser.parse_args()
    stale = []
    services = sorted({manifest.service for manifest in newest_manifests(options.root)})
    for path, service in [(Path("README.md"), "*"), *((Path(f"services/{name}/README.md"), name) for name in services)]:
        text = path.read_text(encoding="utf-8")
        table = render_table(newest_manifests(options.root, service))
        if path.parent != Path():  # links are relative to the file
            table = table.replace(f"(services/{service}/", "(")
        made = with_table(text, table)
        if made != text:
            stale.append(str(path))
            if not options.check:
                write_atomically(path, made)
    print(f"{'out of date' if options.check else 'written'}: {', '.join(stale)}" if stale else "all tables are true")
    sys.exit(1 if stale and options.check else 0)


if __name__ == "__main__":
    main()

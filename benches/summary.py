"""List which benchmark results miss their targets.

    python benches/summary.py [--all] [--results FOLDER]

Reads what the benchmarks wrote; a row without a target is only listed with --all.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def rows_of(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(bench, row) of every result in a folder."""
    for path in sorted(folder.glob("*.json")):
        for row in json.loads(path.read_text(encoding="utf-8")).get("rows", []):
            yield path.stem, row


def summarise(folder: Path, *, everything: bool) -> list[str]:
    """A line for every row that misses its target (or every row), then the count by benchmark."""
    lines, counts = [], {}
    for bench, row in rows_of(folder):
        held, judged = counts.get(bench, (0, 0))
        if row["holds"] is not None:
            counts[bench] = held + bool(row["holds"]), judged + 1
        else:
            counts.setdefault(bench, (0, 0))
        if everything or row["holds"] is False:
            verdict = {None: "", True: "holds", False: "MISSES"}[row["holds"]]
            target = "" if row["target"] is None else f"target {row['target']:.2f}"
            lines.append(
                f"{bench}: {row['name']}: {row['ratio']:.2f}x  {target}  {verdict}".rstrip()
            )
    totals = [
        f"{bench}: {held} of {judged} targets hold" for bench, (held, judged) in counts.items()
    ]
    return [*lines, *totals] or [f"no results in '{folder}'; run a benchmark first"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="rows that hold or have no target, too")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    print("\n".join(summarise(args.results, everything=args.all)))


if __name__ == "__main__":
    main()

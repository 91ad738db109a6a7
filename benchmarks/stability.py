"""Would an allocator decide alike with other seeds? Final ranks of `ardtrain compare`'s runs, seed against seed.

python -m benchmarks.stability runs/compare/e2e_nlg [runs/compare/probe_e2e_nlg ...] [--out FILE]

Seeds differ in the order of rows and in first weights; rates are those that the comparison chose, so that its test runs
are what is read. For every two runs of a method, r0 being the ranks of the start (AdaLoRA: scaled to what is left):

- again: of the rank that one run gave a site beyond r0, the share that the other gave it as well;
- chance: the same where the other run's changes are dealt to the sites at random (mean of 200 deals);
- correlation: Pearson's, of the two runs' final ranks. None where a run moved nothing.
"""

import itertools
import statistics
from pathlib import Path

import numpy as np

from ardtrain.report.history import read_sites
from benchmarks.common import described, machine, parser, write


def gained(ranks):
    """[S] rank beyond the start's share of the final total. ranks: [E, S]."""
    first, last = ranks[0], ranks[-1]
    return np.maximum(0.0, last - first * (last.sum() / first.sum()))


def overlap(ours, theirs):
    """Share of what both gave: 1 for the same, 0 for nothing in common."""
    most = (ours.sum() + theirs.sum()) / 2
    return float(np.minimum(ours, theirs).sum() / most)


def pair(ours, theirs, generator):
    """The figures of two runs, or None where one moved nothing. ours, theirs: [E, S]."""
    a, b = gained(ours), gained(theirs)
    if not a.any() or not b.any():
        return None
    dealt = [overlap(a, generator.permutation(b)) for _ in range(200)]
    correlation = float(np.corrcoef(ours[-1], theirs[-1])[0, 1])
    return {"again": overlap(a, b), "chance": statistics.fmean(dealt), "correlation": correlation}


def of_method(folder):
    """Means over all pairs of a method's test runs."""
    files = sorted(folder.glob("lr-*/seed-*/test/ranks.jsonl"))
    runs = [read_sites(file).ranks for file in files]
    generator = np.random.default_rng(0)
    pairs = [pair(a, b, generator) for a, b in itertools.combinations(runs, 2)]
    found = [p for p in pairs if p is not None]
    means = {name: statistics.fmean(p[name] for p in found) for name in found[0]} if found else None
    return {"runs": len(runs), "pairs": len(found), "final": [runs_[-1].tolist() for runs_ in runs], "mean": means}


def main():
    """Reads every comparison named."""
    options = parser(__doc__)
    options.add_argument("folders", nargs="+", type=Path, help="output folders of ardtrain compare")
    arguments = options.parse_args()
    found = {}
    for folder in arguments.folders:
        methods = {p.parents[3].name for p in folder.glob("*/lr-*/seed-*/test/ranks.jsonl")}
        found[folder.name] = {name: of_method(folder / name) for name in sorted(methods - {"lora", "dora"})}
    settings = described(arguments) | {"folders": [folder.name for folder in arguments.folders]}
    write({"benchmark": "stability", "machine": machine(), "settings": settings, "suites": found}, arguments.out)


if __name__ == "__main__":
    main()

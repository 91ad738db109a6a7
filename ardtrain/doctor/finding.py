"""What a check found, and the text of all findings."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]
_ORDER = {"ok": 0, "warn": 1, "fail": 2}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `where` names hosts or processes, `remedy` what the user can do."""

    level: Level
    where: str
    what: str
    remedy: str = ""


class Trouble(Exception):
    """Ends a doctor's visit early: nothing after this finding can be tried."""

    def __init__(self, finding: Finding) -> None:
        self.finding = finding
        super().__init__(f"{finding.where}: {finding.what}")


def failed(findings: Iterable[Finding]) -> bool:
    """Whether anything stands in the way of a run."""
    return any(finding.level == "fail" for finding in findings)


def merged(findings: Sequence[Finding]) -> list[Finding]:
    """Findings that differ in nothing but the host as one; of many hosts that are well a few names do."""
    groups: dict[tuple[Level, str, str], list[str]] = {}
    for f in findings:
        groups.setdefault((f.level, f.what, f.remedy), []).append(f.where)
    out: list[Finding] = []
    for (level, what, remedy), names in groups.items():
        hosts = list(dict.fromkeys(names))
        where = f"{hosts[0]} and {len(hosts) - 1} more" if level == "ok" and len(hosts) > 3 else ", ".join(hosts)
        out.append(Finding(level, where, what, remedy))
    return out


def render(findings: Sequence[Finding], *, title: str, width: int = 116) -> str:
    """The report for people: what is well first, what stands in the way last, where the eye is."""
    findings = merged(findings)
    column = min(24, max((len(finding.where) for finding in findings), default=0))
    indent = " " * (7 + column)
    lines = [title]
    for finding in sorted(findings, key=lambda f: _ORDER[f.level]):
        mark = {"ok": "ok", "warn": "WARN", "fail": "FAIL"}[finding.level]
        text = f" {mark:<5}{finding.where:<{column}} {finding.what}"
        wrap = {"width": width, "break_long_words": False, "break_on_hyphens": False, "subsequent_indent": indent}
        lines += textwrap.wrap(text, **wrap)  # type: ignore[arg-type]
        if finding.remedy:
            lines += textwrap.wrap(f"{indent}-> {finding.remedy}", **wrap)  # type: ignore[arg-type]
    counts = {level: sum(finding.level == level for finding in findings) for level in _ORDER}
    verdict = "NOT FIT to train" if counts["fail"] else "fit to train"
    lines.append(f"{verdict}: {counts['ok']} ok, {counts['warn']} warning(s), {counts['fail']} failure(s)")
    return "\n".join(lines)

"""Which run a checkpoint belongs to: what must be equal for a resume to be the same run, and what may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ardtrain.checkpoint import strictjson
from ardtrain.checkpoint.errors import OtherRunError

NOT_RECORDED = "the checkpoint does not say"


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to: resuming with other data or another base would continue another run.

    backbone, data: sha256 of the base's config and shapes, and of the tokenised rows and their order settings.
    weights: of the base's files, file -> digest (fingerprint.py); empty: not looked at. method: its name, or "".
    settings: must be equal, by name; changeable: may differ, the difference is told (learning rate, cadences, number
    of steps). Both may nest. versions: of libraries; a difference is told.
    """

    backbone: str
    data: str
    versions: Mapping[str, str]
    weights: Mapping[str, str] = field(default_factory=dict)
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    changeable: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields as they will be read back. Raises ValueError for NaN and what JSON lacks."""
        names = ("backbone", "data", "versions", "weights", "method", "settings", "changeable")
        out: dict[str, Any] = strictjson.plain({name: getattr(self, name) for name in names})
        return out


def compare(stored: Mapping[str, Any], identity: Identity, path: Path) -> list[str]:
    """What changed and may change, one line each; stored: a manifest. What it does not say is not compared.

    Raises:
        OtherRunError: something differs that makes it another run; all of it is named with both values.
    """
    own = identity.to_json()
    wrong, changes = [], []
    if stored.get("method") and own["method"] and stored["method"] != own["method"]:
        wrong.append(f"method: {_both(stored['method'], own['method'])}")
    differing, unknown = _differences(stored.get("settings") or {}, own["settings"])
    wrong += differing
    changes += unknown if stored.get("settings") else []
    for what in ("backbone", "data"):
        if stored[what] != own[what]:
            wrong.append(f"another {what} (fingerprint {_word(stored[what])}, now {_word(own[what])})")
    wrong += _other_weights(stored.get("weights") or {}, own["weights"])
    if wrong:
        raise OtherRunError(
            f"{path} was written by another run: {'; '.join(wrong)}; give the same again, or take a new output_dir"
        )
    for what in ("changeable", "versions"):
        if stored.get(what):
            differing, unknown = _differences(stored[what], own[what])
            changes += [*differing, *unknown]
    return changes


def _differences(stored: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(differing, on one side alone), each as a line."""
    before, now = _flat(stored), _flat(own)
    differing = [
        f"{name}: {_both(before[name], value)}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]
    unknown = [f"{name}: {NOT_RECORDED}, this run has {now[name]!r}" for name in now if name not in before]
    unknown += [f"{name}: the checkpoint has {before[name]!r}, this run has none" for name in before if name not in now]
    return differing, unknown


def _both(before: Any, now: Any) -> str:
    return f"the checkpoint has {before!r}, this run {now!r}"


def _word(text: str) -> str:
    """The begin of a fingerprint; what a damaged file may hold instead is printable too."""
    return ascii(text[:12])[1:-1]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by dots."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out


def _other_weights(stored: Mapping[str, str], own: Mapping[str, str]) -> list[str]:
    if not stored or not own or stored == own:
        return []
    names = [name for name in sorted(stored.keys() | own.keys()) if stored.get(name) != own.get(name)]
    first = names[0]
    return [
        f"other base weights: {first!a} (fingerprint {_word(stored.get(first, 'none'))}, now "
        f"{_word(own.get(first, 'none'))})" + (f" and {len(names) - 1} more files" if len(names) > 1 else "")
    ]

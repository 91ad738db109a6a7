"""What went wrong outside, in a file, a path or another library, as a part of a sentence of ours."""

from __future__ import annotations

from pathlib import Path


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def no_source(name: str, error: BaseException) -> str:
    """Why nothing was found under a name that may be a folder's or a hub's; says where a relative path was looked for.

    error: of the library that looked.
    """
    path = Path(name)
    if path.exists():
        return first_line(error)
    return "no such folder" if path.is_absolute() else f"no such folder in {Path.cwd()}; {first_line(error)}"

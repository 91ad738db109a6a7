"""Entry of `deepspeed [--num_nodes N] ardtrain/main.py [VERB] CONFIG`.

DeepSpeed's launcher starts this file by its path. Python then puts the package's own folder first on `sys.path`,
where `import config` or `import ranks` would find our modules under a second name; the folder's parent takes its
place. `--local_rank=N`, which the launcher puts before our own arguments, is left to the command line's parser.
"""

import sys
from pathlib import Path


def import_from_parent(path: list[str], package_dir: Path) -> list[str]:
    """The entries of `path`, with every one that means `package_dir` replaced by its parent."""
    return [str(package_dir.parent) if entry and Path(entry).resolve() == package_dir else entry for entry in path]


def run() -> int | None:
    """Exit code of the command line in `sys.argv` (None counts as 0)."""
    sys.path[:] = import_from_parent(sys.path, Path(__file__).resolve().parent)
    from ardtrain.cli import main

    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run())

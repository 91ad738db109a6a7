"""`ardtrain export`: a checkpoint's adapter as a PEFT folder that was read back with PEFT before it gets its name."""

from __future__ import annotations

import argparse
import contextlib
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from safetensors import SafetensorError

from ardtrain import checkpoint, export, preflight
from ardtrain.backbones import DTYPES
from ardtrain.cards import Described, write_card
from ardtrain.config import ConfigError, RunConfig
from ardtrain.publishing import check_hub, push
from ardtrain.quantized import dequantize_modules
from ardtrain.trained import Trained, available_bytes, bound_model, load_base, logits_of, open_trained, probe_inputs

MEMORY_SHARE = 1.25  # of the base's bytes: it, one layer's workspace, and Python


def export_command(arguments: list[str]) -> int:
    """`ardtrain export ...`; returns the exit code. Raises ConfigError."""
    options, overrides = _parser().read(arguments)
    if options.push_to_hub:
        check_hub(options.push_to_hub)
    trained = open_trained(options.run, overrides)
    kind = "peft-uniform" if options.uniform_rank else "peft"
    out = Path(options.out) if options.out else trained.run_dir / f"{kind}-{trained.step}"
    lines = export_peft(trained, out, uniform_rank=options.uniform_rank, without_base=options.without_base)
    print("\n".join(lines))
    if options.push_to_hub:
        print(push(out, options.push_to_hub, private=options.private, message=f"{out.name}, exported by ardtrain"))
    return 0


class Arguments(argparse.ArgumentParser):
    """Those of export and merge: RUN|CHECKPOINT, where to, and the hub. A mistake is a ConfigError."""

    def __init__(self, verb: str) -> None:
        super().__init__(prog=f"ardtrain {verb}", add_help=False)
        self.add_argument("run", metavar="RUN|CHECKPOINT")
        self.add_argument("--push-to-hub", metavar="REPO")
        self.add_argument("--private", action="store_true")  # of a repository that is made now

    def read(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Options, and overrides of settings. Raises ConfigError where a `--name` is neither."""
        options, overrides = self.parse_known_args(arguments)
        known = [name for action in self._actions for name in action.option_strings]
        for name in (word.partition("=")[0] for word in overrides if word.startswith("--")):
            if name[2:].partition(".")[0] not in RunConfig.model_fields:
                near = difflib.get_close_matches(name, known, n=1)
                self.error(f"{name}: is no option here" + (f"; did you mean {near[0]}?" if near else ""))
        return options, overrides

    def error(self, message: str) -> NoReturn:
        raise ConfigError([f"{self.prog}: {message}; {self.prog} --help has an example"])


def _parser() -> Arguments:
    parser = Arguments("export")
    parser.add_argument("--to", choices=["peft"], default="peft")
    parser.add_argument("--out", metavar="DIR")
    parser.add_argument("--uniform-rank", action="store_true")
    parser.add_argument("--without-base", action="store_true")
    return parser


def export_peft(trained: Trained, out: Path, *, uniform_rank: bool = False, without_base: bool = False) -> list[str]:
    """The PEFT folder `out`, compared before it gets this name; returns what to tell.

    without_base: compare the product of each matrix alone, not logits.

    Raises:
        ConfigError: `out` exists, or the base does not fit into memory.
        RuntimeError: PEFT's logits or products differ; the folder keeps a name with a dot.
    """
    if out.exists():
        raise ConfigError([f"--out {out} exists; name another folder, or remove it"])
    if not without_base:
        _check_memory(trained)
    building = out.with_name(f".{out.name}.tmp")
    try:
        checkpoint.remove_folder(building)
        config = trained.write_adapter(building, uniform_rank=uniform_rank)
    except ValueError as error:
        raise ConfigError([f"{trained.path}: {error}"]) from error
    except (OSError, SafetensorError) as error:
        raise unwritable(out, building, error) from error
    check = _compare_products(trained, building) if without_base else _compare(trained, building)
    ranks = export.module_ranks(trained.layout)
    try:
        write_card(building, describe(trained, "adapter", ranks, [check]))
        building.rename(out)
    except OSError as error:
        raise unwritable(out, building, error) from error
    return [*_told(trained, config, ranks), check, f"adapter: {out}"]


def unwritable(out: Path, building: Path, error: Exception) -> ConfigError:
    """What to tell where `--out` could not be written; nothing is left of it."""
    with contextlib.suppress(OSError):
        checkpoint.remove_folder(building)
    return ConfigError([f"--out {out}: cannot be written ({error}); free some space there, or name another folder"])


def describe(
    trained: Trained, kind: Literal["adapter", "merged"], ranks: Mapping[str, int], checks: list[str]
) -> Described:
    """What the card says."""
    labels, versions = trained.shape.labels, trained.versions
    return Described(kind, trained.config, trained.run_dir, trained.step, ranks, versions, checks, labels)


def _told(trained: Trained, config: Mapping[str, Any], ranks: Mapping[str, int]) -> list[str]:
    lines = [f"{trained.path}: step {trained.step}, {len(ranks)} matrices, total rank {sum(ranks.values())}"]
    heads = {module: own for module, own in trained.layout.site_ranks.items() if len(own) > 1 and any(own)}
    if heads:
        module = max(heads, key=lambda m: sum(heads[m]))
        lines.append(
            f"heads have pairs of their own: each matrix is block-diagonal with the sum of its heads' ranks, largest "
            f"{sum(heads[module])} in {module} ({len(heads[module])} heads of at most {max(heads[module])})"
        )
    return [*lines, *export.serving_notes(config)]


def _check_memory(trained: Trained) -> None:
    need = int(trained.shape.num_base * DTYPES[trained.compute_dtype].itemsize * MEMORY_SHARE)
    free = available_bytes()
    if free is not None and need > free:
        raise ConfigError(
            [
                f"{trained.path}: comparing logits loads the base, which needs about {need / 2**30:.1f} GiB of memory, "
                f"and {free / 2**30:.1f} are free; export on a larger machine, or compare matrix by matrix with "
                "--without-base"
            ]
        )


def _compare(trained: Trained, folder: Path) -> str:
    """A line with the largest logit difference. Raises RuntimeError where it is too large."""
    model = bound_model(trained)
    inputs = probe_inputs(trained, model)
    logits = logits_of(model, inputs)
    del model  # before the base is loaded once more
    base = load_base(trained)
    dequantize_modules(base)  # the same numbers, in linears that PEFT knows
    difference = export.compare_with_peft(folder, base, inputs, logits)
    largest, dtype = float(logits.abs().max()), trained.compute_dtype
    limit = export.LOGIT_TOLERANCE[dtype] * max(1.0, largest)
    if not difference <= limit:
        raise RuntimeError(
            f"PEFT's logits are {difference:.2e} away from training's (limit {limit:.2e}); the adapter was left in "
            f"{folder} and has not got its name"
        )
    return (
        f"read back with PEFT: largest logit difference to training's {difference:.1e} (logits up to {largest:.2f}, "
        f"{dtype}, {logits.shape[1] if logits.dim() == 3 else 1} positions)"
    )


def _compare_products(trained: Trained, folder: Path) -> str:
    """A line with the largest difference of a matrix's product. Raises RuntimeError where it is too large."""
    form, shape = preflight.adapter_form(trained.config), trained.shape
    difference = export.compare_products(
        folder, trained.master, trained.layout, form=form, heads=shape.heads, gates=trained.gates
    )
    limit = export.PRODUCT_TOLERANCE
    if not difference <= limit:
        raise RuntimeError(
            f"a matrix's product read from the folder is {difference:.2e} away from training's, as a share of its "
            f"largest number (limit {limit:.0e}); the adapter was left in {folder} and has not got its name"
        )
    return f"logits not compared; each matrix's product is within {difference:.1e} of training's, as a share"

"""`python -m s4.convert IN OUT`: a checkpoint of the original repository as a folder of `save_pretrained`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from s4.block import S4Block
from s4.convert.blocks import block
from s4.convert.entries import Entries, some, unwrapped
from s4.convert.files import load
from s4.convert.kinds import TRANSFORMS, Options, sites
from s4.convert.layers import layer
from s4.convert.models import form, model
from s4.convert.official import Official
from s4.layer import S4Layer
from s4.model import S4Model
from s4.pretrained import CONFIG, WEIGHTS

_EXAMPLES = """
examples:
  a model of the original's example.py:
    python -m s4.convert checkpoint/ckpt.pth cifar
  a checkpoint of its train.py:
    python -m s4.convert last.ckpt lra --pooling mean --dt-transform softplus
  one layer of a model:
    python -m s4.convert last.ckpt first --part layer --prefix model.layers.0. --dt-transform softplus
  beside the original, in a checkout of it:
    python -m s4.convert layer.pt layer --official ../state-spaces

then, in Python:
  model = s4.S4Model.from_pretrained("cifar")
"""
_PARTS: dict[str, Callable[..., S4Layer | S4Block | S4Model]] = {
    "layer": layer,
    "block": block,
    "model": model,
}
_TAKES = {  # options by the parts that have them
    "prenorm": ("block", "model"),
    "activation": ("block", "model"),
    "dropout": ("block", "model"),
    "tie_dropout": ("block", "model"),
    "pooling": ("model",),
    **dict.fromkeys(Options._fields, ("layer", "block", "model")),
}


def parser() -> argparse.ArgumentParser:
    """The command line. An option that is not given is left to the function, with its default."""
    found = argparse.ArgumentParser(
        "python -m s4.convert",
        description="Converts weights of the original repository, github.com/state-spaces/s4.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    found.add_argument("source", metavar="IN", type=Path, help="a checkpoint or state dict, or .safetensors")
    found.add_argument("folder", metavar="OUT", type=Path, help="for config.json and model.safetensors")
    found.add_argument(
        "--part", choices=tuple(_PARTS), default=None, help="what IN holds, if it cannot be told"
    )
    found.add_argument("--prefix", default="", help="take only the parameters that begin with this")
    found.add_argument("--overwrite", action="store_true", default=False, help="replace what is in OUT")
    found.add_argument(
        "--official", metavar="PATH", type=Path, default=None, help="a checkout to compare with"
    )
    told = found.add_argument_group("what weights do not tell (see help(s4.convert.layer), block, model)")
    told.add_argument("--discretization", choices=("zoh", "bilinear"), help="of diagonal layers")
    for name, of in (("dt", "dt"), ("real", "-Re A"), ("imag", "-Im A")):
        told.add_argument(f"--{name}-transform", choices=TRANSFORMS, help=f"what maps a parameter to {of}")
    told.add_argument("--prenorm", action=argparse.BooleanOptionalAction, help="norms before the layers")
    told.add_argument("--activation", help="between the layer and its output map")
    told.add_argument("--dropout", type=float, help="for more training")
    told.add_argument("--tie-dropout", action=argparse.BooleanOptionalAction, help="one mask for all times")
    told.add_argument("--pooling", choices=("none", "mean", "last"), help="before the decoder")
    return found


def convert(arguments: argparse.Namespace) -> str:
    """What the command line asks for: the folder is written, and a report returned.

    Raises:
        ValueError, TypeError, OSError, ImportError: as `s4.convert` and `save_pretrained` raise them.
    """
    given = vars(arguments)
    source, folder = arguments.source, arguments.folder
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: OUT is the folder to write to")
    there = [name for name in (CONFIG, WEIGHTS) if (folder / name).exists()]
    if there and not arguments.overwrite:
        raise ValueError(f"{folder} already has {some(there)}: give another folder, or --overwrite")
    whole = entries = Entries(load(source))
    if arguments.prefix:
        prefix = unwrapped(arguments.prefix)
        entries = Entries({name: entries[name] for name in entries if name.startswith(prefix)})
    part = form(entries) if arguments.part is None else arguments.part
    options: dict[str, Any] = {name: given[name] for name in _TAKES if name in given}
    if wrong := [name for name in options if part not in _TAKES[name]]:
        name = wrong[0].replace("_", "-")
        raise ValueError(
            f"--{name} is an option of a {' or '.join(_TAKES[wrong[0]])}; {source} is of a {part}"
        )
    made = _PARTS[part](entries, **options)
    lines = [f"{source}: {len(entries)} tensors, of them {len(entries.became)} read"]
    lines += [f"  {key} -> {became}" for key, became in entries.became.items()]
    lines += [f"left out: {some(entries.unread()) if entries.unread() else 'nothing'}"]
    if len(whole) > len(entries):
        lines.append(f"not of {arguments.prefix}: {some([name for name in whole if name not in entries])}")
    lines.append(f"what weights do not tell, as given or by default: {_assumed(made, entries, options)}")
    if arguments.official is not None:
        known = {name: options[name] for name in Options._fields if name in options}
        lines += _differences(arguments.official, entries, Options(**known))
    made.save_pretrained(folder)
    return "\n".join([*lines, f"{folder}: {CONFIG} and {WEIGHTS} of {type(made).__name__}"])


def _assumed(made: S4Layer | S4Block | S4Model, entries: Entries, options: dict[str, Any]) -> str:
    """The options that outputs depend on and that a wrong value of would not be seen by."""
    blocks = made.blocks if isinstance(made, S4Model) else [made]
    config = blocks[0].config()
    taken: dict[str, Any] = {name: config[name] for name in ("prenorm", "activation") if name in config}
    if isinstance(made, S4Model):
        taken["pooling"] = made.pooling
    layer = config.get("layer", config)
    if layer["variant"] == "diag":
        taken["discretization"] = layer["discretization"]
    if any("dt_transform" in site.kind.options for site in sites(entries)):
        taken["dt_transform"] = options.get("dt_transform", "exp")
    return ", ".join(f"{name}={value}" for name, value in taken.items())


def _differences(path: Path, entries: Entries, options: Options) -> list[str]:
    official = Official(path)
    lines = ["largest difference from the original on a random input, relative to the largest output:"]
    for site in sites(entries):
        found = official.difference(entries, site, options)
        where = f"layer {site.layer[:-1]}" if site.layer else "the layer"
        if found is None:
            lines.append(f"  {where}: not compared: version 4 has no such layer")
            continue
        lines.append(
            f"  {where}: {found.float64:.1e} in float64, {found.float32:.1e} in float32; "
            f"of float32 from the original's float64: original {found.theirs:.1e}, s4 {found.ours:.1e}"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; what is wrong ends it with a line of text."""
    try:
        print(convert(parser().parse_args(arguments)))
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.exit(f"s4.convert: {error}")


if __name__ == "__main__":
    main()

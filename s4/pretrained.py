"""Layers, blocks and models in a folder or on the Hugging Face hub: config.json and model.safetensors."""

import importlib.util
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from s4.version import __version__

__all__ = ["Pretrained"]

FORMAT = 1  # of config.json; one that this version cannot read has a larger number
CONFIG, WEIGHTS = "config.json", "model.safetensors"
Modules = Mapping[str, nn.Module]
Me = TypeVar("Me", bound="Pretrained")

# Of torch's modules that a config can describe: what each is made with. A bias is described as there or not.
_ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features", "bias"),
    nn.Embedding: ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "sparse"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine", "bias"),
    nn.RMSNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.BatchNorm1d: ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    nn.Dropout: ("p",),
    nn.Dropout1d: ("p",),
    nn.GELU: ("approximate",),
    nn.GLU: ("dim",),
    nn.ReLU: (),
    nn.SiLU: (),
    nn.Sigmoid: (),
    nn.Tanh: (),
    nn.Identity: (),
}
_TYPES = {kind.__name__: kind for kind in _ARGUMENTS}


class Pretrained(nn.Module):
    """A module that can be written to a folder or to the hub, and made anew from there.

    `S4Layer`, `S4Block` and `S4Model` are such modules.

    Examples:
        >>> model = S4Model(nn.Linear(3, 16), [S4Block(S4Layer(16))], nn.Linear(16, 10))
        >>> again = S4Model.from_config(model.config())  # a new one of the same kind
    """

    def config(self) -> dict[str, Any]:
        """What `from_config` makes a module of this kind with, but for its numbers.

        Returns:
            a dict that JSON can hold.
        """
        raise NotImplementedError

    @classmethod
    def from_config(cls: type[Me], config: Mapping[str, Any], modules: Modules | None = None) -> Me:
        """A new module of the kind that `config()` describes.

        Args:
            config: as `config()` returns it, or JSON of that.
            modules: as in `from_pretrained`.

        Returns:
            the module, with new numbers.

        Raises:
            ValueError, TypeError: an option that does not exist; the message names it.
        """
        raise NotImplementedError

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` to a folder, which is made where it is missing.

        Parameters keep their dtypes; those that are one tensor under two names are written once. Needs the
        packages safetensors and numpy.

        Args:
            folder: where to write; files of these names that are there are replaced.

        Raises:
            ValueError: a part that no config describes, or numbers that are not here (on meta, or sharded).
            ImportError: no safetensors, or no numpy.

        Examples:
            >>> layer = S4Layer(16)
            >>> layer.save_pretrained("folder")
            >>> again = S4Layer.from_pretrained("folder")
            >>> torch.equal(again.C, layer.C)
            True
        """
        save_file = _safetensors(saving=True).save_file
        for name, module in self.named_modules():
            if is_parametrized(module):
                raise ValueError(f"{name or 'this module'} is parametrized: remove that before saving")
        weights, tied = _once(self.state_dict(keep_vars=True))
        content = {"format": FORMAT, "s4": __version__, "type": type(self).__name__, "config": self.config()}
        if tied:
            content["tied"] = tied
        text = json.dumps(content, indent=2) + "\n"
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        partial = {name: path / f".{name}.{os.getpid()}" for name in (WEIGHTS, CONFIG)}
        try:  # both whole before one takes its place
            partial[CONFIG].write_text(text)
            save_file(weights, partial[WEIGHTS], {"format": "pt"})
            partial[WEIGHTS].chmod(partial[CONFIG].stat().st_mode)  # safetensors makes it for its owner alone
            for name, file in partial.items():
                file.replace(path / name)
        finally:
            for file in partial.values():
                file.unlink(missing_ok=True)

    @classmethod
    def from_pretrained(
        cls: type[Me],
        name: str | os.PathLike[str],
        *,
        modules: Modules | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Me:
        """The module that `save_pretrained` or `push_to_hub` wrote, in evaluation mode.

        Args:
            name: a folder, or "owner/name" of a model on the Hugging Face hub, for which huggingface_hub has
                to be installed.
            modules: of a model, "encoder", "norm" or "decoder" where these are none that a config describes:
                `config.json` then has no more than the name of their class. They get the saved parameters.
            device: where to; the CPU if not given.
            revision, token, cache_dir, local_files_only: of the hub, as `huggingface_hub` takes them.

        Returns:
            the module, in evaluation mode.

        Raises:
            FileNotFoundError: neither such a folder nor such a model.
            ValueError: files of another kind or a newer format, or weights that do not fit the config; the
                message names the parameters.
            ImportError: no safetensors, or no huggingface_hub.

        Examples:
            >>> model = S4Model(nn.Embedding(50, 16), [S4Block(S4Layer(16))], nn.Linear(16, 50))
            >>> model.save_pretrained("folder")
            >>> S4Model.from_pretrained("folder").training
            False
        """
        load_file = _safetensors().load_file
        path = Path(name)
        if not path.is_dir():
            path = _download(str(name), revision, token, cache_dir, local_files_only)
        for each in (CONFIG, WEIGHTS):
            if not (path / each).is_file():
                raise FileNotFoundError(f"{path} has no {each}: {cls.__name__}.save_pretrained writes it")
        content = _read(path / CONFIG, cls)
        with torch.device("meta"):  # shapes alone: no number is drawn
            model = cls.from_config(content["config"], modules)
        try:
            found: dict[str, Tensor] = load_file(path / WEIGHTS, device=str(device or "cpu"))
        except Exception as error:  # a class of its own, which is no OSError
            raise ValueError(f"{path / WEIGHTS} cannot be read: {error}") from error
        # Copies: aligned as torch aligns its own, on which the last digit of products depends.
        weights = {each: value.clone() for each, value in found.items()}
        tied = {again: first for again, first in content.get("tied", {}).items() if first in weights}
        weights |= {again: weights[first] for again, first in tied.items()}
        _check_fit(model, weights, path)
        model.load_state_dict(weights, assign=True)
        for again, first in tied.items():
            owner, _, leaf = again.rpartition(".")
            other, _, same = first.rpartition(".")
            setattr(model.get_submodule(owner), leaf, getattr(model.get_submodule(other), same))
        return model.to(device or "cpu").eval()  # what is in no file, too: buffers of the user's modules

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload model",
    ) -> str:
        """Write `save_pretrained`'s files and a short card to the hub, in one commit.

        Args:
            name: "owner/name"; made where it is missing.
            private, token, revision, commit_message: as `huggingface_hub.HfApi` takes them.

        Returns:
            the address of the commit.

        Raises:
            ImportError: no huggingface_hub or safetensors.
            OSError: what huggingface_hub raises passes as it is.
        """
        api = _hub().HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            found = str(api.create_repo(name, private=private, exist_ok=True).repo_id)
            if not api.file_exists(found, "README.md", revision=revision):
                (Path(folder) / "README.md").write_text(_card(type(self).__name__, found))
            commit = api.upload_folder(
                repo_id=found, folder_path=folder, revision=revision, commit_message=commit_message
            )
        return str(commit.commit_url)


def described(module: nn.Module | None) -> dict[str, Any] | None:
    """A module as JSON has it: its type and arguments, or only the full name of a type that is not known."""
    if module is None:
        return None
    kind = nn.BatchNorm1d if isinstance(module, nn.SyncBatchNorm) else type(module)
    numbers = [str(i) for i in range(len(module._modules))]
    if kind is nn.Sequential and [*module._modules] == numbers:  # of modules that may be there twice
        return {"type": "Sequential", "modules": [described(each) for each in module._modules.values()]}
    if kind not in _ARGUMENTS or _changed(module):
        return {"type": f"{kind.__module__}.{kind.__qualname__}"}
    values: dict[str, Any] = {name: getattr(module, name, None) for name in _ARGUMENTS[kind]}
    if "bias" in values:
        values["bias"] = values["bias"] is not None
    if "normalized_shape" in values:
        values["normalized_shape"] = list(values["normalized_shape"])
    with torch.device("meta"):
        made = kind(**values)
    if made.extra_repr() != module.extra_repr() or {*made.state_dict()} != {*module.state_dict()}:
        return {"type": f"{kind.__module__}.{kind.__qualname__}"}
    return {"type": kind.__name__, **values}


def described_part(part: Pretrained, kind: type[Pretrained], name: str) -> dict[str, Any]:
    """The config of a part, of which `kind.from_config` makes one like it.

    Raises:
        ValueError: a subclass that computes something else.
    """
    if type(part).forward is not kind.forward:
        raise ValueError(
            f"{name} is {type(part).__name__}, with a forward of its own, which no config of {kind.__name__} "
            "describes: save the state_dict of the whole instead"
        )
    return part.config()


def built(config: Any, name: str, modules: Modules | None = None) -> nn.Module | None:
    """The module that `described` told of, or the one that is given under its name.

    Raises:
        ValueError: one of a type that is not known, which has to be given.
    """
    if modules is not None and name in modules:
        return modules[name]
    if config is None:
        return None
    if not isinstance(config, Mapping):
        raise TypeError(f"a config of {name} must be a dict or None, got {type(config).__name__}")
    arguments = dict(config)
    kind = arguments.pop("type", None)
    if kind == "Sequential":
        parts = [built(each, f"{name}.{i}", modules) for i, each in enumerate(arguments["modules"])]
        return nn.Sequential(*(part for part in parts if part is not None))
    if kind not in _TYPES:
        raise ValueError(f"{name} is {kind}, which no config describes: give it as modules={{{name!r}: ...}}")
    check_known(arguments, _ARGUMENTS[_TYPES[kind]], f"{kind} of {name}")
    return _TYPES[kind](**arguments)


def check_known(config: Any, names: Sequence[str], of: str) -> None:
    """Raise unless this is a config with no entries but these."""
    if not isinstance(config, Mapping):
        raise TypeError(f"a config of {of} must be a dict, got {type(config).__name__}")
    if unknown := [name for name in config if name not in names]:
        raise ValueError(
            f"a config of {of} has no {', '.join(map(repr, unknown))}; it has {', '.join(names)}"
        )


def check_unused(modules: Modules | None, parts: Mapping[str, nn.Module | None], of: str) -> None:
    """Raise ValueError for a module that is given for a place which is not there."""
    used = [each for part in parts.values() if part is not None for each in part.modules()]
    if wrong := [name for name, module in (modules or {}).items() if not any(module is u for u in used)]:
        takes = f"only {', '.join(parts)}, and what is in a Sequential there" if parts else "none"
        raise ValueError(f"modules of {of} may be given for {takes}, got {', '.join(map(repr, wrong))}")


def _changed(module: nn.Module) -> bool:
    """Whether a module has other parts than its type comes with: quantised, parametrised."""
    return bool(module._modules) or "forward" in module.__dict__


def _once(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors for a file, contiguous on the CPU, and by their names those that are another one again."""
    first: dict[int, str] = {}
    weights, tied = {}, {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor to be saved, got {type(value).__name__}")
        if value.is_meta or type(value) not in (Tensor, nn.Parameter):
            got = "one on meta" if value.is_meta else type(value).__name__
            raise ValueError(
                f"{name} must be a plain tensor in memory to be saved, got {got}: gather it first"
            )
        if id(value) in first:
            tied[name] = first[id(value)]
            continue
        first[id(value)] = name
        weights[name] = value.detach().cpu().contiguous().clone()  # memory of its own, as the format asks
    return weights, tied


def _read(file: Path, cls: type[Pretrained]) -> dict[str, Any]:
    """What `config.json` holds, of this class."""
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("config"), dict)
        or "format" not in content
    ):
        what = f"{file} was not written by save_pretrained of s4: it has no 'format' and 'config'"
        if isinstance(content, dict) and content.get("model_type") == "s4":
            what += ". It is of s4.transformers: load it with that, and take the model's s4()"
        raise ValueError(what)
    if content["format"] != FORMAT:
        raise ValueError(
            f"{file} has format {content['format']!r}, of s4 {content.get('s4')}; s4 {__version__}, which is "
            f"installed, reads format {FORMAT}: install that version or a newer one"
        )
    names = [each.__name__ for each in cls.__mro__]
    if (kind := content.get("type")) not in names:
        raise ValueError(f"{file} is of class {kind}: load it with {kind}.from_pretrained, not {names[0]}'s")
    return content


def _check_fit(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError unless the weights have all names and shapes of the model's, and no others."""
    wanted = model.state_dict()
    wrong = [
        f"{name} has shape {tuple(weights[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in weights and weights[name].shape != wanted[name].shape
    ]
    wrong += [f"{name} is missing" for name in wanted if name not in weights]
    wrong += [f"{name} is in no such model" for name in weights if name not in wanted]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{path / WEIGHTS} does not fit {CONFIG}: {', '.join(wrong[:5])}{more}")


def _safetensors(saving: bool = False) -> Any:
    try:
        import safetensors.torch

        if saving and importlib.util.find_spec("numpy") is None:
            raise ImportError("safetensors writes by numpy, and does not bring it")
    except ImportError as error:
        raise ImportError(
            "save_pretrained and from_pretrained need: pip install safetensors numpy, or s4-pytorch[hub]"
        ) from error
    return safetensors.torch


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("models of the hub need: pip install huggingface_hub") from error
    return huggingface_hub


def _download(
    name: str,
    revision: str | None,
    token: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    """The folder in the hub's cache that holds a model."""
    if Path(name).is_file():
        raise FileNotFoundError(
            f"{name} is a file: from_pretrained takes the folder that save_pretrained wrote"
        )
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no folder {name}")
    try:
        hub = _hub()
    except ImportError as error:
        raise FileNotFoundError(f"there is no folder {name}, and for the hub: {error}") from error
    try:
        found = hub.snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=[CONFIG, WEIGHTS],
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"there is no folder {name}, and the hub gave none: {error}") from error
    return Path(found)


def _card(kind: str, name: str) -> str:
    """What a visitor of the hub reads, with the entries by which the hub sorts models."""
    return (
        "---\nlibrary_name: s4\ntags:\n- s4\n- state-space-model\n---\n\n"
        f"An `{kind}` of structured state space layers (S4, arXiv 2111.00396):\n\n"
        f'```python\nfrom s4 import {kind}\n\nmodel = {kind}.from_pretrained("{name}")\n```\n'
    )

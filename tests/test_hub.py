"""Models of the Hugging Face hub: read from its cache, and handed to its library."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import build, inputs

from s4 import S4Layer, S4Model

hub = pytest.importorskip("huggingface_hub")


def equal(a: S4Model, b: S4Model) -> None:
    u = inputs(2)
    assert torch.equal(a.eval()(u), b.eval()(u))


@pytest.mark.promise(
    "other libraries", "`from_pretrained` of a model on the Hugging Face hub, and `push_to_hub`"
)
def test_a_model_of_the_hub(tmp_path: Path) -> None:
    """From the cache that huggingface_hub keeps, laid out as it does, with no network."""
    model = build("mixed", "final norm", "mean")
    cached = tmp_path / "models--someone--small"
    model.save_pretrained(cached / "snapshots" / "0123abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abc")
    again = S4Model.from_pretrained("someone/small", cache_dir=tmp_path, local_files_only=True)
    equal(model, again)
    with pytest.raises(FileNotFoundError, match="no folder someone/other, and the hub gave none"):
        S4Model.from_pretrained("someone/other", cache_dir=tmp_path, local_files_only=True)
    for name in ("./someone/small", "a/b/c", "no such name"):
        with pytest.raises(FileNotFoundError, match=f"no folder {name}"):
            S4Model.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
    weights = cached / "snapshots" / "0123abc" / "model.safetensors"
    with pytest.raises(
        FileNotFoundError, match=r"model.safetensors is a file: from_pretrained takes the folder"
    ):
        S4Model.from_pretrained(weights)


def test_push_to_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed to huggingface_hub: a repository, and one commit of three files that can be read."""
    made: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None) -> None:
            made["token"] = token

        def create_repo(self, name: str, private: bool | None, exist_ok: bool) -> Any:
            made.update(name=name, private=private)
            assert exist_ok
            return type("Url", (), {"repo_id": f"me/{name}"})

        def file_exists(self, name: str, file: str, revision: str | None) -> bool:
            return False

        def upload_folder(self, repo_id: str, folder_path: str, **keywords: object) -> Any:
            made.update(repo_id=repo_id, **keywords)
            made["files"] = sorted(path.name for path in Path(folder_path).iterdir())
            made["card"] = (Path(folder_path) / "README.md").read_text()
            made["model"] = S4Model.from_pretrained(folder_path)
            return type("Commit", (), {"commit_url": "there"})

    monkeypatch.setattr(hub, "HfApi", Api)
    model = build()
    assert model.push_to_hub("small", private=True, token="secret") == "there"
    equal(model, made["model"])
    assert made["files"] == ["README.md", "config.json", "model.safetensors"]
    assert 'S4Model.from_pretrained("me/small")' in made["card"]
    assert (made["name"], made["private"], made["token"]) == ("small", True, "secret")


def test_missing_packages_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    S4Layer(6, 8).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    S4Layer.from_pretrained(tmp_path)  # a folder needs none
    with pytest.raises(FileNotFoundError, match=r"no folder someone/small.*pip install huggingface_hub"):
        S4Layer.from_pretrained("someone/small")
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        S4Layer(6, 8).push_to_hub("someone/small")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "numpy", None)  # which safetensors does not bring
        with pytest.raises(ImportError, match="pip install safetensors numpy"):
            S4Layer(6, 8).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (S4Layer(6, 8).save_pretrained, S4Layer.from_pretrained):
        with pytest.raises(ImportError, match="pip install safetensors"):
            call(tmp_path)

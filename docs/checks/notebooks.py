"""The notebooks: their execution, and their pages in the site.

`python docs/checks/notebooks.py` executes the notebooks of docs/notebooks, or those named, and writes their
outputs into the files.
"""

import base64
import io
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def execute(path: Path, folder: Path) -> NotebookNode:
    """The notebook after it ran in that folder, tidied."""
    notebook = nbformat.read(path, as_version=4)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    return tidy(notebook)


def tidy(notebook: NotebookNode) -> NotebookNode:
    """Without what differs from one execution to the next, and without sliders, which need Jupyter."""
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", NotebookNode()
        for output in cell.get("outputs", []):
            output.get("metadata", {}).clear()
            data = output.get("data", {})
            data.pop("application/vnd.jupyter.widget-view+json", None)
            if "image/png" in data:
                data.pop("text/plain", None)
                data["image/png"] = _smaller(data["image/png"])
        if cell.cell_type == "code":
            cell.outputs = _joined(each for each in cell.outputs if not _is_of_sliders(each))
    return notebook


def _joined(outputs: Iterable[NotebookNode]) -> list[NotebookNode]:
    """With text that follows on text as one output: in how many pieces it came is chance."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == "stream" and output.get("name") == joined[-1].get("name"):
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _smaller(png: str) -> str:
    """A picture in 64 colours, which is a third of the size."""
    small = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(64).save(
        small, "png", optimize=True
    )
    return base64.b64encode(small.getvalue()).decode()


def _is_of_sliders(output: NotebookNode) -> bool:
    return output.get("data", {}).get("text/plain", "").startswith("interactive(")


def pages(files: Files, config: Any) -> list[File]:
    """A page for each notebook of the site, with files for its pictures."""
    made = []
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        name = notebook.src_uri.removesuffix(".ipynb")
        text, pictures = markdown(nbformat.read(notebook.abs_src_path, as_version=4), Path(name).name)
        made.append(File.generated(config, f"{name}.md", content=text))
        for picture, content in pictures.items():
            made.append(File.generated(config, str(Path(name).parent / picture), content=content))
    return made


def markdown(notebook: NotebookNode, name: str) -> tuple[str, dict[str, bytes]]:
    """The text of a notebook's page, and its pictures by their names."""
    parts, pictures = [], {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            text = output.get("text") or output.get("data", {}).get("text/plain")
            if text:
                parts.append(f"```text\n{text.rstrip()}\n```")
            if png := output.get("data", {}).get("image/png"):
                picture = f"{name}-{len(pictures) + 1}.png"
                pictures[picture] = base64.b64decode(png)
                parts.append(f"![What the code above draws]({picture})")
    title, _, rest = "\n\n".join(parts).partition("\n")
    note = (
        f"This page is a notebook: [download it]({name}.ipynb) and run it, or move its sliders, in Jupyter."
    )
    return f"{title}\n\n{note}\n{rest}\n", pictures


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(execute(path, Path(folder)), path)

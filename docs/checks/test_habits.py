"""What the folder of the repository promises: how to cite it, what make offers, forms that can be read."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from pages import ROOT

import s4

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def test_the_citation_is_of_this_version_and_names_the_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == s4.__version__
    assert {"message", "title", "authors", "license"} <= set(cited)
    (paper,) = cited["references"]
    assert "2111.00396" in paper["url"]
    assert paper["title"] in (ROOT / "README.md").read_text()


def test_make_alone_tells_of_every_target() -> None:
    told = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    assert set(re.findall(r"^  make (\S+) +\S", told, re.MULTILINE)) == set(phony[1].split())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_forms_ask_something_that_has_to_be_said(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= set(content)
    fields = [part for part in content["body"] if part["type"] != "markdown"]
    names = [part["id"] for part in fields]
    assert len(set(names)) == len(names)
    assert all(part["attributes"]["label"] for part in fields)
    assert any(part.get("validations", {}).get("required") for part in fields)


def test_there_are_forms() -> None:
    assert [form.stem for form in FORMS] == ["bug", "feature"]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md"])
def test_links_to_files_of_the_repository_lead_somewhere(name: str) -> None:
    page = ROOT / name
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    assert targets or name == "SECURITY.md"
    assert [target for target in targets if not (page.parent / target).exists()] == []

"""`make release` refuses what is no release, and the changelog knows the version."""

from __future__ import annotations

import re
import subprocess
import tarfile
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import nsa_convert

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def release() -> ModuleType:
    loader = SourceFileLoader("release", str(ROOT / ".ci" / "release"))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path) -> Path:
    """Return a committed project that can be released."""
    (tmp_path / "nsa_convert").mkdir()
    (tmp_path / "nsa_convert" / "__init__.py").write_text('__version__ = "3.1.4"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n## 3.1.4 - 2026-01-31\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


def test_the_changelog_begins_with_what_is_next_and_has_this_version():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(nsa_convert.__version__)} - \d{{4}}-\d\d-\d\d", headings[1])


def test_the_citation_names_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert cited["version"] == nsa_convert.__version__
    assert f"## {cited['version']} - {cited['date-released']}" in changelog


def test_the_hosting_runs_what_a_checkout_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text())


def test_the_version_is_read_without_importing(release):
    assert release.version_of(ROOT) == nsa_convert.__version__


def test_a_committed_tree_with_a_section_is_released(release, tree):
    assert release.problems(tree) == []


@pytest.mark.parametrize(
    "text", ["## 3.1.4\n", "## Unreleased\n", "## 3.1.40 - 2026-01-31\n", "3.1.4 - 2026-01-31\n"]
)
def test_a_version_without_a_section_is_refused(release, tree, text):
    (tree / "CHANGELOG.md").write_text(text)
    assert "has no section '## 3.1.4 -" in release.problems(tree)[0]


@pytest.mark.parametrize("name", ["CHANGELOG.md", "new.txt"])
def test_changes_in_no_commit_are_refused(release, tree, name):
    with (tree / name).open("a") as file:
        file.write("more\n")
    (problem,) = release.problems(tree)
    assert name in problem


def test_a_tracked_file_must_be_in_the_sdist(release, tree, tmp_path_factory):
    sdist = tmp_path_factory.mktemp("dist") / "x-3.1.4.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        archive.add(tree / "CHANGELOG.md", "x-3.1.4/CHANGELOG.md")
    assert release.lacking(tree, sdist) == ["nsa_convert/__init__.py"]

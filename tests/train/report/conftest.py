"""The folder of a finished run."""

import shutil
from pathlib import Path

import pytest
from run_folders import make_run

from train.run.folder import RunFolder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "letters")


@pytest.fixture
def run(finished, tmp_path):
    """A copy, to be changed."""
    return RunFolder(Path(shutil.copytree(finished.folder, tmp_path / "letters")))

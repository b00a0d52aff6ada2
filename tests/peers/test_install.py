"""The script that makes the environments of the peers, with requirements that need no network."""

import subprocess
import sys

import install
import pytest


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """The requirements file of a peer "tiny", which needs nothing yet."""
    requirements = tmp_path / "tiny.txt"
    requirements.write_text("# nothing: 20 MB, a second\n")
    monkeypatch.setattr(install, "REQUIREMENTS", {"tiny": requirements})
    return requirements


@pytest.mark.slow
def test_an_environment_is_made_once_and_again_for_other_versions(peer, tmp_path, capsys):
    python = tmp_path / "peers" / "tiny" / "bin" / "python"
    assert install.make("tiny", tmp_path / "peers")
    assert "tiny: installing into" in (said := capsys.readouterr().out)
    assert "(nothing: 20 MB, a second)" in said
    assert "tiny: done in " in said
    prefix = subprocess.run([python, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True)
    assert prefix.stdout.strip() == str(python.parents[1])
    assert install.make("tiny", tmp_path / "peers")
    assert capsys.readouterr().out == f"tiny: {python.parents[1]} is complete\n"

    peer.write_text("# nothing\n./missing.whl\n")
    assert not install.is_complete(python.parents[1], peer)
    assert not install.make("tiny", tmp_path / "peers")
    assert "tiny: pip failed: " in (said := capsys.readouterr().err)
    assert "missing.whl" in said
    assert not (python.parents[1] / install.INSTALLED).exists()


def test_every_peer_says_what_it_takes_and_pins_its_versions():
    assert install.REQUIREMENTS
    for path in install.REQUIREMENTS.values():
        first, *lines = path.read_text().splitlines()
        assert first.startswith("# ")
        assert "GB, " in first
        assert all("==" in line or line.startswith("--extra-index-url https://") for line in lines)


def test_an_unknown_peer_is_refused(peer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["install.py", "tyni", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        install.main()
    assert "no peer tyni; there are tiny" in capsys.readouterr().err

"""The installed package: the console command, and a wheel in an environment of its own."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import jax
import pytest

import jaxsteer
from jaxsteer.io import save_steering
from train.__main__ import COMMANDS
from train.cli import find_config_file

ROOT = Path(__file__).resolve().parents[1]


GENERATE = """
import sys
import jax.numpy as jnp
import jaxsteer, train
from jaxsteer.io import load_model, load_steering

loaded = load_model(sys.argv[1])
file = load_steering(sys.argv[2])
model = jaxsteer.Model(loaded.config, file.plan)
prompts = jaxsteer.make_batch(jnp.array([[5, 6, 7]]))
generated = jaxsteer.generate(model, loaded.base, file.steering, prompts, max_new_tokens=4, stop_tokens=())
print(jaxsteer.__file__, train.__file__, "new tokens:", generated.tokens.shape)
"""


def jaxsteer_command(*arguments, python=sys.executable, cwd=ROOT, **environment):
    command = [python, "-m", "train", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=os.environ | {"COLUMNS": "200"} | environment
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_program(name):
    spec = importlib.util.find_spec(f"train.{name}")
    assert spec is not None
    source = Path(spec.origin)
    program = source.with_name("__main__.py") if source.name == "__init__.py" else source
    assert 'if __name__ == "__main__":' in program.read_text()


def test_help_lists_the_commands_without_importing_jax():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "train", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "train" in imported
    assert not {"jax", "numpy", "tyro", "jaxsteer"} & imported


def test_no_arguments_show_the_help():
    assert jaxsteer_command().stdout == jaxsteer_command("--help").stdout


def test_version():
    assert jaxsteer_command("--version").stdout == f"jaxsteer {jaxsteer.__version__}\n"


def test_an_unknown_command_is_refused_with_those_there_are():
    done = jaxsteer_command("trian")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: jaxsteer has no command 'trian'; the commands are {', '.join(COMMANDS)}\n"
    assert "no command 'evalute' (did you mean evaluate?); the" in jaxsteer_command("evalute").stderr


def test_without_the_extra_a_command_says_how_to_install_it(tmp_path):
    """-S leaves out site-packages, so that nothing but this repository can be found."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "train", "sft"], capture_output=True, text=True, cwd=ROOT, env={"PATH": ""}
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert 'pip install "jaxsteer[train]"' in done.stderr
    assert "tyro" in done.stderr


def test_a_command_gets_its_arguments_and_reports_errors_in_a_sentence():
    done = jaxsteer_command("sft", "no_such_config")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no_such_config: no such config file")
    assert "listops_smollm2" in done.stderr


def test_a_shipped_config_is_found_from_any_folder(tmp_path, monkeypatch):
    """By its name, and by its path in a clone; a file that is there comes first."""
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "configs" / "theory.py"
    assert find_config_file("theory") == find_config_file("configs/theory.py") == shipped
    for wrong in ("theory.py", "other/theory.py", "configs/common.py", "configs/theory"):
        with pytest.raises(ValueError, match="no such config file"):
            find_config_file(wrong)
    Path("configs").mkdir()
    Path("configs/theory.py").touch()
    assert find_config_file("configs/theory.py") == Path("configs/theory.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason="builds the wheel offline")
    folder = tmp_path_factory.mktemp("wheel")
    code = f"import hatchling.build as b; print(b.build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Python of an environment with the wheel; its requirements come from the environment of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    own = next((folder / "lib").glob("python*/site-packages"))
    # After the wheel's own folder in sys.path, and without running .pth files: an editable install there is not seen.
    (own / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.slow
def test_the_wheel_holds_what_the_programs_read(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"train/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    programs = [path.name for path in (ROOT / "tests" / "peers").glob("*_peer.py") if not path.match("test_*")]
    peers = {f"train/peer_programs/{name}" for name in programs}
    assert {name for name in names if name.startswith("train/peer_programs/")} == peers
    folders = [ROOT / "train" / "serve" / "page", ROOT / "train" / "report" / "templates"]
    pages = {path.relative_to(ROOT).as_posix() for folder in folders for path in folder.iterdir()}
    assert "train/serve/page/index.html" in pages
    assert configs | pages | {"train/neutral.txt", "train/plan/topologies.txt", "jaxsteer/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == {"jaxsteer", "train", f"jaxsteer-{jaxsteer.__version__}.dist-info"}


@pytest.mark.slow
def test_the_wheel_steers_from_python_and_from_the_console(installed, tmp_path, golden_llama):
    plan = jaxsteer.parse_plan(["nonlinear(rank=2) @ block"], golden_llama.config)
    steering = jaxsteer.init_steering(plan, golden_llama.config, jax.random.key(0))
    file = tmp_path / "steering.safetensors"
    save_steering(file, steering, plan, model_name="tiny-llama", config=golden_llama.config)
    done = subprocess.run(
        [installed, "-c", GENERATE, ROOT / "tests/golden/tiny_llama", file.name],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(installed.parents[1])) == 2  # both packages are the wheel's
    assert "new tokens: (1, 4)" in done.stdout

    console = installed.with_name("jaxsteer")
    shown = subprocess.run([console, "inspect", file.name], capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "tiny-llama" in shown.stdout
    helped = subprocess.run([console, "sft", "listops_smollm2", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert helped.returncode == 0, helped.stderr
    assert "runs/listops_smollm2" in helped.stdout

"""`make gpu-check` hides no failure, does not fail where there is no GPU, and finds the Python that sees one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "gpu_check.sh"
PYTHON = """#!/bin/sh
case "$*" in
  *"-m pytest -m gpu"*) echo "tests run by $0"; {run};;
  *"print(torch.cuda.is_available())"*) {device};;
  *version_info*) exit {too_old};;
  *find_spec*) printf '%s' '{lacks}';;
  *"-m pip install"*) printf 'no network' >&2; exit 1;;
  *"-m venv"*) mkdir -p .venv-gpu/bin; cp beside .venv-gpu/bin/python;;
  *purelib*) echo .venv-gpu;;
  *) exit 0;;
esac
"""


class Machine:
    """A checkout in which there is nothing but the script; its Pythons say what a test wants."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"PYTHON": str(folder / "own"), "CUDA_VISIBLE_DEVICES": ""}
        (folder / "deploy").mkdir()
        shutil.copy(SCRIPT, folder / "deploy")
        self.program("deploy/setup.sh", "#!/bin/sh\nmkdir -p .venv/bin; cp new .venv/bin/python\n")

    def program(self, name: str, text: str) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)

    def python(
        self, name: str, sees_cuda: str = "True", run: str = "exit 0", lacks: str = "", too_old: int = 0
    ) -> None:
        """`sees_cuda`: what its torch says; "": it cannot be imported. `run` takes the place of the tests."""
        device = f"echo {sees_cuda}" if sees_cuda else "echo ImportError >&2; exit 1"
        self.program(name, PYTHON.format(run=run, device=device, lacks=lacks, too_old=too_old))

    def check(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "deploy/gpu_check.sh"], cwd=self.folder, env=self.environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_its_exit_code_is_that_of_the_tests(machine: Machine, code: int) -> None:
    machine.python("own", run=f"exit {code}")
    done = machine.check()
    assert done.returncode == code, done.stderr
    assert f"tests run by {machine.folder / 'own'}" in done.stdout


@pytest.mark.parametrize(("category", "code"), [("FutureWarning", 0), ("UserWarning", 0), ("ResourceWarning", 1)])
def test_what_the_machines_packages_announce_is_no_error(machine: Machine, category: str, code: int) -> None:
    machine.python("own", run=f'exec {sys.executable} "$@"')
    machine.program("pytest.ini", "[pytest]\nfilterwarnings = error\nmarkers = gpu: needs one\n")
    warns = f"import pytest, warnings\n@pytest.mark.gpu\ndef test_it(): warnings.warn('old', {category})\n"
    machine.program("test_it.py", warns)
    done = machine.check()
    assert done.returncode == code, done.stdout


@pytest.mark.parametrize(("sees_cuda", "code"), [("True", 0), ("False", 0), ("", 1)])
def test_where_the_own_python_sees_none_a_new_one_is_asked(machine: Machine, sees_cuda: str, code: int) -> None:
    machine.python("own", sees_cuda="")
    machine.python("new", sees_cuda)
    done = machine.check()
    assert done.returncode == code, done.stderr
    assert (f"tests run by {machine.folder}/.venv/bin/python" in done.stdout) == (sees_cuda == "True")
    assert ("nothing to check" in done.stdout) == (sees_cuda == "False")


def test_a_gpu_that_torch_does_not_see_is_no_machine_without_one(machine: Machine) -> None:
    machine.python("own", sees_cuda="False")
    machine.python("new", sees_cuda="False")
    machine.program("bin/nvidia-smi", "#!/bin/sh\necho 'GPU 0: some card'\n")
    machine.environment["PATH"] = f"{machine.folder / 'bin'}:{machine.environment['PATH']}"
    assert "nothing to check" in machine.check().stdout  # CUDA_VISIBLE_DEVICES hides it
    del machine.environment["CUDA_VISIBLE_DEVICES"]
    done = machine.check()
    assert done.returncode == 1 and "does not see it" in done.stderr and "nothing to check" not in done.stdout


def test_a_python_that_is_too_old_is_not_taken(machine: Machine) -> None:
    machine.python("own", too_old=1)
    machine.python("new")
    done = machine.check()
    assert done.returncode == 0 and f"tests run by {machine.folder}/.venv/bin/python" in done.stdout, done.stderr


def test_an_older_venv_that_sees_it_is_taken(machine: Machine) -> None:
    machine.python("own", lacks="aiozmq ")
    machine.python(".venv/bin/python")
    done = machine.check()
    assert done.returncode == 0 and f"tests run by {machine.folder}/.venv/bin/python" in done.stdout, done.stderr


@pytest.mark.parametrize("still_lacks", ["", "aiozmq "])
def test_what_the_own_python_lacks_is_added_beside_it(machine: Machine, still_lacks: str) -> None:
    machine.python("own", lacks="aiozmq etcd3 ")
    machine.python("beside", lacks=still_lacks)
    machine.python(".venv/bin/python", sees_cuda="False")  # of a torch for CPUs
    done = machine.check()
    assert "has no aiozmq etcd3:" in done.stderr
    assert done.returncode == (1 if still_lacks else 0), done.stderr
    assert (f"tests run by {machine.folder}/.venv-gpu/bin/python" in done.stdout) != bool(still_lacks)
    assert ("Without a network" in done.stderr) == bool(still_lacks)

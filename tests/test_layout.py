"""The layout that every other file relies on: packages, one-way imports, a light start, the wheel."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"invdiff": ROOT / "invdiff", "invdiff.operators": ROOT / "operators", "invdiff.cli": ROOT / "cli"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# A module imports from rows above its own and from its own package only; a new module gets a place here.
ROWS = (
    "errors stopping",
    "linalg schedule draws files intensity noise phantom_shapes",
    "noise_coils hdf5 ismrmrd_header destination",
    "operator formats provenance metrics measurement phantom samplers ismrmrd_lines",
    "operators problem volume report measurement_file ismrmrd_shots",
    "priors coupling simulate overview canvas kspace ismrmrd_file",
    "data_space",
    "data_step",
    "solvers case drawing_ct drawing_mri raw",
    "ct_case mri_case restoration drawing samples",
    "opening configure fingerprint position fitting latent training_report",
    "checkpoint",
    "solving",
    "runner",
    "output plan",
    "cli",
    "__main__",
)
# What siblings may know besides: the interfaces, never each other's classes.
SIBLINGS = {
    "formats": "errors files intensity",
    "operators": "errors linalg operator files formats",
    "priors": "errors linalg schedule files intensity volume",
    "samplers": "errors linalg schedule draws",
    "solvers": "errors linalg schedule draws samplers operator problem coupling data_step data_space priors.base",
}


def modules():
    """Every source file of the package by its module name; a package stands for its ``__init__.py``."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path):
    """Module names of all import statements, wherever they stand; relative ones keep their leading dots."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            inner = [f"{name}.{alias.name}" for alias in node.names if f"{name}.{alias.name}" in MODULES]
            yield from inner or [name]


def own_imports(name):
    """What a module takes from the package, without ``invdiff.``."""
    return {i.removeprefix("invdiff.") for i in imports(MODULES[name]) if i.startswith("invdiff.")}


def python(*args, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_every_folder_with_code_is_in_the_package_list():
    found = {name.rpartition(".")[0] if path.name != "__init__.py" else name for name, path in MODULES.items()}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(found)
    assert all((path.parent / "__init__.py").exists() for path in MODULES.values())


@pytest.mark.parametrize("name", MODULES)
def test_imports_are_absolute(name):
    wrong = [i for i in imports(MODULES[name]) if i.startswith(".") or i.split(".")[0] in ("operators", "cli")]
    assert not wrong, f"{name}: write {', '.join('invdiff.' + i.strip('.') for i in wrong)}"


@pytest.mark.parametrize("name", [name for name in MODULES if name != "invdiff"])
def test_imports_point_one_way(name):
    row = {module: k for k, line in enumerate(ROWS) for module in line.split()}
    own = name.split(".")[1]
    assert own in row, f"{name}: give it a place in ROWS"
    for target in own_imports(name):
        top = target.split(".")[0]
        assert top == own or row[top] < row[own], f"{name} imports {target}, which is not in a row above it"


@pytest.mark.parametrize("package", SIBLINGS)
def test_siblings_do_not_know_each_other(package):
    allowed = (package, *SIBLINGS[package].split())
    for name in MODULES:
        if name.split(".")[1:2] == [package]:
            wrong = [i for i in own_imports(name) if not any(i == a or i.startswith(a + ".") for a in allowed)]
            assert not wrong, f"{name} imports {wrong}; {package} may import {SIBLINGS[package]}"


def test_the_import_tests_see_violations(tmp_path):
    source = tmp_path / "sample.py"
    source.write_text("from . import a\nfrom invdiff import runner\nimport cli\ndef f():\n    import invdiff.volume\n")
    assert list(imports(source)) == [".", "invdiff.runner", "cli", "invdiff.volume"]


@pytest.mark.parametrize("folder", ["operators", "cli"])
def test_a_second_identity_is_refused(folder):
    done = python("-c", f"import {folder}")
    assert done.returncode != 0
    assert f"ImportError: import invdiff.{folder}, not {folder}" in done.stderr


COMMANDS = ([], ["reconstruct"], ["simulate"], ["evaluate"], ["operators"], ["solvers"], ["priors"])


def test_import_and_help_load_no_heavy_package():
    code = f"""
import sys
import invdiff, invdiff.operators, invdiff.priors, invdiff.solvers
from invdiff.cli import main
for command in {COMMANDS}:
    try:
        main([*command, "--help"])
    except SystemExit as end:
        assert not end.code, command
print("loaded:", sorted({{"torch", "deepinv", "scipy", "nibabel", "matplotlib"}} & set(sys.modules)))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_python_m_invdiff_is_the_command():
    done = python("-m", "invdiff", "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("invdiff ") and "research use only" in done.stdout


def test_top_level_names_resolve():
    import invdiff

    for name in invdiff.__all__:
        assert getattr(invdiff, name).__name__ == name
    assert set(invdiff.__all__) < set(dir(invdiff))
    with pytest.raises(AttributeError, match="invdiff"):
        _ = invdiff.no_such_name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Names inside a wheel built offline from a copy, so that no ``build/`` is left in the checkout."""
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip(f"setuptools {version('setuptools')} is too old to build the wheel: install setuptools>=77")
    source = tmp_path_factory.mktemp("source")
    for name in ("invdiff", "operators", "cli"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    done = python("-c", f"import setuptools.build_meta as b; print(b.build_wheel({str(out)!r}))", cwd=source)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module_under_invdiff_alone(wheel):
    code = {name for name in wheel if name.endswith(".py")}
    assert code == {f"{n.replace('.', '/')}{'/__init__' * (p.name == '__init__.py')}.py" for n, p in MODULES.items()}
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"invdiff"}
    assert "invdiff/py.typed" in wheel and any(name.endswith("/LICENSE") for name in wheel)


def test_the_wheel_holds_the_embedded_prior(wheel):
    folder = ROOT / "invdiff" / "priors" / "weights" / "embedded"
    assert {f"invdiff/priors/weights/embedded/{path.name}" for path in folder.iterdir()} <= wheel
    assert {f"invdiff/priors/weights/embedded/{name}" for name in ("model.safetensors", "config.json")} <= wheel

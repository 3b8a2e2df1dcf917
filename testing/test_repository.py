"""Guards of the repository itself: light imports, a quick command line, no code from data, no leaks."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

import arbitor
from testing import conftest

PACKAGE = Path(arbitor.__file__).parent
HEAVY = ("torch", "triton", "numpy", "PIL", "safetensors")
NO_SOURCE = {".git", ".venv", "build", "dist", "runs", "__pycache__"}


def python(code, **environment):
    """Runs code in a fresh interpreter, from outside the checkout, on this copy of the package."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def tracked_files(repository):
    """Files under version control; without git, every file that is not a product of tools."""
    listing = subprocess.run(
        ["git", "-C", str(repository), "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if listing.returncode == 0:
        return [
            repository / name for name in listing.stdout.split("\0") if name and (repository / name).is_file()
        ]
    return [
        path
        for path in repository.rglob("*")
        if path.is_file() and not NO_SOURCE & {*path.relative_to(repository).parts}
    ]


def test_importing_the_package_imports_nothing_heavy():
    loaded = python("import arbitor, sys; print(*sys.modules)").split()
    assert not [name for name in loaded if name.split(".")[0] in HEAVY]


def test_importing_all_of_the_package_initialises_no_cuda_and_no_triton():
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__main__.py" and path.name != "triton.py"
    ]
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
import torch
print(torch.cuda.is_initialized(), "triton" in sys.modules)
"""
    assert python(code).split() == ["False", "False"]


def test_every_public_name_exists_and_is_listed():
    for name in arbitor.__all__:
        assert getattr(arbitor, name) is not None
    assert dir(arbitor) == sorted(arbitor.__all__)
    with pytest.raises(AttributeError, match="no attribute 'ARBModle'"):
        _ = arbitor.ARBModle


def test_help_lists_the_verbs():
    result = subprocess.run(
        [sys.executable, "-m", "arbitor", "--help"],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    for verb in ("train", "generate", "eval", "audit", "doctor"):
        assert verb in result.stdout


def test_help_does_not_import_torch():
    code = """
import sys
sys.argv = ["arbitor", "--help"]
try:
    from arbitor.cli import main
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print()
print("heavy:", *[name for name in ("torch", "triton", "numpy") if name in sys.modules])
"""
    assert python(code).splitlines()[-1].strip() == "heavy:"


def test_the_installed_command_is_the_module(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"arbitor": "arbitor.__main__:run"}
    script = Path(sysconfig.get_path("scripts"), "arbitor")
    if not script.exists():
        pytest.skip(f"arbitor is not installed in this environment: no {script}")
    printed = subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["arbitor", arbitor.__version__]


def commands(readme):
    """Marked shell blocks by name, as the continuous integration extracts them."""
    return dict(re.findall(r"^```sh (\w+)\n(.*?)\n```$", readme, re.MULTILINE | re.DOTALL))


def test_readme_has_exactly_two_set_up_commands_and_ci_runs_them(repository):
    marked = commands((repository / "README.md").read_text())
    assert list(marked) == ["main", "test"]
    assert all(len(command.splitlines()) == 1 for command in marked.values())
    assert marked["main"].endswith("arbitor train")
    assert marked["test"].endswith("pytest -n auto")
    script = (repository / ".ci" / "run").read_text()
    assert "readme_command main" in script
    assert "readme_command test" in script
    assert os.access(repository / ".ci" / "run", os.X_OK)


def test_readme_example_runs(repository, monkeypatch):
    example = re.search(r"^```python\n(.*?)\n```$", (repository / "README.md").read_text(), re.M | re.S)
    assert example is not None
    code = example.group(1).replace("range(100)", "range(2)")
    assert code != example.group(1)
    output = python(code + "\nprint(float(loss) > 0)\n")
    assert output.splitlines()[-1] == "True"


def test_readme_verbs_exist(repository):
    readme = (repository / "README.md").read_text()
    help_text = python("import sys; sys.argv = ['arbitor', '--help']; from arbitor.cli import main; main()")
    for verb in set(re.findall(r"^arbitor (\w+)", readme, re.MULTILINE)):
        assert re.search(rf"\b{verb}\b", help_text), verb


def test_links_between_documents_lead_somewhere(repository):
    for path in tracked_files(repository):
        if path.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.relative_to(repository)}: {target}"


FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "code"}
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {("torch", "load"), ("numpy", "load"), ("np", "load"), ("yaml", "load")}


def unsafe(tree):
    """Constructs that run code found in data, as `line: what`."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in FORBIDDEN_MODULES or name in {"torch.load", "torch.serialization"}:
                yield f"{node.lineno}: import of {name}"
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in FORBIDDEN_BUILTINS:
                yield f"{node.lineno}: {called.id}()"
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                if (called.value.id, called.attr) in FORBIDDEN_METHODS:
                    yield f"{node.lineno}: {called.value.id}.{called.attr}()"
                if called.value.id == "builtins" and called.attr in FORBIDDEN_BUILTINS:
                    yield f"{node.lineno}: builtins.{called.attr}()"


def test_no_code_runs_from_data():
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{where}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for where in unsafe(ast.parse(path.read_text()))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "eval('1')",
        "exec('1')",
        "import builtins\nbuiltins.eval('1')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
    ],
)
def test_the_check_for_unsafe_code_sees(code):
    assert list(unsafe(ast.parse(code)))


# A path of some particular machine; `/dev`, `/proc`, `/sys`, `/tmp` and `/usr/bin/env` exist everywhere.
MACHINE_PATH = re.compile(
    r"(?<![\w.~:/-])/(?:home|root|opt|mnt|data|srv|Users|work|workspace|farm|var/tmp)/[\w.]"
)


def test_no_paths_of_a_machine_in_tracked_files(repository):
    found = []
    for path in tracked_files(repository):
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(repository)}:{number}: {line.strip()[:80]}")
    assert found == []


def test_machine_paths_are_seen():
    for prefix in ("home", "root", "opt"):
        assert MACHINE_PATH.search(f'open("/{prefix}/somebody/file")')
    assert not MACHINE_PATH.search("https://example.org/data/text and docs/data/x and a/root/b")


def test_base_dependencies_are_the_agreed_ones(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=\s]", requirement)[0] for requirement in project["dependencies"]}
    assert names == {"torch", "numpy", "safetensors", "rich", "cyclopts", "pillow"}


def test_every_package_has_an_init_file():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert (folder / "__init__.py").exists(), folder


def test_dependencies_point_downwards():
    """cli -> train -> model -> ternary -> ops; a lower layer never imports a higher one."""
    layers = {"ops": 0, "ternary": 1, "model": 2, "train": 3}
    for path in sorted(PACKAGE.rglob("*.py")):
        home = path.relative_to(PACKAGE).parts[0]
        if home not in layers:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("arbitor."):
                other = node.module.split(".")[1]
                assert layers.get(other, 0) <= layers[home], (
                    f"{path.relative_to(PACKAGE)} imports {node.module}"
                )


def test_a_sample_of_cases_has_the_first_and_the_last_and_is_the_same_every_time():
    cases = [SimpleNamespace(nodeid=f"testing/ops/test_a.py::test_b[{number}]") for number in range(100)]
    chosen = conftest.sample(cases)
    assert (len(chosen), chosen[0], chosen[-1]) == (conftest.CASES, cases[0], cases[-1])
    assert chosen == conftest.sample(cases)
    assert conftest.sample(cases[:3]) == cases[:3]
    others = [SimpleNamespace(nodeid="testing/test_cli.py::test_c[1]")]
    assert conftest.cases_by_test(cases + others) == [cases]  # of bad input, every case is one of its own

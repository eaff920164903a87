"""Laws of the house: the README's commands parse, its file map is true, and modules import what the picture shows."""
import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
OURS = {"model": "model.py", "sample_latents": "sample_latents.py", "train": "train.py", "bolt": "bolt.py",
        **{f"data.{name}": f"data/{name}.py" for name in ("tokens", "corpus", "cache", "layout", "loader", "run", "report")},
        "data.alchemy.world": "data/alchemy/world.py"}
PICTURE = {
    "model": set(), "data.tokens": set(), "data.run": set(), "data.report": set(), "data.alchemy.world": set(),
    "data.corpus": {"data.tokens"},
    "data.cache": {"data.corpus", "data.run", "data.tokens"},
    "data.layout": {"data.corpus", "data.tokens"},
    "data.loader": {"data.corpus", "data.layout", "data.run"},
    "train": {"model", "data.cache", "data.corpus", "data.layout", "data.loader", "data.run", "data.tokens"},
    "sample_latents": {"model", "data.corpus", "data.layout", "data.loader", "data.report", "data.run", "data.tokens"},
    "bolt": {"train", "sample_latents", "model", "data.corpus", "data.layout", "data.loader", "data.report", "data.run", "data.tokens", "data.alchemy.world"},
}


def imports(path):
    """The modules of ours that a file imports."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
        found |= {name for name in names if name in OURS}
    return found


@pytest.mark.parametrize("module", OURS)
def test_imports_match_the_picture(module):
    assert imports(OURS[module]) == PICTURE[module]


def test_runtime_packages_are_four():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert sorted(re.split("[=<>]", line)[0] for line in lines if line) == ["numpy", "tiktoken", "torch", "tqdm"]
    allowed = {"torch", "tiktoken", "numpy", "tqdm", "data", "model", "train", "sample_latents", "bolt"} | set(sys.stdlib_module_names)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert all(name.split(".")[0] in allowed for name in names), path


def test_the_file_map_is_true():
    """Every row names a file that exists, with its lines to within a tenth; every Python file of ours has a row."""
    rows = dict(re.findall(r"^\| `([\w/.]+\.py)` \| (\d+) \|", README, re.MULTILINE))
    for path, lines in rows.items():
        assert abs(len((ROOT / path).read_text().splitlines()) / int(lines) - 1) < 0.1, path
    files = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py")] if path.stat().st_size}
    assert files == set(rows)


def commands():
    """Every command of the README that runs a script of ours."""
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("#")[0].split("&&"):
                if re.search(r"\b[\w/]+\.py\b", part) and "clone" not in part:
                    yield part.strip()


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_commands_of_the_readme_parse(command):
    """The script exists and its --help knows every flag."""
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    shown = subprocess.run([sys.executable, words[place], "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for word in words[place + 1:]:
        if word.startswith("--"):
            assert re.search(rf"{re.escape(word.split('=')[0])}\b", shown.stdout), word


def test_the_readme_has_commands_and_fits_an_evening():
    assert len(set(commands())) >= 6 and len(README.splitlines()) <= 260


def test_files_read_downwards():
    """A definition calls only what stands above it, or is imported."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py")]:
        definitions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        for number, node in enumerate(definitions):
            below = {other.name for other in definitions[number + 1:]}
            called = {call.func.id for call in ast.walk(node) if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}
            assert not below & called, f"{path}:{node.lineno} {node.name} calls {below & called}"


def test_every_function_is_short():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}:{node.lineno} {node.name}"

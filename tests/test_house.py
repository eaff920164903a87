"""Laws of the house: the README's commands parse, its file map is true, and modules import what the picture shows."""
import ast
import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.alchemy import prepare

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
OURS = {"model": "model.py", "sample_latents": "sample_latents.py", "train": "train.py", "bolt": "bolt.py",
        **{f"data.{name}": f"data/{name}.py"
           for name in ("tokens", "corpus", "cache", "layout", "loader", "run", "plan", "report", "bases", "evaluate")},
        **{f"data.alchemy.{name}": f"data/alchemy/{name}.py" for name in ("world", "prepare", "claims")}}
PICTURE = {
    "model": set(), "data.run": set(), "data.plan": set(), "data.report": {"data.run"}, "data.alchemy.world": set(),
    "data.tokens": {"data.bases"}, "data.bases": {"data.run", "data.tokens", "model"},
    "data.alchemy.prepare": {"data.alchemy.world", "data.run"},
    "data.alchemy.claims": {"data.alchemy.world", "data.report"},
    "data.corpus": {"data.tokens"},
    "data.cache": {"data.corpus", "data.run", "data.tokens"},
    "data.layout": {"data.corpus", "data.tokens"},
    "data.loader": {"data.corpus", "data.layout", "data.run"},
    "train": {"model", "data.cache", "data.corpus", "data.layout", "data.loader", "data.run", "data.tokens",
              "data.alchemy.prepare", "data.bases"},
    "sample_latents": {"model", "data.cache", "data.corpus", "data.layout", "data.loader", "data.report", "data.run",
                       "data.tokens"},
    "data.evaluate": {"sample_latents", "model", "data.corpus", "data.layout", "data.report", "data.run", "data.tokens",
                      "data.alchemy", "data.alchemy.world"},
    "bolt": {"train", "sample_latents", "model", "data.cache", "data.corpus", "data.evaluate", "data.layout",
             "data.loader", "data.plan", "data.report", "data.run", "data.tokens", "data.alchemy",
             "data.alchemy.prepare", "data.alchemy.world"},
}
LAZY = {"data.bases"}       # a door, imported where a folder or a checkpoint of its kind is opened, inside functions
# packages of a door, imported inside its functions alone
OPTIONAL = {"data/report.py": {"matplotlib"}, "data/bases.py": {"safetensors", "tokenizers"},
            "data/finemath/prepare.py": {"datasets", "fsspec", "pyarrow"}, "data/teacher.py": {"openai"}}


FILES = [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py")]


def imports(path):
    """The modules of ours that a file imports."""
    modules = names_imported(ast.walk(ast.parse((ROOT / path).read_text())))
    return {name for name in modules if name in OURS or name == "data.alchemy"}


def names_imported(nodes):
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("module", OURS)
def test_imports_match_the_picture(module):
    assert imports(OURS[module]) == PICTURE[module]
    assert not LAZY & set(names_imported(ast.parse((ROOT / OURS[module]).read_text()).body))


def test_runtime_packages_are_four():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert sorted(re.split("[=<>]", line)[0] for line in lines if line) == ["numpy", "tiktoken", "torch", "tqdm"]
    ours = {"data", "model", "train", "sample_latents", "bolt"}
    allowed = {"torch", "tiktoken", "numpy", "tqdm"} | ours | set(sys.stdlib_module_names)
    for path in FILES:
        tree, name = ast.parse(path.read_text()), str(path.relative_to(ROOT))
        packages = {module.split(".")[0] for module in names_imported(ast.walk(tree))}
        assert packages - allowed == OPTIONAL.get(name, set()), path
        assert not {module.split(".")[0] for module in names_imported(tree.body)} - allowed, path


def test_the_file_map_is_true():
    """Every row names a file that exists, with its lines to within a tenth; every Python file of ours has a row."""
    rows = dict(re.findall(r"^\| `([\w/.]+\.py)` \| (\d+) \|", README, re.MULTILINE))
    for path, lines in rows.items():
        assert abs(len((ROOT / path).read_text().splitlines()) / int(lines) - 1) < 0.1, path
    files = {str(path.relative_to(ROOT)) for path in FILES if path.stat().st_size}
    assert files == set(rows)


def commands(page: str = README):
    """Every command of a page that runs a script or a module of ours."""
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("#")[0].split("&&"):
                if re.search(r"\b[\w/]+\.py\b|-m (data|tests)\.", part):
                    yield part.strip()


PAGES = [README, *(path.read_text() for path in ROOT.glob("data/*.md"))]


@functools.cache
def help_of(script: str) -> str:
    words = [script] if script.endswith(".py") else ["-m", script]
    shown = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


@pytest.mark.parametrize("command", sorted({command for page in PAGES for command in commands(page)}))
def test_commands_of_the_pages_parse(command):
    """The script exists and its --help knows every flag."""
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word.endswith(".py") or word.startswith(("data.", "tests.")))
    shown = help_of(words[place])
    for word in words[place + 1:]:
        if word.startswith("--"):
            assert re.search(rf"{re.escape(word.split('=')[0])}\b", shown), word


def test_the_readme_is_short():
    assert len(set(commands())) >= 6 and len(README.splitlines()) <= 225 and len(README.split()) <= 2600


FORKS = re.findall(r"```diff\n--- (\S+)\n(.*?)```", README, re.DOTALL)


def forked(number):
    """The file that a diff of the README is about, and its text with the minus lines replaced by the plus lines."""
    path, diff = FORKS[number]
    minus, plus = ("".join(f"{line[1:]}\n" for line in diff.splitlines() if line.startswith(sign)) for sign in "-+")
    text = (ROOT / path).read_text()
    assert text.count(minus) == 1, f"{minus!r} is not one place of {path}"
    return path, text.replace(minus, plus)


def test_the_forks_of_the_readme_apply():
    assert len({forked(number)[1] for number in range(len(FORKS))}) == len(FORKS) == 3


def report_of(folder, changed=None):
    """The figures of a small run of a copy of the project with one file changed."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "*.jsonl*"))
    if changed:
        (folder / changed[0]).write_text(changed[1])
    prepare.prepare(folder / "corpus", gold=30, raw=30, held_out=20)
    flags = ("--data corpus --out run --arms em --rounds 2 --warm_steps 8 --train.steps 8 --sample.num_latents 4 "
             "--bound_draws 4 --sample.max_latent_tokens 8 --train.model.width 16 --train.model.ffn 16 --device cpu")
    done = subprocess.run([sys.executable, "bolt.py", *flags.split()], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "run" / "report.json").read_text())


@pytest.fixture(scope="module")
def plain_report(tmp_path_factory):
    return report_of(tmp_path_factory.mktemp("plain") / "copy")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_the_forks_of_the_readme_run(number, plain_report, tmp_path):
    """A small run with each diff ends with a report that is not the one without it."""
    assert report_of(tmp_path / "copy", forked(number)) != plain_report


def calls(node):
    return {call.func.id for call in ast.walk(node) if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}


def test_files_read_downwards():
    """A definition calls only what stands above it, or is imported."""
    for path in FILES:
        body = ast.parse(path.read_text()).body
        definitions = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        for number, node in enumerate(definitions if path.name != "bolt.py" else []):
            below = {other.name for other in definitions[number + 1:]}
            assert not below & calls(node), f"{path}:{node.lineno} {node.name} calls {below & calls(node)}"


def test_bolt_is_told_from_the_top_down():
    """The loop before what it calls: every function but main stands below the first that calls it."""
    functions = [node for node in ast.parse((ROOT / "bolt.py").read_text()).body if isinstance(node, ast.FunctionDef)]
    assert functions[0].name == "main"
    for node in functions[1:]:
        callers = [other.lineno for other in functions if re.search(rf"\b{node.name}\b", ast.unparse(other.body))]
        assert callers and min(callers) < node.lineno, node.name


def test_lines_fit_a_screen():
    for path in [*FILES, *ROOT.glob("tests/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 120, f"{path}:{number}"


def test_every_function_is_short():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}:{node.lineno} {node.name}"

"""The architecture as tests: layers, import cycles, names, documentation. Standard library only."""

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llmfoundry"

# Lowest first. A module may import from its own package and from lower layers. A top-level module counts as a package.
LAYERS = [
    {"atomic", "config", "launch", "dtensor", "numbers", "progress", "private", "strict_json", "strict_yaml", "tree"},
    {"settings", "runtime", "stopping"},
    {"kernels", "data", "code"},
    {"layers"},
    {"moe"},
    {"model"},
    {"parallel", "hf", "drop_in", "standalone"},
    {"checkpoint", "eval", "report"},
    {"train"},
    {"callbacks", "integrations", "planning"},
    {"cli"},
]
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}
SAYS_NOTHING = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
each_file = pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])


def _package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _module(path: Path) -> str:
    return ".".join(("llmfoundry", *path.relative_to(PACKAGE).with_suffix("").parts))


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _imports(path: Path, for_types_too: bool = True) -> set[str]:
    """Dotted names below `llmfoundry` of everything that the file imports, also inside functions."""
    found: set[str] = set()
    waiting: list[ast.AST] = [_tree(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not for_types_too:
            continue
        waiting.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("llmfoundry.")}


def _packages_imported(path: Path) -> set[str]:
    # Any other name is something that the package's own __init__ exports.
    return {name.split(".")[1] for name in _imports(path)} & set(LAYER)


def test_every_package_has_a_layer() -> None:
    missing = sorted({_package_of(path) for path in FILES} - set(LAYER))
    assert not missing, f"add {missing} to LAYERS"


@each_file
def test_imports_only_go_down(path: Path) -> None:
    here = LAYER[_package_of(path)]
    up = sorted(name for name in _packages_imported(path) if LAYER[name] > here)
    assert not up, f"{path.name} is in layer {here} and imports {up} from higher layers"


@each_file
def test_packages_of_one_layer_do_not_import_each_other(path: Path) -> None:
    package = _package_of(path)
    siblings = sorted(name for name in _packages_imported(path) if LAYER[name] == LAYER[package] and name != package)
    assert not siblings, f"{path.name} imports {siblings} from its own layer"


def test_conversion_knows_every_part_that_a_model_may_name() -> None:
    """A choice is known once its file is imported; tests in one process would not see that a command does not."""
    of_module = {_module(path): path for path in FILES}
    reached, waiting = set[str](), ["llmfoundry.checkpoint.convert"]
    while waiting:
        reached.add(name := waiting.pop())
        waiting += [each for each in _imports(of_module[name], False) if each in of_module and each not in reached]
    parts = {module for module, path in of_module.items() if ", names=(" in path.read_text(encoding="utf-8")
             and _package_of(path) in ("layers", "moe", "model", "hf")}  # fmt: skip
    assert "llmfoundry.hf.module" in parts and parts <= reached


def test_no_import_cycle() -> None:
    modules = {_module(path) for path in FILES}
    graph = {_module(path): _imports(path, for_types_too=False) & modules for path in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_nobody_imports_callbacks() -> None:
    allowed = {"callbacks", "cli"}
    guilty = sorted(p.name for p in FILES if "callbacks" in _packages_imported(p) and _package_of(p) not in allowed)
    assert not guilty, f"{guilty} import callbacks; a callback is found by its name in the YAML"


@each_file
def test_name_says_something(path: Path) -> None:
    assert not {part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts} & SAYS_NOTHING


@each_file
def test_modules_and_public_classes_say_what_they_are(path: Path) -> None:
    tree = _tree(path)
    assert ast.get_docstring(tree), "module docstring"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"class {node.name} has no docstring"


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FILE = re.compile(r"[\w./-]*\w\.(?:py|md|ya?ml|sh|toml)|(?:[\w-]+/)+|(?:[\w-]+/)*Dockerfile(?:\.\w+)?")
OURS = re.compile(r"(?:scripts|yamls|docs|docker|tests|llmfoundry)/[\w./-]+\.\w+")
NOT_HERE = {
    "config.yaml", "checkpoints/", "checkpoints/step-N/", "profile.md", "profile/",  # what a run writes
    "my_file.py", "chat.yaml", "chats/", "tests/PACKAGE/test_FILE.py", "train/", "val/",  # examples
    "tasks.yaml", "gauntlet.yaml", "models.yaml", "build/site/",
}  # fmt: skip


def _paths_named(page: Path) -> set[str]:
    """Files and folders that a page names: targets of links, backticks with the form of a path, commands in fences."""
    fence = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)
    page_text = page.read_text(encoding="utf-8")
    text, commands = fence.sub("", page_text), " ".join(fence.findall(page_text))
    links = {
        link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]+`", "", text)) if "://" not in link
    }
    code = {word for span in re.findall(r"`([^`]+)`", text) for word in span.split() if FILE.fullmatch(word)}
    return (links | code | set(OURS.findall(commands))) - NOT_HERE - {""}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    names = {path.name for folder in ("llmfoundry", "scripts") for path in (ROOT / folder).rglob("*.py")}
    starts = (ROOT, PACKAGE, page.parent)
    named = _paths_named(page)
    assert named, f"{page.name}: no path found"
    lost = sorted(path for path in named - names if not any((start / path).exists() for start in starts))
    assert not lost, f"{page.name} names {lost}"


def test_contributing_lists_every_package_in_its_layer() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    listed = {int(layer): {name.removesuffix(".py").rstrip("/") for name in re.findall(r"`(.+?)`", packages)}
              for layer, packages in rows}  # fmt: skip
    assert listed == dict(enumerate(LAYERS))

"""The package's structure, read from its source: which module imports which, and who reads whose private names.

An import counts wherever it stands: at the top, inside of a function, under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
from transformers import GenerationMixin

ROOT = Path(__file__).parent.parent
PACKAGE = "hf_onlinespec"
# Packages that every other one may import: they lie below all of them.
GROUND = {"_compat", "config", "metrics"}
# What a package must not import; "*": any other package but those of GROUND. Checked as soon as it exists.
NEVERS = {
    "_compat": {"*", "config", "metrics"},
    "config": {"*", "_compat"},
    "metrics": {"*", "_compat", "config"},
    "models": {"*"},
    "runtime": {"*"},
    "govern": {"*", "_compat", "torch"},
    "heads": {
        *("adapt", "cli", "commit", "draft", "generation", "govern", "measure", "metrics", "runtime", "serve", "share"),
        *("training", "verify"),
    },
    "adapt": {"commit", "verify", "share", "draft"},
    "commit": {"verify", "share", "draft"},
    "verify": {"share", "draft"},
    "share": {"commit", "verify", "measure", "draft"},
}
# Modules at the top that are plain data: what they may import of packages.
PLAIN_DATA: dict[str, set[str]] = {
    "rounds": {"govern"},
    "errors": set(),
    "state": set(),
}
# Who may import `draft/`: entry points, and what stands above the four steps.
IMPORT_DRAFT = {"", "draft", "generation", "training", "measure", "serve", "cli"}
# Private names of torch that are part of every nn.Module and Tensor.
OF_TORCH = {"_modules", "_parameters", "_version"}
FOREIGN = ("accelerate", "huggingface_hub", "peft", "torch", "transformers")


@cache
def modules() -> dict[str, ast.Module]:
    """Every module by its dotted name, parsed; "" is the package itself."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


@cache
def packages() -> set[str]:
    return {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")}


def is_package(name: str) -> bool:
    return name == "" or name in packages()


def imports(name: str) -> Iterator[str]:
    """Dotted names of what a module imports: of this package without its name in front, of others as they are."""
    here = name if is_package(name) else name.rpartition(".")[0]
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = here.split(".") if here else []
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else None
            for alias in node.names:
                said = [part for part in (base, node.module) if part]
                inner = ".".join([*said, alias.name])
                yield inner if base is not None and inner in modules() else ".".join(said)


@cache
def own_imports() -> dict[str, set[str]]:
    """Which modules of the package each module imports."""
    found = {}
    for name in modules():
        named = {one.removeprefix(f"{PACKAGE}.") if one != PACKAGE else "" for one in imports(name)}
        found[name] = named & set(modules()) - {name}
    return found


def cycles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other: the strongly connected components of more than one."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        left = [start]
        while left:
            for name in arrows[left.pop()] - found:
                found.add(name)
                left.append(name)
        return found

    reach = {name: reached(name) for name in arrows}
    groups = {
        frozenset(other for other in reach[name] if name in reach[other]) for name in arrows if name in reach[name]
    }
    return sorted(sorted(group) for group in groups)


def package_of(name: str) -> str:
    """The package that a module is in; of one at the top, its own name."""
    return name.partition(".")[0]


def test_the_reader_of_imports_finds_all_three_kinds() -> None:
    """Of modules that this package is sure to have: the check below would pass on an empty graph, too."""
    found = own_imports()
    assert {"config", "draft", "errors", "generation"} <= found[""]
    assert "errors" in found["state"] and len(found) > 60
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [["b", "c"], ["d"]]


def test_no_modules_import_each_other_in_a_cycle() -> None:
    assert cycles(own_imports()) == []


@pytest.mark.parametrize("package", sorted(NEVERS))
def test_a_package_imports_nothing_that_stands_above_it(package: str) -> None:
    if package not in packages():
        pytest.skip(f"{PACKAGE}/{package} does not exist yet")
    never = (NEVERS[package] - {"*"}) | (packages() - GROUND - {package} if "*" in NEVERS[package] else set())
    own = [name for name in modules() if package_of(name) == package]
    found = {(name, one) for name in own for one in own_imports()[name] if package_of(one) in never}
    found |= {(name, one) for name in own for one in imports(name) if one.partition(".")[0] in never & set(FOREIGN)}
    assert not found


@pytest.mark.parametrize("name", sorted(PLAIN_DATA))
def test_plain_data_stands_below_all_packages(name: str) -> None:
    if name not in modules():
        pytest.skip(f"{PACKAGE}/{name}.py does not exist yet")
    found = {one for one in own_imports()[name] if package_of(one) in packages()}
    assert {package_of(one) for one in found} <= PLAIN_DATA[name], found


def test_only_entry_points_and_what_stands_above_import_the_draft() -> None:
    found = {
        name
        for name, named in own_imports().items()
        if "draft" in map(package_of, named) and package_of(name) not in IMPORT_DRAFT
    }
    assert not found


def test_the_top_level_is_read_at_a_glance() -> None:
    assert len({package_of(name) for name in modules()}) <= 23


def test_the_file_of_a_package_defines_nothing_of_its_own() -> None:
    """It is empty, or hands names on, one by one."""
    for package in packages():
        for node in modules()[package].body:
            told = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            named = isinstance(node, ast.ImportFrom) and all(alias.name != "*" for alias in node.names)
            listed = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            assert told or named or listed, f"{package}/__init__.py: {ast.unparse(node)}"


# Private names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in ("_replace", "_asdict")


def names_given(tree: ast.Module) -> Iterator[str]:
    """The names that a module gives to something: a function, a class, an attribute of its own objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node):
            yield node.attr


@cache
def private_names() -> dict[str, set[str]]:
    """The private names that each module gives."""
    return {name: set(filter(is_private, names_given(tree))) for name, tree in modules().items()}


def _is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def private_reads() -> Iterator[tuple[str, str, str]]:
    """Reads of private attributes of other objects than the module's own: the module, the name, what is written there."""
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and not _is_own(node):
                yield name, node.attr, f"{name}, line {node.lineno}: {ast.unparse(node)}"


def is_compat(name: str) -> bool:
    return package_of(name) == "_compat"


def test_private_names_of_other_libraries_stand_in_compat_alone() -> None:
    ours = set().union(*private_names().values())
    found = {
        told for name, attribute, told in private_reads() if attribute not in ours | OF_TORCH and not is_compat(name)
    }
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith(FOREIGN):
                said = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                if any(map(is_private, said)) and not is_compat(name):
                    found.add(f"{name}, line {node.lineno}: {ast.unparse(node)}")
    assert not found


def test_no_module_reads_private_attributes_of_another_one() -> None:
    known = private_names()
    ours = set().union(*known.values())
    assert not {
        told
        for name, attribute, told in private_reads()
        if attribute in ours - known[name] - OF_TORCH and not is_compat(name)
    }


def test_no_module_imports_a_private_name_of_another_one() -> None:
    """A module may be private itself (`_compat/`): what it names in public is for all of the package."""
    found = {
        f"{name}: {ast.unparse(node)}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith(PACKAGE))
        for alias in node.names
        if is_private(alias.name) and alias.name not in modules()
    }
    assert not found


def test_tests_use_no_private_name_of_the_package() -> None:
    """Neither as an attribute nor in a string, as `monkeypatch.setattr` takes it; those of the test's own classes it may."""
    ours = (
        set().union(*private_names().values()) - OF_TORCH - set(dir(GenerationMixin))
    )  # hooks are named as what they wrap
    found = set()
    for path in (ROOT / "tests").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        private = ours - set(names_given(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and not _is_own(node):
                named = {node.attr}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = {node.value.rpartition(".")[2]}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                named = {alias.name for alias in node.names}
            else:
                continue
            # Names such as `_repr_html_` are a protocol's.
            if any(not name.endswith("_") for name in named & private):
                found.add(f"{path.relative_to(ROOT)}, line {node.lineno}: {ast.unparse(node)}")
    assert not found


# Classes


def concrete_methods(body: list[ast.stmt]) -> set[str]:
    """Methods and properties that do something; `__init__` and its like may call their parent's."""
    return {
        node.name
        for node in body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("__")
        and not any("abstract" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def test_no_concrete_method_is_overridden() -> None:
    classes = {
        node.name: node for tree in modules().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    }
    found = set()
    for name, node in classes.items():
        left = [ast.unparse(base).partition("[")[0] for base in node.bases]
        while left:
            parent = classes.get(left.pop())
            if parent is not None:
                again = concrete_methods(node.body) & concrete_methods(parent.body)
                found |= {f"{name}.{method} overrides {parent.name}.{method}" for method in again}
                left += [ast.unparse(base).partition("[")[0] for base in parent.bases]
    assert not found

"""The house: each wing of `lape` builds on those below it, and no wing has a circle of modules inside.

Every import counts, those inside functions and those for type checkers as well.
"""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

BELOW = {  # wing -> the wings that it may import from, beside itself
    "ground": "",
    "core": "ground",
    "models": "ground core",
    "host": "ground core models",
    "convert": "ground core models host",
    "data": "ground",
    "files": "ground core models host convert data",
    "train": "ground core models host convert data files",
    "look": "ground core models host convert data files",
    "study": "ground core models host convert data files train look",
    "cli": "ground core models host convert data files train look study",
}
GROUND = {"errors", "names", "options", "recipe"}


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in (SOURCE / "lape").rglob("*.py")}


def wing_of(module: str) -> str:
    """The public face (`lape`) and `python -m lape` stand above all wings, like the command line."""
    first = module.split(".")[1] if "." in module else "__main__"
    if first == "__main__":
        return "cli"
    return "ground" if first in GROUND else first


def imports_of(module: str) -> set[str]:
    """The modules of `lape` that one names in its import statements, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports are absolute here"
            names = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else str(node.module) for name in names.values()}
    return {name for name in found if name in FILES} - {module}


ARROWS = {module: imports_of(module) for module in FILES}


def reached(start: str, wing: str) -> set[str]:
    """What a module leads to by imports that stay in its wing."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = {name for name in ARROWS[waiting.pop()] if wing_of(name) == wing} - seen
        seen |= new
        waiting += new
    return seen


def breaches() -> set[str]:
    """`lape.` is left out of the names."""
    found = set()
    for module, imported in ARROWS.items():
        if module == "lape":  # the public names, from everywhere
            continue
        wing = wing_of(module)
        allowed = {wing, *BELOW[wing].split()}
        found |= {f"{module[5:]} -> {name[5:]}" for name in imported if wing_of(name) not in allowed}
        circle = {name for name in reached(module, wing) if module in reached(name, wing)}
        if circle:
            found.add("circle: " + " ".join(sorted(name[5:] for name in circle)))
    return found


@pytest.mark.parametrize("module", sorted(FILES))
def test_every_module_is_in_a_wing(module):
    assert wing_of(module) in BELOW


def test_imports_point_one_way_and_in_no_circle():
    assert not breaches()


def test_the_rules_themselves_have_no_circle():
    order = list(BELOW)
    for wing, below in BELOW.items():
        assert set(below.split()) <= set(order[: order.index(wing)])


def test_contributing_says_the_same():
    """The wings and their order, and how little there is to read first."""
    text = (SOURCE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    ((order, beside),) = re.findall(r"`(ground < [^`]+)`, and `([^`]+)`", text)
    groups = [re.findall(r"\w+", group) for group in order.split(" < ")]
    assert beside == "data < files"
    assert sorted(["data", *(name for group in groups for name in group)]) == sorted(BELOW)
    for place, group in enumerate(groups):
        below = {name for group in groups[:place] for name in group}
        for wing in group:
            assert set(BELOW[wing].split()) - {"data"} == below, wing
    folders = {path.name for path in (SOURCE / "lape").iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert folders == set(BELOW) - {"ground"}
    first = text[text.index("\n1. ") : text.index("\n4. ")]
    assert len(files := [SOURCE.parent / path for path in re.findall(r"`(src/[^`]+)`", first)]) == 4
    assert 450 < sum(len(path.read_text().splitlines()) for path in files) < 650


def test_few_modules_stand_beside_the_wings():
    assert {f"lape.{name}" for name in GROUND} <= set(FILES)
    assert len([path for path in (SOURCE / "lape").iterdir() if path.is_file()]) <= 10


def test_no_function_is_above_sixty_lines():
    long = [
        (str(path.relative_to(SOURCE)), node.name)
        for path in FILES.values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    ]
    assert not long


def test_no_function_takes_more_than_ten_arguments():
    """Commands have more: flags, which cyclopts reads from pydantic's fields."""
    many = [
        (str(path.relative_to(SOURCE)), node.name)
        for path in FILES.values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and len({one.arg for one in (*node.args.args, *node.args.kwonlyargs)} - {"self", "cls"}) > 10
    ]
    assert not many


def test_variables_are_named_for_what_they_are():
    """A participle says what was done to a thing, not what it is; `own` does not say whose."""
    forbidden = set(
        "asked built chosen converted done drawn entered found given kept known linked made merged named own received "
        "said seen shown stored taken told unrolled waiting wanted written".split()
    )
    found = []
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.arg):
                name = node.arg
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                name = node.id if isinstance(node, ast.Name) else node.attr
            else:
                continue
            if name.strip("_").lower() in forbidden:
                found.append((module, name))
    assert not found

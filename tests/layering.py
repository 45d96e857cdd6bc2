"""The rules of the house, as functions from a source tree to the list of its violations.

Layers, each importing only what stands to its right:

    commands -> planning -> shared -> trainers | converters | eval_bridge -> models -> core

A command is a module of `easylm/` that runs by `python -m`; `planning` is what one of them is made
of, and `shared` are the few that commands have in common (SHARED). The rest of `easylm/` is the
core.
Files of `configs/` use whatever a run needs and are loaded by path, so nothing imports them;
`easylm/config.py` alone imports the package, to know where the folder is.
"""

import ast
import dataclasses
import pathlib
from collections.abc import Iterator

FOLDERS = ("models", "trainers", "converters", "eval_bridge", "configs")
SHARED = ("easylm.ask_reference", "easylm.finish", "easylm.run", "easylm.start")
MAY_IMPORT = {
    "commands": {"planning", "shared", "trainers", "converters", "eval_bridge", "models", "core"},
    "planning": {"planning", "shared", "trainers", "converters", "models", "core"},
    "shared": {"shared", "trainers", "converters", "models", "core"},
    "configs": {"trainers", "models", "core", "configs"},
    "trainers": {"models", "core", "trainers"},
    "converters": {"models", "core", "converters"},
    "eval_bridge": {"models", "core", "eval_bridge"},
    "models": {"core", "models"},
    "core": {"core"},
}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80


@dataclasses.dataclass(frozen=True)
class Module:
    """One file of the product: its name as installed, its top-level folder, and its syntax tree."""

    name: str
    folder: str
    path: pathlib.Path
    source: str
    tree: ast.Module

    @property
    def layer(self) -> str:
        """The top-level folder the module lies in, or its part of easylm/."""
        if self.folder != "easylm":
            return self.folder
        if self.name.startswith("easylm.planning"):
            return "planning"
        if self.name in SHARED:
            return "shared"
        return "commands" if any(map(is_main_guard, self.tree.body)) else "core"


def is_main_guard(statement: ast.stmt) -> bool:
    """Whether the statement is `if __name__ == "__main__":`."""
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


def load_modules(root: pathlib.Path) -> list[Module]:
    """Every product module of the checkout at `root`, sorted by name."""
    modules = []
    for folder in ("easylm", *FOLDERS):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts if folder == "easylm" else ("easylm", *parts)
            name = ".".join(parts).removesuffix(".__init__")
            source = path.read_text(encoding="utf-8")
            modules.append(Module(name, folder, path, source, ast.parse(source, str(path))))
    return modules


def imported_names(module: Module) -> Iterator[tuple[str, int]]:
    """`(dotted name, line)` of all a module imports, inside functions too.

    `from a.b import c` gives `a.b.c`: whether c is a module or a thing in one, its layer is the
    same. Relative imports are resolved.
    """
    package = module.name.split(".")
    if module.path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


def imports_point_one_way(modules: list[Module]) -> list[str]:
    """A module imports only from layers that its own may use."""
    layers = {module.name: module.layer for module in modules}
    found = []
    for module in modules:
        for name, line in imported_names(module):
            target = nearest_module(name, layers)
            if target in ("", "easylm", module.name):
                continue
            if (module.name, target) == ("easylm.config", "easylm.configs"):
                continue
            if layers[target] not in MAY_IMPORT[module.layer]:
                found.append(
                    f"{module.path}:{line}: {module.layer} imports {target} ({layers[target]})"
                )
    return found


def nearest_module(name: str, layers: dict[str, str]) -> str:
    """The longest prefix of a dotted name that is a module of ours, or an empty string."""
    while name and name not in layers:
        name = name.rpartition(".")[0]
    return name


def imports_exist(modules: list[Module]) -> list[str]:
    """What is imported from easylm is a module of easylm, not `easylm.tests` or `easylm.setup`.

    In a checkout those resolve too, because its root is on `easylm.__path__`; installed they fail.
    """
    layers = {module.name: module.layer for module in modules}
    return [
        f"{module.path}:{line}: {name} is not installed with the package"
        for module in modules
        for name, line in imported_names(module)
        if name.startswith("easylm.") and nearest_module(name, layers) == "easylm"
    ]


def no_bare_folder_names(modules: list[Module]) -> list[str]:
    """`import models` in the checkout would make a second copy of `easylm.models`."""
    return [
        f"{module.path}:{line}: import easylm.{name}, not {name}"
        for module in modules
        for name, line in imported_names(module)
        if name.split(".")[0] in FOLDERS
    ]


def no_core_module_hides_a_folder(modules: list[Module]) -> list[str]:
    """easylm/models.py would be found before models/."""
    return [
        f"{module.path}: hides the folder {second}/"
        for module in modules
        if module.folder == "easylm"
        for second in module.name.split(".")[1:2]
        if second in FOLDERS
    ]


def files_and_functions_are_short(modules: list[Module]) -> list[str]:
    """A file holds one idea in at most 500 lines, a function in at most 80."""
    found = []
    for module in modules:
        lines = len(module.source.splitlines())
        if lines > MAX_FILE_LINES:
            found.append(f"{module.path}: {lines} lines, at most {MAX_FILE_LINES}")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    found.append(
                        f"{module.path}:{node.lineno}: {node.name} has {lines} lines, "
                        f"at most {MAX_FUNCTION_LINES}"
                    )
    return found


def config_fields_are_read(modules: list[Module]) -> list[str]:
    """A field of a config dataclass that no code reads is a promise nobody keeps.

    A check in `__post_init__` does not count as reading.
    """
    read = set()
    for module in modules:
        checks = [
            node
            for node in ast.walk(module.tree)
            if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"
        ]
        skipped = {id(node) for check in checks for node in ast.walk(check)}
        for node in ast.walk(module.tree):
            is_read = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            if is_read and id(node) not in skipped:
                read.add(node.attr)
    return [
        f"{module.path}:{field.lineno}: no code reads {node.name}.{field.target.id}"
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef) and is_config(node)
        for field in node.body
        if isinstance(field, ast.AnnAssign)
        and "ClassVar" not in ast.unparse(field.annotation)
        and field.target.id not in read
    ]


def is_config(node: ast.ClassDef) -> bool:
    """Whether the class is a dataclass whose name ends in `Config`."""
    decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
    return node.name.endswith("Config") and "dataclass" in decorators


RULES = (
    imports_point_one_way,
    imports_exist,
    no_bare_folder_names,
    no_core_module_hides_a_folder,
    files_and_functions_are_short,
    config_fields_are_read,
)

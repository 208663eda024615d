"""Digests of the code behind a result: one hash of some Python code and of all project files that it imports."""

import ast
import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def code_digest(text: str, beside: Path) -> str:
    """Return the sha256, in hexadecimal, of Python code and of the project files that it imports, even indirectly.

    The project files are those of clairlib and of the packages in the folder ``beside``; every file with the stem of a
    module beside it counts with the module (``page.css`` with ``page.py``). Docstrings, comment lines and blank lines
    do not count; a comment behind code does. Imports inside functions count, those under ``if TYPE_CHECKING`` only for
    names that a package loads lazily. A module that is run by name, as in ["-m", "clairlib"], counts as imported.
    Text, or an imported file, that is not Python raises SyntaxError.
    """
    files: set[Path] = set()
    todo = set(_imports(text, beside))
    while todo:
        file = todo.pop()
        files.add(file)
        todo |= set(_imports(read_source(file), beside)) - files
    digest = hashlib.sha256(_bare(text).encode())
    for file in sorted(files):
        for part in sorted(file.parent.glob(f"{file.stem}.*")):
            if part.is_file():
                content = _bare(read_source(part)) if part.suffix == ".py" else read_source(part)
                root = PACKAGE.parent if part.is_relative_to(PACKAGE) else beside  # so a path is the same everywhere
                digest.update(f"{part.relative_to(root).as_posix()}\0{content}\0".encode())
    return digest.hexdigest()


def module_digest(name: str, file: Path) -> str:
    """Return the `code_digest` of a module, given its dotted name and its file."""
    return code_digest(read_source(file), file.resolve().parents[name.count(".")])


def read_source(file: Path) -> str:
    """Return a file's text; it is read again only after a change."""
    status = file.stat()
    return _text_of(file, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1024)
def _text_of(file: Path, changed: int, size: int) -> str:
    return file.read_text(encoding="utf-8")


@lru_cache(maxsize=1024)
def _bare(text: str) -> str:
    """Return the lines of Python code without docstrings, comment lines and blank lines."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return "\n".join(line for line in lines if line.strip() and not line.lstrip().startswith("#"))


@lru_cache(maxsize=4096)
def _imports(text: str, beside: Path) -> tuple[Path, ...]:
    """Return the project files that a piece of code imports directly."""
    found = (file for name in _imported_names(ast.parse(text), beside) if (file := _file_of(name, beside)))
    return tuple(dict.fromkeys(found))


def _imported_names(tree: ast.AST, beside: Path) -> Iterator[str]:
    for node in _running(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_packages(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from _with_packages(node.module)
            for alias in node.names:
                yield from (f"{node.module}.{alias.name}", *_lazy_home(node.module, alias.name, beside))
        elif isinstance(node, ast.List | ast.Tuple):
            words = [own.value if isinstance(own, ast.Constant) else None for own in node.elts]
            if "-m" in words[:-1] and isinstance(name := words[words.index("-m") + 1], str):
                yield from (*_with_packages(name), f"{name}.__main__")


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of the code that runs, which is all but the blocks under ``if TYPE_CHECKING``."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not _is_for_types(child):
            yield from _running(child)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _with_packages(name: str) -> Iterator[str]:
    """Yield a, a.b and a.b.c for the name a.b.c: Python imports the packages of a module too."""
    parts = name.split(".")
    yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _lazy_home(package: str, name: str, beside: Path) -> Iterator[str]:
    """Yield the module, named under ``if TYPE_CHECKING``, from which a package loads a name, and its packages."""
    file = _file_of(package, beside)
    if file is None or file.name != "__init__.py":
        return
    for block in filter(_is_for_types, ast.parse(read_source(file)).body):
        for node in ast.walk(block):
            if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}:
                yield from _with_packages(node.module)


def _file_of(name: str, beside: Path) -> Path | None:
    """Return the file of a module or package of this project; None for any other name."""
    first, *rest = name.split(".")
    place = (PACKAGE if first == "clairlib" else beside / first).joinpath(*rest)
    files = (place.with_suffix(".py"), place / "__init__.py")
    return next((file for file in files if file.is_file()), None)

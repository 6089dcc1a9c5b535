"""The shape of the code: who may import whom, what modules are called, who may do what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT

PACKAGES = ("cas", "gateway", "replicator", "workflows", "bench", "tests")
PRODUCT = PACKAGES[:4]
# A function that fits only there has a noun that nobody has found yet.
NAMES_WITHOUT_A_NOUN = {"utils", "util", "helpers", "helper", "common", "manager", "base", "misc"}

# Calls that one module alone may make, so that a test which replaces that module's class has
# replaced them all: (calls, the packages it counts for, the one module).
OWNED_CALLS = {
    "durable steps": (
        {"os.fsync", "os.fdatasync", "os.sync", "os.link", "os.rename", "os.replace"},
        PRODUCT,
        "cas/durable.py",
    ),
    "the time of day": (
        {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today"},
        ("cas",),
        "cas/clock.py",
    ),
}


def modules(packages: tuple[str, ...] = PACKAGES) -> list[Path]:
    """Every module of the packages, relative to the checkout."""
    found = [path for package in packages for path in (CHECKOUT / package).rglob("*.py")]
    return sorted(path.relative_to(CHECKOUT) for path in found)


def parsed(module: Path) -> ast.Module:
    return ast.parse((CHECKOUT / module).read_text(encoding="utf-8"), filename=str(module))


def calls(tree: ast.Module) -> set[str]:
    """The calls of a module that are written `name.attribute(...)`."""
    return {
        f"{node.func.value.id}.{node.func.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
    }


def test_imports_follow_the_arrows() -> None:
    # In a process of its own: in this one it would switch off the loggers of all other tests.
    linter = Path(sys.executable).with_name("lint-imports")
    ran = subprocess.run(
        [linter, "--no-cache"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_module_says_what_it_is_for() -> None:
    silent = [str(module) for module in modules() if not ast.get_docstring(parsed(module))]
    assert silent == []


def test_every_folder_and_module_has_a_noun() -> None:
    nameless = [
        str(module)
        for module in modules()
        if NAMES_WITHOUT_A_NOUN & set(module.with_suffix("").parts)
    ]
    assert nameless == []


@pytest.mark.parametrize("what", OWNED_CALLS)
def test_some_calls_belong_to_one_module(what: str) -> None:
    owned, packages, owner = OWNED_CALLS[what]
    trespassing = {
        str(module): sorted(owned & calls(parsed(module)))
        for module in modules(packages)
        if str(module) != owner and owned & calls(parsed(module))
    }
    assert trespassing == {}
    assert owned & calls(parsed(Path(owner))), "the owner makes the calls"


# What serves no tenant, or wires the rest. Everything else in the gateway reaches records
# through a right: a caller, a token or a signature (invariant 9).
KNOW_THE_STORE = {"app", "board", "cli", "door", "health", "metrics", "wsgi"}


def test_in_the_gateway_only_the_door_knows_the_store() -> None:
    trespassing = [
        str(module)
        for module in modules(("gateway",))
        if module.stem not in KNOW_THE_STORE and _touches_the_store(parsed(module))
    ]
    assert trespassing == []


def test_only_a_token_makes_a_caller() -> None:
    makers = {
        str(module)
        for module in modules(PRODUCT)
        for node in ast.walk(parsed(module))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "Caller"
    }
    assert makers == {"gateway/auth.py"}


def test_every_change_names_its_actor() -> None:
    """The journal is the audit log; an entry without an actor would say nothing."""
    nameless = [
        f"{module}: {ast.unparse(node)[:60]}"
        for module in modules(PRODUCT)
        for node in ast.walk(parsed(module))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).rpartition(".")[0].endswith("catalog")
        and ast.unparse(node.func).endswith(".write")
        and "actor" not in {keyword.arg for keyword in node.keywords}
    ]
    assert nameless == []


def _touches_the_store(tree: ast.Module) -> bool:
    return any(
        (isinstance(node, ast.ImportFrom) and node.module in ("cas.store", "cas.catalog.local"))
        or (isinstance(node, ast.Import) and any(a.name == "cas.store" for a in node.names))
        or (isinstance(node, ast.Attribute) and node.attr in ("catalog", "_catalog"))
        for node in ast.walk(tree)
    )

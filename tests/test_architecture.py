"""The house as a test: who may import whom, what files may be called, how long they may be."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
OURS = ("pallas_kernels", "mesanet_jax", "r2t2_jax", "experiments")
MAY_IMPORT = {
    "pallas_kernels": (),
    "mesanet_jax": ("pallas_kernels",),
    "r2t2_jax": ("pallas_kernels",),
    "experiments": ("pallas_kernels", "mesanet_jax", "r2t2_jax"),
}
ENGINE_ROOM_IMPORTS = {"jax", "numpy", "jaxtyping"}  # and the standard library
STANDARD_LIBRARY = {"collections", "dataclasses", "functools", "logging", "math", "typing", "__future__"}
FILES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))
MAX_LINES = 400


def package_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).parts[0]


def imports(source: str) -> set[str]:
    """Top-level names of everything a module imports, wherever in it the statement stands."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides where it goes"
            names.add(str(node.module).split(".")[0])
    return names


def identify(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


each_file = pytest.mark.parametrize("path", FILES, ids=identify)


def test_the_walk_found_the_packages():
    assert {package_of(path) for path in FILES} >= {"pallas_kernels", "mesanet_jax", "experiments"}


@each_file
def test_imports_follow_the_arrows(path):
    package = package_of(path)
    ours = imports(path.read_text()) & set(OURS) - {package}
    assert ours <= set(MAY_IMPORT[package]), f"{package} may not import {ours - set(MAY_IMPORT[package])}"


@pytest.mark.parametrize("path", [path for path in FILES if package_of(path) == "pallas_kernels"], ids=identify)
def test_the_engine_room_needs_jax_and_numpy_alone(path):
    allowed = ENGINE_ROOM_IMPORTS | STANDARD_LIBRARY | {"pallas_kernels"}
    assert imports(path.read_text()) <= allowed


@each_file
def test_files_have_found_their_noun(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    assert not {"utils", "util", "common", "misc", "helpers", "helper", "lib"} & set(parts)


@each_file
def test_files_fit_in_one_reading(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


@each_file
def test_nothing_that_is_loaded_can_run_code(path):
    """Never pickle on a load path and never trust_remote_code; saying allow_pickle=False aloud is welcome."""
    source = path.read_text()
    assert not imports(source) & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f"line {node.value.lineno}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import experiments.loop", {"experiments"}),
        ("def f():\n    from r2t2_jax import models", {"r2t2_jax"}),
        ("if True:\n    import pickle as p, os.path", {"pickle", "os"}),
        ("'import experiments'", set()),
    ],
)
def test_imports_are_found_wherever_they_stand(source, found):
    assert imports(source) == found

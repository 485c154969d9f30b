"""Two CPU devices for everyone, so that whatever is sharded is tested sharded; hypothesis draws the same every time.

The tests spend their time in the compiler, so what was compiled once in a session is not compiled again, and nothing is
optimised for speed but where a test says so, with `pytest.mark.optimized`: rounding depends on it.

`--gpu` leaves all this to a GPU instead, for the tests of its kernels: -n 0 --gpu tests/pallas_kernels/test_*_gpu.py
"""

import os
import tempfile

import hypothesis
import jax
import pytest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of the workers: there are as many as cores already
_cache = tempfile.TemporaryDirectory(prefix="compiled-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name  # of the processes that tests start
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

hypothesis.settings.register_profile("house", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("house")


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run kernels for GPUs on the one that is here, not interpreted")


def pytest_configure(config):
    if config.getoption("--gpu"):
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several workers, one device
        if jax.default_backend() != "gpu":
            raise pytest.UsageError(f"--gpu: jax has found no GPU, only {jax.default_backend()}; leave it out.")
        return
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_num_cpu_devices", 2)


@pytest.fixture(autouse=True)
def optimize_where_marked(request):
    """Compiles the programs of a marked test anew, and those of the next one: no key of a compiled program says how."""
    if request.node.get_closest_marker("optimized") is None:
        yield
        return
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """A process may map only so many regions of memory, 65,530 on Linux, and every compiled program takes several.

    Past that the compiler ends the process. What another file needs again is read from the cache above.
    """
    yield
    jax.clear_caches()

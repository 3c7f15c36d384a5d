"""Test harness: eight host devices, strict dtype promotion, shape annotations checked."""

import gc
import os
import sys
from collections.abc import Iterator

from tests import quick_xla

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Once it is loaded beside other compiled modules, the interpreter dies at the latest when it exits.
sys.modules["sentencepiece"] = None

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Tracing makes objects by the million, and few of them are garbage.
gc.set_threshold(50_000, 10, 10)
quick_xla.begin(devices=8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Annotations of public functions are checked here and nowhere else.
install_import_hook(
    ["jvgen.nn", "jvgen.models", "jvgen.diffusion", "jvgen.geometry", "jvgen.losses"], "beartype.beartype"
)


# Long, and late by name: begun last, one of them runs while the other processes have nothing left.
LONG = ("test_video_vae_task.py", "test_video_dit.py", "test_step.py", "test_saved_runs.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_left_alone() -> None:
    """Garbage collection looks at a file's own objects: those of all files before it take it seconds each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture(scope="module")
def shared_compilations(tmp_path_factory) -> Iterator[None]:
    """Programs that take time are compiled once for the module; to keep a small one costs more than to compile it."""
    changed = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in changed}
    for name, value in changed.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def quick_compilations(shared_compilations) -> Iterator[None]:
    """For real steps of small networks, which spend their time on compiling: compile once and without optimization."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """For runs of real networks whose sharding is not what is tested: programs for a mesh compile longer."""
    device = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("devices", "local_devices"):
            patch.setattr(jax, name, lambda *_, **__: list(device))
        yield

"""What holds for every test: no network, few threads, the same seed, GPU tests only where there is a GPU.

Without a GPU, Triton kernels run in Triton's interpreter. It has to be chosen before anything imports triton: triton's
own functions, such as `tl.cumsum`, are made interpreted or compiled then.
"""

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator

# Before the first import of what reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import tests.stores  # noqa: F401  registers kept://

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        from tests.interpreter import patch_once_per_launch

        patch_once_per_launch()

# `make test` runs several processes; more threads than cores make every one of them slower.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // _workers))


# Files that take more than 20 seconds of a core, the longest first; before them the one that waits longest.
LONG = (
    "test_hangs.py", "test_curves_equal_on_every_mesh.py", "test_gradients_equal_on_every_mesh.py", "test_memory.py",
    "test_compiled_blocks.py", "test_compiles.py", "test_experts_triton.py", "test_compiled_adapters.py",
    "test_microbatch.py", "test_run.py", "test_stores.py", "test_resume.py", "test_curves_of_the_shipped_yaml.py",
    "test_docs.py", "test_plan.py", "test_torchrun.py", "test_damage.py", "test_saving.py", "test_mixed_precision.py",
    "test_yamls.py", "test_quick_check.py", "test_families.py", "test_convert.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that no process begins one when the others are done; skip what needs a GPU."""
    places = {name: place for place, name in enumerate(LONG)}
    long = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("dist")}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG) + (item.path not in long)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """A full collection of what is there by now takes a third of a second, which a run's first step would have each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(17)


@pytest.fixture(autouse=True)
def _code_of_users_is_forgotten(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Modules that a test has imported from a folder of its own; the next test may have one of that name."""
    before = set(sys.modules)
    yield
    folder = str(tmp_path_factory.getbasetemp())
    for name in sys.modules.keys() - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
            del sys.modules[name]

"""Starts the SGLang server. A script of its own: it imports nothing of ours, so another interpreter's SGLang may run it.

On a CPU it supplies the two things SGLang 0.5.23 misses there: the schemas of torchvision's operators (the wheel on PyPI is
built for CUDA and cannot load beside a CPU torch) and the names it imports from `sgl_kernel`, which plain serving never calls.
It also quickens SGLang's attention and checksums there (`cpu_attention.py`, `cpu_checksums.py`). SGLang's child processes import
this file again as ``__mp_main__``, so everything they need is done at module level.

The server dies with the worker that started it, even when that one was killed with -9.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import signal
import sys
import types
from pathlib import Path

PARENT_VARIABLE = "FORAGE_ENGINE_PARENT"
"""The worker's process id; the server ends at once if that one is gone before it could ask the kernel to be told."""
PR_SET_PDEATHSIG = 1
ENGINE_PACKAGES = Path(sys.prefix) / "engine-packages"
"""Packages for the engine alone, such as torchvision: beside a CPU torch its import fails without the schemas defined here."""
KERNEL_NAMES = (
    "assign_req_to_token_pool_cpu",
    "copy_all_layer_kv_cache_cpu",
    "rotate_input_ids_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "build_tree_kernel_efficient_cpu",
    "verify_tree_greedy_cpu",
)
"""Speculative decoding and KV moves only."""


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the worker ends; SGLang's own children ask the same of this process."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    expected = os.environ.get(PARENT_VARIABLE)
    if expected and os.getppid() != int(expected):
        sys.exit(f"the rollout worker (process {expected}) is gone: the engine has nobody to serve")


def supply_kernel_names() -> None:
    """Put a module `sgl_kernel` in place whose functions say what they are when called; a real one is left alone."""
    if importlib.util.find_spec("sgl_kernel"):
        return
    module = types.ModuleType("sgl_kernel")
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", loader=None)
    for name in KERNEL_NAMES:
        setattr(module, name, _absent(name))
    sys.modules["sgl_kernel"] = module


def _absent(name: str):  # noqa: ANN202
    def call(*_: object, **__: object) -> None:
        raise NotImplementedError(
            f"sgl_kernel.{name} has no CPU version: take speculative decoding out of rollout.engine.extra_args"
        )

    return call


def supply_torchvision_schemas() -> object | None:
    """Define the operators' schemas unless torchvision's own library loads. Keep the result alive: it owns the definitions."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
        return None
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


def quicken(part: str) -> None:
    """Run a file beside this one. By its path: this folder must not come on sys.path, where its names would hide other modules."""
    spec = importlib.util.spec_from_file_location(f"forage_{part}", Path(__file__).with_name(f"{part}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()


if ENGINE_PACKAGES.is_dir() and str(ENGINE_PACKAGES) not in sys.path:
    sys.path.append(str(ENGINE_PACKAGES))
if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
    supply_kernel_names()
    _schemas = supply_torchvision_schemas()
    if __name__ == "__mp_main__":
        quicken("cpu_attention")
        quicken("cpu_checksums")

if __name__ == "__main__":
    die_with_parent()
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args(sys.argv[1:]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)

"""What differs between versions and builds of torch, and what that asks of us."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import torch

#: Options of ``torch.compile`` by which each compiled function counts its recompilations by itself;
#: before torch 2.13 those of one source share a count, and give up the earlier.
OWN_COMPILE_CACHE: dict[str, Any] = (
    {"isolate_recompiles": True}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters
    else {}
)
#: Operators of torchvision's library whose names its Python part uses while it is imported.
OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: torch.library.Library | None = None


def provide_torchvision_operators() -> bool:
    """Declare torchvision's compiled operators where its library cannot be loaded; returns whether
    that was so.

    The package index has torchvision for CUDA only. Beside a torch for the CPU its library does not
    load, and the import of torchvision fails (``operator torchvision::nms does not exist``), and
    with it that of timm and of the models of transformers, although none of them needs these
    operators. With their names declared, all else works. Call it before the first import of timm,
    torchvision or a model of transformers. Where torch and torchvision match, or there is no
    torchvision, it does nothing.
    """
    global _library
    if _library is not None:
        return True
    spec = importlib.util.find_spec("torchvision")
    if torch.version.cuda or spec is None:
        return False
    libraries = [
        str(path)
        for folder in spec.submodule_search_locations or ()
        for path in Path(folder).glob("_C*.so")
    ]
    if any(map(_loads, libraries)):
        return False
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in OPERATORS.items():
        _library.define(name + schema)
    return True


def _loads(path: str) -> bool:
    """Whether a library of operators can be loaded."""
    try:
        torch.ops.load_library(path)
    except OSError:
        return False
    return True

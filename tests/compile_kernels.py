"""Compiles the kernels for an H100 (compute capability 9.0), which needs no GPU: in a process that
does not interpret them.
"""

from __future__ import annotations

import inspect
from typing import Any

from triton import compile as compile_for
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ddc.optim import kernels

TABLES = {"order": "*i32", "starts": "*i32", "weight_offsets": "*i64", "grad_offsets": "*i64"}
NUMBERS = dict.fromkeys(("layers", "parts", "groups", "ROWS", "COLUMNS", "STEPS"), "i32")
SCALARS = dict.fromkeys(("first", "second", "rest"), "fp32")
UNITS: list[dict[str, Any]] = [
    {"UNIT": 0, "FACTOR": 1, "CENTRED": False, "AVERAGED": -1, "BR": 4, "BC": 256},
    {"UNIT": 1, "FACTOR": -1, "CENTRED": True, "AVERAGED": -1, "BR": 8, "BC": 128},
    {"UNIT": 1, "FACTOR": -1, "CENTRED": False, "AVERAGED": 0, "BR": 64, "BC": 64},
]
FREE: list[dict[str, Any]] = [
    {"FACTOR": 0, "RELAXED": 0, "AVERAGED": -1, "BR": 4, "BC": 256},
    {"FACTOR": -1, "RELAXED": -1, "AVERAGED": 0, "BR": 2, "BC": 512},
    {"FACTOR": -1, "RELAXED": -1, "AVERAGED": 1, "BR": 16, "BC": 64},
]


def machine_code(kernel: Any, values: dict[str, Any], weights: str) -> Any:
    """Compile a kernel with some of its constants."""
    signature, constants = {}, {}
    for name, parameter in inspect.signature(kernel.fn).parameters.items():
        if "constexpr" in str(parameter.annotation):
            signature[name], constants[name] = "constexpr", {"ALIGNED": 16, **values}[name]
        else:
            known = {"weights": weights, "grads": weights} | TABLES | NUMBERS | SCALARS
            signature[name] = known.get(name, "*fp32")
    source = ASTSource(kernel, signature, constexprs=constants)
    return compile_for(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def main() -> None:
    cases = [(kernels.column_sums, {"BR": 8, "BC": 128}), *((kernels.free, each) for each in FREE)]
    cases += [
        (each, values)
        for each in (kernels.unit_sums, kernels.direct, kernels.write)
        for values in UNITS
    ]
    for kernel, values in cases:
        for weights in ("*fp32", "*bf16"):
            assert len(machine_code(kernel, values, weights)) > 1000
    print(f"{2 * len(cases)} kernels")


if __name__ == "__main__":
    main()

"""The library's fast tests on the installed wheel (make test-torch): what the tests need of the
harness, models and data, they take from the repository.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import ddc

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = ("gauges", "canonical", "parameters", "ddcadam", "ddcmuon", "degenerate", "rules")


def main() -> int:
    """Run the tests; returns pytest's exit status."""
    if Path(ddc.__file__).is_relative_to(REPOSITORY / "ddc"):
        raise SystemExit("ddc is that of the repository: install the wheel, and unset PYTHONPATH")
    print(f"ddc {ddc.__version__} of {ddc.__path__[0]}, torch {torch.__version__}")
    ddc.__path__.append(str(REPOSITORY / "ddc"))  # for ddc.models and ddc.data
    os.chdir(REPOSITORY)
    files = [f"tests/test_{name}.py" for name in FILES]
    return pytest.main(["-q", "-m", "not slow", *files, *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(main())

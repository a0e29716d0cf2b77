"""The kernels of ``kernels.c`` on a CPU: compiled once for this machine by its C compiler, in some
seconds, and kept in the user's cache.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
#: Roots and quotients of vectors need the second and third.
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-std=c11", "-fPIC")
#: Lines that tell what a processor can do, on x86 and on ARM.
OF_PROCESSOR = ("model name", "flags", "Features", "CPU")
#: Entries that are worth a second thread.
WORTH_A_THREAD = 2**16


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there is no C compiler that takes them, or nowhere to keep
    what it makes, which is said.
    """
    named = os.environ.get("CC")
    if not named and shutil.which("cc") is None:
        return None
    compiler = shlex.split(named or "cc")
    try:
        path = cache() / f"kernels-{fingerprint(compiler)}.so"
        if not path.exists():
            compiled(compiler, path)
        return ctypes.CDLL(str(path))
    # no home, a compiler that speaks no UTF-8: training does not end for any of it
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        log.warning(
            "%s does not make kernels of %s, so steps are taken by torch's operations, which are"
            " slower (fused=False does so without this warning): %s",
            shlex.join(compiler),
            SOURCE.name,
            getattr(error, "stderr", "") or error,
        )
        return None


def cache() -> Path:
    """The user's own folder.

    Raises:
        OSError: there is none, or others may write to it: what lies in it is run.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "ddc"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if hasattr(os, "getuid") and (about.st_uid != os.getuid() or about.st_mode & 0o022):
        raise OSError(f"others may write to {folder}")
    return folder


def fingerprint(compiler: Sequence[str]) -> str:
    """Of the source, the compiler, and the processor whose instructions it uses."""
    try:
        cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        processor = "".join(line for line in cpu.splitlines() if line.startswith(OF_PROCESSOR))
    except OSError:
        processor = platform.processor()
    version = run([*compiler, "--version"])
    key = "\n".join([*compiler, version, platform.machine(), processor, *FLAGS])
    return hashlib.sha256(key.encode() + SOURCE.read_bytes()).hexdigest()[:16]


def compiled(compiler: Sequence[str], path: Path) -> None:
    """Make the library, at once where others may make it too.

    Raises:
        subprocess.CalledProcessError: the compiler says why not.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [*compiler, *FLAGS, "-shared", "-o", str(made), str(SOURCE), "-lm"]
        try:
            run([*command, "-march=native"])
        except subprocess.CalledProcessError:  # which not all compilers know
            run(command)
        os.replace(made, path)


def run(command: list[str]) -> str:
    """What a compiler says."""
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


@functools.cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Threads that run kernels, which let go of Python's lock."""
    return ThreadPoolExecutor(threads, thread_name_prefix="ddc")


if hasattr(os, "register_at_fork"):  # a forked process has none of these threads
    os.register_at_fork(after_in_child=pool.cache_clear)


def launch(name: str, grid: tuple[int, ...], size: int, *arguments: Any) -> None:
    """Run all programs of a kernel, on as many threads as torch's operations take.

    Args:
        name: of the kernel.
        grid: of :mod:`ddc.optim.kernels`.
        size: entries of all weights.
        arguments: of the kernel there.
    """
    blocks, count = grid
    programs = blocks * count
    if not programs:
        return
    # tensors of hyperparameters may bring another dtype; these live as long as the kernel runs
    given = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    passed = (blocks, count, *(x.data_ptr() if isinstance(x, Tensor) else x for x in given))
    kernel = kernel_of(name, tuple(isinstance(x, float) for x in passed))
    run_programs(kernel, programs, size, *passed)


def run_polar(stack: ctypes.Structure, programs: int, size: int) -> None:
    """Run the kernel ``polar`` on what :class:`ddc.optim.polar_in_c.CPolar` says."""
    kernel, room_of = polar()
    where = ctypes.byref(stack)
    numbers = room_of(where)

    def run(begin: int, end: int) -> None:
        kernel(begin, end, where, room(numbers).data_ptr())

    run_programs(run, programs, size)


#: What kernels write to between their passes, one for each thread: it stays in the cache.
rooms = threading.local()


def room(numbers: int) -> Tensor:
    """A thread's room for so many numbers in float32, or more."""
    found: Tensor | None = getattr(rooms, "tensor", None)
    if found is None or len(found) < numbers:
        found = rooms.tensor = torch.empty(numbers, dtype=torch.float32, device="cpu")
    return found


def run_programs(kernel: Callable[..., Any], programs: int, size: int, *passed: Any) -> None:
    """Share the programs of a kernel out to threads."""
    threads = min(torch.get_num_threads(), programs, max(1, size // WORTH_A_THREAD))
    if threads == 1:
        kernel(0, programs, *passed)
        return
    cuts = [programs * i // threads for i in range(threads + 1)]
    done = [
        pool(torch.get_num_threads()).submit(kernel, *ends, *passed)
        for ends in itertools.pairwise(cuts)
    ]
    try:
        for each in done:
            each.result()
    finally:  # whatever is raised here, they write to memory that must be there
        wait(done)


@functools.cache
def polar() -> tuple[Callable[..., None], Callable[..., int]]:
    """The kernel of that name, and what says how much room it needs."""
    found = library()
    assert found is not None
    kernel, room_of = found["ddc_polar"], found["ddc_polar_room"]
    kernel.restype, room_of.restype = None, ctypes.c_int64
    kernel.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    room_of.argtypes = [ctypes.c_void_p]
    return kernel, room_of


@functools.cache
def kernel_of(name: str, are_floats: tuple[bool, ...]) -> Callable[..., None]:
    """A kernel that takes these arguments after the programs that it is to run: floats, and else
    integers or where tensors lie.
    """
    found = library()
    assert found is not None
    kernel = found[f"ddc_{name}"]
    kernel.restype = None
    kinds = (ctypes.c_float if each else ctypes.c_int64 for each in are_floats)
    kernel.argtypes = [ctypes.c_int64, ctypes.c_int64, *kinds]
    return kernel

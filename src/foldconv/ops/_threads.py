"""Run a compiled loop on the threads that torch already has.

A second pool of threads would wait for its next task by spinning, on the very cores that torch's threads want, and
torch's on those of the second: that made a training step slower than the loops made it faster. Where torch uses GNU's
OpenMP (on Linux) its own entry point is therefore called; elsewhere a pool of Python threads does.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

MOST = 16
"""Threads enter a loop one after the other; more would wait longer than they work."""
WORK_OF_ONE = 1 << 17
"""Weights that one thread has done before a second has come to help."""
LEAST_OF_TWO = 2 * WORK_OF_ONE
"""Weights from which on a second thread helps."""

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(loop: Callable[..., Any], size: int, *arguments: Any) -> None:
    """Call ``loop(me, all, *arguments)`` for every `me` of `all` threads; the loop must release the GIL.

    `size` is the number of weights it goes through.
    """
    if size < LEAST_OF_TWO:
        return loop(0, 1, *arguments)
    threads = max(1, min(torch.get_num_threads(), MOST, size // WORK_OF_ONE))
    openmp = _openmp()
    if threads == 1:
        loop(0, 1, *arguments)
    elif openmp is not None:
        _run_in_openmp(openmp, threads, loop, arguments)
    else:
        rest = [_pool().submit(loop, me, threads, *arguments) for me in range(1, threads)]
        loop(0, threads, *arguments)
        for future in rest:
            future.result()


def _run_in_openmp(openmp: Any, threads: int, loop: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    failures: list[BaseException] = []

    def body(_: Any) -> None:
        try:
            loop(openmp.omp_get_thread_num(), openmp.omp_get_num_threads(), *arguments)
        except BaseException as error:  # ctypes would print it and go on
            failures.append(error)

    openmp.GOMP_parallel(_BODY(body), None, threads, 0)
    if failures:
        raise failures[0]


@functools.cache
def _openmp() -> Any:
    """The OpenMP library that torch made visible to the process."""
    try:
        library = ctypes.CDLL(None)
        library.GOMP_parallel.restype = None
        library.GOMP_parallel.argtypes = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        return library if library.omp_get_thread_num and library.omp_get_num_threads else None
    except (AttributeError, OSError, TypeError):
        return None


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(MOST, thread_name_prefix="foldconv")

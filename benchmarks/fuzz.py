"""Write docs/fuzz.md: what foldconv makes of damaged, odd and hostile files.

    python benchmarks/fuzz.py                               10,000 cases, about ten minutes on one core
    python benchmarks/fuzz.py --cases 200 --out table.md    a few seconds

For each kind of file, good ones are made, and changed at random: bits, pieces and lengths of the bytes; records of an
archive, with checksums that are right again; the values in it (types, shapes, names, levels, sizes, aliases). Each case
is read in a process of its own, with limits on time and memory. Reading may succeed or raise an error of foldconv's;
anything else is a fault: another exception, a crash, a hang, too much memory, code of the file's that runs.

The same seed gives the same cases. A fault is printed with its number; ``--only pth --first 17 --cases 1`` repeats it.
"""

import argparse
import collections
import contextlib
import itertools
import os
import platform
import random
import resource
import select
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from fuzzed_files import KINDS
from good_files import GOOD

import foldconv

OUTCOMES = ("loaded", "our error", "other exception", "hang", "memory", "code run")
FAULTS = OUTCOMES[2:]
SECONDS, BYTES = 20, 2 << 30
LONGEST = 2000  # characters of a message
CODE = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "os.mkdir",
    "os.remove",
    "socket.connect",
)
HEAD = """# Damaged, odd and hostile files

Good files of each kind, changed at random, each read in a process of its own: what came of it. A case may be loaded (a
changed value is a value) or refused by an error of foldconv's in one line; the other columns have to be 0. Written by
`python benchmarks/fuzz.py`, which says how files are changed.

"""


def outcome(read, path):
    """What comes of reading a file in a process of its own, and what was raised."""
    receiver, sender = os.pipe()
    sys.stdout.flush()
    process = os.fork()
    if not process:
        _read_in_child(read, path, sender)
    os.close(sender)
    ready, _, _ = select.select([receiver], [], [], 10 * SECONDS)  # a busy machine is no fault of the file's
    if not ready:
        os.kill(process, signal.SIGKILL)
    with open(receiver, "rb") as file:
        said = file.read().decode("utf-8", "replace")
    _, status, usage = os.wait4(process, 0)
    if "code run" in said:
        return "code run", said
    if not ready or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return "hang", f"over {SECONDS} seconds"
    if os.WIFSIGNALED(status):
        return "other exception", f"ended by signal {os.WTERMSIG(status)}"
    kind, _, text = said.partition("\n")
    if usage.ru_maxrss * 1024 > _resident() + BYTES // 2:
        return "memory", f"{usage.ru_maxrss >> 10} MiB"
    return kind, text


def _resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _read_in_child(read, path, sender):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    for number in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    warnings.simplefilter("ignore")

    def watch(event, arguments):
        if event in CODE:
            os.write(sender, f"code run: {event} {arguments!r}"[:500].encode())
            os._exit(0)

    sys.addaudithook(watch)
    try:
        read(path)
        said = "loaded\n"
    except (foldconv.FoldConvError, FileNotFoundError) as error:
        good = len(str(error)) <= LONGEST + len(str(path)) and str(error).isprintable()
        said = f"our error\n{error}" if good else f"other exception\na message of {len(str(error))} characters: {error}"
    except MemoryError as error:
        said = f"memory\nMemoryError: {error}"
    except BaseException as error:
        said = f"other exception\n{type(error).__name__}: {error}"
    os.write(sender, said[:4000].encode("utf-8", "replace"))
    os._exit(0)


def drawn(change, seed):
    """A changed file; where a writer refuses the change, the next that is drawn."""
    for attempt in itertools.count():
        with contextlib.suppress(Exception):
            return change(random.Random(f"{seed} {attempt}"))


def count(kinds, first, cases, seed):
    """Outcomes by kind of file; faults are printed."""
    torch.set_num_threads(1)
    counts = {kind: collections.Counter() for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for kind in kinds:
            path = Path(folder, f"good.{kind}")
            path.write_bytes(GOOD[kind]())
            found, text = outcome(KINDS[kind][1], str(path))
            if found != "loaded":
                raise SystemExit(f"the good {kind} file that the cases are made of: {found}: {text}")
        for number in range(first, first + cases):
            kind = kinds[number % len(kinds)]
            change, read = KINDS[kind]
            torch.manual_seed(number)
            path = Path(folder, f"case.{kind}")
            path.write_bytes(drawn(change, f"{seed} {number} {kind}"))
            found, text = outcome(read, str(path))
            counts[kind][found] += 1
            if found in FAULTS:
                print(f"{kind} {number}: {found}: {' '.join(text.split())[:300]}", flush=True)
        os.chdir("/")
    return counts


def table(counts, seed, seconds):
    """The counts in Markdown."""
    rows = ["| file | cases | " + " | ".join(OUTCOMES) + " |", "|---" * (len(OUTCOMES) + 2) + "|"]
    everything = sum(counts.values(), collections.Counter())
    for kind, found in {**{f"`.{kind}`": counts[kind] for kind in counts}, "all": everything}.items():
        numbers = " | ".join(f"{found[name]:,}" for name in OUTCOMES)
        rows.append(f"| {kind} | {found.total():,} | {numbers} |")
    versions = f"torch {torch.__version__.split('+')[0]}, NumPy {np.__version__}, Python {platform.python_version()}"
    return "\n".join(rows) + f"\n\nSeed {seed}, {versions}, {seconds:.0f} seconds.\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="how many files are read")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other cases")
    parser.add_argument("--only", choices=KINDS, help="one kind of file")
    parser.add_argument("--out", type=Path, help="file to write; default: docs/fuzz.md for all kinds, else none")
    options = parser.parse_args()
    out = options.out.absolute() if options.out else None
    if out is None and options.only is None:
        out = Path(__file__).absolute().parents[1] / "docs" / "fuzz.md"
    start = time.monotonic()
    counts = count([options.only] if options.only else [*KINDS], options.first, options.cases, options.seed)
    text = table(counts, options.seed, time.monotonic() - start)
    print(text)
    if out is not None:
        out.write_text(HEAD + text, encoding="utf-8")
    return int(any(found[name] for found in counts.values() for name in FAULTS))


if __name__ == "__main__":
    sys.exit(main())

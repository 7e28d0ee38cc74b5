"""Runs a command that dies with the process that started this script, as a worker of a cluster dies with its node.

    python tether.py COMMAND ...

Standard input is a pipe that nobody writes to. When it closes, its owner has ended, however that came about, and the
command is killed with all that it has started. Run as a file, this imports nothing but the standard library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main(command: list[str]) -> int:
    """Wait for the command, and give its exit code; 128 and the signal's number if one killed it."""
    interrupt = {signal.SIGINT}
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupt)  # Ray's processes block it, and theirs inherit that
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    signal.signal(signal.SIGINT, lambda *_: child.send_signal(signal.SIGINT))
    threading.Thread(target=_watch, args=(child,), daemon=True).start()
    code = child.wait()
    return code if code >= 0 else 128 - code


def _watch(child: subprocess.Popen[bytes]) -> None:
    # Not by sys.stdin, whose lock the interpreter wants at its end.
    while os.read(0, 1):
        pass
    if hasattr(os, "killpg"):
        os.killpg(child.pid, signal.SIGKILL)
    else:
        child.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Running programs: lines with the moment when they came, limits of time, and nothing left behind.

Separate because every section needs it, and because a program that hangs on a GPU must end here
and nowhere else: each runs in a process group of its own, which is killed as a whole.
"""

from __future__ import annotations  # for Python 3.9

import os
import queue
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field

KEPT_CHARACTERS = 4000


class Failed(Exception):
    """What was checked is not so, or could not be found out: one sentence for the report."""


@dataclass
class Result:
    """What a program did: lines are (seconds since its start, text)."""

    command: list
    code: int | None = None  # None: it ran past its limit
    seconds: float = 0.0
    out: list = field(default_factory=list)
    err: list = field(default_factory=list)

    def out_text(self) -> str:
        return "\n".join(text for _, text in self.out)

    def err_text(self) -> str:
        return "\n".join(text for _, text in self.err)

    def expect_success(self) -> "Result":
        if self.code == 0:
            return self
        how = "ran past its limit" if self.code is None else f"ended with exit code {self.code}"
        last = "; ".join(self.err_text().strip().splitlines()[-3:])
        why = f"{how} after {self.seconds:.1f} s: {last[-KEPT_CHARACTERS:]}"
        raise Failed(f"{why} ({' '.join(self.command)})")


class Process:
    """A program that runs; its lines can be waited for one by one."""

    def __init__(self, command: list, environment: dict | None = None, folder=None):
        self.result = Result([str(word) for word in command])
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            self.result.command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.lines: queue.Queue = queue.Queue()
        ends = [(self.process.stdout, self.result.out, True),
                (self.process.stderr, self.result.err, False)]
        self.threads = [threading.Thread(target=self.read, args=end, daemon=True) for end in ends]
        for thread in self.threads:
            thread.start()

    def read(self, pipe, lines: list, are_waited_for: bool) -> None:
        for raw in pipe:
            line = (time.monotonic() - self.started, raw.decode(errors="replace").rstrip("\r\n"))
            lines.append(line)
            if are_waited_for:
                self.lines.put(line)
        if are_waited_for:
            self.lines.put(None)

    def next_line(self, limit_s: float) -> tuple | None:
        """The next line of standard output; None at its end. Past the limit: queue.Empty."""
        return self.lines.get(timeout=max(0.01, limit_s))

    def wait(self, limit_s: float) -> Result:
        """Until it ends by itself, or it is killed."""
        try:
            self.result.code = self.process.wait(max(0.1, limit_s))
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.end()
        return self.result

    def stop(self, limit_s: float) -> Result:
        """Asks it to end, then makes it."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.wait(limit_s)

    def end(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # All of it has ended.
        self.process.wait()
        self.result.seconds = time.monotonic() - self.started
        for thread in self.threads:
            thread.join(5)


def run(command: list, limit_s: float, environment: dict | None = None, folder=None) -> Result:
    process = Process(command, environment, folder)
    try:
        return process.wait(limit_s)
    except BaseException:
        process.end()
        raise

"""Are two answers the same mathematics? math-verify decides, in a process of its own that has a time limit.

A power tower keeps Python in a single multiplication, which no signal and no thread interrupts. So the
process ends itself when the time is over: faulthandler's watchdog does that, on every system, whatever Python
is busy with. Where a process can fork, a copy of it compares, and only the copy ends; elsewhere it is started
again, which takes a second more.

This file is also that process's program. It then reads lines of JSON, [answer, found], and writes 0 or 1 for
each; so it imports nothing of the project, and math-verify only there.
"""
import faulthandler
import gc
import json
import logging
import os
import subprocess
import sys
import threading

SECONDS = 0.8                           # of a comparison; what is slower counts as different
LOCK = threading.Lock()                 # of the process: one question at a time
PROCESS = []                            # the running one, if any
# Of every kind one: parsers and caches are built when they are first needed, which takes up to half a second.
WARM_UP = (r"\left[ \frac{\pi^2}{8}, \infty \right)", r"(-\sqrt{3}, 2)", "x^5 - 2x^3 + 1", "(a+5)(b+2)",
           r"\{1, 2\}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"x \in [1,2]", "50\\%", r"\text{east}",
           "3 - 2i")


def same(answer, found):
    """Return whether math-verify finds two texts equal, or None if it is not installed."""
    with LOCK:
        if not PROCESS or PROCESS[0].poll() is not None:
            PROCESS[:] = start()
        if not PROCESS:
            return None
        process, verdict = PROCESS[0], ""
        try:
            process.stdin.write(json.dumps([answer, found]) + "\n")
            process.stdin.flush()
            verdict = process.stdout.readline()
        except OSError:                                     # it has ended
            pass
        finally:
            if not verdict:                                 # nobody reads a late verdict for the next one
                process.kill()
                process.wait()
        return verdict == "1\n"


def start():
    """Return a list of one new process that is ready to compare, or [] if it cannot import math-verify."""
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True, encoding="utf-8")
    return [process] if process.stdout.readline() == "ready\n" else []


def serve():
    """Answer the questions on stdin until it is closed."""
    logging.disable(logging.CRITICAL)                       # math-verify reports what it cannot parse
    for text in WARM_UP:                                    # a copy cannot keep what it has built for itself
        compare(text, text)
    gc.freeze()                                             # so that no copy walks through all of it
    print("ready", flush=True)
    for line in sys.stdin:
        print(int(in_a_copy(*json.loads(line)) if hasattr(os, "fork") else in_time(*json.loads(line))),
              flush=True)


def in_a_copy(answer, found):
    """Return what a forked copy of this process decides; False if the copy ends before that."""
    copy = os.fork()
    if copy == 0:
        os._exit(2 + in_time(answer, found))                # 0 and 1 are also exit codes of an accident
    return os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]) == 3


def in_time(answer, found):
    """Return whether two texts are equal; end this process if that takes longer than SECONDS."""
    with open(os.devnull, "w") as nowhere:                  # for the watchdog's traceback
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=nowhere)
        equal = compare(answer, found)
        faulthandler.cancel_dump_traceback_later()
    return equal


def compare(answer, found):
    """Return whether math-verify finds two texts equal; what it fails on is different."""
    from math_verify import parse, verify
    try:                                                    # without its own time limits, which are signals
        pair = [parse(f"${text}$", parsing_timeout=None) for text in (answer, found)]
        return bool(verify(*pair, timeout_seconds=None))    # the answer first: the order matters
    except Exception:
        return False


if __name__ == "__main__":
    serve()

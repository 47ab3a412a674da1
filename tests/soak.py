"""Ends runs again and again. Each, once it got through, is compared with one that was left alone:
results, weights and log must be equal to the bit. Not part of the test suite.

    python tests/soak.py --kills 100

Each run is of another method than the one before, on one process or on two. It is ended at a random
moment, or just while a file is being written, by SIGKILL, SIGTERM or Ctrl-C, all its processes or
one of them (the others are then ended as by torchrun), and started again with --resume, until it
gets through, by itself or since it was ended ten times.
"""
import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from conftest import ROOT, SHORT, Launch, quarter_digits, read_results, run_file
from test_resume import log_lines, same_model

import utils

METHODS = ["template", *("icarl lucir podnet aanets bal_ft itaml der feature_kd".split())]
KINDS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


def run(name, flags, seconds):
    """A run on a quarter of the training images, from its command line."""
    quarter_digits()
    utils.CHECKPOINT_SECONDS = seconds
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    run_file(ROOT, "template.py" if name == "template" else f"tutorial.methods.{name}", flags)


def writing(folder):
    """Whether a file is being written at this moment."""
    return folder.exists() and any(folder.glob("*.part"))


def wait_to_end(started, draw, folder, seconds):
    """Wait for the moment to end a run that takes so many seconds. False: it was through before."""
    moment, in_a_file = time.time() + draw.uniform(0.3, seconds), draw.random() < 0.3
    while time.time() < moment or (in_a_file and not writing(folder)):
        if not all(process.is_alive() for process in started.processes):
            return False
        time.sleep(0.0005)
    return True


def end(started, draw):
    """End all processes, or one of them, by a random signal. Returns it, and how many."""
    number, alone = draw.choice(KINDS), draw.random() < 0.3
    if not started.stdout():  # perhaps not yet at the command line, from where on we listen
        number = signal.SIGKILL
    for process in draw.sample(started.processes, 1) if alone else started.processes:
        with contextlib.suppress(ProcessLookupError):  # it was through just now
            os.kill(process.pid, number)
    codes, error = started.wait(30), started.stderr()
    # At most one line: of ours, or that a process was lost.
    assert error.count("\n") <= 1 and "Traceback" not in error, error
    assert number == signal.SIGKILL or 128 + number in codes or 0 in codes, (codes, error)
    return number.name, "one of two" if alone and len(started.processes) > 1 else "all"


def soak(name, processes, draw, folder, reference, seconds):
    """One run, ended up to ten times. Returns the list of (signal, whom)."""
    ends, out = [], folder / "run"
    flags = [*SHORT, "--output_dir=run", "--resume"]
    while True:
        started = Launch(folder, run, (name, flags, draw.choice((0, 30))), processes, {})
        if len(ends) < 10 and wait_to_end(started, draw, out, seconds):
            ends.append(end(started, draw))
            continue
        codes = started.wait()
        assert codes == [0] * processes, (codes, started.stderr())
        break
    assert read_results(out) == read_results(reference), name
    assert same_model(out, reference) and log_lines(out) == log_lines(reference), name
    return ends


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, references, counts, runs = random.Random(args.seed), {}, collections.Counter(), 0
    with tempfile.TemporaryDirectory() as top:
        while counts.total() < args.kills:
            name, processes = METHODS[runs % len(METHODS)], 1 + runs // len(METHODS) % 2
            if (name, processes) not in references:
                folder = Path(tempfile.mkdtemp(dir=top))
                begin = time.time()
                arguments = name, [*SHORT, "--output_dir=run"], 30
                started = Launch(folder, run, arguments, processes, {})
                assert started.wait() == [0] * processes, started.stderr()
                references[name, processes] = folder / "run", time.time() - begin
            folder = Path(tempfile.mkdtemp(dir=top))
            try:
                ends = soak(name, processes, draw, folder, *references[name, processes])
            except AssertionError as error:
                raise SystemExit(f"{name}, {processes} processes, {folder}, run {runs}: {error}")
            counts.update(ends)
            runs += 1
            shutil.rmtree(folder)
            print(f"{runs} runs, {counts.total()} ends: {name}, {processes}", flush=True)
    print(json.dumps({" ".join(key): count for key, count in sorted(counts.items())}))


if __name__ == "__main__":
    main()

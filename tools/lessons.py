"""Runs the cells of every lesson, as `nbdev_test` does, each in a process of its own.

Importing PyTorch, pandas and matplotlib takes several seconds, a lesson's own cells often less. So one process imports them
once, computes nothing, and makes a copy of itself for each lesson (a fork), which begins with what is imported.
"""
import argparse
import os
import signal
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from parts import ROOT, lessons

# what lessons import, and what runs them
READY = ('torch', 'pandas', 'matplotlib.pyplot', 'seaborn', 'scipy.stats', 'IPython.core.interactiveshell', 'nbdev.test', 'papermill',
         'pycocotools.mask', 'safetensors.torch', 'accelerate', 'typer.testing')
LOGS = ROOT/'build'


def log_of(path):
    "Where a lesson's output goes: build/nbs-part-lesson.ipynb.log."
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return LOGS/('-'.join(p for p in shown.parts if p != path.anchor) + '.log')


def run_lesson(path):
    "In the copy: all cells, output to the lesson's log, then the end of the process."
    # a group of its own: what a lesson starts ends with it
    os.setsid()
    log = os.open(log_of(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    status = 1
    try:
        from nbdev.config import get_config
        from nbdev.test import test_nb
        passed, seconds = test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
        print(f'{path.name}: {seconds:.1f} s')
        status = 0 if passed else 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        # without the parent's exit handlers
        os._exit(status)


def begin(path):
    "A copy of this process that runs a lesson; its number."
    pid = os.fork()
    if pid == 0: run_lesson(path)
    return pid


def stop(pid):
    "End a lesson and all that it started."
    with suppress(ProcessLookupError): os.killpg(pid, signal.SIGKILL)


def ended(running, limit):
    "Wait until a lesson ends or its time is up: (path, what is wrong or '')."
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            path, _ = running.pop(pid)
            # what it has left running
            stop(pid)
            if status == 0: wrong = ''
            elif os.WIFEXITED(status): wrong = 'a cell failed'
            else: wrong = f'it was killed by signal {os.WTERMSIG(status)}'
            return path, wrong
        for pid, (path, began) in running.items():
            if time.monotonic() - began < limit: continue
            stop(pid), os.waitpid(pid, 0)
            running.pop(pid)
            return path, f'stopped after {limit} s'
        time.sleep(.05)


def run_all(paths, cores, limit):
    "Every lesson, several at once; how many failed."
    # the last first: tutorials train, and a long lesson that begins last keeps the other processors waiting
    waiting, running, failed = list(paths), {}, 0
    try:
        while waiting or running:
            while waiting and len(running) < cores:
                path = waiting.pop()
                running[begin(path)] = path, time.monotonic()
            path, wrong = ended(running, limit)
            shown = os.path.relpath(path, ROOT)
            if not wrong: print(f'ok {shown}', flush=True)
            else: print(log_of(path).read_text(errors='replace') + f'FAILED {shown}: {wrong}', flush=True)
            failed += bool(wrong)
    finally:
        # Ctrl-C, too, leaves nobody at work
        for pid in running: stop(pid)
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('lessons', nargs='*', type=Path, help='notebooks; none: all lessons')
    parser.add_argument('--cores', type=int, default=os.cpu_count(), help='lessons at once')
    parser.add_argument('--seconds', type=int, default=300, help='time limit of one lesson')
    told = parser.parse_args()
    paths = [p.resolve() for p in told.lessons] or lessons()
    if absent := [str(p) for p in paths if not p.is_file()]: sys.exit(f'no such lesson: {", ".join(absent)}')
    LOGS.mkdir(exist_ok=True)
    os.environ.update(OMP_NUM_THREADS='1', MPLBACKEND='agg')
    # where nbdev looks for its settings
    os.chdir(ROOT)
    for name in READY: import_module(name)
    if failed := run_all(paths, told.cores, told.seconds): sys.exit(f'{failed} of {len(paths)} lessons failed')


if __name__ == '__main__': main()

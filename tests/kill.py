"""`make test-kill`: `lts reproduce` killed at random moments and run again, on a full disk, and twice at once. Half an hour; KILLS=N changes the number."""
import os
import random
import signal
import subprocess
import time

import pytest
from test_batch import RUNS, at_work, command, finished, gone_within, run

KILLS = int(os.environ.get('KILLS', 30))
TABLES = 'results.csv', 'table4.csv', 'table4.md', 'table4.tex', 'claims.csv', 'effects.csv'
rng = random.Random(2021)


def start(out, root):
    return subprocess.Popen(command(out, root), start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def same(a, b): return [f for f in TABLES if (a/f).read_bytes() != (b/f).read_bytes()]


@pytest.fixture(scope='session')
def calm(tmp_path_factory):
    "An undisturbed run, and how long it took."
    base, began = tmp_path_factory.mktemp('calm'), time.time()
    result = run(base/'out', base/'data')
    assert result.returncode == 0, result.stdout + result.stderr
    return base/'out', base, time.time() - began


@pytest.mark.parametrize('how, share', [(rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]), rng.random()) for _ in range(KILLS)],
                         ids=lambda v: v.name if isinstance(v, signal.Signals) else f'{v:.2f}')
def test_killed_at_a_random_moment(calm, tmp_path, how, share):
    "Data and all: nothing of the first attempt but what lies in its folders."
    expected, _, seconds = calm
    out, root = tmp_path/'out', tmp_path/'data'
    process = start(out, root)
    time.sleep(share*seconds)
    if process.poll() is None: os.killpg(process.pid, how)
    process.communicate(timeout=60)
    assert gone_within(5, out), at_work(out)
    result = run(out, root)
    assert result.returncode == 0, result.stdout + result.stderr
    assert same(expected, out) == []
    assert not list(out.rglob('.*.part')), 'nothing half-written is left'


def test_two_at_once(calm, tmp_path):
    "The second says that it waits, and finds everything done."
    expected, base, _ = calm
    first = start(tmp_path/'out', base/'data')
    time.sleep(6)
    second = run(tmp_path/'out', base/'data')
    said, _ = first.communicate(timeout=300)
    assert first.returncode == second.returncode == 0, said + second.stdout + second.stderr
    assert 'waiting for it' in second.stdout
    assert same(expected, tmp_path/'out') == [] and len(finished(tmp_path/'out')) == RUNS


@pytest.mark.parametrize('megabytes', [1, 3, 6, 12])
def test_a_full_disk(calm, tmp_path, megabytes):
    "A small tmpfs: a sentence, and after there is room again the same bytes."
    expected, base, _ = calm
    disk = tmp_path/'disk'
    disk.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={megabytes}m', 'none', disk], capture_output=True, text=True)
    if mounted.returncode: pytest.skip(f'a tmpfs cannot be mounted here: {mounted.stderr.strip()}')
    try:
        result = run(disk/'out', base/'data')
        assert result.returncode in (1, 2)
        assert 'Traceback' not in result.stdout + result.stderr
        assert 'lts: ' in result.stderr or 'FAILED' in result.stdout, result.stdout + result.stderr
        subprocess.run(['mount', '-o', 'remount,size=400m', disk], check=True)
        result = run(disk/'out', base/'data')
        assert result.returncode == 0, result.stdout + result.stderr
        assert same(expected, disk/'out') == []
    finally: subprocess.run(['umount', '-l', disk])

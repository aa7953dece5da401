"`make lessons`: a cell that fails, a lesson that does not end, and what it leaves running."
import subprocess
import sys

import nbformat
import psutil

from parts import ROOT, lessons, notebooks


def write(folder, name, *cells):
    path = folder/f'{name}.ipynb'
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells]), path)
    return path


def test_what_fails_is_named_and_nothing_goes_on(tmp_path):
    sleeper = "import subprocess\nprint('began', subprocess.Popen(['sleep', '612']).pid)"
    paths = [write(tmp_path, 'good', 'kept = 6*7', 'assert kept == 42'),
             write(tmp_path, 'alone', "assert 'kept' not in globals()", sleeper),
             write(tmp_path, 'bad', '#| eval: false\nraise SystemExit', "assert 1 == 2, 'one is not two'"),
             write(tmp_path, 'gone', 'import os', 'os.abort()'),
             write(tmp_path, 'long', sleeper, 'import time', 'time.sleep(600)')]
    said = subprocess.run([sys.executable, ROOT/'tools'/'lessons.py', *paths, '--cores', '2', '--seconds', '6'], capture_output=True, text=True,
                          timeout=120)
    assert said.returncode == 1 and '3 of 5 lessons failed' in said.stderr, said.stdout + said.stderr
    told = {line.split('/')[-1] for line in said.stdout.splitlines() if line.startswith(('ok', 'FAILED'))}
    assert told == {'good.ipynb', 'alone.ipynb', 'bad.ipynb: a cell failed', 'gone.ipynb: it was killed by signal 6',
                    'long.ipynb: stopped after 6 s'}
    assert 'one is not two' in said.stdout, 'the log of what failed is shown'
    assert not [p for p in psutil.process_iter(['cmdline']) if p.info['cmdline'] == ['sleep', '612']]


def test_a_lesson_that_is_not_there_is_a_sentence():
    said = subprocess.run([sys.executable, ROOT/'tools'/'lessons.py', 'nbs/data/00_none.ipynb'], capture_output=True, text=True, cwd=ROOT)
    assert said.returncode == 1 and 'no such lesson' in said.stderr and 'Traceback' not in said.stderr


def test_every_notebook_but_index_and_runs_is_a_lesson():
    left_out = set(notebooks()) - set(lessons())
    assert {p.parent.name for p in left_out} == {'nbs', 'runs'} and len(lessons()) > 70

"Programs as copies of a warm process: what they get, how they end, and that a run's bytes stay the same."
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from parts import ROOT

from lts_nb.manual.warm import ADDRESS, Warm

pytestmark = pytest.mark.skipif(not hasattr(os, 'pidfd_open'), reason='no pidfd_open on this system')
CALL = [sys.executable, '-m', 'lts_nb.manual.warm']


@pytest.fixture(scope='module')
def warm():
    warm, before = Warm(), os.environ.get('JUPYTER_PATH', '')
    warm.start(about='of a test')
    yield warm
    warm.stop()
    assert ADDRESS not in os.environ and not warm.folder.exists()
    assert os.environ.get('JUPYTER_PATH', '') == before, 'Jupyter would look for kernels in a removed folder'


@pytest.fixture
def program(tmp_path):
    "A function: source -> a process that runs it, called from a folder of its own."
    def called(source, **changes):
        (tmp_path/'program.py').write_text(source)
        env = os.environ | dict(PYTHONPATH=str(ROOT)) | changes
        return subprocess.Popen([*CALL, 'program', 'one', 'two words'], cwd=tmp_path, env=env, text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return called


def gone(pid):
    "Whether a process ends within ten seconds."
    ends = time.time() + 10
    while time.time() < ends:
        try: os.kill(pid, 0)
        except ProcessLookupError: return True
        time.sleep(.05)
    return False


SAYS = '''import os, sys
print(sys.argv[1:], os.getcwd(), os.environ['COLOUR'], sys.stdin.read(), __name__, os.getpid() == os.getsid(0))
print('aside', file=sys.stderr)
'''

def test_it_has_its_callers_words_folder_environment_and_files(warm, program, tmp_path):
    said, aside = program(SAYS, COLOUR='blue').communicate('typed')
    assert said.split('\n')[0] == f"['one', 'two words'] {tmp_path} blue typed __main__ True"
    assert aside == 'aside\n'


def test_its_parent_is_the_server_and_what_it_imports_is_there(warm, program):
    source = 'import os, sys\nprint(os.getppid(), "torch" in sys.modules)'
    assert program(source).communicate()[0].split() == [str(warm.process.pid), 'True']


def test_without_a_server_it_is_the_program_itself(program):
    source = 'import os, sys\nprint(os.getppid(), "torch" in sys.modules)'
    for address in ('', '/nowhere/socket'):
        assert program(source, **{ADDRESS: address}).communicate()[0].split() == [str(os.getpid()), 'False']


@pytest.mark.parametrize('source, status, says', [
    ('pass', 0, ''), ('raise SystemExit(7)', 7, ''), ('raise SystemExit("no such table")', 1, 'no such table'),
    ('1/0', 1, 'ZeroDivisionError'), ('import os, signal\nos.kill(os.getpid(), signal.SIGKILL)', 137, ''),
    ('import atexit\natexit.register(print, "bye")', 0, '')])
def test_it_ends_as_the_program_ends(warm, program, source, status, says):
    process = program(source)
    out, err = process.communicate()
    assert process.returncode == status and says in err
    assert ('bye' in out) == ('bye' in source)


SLEEPS = '''import os, subprocess, sys, time
child = subprocess.Popen(['sleep', '100'])
try:
    print(os.getpid(), child.pid, flush=True)
    time.sleep(100)
except KeyboardInterrupt: sys.exit(5)
'''

def test_ctrl_c_is_handed_on(warm, program):
    process = program(SLEEPS)
    pid, _ = map(int, process.stdout.readline().split())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 5 and gone(pid)


def test_a_killed_caller_takes_it_along_with_all_that_it_started(warm, program):
    process = program(SLEEPS)
    pids = list(map(int, process.stdout.readline().split()))
    process.kill()
    process.wait()
    assert all(gone(pid) for pid in pids)


def test_the_server_and_its_copies_do_not_outlive_who_started_it(program, tmp_path):
    starts = ('import os, sys\nfrom lts_nb.manual.warm import ADDRESS, Warm\nw = Warm()\nw.start()\n'
              'print(w.process.pid, os.environ[ADDRESS], flush=True)\nsys.stdin.read()')
    starter = subprocess.Popen([sys.executable, '-c', starts], text=True, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    server, address = starter.stdout.readline().split()
    process = program(SLEEPS, **{ADDRESS: address})
    pid, _ = map(int, process.stdout.readline().split())
    starter.kill()
    starter.wait()
    assert process.wait(60) == 1 and gone(pid) and gone(int(server))
    assert not os.path.exists(os.path.dirname(address)), 'its folder is gone as well'


def test_a_caller_that_vanishes_at_once_does_no_harm(warm, program):
    import socket
    for said in (b'', b'.', b'.{"module": '):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(os.environ[ADDRESS])
            if said: connection.sendall(said)
    whole = b'.' + json.dumps(dict(module='time', arguments=[], cwd='/', env={})).encode() + b'\n'
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[ADDRESS])
        connection.sendall(whole)
    assert program('print("still here")').communicate()[0] == 'still here\n'


def test_two_callers_do_not_wait_for_each_other(warm, program):
    first = program(SLEEPS)
    first.stdout.readline()
    assert program('print("quick")').communicate(timeout=30)[0] == 'quick\n'
    first.kill()
    first.wait()


def test_a_run_gives_the_same_bytes(warm, tmp_path):
    "Papermill and kernel, both copies, against both by themselves."
    def run(out, **env):
        command = [*CALL, 'papermill', ROOT/'nbs'/'runs'/'train.ipynb', tmp_path/'done.ipynb', '--cwd', ROOT/'nbs'/'runs', '-k', 'python3',
                   '--no-progress-bar', '-p', 'experiment', 'fusion', '-p', 'root', tmp_path/'data', '-p', 'out', out]
        env = os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', PYTHONHASHSEED='0', PYTHONPATH=str(ROOT)) | env
        subprocess.run([str(c) for c in command], check=True, capture_output=True, env=env)
        return next((out/'runs').iterdir())
    alone = run(tmp_path/'alone', **{ADDRESS: '', 'JUPYTER_PATH': ''})
    copied = run(tmp_path/'copied')
    files = sorted(f.name for f in alone.glob('samples-*.npz'))
    assert files and [f.name for f in sorted(copied.glob('samples-*.npz'))] == files
    for name in files:
        a, b = (np.load(folder/name) for folder in (alone, copied))
        assert a.files == b.files and all(np.array_equal(a[k], b[k]) for k in a.files)
    losses = [[epoch['loss'] for epoch in json.loads((folder/'result.json').read_text())['history']] for folder in (alone, copied)]
    assert losses[0] == losses[1] and len(losses[0]) > 1


def test_a_killed_server_leaves_no_copy_behind(program):
    "Nobody would wait for it, and its device would be given to the next run."
    warm, before = Warm(), os.environ.get(ADDRESS)
    warm.start(about='of a test')
    try:
        process = program(SLEEPS)
        pids = list(map(int, process.stdout.readline().split()))
        warm.process.kill()
        assert process.wait(20) == 1 and all(gone(pid) for pid in pids)
        assert 'Run the same command again' in process.stderr.read()
    finally:
        warm.process.wait()
        warm.stop()
        assert os.environ.get(ADDRESS) == before, 'the other tests have a server of their own'


def test_after_an_edit_the_new_code_runs_and_signs(program, tmp_path, monkeypatch):
    "A copy would compute with the old code, and say that it was the new one."
    shutil.copytree(ROOT/'lts_nb', tmp_path/'kit'/'lts_nb', ignore=shutil.ignore_patterns('__pycache__'))
    monkeypatch.setenv('PYTHONPATH', str(tmp_path/'kit'))
    monkeypatch.delenv(ADDRESS, raising=False)
    monkeypatch.chdir(tmp_path/'kit')
    warm = Warm()
    warm.start(about='of a test')
    says = ('import os\nfrom lts_nb import errors\nfrom lts_nb.evidence.experiments import module_hashes\n'
            'print(getattr(errors, "MARK", 1), module_hashes("errors")["errors"], os.getppid())')
    def said(): return program(says, PYTHONPATH=str(tmp_path/'kit')).communicate()[0].split()
    try:
        mark, old, parent = said()
        assert (mark, parent) == ('1', str(warm.process.pid))
        # an editor's lock is no edit, and no harm
        (tmp_path/'kit'/'lts_nb'/'.#errors.py').symlink_to('nobody@nowhere.1')
        assert said()[2] == str(warm.process.pid)
        with open(tmp_path/'kit'/'lts_nb'/'errors.py', 'a') as f: f.write('\nMARK = 2\n')
        mark, new, parent = said()
        assert (mark, parent) == ('2', str(os.getpid())) and new != old
        # whoever starts again gets a server of the new code
        first = warm.process.pid
        monkeypatch.setattr(warm, 'code', None)
        warm.start(about='of a test')
        assert warm.process.pid != first and said() == ['2', new, str(warm.process.pid)]
    finally: warm.stop()


def test_a_server_that_still_imports_is_ended_at_once(monkeypatch):
    monkeypatch.delenv(ADDRESS, raising=False)
    warm = Warm()
    warm.start(about='of a test')
    began, pid = time.time(), warm.process.pid
    warm.stop()
    assert time.time() - began < 4 and gone(pid) and not warm.folder.exists()


def test_pictures_go_where_the_caller_says(warm, program):
    "Matplotlib reads its backend once, and the server has imported it."
    source = 'import matplotlib\nprint(matplotlib.rcParams["backend"].lower())'
    assert program(source, MPLBACKEND='').communicate()[0] == 'agg\n'
    assert program(source, MPLBACKEND='svg').communicate()[0] == 'svg\n'


def test_a_caller_whose_server_ends_before_it_answers_starts_by_itself(program, tmp_path):
    import socket
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path/'socket'))
        listener.listen(1)
        process = program('import os\nprint(os.getppid())', **{ADDRESS: str(tmp_path/'socket')})
        listener.accept()[0].close()
    assert process.communicate(timeout=60)[0].split() == [str(os.getpid())]


def test_where_no_server_can_listen_runs_start_cold(monkeypatch, tmp_path):
    "The name of a socket has at most 107 bytes."
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path/('x'*110)))
    (tmp_path/('x'*110)).mkdir()
    before = os.environ.get(ADDRESS)
    with Warm() as warm:
        warm.start(about='of a test')
        assert warm.process is None and os.environ.get(ADDRESS) == before and not list((tmp_path/('x'*110)).iterdir())


def test_a_server_whose_starter_dies_while_it_imports_ends_soon():
    starts = 'from lts_nb.manual.warm import Warm\nw = Warm()\nw.start()\nprint(w.process.pid, w.folder, flush=True)\nimport os\nos.kill(os.getpid(), 9)'
    starter = subprocess.run([sys.executable, '-c', starts], text=True, cwd=ROOT, capture_output=True, timeout=60)
    server, folder = starter.stdout.split()
    assert gone(int(server)) and not os.path.exists(folder)

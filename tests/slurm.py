"""`make test-slurm`: a suite on a real SLURM of one node, which this test starts and stops itself; ten minutes.

Jobs are requeued, cancelled and orphaned in their midst, and the results are those of a local run, byte for byte."""
import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from test_machines import toy_plan, toy_results

from lts_nb.manual import batch, machines

KIT = Path(__file__).parent.parent
TABLE = '5'
FILES = 'results.csv', f'table{TABLE}.csv', f'table{TABLE}.md', f'table{TABLE}.tex', 'claims.csv'
DAEMONS = 'munged', 'slurmctld', 'slurmd'
PATH = os.environ['PATH'] + ':/usr/sbin:/sbin'

CONFIG = '''
ClusterName=lts
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={here}/munge/socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd.pid
SlurmctldLogFile={here}/slurmctld.log
SlurmdLogFile={here}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
KillWait=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
'''


def free_ports(n):
    "Ports that nobody listens on at present."
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets: s.bind(('127.0.0.1', 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets: s.close()
    return ports


class Slurm:
    "A cluster of one node in a folder of its own: own key, own socket, own ports, our own user."
    def __init__(self, here):
        self.here, self.daemons = here, []
        for name in ('state', 'spool', 'munge'): (here/name).mkdir()
        here.chmod(0o755), (here/'munge').chmod(0o711)
        (here/'munge'/'key').write_bytes(os.urandom(1024))
        (here/'munge'/'key').chmod(0o400)
        host, memory = socket.gethostname().split('.')[0], psutil.virtual_memory().total//2**20
        (here/'slurm.conf').write_text(CONFIG.format(host=host, user=getpass.getuser(), here=here, ports=free_ports(2), cpus=os.cpu_count(),
                                                     memory=memory*9//10))
        # two devices that are not GPUs: what is tested is who is given which
        (here/'gres.conf').write_text(f'NodeName={host} Name=gpu File=/dev/null\nNodeName={host} Name=gpu File=/dev/zero\n')
        (here/'cgroup.conf').write_text('CgroupAutomount=no\n')
        # the plugin's job step forgets SLURM_CONF before it calls srun; a cluster's own lies where srun looks
        (here/'bin').mkdir()
        (here/'bin'/'srun').write_text(f'#!/bin/sh\nSLURM_CONF={here}/slurm.conf exec {shutil.which("srun", path=PATH)} "$@"\n')
        (here/'bin'/'srun').chmod(0o755)
        self.env = os.environ | {'SLURM_CONF': str(here/'slurm.conf'), 'PATH': f'{here}/bin:{PATH}'}

    def start(self):
        m = self.here/'munge'
        self._daemon('munged', '--foreground', f'--key-file={m}/key', f'--socket={m}/socket', f'--pid-file={m}/pid', f'--log-file={m}/log',
                     f'--seed-file={m}/seed', '--num-threads=10')
        self._wait(lambda: (m/'socket').exists(), 'munged')
        self._daemon('slurmctld', '-D', '-c')
        self._daemon('slurmd', '-D')
        self._wait(lambda: 'idle' in self.ask('sinfo', '-h', '-o', '%T', check=False), 'the node')

    def _daemon(self, name, *args):
        out = open(self.here/f'{name}.out', 'w')
        self.daemons.append(subprocess.Popen([shutil.which(name, path=PATH), *args], env=self.env, stdout=out, stderr=out, start_new_session=True))

    def _wait(self, there, what):
        ends = time.time() + 30
        while not there():
            dead = [p.args[0] for p in self.daemons if p.poll() is not None]
            if dead or time.time() > ends:
                logs = '\n'.join(f'{f.name}: {f.read_text()[-600:]}' for f in self.here.glob('*.[ol][uo]*'))
                pytest.fail(f'{what} does not come up; ended: {dead}\n{logs}', pytrace=False)
            time.sleep(.2)

    def stop(self):
        "First the jobs, then the daemons, in the order of their dependence."
        self.ask('scancel', '--user', getpass.getuser(), check=False)
        self.gone(20)
        for p in reversed(self.daemons):
            p.terminate()
            try: p.wait(20)
            except subprocess.TimeoutExpired: p.kill()

    def ask(self, *command, check=True):
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def jobs(self):
        "{run: (job's number, state)} of those that the queue knows."
        lines = self.ask('squeue', '-h', '-o', '%i|%T|%k').splitlines()
        found = re.compile(r'(\d+)\|(\w+)\|.*wildcards_(\S+)')
        return {m[3]: (m[1], m[2]) for m in map(found.fullmatch, lines) if m}

    def gone(self, seconds):
        ends = time.time() + seconds
        while (left := self.ask('squeue', '-h', check=False)) and time.time() < ends: time.sleep(.2)
        return not left


@pytest.fixture(scope='module')
def slurm():
    missing = [d for d in (*DAEMONS, *machines.COMMANDS['slurm']) if not shutil.which(d, path=PATH)]
    if missing: pytest.fail(f'{missing[0]} is not installed. Install SLURM and munge (Debian: apt-get install slurm-wlm munge).', pytrace=False)
    try: machines.check_plugin('slurm')
    except machines.KitError as e: pytest.fail(str(e), pytrace=False)
    with tempfile.TemporaryDirectory(prefix='lts-slurm-', ignore_cleanup_errors=True) as here:
        cluster = Slurm(Path(here))
        try:
            cluster.start()
            yield cluster
        finally: cluster.stop()


def command(out, root, *further):
    return [sys.executable, '-c', 'from lts_nb.manual.cli import main; main()', 'reproduce', '--preset', 'smoke', '--table', TABLE, '--out', str(out),
            '--root', str(root), *further]


@pytest.fixture(scope='module')
def local(tmp_path_factory):
    "The same table, made without a cluster."
    base = tmp_path_factory.mktemp('local')
    done = subprocess.run(command(base/'out', base/'data'), capture_output=True, text=True, env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stdout + done.stderr
    return base


def until(there, process, seconds=900):
    "What `there` finds, looked for often; the command must still be at work."
    ends = time.time() + seconds
    while not (found := there()):
        assert process.poll() is None and time.time() < ends, 'it came to an end too early' if process.poll() is not None else 'it takes too long'
        time.sleep(.02)
    return found


@pytest.fixture
def begin(slurm):
    "A function that starts the command; what still runs at the end of the test is ended."
    begun = []
    def start(out, root):
        env = slurm.env | {'PYTHONPATH': os.pathsep.join(sys.path)}
        begun.append(subprocess.Popen(command(out, root, '--profile', 'slurm'), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                      start_new_session=True))
        return begun[-1]
    yield start
    for p in begun:
        if p.poll() is None: p.send_signal(signal.SIGINT)
        try: p.wait(60)
        except subprocess.TimeoutExpired: p.kill()


def in_its_midst(slurm, out, others=()):
    "A run that has a checkpoint and no result, and whose job is at work: (run, job)."
    for checkpoint in out.glob('runs/*/checkpoint.pt'):
        run = checkpoint.parent.name
        if run in others or (checkpoint.parent/'result.json').exists(): continue
        job, state = slurm.jobs().get(run, ('', ''))
        if state == 'RUNNING' and not (checkpoint.parent/'result.json').exists(): return run, job


def test_what_is_asked_for(slurm, tmp_path, monkeypatch):
    "A GPU, memory, time and processors of the plan reach SLURM, and two jobs at a time are on two devices."
    names = ['a', 'b', 'c']
    toy_plan(tmp_path, names, needs={r: dict(mem_mb=700, minutes=17, seconds=1) for r in names})
    for k, v in slurm.env.items(): monkeypatch.setenv(k, v)
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(sys.path))
    monkeypatch.setenv('TOY_SECONDS', '5')
    place = machines.place_of('smoke', [TABLE], out=tmp_path, root=tmp_path, profile='slurm')
    process = subprocess.Popen(batch._command(tmp_path, 1, place=place), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    limits = until(lambda: slurm.ask('squeue', '-h', '-O', 'TimeLimit:.9,MinMemory:.9,NumCPUs:.9,tres-per-job:.20'), process)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    assert {tuple(line.split()) for line in limits.splitlines()} == {('17:00', '700M', '1', 'gres:gpu:1')}, limits
    found = toy_results(tmp_path, names)
    assert {f['CUDA_VISIBLE_DEVICES'] for f in found.values()} == {'0', '1'} and {f['OMP_NUM_THREADS'] for f in found.values()} == {'1'}
    for a in names:
        for b in names:
            together = a < b and found[a]['began'] < found[b]['ended'] and found[b]['began'] < found[a]['ended']
            if together: assert found[a]['CUDA_VISIBLE_DEVICES'] != found[b]['CUDA_VISIBLE_DEVICES']


def test_killed_jobs_go_on_to_the_same_bytes(slurm, local, begin, tmp_path):
    out, root = tmp_path/'out', tmp_path/'data'
    # `lts` is killed: its jobs are taken back from the cluster
    process = begin(out, root)
    run, job = until(lambda: in_its_midst(slurm, out), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert slurm.gone(90), 'no job goes on working for nobody'
    assert not (out/'runs'/run/'result.json').exists()
    assert (out/'runs'/run/'checkpoint.pt').stat().st_size, 'what was done is kept'
    # it goes on; one job is sent back to the queue, another is cancelled
    process = begin(out, root)
    requeued, job = until(lambda: in_its_midst(slurm, out), process)
    slurm.ask('scontrol', 'requeue', job)
    cancelled, gone = until(lambda: in_its_midst(slurm, out, [requeued, run]), process)
    slurm.ask('scancel', gone)
    print(f'taken back: {run}, requeued: {requeued}, cancelled: {cancelled}')
    said, _ = process.communicate(timeout=3600)
    assert process.returncode == 0, said + (out/'snakemake.log').read_text()[-3000:]
    assert 'Restarts=1' in slurm.ask('scontrol', 'show', 'job', job), 'SLURM itself started it again'
    assert 'Trying to restart job' in (out/'snakemake.log').read_text(), 'Snakemake submitted the cancelled one again'
    for name in FILES: assert (out/name).read_bytes() == (local/'out'/name).read_bytes(), name
    for run in (requeued, cancelled, run):
        for name in ('samples-val.npz', 'vocab.json'):
            assert (out/'runs'/run/name).read_bytes() == (local/'out'/'runs'/run/name).read_bytes(), (run, name)


def test_a_controller_that_is_down_is_a_sentence(slurm, tmp_path):
    (tmp_path/'slurm.conf').write_text(re.sub('SlurmctldPort=.*', f'SlurmctldPort={free_ports(1)[0]}', (slurm.here/'slurm.conf').read_text()))
    env = slurm.env | {'PYTHONPATH': os.pathsep.join(sys.path), 'SLURM_CONF': str(tmp_path/'slurm.conf')}
    done = subprocess.run(command(tmp_path/'out', tmp_path/'data', '--profile', 'slurm'), capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stderr.startswith('lts: the cluster does not answer as it should'), done.stderr
    assert done.stderr.count('\n') == 1 and not (tmp_path/'out').exists()

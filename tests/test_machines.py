"Many runs on several devices or on a cluster: the packing, the slots, what is asked for, and what can be wrong."
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from lts_nb.errors import KitError
from lts_nb.manual import batch, cli, machines
from lts_nb.manual.batch import Place
from lts_nb.manual.machines import Job, critical_path, devices_table, pack, take_slot

KIT = Path(__file__).parent.parent

jobs = st.lists(st.tuples(st.floats(.1, 100), st.sampled_from(['', 'a', 'b']), st.floats(0, 50)), min_size=1, max_size=20).map(
    lambda rows: [Job(str(i), s, group, once if group else 0.) for i, (s, group, once) in enumerate(rows)])


@given(jobs, st.integers(1, 9))
def test_packing(jobs, devices):
    placed = pack(jobs, devices)
    assert {p.name for p in placed} == {j.name for j in jobs} and all(0 <= p.device < devices for p in placed)
    for d in range(devices):
        mine = [p for p in placed if p.device == d]
        assert all(a.ends <= b.begins for a, b in zip(mine, mine[1:])), 'one run at a time on a device'
    length = {j.name: j.seconds for j in jobs}
    assert all(p.ends - p.begins >= length[p.name] - 1e-9 for p in placed)
    # nobody can be faster than all devices together, or than the longest run
    assert max(p.ends for p in placed) >= max(sum(length.values())/devices, max(length.values())) - 1e-6


@given(jobs, st.integers(1, 20))
def test_table_of_devices(jobs, most):
    rows = devices_table(jobs, most, {'data': 5.}, {'report': 2.})
    assert [r['devices'] for r in rows][0] == 1 and rows[-1]['devices'] == most and rows[0]['faster'] == 1
    assert all(0 < r['busy'] <= 1 + 1e-9 and r['faster'] <= r['devices'] + 1e-6 for r in rows)
    path = critical_path(jobs, {'data': 5.}, {'report': 2.})
    assert path[0] == ('data', 5.) and path[-1] == ('report', 2.)
    # with a device for each run only the longest one is waited for
    alone = devices_table([j._replace(shared='', once=0.) for j in jobs], len(jobs), {'data': 5.}, {'report': 2.})[-1]
    assert alone['seconds'] == pytest.approx(7 + max(j.seconds for j in jobs))


def toy_plan(folder, runs, gpu=True, **further):
    "A plan whose runs are a script that writes down where it ran; no torch, no training."
    (folder/'python').write_text(f'''#!{sys.executable}
import json, os, sys, time
if sys.argv[2] == 'lts_nb.manual.machines': os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
run = os.path.dirname(sys.argv[5])
began = time.time()
time.sleep(float(os.environ.get('TOY_SECONDS', .5)))
names = ('CUDA_VISIBLE_DEVICES', 'SLURM_JOB_ID', 'SLURM_MEM_PER_NODE', 'SLURM_CPUS_PER_TASK', 'OMP_NUM_THREADS')
said = dict(began=began, ended=time.time(), **{{k: os.environ.get(k) for k in names}})
with open(run + '/result.json', 'w') as f: json.dump(said, f)
''')
    (folder/'python').chmod(0o755)
    (folder/'weights').touch()
    plain = [dict(run=r, method='lts', experiment='lts', dataset='d', seed=0) for r in runs]
    plan = dict(preset='toy', kit=str(KIT), python=str(folder/'python'), runs=plain, recipe=None, pretrain=None, backbone=None,
                backbones=[str(folder/'weights')]*len(runs), threads=1, gpu=gpu, root=str(folder), out=str(folder),
                modules=dict(methods=dict(lts=[]), backbone=[], things=[]))
    (folder/'plan.json').write_text(json.dumps(plan | further))
    return plan


def toy_results(folder, runs): return {r: json.loads((folder/'runs'/r/'result.json').read_text()) for r in runs}


def overlap(a, b): return a['began'] < b['ended'] and b['began'] < a['ended']


def test_runs_are_packed_on_devices(tmp_path):
    "Four runs on two devices by the real Snakefile: two at a time, each with a device of its own, the longest first."
    names = [f'r{i}' for i in range(4)]
    needs = {r: dict(mem_mb=1, minutes=1) for r in names}
    toy_plan(tmp_path, names, devices=['4', '7'], needs=needs, priority={r: 10*i for i, r in enumerate(names)})
    env = os.environ | {'PYTHONPATH': str(KIT), 'TMPDIR': str(tmp_path)}
    command = batch._command(tmp_path, 4, place=Place(devices=('4', '7')))
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = toy_results(tmp_path, names)
    assert {f['CUDA_VISIBLE_DEVICES'] for f in found.values()} == {'4', '7'}
    for a in names:
        for b in names:
            if a != b and overlap(found[a], found[b]): assert found[a]['CUDA_VISIBLE_DEVICES'] != found[b]['CUDA_VISIBLE_DEVICES']
    assert set(sorted(names, key=lambda r: found[r]['began'])[:2]) == {'r2', 'r3'}, 'those that stand first in the plan begin first'


def test_without_devices_a_run_sees_what_its_caller_sees(tmp_path):
    toy_plan(tmp_path, ['r'], gpu=False)
    env = os.environ | {'PYTHONPATH': str(KIT), 'CUDA_VISIBLE_DEVICES': '3'}
    assert subprocess.run(batch._command(tmp_path, 1), capture_output=True, env=env).returncode == 0
    assert toy_results(tmp_path, ['r'])['r']['CUDA_VISIBLE_DEVICES'] == '3'


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGTERM, None], ids=['SIGKILL', 'SIGTERM', 'it ends'])
def test_a_slot_is_given_back_however_its_owner_ends(tmp_path, monkeypatch, how):
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    monkeypatch.setattr('tempfile.tempdir', None)
    wait = 'import os, sys; print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True); sys.stdin.read()'
    owner = subprocess.Popen([sys.executable, '-m', 'lts_nb.manual.machines', '0', sys.executable, '-c', wait], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True, env=os.environ | {'PYTHONPATH': str(KIT)})
    assert owner.stdout.readline() == '0\n'
    folder = machines.slots_folder()
    assert folder.parent == tmp_path and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert take_slot(['0'], folder, patience=0) == (None, None)
    if how: owner.send_signal(how)
    else: owner.stdin.close()
    owner.wait(10)
    device, slot = take_slot(['0'], folder, patience=5)
    assert device == '0'
    os.close(slot)
    assert take_slot(['0'], folder, patience=0)[0] == '0', 'and so is ours'


def test_a_strangers_folder_of_slots_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    (tmp_path/'elsewhere').mkdir()
    (tmp_path/f'lts-devices-{os.getuid()}').symlink_to(tmp_path/'elsewhere')
    with pytest.raises(KitError, match='belongs to somebody else'): machines.slots_folder()


def test_devices_that_the_user_may_use(monkeypatch):
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert machines.devices_here() == ['0', '1']
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3, GPU-5a')
    assert machines.devices_here() == ['3', 'GPU-5a']


def test_place_on_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(machines, 'devices_here', lambda: ['0', '1', '2'])
    place = machines.place_of('paper', ['4'], 1, tmp_path, tmp_path, False, gpus=2)
    assert place.devices == ('0', '1') and place.jobs == 2 and place.cores >= 2*4 and not place.cluster
    assert place.plan['devices'] == ['0', '1']
    assert {'mem_mb', 'minutes', 'seconds'} == set(place.plan['needs']['lts-refcoco-paper-s0'])


@pytest.fixture
def lts(monkeypatch, capsys):
    def call(*args):
        monkeypatch.setattr('sys.argv', ['lts', *map(str, args)])
        with pytest.raises(SystemExit) as status: cli.main()
        said = capsys.readouterr()
        assert 'Traceback' not in said.err
        return status.value.code, said.err
    return call


@pytest.mark.parametrize('args, part', [
    (['--preset', 'paper', '--gpus', '1'], '1 GPU is asked for, and this machine has none'),
    (['--preset', 'smoke', '--gpus', '1'], 'the preset smoke computes on processors'),
    (['--preset', 'paper', '--gpus', '1', '--profile', 'slurm'], 'exclude each other'),
    (['--preset', 'smoke', '--profile', 'slrum'], "no profile named 'slrum' (--profile). Nearest: slurm"),
    (['--preset', 'smoke', '--profile', '.'], 'holds no config.yaml'),
    (['--preset', 'smoke', '--profile', 'broken'], 'cannot be read'),
    (['--preset', 'smoke', '--profile', 'nameless'], 'names no executor'),
    (['--preset', 'smoke', '--profile', 'strange'], 'pip install snakemake-executor-plugin-no-such-thing'),
    (['--preset', 'smoke', '--profile', 'foreign'], 'the command lts-no-such-submit is not installed')], ids=lambda v: ' '.join(v)[-30:])
def test_what_is_not_there_is_a_sentence(lts, tmp_path, monkeypatch, args, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machines, 'devices_here', lambda: [])
    for name, text in dict(broken='executor: [', nameless='jobs: 3', strange='executor: no-such-thing',
                           foreign='executor: local\nx-submit-cmd: lts-no-such-submit -q all').items():
        (tmp_path/name).mkdir()
        (tmp_path/name/'config.yaml').write_text(text)
    status, said = lts('reproduce', *args, '--out', tmp_path/'out', '--root', tmp_path/'data')
    assert status == 2 and part in said and said.count('\n') == 1, said
    assert not (tmp_path/'out').exists(), 'nothing has begun'


def test_a_plugin_or_a_command_of_ours_that_is_missing(lts, tmp_path, monkeypatch):
    ask = 'reproduce', '--preset', 'smoke', '--profile', 'slurm', '--out', tmp_path/'out'
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    assert "pip install -c constraints.txt -e '.[cluster]'" in lts(*ask)[1]
    monkeypatch.setattr('importlib.util.find_spec', lambda name: True)
    monkeypatch.setattr('shutil.which', lambda name: None)
    assert 'the command sbatch is not installed' in lts(*ask)[1]


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    "Commands of SLURM that answer from files and write down how they were called."
    bin = tmp_path/'bin'
    bin.mkdir()
    for name in machines.COMMANDS['slurm']:
        (bin/name).write_text(f'#!/bin/sh\necho {name} "$@" >> {bin}/calls\ncat {bin}/{name}.says 2>/dev/null\n'
                              f'test ! -e {bin}/{name}.fails || {{ cat {bin}/{name}.fails >&2; exit 1; }}\n')
        (bin/name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{bin}:{os.environ["PATH"]}')
    monkeypatch.setattr(machines, 'check_plugin', lambda executor: None)
    return bin


def test_place_on_slurm(fake_slurm, tmp_path):
    (fake_slurm/'scontrol.says').write_text('AccountingStorageType   = accounting_storage/slurmdbd\n')
    place = machines.place_of('smoke', ['4'], out=tmp_path/'out', root=tmp_path, profile='slurm')
    assert place.cluster and place.arguments[:2] == ('--profile', str(KIT/'profiles'/'slurm')) and 'squeue' not in place.arguments
    (fake_slurm/'scontrol.says').write_text('AccountingStorageType   = (null)\n')
    place = machines.place_of('smoke', ['4'], out=tmp_path/'out', root=tmp_path, profile='slurm')
    assert place.arguments[-2:] == ('--slurm-status-command', 'squeue'), 'no data base of jobs'
    (fake_slurm/'scontrol.fails').write_text('Unable to contact slurm controller')
    with pytest.raises(KitError, match='does not answer as it should: Unable to contact'):
        machines.place_of('smoke', ['4'], out=tmp_path/'out', root=tmp_path, profile='slurm')


def test_jobs_of_a_lost_attempt_are_taken_back(fake_slurm, tmp_path, capsys):
    "Those of this folder, and nobody else's."
    mine = machines.job_prefix(tmp_path/'out')
    (fake_slurm/'squeue.says').write_text(f'11 {mine}_a\n12 {machines.job_prefix(tmp_path/"other")}_b\n13 {mine}_c\n14 somebody\n')
    with pytest.raises(KitError, match='2 of them did not end within 0 seconds.*squeue --me'): machines.recall_jobs(tmp_path/'out', patience=0)
    assert 'scancel 11 13\n' in (fake_slurm/'calls').read_text() and '2 jobs of an earlier attempt' in capsys.readouterr().out
    (fake_slurm/'calls').unlink()
    (fake_slurm/'squeue.says').write_text('14 somebody\n')
    machines.recall_jobs(tmp_path/'out')
    assert 'scancel' not in (fake_slurm/'calls').read_text()


def test_what_a_run_needs_is_learnt_from_runs(tmp_path):
    from lts_nb.evidence.experiments import runs_for
    runs = runs_for('smoke', ['7'])
    assert {n['mem_mb'] for n in machines.needs_of(runs, tmp_path, tmp_path).values()} == {machines.FIRST_GUESS_MB[False]}
    star = next(r for r in runs if r.experiment == 'lts-star')
    folder = tmp_path/'runs'/star.run
    folder.mkdir(parents=True)
    (folder/'result.json').write_text(json.dumps(dict(config=star.plain(), experiment=star.experiment, dataset=star.dataset, peak_memory_mb=2000., seconds={'total': 600.})))
    needs = machines.needs_of(runs, tmp_path, tmp_path)
    assert needs[star.run] == dict(mem_mb=3600, minutes=35, seconds=600)
    other = next(r for r in runs if r.experiment == 'lts')
    assert needs[other.run] == dict(mem_mb=3600, minutes=machines.DAY, seconds=0), 'as much memory as the largest known run'
    # a run that gets too little is killed: of several seeds the largest counts
    for seed, peak in ((1, 1000.), (2, 9000.)):
        told = json.loads((folder/'result.json').read_text()) | dict(peak_memory_mb=peak)
        again = tmp_path/'runs'/f'{star.run[:-1]}{seed}'
        again.mkdir()
        (again/'result.json').write_text(json.dumps(told))
    assert machines.needs_of(runs, tmp_path, tmp_path)[star.run]['mem_mb'] == 12700


def test_shared_features_are_paid_for_once(tmp_path):
    "From a measurement of round numbers: the features are taken out of the one run that the estimate had let pay."
    from lts_nb.evidence.experiments import runs_for
    from lts_nb.manual.throughput import estimate, keep_rates, known_rates
    runs = runs_for('paper', ['4'])
    keep_rates(tmp_path, dict(train=100., score=100., feature_s=.1, image_mb=2., gpu=True, device='round',
                              gflops={r.experiment: [50., 50.] for r in runs} | {'lts': [50., 50.]}))
    jobs = machines.jobs_of(runs, tmp_path, tmp_path)
    seconds = estimate(runs, known_rates(tmp_path), tmp_path)
    assert len(jobs) == len(runs) and {j.shared for j in jobs} == {f'features of {d} at 416' for d in ('refcoco', 'refcoco+', 'refcocog')}
    assert sum(j.seconds for j in jobs) + sum({j.shared: j.once for j in jobs}.values()) == pytest.approx(sum(seconds.values()))
    assert max(p.ends for p in pack(jobs, 1)) == pytest.approx(sum(seconds.values()))


def test_a_family_of_data_sets_pays_once_for_its_pictures(tmp_path, monkeypatch):
    from lts_nb.evidence.experiments import runs_for
    from lts_nb.manual import throughput
    runs = [r for r in runs_for('cpu', ['1'], 1) if r.experiment == 'lts']
    work = dict(refs=300, images=1000, sentences=dict(val=10, testA=10, testB=10, test=10))
    monkeypatch.setattr(throughput, 'work_of', lambda dataset, root: work)
    rates = dict(train=100., score=100., feature_s=.1, image_mb=.1, gflops=dict(lts=(1., 1.)))
    seconds = throughput.estimate(runs, rates, tmp_path)
    assert len(runs) == 3 and sum(s > 200 for s in seconds.values()) == 1


def test_steps_are_timed_by_their_notebooks(tmp_path):
    from lts_nb.evidence.experiments import runs_for
    run = runs_for('smoke', ['4'])[0]
    assert machines.steps_of(run, tmp_path) == ({'data': None, 'backbone': None}, {'report': None})
    (tmp_path/'shared').mkdir()
    for name, noted in {'report': dict(duration=31., exception=None), 'shared/pretrain': dict(duration=9., exception=True)}.items():
        (tmp_path/f'{name}.ipynb').write_text(json.dumps(dict(metadata=dict(papermill=noted))))
    (tmp_path/'shared'/'data.json').touch()
    assert machines.steps_of(run, tmp_path) == ({'backbone': None}, {'report': 31.}), 'a step that failed was not timed'


def test_the_command_shows_the_table(lts, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr('sys.argv', ['lts', 'plan', '--preset', 'cpu', '--table', '7', '--gpus', '3', '--out', str(tmp_path), '--root', str(tmp_path)])
    with pytest.raises(SystemExit): cli.main()
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if line.endswith('%')] == ['1', '2', '3']
    # which of the three long runs is the longest, the committed report decides
    assert 'The critical path is lts-star-refshapes' in said


KUBECTL = '''#!{python}
"A stand-in for kubectl: a job is a process of this machine, its state a file."
import json, os, subprocess, sys, yaml
here = {here!r}
args = [a for a in sys.argv[1:] if not a.startswith('-')]
with open(here + '/calls', 'a') as f: print(*sys.argv[1:], file=f)
def state(name): return open(here + '/' + name).read()
if args[0] == 'create':
    job = yaml.safe_load(sys.stdin)
    container = job['spec']['template']['spec']['containers'][0]
    name = 'job-%d' % len(os.listdir(here))
    open(here + '/' + name, 'w').write('')
    json.dump(job, open(here + '/' + name + '.json', 'w'))
    finish = 'state=Complete; "$@" > %s/%s.log 2>&1 || state=Failed; echo $state > %s/%s' % (here, name, here, name)
    env = os.environ | dict(GPUS=container['resources']['limits']['nvidia.com/gpu'])
    subprocess.Popen(['sh', '-c', finish, 'sh', *container['command']], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                     stderr=subprocess.DEVNULL, start_new_session=True)
    print('job.batch/' + name)
elif args[0] == 'get' and args[1].startswith('job.batch/'): print(args[1], state(args[1].split('/')[1]), end='')
elif args[0] == 'get' and args[2] != os.environ.get('CLAIM', 'lts'): sys.exit('not found')
elif args[0] == 'auth' and os.environ.get('FORBIDDEN'): sys.exit(1)
'''


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    bin, here = tmp_path/'bin', tmp_path/'cluster'
    bin.mkdir(), here.mkdir()
    (bin/'kubectl').write_text(KUBECTL.format(python=sys.executable, here=str(here)))
    (bin/'kubectl').chmod(0o755)
    monkeypatch.setenv('PATH', f'{bin}:{os.environ["PATH"]}')
    return here


def test_a_suite_on_kubernetes(kubectl, tmp_path, monkeypatch):
    "The real Snakefile, the real plugin and the profile's scripts, on a stand-in for kubectl; one job fails once."
    try: machines.check_plugin('cluster-generic')
    except KitError as e: pytest.skip(str(e))
    out = tmp_path/'out with a space'
    out.mkdir()
    toy_plan(out, ['a', 'b'], needs={r: dict(mem_mb=700, minutes=17, seconds=1) for r in 'ab'})
    python = out/'python'
    # the first attempt of run b fails
    python.write_text(python.read_text().replace('began =', f'''
flag = {str(tmp_path/"failed")!r}
if run.endswith('b') and not os.path.exists(flag):
    open(flag, 'w'); sys.exit(1)
began =''', 1))
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(sys.path))
    place = machines.place_of('smoke', ['4'], out=out, root=tmp_path, profile='k8s')
    command = [*batch._command(out, 1, place=place), '--latency-wait', '5', '--seconds-between-status-checks', '1']
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(toy_results(out, 'ab')) == {'a', 'b'}
    jobs = [json.loads(f.read_text()) for f in sorted(kubectl.glob('*.json'))]
    limits = [j['spec']['template']['spec']['containers'][0]['resources']['limits'] for j in jobs]
    assert sorted(l['memory'] for l in limits) == ['1400M', '700M', '700M'], 'the second attempt asks for more'
    assert {l['nvidia.com/gpu'] for l in limits} == {'1'} and {l['cpu'] for l in limits} == {'1'}
    assert sorted(j['spec']['activeDeadlineSeconds'] for j in jobs) == [17*60, 17*60, 34*60]
    assert len({j['metadata']['labels']['report'] for j in jobs}) == 1
    place.before(out)
    assert f"delete jobs -l app=lts,report={jobs[0]['metadata']['labels']['report']}" in (kubectl/'calls').read_text()


@pytest.mark.parametrize('name, value, part', [('FORBIDDEN', '1', 'may not create jobs'), ('CLAIM', 'x', 'no persistent volume claim named lts'),
                                               ('PATH', '', 'kubectl is not installed')])
def test_what_kubernetes_does_not_have_is_a_sentence(kubectl, lts, tmp_path, monkeypatch, name, value, part):
    monkeypatch.setattr(machines, 'check_plugin', lambda executor: None)
    monkeypatch.setenv(name, value)
    if name == 'PATH':
        # a machine that has what a script needs, and no kubectl
        (tmp_path/'tools').mkdir()
        for tool in ('sh', 'sed', 'dirname', 'head'): (tmp_path/'tools'/tool).symlink_to(shutil.which(tool, path='/usr/bin:/bin'))
        monkeypatch.setenv(name, str(tmp_path/'tools'))
    status, said = lts('reproduce', '--preset', 'smoke', '--profile', 'k8s', '--out', tmp_path/'out')
    assert status == 2 and part in said and said.count('\n') == 1 and not (tmp_path/'out').exists()

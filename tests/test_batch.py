"""`lts reproduce` as a user meets it: done twice, killed, failing, changed. One table of the smoke preset, made once."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from filelock import FileLock


from lts_nb.evidence.experiments import runs_for
from lts_nb.evidence.report import write_report
from lts_nb.manual import batch

TABLE, RUNS = '4', 9
VICTIM = 'lts-trans-refshapes-smoke-s0'


def command(out, root, cores=2): return [sys.executable, '-c', 'from lts_nb.manual.cli import main; main()', 'reproduce', '--preset', 'smoke', '--table', TABLE,
                                         '--cores', str(cores), '--out', str(out), '--root', str(root)]


def run(out, root, cores=2): return subprocess.run(command(out, root, cores), capture_output=True, text=True, timeout=600)


def at_work(out):
    "Processes that were started for a report's folder or hold a file in it."
    found = []
    for p in psutil.process_iter():
        try:
            if p.pid != os.getpid() and any(str(out) in s for s in [*p.cmdline(), *(f.path for f in p.open_files())]): found.append(p)
        except psutil.Error: pass
    return found


def gone_within(seconds, out):
    "Nobody is at work in a folder any more, at the latest after some seconds."
    ends = time.time() + seconds
    while at_work(out) and time.time() < ends: time.sleep(.2)
    return not at_work(out)


def finished(out): return {f.parent.name: f.stat().st_mtime_ns for f in out.glob('runs/*/result.json')}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A report of Table 4, made from nothing."
    base = tmp_path_factory.mktemp('batch')
    result = run(base/'out', base/'data')
    assert result.returncode == 0, result.stdout + result.stderr
    return SimpleNamespace(out=base/'out', root=base/'data', base=base, said=result.stdout)


def test_makes_runs_tables_and_report(made):
    assert len(finished(made.out)) == RUNS
    assert all((made.out/f).exists() for f in ('index.html', 'table4.csv', 'table4.md', 'table4.tex', 'results.csv', 'figures/figure4.webp', 'report.pdf', 'evidence.parquet'))
    assert made.said.strip().endswith(f'The report: {made.out/"index.html"}')
    result = json.loads((made.out/'runs'/VICTIM/'result.json').read_text())
    assert {'config', 'metrics', 'fingerprint', 'code', 'versions', 'hardware', 'seconds', 'peak_memory_mb'} <= set(result)


def test_second_time_does_nothing(made):
    before = finished(made.out)
    assert run(made.out, made.root).returncode == 0
    assert finished(made.out) == before


def test_a_clone_that_moved_computes_nothing_again(made, monkeypatch):
    "Its modules lie at other paths, which is all that Snakemake would see."
    out, clone = made.base/'moved', made.base/'clone'
    shutil.copytree(made.out, out)
    clone.symlink_to(batch.KIT)
    monkeypatch.setattr(batch, 'KIT', clone)
    before = finished(out)
    runs = runs_for('smoke', [TABLE])
    brought = batch.bring_up(runs, [TABLE], 1, out, made.root, 2)
    assert not brought.failed and finished(out) == before and len(before) == RUNS
    # another backbone is another matter: what was made with the old one is not done
    weights = next((out/'shared').glob('backbone-*.safetensors'))
    assert len(batch.settled_runs(runs, out, made.root)) == RUNS
    weights.write_bytes(weights.read_bytes() + b' ')
    assert batch.settled_runs(runs, out, made.root) == []


def test_edited_code_does_not_sign_old_weights(made):
    "A run that other code made is trained anew, though its checkpoint says that training has ended."
    out, name = made.base/'edited', 'blind-refshapesg-smoke-s0'
    shutil.copytree(made.out, out)
    folder = out/'runs'/name
    for file in ('code.json', 'result.json'):
        told = json.loads((folder/file).read_text())
        told['code']['modules']['training.fit'] = 'another'
        (folder/file).write_text(json.dumps(told))
    before = finished(out)
    result = run(out, made.root)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {r for r, when in finished(out).items() if before[r] != when} == {name}
    assert len(list(folder.glob('checkpoint.2*.pt'))) == 1 and (folder/'checkpoint.pt').exists()
    # the edit was none, so the same code gives the same bytes
    assert (out/'results.csv').read_bytes() == (made.out/'results.csv').read_bytes()
    told = json.loads((folder/'result.json').read_text())
    assert told['seconds']['total'] > told['seconds']['train'] > 0, 'it was trained, and not only scored'


def test_changed_row_is_rerun_alone(made, monkeypatch):
    from lts_nb.evidence import experiments
    monkeypatch.setitem(experiments.EXPERIMENTS, 'lts-trans', {'model': {'locate': 'transformer', 'heads': 2}})
    plan = batch.make_plan(experiments.runs_for('smoke', [TABLE]), [TABLE], 1, made.out, made.root)
    other = made.base/'changed'
    shutil.copytree(made.out, other)
    (other/'plan.json').write_text(json.dumps(plan))
    said = subprocess.run([*batch._command(other, 2), '-n'], capture_output=True, text=True).stdout
    counts = dict(re.findall(r'^(\w+)\s+(\d+)$', said, re.M))
    assert int(counts.get('train', 0)) + int(counts.get('train_long', 0)) == 3, said
    assert 'backbone' not in counts
    states = batch.plan('smoke', [TABLE], out=made.out, root=made.root).set_index('run')
    assert set(states.index[states.state == 'stale']) == {r for r in states.index if r.startswith('lts-trans')}


def test_a_stale_run_that_was_never_begun_has_failed(made, monkeypatch, capsys):
    "Its old result is there, so a report would show an old number as a new one."
    out = made.base/'unreached'
    shutil.copytree(made.out, out)
    file = out/'runs'/VICTIM/'result.json'
    told = json.loads(file.read_text())
    told['config']['train']['lr'] = 9.
    file.write_text(json.dumps(told))
    monkeypatch.setattr(batch, '_snakemake', lambda *_: 1)
    brought = batch.bring_up(runs_for('smoke', [TABLE]), [TABLE], 1, out, made.root, 2)
    assert brought.failed == [VICTIM] and batch.failed_runs(out) == [VICTIM]
    said = capsys.readouterr().out
    assert f'FAILED {VICTIM}: it did not begin' in said and 'snakemake.log' in said
    # it began, and ended before its notebook was written: the old notebook does not tell why
    def ends_early(*_):
        (out/'runs'/VICTIM/'log.txt').write_text('one line\nthe slots belong to somebody else')
        return 1
    monkeypatch.setattr(batch, '_snakemake', ends_early)
    batch.bring_up(runs_for('smoke', [TABLE]), [TABLE], 1, out, made.root, 2)
    said = capsys.readouterr().out
    assert f'FAILED {VICTIM}: the slots belong to somebody else' in said and f'{VICTIM}/log.txt' in said


def test_a_report_is_made_anew_where_anything_that_it_shows_has_changed(made):
    out = made.base/'current'
    shutil.copytree(made.out, out)
    plan = json.loads((out/'plan.json').read_text())
    key = batch._report_key(plan, out)
    (out/'energy.json').write_text('{"joules": 1, "seconds": 1}')
    assert batch._report_key(plan, out) != key and batch._report_key(plan, out, [VICTIM]) != batch._report_key(plan, out)
    # a damaged stamp is no stamp
    (out/'report.json').write_text('{')
    assert batch._read_json(out/'report.json') is None
    # and a narrower report by hand takes the stamp away
    (out/'report.json').write_text(json.dumps(key))
    write_report(out, 'smoke', ['5'])
    assert not (out/'report.json').exists()


@pytest.mark.parametrize('content', ['[]', '{}', '"x"', '{"config": 3}', '[' * 100_000])
def test_a_result_that_is_none_is_a_run_to_do(made, content):
    out = made.base/'damaged'
    shutil.rmtree(out, ignore_errors=True)
    (out/'runs').mkdir(parents=True)
    for name in (VICTIM, 'lts-refshapes-smoke-s0'): shutil.copytree(made.out/'runs'/name, out/'runs'/name)
    (out/'runs'/VICTIM/'result.json').write_text(content)
    states = batch.plan('smoke', [TABLE], out=out, root=made.root).set_index('run').state
    assert states[VICTIM] == 'missing' and states['lts-refshapes-smoke-s0'] == 'done'


def test_what_another_process_is_writing_within_the_folder_stays(tmp_path):
    "`lts beyond` works in a folder of its own within the report's."
    parts = [tmp_path/'.index.html.abcdefgh.part', tmp_path/'beyond'/'.beyond.csv.abcdefgh.part', tmp_path/'over'/'.x.csv.abcdefgh.part']
    for part in parts:
        part.parent.mkdir(exist_ok=True)
        part.write_text('half')
    (tmp_path/'over'/'.lock').touch()
    with FileLock(tmp_path/'beyond'/'.lock'):
        batch.open_folder(tmp_path).release()
    assert [p.exists() for p in parts] == [False, True, False]


def test_failed_run_is_named_and_stops_nobody(made):
    out = made.base/'failing'
    shutil.copytree(made.out, out)
    for name in (VICTIM, 'lts-refshapes-smoke-s0'): (out/'runs'/name/'result.json').unlink()
    (out/'runs'/VICTIM/'checkpoint.pt').write_bytes(b'not a checkpoint')
    result = run(out, made.root)
    assert result.returncode == 1
    assert f'FAILED {VICTIM}' in result.stdout and 'the checkpoint cannot be read' in result.stdout
    assert str(out/'runs'/VICTIM/'train.ipynb') in result.stdout
    assert len(finished(out)) == RUNS - 1, 'the other run was finished'
    assert VICTIM in (out/'index.html').read_text(), 'the report says what failed'
    assert dict(batch.plan('smoke', [TABLE], out=out, root=made.root)[['run', 'state']].values)[VICTIM] == 'failed'
    (out/'runs'/VICTIM/'checkpoint.pt').unlink()
    assert run(out, made.root).returncode == 0
    assert (out/'results.csv').read_bytes() == (made.out/'results.csv').read_bytes()


@pytest.mark.parametrize('how, after, cores', [(signal.SIGKILL, 14, 2), (signal.SIGINT, 9, 1)], ids=['SIGKILL', 'Ctrl-C, then one run at a time'])
def test_killed_and_run_again_gives_the_same_bytes(made, how, after, cores):
    "Whatever had been done, and however many runs go on at once."
    out = made.base/f'killed-{how}'
    process = subprocess.Popen(command(out, made.root), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(after)
    assert process.poll() is None, 'it was still at work'
    os.killpg(process.pid, how)
    process.wait(60)
    # the workers of a loader look for their parent every five seconds
    assert gone_within(20, out), 'nobody goes on working in its folder'
    result = run(out, made.root, cores)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ('results.csv', 'table4.csv', 'table4.md', 'table4.tex'):
        assert (out/name).read_bytes() == (made.out/name).read_bytes(), name


def test_unwritable_folder_is_a_sentence(made, tmp_path):
    (tmp_path/'file').write_text('')
    result = run(tmp_path/'file'/'out', made.root)
    assert result.returncode == 2 and 'Traceback' not in result.stderr and 'lts: ' in result.stderr

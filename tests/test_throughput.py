"""How long a plan will take: measured here, damaged, unknown; and which feature caches a finished run leaves."""
import json
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from lts_nb.manual import batch, throughput
from lts_nb.data import refer
from lts_nb.manual.cli import app
from lts_nb.errors import KitError
from lts_nb.evidence.experiments import run_config, runs_for
from lts_nb.evidence.sections import _energy
from lts_nb.evidence.tables import known_energy
from lts_nb.training.features import CachedFeatures
from lts_nb.data.refer import Refer, check_dataset

RATES = dict(train=100., score=200., feature_s=.01, image_mb=2., gpu=True, device='a card', gflops={e: (50., 50.) for e in ('lts', 'lts-trans', 'blind')})
plan = lambda *args: CliRunner().invoke(app, ['plan', '--preset', *map(str, args)])


def test_a_plan_is_measured_and_estimated(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, 'measure', lambda preset, measure=throughput.measure: measure(preset, .5))
    before = plan('gpu', '--table', 4, '--out', tmp_path).output
    assert 'no run of this preset has been timed yet' in before and '--measure' in before and not list(tmp_path.iterdir())
    throughput.keep_rates(tmp_path, throughput.measure('smoke'))
    monkeypatch.setattr(throughput, 'work_of', lambda name, root: dict(refs=900, images=300, sentences=dict(val=60, testA=60, testB=60, test=120)))
    after = plan('smoke', '--table', 4, '--out', tmp_path)
    assert after.exit_code == 0 and ' s\n' in after.output and 'sentences a second in training' in after.output and 'minute' in after.output


def test_hours_of_the_papers_preset(tmp_path):
    throughput.keep_rates(tmp_path, RATES)
    said = plan('paper', '--table', 4, '--out', tmp_path, '--root', tmp_path/'none').output
    ours = {r.run for r in runs_for('paper', ['4'])}
    seconds = throughput.estimate(runs_for('paper', ['4']), RATES, tmp_path/'none')
    assert set(seconds) == ours
    assert f'about {sum(seconds.values())/3600:.0f} GPU hours left, 1 at a time' in said and 'a card' in said
    assert said.count('lts data fetch') == 6


def test_a_set_in_the_folder_is_counted(micro):
    assert throughput.work_of('refcoco', micro) == dict(refs=0, images=12, sentences=dict(val=45, testA=18, testB=33))


def test_runs_that_took_time_here_come_first(tmp_path):
    throughput.keep_rates(tmp_path, RATES)
    run = run_config('lts', 'refcoco', 'paper')
    (tmp_path/'runs'/run.run).mkdir(parents=True)
    plain = run.plain()
    (tmp_path/'runs'/run.run/'result.json').write_text(json.dumps(dict(plain, config=plain, seconds=dict(total=77.))))
    seconds = batch.run_seconds(runs_for('paper', ['4']), tmp_path, tmp_path/'none')
    assert seconds[run.run] == 77 and all(s > 77 for r, s in seconds.items() if r != run.run)


def left(out, name, seconds, preset='paper', merged=False):
    "The result of a run of LTS on RefCOCO, as far as a plan reads it."
    folder = out/'runs'/name
    folder.mkdir(parents=True)
    told = dict(config=dict(preset=preset), experiment='lts', dataset='refcoco', seconds=dict(total=seconds))
    (folder/'result.json').write_text(json.dumps(told))
    if merged: (folder/'merged.json').write_text('{}')


def test_a_row_takes_the_median_of_its_seeds_on_this_machine(tmp_path):
    for seed, seconds in enumerate((100., 110., 900.)): left(tmp_path, f'a-s{seed}', seconds)
    left(tmp_path, 'smoke', 3., preset='smoke')
    left(tmp_path, 'far', 5., merged=True)
    assert batch.known_seconds('paper', tmp_path)['lts', 'refcoco'] == 110
    other = tmp_path/'other'
    left(other, 'far', 5., merged=True)
    assert batch.known_seconds('paper', other)['lts', 'refcoco'] == 5, 'another machine is better than no word'


@pytest.mark.parametrize('content', ['{}', 'x', '[1]', '{"train": "a"}', '['*100_000, json.dumps(dict(RATES, gflops=3)), json.dumps(dict(RATES, train=0)),
    json.dumps(dict(RATES, feature_s=float('nan'))), json.dumps(dict(RATES, gflops={})), json.dumps(dict(RATES, gflops=dict(lts=['a', 'b']))), json.dumps(dict(RATES, device=[1]))], ids=lambda c: c[:12])
def test_a_damaged_measurement_is_a_sentence(tmp_path, content):
    (tmp_path/'throughput.json').write_text(content)
    said = plan('paper', '--table', 4, '--out', tmp_path)
    assert said.exit_code != 0 and isinstance(said.exception, (KitError, SystemExit))
    with pytest.raises(KitError, match='--measure'): throughput.known_rates(tmp_path)


def test_counts_are_held_against_the_published(tiny_family, monkeypatch):
    r = Refer(tiny_family, 'refshapes')
    table, _ = check_dataset(r)
    assert table.attrs['notes'] == [], 'nothing is published of it'
    counts = table[['images', 'refs', 'sentences']].to_dict('index')
    monkeypatch.setitem(refer.PUBLISHED_COUNTS, ('refshapes', r.by), counts)
    assert check_dataset(r)[0].attrs['notes'] == [f'All {3*len(counts)} published counts are met']
    counts['val']['sentences'] += 1
    assert 'not the whole data set' in check_dataset(r)[0].attrs['notes'][0]


def test_a_feature_cache_lives_as_long_as_a_run_wants_it(tmp_path):
    runs = [run_config(e, d, 'paper') for e, d in (('lts', 'refcoco'), ('fusion', 'refcoco'), ('lts', 'refcoco+'))]
    (tmp_path/'plan.json').write_text(json.dumps(dict(runs=[r.plain() for r in runs])))
    def cache(name):
        source = CachedFeatures.__new__(CachedFeatures)
        source.folder = tmp_path/'shared'/'features'/name
        source.folder.mkdir(parents=True)
        return source
    ours, theirs = cache('416-a'), cache('416-b')
    def finish(run, source):
        (tmp_path/'runs'/run.run).mkdir(parents=True)
        (tmp_path/'runs'/run.run/'result.json').write_text('{}')
        batch.release_features(tmp_path, run, source)
    finish(runs[0], ours)
    assert ours.folder.exists(), 'another run still reads it'
    finish(runs[1], ours)
    assert not ours.folder.exists() and theirs.folder.exists(), 'another data set of the same size is left alone'
    batch.release_features(tmp_path, runs[2], SimpleNamespace())
    assert theirs.folder.exists(), 'features that are not cached leave nothing'


# ---- energy

def zone(folder, microjoules, turn=999):
    folder.mkdir(exist_ok=True)
    for name, text in dict(name='package-0', max_energy_range_uj=turn, energy_uj=microjoules).items(): (folder/name).write_text(str(text))


def test_a_counter_that_turns_and_one_that_vanishes(tmp_path):
    zone(tmp_path/'intel-rapl:0', 900)
    energy = throughput.Energy(tmp_path)
    zone(tmp_path/'intel-rapl:0', 100)
    energy.tick()
    assert energy.joules == pytest.approx(200e-6)
    (tmp_path/'intel-rapl:0'/'energy_uj').unlink()
    energy.tick()
    assert energy.joules == pytest.approx(200e-6)


def test_the_energy_of_every_call_is_added(tmp_path, monkeypatch):
    "Read while runs are under way, kept in the report's folder, and told by the report."
    machine, out = tmp_path/'machine', tmp_path/'out'
    for folder in (machine, out): folder.mkdir()
    zone(machine/'intel-rapl:0', 0, 10**12)
    class Busy(throughput.Energy):
        "Uses a joule every time somebody looks."
        def tick(self):
            zone(machine/'intel-rapl:0', int((machine/'intel-rapl:0'/'energy_uj').read_text()) + 10**6, 10**12)
            super().tick()
    monkeypatch.setattr(batch, 'Energy', lambda: Busy(machine))
    monkeypatch.setattr(batch, '_command', lambda *_, **__: [sys.executable, '-c', 'import time; time.sleep(.7)'])
    runs = runs_for('smoke', ['4'])[:1]
    plan = dict(preset='smoke', root=str(tmp_path), settled=[])
    batch._snakemake(out, plan, runs, 1)
    one = known_energy(out)
    assert one['joules'] >= 2 and one['seconds'] > .5
    batch._snakemake(out, plan, runs, 1)
    two = known_energy(out)
    assert two['joules'] >= one['joules'] + 2 and 'kWh' in _energy(out)
    # whoever has no counter leaves none
    monkeypatch.setattr(batch, 'Energy', lambda: throughput.Energy(tmp_path/'nothing'))
    batch._snakemake(out, plan, runs, 1)
    assert known_energy(out) == two


def test_a_damaged_energy_file_is_a_sentence(tmp_path):
    (tmp_path/'energy.json').write_text('[1')
    with pytest.raises(KitError, match='the energy cannot be read'): known_energy(tmp_path)
    (tmp_path/'energy.json').write_text('{"joules": Infinity, "seconds": 1}')
    with pytest.raises(KitError, match='the energy is not as lts reproduce writes it'): known_energy(tmp_path)

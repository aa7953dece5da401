"""Tables and report from made-up results: the published numbers, bytes, escaping, comparison."""
import json
import re

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from lts_nb.evidence import report, tables
from lts_nb.errors import KitError
from lts_nb.evidence.experiments import EXPERIMENTS, RIVALS, SEARCH, Cells, run_config, runs_for
from lts_nb.training.fit import config_hash
from lts_nb.evidence.paper import methods, published

METRICS = ['oIoU', 'mIoU', *(f'prec@0.{k}' for k in range(5, 10))]
EVIL = '<img src=x onerror=alert(1)></script> $x_1$ \\input{a} | & %'


def fake_run(out, config, shift=0.):
    "A run folder as training leaves it, with numbers drawn from the run's name."
    rng = np.random.default_rng(int(config_hash(config.run), 16) % 2**32)
    folder = out/'runs'/config.run
    folder.mkdir(parents=True)
    numbers = lambda: {'n': 60, **{m: round(float(rng.uniform(20, 80)) + shift, 3) for m in METRICS}, 'pointing': 50.}
    metrics = {s: numbers() for s in config.splits}
    union = rng.integers(50, 200, 60)
    samples = dict(sent_id=np.arange(60), ref_id=np.arange(60)//2, image_id=np.arange(60)//4, intersection=(union*rng.random(60)).astype(int), union=union, hit=rng.integers(0, 2, 60),
                   other_i=union//3, other_u=union, sentence=np.array([EVIL, 'left man']*30), area=rng.random(60)/5, same=rng.integers(1, 5, 60))
    others = config.finishes[1:]
    for f in others: samples |= {f'{f}_i': samples['intersection']//2, f'{f}_u': union}
    for s in config.splits: np.savez(folder/f'samples-{s}.npz', **samples)
    picture = rng.integers(0, 255, (20, 30, 3)).astype(np.uint8)
    for name in ('examples', 'worst'):
        np.savez(folder/f'{name}.npz', sent_id=np.array([1]), expression=np.array([EVIL]), image_0=picture, prior_0=picture[..., 0].astype(np.float16)/255,
                 prediction_0=picture[..., 0] > 99, truth_0=picture[..., 1] > 99,
                 **{f'prediction@{f}_0': picture[..., 2] > 99 for f in others})
    result = dict({k: getattr(config, k) for k in ('run', 'experiment', 'dataset', 'preset', 'seed')}, config=config.plain(), metrics=metrics, ceiling={s: numbers() for s in metrics},
        controls={s: {'swapped': numbers()} for s in metrics}, finishes={f: {s: numbers() for s in metrics} for f in others},
        threshold=.5, thresholds={s: {'0.25': 40., '0.35': 41., '0.5': metrics[s]['oIoU'], '0.6': 44. if s == 'val' else 39.} for s in metrics},
        milliseconds={'forward': 1.5, 'plain': .5}, parts={p: {'parameters': 5, 'GFLOPs': .1} for p in ('backbone', 'head', 'total')}, history=[dict(epoch=e, loss=9./e, seg=8./e, loc=1./e, lr=1e-3, samples=10, seconds=1.) for e in (1, 2)], fingerprint=EVIL,
        code=dict(version='0', commit='c', modules={}), versions={'torch': 't'}, hardware=dict(cpu='c', gpu=None), seconds=dict(train=1., total=2.), peak_memory_mb=1., parameters=5, gflops=.1)
    (folder/'result.json').write_text(json.dumps(result))


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp('report')
    for config in runs_for('smoke'): fake_run(out, config)
    report.write_report(out, 'smoke')
    return out


def test_published_numbers_are_the_papers():
    shared = ROOT.parent/'shared'/'paper'
    if not shared.is_dir(): pytest.skip(f'no {shared}')
    theirs = pd.read_csv(shared/'published.csv', dtype={'table': str}, keep_default_na=False)
    ours = published().fillna('')
    key = ['table', 'row', 'dataset', 'split', 'metric']
    assert ours.sort_values(key)[[*key, 'value']].values.tolist() == theirs.sort_values(key)[[*key, 'value']].values.tolist()
    assert len(methods()) == len(pd.read_csv(shared/'methods.csv'))


def test_every_row_of_every_table_is_there(made):
    for t, rows in (('1', 21), ('2', 7), ('3', 2), ('4', 2), ('5', 4), ('6', 6), ('7', 2)):
        frame = pd.read_csv(made/f'table{t}.csv')
        assert frame.row.nunique() == rows and frame[frame.experiment.notna()].ours.notna().all(), t
        assert r'\toprule' in (made/f'table{t}.tex').read_text() and '|:--' in (made/f'table{t}.md').read_text()


def test_numbers_survive_the_way_to_the_table(made):
    result = json.loads((made/'runs'/'lts-n2-refshapes-smoke-s0'/'result.json').read_text())
    frame = pd.read_csv(made/'table5.csv').set_index(['row', 'split'])
    for split, m in result['metrics'].items():
        line = frame.loc[('LTS n=2', split)]
        assert abs(line.ours - m['oIoU']) < 1e-3 and abs(line.difference - (m['oIoU'] - line.paper)) < 1e-3
        assert abs(line.ceiling - result['ceiling'][split]['oIoU']) < 1e-3
    long = pd.read_csv(made/'results.csv')
    assert list(long.columns) == ['experiment', 'dataset', 'split', 'seed', 'metric', 'value']


def test_same_results_same_bytes(made, tmp_path):
    for config in runs_for('smoke'): fake_run(tmp_path, config)
    report.write_report(tmp_path, 'smoke')
    names = [f'table{t}.{e}' for t in '1234567' for e in ('csv', 'md', 'tex')] + ['results.csv', 'intervals.csv', 'index.html', 'report.pdf', 'figures/figure4.webp', 'figures/figure5.webp']
    assert [n for n in names if (made/n).read_bytes() != (tmp_path/n).read_bytes()] == []


def test_text_of_a_data_set_stays_text(made):
    page = (made/'index.html').read_text()
    assert '<img src=x' not in page and '</script>' not in page and '&lt;img src=x' in page
    assert 'http://' not in page and 'https://' not in page, 'the page fetches nothing'
    assert all(re.search(r'alt="[^"]{10,}"', tag) for tag in re.findall(r'<img [^>]*?src="data', page))


def test_best_is_bold_as_in_the_paper(made):
    text = (made/'table4.md').read_text()
    assert '**66.15**' in text and '**65.43**' not in text


def test_missing_runs_are_named_not_dropped(tmp_path):
    fake_run(tmp_path, run_config('lts', 'refcoco', 'smoke'))
    said = report.write_report(tmp_path, 'smoke', ['4'])
    assert 'lts-trans-refshapes-smoke-s0' in said['missing'] and 'lts-refshapes-smoke-s0' not in said['missing']
    assert pd.read_csv(tmp_path/'table4.csv').row.tolist().count('LTS-Trans') == 3


def test_compare_sees_a_change_and_its_size(made, tmp_path):
    assert len(tables.compare_reports(made, made)) == 0
    other = tmp_path/'other'
    other.mkdir()
    frame = pd.read_csv(made/'results.csv')
    hit = (frame.experiment == 'lts') & (frame.split == 'val') & (frame.metric == 'oIoU') & (frame.dataset == 'refshapes')
    frame.loc[hit, 'value'] += 60
    frame.to_csv(other/'results.csv', index=False)
    differs = tables.compare_reports(made, other)
    assert len(differs) == 1 and bool(differs.beyond.iloc[0]) and abs(differs.difference.iloc[0] - 60) < 1e-6
    for name in ('ref\x1b[2Jshapes', None):
        frame.loc[hit, 'dataset'] = name
        frame.to_csv(other/'results.csv', index=False)
        with pytest.raises(KitError, match='names that cannot be printed'): tables.compare_reports(made, other)


def test_an_unreadable_result_is_named(tmp_path):
    fake_run(tmp_path, run_config('lts', 'refcoco', 'smoke'))
    path = tmp_path/'runs'/'lts-refshapes-smoke-s0'/'result.json'
    path.write_text(path.read_text()[:50])
    with pytest.raises(KitError, match='lts-refshapes-smoke-s0'): tables.load_results(tmp_path)


def test_adding_a_row_is_adding_a_line(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, 'lts-scaled', {'model': {'scale_kernel': True}})
    assert run_config('lts-scaled', 'refcoco', 'cpu').model.scale_kernel


def test_a_finish_is_a_row_of_its_own_from_the_same_run(made):
    result = json.loads((made/'runs'/'rmi-refshapes-smoke-s0'/'result.json').read_text())
    frame = pd.read_csv(made/'table1.csv').set_index(['row', 'dataset', 'split'])
    own, crf = frame.loc[('RMI, no CRF', 'refcoco', 'val')], frame.loc[('RMI', 'refcoco', 'val')]
    assert abs(own.ours - result['metrics']['val']['oIoU']) < 1e-3
    assert abs(crf.ours - result['finishes']['crf']['val']['oIoU']) < 1e-3
    assert np.isnan(own.paper) and crf.paper == 45.18
    long = pd.read_csv(made/'results.csv')
    assert {'rmi', 'rmi@crf', 'mcn', 'mcn@plain', 'lts@crf'} <= set(long.experiment)
    assert 'swapped oIoU' not in set(long[long.experiment == 'rmi@crf'].metric), 'it was held against the own finish'
    ends = pd.read_csv(made/'intervals.csv').set_index(['experiment', 'dataset', 'split', 'metric'])
    one, other = (ends.loc[(e, 'refshapes', 'val', 'oIoU')] for e in ('rmi', 'rmi@crf'))
    assert abs(other.low - one.low/2) < 1, 'its sentences have half the intersections'


def test_what_stands_elsewhere_stands_beside(made):
    frame = pd.read_csv(made/'table1.csv').set_index(['row', 'dataset', 'split']).elsewhere
    assert frame[('MCN+ASNLS', 'refcoco+', 'val')] == 53.00 and frame[('CMPC', 'refcoco', 'testB')] == 60.82
    assert np.isnan(frame[('LTS', 'refcoco', 'val')]) and np.isnan(frame[('MCN, no ASNLS', 'refcoco', 'val')])
    text, rows = (made/'table1.md').read_text(), pd.read_csv(made/'table1.csv').row.drop_duplicates().tolist()
    assert 'val elsewhere' in text and '53.00' in text
    assert rows[0] == 'RMI' and rows[1] == 'RMI, no CRF' and rows[-2:] == ['LTS', 'LTS, with CRF']


def test_a_threshold_chosen_on_val_is_applied_to_the_tests(made):
    frame = pd.read_csv(made/'thresholds.csv').set_index(['experiment', 'dataset', 'split'])
    val, test = (frame.loc[('cgan', 'refshapes', s)] for s in ('val', 'testA'))
    own = json.loads((made/'runs'/'cgan-refshapes-smoke-s0'/'result.json').read_text())['metrics']
    best = 0.6 if own['val']['oIoU'] < 44 else 0.5
    assert val['best on val'] == test['best on val'] == best
    assert test['at best'] == pytest.approx(39. if best == .6 else own['testA']['oIoU'], abs=1e-3), 'not the best of testA'
    assert {'GFLOPs', 'ms forward', 'oIoU'} <= set(pd.read_csv(made/'costs.csv').columns)


def test_the_page_shows_the_race(made):
    page = (made/'index.html').read_text()
    assert 'Is the race fair?' in page and 'luogen1996/MCN' in page and 'MCN, no ASNLS' in page


def test_cells_choose_methods_and_empty_cells():
    runs = {r.run for r in runs_for('cpu', Cells(methods=('mcn', 'rmi')))}
    assert {'mcn-refshapesg-cpu-s0', 'rmi-refshapes+-cpu-s0', 'blind-noseg-refshapes-cpu-s0'} <= runs
    assert 'lts-refshapes-cpu-s0' not in runs and 'rmi-refshapesg-cpu-s0' not in runs
    every = runs_for('cpu', Cells(tables=('1',), methods=('rmi',), all_cells=True))
    assert {r.dataset: r.splits for r in every if r.method == 'rmi'}['refshapesg'] == ('val', 'test')
    with pytest.raises(KitError, match='Nearest: mcn'): runs_for('cpu', Cells(methods=('mcm',)))
    assert run_config('rmi', 'refcoco', 'cpu').finishes == ('plain', 'crf')
    assert run_config('lts-n2', 'refcoco', 'cpu').finishes == ('plain',), 'no table asks for its CRF'
    assert run_config('mcn', 'refcoco', 'cpu').finishes == ('asnls', 'plain')


def test_the_search_for_rates_is_a_table_of_its_own(tmp_path):
    for config in runs_for('dev', ['rates']): fake_run(tmp_path, config)
    frame = report.write_report(tmp_path, 'dev', ['rates'])['tables']['rates']
    assert len(frame) == len(SEARCH) and frame.ours.notna().all() and frame.paper.isna().all()
    best = tables.best_rates(tables.rates_grid(frame))
    for method in ('lts', 'mcn'):
        of = frame[frame.row.str.startswith(method + ' ')]
        assert f'{best[method]:g}' == of.row[of.ours.idxmax()].split()[1]

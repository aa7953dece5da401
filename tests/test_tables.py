"""Tables and report from made-up results: the published numbers, bytes, escaping, comparison."""
import json
import re

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from lts_nb.evidence import report, tables
from lts_nb.errors import KitError
from lts_nb.evidence.experiments import EXPERIMENTS, run_config, runs_for
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
    for s in config.splits: np.savez(folder/f'samples-{s}.npz', **samples)
    picture = rng.integers(0, 255, (20, 30, 3)).astype(np.uint8)
    for name in ('examples', 'worst'):
        np.savez(folder/f'{name}.npz', sent_id=np.array([1]), expression=np.array([EVIL]), image_0=picture, prior_0=picture[..., 0].astype(np.float16)/255,
                 prediction_0=picture[..., 0] > 99, truth_0=picture[..., 1] > 99)
    result = dict({k: getattr(config, k) for k in ('run', 'experiment', 'dataset', 'preset', 'seed')}, config=config.plain(), metrics=metrics, ceiling={s: numbers() for s in metrics},
        controls={s: {'swapped': numbers()} for s in metrics}, history=[dict(epoch=e, loss=9./e, seg=8./e, loc=1./e, lr=1e-3, samples=10, seconds=1.) for e in (1, 2)], fingerprint=EVIL,
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
    for t, rows in (('1', 13), ('2', 7), ('4', 2), ('5', 4), ('6', 6), ('7', 2)):
        frame = pd.read_csv(made/f'table{t}.csv')
        assert frame.row.nunique() == rows and frame[frame.experiment.notna()].ours.notna().all(), t
        assert r'\toprule' in (made/f'table{t}.tex').read_text() and '| ---' in (made/f'table{t}.md').read_text()


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
    names = [f'table{t}.{e}' for t in '124567' for e in ('csv', 'md', 'tex')] + ['results.csv', 'intervals.csv', 'figures/figure4.png', 'figures/figure5.png']
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


def test_an_unreadable_result_is_named(tmp_path):
    fake_run(tmp_path, run_config('lts', 'refcoco', 'smoke'))
    path = tmp_path/'runs'/'lts-refshapes-smoke-s0'/'result.json'
    path.write_text(path.read_text()[:50])
    with pytest.raises(KitError, match='lts-refshapes-smoke-s0'): tables.load_results(tmp_path)


def test_adding_a_row_is_adding_a_line(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, 'lts-scaled', {'model': {'scale_kernel': True}})
    assert run_config('lts-scaled', 'refcoco', 'cpu').model.scale_kernel

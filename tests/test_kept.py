"The evidence in one file, and evidence from several machines: the same bytes, nothing lost, and nothing added that does not fit."
import base64
import json
import lzma
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from hypothesis import given, settings, strategies as st

from test_fuzz import EXAMPLES, apply, bounded, changed, changes, ends_well, fuzz, mutations  # noqa: F401
from lts_nb.errors import KitError
from lts_nb.evidence import claims, kept, merge, pages, report
from lts_nb.evidence.experiments import Cells, method_for, run_config, run_hashes, runs_for
from lts_nb.evidence.figures import load_examples, shades
from lts_nb.evidence.tables import load_results, load_samples
from lts_nb.manual import batch, cli, until
from lts_nb.training.fit import config_hash
from lts_nb.training.scoring import finish_metrics, split_metrics, swapped_metrics

KINDS = 'left man', 'the red ball', 'man next to the tree', 'third cup from the left', '<b>x</b> & $y$'
N = 60


def facts(dataset, split):
    "What the data set alone decides of sixty sentences."
    rng = np.random.default_rng([ord(c) for c in dataset + split])
    return dict(sent_id=np.arange(N) + 7, ref_id=np.arange(N)//2, image_id=np.arange(N)//4, sentence=np.array([KINDS[k % 5] for k in range(N)]),
                area=(rng.random(N)/5).astype(np.float32), same=rng.integers(1, 5, N), truth_n=rng.integers(50, 200, N)), np.where(rng.random(N) < .9, rng.integers(40, 90, N), 0), rng


def pictures(dataset, split, run, rows):
    "Examples of some sentences; a sentence's picture is the same for all runs."
    f, _, _ = facts(dataset, split)
    out = dict(sent_id=f['sent_id'][rows], expression=f['sentence'][rows])
    for k, row in enumerate(rows):
        shared, own = np.random.default_rng(row), np.random.default_rng([row, *(ord(c) for c in run)])
        out[f'image_{k}'] = shared.integers(0, 255, (20 + row, 30, 3)).astype(np.uint8)
        out[f'truth_{k}'] = shared.random((20 + row, 30)) > .5
        out[f'prediction_{k}'] = own.random((20 + row, 30)) > .5
        out[f'prior_{k}'] = own.random((20 + row, 30)).astype(np.float16)
    return out


def make_run(out, config, salt=''):
    "A run's folder as training leaves it, whose result tells what its sentences say."
    rng = np.random.default_rng(int(config_hash(config.run + salt), 16) % 2**32)
    folder = out/'runs'/config.run
    folder.mkdir(parents=True)
    result = dict({k: getattr(config, k) for k in ('run', 'experiment', 'dataset', 'preset', 'seed')}, config=config.plain(), metrics={}, ceiling={}, controls={}, finishes={f: {} for f in config.finishes[1:]},
                  threshold=.5, thresholds={}, milliseconds={'forward': 1.5}, parts={p: {'parameters': 5, 'GFLOPs': .1} for p in ('backbone', 'head', 'total')},
                  history=[dict(epoch=e, loss=9./e, seg=8./e, loc=1./e, lr=1e-3, samples=10, seconds=1.) for e in (1, 2)], fingerprint=f'print of {config.dataset}', backbone=dict(file='b', md5='m', weights='pretrained'),
                  code=dict(version='0', commit='c', modules=run_hashes(config)), versions={'torch': 't'}, hardware=dict(cpu='c', gpu=None), seconds=dict(train=1., total=2.), peak_memory_mb=1., parameters=5, gflops=.1)
    for split in config.splits:
        known, other, _ = facts(config.dataset, split)
        truth = known['truth_n']
        def answer(): return (i := (truth*rng.random(N)).astype(int)), truth + (truth*rng.random(N)/2).astype(int)
        i, u = answer()
        covered = np.minimum((other*rng.random(N)*.3).astype(int), u - truth)
        scores = known | dict(intersection=i, union=u, hit=rng.integers(0, 2, N), other_i=covered, other_u=np.where(other > 0, other + u - truth + i - covered, 0))
        for f in config.finishes[1:]: scores[f'{f}_i'], scores[f'{f}_u'] = answer()
        np.savez(folder/f'samples-{split}.npz', **scores)
        result['metrics'][split], result['ceiling'][split] = split_metrics(scores), split_metrics(scores)
        result['controls'][split] = {'swapped': swapped_metrics(scores)}
        result['thresholds'][split] = {'0.25': 40., '0.35': 41., '0.5': 30.}
        for f in config.finishes[1:]: result['finishes'][f][split] = finish_metrics(scores, f)
    if 'val' in config.splits:
        shown = pictures(config.dataset, 'val', config.run, [40, 3, 21])
        others = {f'prediction@{f}_{k}': shown[f'prediction_{k}'][::-1] for f in config.finishes[1:] for k in range(3)}
        np.savez(folder/'examples.npz', **shown, **others)
        np.savez(folder/'worst.npz', **pictures(config.dataset, 'val', config.run, [50, 3, 9]))
    (folder/'result.json').write_text(json.dumps(result, indent=1, sort_keys=True))


def configs(seeds=2): return [c for c in runs_for('smoke', ['2', '5'], seeds) if c.dataset == 'refshapes'] + [run_config('mcn', 'refshapes', 'smoke'), run_config('lts', 'refshapesg', 'smoke')]


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A report of some thirty runs, with its evidence and one run's page."
    out = tmp_path_factory.mktemp('made')
    for c in configs(): make_run(out, c)
    (out/'looks.json').write_text('{"looks": [3, 5], "most": 34}')
    (out/'pages').mkdir()
    (out/'pages'/'lts-refshapes-smoke-s0.html').write_text('the executed notebook')
    report.write_report(out, 'smoke', Cells(('1', '2', '5')), ['a-run'])
    kept.write_evidence(out, 'smoke', Cells(('1', '2', '5')), ['a-run'])
    return out


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "Two runs and their evidence, to be damaged."
    out = tmp_path_factory.mktemp('small')
    for e in ('lts', 'fusion'): make_run(out, run_config(e, 'refshapes', 'smoke'))
    kept.write_evidence(out, 'smoke')
    return out


@pytest.fixture
def other(tmp_path):
    "The same two runs in a folder of their own."
    for e in ('lts', 'fusion'): make_run(tmp_path/'other', run_config(e, 'refshapes', 'smoke'))
    return tmp_path/'other'


def files(folder): return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob('*')) if f.is_file() and 'runs' not in f.relative_to(folder).parts}


def plain(result): return {k: v for k, v in result.items() if k != 'folder'}


def test_the_report_from_the_evidence_has_the_same_bytes_as_that_from_the_runs(made, tmp_path):
    for _ in range(2):
        kept.report_from(made, tmp_path/'again')
        theirs, ours = files(tmp_path/'again'), files(made)
        assert theirs.keys() == ours.keys() and {'index.html', 'evidence.parquet', 'looks.json', 'figures/figure4', 'figures/figure5', 'figures/worst'} <= {name.removesuffix('.png').removesuffix('.webp') for name in theirs}
        assert not [name for name in ours if ours[name] != theirs[name]]
    assert 'a-run' in (tmp_path/'again'/'index.html').read_text()


def test_nothing_that_a_report_reads_is_lost(made, tmp_path):
    kept.unpack(kept.read_evidence(made), tmp_path)
    theirs, ours = load_results(tmp_path), load_results(made)
    assert [plain(r) for r in theirs] == [plain(r) for r in ours]
    for a, b in zip(theirs, ours):
        assert (a['folder']/'result.json').read_bytes() == (b['folder']/'result.json').read_bytes()
        for split in b['metrics']:
            x, y = load_samples(a, split), load_samples(b, split)
            assert x.keys() == y.keys()
            for k in y: assert np.array_equal(x[k], y[k]) and x[k].dtype == y[k].dtype, (a['run'], split, k)
    lts = next(r for r in theirs if r['run'] == 'lts-refshapes-smoke-s0')
    for name in ('examples', 'worst'):
        for x, y in zip(load_examples(lts['folder'], name), load_examples(made/'runs'/lts['run'], name), strict=True):
            for k in y: assert np.array_equal(x[k], y[k]), (name, k)
    mcn = next(r for r in theirs if r['experiment'] == 'mcn')
    for x, y in zip(load_examples(mcn['folder'], finish='plain'), load_examples(made/'runs'/mcn['run'], finish='plain'), strict=True): assert np.array_equal(x['prediction'], y['prediction'])


def test_the_same_runs_give_the_same_bytes_also_after_a_journey(made, tmp_path):
    before = (made/'evidence.parquet').read_bytes()
    kept.write_evidence(made, 'smoke', Cells(('1', '2', '5')), ['a-run'])
    assert (made/'evidence.parquet').read_bytes() == before
    kept.unpack(kept.read_evidence(made), tmp_path)
    kept.write_evidence(tmp_path, 'smoke', Cells(('1', '2', '5')), ['a-run'])
    assert (tmp_path/'evidence.parquet').read_bytes() == before


def test_anyone_can_read_the_file_and_compute_an_iou(made):
    import pandas as pd
    f = pd.read_parquet(made/'evidence.parquet').query('dataset == "refshapes" and split == "val"')
    run = 'lts-refshapes-smoke-s0'
    # what a mask took too many lies on the other object, or it went astray
    extra = f[f'{run} other_i'] + f[f'{run} astray']
    iou = 100*(f.truth_n - f[f'{run} missed']).sum()/(f.truth_n + extra).sum()
    assert iou == pytest.approx(json.loads((made/'runs'/run/'result.json').read_text())['metrics']['val']['oIoU'])


def test_a_fact_stands_once_and_a_run_that_disagrees_keeps_its_own(tmp_path):
    for e in ('lts', 'fusion'): make_run(tmp_path, run_config(e, 'refshapes', 'smoke'))
    kept.write_evidence(tmp_path, 'smoke')
    names = pq.read_schema(tmp_path/'evidence.parquet').names
    assert 'area' in names and not [n for n in names if n.endswith(' area')]
    file = tmp_path/'runs'/'lts-refshapes-smoke-s0'/'samples-val.npz'
    np.savez(file, **dict(np.load(file)) | dict(area=np.full(N, .25, np.float32)))
    kept.write_evidence(tmp_path, 'smoke')
    assert {n for n in pq.read_schema(tmp_path/'evidence.parquet').names if n.endswith('area')} == {f'{e}-refshapes-smoke-s0 area' for e in ('lts', 'fusion')}
    kept.unpack(kept.read_evidence(tmp_path), tmp_path/'out')
    assert (np.load(tmp_path/'out'/file.relative_to(tmp_path))['area'] == .25).all()


def test_photographs_are_not_given_away(tmp_path):
    make_run(tmp_path, run_config('lts', 'refshapes', 'smoke'))
    path = tmp_path/'runs'/'lts-refshapes-smoke-s0'/'result.json'
    result = json.loads(path.read_text())
    kept.write_evidence(tmp_path, 'smoke')
    assert 'picture' in pq.read_schema(tmp_path/'evidence.parquet').names
    # of published data there is no recipe
    result['config']['data']['recipe'] = None
    path.write_text(json.dumps(result))
    kept.write_evidence(tmp_path, 'smoke')
    assert not {'picture', 'object'} & set(pq.read_schema(tmp_path/'evidence.parquet').names)


numbers = st.integers(0, 10**6)


@settings(fuzz, max_examples=300)
@given(st.data(), st.integers(1, 6), st.sets(st.sampled_from(['truth_n', 'crf', 'other', 'hit', 'missed', 'astray', 'area'])), st.booleans())
def test_shrunk_arrays_grow_back(data, n, has, sound):
    def column(least=None):
        drawn = np.array(data.draw(st.lists(numbers, min_size=n, max_size=n)))
        return drawn if least is None else least + drawn
    truth = column()
    def answer(): return (np.minimum(column(), truth), column(truth)) if sound else (column(), column())
    i, u = answer()
    arrays = dict(image_id=np.arange(n), intersection=i, union=u)
    if 'truth_n' in has: arrays['truth_n'] = truth
    if 'crf' in has: arrays['crf_i'], arrays['crf_u'] = answer()
    if 'other' in has: arrays['other_i'], arrays['other_u'] = column(), column()
    for own in has & {'missed', 'astray'}: arrays[own] = column()
    if 'area' in has: arrays['area'] = column()/7
    back = kept.grow(kept.shrink(arrays))
    assert back.keys() == arrays.keys() and all(np.array_equal(back[k], a) for k, a in arrays.items())


@pytest.mark.parametrize('array', [np.arange(60, dtype=np.uint8).reshape(4, 5, 3), np.eye(5, 9, dtype=bool), np.zeros((3, 2), bool), np.arange(77, dtype=np.uint8).reshape(7, 11)])
def test_pictures_come_back_as_they_were(array):
    mode = 'RGB' if array.ndim == 3 else '1' if array.dtype == bool else 'L'
    back = kept.picture_array(kept.picture_bytes(array), mode)
    assert back.dtype == array.dtype and np.array_equal(back, array)


@settings(fuzz, max_examples=200)
@given(st.lists(st.floats(0, 1, width=16), min_size=1, max_size=30), st.booleans())
def test_a_prior_in_256_steps_still_points_where_it_did(values, half):
    prior = np.array(values, np.float16 if half else np.float64)
    seen = shades(prior)
    steps = seen*255
    assert np.array_equal(steps, steps.round()) and np.array_equal(shades(seen), seen)
    if not prior.max(): assert not seen.any()
    else:
        assert seen.argmax() == prior.argmax() and (seen == 1).sum() == 1
        assert abs(seen - prior.astype(float)/float(prior.max())).max() <= 1/255


def test_curves_are_read_in_five_digits_and_scores_in_all(tmp_path):
    make_run(tmp_path, run_config('lts', 'refshapes', 'smoke'))
    path = tmp_path/'runs'/'lts-refshapes-smoke-s0'/'result.json'
    result = json.loads(path.read_text())
    result['history'][0]['loss'] = 496.951669921875
    result['thresholds'] = {'val': {'0.5': 23.751659332992112}}
    result['metrics']['val']['mIoU'] = 23.751659332992112
    path.write_text(json.dumps(result))
    read, = load_results(tmp_path)
    assert read['history'][0]['loss'] == 496.95 and read['thresholds']['val']['0.5'] == 23.752
    assert read['history'][0]['epoch'] == 1 and isinstance(read['history'][0]['epoch'], int)
    assert read['metrics']['val']['mIoU'] == 23.751659332992112


# ---- a stranger's file

def rewritten(small, path, note=None, columns=None, drop=()):
    "The small evidence with another note, or with other columns."
    file = pq.ParquetFile(small/'evidence.parquet')
    table, text = file.read(), file.metadata.metadata[b'lts']
    for name, column in (columns or {}).items():
        column = column(table[name]) if callable(column) else column
        table = table.set_column(table.column_names.index(name), name, column)
    table = table.drop_columns(list(drop)) if drop else table
    with pq.ParquetWriter(path, table.schema, store_schema=False) as w:
        w.write_table(table)
        w.add_key_value_metadata({'lts': text if note is None else note if isinstance(note, bytes) else kept._packed(note)})
    return path


def use(path, folder):
    "All that is done with a file of evidence, but for the report itself."
    shutil.rmtree(folder, ignore_errors=True)
    kept.unpack(kept.read_evidence(path), folder/'in')
    load_results(folder/'in', 'smoke')
    assert {p.name for p in folder.iterdir()} == {'in'}


def test_the_small_file_is_sound(small, tmp_path): use(rewritten(small, tmp_path/'e.parquet'), tmp_path/'out')


def note_of(small): return kept.read_evidence(small).note


@fuzz
@given(mutations)
def test_a_damaged_file(small, changes):
    path = small/'damaged.parquet'
    path.write_bytes(apply((small/'evidence.parquet').read_bytes(), changes))
    ends_well(lambda: use(path, small/'damaged'))


@settings(fuzz, max_examples=EXAMPLES//4)
@given(changes)
def test_another_note(small, changes):
    rewritten(small, small/'noted.parquet', changed(note_of(small), changes))
    ends_well(lambda: use(small/'noted.parquet', small/'noted'))


MISSED = 'lts-refshapes-smoke-s0 missed'
WRONG = {
    'nan': ('area', lambda c: pa.array(np.full(len(c), np.nan, np.float32))),
    'gaps': (MISSED, lambda c: pa.array([None, *c.to_pylist()[1:]], c.type)),
    'negative': (MISSED, lambda c: pa.array(-1 - c.to_numpy())),
    'huge': (MISSED, lambda c: pa.array(c.to_numpy().astype(np.int64) + 2**62)),
    'floats': (MISSED, lambda c: pa.array(c.to_numpy().astype(float))),
    'texts': (MISSED, lambda c: pa.array(['1']*len(c))),
    'lists': (MISSED, lambda c: pa.array([[1]]*len(c))),
    'hits': ('lts-refshapes-smoke-s0 hit', lambda c: pa.array(np.full(len(c), 9))),
    'another number': (MISSED, lambda c: pa.array(c.to_numpy() + (np.arange(len(c)) == 0))),
    'pictures': ('picture', lambda c: pa.array([b and b'GIF89a' for b in c.to_pylist()])),
    'masks': ('lts-refshapes-smoke-s0 mask', lambda c: pa.array([b and b'' for b in c.to_pylist()])),
    'long texts': ('sentence', lambda c: pa.array(['x'*10**6]*len(c))),
    'ids as texts': ('image_id', lambda c: pa.array(['7']*len(c))),
    'numbers as names': ('dataset', lambda c: pa.array(np.zeros(len(c)))),
    'in pieces': ('split', lambda c: pa.array(['val', 'testA']*(len(c)//2))),
}


@pytest.mark.parametrize('how', WRONG)
def test_wrong_columns_are_a_sentence(small, tmp_path, how):
    name, column = WRONG[how]
    with pytest.raises(KitError): use(rewritten(small, tmp_path/'e.parquet', columns={name: column}), tmp_path/'out')


@pytest.mark.parametrize('name', ['split', 'area', MISSED, 'picture', 'sent_id'])
def test_a_column_that_is_not_there_is_a_sentence(small, tmp_path, name):
    with pytest.raises(KitError): use(rewritten(small, tmp_path/'e.parquet', drop=[name]), tmp_path/'out')


@pytest.mark.parametrize('name', ['../evil', '/tmp/evil', '.evil', 'a/b', 'a\\b', '', 'x'*200, 'a\nb'])
def test_names_that_lead_elsewhere_are_refused(small, tmp_path, name):
    note = note_of(small)
    note['runs'][0]['result']['run'] = name
    with pytest.raises(KitError, match='not of this kit'): use(rewritten(small, tmp_path/'e.parquet', note), tmp_path/'out')
    note = note_of(small)
    note['runs'][0]['arrays'] = {name: ['image_id']}
    with pytest.raises(KitError): use(rewritten(small, tmp_path/'e.parquet', note), tmp_path/'out')
    assert not list(tmp_path.rglob('*evil*')) and not Path('/tmp/evil').exists()


def test_a_run_twice_another_version_and_no_note(small, tmp_path):
    note = note_of(small)
    with pytest.raises(KitError, match='stands twice'): kept.read_evidence(rewritten(small, tmp_path/'e.parquet', note | dict(runs=note['runs']*2)))
    with pytest.raises(KitError, match='version'): kept.read_evidence(rewritten(small, tmp_path/'e.parquet', note | dict(format=kept.FORMAT + 1)))
    pq.write_table(pa.table({'a': [1]}), tmp_path/'plain.parquet')
    with pytest.raises(KitError, match='no note of this kit'): kept.read_evidence(tmp_path/'plain.parquet')
    with pytest.raises(KitError, match='no evidence'): kept.read_evidence(tmp_path)


def test_arrays_of_unlike_lengths_and_a_wide_text_are_refused(other):
    r = load_results(other)[0]
    arrays = load_samples(r, 'val')
    kept.check_answers(r, 'val', arrays)
    with pytest.raises(ValueError, match='unlike lengths'): kept.check_answers(r, 'val', arrays | dict(hit=arrays['hit'][:7]))
    words = pa.array(['a'*1000, *['b']*90_000]).dictionary_encode()
    with pytest.raises(ValueError, match='fill the memory'): kept._texts(words)
    assert kept._texts(words.slice(1, 5)).tolist() == ['b']*5


def test_what_would_unpack_without_end_is_refused(small, tmp_path):
    zeros = pa.array(np.zeros(3*10**6, np.int32))
    with pq.ParquetWriter(tmp_path/'rows.parquet', pa.schema([('dataset', pa.int32())])) as w: w.write_table(pa.table({'dataset': zeros}))
    with pytest.raises(KitError, match='would unpack'): kept.read_evidence(tmp_path/'rows.parquet')
    pq.write_table(pa.table({f'c{k}': [1] for k in range(20001)}), tmp_path/'columns.parquet')
    with pytest.raises(KitError, match='would unpack'): kept.read_evidence(tmp_path/'columns.parquet')
    bomb = base64.b85encode(lzma.compress(b' '*(kept.MOST_NOTE + 10**6)))
    with pytest.raises(KitError, match='too long'): kept.read_evidence(rewritten(small, tmp_path/'note.parquet', bomb))
    deep = base64.b85encode(lzma.compress(b'['*10**5))
    with pytest.raises(KitError, match='note'): kept.read_evidence(rewritten(small, tmp_path/'deep.parquet', deep))
    # a text of a megabyte, named by every line
    with pytest.raises(KitError): use(rewritten(small, tmp_path/'t.parquet', columns={'sentence': lambda c: pa.array(['x'*2**20]*len(c))}), tmp_path/'out')
    wide = kept.picture_bytes(np.zeros((2, kept.SIDE + 1), bool))
    with pytest.raises(ValueError, match='4097'): kept.picture_array(wide, '1')
    with pytest.raises(ValueError, match='mode 1'): kept.picture_array(kept.picture_bytes(np.eye(3, dtype=bool)), 'L')
    (tmp_path/'large.parquet').write_bytes(b'PAR1'*(kept.MOST_BYTES//4 + 1))
    with pytest.raises(KitError, match='larger'): kept.read_evidence(tmp_path/'large.parquet')


# ---- merging

def state(out, experiment='lts'):
    c = run_config(experiment, 'refshapes', 'smoke')
    return batch.run_state(c, out, run_hashes(c))[0]


def edit(folder, **changes):
    "Change a run's result: {path with dots: value}."
    path = folder/'result.json'
    result = json.loads(path.read_text())
    for where, value in changes.items():
        *way, last = where.split('__')
        node = result
        for k in way: node = node[k]
        node[last] = value
    path.write_text(json.dumps(result))


@pytest.mark.parametrize('as_file', [False, True])
def test_merged_runs_are_done_and_are_those_of_the_source(other, tmp_path, as_file):
    source = kept.write_evidence(other, 'smoke') if as_file else other
    out = tmp_path/'out'
    added, same = merge.merge_runs([source], out, 'smoke')
    assert sorted(added) == ['fusion-refshapes-smoke-s0', 'lts-refshapes-smoke-s0'] and not same
    assert state(out) == state(out, 'fusion') == 'done'
    assert [plain(r) for r in load_results(out)] == [plain(r) for r in load_results(other)]
    table = batch.plan('smoke', ['5'], out=out, root=tmp_path)
    assert table.set_index('run').state['lts-refshapes-smoke-s0'] == 'done'
    assert 'lts-refshapes-smoke-s0' not in [r.run for r in until.next_look('smoke', ['5'], out).todo]
    # the same again: nothing
    times = [f.stat().st_mtime_ns for f in sorted(out.rglob('*'))]
    assert merge.merge_runs([source, other], out, 'smoke') == ([], 2*[r['run'] for r in load_results(out)])
    assert [f.stat().st_mtime_ns for f in sorted(out.rglob('*'))] == times


def test_a_merged_run_brings_its_page(other, tmp_path):
    "Also where the run itself had been merged before."
    out, name = tmp_path/'out', 'lts-refshapes-smoke-s0'
    merge.merge_runs([other], out, 'smoke')
    page = pages._laid_out(name, 'papermill', 'ab', '<p>IoU 61.2</p>')
    (other/'pages').mkdir(exist_ok=True)
    (other/'pages'/f'{name}.html').write_text(page.replace('61.2', '61.2<script>x</script>'))
    (other/'pages'/'fusion-refshapes-smoke-s0.html').write_text('no page')
    merge.merge_runs([other], out, 'smoke')
    assert [p.name for p in (out/'pages').iterdir()] == [f'{name}.html']
    assert (out/'pages'/f'{name}.html').read_text() == page.replace('61.2', '61.2x')


def test_a_run_with_other_numbers_is_a_sentence(other, tmp_path):
    merge.merge_runs([other], tmp_path/'out', 'smoke')
    shutil.rmtree(other/'runs'/'lts-refshapes-smoke-s0')
    make_run(other, run_config('lts', 'refshapes', 'smoke'), salt='another machine')
    with pytest.raises(KitError, match=r'other numbers here than there \(\w+: \d+ of 60 sentences\)'): merge.merge_runs([other], tmp_path/'out', 'smoke')


MISFITS = {
    'fingerprint': (dict(fingerprint='other'), 'its data differ: refshapes has the fingerprint other there and print of refshapes here'),
    'preset': (dict(preset='cpu'), 'of the preset cpu, and this report of smoke'),
    'configuration': (dict(config__train__epochs=9), 'train.epochs is 9 and not 3'),
    'code': (dict(code__modules={}), 'other code: .*training.train.*--despite-code'),
    'backbone': (dict(backbone__md5='n'), 'another backbone'),
    'name': (dict(run='lts-refshapes-smoke-s7'), 'its name is not lts-refshapes-smoke-s0'),
    'path': (dict(run='../evil'), 'its name is not'),
    'experiment': (dict(experiment='nothing'), 'no experiment named'),
    'metrics': (dict(metrics__val__oIoU=99.), 'and the result says 99.00'),
    'splits': (dict(metrics={}), 'other splits'),
    'splits that lead elsewhere': (dict(metrics={'../../evil': {'oIoU': 1.}}), 'other splits'),
}


@pytest.mark.parametrize('what', MISFITS)
def test_a_run_that_does_not_fit_is_named_and_nothing_is_changed(other, tmp_path, what):
    changes, said = MISFITS[what]
    out = tmp_path/'out'
    make_run(out, run_config('filter', 'refshapes', 'smoke'))
    edit(other/'runs'/'lts-refshapes-smoke-s0', **changes)
    with pytest.raises(KitError, match=said): merge.merge_runs([other], out, 'smoke')
    assert [p.name for p in (out/'runs').iterdir()] == ['filter-refshapes-smoke-s0']
    assert not [p for p in tmp_path.rglob('*evil*')]


def test_other_code_with_a_reason(other, tmp_path):
    edit(other/'runs'/'lts-refshapes-smoke-s0', **{'code__modules': run_hashes(run_config('lts', 'refshapes', 'smoke')) | {'training.fit': 'older'}})
    out, why = tmp_path/'out', 'a comment <b>only</b>'
    merge.merge_runs([other], out, 'smoke', why)
    assert state(out) == 'done'
    report.write_report(out, 'smoke', ['2'])
    page = (out/'index.html').read_text()
    assert '1 of 2 runs were made with other code (training.fit)' in page and 'a comment &lt;b&gt;only' in page
    kept.write_evidence(out, 'smoke')
    kept.report_from(out, tmp_path/'again', Cells(('2',)))
    assert (tmp_path/'again'/'index.html').read_text() == page
    # what is edited later was not meant
    c = run_config('lts', 'refshapes', 'smoke')
    assert batch.run_state(c, out, run_hashes(c) | {'training.fit': 'newer'})[0] == 'stale'


def test_an_unfinished_run_gives_way_and_one_that_is_being_computed_does_not(other, tmp_path):
    folder = tmp_path/'out'/'runs'/'lts-refshapes-smoke-s0'
    folder.mkdir(parents=True)
    (folder/'checkpoint.pt').write_bytes(b'half')
    with FileLock(folder/'.lock'):
        with pytest.raises(KitError, match='being computed'): merge.merge_runs([other], tmp_path/'out', 'smoke')
    assert (folder/'checkpoint.pt').exists()
    merge.merge_runs([other], tmp_path/'out', 'smoke')
    assert not (folder/'checkpoint.pt').exists() and state(tmp_path/'out') == 'done'


def test_a_merge_that_is_killed_leaves_no_run_that_seems_done(other, tmp_path, monkeypatch):
    def dies(*_): raise KeyboardInterrupt
    monkeypatch.setattr(merge, 'write_text', dies)
    with pytest.raises(KeyboardInterrupt): merge.merge_runs([other], tmp_path/'out', 'smoke')
    assert not list((tmp_path/'out').rglob('result.json'))
    monkeypatch.undo()
    merge.merge_runs([other], tmp_path/'out', 'smoke')
    assert state(tmp_path/'out') == 'done'


def test_links_are_not_followed(other, tmp_path):
    (tmp_path/'secret').write_text('secret')
    (other/'runs'/'lts-refshapes-smoke-s0'/'log.txt').symlink_to(tmp_path/'secret')
    merge.merge_runs([other], tmp_path/'out', 'smoke')
    assert not (tmp_path/'out'/'runs'/'lts-refshapes-smoke-s0'/'log.txt').exists()


def test_planned_looks_come_along(other, tmp_path):
    (other/'looks.json').write_text('{"looks": [3], "most": 5}')
    merge.merge_runs([kept.write_evidence(other, 'smoke')], tmp_path/'out', 'smoke')
    assert json.loads((tmp_path/'out'/'looks.json').read_text())['most'] == 5


def test_recomputing_in_place_keeps_a_plan_that_is_newer_than_the_evidence(other, tmp_path):
    "Whoever has planned looks cannot undo it: `lts reproduce --until-decided` writes the plan before its first run."
    (tmp_path/'fresh').mkdir()
    for older in (None, 5):
        (other/'looks.json').unlink(missing_ok=True)
        if older: (other/'looks.json').write_text('{"looks": [3], "most": 5}')
        kept.write_evidence(other, 'smoke', Cells(('2',)))
        for folder in (other, tmp_path/'fresh'): (folder/'looks.json').write_text('{"looks": [3], "most": 13}')
        kept.report_from(other)
        assert json.loads((other/'looks.json').read_text())['most'] == 13
        kept.report_from(other, tmp_path/'fresh')
        theirs = tmp_path/'fresh'/'looks.json'
        assert (json.loads(theirs.read_text())['most'] if theirs.exists() else None) == older, "another report's plan is not this one's"


def test_a_run_that_names_no_code_is_refused_before_anything_is_changed(other, tmp_path):
    file = other/'runs'/'lts-refshapes-smoke-s0'/'result.json'
    told = json.loads(file.read_text())
    del told['code']
    file.write_text(json.dumps(told))
    with pytest.raises(KitError, match='does not say which code made it'):
        merge.merge_runs([other], tmp_path/'out', 'smoke', 'I know')
    assert not list((tmp_path/'out').glob('runs/*/result.json'))


def test_a_folder_without_runs_is_a_sentence(tmp_path):
    (tmp_path/'empty').mkdir()
    for source in ('empty', 'nowhere'):
        with pytest.raises(KitError, match='no runs and no evidence'): merge.merge_runs([tmp_path/source], tmp_path/'out', 'smoke')


def test_snakemake_lets_merged_runs_be(other, tmp_path):
    "Though neither the data nor the backbone were ever made here."
    out, root = tmp_path/'out', tmp_path/'data'
    merge.merge_runs([kept.write_evidence(other, 'smoke')], out, 'smoke')
    runs = [run_config(e, 'refshapes', 'smoke') for e in ('lts', 'fusion')]
    before = {f: f.stat().st_mtime_ns for f in out.rglob('*.npz')}
    made = batch.bring_up(runs, None, 1, out.resolve(), root, 1)
    assert made.plan['settled'] == [r.run for r in runs] and not made.failed
    assert {f: f.stat().st_mtime_ns for f in out.rglob('*.npz')} == before and not root.exists()


def test_a_merged_run_that_has_become_stale_is_made_anew(other, tmp_path, capsys):
    merge.merge_runs([other], tmp_path/'out', 'smoke')
    edit(tmp_path/'out'/'runs'/'lts-refshapes-smoke-s0', code__modules={})
    runs = [run_config(e, 'refshapes', 'smoke') for e in ('lts', 'fusion')]
    assert batch.settled_runs(runs, tmp_path/'out', tmp_path) == ['fusion-refshapes-smoke-s0']
    assert state(tmp_path/'out') == 'missing'
    # somebody's hours of computing are kept where no report reads them
    kept_as, = (tmp_path/'out'/'set-aside').iterdir()
    assert kept_as.name.startswith('lts-refshapes-smoke-s0-') and (kept_as/'result.json').exists()
    assert str(kept_as) in capsys.readouterr().out


# ---- the command

def run_cli(monkeypatch, capsys, *args):
    monkeypatch.setattr('sys.argv', ['lts', *map(str, args)])
    try: cli.main()
    except SystemExit as e:
        if e.code: raise
    return capsys.readouterr().out


def test_lts_report_from_and_merge(small, tmp_path, monkeypatch, capsys):
    assert 'The report:' in run_cli(monkeypatch, capsys, 'report', '--from', small, '--out', tmp_path/'a')
    first = files(tmp_path/'a')
    run_cli(monkeypatch, capsys, 'report', '--from', tmp_path/'a')
    assert files(tmp_path/'a') == first
    said = run_cli(monkeypatch, capsys, 'report', '--preset', 'smoke', '--merge', tmp_path/'a', '--out', tmp_path/'b')
    assert '2 runs added, 0 were there already.' in said
    assert {k: v for k, v in files(tmp_path/'b').items() if k != '.lock'} == first


def test_what_the_user_wrote_about_a_report_stays(small, tmp_path):
    theirs = tmp_path/'theirs'
    theirs.mkdir()
    shutil.copy(kept.evidence_file(small), theirs/'evidence.parquet')
    (theirs/'notes.md').write_text('## Discussion\n\ntheirs')
    kept.report_from(theirs, tmp_path/'mine')
    assert 'theirs' in (tmp_path/'mine'/'notes.md').read_text()
    (tmp_path/'mine'/'notes.md').write_text('## Discussion\n\nmy own words')
    kept.report_from(theirs, tmp_path/'mine')
    assert 'my own words' in (tmp_path/'mine'/'notes.md').read_text()


def test_a_strangers_pages_bring_nothing_but_words(small, tmp_path):
    theirs, name = tmp_path/'theirs', 'lts-refshapes-smoke-s0'
    (theirs/'pages').mkdir(parents=True)
    shutil.copy(kept.evidence_file(small), theirs/'evidence.parquet')
    page = pages._laid_out(name, 'papermill', 'ab', '<p>IoU 61.2</p>')
    (theirs/'pages'/f'{name}.html').write_text(page.replace('61.2', '61.2<script>alert(1)</script><a href="javascript:x()">x</a>').replace('<head>', '<head><script src="x"></script>'))
    (theirs/'pages'/'fusion-refshapes-smoke-s0.html').write_text('<script>alert(2)</script>')
    (theirs/'pages'/'unknown.html').write_text(page)
    for out in (tmp_path/'mine', theirs):
        kept.report_from(theirs, out)
        text = (out/'pages'/f'{name}.html').read_text()
        assert 'IoU 61.2' in text and '<script' not in text and 'javascript:' not in text
        report = (out/'index.html').read_text()
        assert f'pages/{name}.html' in report and 'pages/fusion-refshapes-smoke-s0.html' not in report
        assert 'is no page of a run' in report
    assert not (tmp_path/'mine'/'pages'/'unknown.html').exists()


def test_runs_on_unlike_numbers_of_images_are_a_sentence():
    def scores(experiment, dataset, split): return {0: np.ones((5 if experiment == 'lts' else 4, 11))}
    with pytest.raises(KitError, match='lts and fusion.*unlike numbers of images.*refshapes val'): claims._pairs(scores, 'lts', 'fusion', 'refshapes', 'val')


def test_a_run_of_an_experiment_that_nobody_knows_is_a_sentence():
    with pytest.raises(KitError, match="experiment 'lts-cosine'|lts-cosine"): method_for('lts-cosine')


def test_lts_report_still_knows_which_runs_failed(other, tmp_path, monkeypatch, capsys):
    out = tmp_path/'out'
    shutil.copytree(other, out)
    (out/'failed.json').write_text(json.dumps(['lts-n2-refshapes-smoke-s0', 'lts-refshapes-smoke-s0']))
    run_cli(monkeypatch, capsys, 'report', '--preset', 'smoke', '--table', '5', '--out', out)
    page = (out/'index.html').read_text()
    assert 'lts-n2-refshapes-smoke-s0' in page and 'failed' in page[page.index('Before you read'):page.index('At a glance</h2>')]
    assert kept.read_evidence(out).note['report']['failed'] == ['lts-n2-refshapes-smoke-s0', 'lts-refshapes-smoke-s0']


def test_a_report_with_runs_of_its_own_is_not_overwritten(small, other):
    before = files(other)
    with pytest.raises(KitError, match='runs of its own.*--merge'): kept.report_from(small, other)
    assert files(other) == before


@pytest.mark.parametrize('args, said', [
    (['--from', 'a', '--merge', 'b'], 'Leave one of them out'), (['--despite-code', 'x'], 'with --merge'), (['--merge', 'a', '--despite-code', ' '], 'a reason'),
    (['--from', 'nowhere'], 'there is no evidence')])
def test_options_that_contradict_each_other(monkeypatch, capsys, args, said):
    with pytest.raises(SystemExit): run_cli(monkeypatch, capsys, 'report', *args)
    assert said in capsys.readouterr().err


def test_the_preset_of_the_evidence(small, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit): run_cli(monkeypatch, capsys, 'report', '--from', small, '--preset', 'cpu')
    assert 'of the preset smoke' in capsys.readouterr().err

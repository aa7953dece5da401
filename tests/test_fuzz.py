"""Damaged and hostile files: each reading ends in success or in a sentence of ours, soon, within bounded memory, and runs or writes nothing.

Every example is a sound file with a few mutations. FUZZ=N multiplies the number of examples: `make test-fuzz`."""
import copy
import io
import json
import os
import pickle
import resource
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save

from lts_nb.data import fetch, refer, text
from lts_nb.evidence import experiments, figures, sections, tables
from lts_nb.rivals import detections, proposals
from lts_nb.training import candidates, fit, metrics, pretrain
from lts_nb.manual import predict
from lts_nb.model.darknet import Darknet53, load_darknet_weights
from lts_nb.errors import KitError
from lts_nb.evidence.experiments import run_config
from lts_nb.training.opening import build_model, shared_backbone

EXAMPLES = 1200*int(os.environ.get('FUZZ', 1))
MEMORY = 3 << 30  # bytes that a reading may take beyond what the process has
settings.register_profile('fuzz', max_examples=EXAMPLES, deadline=4000, derandomize=True, database=None,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture])
fuzz = settings.get_profile('fuzz')


@pytest.fixture(autouse=True)
def bounded(tmp_path_factory):
    "A ceiling on memory; warnings are not what is asked here; and nothing may appear outside the test's own folders."
    if sys.platform != 'linux': yield; return
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    there = set(os.listdir(tmp_path_factory.getbasetemp().parent.parent))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert not {f for f in set(os.listdir(tmp_path_factory.getbasetemp().parent.parent)) - there if 'evil' in f}


def apply(content, mutations):
    "A file's bytes after some accidents: (kind, where from 0 to 1, a byte, how long)."
    b = bytearray(content)
    for kind, where, value, n in mutations:
        k = min(int(where*len(b)), max(len(b) - 1, 0))
        if kind == 'flip' and b: b[k] ^= value or 255
        elif kind == 'cut': del b[k:]
        elif kind == 'drop': del b[k:k + n]
        elif kind == 'insert': b[k:k] = bytes([value])*n
        elif kind == 'copy': b[k:k] = b[max(k - n, 0):k]
        elif kind == 'set': b[k:k + n] = bytes([value])*min(n, len(b) - k)
    return bytes(b)


kinds = st.sampled_from(['flip', 'flip', 'set', 'cut', 'drop', 'insert', 'copy'])
mutations = st.lists(st.tuples(kinds, st.floats(0, 1), st.integers(0, 255), st.integers(1, 64)), min_size=1, max_size=4)

odd = st.one_of(st.none(), st.booleans(), st.integers(), st.sampled_from([-1, 0, 2**31, 2**63, 10**30, 1e308, float('nan'), float('inf'), '', '../../evil', '/etc/passwd',
                '<script>alert(1)</script>', [], {}, [[]], [None], {'counts': '~', 'size': [1 << 30, 1 << 30]}]), st.text(max_size=8))
changes = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(['replace', 'replace', 'delete']), odd), min_size=1, max_size=3)


def changed(tree, changes):
    "A JSON tree with some of its nodes replaced or left out."
    tree = json.loads(json.dumps(tree))
    for which, how, value in changes:
        places = [(parent, key) for parent in walk(tree) for key in (parent if isinstance(parent, dict) else range(len(parent)))]
        if not places: return copy.deepcopy(value)
        parent, key = places[which % len(places)]
        if how == 'delete': del parent[key]
        else: parent[key] = copy.deepcopy(value)
    return tree


def walk(node):
    "All lists and dicts of a tree."
    if isinstance(node, (list, dict)):
        yield node
        for child in (node.values() if isinstance(node, dict) else node): yield from walk(child)


def ends_well(read):
    "Success, or a sentence of ours with a full stop."
    try: read()
    except KitError as e: assert str(e).strip() and len(str(e)) < 4000


IMAGES = [dict(id=1, file_name='a.jpg', width=12, height=10)]
ANNOTATIONS = [dict(id=5, image_id=1, category_id=1, segmentation=[[1, 1, 8, 1, 8, 8]], iscrowd=0, bbox=[1, 1, 7, 7], area=24),
               dict(id=6, image_id=1, category_id=1, segmentation={'size': [10, 12], 'counts': [5, 20, 95]}, iscrowd=0)]
INSTANCES = dict(images=IMAGES, annotations=ANNOTATIONS, categories=[dict(id=1, name='cat')])
REFS = [dict(ref_id=k, ann_id=a, image_id=1, category_id=1, split=split, file_name='a.jpg', sent_ids=[k],
             sentences=[dict(sent_id=k, sent='left cat', raw='Left cat', tokens=['left', 'cat'])]) for k, a, split in ((1, 5, 'train'), (2, 6, 'val'))]


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp('fuzz')
    (root/'refcoco').mkdir(); (root/'train2014').mkdir()
    PIL.Image.new('RGB', (12, 10), 'red').save(root/'train2014'/'a.jpg')
    return root


def read_set(root, refs, instances):
    "Everything that evaluation does with a data set."
    (root/'refcoco'/'refs(unc).p').write_bytes(refs)
    (root/'refcoco'/'instances.json').write_text(instances)
    r = refer.Refer(root, 'refcoco')
    for split in r.splits():
        for ref, s in r.sentences_of(split): r.mask(ref.ann_id); text.tokenize(s.sent)
    refer.check_dataset(r)
    for i in r.images: r.image_path(i); r.open_image(i)


@fuzz
@given(mutations, st.integers(0, 4))
def test_the_refs_pickle(home, changes, protocol): ends_well(lambda: read_set(home, apply(pickle.dumps(REFS, protocol), changes), json.dumps(INSTANCES)))


@fuzz
@given(changes)
def test_the_refs_inside_the_pickle(home, changes): ends_well(lambda: read_set(home, pickle.dumps(changed(REFS, changes), 2), json.dumps(INSTANCES)))


@fuzz
@given(changes)
def test_the_instances(home, changes): ends_well(lambda: read_set(home, pickle.dumps(REFS, 2), json.dumps(changed(INSTANCES, changes))))


def callables():
    "Pickles that would call something, each by another way."
    import codecs
    import subprocess
    class Reduce:
        def __init__(self, *to): self.to = to
        def __reduce__(self): return self.to
    mark = 'touch /tmp/evil-was-here'
    for to in ((os.system, (mark,)), (eval, (f'__import__("os").system({mark!r})',)), (subprocess.Popen, (mark.split(),)), (codecs.decode, (b'x', 'rot13')), (open, ('/tmp/evil-was-here', 'w'))):
        for protocol in range(5): yield pickle.dumps([*REFS, Reduce(*to)], protocol)
    yield b"cos\nsystem\n(S'touch /tmp/evil-was-here'\ntR."
    yield b"(S'touch /tmp/evil-was-here'\nios\nsystem\n."
    yield b'\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.'


@pytest.mark.parametrize('content', list(callables()))
def test_a_pickle_that_names_a_callable_is_refused_by_name(tmp_path, content):
    (tmp_path/'refs.p').write_bytes(content)
    with pytest.raises(KitError, match=r'system|eval|Popen|decode|encode|getattr|open'): refer.load_restricted_pickle(tmp_path/'refs.p')
    assert not Path('/tmp/evil-was-here').exists()


VOCAB = text.build_vocab([['red', 'left', 'cat']])
VECTORS = b'red 1 0 -1\nleft .5 .25 0\nthe 1e-3 2 3\nat name@domain.com 9 9 9\n'


@fuzz
@given(mutations)
def test_the_vectors(home, changes):
    (home/'v.txt').write_bytes(apply(VECTORS, changes))
    ends_well(lambda: text.load_vectors(home/'v.txt', VOCAB, 3, 0))


def darknet_file(net):
    n = sum(t.numel() for t in net.state_dict().values() if t.is_floating_point())
    return np.array([0, 2, 0], np.int32).tobytes() + np.int64(7).tobytes() + np.random.default_rng(0).standard_normal(n, np.float32).tobytes()


NET = Darknet53(width=.03125, depths=(1, 1, 1, 1, 1), neck=False)
WEIGHTS = darknet_file(NET)


@fuzz
@given(mutations)
def test_the_darknet_weights(home, changes):
    (home/'w.weights').write_bytes(apply(WEIGHTS, changes))
    ends_well(lambda: load_darknet_weights(NET, home/'w.weights'))


@fuzz
@given(mutations)
def test_our_own_weights(home, changes):
    net = torch.nn.Linear(2, 2)
    (home/'b.safetensors').write_bytes(apply(save({k: v.contiguous() for k, v in net.state_dict().items()}), changes))
    ends_well(lambda: pretrain.load_backbone(net, home/'b.safetensors'))


@pytest.fixture(scope='module')
def checkpoint(home):
    net = torch.nn.Linear(2, 2)
    fit.save_checkpoint(home/'good.pt', net, torch.optim.Adam(net.parameters()), dict(epoch=1, step=2, history=[]), 'config')
    return home/'good.pt'


@fuzz
@given(mutations)
def test_the_checkpoint(home, checkpoint, changes):
    net = torch.nn.Linear(2, 2)
    (home/'c.pt').write_bytes(apply(checkpoint.read_bytes(), changes))
    ends_well(lambda: fit.load_checkpoint(home/'c.pt', 'config', net, torch.optim.Adam(net.parameters())))


@fuzz
@given(changes, st.booleans(), mutations)
def test_the_predictions(home, changes, tree, accidents):
    (home/'refcoco'/'refs(unc).p').write_bytes(pickle.dumps(REFS, 2)); (home/'refcoco'/'instances.json').write_text(json.dumps(INSTANCES))
    r = refer.Refer(home, 'refcoco')
    good = [dict(sent_id=2, segmentation=metrics.encode_rle(np.eye(10, 12, dtype=bool)))]
    content = json.dumps(changed(good, changes)).encode() if tree else apply(json.dumps(good).encode(), accidents)
    (home/'p.json').write_bytes(content)
    ends_well(lambda: metrics.score_predictions(home/'p.json', r, 'val'))


def pictures():
    im = PIL.Image.fromarray(np.arange(12*10*3, dtype=np.uint8).reshape(10, 12, 3))
    exif = PIL.Image.Exif(); exif[0x0112] = 6
    for form in ('JPEG', 'PNG', 'GIF', 'BMP', 'TIFF', 'WEBP', 'PPM'):
        f = io.BytesIO()
        im.save(f, form, **({'exif': exif} if form in ('JPEG', 'PNG', 'WEBP') else {}))
        yield f.getvalue()


RLE = {'size': [10, 12], 'counts': [5, 20, 95]}
FOUND = {'COCO': [dict(image_id=1, category_id=1, score=.9 - k/10, bbox=[0, 5, 3, 5], segmentation=RLE) for k in range(2)],
         'MAttNet': [dict(det_id=k, h5_id=k, image_id=1, category_id=1, category_name='cat', score=.9, box=[0, 5, 3, 5], rle=RLE) for k in range(2)]}


@fuzz
@given(changes, st.sampled_from(sorted(FOUND)), mutations, st.booleans())
def test_a_users_detections(home, changes, form, accidents, whole):
    read_set(home, pickle.dumps(REFS, 2), json.dumps(INSTANCES))
    content = json.dumps(changed(FOUND[form], changes)).encode()
    (home/'d.json').write_bytes(content if whole else apply(content, accidents))
    def read():
        arrays, told = detections.read_detections(home/'d.json', refer.Refer(home, 'refcoco'), [1], 32)
        things = proposals.KeptThings(arrays, 32)([1])
        assert things.boxes.isfinite().all() and things.masks.shape[-1] == 8 and told['things'] >= 1
    ends_well(read)


@fuzz
@given(mutations)
def test_the_heads_weights(home, accidents):
    cfg = proposals.HeadConfig(width=8, depth=0, mask_depth=0, levels=1, shared=True)
    head = proposals.Head(cfg, (8, 8, 8), 2)
    (home/'h.safetensors').write_bytes(apply(save({k: v.contiguous() for k, v in head.state_dict().items()}), accidents))
    ends_well(lambda: candidates.open_head(cfg, (8, 8, 8), None, home/'h.safetensors'))


THINGS = proposals.pack_things({1: [(np.arange(4.), 0, .5, np.ones((8, 8), bool))], 2: []})


@fuzz
@given(st.sampled_from(sorted(THINGS)), st.sampled_from(['shorter', 'longer', 'nan', 'negative', 'deeper']))
def test_kept_things(name, how):
    a = THINGS[name]
    wrong = {'shorter': a[:-1], 'longer': np.concatenate([a, a]), 'nan': np.full(a.shape, np.nan), 'negative': np.full(a.shape, -3), 'deeper': a[None]}[how]
    ends_well(lambda: proposals.KeptThings(THINGS | {name: wrong}, 32)([1, 2, 3]))


@fuzz
@given(st.sampled_from(list(pictures())), mutations)
def test_the_pictures(home, content, changes):
    (home/'x.img').write_bytes(apply(content, changes))
    ends_well(lambda: predict.read_picture(home/'x.img'))


RESULT = dict(run='lts-refshapes-smoke-s0', experiment='lts', dataset='refshapes', preset='smoke', seed=0, config=run_config('lts', 'refshapes', 'smoke').plain(), metrics=dict(val=dict(n=3, oIoU=50., mIoU=40.)),
              ceiling=dict(val=dict(oIoU=90.)), controls=dict(val=dict(swapped=dict(oIoU=3.))), history=[dict(epoch=1, loss=2., seg=1., loc=1., samples=3, seconds=1.)],
              code=dict(commit='x', modules={}), versions={'torch': '2'}, hardware=dict(cpu='c', gpu=None), seconds=dict(total=1., train=1.), peak_memory_mb=1., parameters=3, gflops=.1, fingerprint='f')


@fuzz
@given(changes, st.booleans(), mutations)
def test_the_result(home, changes, tree, accidents):
    (home/'out'/'runs'/'r').mkdir(parents=True, exist_ok=True)
    content = json.dumps(changed(RESULT, changes)).encode() if tree else apply(json.dumps(RESULT).encode(), accidents)
    (home/'out'/'runs'/'r'/'result.json').write_bytes(content)
    def read():
        results = tables.load_results(home/'out')
        tables.results_frame(results); sections.runs_frame(results); sections.config_differences(results)
    ends_well(read)


@fuzz
@given(changes, st.booleans(), mutations)
def test_what_stands_beside_the_runs(home, changes, tree, accidents):
    "The energy that a suite used, and the note of whose code began a checkpoint."
    used, note = dict(joules=7.2e6, seconds=1800.), dict(code=dict(modules={'training.fit': 'abc'}))
    for name, sound in (('energy.json', used), ('code.json', note)):
        content = json.dumps(changed(sound, changes)).encode() if tree else apply(json.dumps(sound).encode(), accidents)
        (home/name).write_bytes(content)
    ends_well(lambda: sections._energy(home))
    # a note that cannot be read says nothing, so that the checkpoint counts as other code's
    differs = experiments.other_code(experiments.begun_with(home), {'training.fit': 'abc'})
    assert differs in ([], ['training.fit'])


def archive():
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w', zipfile.ZIP_DEFLATED) as z:
        for name in ('set/a.txt', 'set/b/c.txt'): z.writestr(zipfile.ZipInfo(name), b'content '*40, zipfile.ZIP_DEFLATED)  # no time of day: the same mutations every time
    return f.getvalue()


@fuzz
@given(mutations)
def test_the_archive(tmp_path_factory, changes):
    base = tmp_path_factory.getbasetemp()/'archive'
    base.mkdir(exist_ok=True)
    (base/'a.zip').write_bytes(apply(archive(), changes))
    d = fetch.Download('a.zip', (), 'sha256:0', (('set/', 'set/'),), None, 1 << 20)
    ends_well(lambda: fetch.unpack(base/'a.zip', d, base/'root'))
    assert set(os.listdir(base)) <= {'a.zip', 'root'} and set(os.listdir(base/'root') if (base/'root').exists() else []) <= {'set'}


@pytest.fixture(scope='module')
def strangers_run(tmp_path_factory):
    "A run's folder as somebody may send it: small, sound, of random weights."
    out = tmp_path_factory.mktemp('stranger')
    config = run_config('lts', 'refshapes', 'smoke')
    config = config.replace(data=config.data.replace(size=64))
    folder, b = out/'runs'/config.run, config.backbone
    folder.mkdir(parents=True)
    net = Darknet53(b.width, b.depths, b.neck)
    weights = shared_backbone(config, out, out)
    weights.parent.mkdir()
    pretrain.save_backbone(net, weights)
    model = build_model(config, VOCAB, net.channels)
    fit.save_checkpoint(folder/'checkpoint.pt', model, torch.optim.Adam(model.parameters()), dict(epoch=1), 'config')
    (folder/'vocab.json').write_text(VOCAB.to_json())
    (folder/'result.json').write_text(json.dumps(dict(config=config.plain())))
    return folder


def use(folder):
    run = predict.load_run(folder)
    predict.predict(run, np.zeros((10, 12, 3), np.uint8), 'left cat')


def test_the_strangers_run_is_sound(strangers_run): use(strangers_run)


@settings(fuzz, max_examples=EXAMPLES//4)
@given(changes, st.booleans(), mutations)
def test_a_run_from_elsewhere(strangers_run, changes, tree, accidents):
    path = strangers_run/'result.json'
    good = path.read_text()
    path.write_bytes(json.dumps(changed(json.loads(good), changes)).encode() if tree else apply(good.encode(), accidents))
    try: ends_well(lambda: use(strangers_run))
    finally: path.write_text(good)


@pytest.mark.parametrize('key, value', [('n', 10**6), ('d_m1', 10**9), ('aspp_rates', [1]*10**5), ('locate', '__class__'), ('emb_dim', -1)])
def test_a_model_too_large_for_any_machine(strangers_run, key, value):
    path = strangers_run/'result.json'
    good = path.read_text()
    hostile = json.loads(good)
    hostile['config']['model'][key] = value
    path.write_text(json.dumps(hostile))
    try:
        with pytest.raises(KitError): use(strangers_run)
    finally: path.write_text(good)


@pytest.mark.parametrize('deep', ['['*100_000, '{"a":'*100_000, *('['*n + ']'*n for n in (100_000, 995, 985, 970, 950, 900)), *('{"config":'*n + '1' + '}'*n for n in (990, 970, 930))],
                         ids=lambda s: f'{s[:3]}{len(s)}')
def test_brackets_without_end(home, strangers_run, deep):
    "Nested a hundred thousand deep, Python's readers give up with an error that is no ValueError; a little less deep, whoever prints the record does."
    for name in ('result.json', 'vocab.json'):
        path = strangers_run/name
        good = path.read_text()
        path.write_text(deep)
        try:
            with pytest.raises(KitError): use(strangers_run)
        finally: path.write_text(good)
    (home/'p.json').write_text(deep)
    with pytest.raises(KitError): metrics.read_predictions(home/'p.json')
    (home/'out'/'runs'/'r').mkdir(parents=True, exist_ok=True)
    (home/'out'/'runs'/'r'/'result.json').write_text(deep)
    with pytest.raises(KitError): tables.load_results(home/'out')
    with pytest.raises(KitError): read_set(home, pickle.dumps(REFS, 2), deep)
    with pytest.raises(KitError): read_set(home, pickle.dumps(REFS, 2), json.dumps(INSTANCES).replace('[[1, 1, 8, 1, 8, 8]]', deep))
    with pytest.raises(KitError): read_set(home, pickle.dumps(REFS, 2), json.dumps(INSTANCES).replace('"images": [{', '"images": [' + deep + ',{'))


def test_a_pickle_nested_without_end(home):
    with pytest.raises(KitError): read_set(home, b'\x80\x02' + b']'*100_000 + b'a'*99_999 + b'.', json.dumps(INSTANCES))


def packed_again(path):
    "The same archive, deflated: as a bomb is packed."
    with zipfile.ZipFile(path) as z: content = {i.filename: z.read(i) for i in z.infolist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, b in content.items(): z.writestr(name, b)


def test_archives_that_unpack_without_end(tmp_path):
    "A megabyte that would take a gigabyte, in a stranger's checkpoint and in a stranger's scores; each is refused before it is read."
    torch.save(dict(model=torch.zeros(1 << 24), config='x'), tmp_path/'checkpoint.pt')
    packed_again(tmp_path/'checkpoint.pt')
    with pytest.raises(KitError, match='would unpack'): fit.load_checkpoint(tmp_path/'checkpoint.pt', 'config')
    with pytest.raises(KitError, match='would unpack'): predict._load_weights(torch.nn.Linear(2, 2), tmp_path)
    with zipfile.ZipFile(tmp_path/'worst.npz', 'w', zipfile.ZIP_DEFLATED) as z:
        with z.open('hit.npy', 'w') as f:
            for _ in range(17): f.write(bytes(1 << 26))
    with pytest.raises(KitError, match='would unpack'): figures.load_examples(tmp_path, 'worst')
    (tmp_path/'worst.npz').rename(tmp_path/'samples-val.npz')
    with pytest.raises(KitError, match='would unpack'): tables.load_samples(dict(folder=tmp_path), 'val')

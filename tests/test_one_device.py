"Training on pictures that lie on the device: bytes without loss, the same losses, no question asked, nothing ruined that is saved."
import errno
import threading

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lts_nb.data.letterbox import letterbox_image
from lts_nb.errors import KitError
from lts_nb.evidence.experiments import run_config
from lts_nb.training import fit as loop
from lts_nb.training import one_device
from lts_nb.training.config import run_key
from lts_nb.training.features import CachedFeatures, LiveFeatures
from lts_nb.training.fit import load_checkpoint
from lts_nb.training.one_device import (
    KeptPictures, PictureFeatures, Steps, Table, as_bytes, as_pixels, build_pictures, open_pictures, picture_key, place_of, train_here, train_on_pictures,
    unpack_bits)
from lts_nb.training.opening import build_model, ensure_backbone, ensure_data, loader, on_device, open_backbone
from lts_nb.training.run import prepare
from lts_nb.training.train import train_model


def smoke(method='lts', **compute):
    c = run_config(method, 'refshapes', 'smoke')
    return c.replace(compute=c.compute.replace(**compute), splits=['val'])


@pytest.fixture(scope='module')
def places(tmp_path_factory):
    "Data and backbone of the smoke preset: (root, out)."
    folder = tmp_path_factory.mktemp('one_device')
    ensure_data(smoke(), folder/'data')
    ensure_backbone(smoke(), folder/'data', folder/'out')
    return folder/'data', folder/'out'


@pytest.fixture(scope='module')
def opened(places):
    "A run of LTS with cached features, and the same data as a source of pictures."
    run = prepare(smoke(), *places)
    run.lock.release()
    kept = build_pictures(places[1]/'pictures', run.refer, sorted(run.refer.images), 'all', 128, progress=False)
    return run, kept


def source_of(opened, cls=PictureFeatures, **kwargs):
    run, kept = opened
    source = cls(LiveFeatures(run.refer, run.backbone, 128), kept)
    for name, value in kwargs.items(): setattr(source, name, value)
    return source


def model_of(run, config=None):
    config = config or run.config
    torch.manual_seed(config.seed)
    return build_model(config, run.vocab, open_backbone(config, run.weights)[2])


def losses(history): return [h['loss'] for h in history]


def same_weights(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


# pictures and masks

@pytest.mark.parametrize('stretch', [False, True])
def test_a_picture_as_bytes_is_the_letterboxed_picture(stretch):
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((31, 100), (100, 31), (64, 64), (1, 300), (7, 5))]
    boxed = [as_bytes(image, 96, stretch) for image in images]
    pixels = as_pixels(torch.from_numpy(np.stack([b for b, _ in boxed])), torch.tensor([f for _, f in boxed]))
    assert torch.equal(pixels, torch.from_numpy(np.stack([letterbox_image(image, 96, stretch) for image in images])))
    assert pixels.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('side', [4, 13, 52])
def test_packed_grids_come_back(side):
    grid = np.random.default_rng(side).random((6, side, side)) < .4
    bits = torch.from_numpy(np.stack([np.packbits(g) for g in grid]))
    assert np.array_equal(unpack_bits(bits, side)[:, 0].numpy(), grid)


# the file

class Opening:
    "Opens pictures, counts them, and stops after some."
    def __init__(self, refer, stop=None): self.refer, self.stop, self.n = refer, stop, 0
    def open_image(self, image_id):
        if self.n == self.stop: raise KeyboardInterrupt
        self.n += 1
        return self.refer.open_image(image_id)


def test_an_interrupted_file_goes_on_and_what_was_torn_is_written_anew(opened, tmp_path):
    run, whole = opened
    ids = sorted(run.refer.images)
    with pytest.raises(KeyboardInterrupt): build_pictures(tmp_path, Opening(run.refer, 21), ids, 'k', 128, batch=8, progress=False)
    assert not (tmp_path/'k').exists()
    with open(tmp_path/'k.part'/'pictures', 'ab') as f: f.write(b'torn')  # behind the note, as a power failure leaves it
    rest = Opening(run.refer)
    kept = build_pictures(tmp_path, rest, ids, 'k', 128, batch=8, progress=False)
    assert rest.n == len(ids) - 16
    assert np.array_equal(kept.pictures, whole.pictures) and torch.equal(kept.frames, whole.frames)
    again = Opening(run.refer)
    build_pictures(tmp_path, again, ids, 'k', 128, progress=False)
    assert again.n == 0, 'it stands'


def test_two_at_once_open_each_picture_once(opened, tmp_path):
    run, _ = opened
    ids, openings = sorted(run.refer.images)[:30], [Opening(run.refer), Opening(run.refer)]
    both = [threading.Thread(target=build_pictures, args=(tmp_path, o, ids, 'k', 128), kwargs=dict(progress=False)) for o in openings]
    for t in both: t.start()
    for t in both: t.join()
    assert sorted(o.n for o in openings) == [0, 30]


@pytest.mark.parametrize('damage', ['short', 'no list', 'gone'])
def test_a_damaged_file_is_a_sentence(opened, tmp_path, damage):
    run, _ = opened
    build_pictures(tmp_path, run.refer, sorted(run.refer.images)[:5], 'k', 128, progress=False)
    if damage == 'short': (tmp_path/'k'/'pictures').write_bytes(b'1234')
    if damage == 'no list': (tmp_path/'k'/'about.json').write_text('[1, 2')
    if damage == 'gone': (tmp_path/'k'/'frames').unlink()
    with pytest.raises(KitError, match='the kept pictures cannot be read.*Delete that folder'): KeptPictures(tmp_path/'k')


def test_a_full_disk_is_a_sentence_and_the_work_is_kept(opened, tmp_path, monkeypatch):
    run, whole = opened
    ids, append, left = sorted(run.refer.images), one_device._append, [4]
    def full(*args):
        left[0] -= 1
        if left[0] < 0: raise OSError(errno.ENOSPC, 'No space left on device')
        append(*args)
    monkeypatch.setattr(one_device, '_append', full)
    with pytest.raises(KitError, match='no space is left'): build_pictures(tmp_path, run.refer, ids, 'k', 128, batch=8, progress=False)
    monkeypatch.setattr(one_device, '_append', append)
    rest = Opening(run.refer)
    assert np.array_equal(build_pictures(tmp_path, rest, ids, 'k', 128, batch=8, progress=False).pictures, whole.pictures)
    assert rest.n == len(ids) - 16


def test_the_key_says_what_decides():
    keys = {picture_key(*k) for k in (('a', 64), ('b', 64), ('a', 96), ('a', 64, True))}
    assert len(keys) == 4


# the place

@pytest.mark.parametrize('wanted, device, host, place', [('auto', 30, 0, 'device'), ('auto', 19, 30, 'host'), ('auto', 19, 19, None), ('host', 30, 30, 'host'),
                                                        ('device', 20, 0, 'device')])
def test_half_of_the_free_memory_may_be_taken(wanted, device, host, place): assert place_of(10, wanted, device, host) == place


@pytest.mark.parametrize('wanted, mend', [('device', "compute.pictures to 'host'"), ('host', "compute.pictures to 'off'")])
def test_a_place_that_is_too_small_is_a_sentence(wanted, mend):
    with pytest.raises(KitError, match=mend): place_of(10, wanted, 19, 19)


# batches

@pytest.mark.parametrize('targets', [('mask', 'prior'), ('prior', 'box'), ('mask', 'objects')])
@pytest.mark.parametrize('trim', [True, False])
def test_a_batch_is_that_of_the_samples(opened, targets, trim):
    run, _ = opened
    train = run.samples('train')
    train.targets = targets
    table, rows = Table(train, source_of(opened), trim), [5, 30, 2, 71, 18, 44]
    ours = next(iter(Steps(table, [rows])))
    assert sorted(ours['rows']) == sorted(rows) and ours['lengths'].diff().le(0).all()
    theirs = train.batch(ours['rows'])
    words = theirs['tokens'].shape[1]
    assert torch.equal(ours['tokens'][:, :words], theirs['tokens']) and not ours['tokens'][:, words:].any()
    assert ours['tokens'].shape[1] == (words if trim else max(len(i) for i in train.ids))
    for name in targets:
        if name == 'objects': assert all(torch.equal(a, b) for a, b in zip(ours[name], theirs[name]))
        else: assert torch.equal(ours[name], theirs[name])
    pixels = as_pixels(ours['taken'], ours['frames'])
    plain = [letterbox_image(run.refer.open_image(i), 128) for i in theirs['images']]
    assert torch.equal(pixels, torch.from_numpy(np.stack(plain)))


def test_falling_lengths_are_packed_to_the_same_bytes(opened):
    run, _ = opened
    encoder = model_of(run).language
    tokens, lengths = torch.randint(2, 9, (4, 6)), torch.tensor([6, 4, 4, 1])
    tokens = tokens*(torch.arange(6) < lengths[:, None])
    turned = torch.tensor([3, 0, 2, 1])
    for a, b in zip(encoder(tokens, lengths), encoder(tokens[turned], lengths[turned])): assert torch.equal(a[turned], b)


# training

# a method of each kind: a prior, boxes, a CRF's grid, words of its own, a parse
@pytest.mark.parametrize('method', ['lts', 'mcn', 'cgan', 'rmi', 'cmpc'])
def test_the_losses_are_those_of_the_cached_features(places, method):
    run = prepare(smoke(method), *places)
    run.lock.release()
    # which words are dropped depends on the order in a batch
    dropouts = [name for name in type(run.config.model).model_fields if 'dropout' in name]
    run.config = run.config.replace(model=run.config.model.replace(**dict.fromkeys(dropouts, 0.)))
    one = run.config.replace(train=run.config.train.replace(epochs=1))
    kept = build_pictures(places[1]/'pictures', run.refer, sorted(run.refer.images), 'all', 128, progress=False)
    train, source = run.samples('train'), PictureFeatures(LiveFeatures(run.refer, run.backbone, 128), kept)
    cached = train_model(model_of(run), train, run.source, one, run.acc)
    ours = train_on_pictures(model_of(run), train, source, one, run.acc)
    assert ours[0]['samples'] == cached[0]['samples']
    assert losses(ours)[0] == pytest.approx(losses(cached)[0], rel=2e-3)  # the half precision of the cache


def test_bf16_changes_the_losses_by_a_little(opened):
    run, kept = opened
    source = PictureFeatures(LiveFeatures(run.refer, run.backbone, 128), kept, dtype=torch.bfloat16)
    exact = train_on_pictures(model_of(run), run.samples('train'), source_of(opened), run.config, run.acc)
    rough = train_on_pictures(model_of(run), run.samples('train'), source, run.config, run.acc)
    assert losses(rough) != losses(exact) and losses(rough) == pytest.approx(losses(exact), rel=5e-2)


class Stopping(PictureFeatures):
    "Before its batch number `at` something happens."
    at, what = 4, KeyboardInterrupt
    def maps(self, taken, frames):
        self.at -= 1
        if self.at == 0: raise self.what
        return super().maps(taken, frames)


@pytest.mark.parametrize('look', [1, 2, 50])
def test_ctrl_c_and_resume_give_the_same_bytes(opened, tmp_path, look):
    run, _ = opened
    train, whole, cut, clean = run.samples('train'), model_of(run), model_of(run), source_of(opened)
    straight = train_on_pictures(whole, train, clean, run.config, run.acc, look=look)
    with pytest.raises(KeyboardInterrupt): train_on_pictures(cut, train, source_of(opened, Stopping), run.config, run.acc, tmp_path/'c.pt', look=look)
    at = load_checkpoint(tmp_path/'c.pt', run_key(run.config))
    assert (at['epoch'], at['step']) == (1, 1), 'also steps that nobody had looked at are counted'
    torch.manual_seed(99)
    resumed = build_model(run.config, run.vocab, open_backbone(run.config, run.weights)[2])
    assert losses(train_on_pictures(resumed, train, clean, run.config, run.acc, tmp_path/'c.pt', look=look)) == losses(straight)
    assert same_weights(resumed, whole)


def test_how_often_is_looked_changes_no_byte(opened):
    run, _ = opened
    a, b = model_of(run), model_of(run)
    often = train_on_pictures(a, run.samples('train'), source_of(opened), run.config, run.acc, look=1)
    rarely = train_on_pictures(b, run.samples('train'), source_of(opened), run.config, run.acc)
    assert losses(often) == losses(rarely) and same_weights(a, b)


class Poisoned(PictureFeatures):
    "One of its batches is not a number, and at some batches a checkpoint falls due."
    bad, due, clock, n = 6, (3, 8), None, 0
    def maps(self, taken, frames):
        self.n += 1
        if self.n in self.due: self.clock[0] += 1000
        maps = super().maps(taken, frames)
        return tuple(m*float('nan') for m in maps) if self.n == self.bad else maps


def poisoned(opened, tmp_path, monkeypatch, **how):
    "Train with a poisoned step: the file, and the error."
    run, _ = opened
    clock = [0.]
    monkeypatch.setattr(loop.time, 'monotonic', lambda: clock[0])
    long = run.config.replace(train=run.config.train.replace(epoch_refs=18*12))
    with pytest.raises(KitError) as error:
        train_on_pictures(model_of(run), run.samples('train'), source_of(opened, Poisoned, clock=clock, **how), long, run.acc, tmp_path/'c.pt')
    return tmp_path/'c.pt', str(error.value)


@pytest.mark.parametrize('due', [(3, 8), (3, 6), (3,)])
def test_a_poisoned_step_is_found_before_anything_is_saved(opened, tmp_path, monkeypatch, due):
    "Found when the next checkpoint is due, in the step itself, or at the end of the epoch."
    path, said = poisoned(opened, tmp_path, monkeypatch, due=due)
    assert 'the loss became nan in epoch 1, step 6' in said
    kept = torch.load(path, weights_only=True)
    assert (kept['progress']['epoch'], kept['progress']['step']) == (0, 3)
    assert all(torch.isfinite(v).all() for v in kept['model'].values())
    assert np.isfinite(kept['progress']['sums']['loss'])


def test_ctrl_c_after_a_poisoned_step_saves_nothing(opened, tmp_path, monkeypatch):
    class Both(Poisoned):
        def maps(self, taken, frames):
            if self.n == 8: raise KeyboardInterrupt
            return super().maps(taken, frames)
    run, _ = opened
    clock = [0.]
    monkeypatch.setattr(loop.time, 'monotonic', lambda: clock[0])
    long = run.config.replace(train=run.config.train.replace(epoch_refs=18*12))
    with pytest.raises(KitError, match='step 6'):
        train_on_pictures(model_of(run), run.samples('train'), source_of(opened, Both, clock=clock, due=(3,)), long, run.acc, tmp_path/'c.pt')
    assert load_checkpoint(tmp_path/'c.pt', run_key(long))['step'] == 3


class Questions(TorchDispatchMode):
    "Which fractions are asked for. (Whole numbers are lengths and sizes, which lie on the CPU.)"
    def __init__(self):
        super().__init__()
        self.asked = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point(): self.asked.append(func)
        return func(*args, **(kwargs or {}))


def test_no_number_is_asked_for_but_once_in_a_while(opened, monkeypatch):
    run, _ = opened
    long = run.config.replace(train=run.config.train.replace(epoch_refs=18*8, epochs=1))
    fetched, looks = loop._fetched, []
    def counted(steps):
        looks.append(len(steps))
        return fetched(steps)
    monkeypatch.setattr(loop, '_fetched', counted)
    def train(look):
        looks.clear()
        with Questions() as q: train_on_pictures(model_of(run), run.samples('train'), source_of(opened), long, run.acc, look=look)
        return q.asked, list(looks)
    assert train(50) == ([], [8])
    assert train(3) == ([], [3, 3, 2])
    assert train(1)[1] == [1]*8


def test_a_full_memory_says_which_setting_to_lower(opened, tmp_path):
    run, _ = opened
    full = source_of(opened, Stopping, what=torch.OutOfMemoryError('CUDA out of memory'))
    with pytest.raises(KitError, match="memory of the device is full.*compute.pictures to 'host'"):
        train_on_pictures(model_of(run), run.samples('train'), full, run.config, run.acc, tmp_path/'c.pt')


# compile

def compiled_config(run, how): return run.config.replace(compute=run.config.compute.replace(compile=how))


def test_a_compiled_step_gives_the_same_losses(opened):
    "To 2 %: the words that are dropped differ, because one shape for all means other padding."
    run, _ = opened
    seen = []
    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward
    def train(how):
        config = compiled_config(run, how)
        config = config.replace(model=config.model.replace(text_dropout=.1))  # so that a step draws
        model = model_of(run, config)
        history = train_on_pictures(model, run.samples('train'), source_of(opened), config, run.acc, backend=backend)
        return history, model
    plain, a = train('off')
    compiled, b = train('on')
    assert seen and losses(compiled) == pytest.approx(losses(plain), rel=2e-2)
    for name, value in a.named_buffers(): assert torch.allclose(value.float(), dict(b.named_buffers())[name].float(), rtol=.1, atol=.05), name


def test_what_is_tried_out_leaves_no_trace(opened):
    run, _ = opened
    model, device = model_of(run), torch.device('cpu')
    model.train()
    before, drawn = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), one_device.undisturbed(model, device):
        torch.rand(3)
        for b in model.buffers(): b.add_(1)
        next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
        1/0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn) and all(p.grad is None for p in model.parameters())


def test_a_compiler_that_fails_is_a_sentence_and_the_step_stays(opened, capsys):
    run, _ = opened
    def broken(graph, inputs): raise RuntimeError('no compiler here')
    torch._dynamo.reset()
    plain = train_on_pictures(model_of(run), run.samples('train'), source_of(opened), run.config, run.acc)
    ours = train_on_pictures(model_of(run), run.samples('train'), source_of(opened), compiled_config(run, 'on'), run.acc, backend=broken)
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-5)
    assert 'torch.compile does not work here, the step stays as it is' in capsys.readouterr().out


def test_auto_never_compiles_on_a_processor(opened):
    run, _ = opened
    def never(graph, inputs): raise AssertionError
    train_on_pictures(model_of(run), run.samples('train'), source_of(opened), compiled_config(run, 'auto'), run.acc, backend=never)


# a run

def test_a_run_on_pictures_needs_no_cache_and_can_be_scored(places, tmp_path):
    root, out = places
    (tmp_path/'shared').mkdir()
    for f in (out/'shared').glob('backbone*'): (tmp_path/'shared'/f.name).write_bytes(f.read_bytes())
    run = prepare(smoke(pictures='host'), root, tmp_path)
    train_here(run, run.samples('train'))
    assert isinstance(run.source, PictureFeatures) and not (tmp_path/'shared'/'features').exists()
    cached = prepare(smoke(), root, out)
    assert isinstance(cached.source, CachedFeatures)
    val = run.samples('val')
    for workers in (0, 1):  # a loader's process reads the file
        ours, theirs = (next(iter(loader(val, s, [[0, 5, 9]], workers))) for s in (run.source, cached.source))
        # the folded normalisation rounds elsewhere, and the cache has half precision
        maps = zip(on_device(ours, run.source, 'cpu')[0], on_device(theirs, cached.source, 'cpu')[0])
        for a, b in maps: torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
    for r in (run, cached): r.lock.release()


def test_the_pictures_go_with_the_last_run_that_needs_them(opened, tmp_path):
    import json
    from lts_nb.manual.batch import release_features
    run, _ = opened
    kept = build_pictures(tmp_path/'pictures', run.refer, sorted(run.refer.images)[:3], 'k', 128, progress=False)
    source = PictureFeatures(LiveFeatures(run.refer, run.backbone, 128), kept)
    config = run.config.replace(compute=run.config.compute.replace(keep_cache=False))
    (tmp_path/'plan.json').write_text(json.dumps(dict(runs=[config.plain()])))
    release_features(tmp_path, config, source)
    assert kept.folder.exists(), 'the run is not done'
    (tmp_path/'runs'/config.run).mkdir(parents=True)
    (tmp_path/'runs'/config.run/'result.json').write_text('{}')
    release_features(tmp_path, config, source)
    assert not kept.folder.exists()


def test_auto_is_the_cache_on_a_processor(places):
    run = prepare(smoke(pictures='auto', compile='auto'), *places)
    train_here(run, run.samples('train'))
    run.lock.release()
    assert isinstance(run.source, CachedFeatures)


def test_pictures_make_it_another_run_and_their_place_does_not():
    keys = [run_key(smoke(pictures=p)) for p in ('off', 'device', 'host', 'auto')]
    assert keys[0] != keys[1] == keys[2] == keys[3]
    assert 'pictures' not in keys[0], 'checkpoints of earlier versions go on'
    assert run_key(smoke(compile='on')) == keys[0]


def test_the_measuring_script_runs_on_a_processor(tmp_path):
    import csv, subprocess, sys
    from parts import ROOT
    command = [sys.executable, ROOT/'tools'/'one_gpu.py', '--preset', 'smoke', '--steps', '2', '--pictures', '8']
    # where there is a device the script would measure it
    if not torch.cuda.is_available():
        refused = subprocess.run(command, capture_output=True, text=True)
        assert refused.returncode and 'no CUDA device' in refused.stderr
    subprocess.run([*command, '--out', tmp_path, '--device', 'cpu'], check=True, capture_output=True)
    rows = list(csv.DictReader((tmp_path/'throughput.csv').open()))
    assert {r['way'] for r in rows} == {'cached features, loader', 'pictures'}
    assert all(float(r['sentences_s']) > 0 and 0 < float(r['share']) and r['device'] and r['torch'] for r in rows)


# on a GPU

on_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')]


@pytest.fixture
def gpu_run(places):
    run = prepare(smoke(device='auto', precision='bf16', pictures='device'), *places)
    yield run
    run.lock.release()


@pytest.mark.parametrize('place', ['device', pytest.param('host', marks=[])])
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_a_gpu_trains_from_its_own_memory_and_from_pinned_memory(places, gpu_run, place):
    gpu_run.config = gpu_run.config.replace(compute=gpu_run.config.compute.replace(pictures=place))
    source = open_pictures(gpu_run, progress=False)
    assert source.place == place and source.dtype == torch.bfloat16
    assert source.pictures.is_cuda == (place == 'device') and (place == 'device' or source.pictures.is_pinned())
    cpu = prepare(smoke(), *places)
    here = train_model(model_of(cpu), cpu.samples('train'), cpu.source, cpu.config, cpu.acc)
    cpu.lock.release()
    there = train_on_pictures(gpu_run.model, gpu_run.samples('train'), source, gpu_run.config, gpu_run.acc)
    assert losses(there) == pytest.approx(losses(here), rel=5e-2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_a_step_of_lts_never_waits_for_the_gpu(gpu_run):
    source, method, config = open_pictures(gpu_run, progress=False), gpu_run.method, gpu_run.config
    model = gpu_run.model.to('cuda', memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    table = Table(gpu_run.samples('train'), source)
    steps = iter(Steps(table, [list(range(18))]*4))
    def step():
        batch = next(steps)
        with gpu_run.acc.autocast():
            loss, _ = method.loss(config.model, method.forward(model, source.maps(batch['taken'], batch['frames']), batch), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    for _ in range(2): step()
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(2): step()
    finally: torch.cuda.set_sync_debug_mode('default')

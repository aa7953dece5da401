"""What is computed once, and not once a run or once a sentence, changes no result."""
import pickle
import threading

import numpy as np
import pytest
import torch

from lts_nb.data import refer as refer_room
from lts_nb.data.dataset import Samples
from lts_nb.data.refer import Refer, load_refs
from lts_nb.data.text import build_vocab
from lts_nb.errors import KitError
from lts_nb.evidence.experiments import run_config
from lts_nb.model.lts import LTS, LTSConfig
from lts_nb.training.config import method_of
from lts_nb.training.scoring import by_picture, evaluate, kept_arrays

CHANNELS, TINY = (16, 8, 6), dict(emb_dim=8, gru_dim=6, d_m1=10, d_half=8, aspp_width=4, aspp_rates=(2, 4, 6))
FORMS = {'lts': {}, 'fusion': dict(locate='none', seg=False), 'fusion-seg': dict(locate='none'),
         'filter-seg': dict(fuse=False), 'n2': dict(n=2), 'word': dict(locate='word'),
         'transformer': dict(locate='transformer', heads=2, ffn=8), 'odd rates': dict(aspp_rates=(1, 2, 3)),
         'mask': dict(deconv='mask'), 'logits': dict(prior_as='logits')}


def built(switches, side=64):
    "A small LTS in double precision whose norms know some data, with a batch of four sentences."
    torch.manual_seed(0)
    model = LTS(LTSConfig(**TINY | switches), CHANNELS, 20).double()
    features = [torch.randn(4, c, side//s, side//s).double() for c, s in zip(CHANNELS, (32, 16, 8))]
    tokens, lengths = torch.randint(2, 20, (4, 5)), torch.tensor([5, 3, 2, 4])
    tokens = tokens*(torch.arange(5) < lengths[:, None])
    with torch.no_grad():
        for _ in range(3): model.train()(features, tokens, lengths)
    return model, features, tokens, lengths


@pytest.mark.parametrize('side', [64, 96])
@pytest.mark.parametrize('form', FORMS)
def test_two_halves_are_the_equations(form, side):
    model, *batch = built(FORMS[form], side)
    weights = torch.randn_like(model.eval()(*batch).mask)
    grads, outs = [], []
    for mode in (True, False):
        for path in (model, model.by_equations):
            model.train(mode).zero_grad()
            state = {k: v.clone() for k, v in model.state_dict().items()}
            out = path(*batch)
            (out.mask*weights).sum().backward()
            outs.append(out.mask.detach())
            grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
            model.load_state_dict(state)
    for i in (0, 2):
        torch.testing.assert_close(outs[i], outs[i + 1], rtol=0, atol=1e-11)
        for a, b in zip(grads[i], grads[i + 1]): torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize('form', FORMS)
def test_a_picture_looked_at_once_serves_all_its_sentences(form):
    model, features, tokens, lengths = built(FORMS[form])
    model.eval()
    of_picture = torch.tensor([1, 0, 1, 1])
    with torch.no_grad():
        looked = [m[of_picture] for m in model.look([f[:2] for f in features])]
        shared = model.answer(looked, tokens, lengths)
        plain = model.by_equations([f[of_picture] for f in features], tokens, lengths)
    torch.testing.assert_close(shared.mask, plain.mask, rtol=0, atol=1e-11)


def test_scoring_looks_at_a_picture_once(tiny_family):
    refer = Refer(tiny_family, 'refshapes')
    config = run_config('lts', 'refshapes', 'smoke')
    vocab, method = build_vocab(refer), method_of('lts')
    samples = Samples(refer, 'val', vocab, size=128)
    torch.manual_seed(0)
    model = method.build(config.model, CHANNELS, vocab)
    maps = {i: [torch.randn(c, 128//s, 128//s) for c, s in zip(CHANNELS, (32, 16, 8))] for i in refer.images}
    asked = []
    def source(ids):
        asked.extend(ids)
        return tuple(torch.stack(m) for m in zip(*(maps[i] for i in ids)))
    together = evaluate(model, samples, source, method, config.model, progress=False, finishes=('plain',))
    assert len(asked) == len(set(asked)) == len({r.image_id for r, _ in samples.rows})
    alone = evaluate(model, samples, source, method, config.model, batch=1, progress=False, finishes=('plain',))
    for name in ('intersection', 'union', 'hit'): assert np.array_equal(together[name], alone[name]), name


def test_batches_keep_pictures_together(tiny_family):
    refer = Refer(tiny_family, 'refshapes')
    samples = Samples(refer, 'val', build_vocab(refer), size=128)
    most = max(len([r for r, _ in samples.rows if r.image_id == i]) for i in refer.images)
    for size in (1, 2, most, 64):
        batches = by_picture(samples, size)
        assert sorted(row for b in batches for row in b) == list(range(len(samples)))
        assert all(0 < len(b) <= size for b in batches)
    pictures = [{samples.rows[row][0].image_id for row in b} for b in by_picture(samples, most)]
    assert sum(map(len, pictures)) == len(set.union(*pictures)), 'no picture is in two batches'


def release(folder, refs):
    path = folder/'refs(own).p'
    path.write_bytes(pickle.dumps(refs, protocol=2))
    return path


def kept_by(path): return sorted(f.name for f in path.parent.iterdir() if f.name.startswith('.refs'))


def test_a_pickle_is_opened_once(tmp_path, monkeypatch):
    refs = [dict(ref_id=1, sentences=[dict(sent='café', tokens=['café'])], share=.5, none=None)]
    path, opened = release(tmp_path, refs), []
    slow = refer_room.load_restricted_pickle
    monkeypatch.setattr(refer_room, 'load_restricted_pickle', lambda p: opened.append(p) or slow(p))
    assert load_refs(path) == load_refs(path) == refs and len(opened) == 1 and len(kept_by(path)) == 1
    # other bytes are another release
    refs[0]['ref_id'] = 2
    assert load_refs(release(tmp_path, refs)) == refs and len(opened) == 2
    # what was kept and is damaged is made again
    for f in tmp_path.glob('.refs*'): f.write_text('{"half": ')
    assert load_refs(path) == load_refs(path) == refs and len(opened) == 3


def test_what_json_would_change_is_not_kept(tmp_path):
    for refs in ([dict(box=(1, 2))], [{1: 'a number as a key'}]):
        path = release(tmp_path, refs)
        assert load_refs(path) == load_refs(path) == refs and kept_by(path) == []


def test_a_hostile_pickle_leaves_nothing(tmp_path):
    path = tmp_path/'refs(own).p'
    path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(KitError, match='os.system'): load_refs(path)
    assert kept_by(path) == []


def test_where_nobody_may_write_the_pickle_is_opened_each_time(tmp_path, monkeypatch):
    path = release(tmp_path, [dict(ref_id=1)])
    def full(*_): raise KitError('the disk is full', tmp_path)
    monkeypatch.setattr(refer_room, 'write_text', full)
    assert load_refs(path) == [dict(ref_id=1)] and kept_by(path) == []


def test_kept_arrays_are_made_once_and_again_where_damaged(tmp_path):
    path, made = tmp_path/'shared'/'grids.npz', []
    def make():
        made.append(1)
        return {'bits': np.arange(4), 'words': np.array(['a', 'é'])}
    threads = [threading.Thread(target=kept_arrays, args=(path, make)) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(made) == 1 and kept_arrays(path, make)['words'].tolist() == ['a', 'é'] and len(made) == 1
    path.write_bytes(path.read_bytes()[:50])
    assert kept_arrays(path, make)['bits'].tolist() == [0, 1, 2, 3] and len(made) == 2


def test_grids_of_another_size_are_refused(tiny_family):
    refer = Refer(tiny_family, 'refshapes')
    vocab = build_vocab(refer)
    kept = Samples(refer, 'val', vocab, size=128).all_grids(progress=False)
    with pytest.raises(KitError, match='not of 256 cells'): Samples(refer, 'val', vocab, size=64).take_grids(kept)

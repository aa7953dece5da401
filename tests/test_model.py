"""Every form of the model: finite, trained in all its parts, faithful to its batch."""
import itertools
import json


import pytest
import torch

from lts_nb.model.darknet import Darknet53, split_backbone
from lts_nb.errors import KitError
from lts_nb.model.losses import downsample_mask, lts_loss
from lts_nb.model.lts import LTS, LTSConfig, LTSOutput, model_summary

TINY = LTSConfig(emb_dim=12, gru_dim=8, d_m1=16, d_half=8, aspp_width=8, aspp_rates=(1, 2, 3), heads=2, ffn=16, max_len=6)
LENGTHS = torch.tensor([6, 3, 1, 2])
VARIANTS = [dict(fuse=f, locate=l, n=n, seg=s) for f, l, n, s in itertools.product(
    (True, False), ('none', 'filter', 'filter-parallel', 'word', 'transformer'), (1, 2), (True, False))
    if n == 1 or l not in ('none', 'word')]
VARIANTS += [dict(n=3), dict(n=3, locate='transformer'), dict(deconv='mask'), dict(prior_as='logits'), dict(scale_kernel=True), dict(text_dropout=.5), dict(aspp_rates=(2,))]
name = lambda v: '-'.join(f'{k}={x}' for k, x in v.items())


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def batch(size=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 20, (4, 6), generator=g) * (torch.arange(6) < LENGTHS[:, None])
    return torch.rand(4, 3, size, size, generator=g), tokens, torch.rand(4, size, size, generator=g) > .7


def make(n_tail=2, **switches):
    torch.manual_seed(0)
    backbone = Darknet53(1/16, (1, 1, 1, 1, 1))
    frozen, tail = split_backbone(backbone, n_tail)
    return frozen, LTS(TINY.replace(**switches), backbone.channels, 20, tail=tail)


@pytest.mark.parametrize('switches', VARIANTS, ids=name)
def test_every_parameter_learns(switches):
    frozen, model = make(**switches)
    image, tokens, truth = batch()
    out = model(frozen(image), tokens, LENGTHS)
    assert isinstance(out, LTSOutput) and out.mask.shape == (4, 1, *((16, 16) if model.cfg.seg else (8, 8)))
    assert (out.prior is None) == (model.cfg.locate == 'none')
    total, parts = lts_loss(out, downsample_mask(truth, out.mask.shape[-2:]), downsample_mask(truth, (8, 8)))
    total.backward()
    assert total.isfinite() and (parts['loc'] > 0) == (model.cfg.seg and model.cfg.locate != 'none')
    deaf = not model.cfg.fuse and model.cfg.locate == 'none'
    for k, p in model.named_parameters():
        if deaf and k.startswith('language'): assert p.grad is None
        else: assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, k


def test_only_query_and_key_of_the_cross_attention_do_not_learn():
    frozen, model = make(locate='transformer')
    image, tokens, _ = batch()
    model(frozen(image), tokens, LENGTHS).mask.pow(2).sum().backward()
    d = 2*TINY.d_half
    cross, own = (getattr(model.locate.layer, f'{k}_attn').in_proj_weight.grad for k in ('cross', 'self'))
    assert cross[:2*d].abs().max() < 1e-6 and cross[2*d:].abs().max() > 1e-4 and (own.abs().amax(1) > 0).all()


@pytest.mark.parametrize('switches', [{}, dict(locate='word'), dict(locate='transformer', n=2), dict(seg=False)], ids=name)
def test_a_sample_does_not_depend_on_its_batch(switches):
    frozen, model = make(**switches)
    image, tokens, _ = batch()
    frozen, model = frozen.double(), model.double().eval()
    whole = model(frozen(image.double()), tokens, LENGTHS)
    for i, n in enumerate(LENGTHS.tolist()):
        one = model(frozen(image[i:i+1].double()), tokens[i:i+1, :n], LENGTHS[i:i+1])
        for a, b in zip(one, whole): torch.testing.assert_close(a, b[i:i+1])


def test_nothing_frozen_moves():
    frozen, model = make()
    image, tokens, truth = batch()
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    both = torch.nn.ModuleList([frozen, model]).train()
    optimiser = torch.optim.Adam([p for p in both.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        out = model(frozen(image), tokens, LENGTHS)
        optimiser.zero_grad()
        lts_loss(out, downsample_mask(truth, (16, 16)), downsample_mask(truth, (8, 8)))[0].backward()
        optimiser.step()
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())


def test_it_can_learn_which_of_two_objects():
    torch.manual_seed(0)
    frozen, model = make(n_tail=0)
    image, tokens, _ = batch()
    image, tokens, lengths = image[:1].expand(4, -1, -1, -1), torch.tensor([[2], [3], [2], [3]]), torch.ones(4, dtype=torch.long)
    truth = torch.zeros(4, 64, 64)
    truth[::2, :32], truth[1::2, 32:] = 1, 1
    features, optimiser = frozen(image), torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        total, _ = lts_loss(model(features, tokens, lengths), downsample_mask(truth, (16, 16)), downsample_mask(truth, (8, 8)))
        optimiser.zero_grad(), total.backward(), optimiser.step()
    hit = (model(features, tokens, lengths).mask[:, 0] > 0) == downsample_mask(truth, (16, 16)).bool()
    assert hit.float().mean() > .95


@pytest.mark.parametrize('size', [96, 128])
def test_other_sizes_and_oblong_images(size):
    frozen, model = make()
    image = torch.rand(4, 3, size, 64)
    out = model(frozen(image), batch()[1], LENGTHS)
    assert out.prior.shape[-2:] == (size//8, 8) and out.mask.shape[-2:] == (size//4, 16)


def test_bfloat16_autocast_and_channels_last():
    frozen, model = make()
    image, tokens, truth = batch()
    plain = model.eval()(frozen(image), tokens, LENGTHS).mask
    last = model.to(memory_format=torch.channels_last)(frozen(image.contiguous(memory_format=torch.channels_last)), tokens, LENGTHS).mask
    torch.testing.assert_close(plain, last, rtol=1e-3, atol=1e-4)
    with torch.autocast('cpu', torch.bfloat16): out = model.train()(frozen(image), tokens, LENGTHS)
    assert lts_loss(out, downsample_mask(truth, (16, 16)), downsample_mask(truth, (8, 8)))[0].isfinite()


def test_state_dict_gives_the_same_model():
    frozen, a = make(locate='transformer', n=2)
    torch.manual_seed(5)
    b = LTS(a.cfg, (64, 32, 16), 20, tail=split_backbone(Darknet53(1/16, (1, 1, 1, 1, 1)), 2)[1])
    b.load_state_dict(a.state_dict())
    image, tokens, _ = batch()
    for x, y in zip(a.eval()(frozen(image), tokens, LENGTHS), b.eval()(frozen(image), tokens, LENGTHS)): assert torch.equal(x, y)


def test_vectors_are_the_start_and_may_stay():
    vectors = torch.randn(20, 12)
    for freeze in (False, True):
        model = LTS(TINY.replace(freeze_vectors=freeze), (64, 32, 16), 20, vectors)
        assert torch.equal(model.language.embed.weight, vectors) and model.language.embed.weight.requires_grad != freeze
    with pytest.raises(KitError, match='dimension 12'): LTS(TINY, (64, 32, 16), 20, torch.randn(20, 300))


def test_configuration_survives_json():
    cfg = TINY.replace(locate='word', seg=False)
    assert LTSConfig(**json.loads(json.dumps(cfg.plain()))) == cfg and hash(cfg)


@pytest.mark.parametrize('bad', [dict(locate='filters'), dict(deconv='masks'), dict(prior_as='sigmoids'), dict(n=0), dict(gru_dim=0),
                                 dict(text_dropout=1.), dict(locate='none', n=2), dict(locate='word', n=2)], ids=name)
def test_configuration_refuses(bad):
    with pytest.raises(KitError): LTSConfig(**bad)


def test_sentences_for_users():
    frozen, model = make(locate='word')
    image, tokens, _ = batch()
    with pytest.raises(KitError, match='no word'): model(frozen(image), tokens, torch.tensor([1, 0, 2, 3]))
    with pytest.raises(KitError, match='500 tokens'): model(frozen(image), torch.full((4, 500), 2), torch.full((4,), 500))
    with pytest.raises(KitError, match='heads'): make(locate='transformer', heads=3)


@pytest.mark.parametrize('switches', [{}, dict(locate='none', seg=False), dict(locate='transformer')], ids=name)
def test_summary_adds_up(switches):
    frozen, model = make(**switches)
    table = model_summary(model, frozen, 64, 5)
    total = sum(p.numel() for m in (frozen, model) for p in m.parameters())
    assert table.loc['total', 'parameters'] == total and model.training and table['GFLOPs'].iloc[:-1].sum() == pytest.approx(table.loc['total', 'GFLOPs'])

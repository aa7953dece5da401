"""What every method of the part rivals owes: gradients, padding that changes nothing, eight samples learnt by heart."""
import pytest
import torch

from lts_nb.model.method import METHODS
from lts_nb.training.config import load_methods
from lts_nb.training.practice import by_heart, practice_batch, practice_set

load_methods()
RIVALS = sorted(m for m, method in METHODS.items() if type(method).__module__.startswith('lts_nb.rivals'))
# settings for sentences of made-up words: no grammar has a tree for them
MADE_UP = dict.fromkeys(('lscm', 'nmtree'), {'tree': 'chain'})


def settings_of(name, preset='smoke', **changes):
    "A method and its settings at a preset, at 128 pixels."
    method = METHODS[name]
    size = {'size': 128} if 'size' in method.config.model_fields else {}
    return method, method.config(**method.widths.get(preset, {}) | size | changes)


def built(name, preset='smoke', seed=0, words=40):
    method, cfg = settings_of(name, preset, **MADE_UP.get(name, {}))
    torch.manual_seed(seed)
    return method, cfg, method.build(cfg, CHANNELS, range(words)).double()


CHANNELS = 12, 10, 6


def made_up(sentences, size=128, seed=1):
    "Features and a batch of made-up sentences, lists of word numbers."
    generator = torch.Generator().manual_seed(seed)
    n, longest = len(sentences), max(map(len, sentences))
    features = tuple(torch.rand(n, c, size//s, size//s, generator=generator, dtype=torch.double)
                     for c, s in zip(CHANNELS, (32, 16, 8)))
    tokens = torch.zeros(n, longest, dtype=torch.long)
    for i, s in enumerate(sentences): tokens[i, :len(s)] = torch.tensor(s)
    return features, dict(tokens=tokens, lengths=torch.tensor([len(s) for s in sentences]))


def with_things(method, features, seed=2):
    "Features that end with three made-up things of each picture and a place of padding, for a method that chooses."
    if not method.things: return features
    from lts_nb.rivals.proposals import Things
    generator = torch.Generator().manual_seed(seed)
    n, size = len(features[0]), 8*features[2].shape[-1]
    corner = torch.rand(n, 4, 2, generator=generator)*size/2
    boxes = torch.cat([corner, corner + size/8 + torch.rand(n, 4, 2, generator=generator)*size/4], -1).double()
    kinds = torch.randint(0, 2, (n, 4), generator=generator)
    kinds[:, 3] = -1
    masks = torch.rand(n, 4, size//4, size//4, generator=generator) > .5
    things = Things(boxes, kinds, torch.ones(n, 4), masks)
    return (*features, *things, *things)


SENTENCES = [[5, 6, 7, 8, 9, 3], [10, 11], [12], [5, 13, 14]]


def with_inputs(method, cfg, batch):
    "A batch with what the method reads of the words themselves."
    words = [[f'w{t}' for t in row[:n]] for row, n in zip(batch['tokens'].tolist(), batch['lengths'].tolist())]
    return batch | method.inputs(cfg, words)


@pytest.mark.parametrize('name', RIVALS)
def test_padding_and_neighbours_change_nothing(name):
    method, cfg, model = built(name)
    model.eval()
    features, batch = made_up(SENTENCES)
    features = with_things(method, features)
    batch = with_inputs(method, cfg, batch)
    with torch.no_grad():
        together = method.probability(method.forward(model, features, batch))
        for i, s in enumerate(SENTENCES):
            alone = {'tokens': torch.tensor([s]), 'lengths': torch.tensor([len(s)])}
            alone = with_inputs(method, cfg, alone)
            one = method.probability(method.forward(model, tuple(f[i:i + 1] for f in features), alone))
            torch.testing.assert_close(together[i:i + 1], one, rtol=0, atol=1e-6)
    assert together.std() > 0


@pytest.mark.parametrize('name', RIVALS)
def test_the_answer_is_a_map_on_the_grid_that_it_claims(name):
    method, cfg, model = built(name)
    features, batch = made_up(SENTENCES)
    features = with_things(method, features)
    with torch.no_grad():
        out = method.forward(model.eval(), features, with_inputs(method, cfg, batch))
    p, side = method.probability(out), 128//method.stride(cfg)
    assert p.shape == (4, 1, side, side) and p.dtype == torch.float32 and 0 <= p.min() and p.max() <= 1
    assert method.title and method.notes
    assert method.threshold is None or 0 < method.threshold < 1


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('practice')


@pytest.mark.parametrize('name', RIVALS)
def test_every_parameter_learns(name, folder):
    method, cfg = settings_of(name)
    practice = practice_set(folder, method, cfg)
    torch.manual_seed(0)
    model = method.build(cfg, practice.channels, practice.vocab)
    features, batch = practice_batch(practice)
    loss, parts = method.loss(cfg, method.forward(model.train(), features, batch), batch)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(v) for v in parts.values())
    without = [n for n, p in model.named_parameters() if p.requires_grad
               and (p.grad is None or not p.grad.abs().max() > 0)]
    assert without == []


@pytest.mark.parametrize('name', RIVALS)
def test_it_learns_eight_samples_by_heart(name, folder):
    method, cfg = settings_of(name, 'cpu')
    practice = practice_set(folder, method, cfg)
    _, losses, ious = by_heart(method, cfg, practice, method.rates.get('cpu', 3e-3))
    assert ious[-1][1] >= .9, f'{name}: {ious[-1][1]:.3f} after {len(losses)} steps'


@pytest.mark.parametrize('name', RIVALS)
def test_its_settings_refuse_nonsense(name):
    from lts_nb.errors import KitError
    method = METHODS[name]
    with pytest.raises(KitError, match='unknown|no setting|not'): method.config(nonsense=1)

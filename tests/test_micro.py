"""Genuine expressions on genuine photographs: the whole model can fit 45 of them, scored at the original size."""
import torch
from torch import nn

from lts_nb.model.darknet import Darknet53
from lts_nb.data.dataset import Samples
from lts_nb.training.features import LiveFeatures
from lts_nb.training.fit import fit
from lts_nb.model.losses import lts_loss
from lts_nb.model.lts import LTS, LTSConfig
from lts_nb.model.method import method_named
from lts_nb.data.refer import Refer
from lts_nb.data.text import build_vocab, tokenize
from lts_nb.training.scoring import evaluate, split_metrics

SIZE, EPOCHS = 160, 60


class Whole(nn.Module):
    "Backbone and LTS in one: nothing is pretrained here, so nothing may be frozen."
    def __init__(self, vocab):
        super().__init__()
        self.backbone = Darknet53(.25, (1, 1, 1, 1, 1), False)
        self.lts = LTS(LTSConfig(emb_dim=50, gru_dim=64, d_m1=256, d_half=48, aspp_width=32, aspp_rates=(2, 5, 7)), self.backbone.channels, len(vocab))

    def forward(self, pixels, tokens, lengths): return self.lts(self.backbone(pixels), tokens, lengths)


def test_overfits_the_val_sentences(micro):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    refer = Refer(micro, 'refcoco')
    vocab = build_vocab([tokenize(s.sent) for _, s in refer.sentences_of('val')])
    samples = Samples(refer, 'val', vocab, 15, SIZE)
    assert len(samples) == 45
    model = Whole(vocab).to(memory_format=torch.channels_last)
    pixels = dict(zip(ids := sorted({r.image_id for r, _ in samples.rows}), LiveFeatures(refer, nn.Identity(), SIZE).images(ids)))

    def batches(epoch, skip):
        rows = samples.epoch_rows(0, epoch, all_sentences=True)
        return [samples.batch(rows[i:i + 15]) for i in range(0, 45, 15)][skip:]

    def loss_of(b):
        out = model(torch.stack([pixels[i] for i in b['images']]), b['tokens'], b['lengths'])
        return lts_loss(out, b['mask'], b['prior'])

    fit(model, loss_of, batches, EPOCHS, lr=2e-3, decay=45)
    model.eval()
    scores = evaluate(model.lts, samples, LiveFeatures(refer, model.backbone, SIZE), method_named('lts'), model.lts.cfg, progress=False)
    metrics = split_metrics(scores)
    print({k: round(v, 1) for k, v in metrics.items()})
    assert metrics['oIoU'] >= 80, metrics

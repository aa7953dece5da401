
from collections import Counter
from typing import NamedTuple
import numpy as np
import torch
import torch.nn.functional as F
from fastcore.basics import patch
from pydantic import Field
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from ..data.dataset import TARGETS
from ..data.text import pad_batch, tokenize
from ..model.language import real_words, word_embedding
from ..model.method import register
from ..rivals.proposals import Chooser, ChooserConfig, ChooserNet
from ..rivals.words import softmax_over_words
from ..settings import Width


class Scaled(nn.Module):
    "N(x) = s ⊙ x/‖x‖: a vector of length 1, made as long as training wants."
    def __init__(self,
        d:int,            # numbers of a vector
        start:float=20.,  # every entry of s before training
    ):
        super().__init__()
        self.s = nn.Parameter(torch.full((d,), start))
    def forward(self, x):  # (...,d) -> (...,d); 0 stays 0
        return self.s*F.normalize(x, dim=-1)


class Phrases(NamedTuple):
    "A sentence as three phrases: for the subject, the location and the relationship."
    q: torch.Tensor        # (...,3,d): weighted sums of the words
    weights: torch.Tensor  # (...,3): how much each phrase counts, sums to 1
    words: torch.Tensor    # (...,3,T): weight of each word in each phrase, sums to 1 over T

class PhraseEncoder(nn.Module):
    "Three soft phrases: the states of a bidirectional LSTM say which words belong to which."
    def __init__(self,
        vocab_size:int,     # rows of the embedding, padding and unknown included
        emb_dim:int,        # of a word in the table
        d:int,              # of a word as the phrases sum it up
        hidden:int,         # of a state, per direction
        dropout:float=.5,   # on the embeddings
        vectors=None,       # (vocab_size, emb_dim) initial embeddings
    ):
        super().__init__()
        self.embed, self.drop = word_embedding(vocab_size, emb_dim, vectors), nn.Dropout(dropout)
        self.word = nn.Sequential(nn.Linear(emb_dim, d), nn.ReLU())
        self.lstm = nn.LSTM(d, hidden, batch_first=True, bidirectional=True)
        self.weigh, self.attend = nn.Linear(2*hidden, 3), nn.Linear(2*hidden, 3)
    def forward(self,
        tokens,  # (...,T), padded with 0 at the end
    )->Phrases:
        "Any number of dimensions in front of the words."
        front, T = tokens.shape[:-1], tokens.shape[-1]
        # e_t: what a phrase will be made of
        e = self.word(self.drop(self.embed(tokens)))
        # h_t, and the last state of each direction
        flat, lengths = tokens.reshape(-1, T), (tokens != 0).sum(-1).flatten()
        mask = real_words(flat, lengths)
        packed = pack_padded_sequence(e.reshape(-1, T, e.shape[-1]), lengths.cpu(),
                                      batch_first=True, enforce_sorted=False)
        states, (last, _) = self.lstm(packed)
        states = pad_packed_sequence(states, batch_first=True, total_length=T)[0]
        # a softmax over the three phrases, and one over the words of each
        weights = self.weigh(torch.cat([last[0], last[1]], -1)).softmax(-1)
        words = softmax_over_words(self.attend(states).transpose(1, 2), mask[:, None])
        words = words.unflatten(0, front)
        # phrases are sums of the embeddings, not of the states
        return Phrases(words @ e, weights.unflatten(0, front), words)


NEAR = 5  # neighbours that a thing is compared with

def box_places(
    boxes,     # (...,4): x0, y0, x1, y1 in pixels
    size,      # width and height of the picture, pixels
)->torch.Tensor: # (...,5): l
    "l = x/W, y/H, (x+w-1)/W, (y+h-1)/H, wh/WH: where a box lies in its picture."
    W, H = size
    x0, y0, x1, y1 = boxes.unbind(-1)
    area = (x1 - x0)*(y1 - y0)/(W*H)
    return torch.stack([x0/W, y0/H, (x1 - 1)/W, (y1 - 1)/H, area], -1)

def box_offsets(
    boxes,     # (...,4): of the things themselves
    others,    # (...,4): of their neighbours
)->torch.Tensor: # (...,5): δ
    "Where another box lies, seen from the middle of one, in widths and heights of that one."
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp_min(1e-3)
    middle = (boxes[..., :2] + boxes[..., 2:])/2
    # both corners of the other box
    first, last = (others[..., :2] - middle)/sides, (others[..., 2:] - middle)/sides
    area = (others[..., 2:] - others[..., :2]).prod(-1)/sides.prod(-1)
    return torch.cat([first, last, area[..., None]], -1)


def nearest(
    boxes,     # (P,K,4): x0, y0, x1, y1
    kinds,     # (P,K): category, -1 at padding
    n:int=NEAR, # neighbours wanted
)->tuple:      # of the same category, of the context: each indices (P,K,n) and which are real, bool
    "Each thing's neighbours by the distance of the middles, nearest first."
    K, real = kinds.shape[1], kinds >= 0
    middle = (boxes[..., :2] + boxes[..., 2:])/2
    far = (middle[:, :, None] - middle[:, None]).square().sum(-1)
    # who may be a neighbour of whom: (P,K,K)
    allowed = real[:, :, None] & real[:, None] & ~torch.eye(K, dtype=torch.bool).to(real)
    alike = kinds[:, :, None] == kinds[:, None]
    # a thing of the own category comes behind all others in the context
    never, out = far.max() + 1, []
    for may, key in ((allowed & alike, far), (allowed, far + alike*never)):
        order = key.masked_fill(~may, float('inf')).sort(stable=True).indices
        order = F.pad(order[..., :n], (0, max(0, n - K)))
        out += [order, torch.arange(n).to(kinds) < may.sum(-1, keepdim=True)]
    return tuple(out)

def at_neighbours(
    x,         # (P,K,d): something of each thing
    which,     # (P,K,n): indices
    real,      # (P,K,n) bool
)->torch.Tensor: # (P,K,n,d): 0 where there is no neighbour
    "What a thing's neighbours have."
    found = x[torch.arange(len(x)).to(which)[:, None, None], which]
    return found*real[..., None]


class Places(NamedTuple):
    "Where things lie, and what is near them."
    own: torch.Tensor      # (P,K,5): l
    alike: torch.Tensor    # (P,K,25): δ of the five nearest of the same category; 0: none
    context: torch.Tensor  # (P,K,5,5): δ of the five of the context; 0: none
    which: torch.Tensor    # (P,K,5): their indices
    real: torch.Tensor     # (P,K,5) bool: are they there?

def places_of(
    boxes,     # (P,K,4): x0, y0, x1, y1 in pixels
    kinds,     # (P,K): category, -1 at padding
    size,      # width and height of the picture, pixels
)->Places:
    "All that the modules for location and relationship know of the boxes."
    same, is_same, near, is_near = nearest(boxes, kinds)
    seen = [box_offsets(boxes[:, :, None], at_neighbours(boxes, *found))*found[1][..., None]
            for found in ((same, is_same), (near, is_near))]
    return Places(box_places(boxes, size), seen[0].flatten(2), seen[1], near, is_near)


def over_rows(
    norm,  # a batch normalisation
    x,     # (...,d)
)->torch.Tensor: # (...,d)
    "A normalisation over all vectors, whatever dimensions they stand in."
    return norm(x.reshape(-1, x.shape[-1])).view_as(x)

class Cells(NamedTuple):
    "The cells of a box, before a sentence has asked for any of them."
    deep: torch.Tensor   # (...,G,c_deep): of length 1, without s
    fused: torch.Tensor  # (...,G,d): N(A)
    seen: torch.Tensor   # (...,G,d): W V, the picture's part of the attention

class Subject(nn.Module):
    "Attributes of a thing, and an attention over the cells of its box."
    def __init__(self,
        c_fine:int,   # channels of the finer crop
        c_deep:int,   # of the deeper crop
        d_word:int,   # of a phrase
        d:int,        # width
        words:int,    # attributes
        dropout:float=.2, # before the attributes
        start:float=20.,  # of the scales
    ):
        super().__init__()
        self.fine, self.deep = Scaled(c_fine, start), Scaled(c_deep, start)
        self.fuse, self.norm = nn.Linear(c_fine + c_deep, d), nn.BatchNorm1d(d)
        self.drop, self.attributes = nn.Dropout(dropout), nn.Linear(d, words)
        self.fused, self.phrase = Scaled(d, start), Scaled(d_word, start)
        # W [V; q] = W_V V + W_q q: the picture's part does not wait for the sentence
        self.see, self.read = nn.Linear(c_deep + d, d), nn.Linear(d_word, d, bias=False)
        self.score = nn.Linear(d, 1)
    def cells(self,
        fine,  # (...,G,c_fine): G cells of a box
        deep,  # (...,G,c_deep)
    )->tuple:  # `Cells`, attribute logits (...,words)
        "What the picture alone says."
        fine, deep = F.normalize(fine, dim=-1), F.normalize(deep, dim=-1)
        # W N(x) = (W s) x/‖x‖: multiplied into the matrix, s asks for no gradient of each cell
        s = torch.cat([self.fine.s, self.deep.s])
        # A: both crops of a cell, fused
        both = torch.cat([fine, deep], -1)
        A = over_rows(self.norm, F.linear(both, self.fuse.weight*s, self.fuse.bias)).relu()
        # attributes are read from the mean cell
        logits = self.attributes(self.drop(A.mean(-2)))
        A = self.fused(A)
        # W V for V = [N(deep); N(A)]
        on_deep, on_A = self.see.weight.split([deep.shape[-1], A.shape[-1]], 1)
        seen = F.linear(deep, on_deep*self.deep.s) + F.linear(A, on_A, self.see.bias)
        return Cells(deep, A, seen), logits
    def forward(self,
        cells,  # from `cells`
        q,      # (...,d_word): the subject phrase
    ):          # v (...,c_deep+d), α (...,G)
        "The cells that the phrase asks for, as one vector."
        asked = (cells.seen + self.read(self.phrase(q))[..., None, :]).tanh()
        alpha = self.score(asked).squeeze(-1).softmax(-1)
        deep, A = ((alpha[..., None, :] @ x).squeeze(-2) for x in (cells.deep, cells.fused))
        return torch.cat([self.deep.s*deep, A], -1), alpha


class Location(nn.Module):
    "v = W [N(l); N(δ)]: a thing's place, and its place among its like."
    def __init__(self,
        d:int,            # width
        start:float=20.,  # of the scales
    ):
        super().__init__()
        self.own, self.alike = Scaled(5, start), Scaled(5*NEAR, start)
        self.out = nn.Linear(5 + 5*NEAR, d)
    def forward(self, own, alike):  # (...,5), (...,25) -> (...,d)
        return self.out(torch.cat([self.own(own), self.alike(alike)], -1))

class Relation(nn.Module):
    "r_j = W [N(c_j); N(δ_j)]: what neighbour j looks like, and where it is."
    def __init__(self,
        c_deep:int,       # numbers of a neighbour's look
        d:int,            # width
        start:float=20.,  # of the scales
    ):
        super().__init__()
        self.look, self.place = Scaled(c_deep, start), Scaled(5, start)
        self.out = nn.Linear(c_deep + 5, d)
    def forward(self, look, place):  # (...,5,c_deep), (...,5,5) -> (...,5,d)
        return self.out(torch.cat([self.look(look), self.place(place)], -1))


class Tower(nn.Module):
    "Linear, normalisation, ReLU, dropout, linear, normalisation; then length 1."
    def __init__(self,
        d_in:int,    # of what comes
        d:int,       # width
        dropout:float=.1, # between the layers
    ):
        super().__init__()
        self.first, self.norm = nn.Linear(d_in, d), nn.BatchNorm1d(d)
        self.drop = nn.Dropout(dropout)
        self.last, self.last_norm = nn.Linear(d, d), nn.BatchNorm1d(d)
    def forward(self, x):  # (...,d_in) -> (...,d)
        x = self.drop(over_rows(self.norm, self.first(x)).relu())
        return F.normalize(over_rows(self.last_norm, self.last(x)), dim=-1)

class Matching(nn.Module):
    "F(v, q): the cosine of what is seen and what is said, each behind a tower."
    def __init__(self, d_seen, d_said, d, dropout=.1):
        super().__init__()
        self.seen, self.said = Tower(d_seen, d, dropout), Tower(d_said, d, dropout)
    def forward(self, v, q):  # (...,d_seen), (...,d_said) -> (...)
        return (self.seen(v)*self.said(q)).sum(-1)

def best_neighbour(
    cosines,    # (...,5)
    real,       # (...,5) bool: is there a neighbour?
    floor:bool=True, # an empty place counts as similarity 0, as in the official code
)->torch.Tensor: # (...)
    "The similarity of the neighbour that fits best; 0 for a thing alone."
    if floor: return (cosines*real).max(-1).values
    # without the floor a thing may have nothing but unfitting neighbours
    found = cosines.masked_fill(~real, -2.).max(-1).values
    return torch.where(real.any(-1), found, 0.)


def is_neighbour(
    offsets,  # (...,5,5): δ, 0 where there is no neighbour
)->torch.Tensor: # (...,5) bool
    "Real neighbours, as the official code tells them: their five numbers do not sum to 0."
    return offsets.sum(-1) != 0


def ranking_loss(
    right,     # (n,): score of object i for its own sentence
    object_,   # (n,): of another object for the same sentence
    sentence,  # (n,): of object i for another sentence
    margin:float=.1, # by which the right pair shall be ahead
)->torch.Tensor:
    "The right pair beats both wrong ones by a margin; mean over the pairs."
    wrong_object = (margin + object_ - right).relu()
    return (wrong_object + (margin + sentence - right).relu()).mean()

def attribute_loss(
    logits,   # (n,A)
    labels,   # (n,A) of 0 and 1
    weights,  # (A,): of the attributes
)->torch.Tensor:
    "Weighted cross-entropy over the objects of which an attribute is known."
    known = labels.any(-1)
    if not known.any(): return logits.sum()*0
    each = F.binary_cross_entropy_with_logits(logits, labels, weights.to(logits), reduction='none')
    return each[known].mean()

def class_weights(
    counts,   # (A,): how often each attribute occurs; 0: not a word
)->torch.Tensor: # (A,): from 1 for the most frequent to 10 for the rarest; 0 for no word
    "1/√count, mapped linearly to 1 … 10."
    counts = torch.as_tensor(counts, dtype=torch.float64)
    rare = counts.clamp_min(1).rsqrt()
    low, high = rare[counts > 0].aminmax() if (counts > 0).any() else (rare[0], rare[0])
    weights = 1 + 9*(rare - low)/(high - low).clamp_min(1e-12)
    return torch.where(counts > 0, weights, 0.)


ATTRIBUTES = 50  # words whose presence is predicted, at most
# words for things, beside the names of the categories
_NAMES = ('guy man woman lady girl boy kid child baby player people men women dude female male '
          'circle square mug shirt jacket hat pants hair head hand face thing object one side')
# words for places, relations and order
_PLACES = ('left right top bottom middle center centre upper lower front back behind above below '
           'under over near next closest far farthest first second third last corner edge between '
           'beside leftmost rightmost')
# words that hold a sentence together
_LINKS = ('the a an of in on at to with and or from by for that this is are was who which it its '
          'his her their him not no than')
NO_ATTRIBUTES = frozenset((_NAMES + ' ' + _PLACES + ' ' + _LINKS).split())


def attribute_words(
    samples,   # `Samples` of the training split
)->dict:       # word -> how many objects it is said of, the most frequent first, ATTRIBUTES at most
    "The frequent words that name neither a thing nor a place and are no link."
    names = {w for c in samples.refer.categories.values() for w in tokenize(c)}
    said = {}
    for (ref, _), words in zip(samples.rows, samples.words): said.setdefault(ref.ann_id, set()).update(words)
    counts = Counter(w for words in said.values() for w in words)
    kept = [w for w in counts if w not in names | NO_ATTRIBUTES]
    return {w: counts[w] for w in sorted(kept, key=lambda w: (-counts[w], w))[:ATTRIBUTES]}


class Known(NamedTuple):
    "What the targets below need to know of a split."
    labels: dict           # ann_id -> (ATTRIBUTES,) of 0 and 1
    weights: torch.Tensor  # (ATTRIBUTES,)
    rows: dict             # image_id -> {ann_id: rows of its sentences}

def known_of(
    samples,   # `Samples`
)->Known:      # kept with the split
    "Attributes and referred objects of a split, found once."
    if not hasattr(samples, '_known'):
        counts = attribute_words(samples)
        index, labels, rows = {w: k for k, w in enumerate(counts)}, {}, {}
        for row, ((ref, _), words) in enumerate(zip(samples.rows, samples.words)):
            rows.setdefault(ref.image_id, {}).setdefault(ref.ann_id, []).append(row)
            # an object's attributes are those of all its sentences
            label = labels.setdefault(ref.ann_id, torch.zeros(ATTRIBUTES))
            label[[index[w] for w in words if w in index]] = 1
        n = [*counts.values()] + [0]*(ATTRIBUTES - len(counts))
        samples._known = Known(labels, class_weights(n), rows)
    return samples._known


SAME_TYPE = .3  # share of wrong answers that are of the right category, where there are any

def draw_other(
    rng,            # a generator of numpy
    samples,        # whose annotations tell the categories
    ann_id:int,     # the object itself
    others,         # other objects of its picture
    same_type:float=SAME_TYPE, # how often one of the same category is wanted
):                  # an ann_id, or None where the picture has no fitting one
    "Another object of the picture, more often of another category."
    kind = samples.refer.annotations
    alike = [a for a in others if kind[a].category_id == kind[ann_id].category_id]
    wanted = alike if alike and rng.random() < same_type else \
             [a for a in others if a not in alike]
    return wanted[int(rng.integers(len(wanted)))] if wanted else None

def _generator(samples, row, what):
    "Depends on the seed, the epoch and the row alone: the same whoever asks, and when."
    return np.random.default_rng(np.random.SeedSequence((*samples.drawn, row, what)))


def _other_object(samples, rows):
    "For each row a wrong object: (B,2), the row of the batch whose picture has it, its place there."
    refs, out = [samples.rows[r][0] for r in rows], []
    for i, (row, ref) in enumerate(zip(rows, refs)):
        ids, rng = samples.objects_of(ref.image_id), _generator(samples, row, 3)
        other = draw_other(rng, samples, ref.ann_id, [a for a in ids if a != ref.ann_id])
        # no fitting one in this picture: the object of another sentence
        at = i if other is not None or len(rows) == 1 else \
             (i + 1 + int(rng.integers(len(rows) - 1))) % len(rows)
        if other is None: ids, other = samples.objects_of(refs[at].image_id), refs[at].ann_id
        out.append((at, ids.index(other)))
    return torch.tensor(out)

def _other_sentence(samples, rows):
    "For each row a sentence about another object: (B,T) tokens, padded with 0."
    out, referred = [], known_of(samples).rows
    for row in rows:
        ref, rng = samples.rows[row][0], _generator(samples, row, 4)
        of = referred[ref.image_id]
        other = draw_other(rng, samples, ref.ann_id, [a for a in of if a != ref.ann_id])
        # no fitting one in this picture: any sentence of the split
        said = range(len(samples)) if other is None else of[other]
        out.append(said[int(rng.integers(len(said)))])
    return pad_batch([samples.ids[r] for r in out])[0]

def _attributes(samples, rows):
    "For each row the attributes of its object: (B,ATTRIBUTES)."
    labels = known_of(samples).labels
    return torch.stack([labels[samples.rows[r][0].ann_id] for r in rows])

def _attribute_weights(samples, rows): return known_of(samples).weights.float()

TARGETS |= {'other_object': _other_object, 'other_sentence': _other_sentence,
            'attributes': _attributes, 'attribute_weights': _attribute_weights}


def shares_of_cells(
    low,       # (P,K): where a box begins, in pixels
    high,      # (P,K): where it ends
    size:int,  # side of the input, pixels
    cells:int, # of the map along this side
    side:int,  # points
)->torch.Tensor: # (P,K,side,cells)
    "How much each cell counts at each of the points, by linear interpolation."
    part = (torch.arange(side).to(low) + .5)/side
    # the points, counted in cells whose middles are at 0, 1, 2 …
    at = (low[..., None] + (high - low)[..., None]*part)*cells/size - .5
    return (1 - (at[..., None] - torch.arange(cells).to(low)).abs()).clamp_min(0)

def windows(
    maps,        # (P,C,h,w): one map of the backbone, whatever its stride
    boxes,       # (P,K,4): x0, y0, x1, y1 in pixels of the input
    size:int,    # side of the input, pixels
    side:int=7,  # points along a side of a box
)->torch.Tensor: # (P,K,side²,C)
    "`roi_crop` with the channels last, as two products of matrices."
    P, C, h, w = maps.shape
    K, boxes = boxes.shape[1], boxes.to(maps)
    down = shares_of_cells(boxes[..., 1], boxes[..., 3], size, h, side)
    along = shares_of_cells(boxes[..., 0], boxes[..., 2], size, w, side)
    # first the rows of the map, then its columns
    rows = down.flatten(1, 2) @ maps.permute(0, 2, 3, 1).reshape(P, h, w*C)
    points = along[:, :, None] @ rows.view(P, K, side, w, C)
    return points.flatten(2, 3)


def mean_of_windows(
    maps,        # (P,C,h,w)
    boxes,       # (P,K,4): x0, y0, x1, y1 in pixels of the input
    size:int,    # side of the input, pixels
    side:int=7,  # points along a side of a box
)->torch.Tensor: # (P,K,C)
    "The mean over the points of `windows`: interpolation and mean are sums, so one sum does both."
    h, w = maps.shape[-2:]
    boxes = boxes.to(maps)
    down = shares_of_cells(boxes[..., 1], boxes[..., 3], size, h, side).mean(-2)
    along = shares_of_cells(boxes[..., 0], boxes[..., 2], size, w, side).mean(-2)
    shares = (down[..., :, None]*along[..., None, :]).flatten(2)
    return shares @ maps.flatten(2).transpose(1, 2)


class MAttNetConfig(ChooserConfig):
    "Every switch of MAttNet; the defaults are the official code's."
    emb_dim: Width = Field(300, description="of a word in the table: GloVe's")
    d_word: Width = Field(512, description='of a word in a phrase')
    hidden: Width = Field(512, description='of the LSTM, per direction')
    d: Width = Field(512, description='of all that is seen')
    both: bool = Field(False, description='the finer crop is F_v2 with F_v3, not F_v2 alone')
    word_dropout: float = Field(.5, ge=0, lt=1, description='on the embeddings')
    att_dropout: float = Field(.2, ge=0, lt=1, description='before the attributes')
    dropout: float = Field(.1, ge=0, lt=1, description='in the towers')
    start: float = Field(20., gt=0, le=1000, description='of the scales s of N')
    margin: float = Field(.1, ge=0, le=2, description='by which the right pair is ahead')
    att_weight: float = Field(1., ge=0, le=100, description='of the attributes in the loss')
    floor: bool = Field(True, description='no neighbour counts as similarity 0')
    thrice: bool = Field(False, description='an object and a sentence of two pairs are '
                                            'computed for each, as in the official code')


class Ranked(NamedTuple):
    "What training looks at: three scores a sentence, and what the box's look says."
    scores: torch.Tensor      # (B,3): right pair, other object, other sentence
    attributes: torch.Tensor  # (B,ATTRIBUTES): logits of the right object

class MAttNet(ChooserNet):
    "Three modules score every thing, and the sentence says how much each of them counts."
    def __init__(self,
        cfg:MAttNetConfig, # the switches
        channels,          # of F_v1, F_v2, F_v3
        vocab_size:int,    # rows of the embedding
        vectors=None,      # (vocab_size, emb_dim) initial embeddings
    ):
        super().__init__()
        c_deep, c_fine = channels[0], channels[1] + channels[2]*cfg.both
        self.cfg, d = cfg, cfg.d
        self.phrases = PhraseEncoder(vocab_size, cfg.emb_dim, cfg.d_word, cfg.hidden,
                                     cfg.word_dropout, vectors)
        self.subject = Subject(c_fine, c_deep, cfg.d_word, d, ATTRIBUTES, cfg.att_dropout,
                               cfg.start)
        # without their loss nothing would teach the attributes
        self.subject.attributes.requires_grad_(cfg.att_weight > 0)
        self.location, self.relation = Location(d, cfg.start), Relation(c_deep, d, cfg.start)
        widths = c_deep + d, d, d
        self.match = nn.ModuleList([Matching(w, cfg.d_word, d, cfg.dropout) for w in widths])


@patch
def crops(self:MAttNet,
    maps,    # F_v1, F_v2, F_v3, a row a picture
    boxes,   # (P,K,4)
    size:int, # side of the input
)->tuple:    # fine (P,K,49,c_fine), deep (P,K,49,c_deep)
    "A box's 49 cells of two depths."
    finer = maps[1:] if self.cfg.both else maps[1:2]
    fine = torch.cat([windows(m, boxes, size) for m in finer], -1)
    return fine, windows(maps[0], boxes, size)

@patch
def surroundings(self:MAttNet,
    maps,      # F_v1 …
    things,    # `Things`
    size:int,  # side of the input
):             # `Places`, looks of the neighbours (P,K,5,c_deep)
    "Where things are, and what their neighbours look like: the mean of the deeper crop."
    places = places_of(things.boxes.to(maps[0]), things.kinds, (size, size))
    look = mean_of_windows(maps[0], things.boxes, size)
    return places, at_neighbours(look, places.which, places.real)


@patch
def look(self:MAttNet, maps, things):
    "In evaluation: all that needs no sentence, the towers of two modules included."
    size = 8*maps[2].shape[-1]
    # the subject's cells, and their part of the attention
    cells, _ = self.subject.cells(*self.crops(maps, things.boxes, size))
    places, looks = self.surroundings(maps, things, size)
    # location and relationship up to the cosine
    l = self.match[1].seen(self.location(places.own, places.alike))
    r = self.match[2].seen(self.relation(looks, places.context))
    return *cells, l, r, is_neighbour(places.context)

@patch
def scores(self:MAttNet, regions, things, tokens, lengths, inputs={}):
    "Every thing's score for each sentence, between -1 and 1; -inf at padding."
    *cells, l, r, real = regions
    q, weights, _ = self.phrases(tokens)
    # one sentence stands in front of K things
    v, _ = self.subject(Cells(*cells), q[:, None, 0])
    said = [m.said(q[:, k]) for k, m in enumerate(self.match)]
    s = (self.match[0].seen(v)*said[0][:, None]).sum(-1)
    l = (l*said[1][:, None]).sum(-1)
    r = best_neighbour((r*said[2][:, None, None]).sum(-1), real, self.cfg.floor)
    # the sentence's own weights
    score = (torch.stack([s, l, r], -1)*weights[:, None]).sum(-1)
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    return score.masked_fill(things.kinds < 0, float('-inf'))


@patch
def ranked(self:MAttNet,
    maps,     # F_v1, F_v2, F_v3, a row a sentence
    things,   # annotated `Things`, a row a sentence
    tokens,   # (B,T)
    targets,  # target (B,), other_object (B,2), other_sentence (B,T')
)->Ranked:
    "In training: two objects and two sentences make three pairs."
    maps, size = self.maps(maps), 8*maps[2].shape[-1]
    # the two objects of a row: which row's picture they are in, and where they stand there
    own = torch.stack([torch.arange(len(tokens)).to(tokens), targets['target']], 1)
    row, at = torch.stack([own, targets['other_object']], 1).unbind(-1)
    places, looks = self.surroundings(maps, things, size)
    # the two sentences, padded alike
    said = [tokens, targets['other_sentence']]
    longest = max(s.shape[1] for s in said)
    said = torch.stack([F.pad(s, (0, longest - s.shape[1])) for s in said], 1)
    # which of them each pair is made of
    objects, sentences = (torch.tensor(k).to(tokens) for k in ([0, 1, 0], [0, 0, 1]))
    if self.cfg.thrice:
        # the official way: everything three times, though two are alike
        row, at, said = row[:, objects], at[:, objects], said[:, sentences]
        objects = sentences = torch.arange(3).to(tokens)
    # each object is cropped once
    crops = self.crops([m[row.flatten()] for m in maps],
                       things.boxes[row, at].reshape(-1, 1, 4), size)
    cells, logits = self.subject.cells(*(c.squeeze(1).unflatten(0, row.shape) for c in crops))
    cells = Cells(*(x.index_select(1, objects) for x in cells))
    around = [x[row, at].index_select(1, objects)
              for x in (places.own, places.alike, looks, places.context)]
    q, weights, _ = self.phrases(said)
    q, weights = q.index_select(1, sentences), weights.index_select(1, sentences)
    return Ranked(self.pairs(cells, around, q, weights), logits[:, 0])

@patch
def pairs(self:MAttNet,
    cells,    # `Cells` of each pair's object
    around,   # l (…,5), δ (…,25), looks (…,5,c_deep), their δ (…,5,5)
    q,        # (…,3,d_word): the three phrases of each pair's sentence
    weights,  # (…,3)
)->torch.Tensor: # (…)
    "Scores of pairs of an object and a sentence."
    own, alike, looks, context = around
    v, _ = self.subject(cells, q[..., 0, :])
    s = self.match[0](v, q[..., 0, :])
    l = self.match[1](self.location(own, alike), q[..., 1, :])
    # the phrase is said once and compared with five neighbours
    near = self.match[2].seen(self.relation(looks, context))
    r = (near*self.match[2].said(q[..., 2, :])[..., None, :]).sum(-1)
    r = best_neighbour(r, is_neighbour(context), self.cfg.floor)
    return (torch.stack([s, l, r], -1)*weights).sum(-1)

@patch
def forward(self:MAttNet, maps, things, tokens, lengths, inputs={}):
    "`Ranked` where there are targets to rank, else `Choice`."
    if 'target' in inputs: return self.ranked(maps, things, tokens, inputs)
    return ChooserNet.forward(self, maps, things, tokens, lengths, inputs)


def falls(share):
    "Steady for 8,000 of 30,000 steps, then a tenth every 8,000, continuously."
    return .1**max(0., share*30/8 - 1)

class MAttNetMethod(Chooser):
    "MAttNet: three modules choose among things."
    name, title, config = 'mattnet', 'MAttNet', MAttNetConfig
    needs = (*Chooser.needs, 'other_object', 'other_sentence', 'attributes', 'attribute_weights')
    betas, clip, schedule = (.8, .999), .1, staticmethod(falls)
    notes = ('It chooses among things that a detector of the kit has found on the frozen features; '
             'the paper has Mask R-CNN.',
             'It learns from the masks and boxes of all annotated objects of the training pictures.')
    widths = {'smoke': dict(emb_dim=16, d_word=16, hidden=8, d=16, both=True),
              'cpu': dict(emb_dim=100, d_word=96, hidden=64, d=96, both=True)}
    def network(self, cfg, channels, vocab, vectors=None):
        return MAttNet(cfg, channels, len(vocab), vectors)
    def forward(self, model, features, batch):
        if not model.training: return super().forward(model, features, batch)
        maps, things = self.split(features, True)
        targets = {name: batch[name] for name in ('target', 'other_object', 'other_sentence')}
        return model(maps, things, batch['tokens'], batch['lengths'], targets)
    def loss(self, cfg, out, batch):
        rank = ranking_loss(*out.scores.float().unbind(1), cfg.margin)
        parts = {'rank': rank}
        if cfg.att_weight:
            parts['attributes'] = attribute_loss(out.attributes.float(), batch['attributes'],
                                                 batch['attribute_weights'])
        total = rank + cfg.att_weight*parts.get('attributes', 0.)
        # how often the right pair is ahead of the other object
        parts['ahead'] = (out.scores[:, 0] > out.scores[:, 1]).float().mean()
        return total, {name: value.detach() for name, value in parts.items()}

register(MAttNetMethod());

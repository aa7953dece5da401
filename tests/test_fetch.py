"Fetching from sources that misbehave, and archives that mean harm. Everything is served on this machine."
import hashlib
import http.server
import io
import os
import stat
import threading
import time
import zipfile

import pytest

from lts_nb.data import fetch
from lts_nb.errors import KitError

CONTENT = os.urandom(300_000)


def archive(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as z:
        for name, content in members.items(): z.writestr(name, content)
    return file.getvalue()


class Source(http.server.BaseHTTPRequestHandler):
    "Serves `bodies[path]`; how, the path's last word says."
    bodies, asked = {}, []

    def do_GET(self):
        how = self.path.rsplit('/', 1)[-1]
        body, start = self.bodies.get(how, CONTENT), int((self.headers.get('Range') or 'bytes=0-')[6:].rstrip('-'))
        self.asked.append((how, start))
        if how == 'missing': return self.say(404, b'<html>Not here any more</html>', 'text/html')
        if how == 'page': return self.say(200, b'<html>Buy this domain</html>', 'text/html', length=False)
        if how == 'moved':
            self.send_response(302); self.send_header('Location', '/good'); self.end_headers(); return
        if how == 'away':
            self.send_response(302); self.send_header('Location', 'file:///etc/passwd'); self.end_headers(); return
        if how == 'other': return self.say(200, bytes(len(body)))
        if how == 'lies': return self.say(200, body + b'more')
        if how == 'endless': return self.endless()
        if how == 'silent': time.sleep(3); return
        if how == 'trickle': return self.trickle(body)
        if how == 'whole': start = 0  # knows no ranges
        if start >= len(body): return self.say(416, b'')
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(body) - start)); self.end_headers()
        self.wfile.write(body[start:start + 70_000] if how == 'breaks' else body[start:])

    def say(self, status, body, kind='application/zip', length=True):
        self.send_response(status); self.send_header('Content-Type', kind)
        if length: self.send_header('Content-Length', str(len(body)))
        self.end_headers(); self.wfile.write(body)

    def endless(self):
        self.send_response(200); self.end_headers()
        try:
            while True: self.wfile.write(bytes(1 << 16))
        except OSError: pass

    def trickle(self, body):
        self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers()
        try:
            for k in range(200): self.wfile.write(body[k:k + 1]); self.wfile.flush(); time.sleep(.05)
        except OSError: pass

    def log_message(self, *a): pass


@pytest.fixture(scope='module')
def at():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Source)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield lambda *paths: tuple(f'http://127.0.0.1:{server.server_port}/{p}' for p in paths)
    server.shutdown()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(fetch, 'TIMEOUT', (2, 1)); monkeypatch.setattr(fetch, 'SLOW', (1, 1000))
    Source.asked.clear()


def wanted(urls, content=CONTENT, size=True, **kw):
    return fetch.Download('file.bin', urls, 'sha256:' + hashlib.sha256(content).hexdigest(), (('', 'file.bin'),), len(content) if size else None, **kw)


@pytest.mark.parametrize('how', ['good', 'moved', 'breaks', 'whole'])
def test_a_source_that_has_it(at, tmp_path, how):
    assert fetch.fetch_file(wanted(at(how)), tmp_path).read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ['file.bin']
    if how == 'breaks': assert [start for _, start in Source.asked] == [0, 70_000, 140_000, 210_000, 280_000], 'it goes on, it does not begin anew'


@pytest.mark.parametrize('how, said', [('missing', '404'), ('page', 'offers|other bytes|breaks off'), ('other', 'other bytes'), ('lies', '300,004'), ('endless', 'more than'),
                                       ('silent', 'cannot be reached|breaks off'), ('trickle', 'less than|breaks off'), ('away', 'cannot be reached')])
def test_a_source_that_has_it_not_is_told_and_the_next_asked(at, tmp_path, how, said):
    with pytest.raises(KitError, match=said): fetch.fetch_file(wanted(at(how)), tmp_path/'alone')
    assert not (tmp_path/'alone'/'file.bin').exists()
    assert fetch.fetch_file(wanted(at(how, 'good')), tmp_path/'both').read_bytes() == CONTENT


def test_endless_ends_without_a_known_size_too(at, tmp_path, monkeypatch):
    "Nobody said how large it is: a checksum alone must not fill the disk."
    monkeypatch.setattr(fetch, 'LARGEST', 1 << 20)
    with pytest.raises(KitError, match='more than'): fetch.fetch_file(wanted(at('endless'), size=False), tmp_path)


def test_what_an_earlier_call_left_is_used(at, tmp_path):
    (tmp_path/'file.bin.part').write_bytes(CONTENT[:123_456])
    assert fetch.fetch_file(wanted(at('good')), tmp_path).read_bytes() == CONTENT
    assert Source.asked == [('good', 123_456)]


@pytest.mark.parametrize('left', [bytes(1000), bytes(len(CONTENT)), bytes(len(CONTENT) + 5)], ids=['wrong', 'wrong and whole', 'too long'])
def test_what_an_earlier_call_left_may_be_wrong(at, tmp_path, left):
    (tmp_path/'file.bin.part').write_bytes(left)
    assert fetch.fetch_file(wanted(at('good')), tmp_path).read_bytes() == CONTENT


def test_a_good_file_is_left_alone_and_a_strange_one_too(at, tmp_path):
    (tmp_path/'file.bin').write_bytes(CONTENT)
    fetch.fetch_file(wanted(at('missing')), tmp_path)
    assert not Source.asked
    (tmp_path/'file.bin').write_bytes(b'mine')
    with pytest.raises(KitError, match='300,000'): fetch.fetch_file(wanted(at('good')), tmp_path)
    assert (tmp_path/'file.bin').read_bytes() == b'mine'


ZIPPED = archive(**{'set/refs(unc).p': b'r'*5000, 'set/instances.json': b'{}'})


@pytest.fixture
def one_set(at, monkeypatch):
    Source.bodies['set.zip'] = ZIPPED
    d = fetch.Download('set.zip', at('set.zip'), 'sha256:' + hashlib.sha256(ZIPPED).hexdigest(), (('set/', 'set/'),), len(ZIPPED), 1 << 20)
    monkeypatch.setitem(fetch.DOWNLOADS, 'set', d)
    return d


def test_fetch_unpacks_and_can_be_repeated(one_set, tmp_path):
    for _ in range(2): assert sorted(p.name for p in fetch.fetch('set', tmp_path)) == ['instances.json', 'refs(unc).p']
    assert (tmp_path/'set'/'refs(unc).p').read_bytes() == b'r'*5000


def test_what_stands_is_not_fetched_again(one_set, tmp_path):
    fetch.fetch('set', tmp_path)
    Source.asked.clear()
    assert len(fetch.fetch('set', tmp_path)) == 2 and not Source.asked
    (tmp_path/'set'/'instances.json').write_text('my annotations')
    with pytest.raises(KitError, match='is kept'): fetch.fetch('set', tmp_path)
    (tmp_path/'set'/'instances.json').unlink()
    assert len(fetch.fetch('set', tmp_path)) == 2 and (tmp_path/'set'/'instances.json').read_text() == '{}'


@pytest.mark.parametrize('receipt', ['', '[]', '{"files": 3}', '{"known": "x", "all": true, "files": {}}', '{"files": {"../../etc/passwd": 1}}'])
def test_a_damaged_receipt_counts_for_nothing(one_set, tmp_path, receipt):
    (tmp_path/'downloads').mkdir()
    (tmp_path/'downloads'/'set.zip.json').write_text(receipt)
    assert sorted(p.name for p in fetch.fetch('set', tmp_path)) == ['instances.json', 'refs(unc).p'] and Source.asked


def test_two_at_once_take_turns(one_set, tmp_path, monkeypatch, capsys):
    slow, found = fetch.fetch_file, []
    def fetch_slowly(*args): time.sleep(.5); return slow(*args)
    monkeypatch.setattr(fetch, 'fetch_file', fetch_slowly)
    calls = [threading.Thread(target=lambda: found.append(len(fetch.fetch('set', tmp_path)))) for _ in range(2)]
    for c in calls: c.start()
    for c in calls: c.join()
    assert found == [2, 2] and 'waiting for it' in capsys.readouterr().out
    assert sum(how == 'set.zip' for how, _ in Source.asked) == 1, 'the second finds everything there'


def test_another_file_in_its_place_is_kept(one_set, tmp_path):
    (tmp_path/'set').mkdir(); (tmp_path/'set'/'instances.json').write_text('my annotations')
    with pytest.raises(KitError, match='is kept'): fetch.fetch('set', tmp_path)
    assert (tmp_path/'set'/'instances.json').read_text() == 'my annotations'


def test_a_file_of_the_user_is_verified_and_not_touched(one_set, tmp_path):
    mine = tmp_path/'mine.zip'
    mine.write_bytes(ZIPPED)
    fetch.fetch('set', tmp_path/'root', path=mine)
    assert mine.read_bytes() == ZIPPED and not Source.asked
    mine.write_bytes(ZIPPED[:-1] + b'?')
    with pytest.raises(KitError, match='sha256 differs'): fetch.fetch('set', tmp_path/'root2', path=mine)
    assert not (tmp_path/'root2'/'set').exists()


def test_a_link_in_the_folder_does_not_lead_out(one_set, tmp_path):
    (tmp_path/'outside').mkdir(); (tmp_path/'root').mkdir()
    (tmp_path/'root'/'set').symlink_to(tmp_path/'outside')
    with pytest.raises(KitError, match='leads outside'): fetch.fetch('set', tmp_path/'root')
    assert not list((tmp_path/'outside').iterdir())


def hostile(name, content=b'x', mode=None, d=None):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('set/first', b'1')
        info = zipfile.ZipInfo(name)
        info.compress_type = zipfile.ZIP_DEFLATED
        if mode: info.external_attr = mode << 16
        z.writestr(info, content)
    return file.getvalue()


@pytest.mark.parametrize('body, said', [
    (hostile('../evil'), 'no plain file inside'), (hostile('/tmp/evil'), 'no plain file inside'), (hostile('set/../../evil'), 'no plain file inside'),
    (hostile('set\\..\\..\\evil'), 'no plain file inside'), (hostile('set/link', b'/etc/passwd', stat.S_IFLNK | 0o777), 'no plain file inside'),
    (hostile('set/pipe', b'', stat.S_IFIFO | 0o666), 'no plain file inside'), (hostile('set/bomb', bytes(8 << 20)), 'would unpack to'), (b'PK\3\4 no archive', 'cannot be opened'), (b'', 'cannot be opened')],
    ids=['up', 'absolute', 'up within', 'backslash', 'link', 'pipe', 'bomb', 'no archive', 'empty'])
def test_an_archive_that_means_harm(tmp_path, body, said):
    (tmp_path/'a.zip').write_bytes(body)
    d = fetch.Download('a.zip', (), 'sha256:0', (('set/', 'set/'),), None, 1 << 20)
    with pytest.raises(KitError, match=said): fetch.unpack(tmp_path/'a.zip', d, tmp_path/'root')
    assert not (tmp_path/'root').exists() and sorted(p.name for p in tmp_path.iterdir()) == ['a.zip'], 'nothing was written'


def test_a_member_that_lies_about_its_size(tmp_path):
    "Its entry says 10 bytes; its data holds a megabyte."
    body = bytearray(hostile('set/liar', bytes(1 << 20)))
    true = (1 << 20).to_bytes(4, 'little')
    while (k := body.find(true)) >= 0: body[k:k + 4] = (10).to_bytes(4, 'little')
    (tmp_path/'a.zip').write_bytes(bytes(body))
    d = fetch.Download('a.zip', (), 'sha256:0', (('set/', 'set/'),), None, 1 << 20)
    with pytest.raises(KitError, match='cannot be unpacked'): fetch.unpack(tmp_path/'a.zip', d, tmp_path/'root')
    assert not (tmp_path/'root'/'set'/'liar').exists()


def test_only_the_photographs_that_are_needed(micro, at, tmp_path, monkeypatch):
    "The micro set's twelve among others."
    import shutil
    shutil.copytree(micro/'refcoco', tmp_path/'refcoco')
    needed = fetch.needed_images(tmp_path)
    assert len(needed) == 12
    body = archive(**{f'train2014/{name}': name.encode() for name in [*sorted(needed), 'COCO_train2014_000000999999.jpg']})
    Source.bodies['train.zip'] = body
    d = fetch.Download('train.zip', at('train.zip'), 'sha256:' + hashlib.sha256(body).hexdigest(), fetch.DOWNLOADS['coco-train2014'].places, len(body), 1 << 20)
    monkeypatch.setitem(fetch.DOWNLOADS, 'coco-train2014', d)
    for _ in range(2): assert {p.name for p in fetch.fetch('coco-train2014', tmp_path, only_needed=True)} == needed
    assert len(Source.asked) == 1, 'once'
    assert {p.name for p in (tmp_path/'images/mscoco/images/train2014').iterdir()} == needed
    with pytest.raises(KitError, match='no data set'): fetch.fetch('coco-train2014', tmp_path/'empty', only_needed=True)


def test_weights_that_the_user_brings(tmp_path):
    "Clean weights have no known checksum; they are adopted, and never over others."
    (tmp_path/'clean.weights').write_bytes(b'clean')
    (to,) = fetch.fetch('darknet', tmp_path/'root', path=tmp_path/'clean.weights')
    assert to == tmp_path/'root'/'darknet'/'yolov3.weights' and to.read_bytes() == b'clean' and fetch.leak_of(to) == ''
    (tmp_path/'other.weights').write_bytes(b'other')
    with pytest.raises(KitError, match='is kept'): fetch.fetch('darknet', tmp_path/'root', path=tmp_path/'other.weights')
    with pytest.raises(KitError, match='is kept'): fetch.fetch('darknet', tmp_path/'root')
    with pytest.raises(KitError, match='no such file'): fetch.fetch('darknet', tmp_path/'root2', path=tmp_path/'none')


def test_the_ids_that_a_backbone_must_not_have_seen(micro, tmp_path):
    from lts_nb.data.refer import Refer
    refer = Refer(micro, 'refcoco')
    ids = fetch.excluded_images([refer])
    assert set(ids) == {r.image_id for r in refer.refs.values() if r.split != 'train'} and ids
    listed = tmp_path/'trained.txt'
    listed.write_text('\n'.join(f'COCO_train2014_{i:012}.jpg' for i in [ids[0], 1]))
    assert fetch.check_backbone(ids, listed) == [ids[0]]
    listed.write_text('no id here')
    with pytest.raises(KitError, match='no image id'): fetch.check_backbone(ids, listed)


def test_the_command(one_set, tmp_path, monkeypatch):
    from typer.testing import CliRunner
    from lts_nb.manual.cli import app
    said = CliRunner().invoke(app, ['data', 'fetch', 'set', '--root', str(tmp_path)])
    assert said.exit_code == 0 and said.output == f'set: 2 files in {tmp_path/"set"}\n'
    assert isinstance(CliRunner().invoke(app, ['data', 'fetch', 'sett', '--root', str(tmp_path)]).exception, KitError)

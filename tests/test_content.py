"""Resume by content: whatever changes under a command that goes on, it is refused, and named."""

import json
import shutil
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from fastcore.basics import store_attr
from PIL import Image

from spatialavatar0 import cli, pipeline
from spatialavatar0.ground.content import file_hash, file_hashes, hash_of, what_changed
from spatialavatar0.ground.core import to_uint8
from spatialavatar0.head.flame_files import write_flame_folder
from spatialavatar0.head.head import Head, open_head
from spatialavatar0.pictures.clips import Clip, head_content, read_vhap, write_vhap
from spatialavatar0.pictures.domains import mono, multi, people
from spatialavatar0.pictures.people import make_person, mono_clip

needs_mediapipe = pytest.mark.skipif(
    find_spec('mediapipe') is None, reason='needs the extra `track`'
)


# ---- what changes


def one_pixel(path):
    "The first pixel of a picture gets another red."
    image = np.array(Image.open(path))
    image.reshape(-1)[0] ^= 1
    Image.fromarray(image).save(path)


def in_json(change):
    "A change of a JSON file."

    def apply(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def in_npz(name):
    "A change of one number of one array."

    def apply(path):
        arrays = dict(np.load(path))
        arrays[name].reshape(-1)[0] += 0.01
        np.savez(path, **arrays)

    return apply


def shift_camera(top):
    top['frames'][0]['transform_matrix'][0][3] += 1e-4


def longer_lens(top):
    top['frames'][1]['fl_x'] *= 1.01


def swap(top):
    first, second = top['frames'][:2]
    first['file_path'], second['file_path'] = second['file_path'], first['file_path']


def drop(top):
    del top['frames'][-1]


@contextmanager
def changed(path, change):
    "A file that is another for a while."
    before = path.read_bytes()
    change(path)
    assert path.read_bytes() != before
    try:
        yield
    finally:
        path.write_bytes(before)


def transforms(clip):
    "The file that the reader of the test's half and of the rest both use."
    return sorted(clip.glob('transforms_t*.json'))[-1]


# file of a clip, its change, what the refusal says
OF_A_CLIP = dict(
    pixel=('images/00000_00.png', one_pixel, 'the pictures'),
    late_pixel=('images/00005_00.png', one_pixel, 'the pictures'),
    matte=('fg_masks/00002_00.png', one_pixel, 'the mattes'),
    camera=('transforms', in_json(shift_camera), 'the cameras'),
    lens=('transforms', in_json(longer_lens), 'the cameras'),
    order=('transforms', in_json(swap), 'the pictures'),
    dropped=('transforms', in_json(drop), 'frames'),
    expression=('flame_param/00001.npz', in_npz('expr'), 'the codes'),
    identity=('flame_param/00000.npz', in_npz('shape'), 'the codes'),
)


def another_head(folder):
    "The open head as FLAME files, its last direction of expression a little other."
    head = open_head()
    arrays = dict(head.named_buffers())
    arrays['expr_basis'] = arrays['expr_basis'].clone()
    arrays['expr_basis'][-1, 0, 0] += 1e-4
    named = {name: x.numpy() for name, x in arrays.items()}
    lists = {k: getattr(head, k) for k in ('mask_names', 'part_names', 'arkit_names')}
    write_flame_folder(Head(named | lists), folder)
    return folder


# ---- commands in two states: done, and asked again


class Work:
    "A command that has been carried out, and how to ask for it again."

    def __init__(self, words, clip=None, more=()):
        store_attr()

    def run(self, capfd, *options):
        code = cli.main([str(word) for word in (*self.words, *options)])
        said = capfd.readouterr()
        return code, said.out + said.err

    def refused(self, capfd, words, *options):
        code, said = self.run(capfd, *options)
        assert code == 1, said
        assert words in said and 'changed' in said, said
        assert '--out' in said and '--restart' in said, said
        assert 'Traceback' not in said


def tree(folder):
    "Bytes of all files of a folder."
    files = [p for p in Path(folder).rglob('*') if p.is_file() and not p.name.startswith('.')]
    return {path: path.read_bytes() for path in files}


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with two people's clips."
    home = tmp_path_factory.mktemp('content')
    for seed, name in enumerate(('anna', 'bert')):
        clip = mono_clip(make_person(seed), 8, 48, seed=seed, yaw=10.0)
        write_vhap(clip, home / 'people' / name)
    for name in ('one', 'two'):
        crowd = people((mono if name == 'one' else multi)(64, instants=6), 1)
        write_vhap(crowd[0], home / name / 'carl')
    return home


@pytest.fixture(scope='module')
def refined(place, request):
    clip, out = place / 'people' / 'anna', place / 'refined'
    words = ('refine', 'new', clip, '--out', out, '--iters', 2, '--resolution', 24)
    assert cli.main([str(word) for word in words]) == 0
    return Work(words, clip)


@pytest.fixture(scope='module')
def trained(place):
    clip, out = place / 'one' / 'carl', place / 'trained'
    words = ('train', '--out', out, '--preset', 'tiny', '--steps', 5, '--batch', 1)
    words += ('--mono', place / 'one', '--multi', place / 'two')
    assert cli.main([str(word) for word in words]) == 0
    return Work(words, clip)


@pytest.fixture(scope='module')
def evaluated(place):
    clip, out = place / 'people' / 'anna', place / 'lines.jsonl'
    words = ('evaluate', 'warp', clip, '--protocol', 'last:2', '--out', out)
    assert cli.main([str(word) for word in words]) == 0
    return Work(words, clip)


@pytest.fixture(scope='module')
def benchmarked(place):
    clip, out = place / 'people' / 'bert', place / 'table.jsonl'
    words = ('benchmark', place / 'people', '--protocol', 'last:2', '--out', out)
    words += ('--method', 'warp', '--resolution', 24)
    assert cli.main([str(word) for word in words]) == 0
    return Work(words, clip)


COMMANDS = 'refined', 'trained', 'evaluated', 'benchmarked'


@pytest.mark.parametrize('change', OF_A_CLIP)
@pytest.mark.parametrize('command', COMMANDS)
def test_another_clip(command, change, request, capfd, place):
    "A clip that differs in one thing; and nothing that was there is lost."
    work = request.getfixturevalue(command)
    name, apply, words = OF_A_CLIP[change]
    paths = [work.clip / name]
    if name == 'transforms':
        paths = [p for p in sorted(work.clip.glob('transforms*.json')) if 'val' not in p.name]
        paths = [p for p in paths if len(json.loads(p.read_text())['frames']) > 1]
    before = tree(place)
    with changed(paths[0], apply) if len(paths) == 1 else all_changed(paths, apply):
        work.refused(capfd, words)
    assert tree(place) == before


@contextmanager
def all_changed(paths, change):
    "Several files, changed alike."
    kept = [path.read_bytes() for path in paths]
    for path in paths:
        change(path)
    try:
        yield
    finally:
        for path, before in zip(paths, kept):
            path.write_bytes(before)


# command, options of the second call, what the refusal says
OPTIONS = [
    ('refined', ('--iters', 3), 'iters (was 2, now 3)'),
    ('refined', ('--seed', 1), 'seed (was 0, now 1)'),
    ('refined', ('--preset', 'paper'), 'keep'),
    ('refined', ('--resolution', 25), 'the avatar it starts from'),
    ('trained', ('--steps', 6), 'steps of'),
    ('trained', ('--seed', 1), 'seed (was 0, now 1)'),
    ('trained', ('--batch', 2), 'batch of mono'),
    ('benchmarked', ('--resolution', 25), 'resolution (was 24, now 25)'),
]


@pytest.mark.parametrize(('command', 'options', 'words'), OPTIONS)
def test_another_option(command, options, words, request, capfd, place):
    work, before = request.getfixturevalue(command), tree(place)
    work.refused(capfd, words, *options)
    assert tree(place) == before


@pytest.mark.parametrize('command', ['refined', 'evaluated', 'benchmarked'])
def test_another_head(command, request, capfd, place, tmp_path):
    "A head whose last direction is a tenth of a millimetre other: no mark in the data tells."
    work = request.getfixturevalue(command)
    before = tree(place)
    work.refused(capfd, 'the head model', '--head', another_head(tmp_path / 'flame'))
    assert tree(place) == before


def test_another_avatar(place, capfd, tmp_path):
    "An avatar file of the same name, its seed another."
    start, out = tmp_path / 'a.safetensors', tmp_path / 'out'
    clip = place / 'people' / 'anna'
    frame = read_vhap(clip)[0]
    avatar = pipeline.from_frame(frame, 24)
    avatar.save(start)
    refine = Work(('refine', start, clip, '--out', out, '--iters', 1))
    judge = Work(('evaluate', start, clip, '--protocol', 'last:2', '--out', tmp_path / 'r.jsonl'))
    for work in (refine, judge):
        assert work.run(capfd)[0] == 0
    avatar.splats['sh0'][0, 0] += 0.01
    avatar.save(start)
    for work in (refine, judge):
        work.refused(capfd, 'the avatar it starts from')


def test_the_same_goes_on(refined, trained, benchmarked, capfd, place):
    "Nothing changed, though every file was touched: no refusal, the same results."
    for path in (place / 'people').rglob('*.png'):
        path.write_bytes(path.read_bytes())
    avatar = (place / 'refined' / 'avatar.safetensors').read_bytes()
    for work in (refined, trained, benchmarked):
        code, said = work.run(capfd)
        assert code == 0, said
    assert (place / 'refined' / 'avatar.safetensors').read_bytes() == avatar


def test_restart(place, capfd, tmp_path):
    "The other way on: what is there gives way, and the new work is done."
    people_copy, out = tmp_path / 'people', tmp_path / 'out'
    shutil.copytree(place / 'people', people_copy)
    anna = people_copy / 'anna'
    table = tmp_path / 'table.jsonl'
    works = [
        Work(('refine', 'new', anna, '--out', out, '--iters', 1, '--resolution', 24)),
        Work(('evaluate', 'warp', anna, '--protocol', 'last:2', '--out', tmp_path / 'l.jsonl')),
        Work(
            ('benchmark', people_copy, '--protocol', 'last:2', '--method', 'warp', '--out', table)
        ),
    ]
    for work in works:
        assert work.run(capfd)[0] == 0
    before = json.loads((out / 'metrics.json').read_text())['made_of']
    bert = [line for line in table.read_text().splitlines() if '"bert"' in line]
    one_pixel(anna / 'images' / '00000_00.png')
    for work in works:
        work.refused(capfd, 'the pictures')
        code, said = work.run(capfd, '--restart')
        assert code == 0, said
    after = json.loads((out / 'metrics.json').read_text())['made_of']
    assert what_changed(before, after)
    lines = table.read_text().splitlines()
    assert len(lines) == 2
    assert bert[0] in lines  # nothing had changed for him: his line was not made again


def test_what_carries_its_content(refined, trained, evaluated, place):
    "Avatar, network, numbers and lines say what they were made of."
    from spatialavatar0.avatar.avatar import load_avatar
    from spatialavatar0.ground.files import read_header
    from spatialavatar0.stage1.generator import _CHECKPOINT

    clip = read_vhap(refined.clip)
    avatar = load_avatar(place / 'refined' / 'avatar.safetensors')
    numbers = json.loads((place / 'refined' / 'metrics.json').read_text())
    assert avatar.info['made_of'] == numbers['made_of']
    assert avatar.info['made_of']['head'] == head_content(open_head())
    line = json.loads((place / 'lines.jsonl').read_text())
    assert line['made_of']['clip'] == clip.fingerprint()
    network = read_header(place / 'trained' / 'generator.safetensors', _CHECKPOINT)['info']
    assert set(network['made_of']) >= {'mono', 'multi', 'head'}


# ---- films


@pytest.fixture(scope='module')
def tracked(tmp_path_factory):
    "A folder of pictures, tracked."
    home = tmp_path_factory.mktemp('tracked')
    (home / 'pictures').mkdir()
    take = mono_clip(make_person(3), 40, 224, seed=1, yaw=20.0, background=0.7)
    for i, frame in enumerate(take[:10]):
        Image.fromarray(to_uint8(frame.image)).save(home / 'pictures' / f'{i}.png')
    words = ('track', home / 'pictures', '--out', home / 'clip', '--size', 96)
    assert cli.main([str(word) for word in words]) == 0
    return Work(words, home / 'pictures')


def replace_nine(folder):
    for path in sorted(folder.iterdir())[1:]:
        one_pixel(path)


@needs_mediapipe
@pytest.mark.parametrize('number', [0, 4, 9])
def test_another_picture_of_a_film(tracked, capfd, number):
    with changed(tracked.clip / f'{number}.png', one_pixel):
        tracked.refused(capfd, 'the film')


@needs_mediapipe
def test_nine_of_ten_pictures(tracked, capfd, tmp_path):
    kept = {path: path.read_bytes() for path in tracked.clip.iterdir()}
    replace_nine(tracked.clip)
    tracked.refused(capfd, 'the film')
    for path, before in kept.items():
        path.write_bytes(before)
    assert tracked.run(capfd)[0] == 0


@needs_mediapipe
@pytest.mark.parametrize(
    ('options', 'words'),
    [(('--size', 100), 'size'), (('--focal', 2.5), 'focal')],
)
def test_another_way_to_track(tracked, capfd, options, words):
    tracked.refused(capfd, f'{words} (was', *options)


@needs_mediapipe
def test_pictures_in_another_order(tracked, capfd):
    "Two pictures change names."
    first, second = tracked.clip / '2.png', tracked.clip / '3.png'
    with changed(first, lambda path: path.write_bytes(second.read_bytes())):
        tracked.refused(capfd, 'the film')


@needs_mediapipe
def test_track_again(tracked, capfd):
    "--restart removes the clip and tracks it anew; a folder with something else in it stays."
    clip = tracked.clip.parent / 'clip'
    before = tree(clip)
    (clip / 'notes.txt').write_text('mine')
    code, said = tracked.run(capfd, '--restart')
    assert code == 1 and 'notes.txt is not part of the clip' in said
    (clip / 'notes.txt').unlink()
    assert tree(clip) == before
    code, said = tracked.run(capfd, '--restart')
    assert code == 0, said
    picture = clip / 'images' / '00000_00.png'
    assert picture.read_bytes() == before[picture]


# ---- hashes


def test_a_file_that_hides_its_change(tmp_path):
    "Same size, same time of change: the file system's own time tells."
    import os

    path = tmp_path / 'a.bin'
    path.write_bytes(b'one')
    os.utime(path, ns=(10**18, 10**18))
    first = file_hash(path)
    path.write_bytes(b'two')
    os.utime(path, ns=(10**18, 10**18))
    assert file_hash(path) != first


def test_a_broken_database_costs_time_only(tmp_path, monkeypatch):
    monkeypatch.setenv('SPATIALAVATAR0_DATA', str(tmp_path / 'data'))
    path = tmp_path / 'a.bin'
    path.write_bytes(b'one')
    first = file_hash(path)
    (tmp_path / 'data' / 'hashes.sqlite').write_bytes(b'no database' * 1000)
    assert file_hash(path) == first
    shutil.rmtree(tmp_path / 'data')
    (tmp_path / 'data').write_text('a file where a folder should be')
    assert file_hash(path) == first


def test_many_processes_share_the_database(tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setenv('SPATIALAVATAR0_DATA', str(tmp_path / 'data'))
    files = []
    for i in range(60):
        files.append(tmp_path / f'{i}.bin')
        files[-1].write_bytes(bytes([i]) * 1000)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: file_hashes(files), range(16)))
    assert all(answer == answers[0] for answer in answers)
    assert len(set(answers[0])) == 60


@pytest.mark.parametrize('change', ['image', 'mask', 'viewmat', 'K', 'time', 'camera', 'params'])
def test_a_frame_in_memory(change):
    from dataclasses import replace

    frame = mono_clip(make_person(0), 8, 32)[0]
    value = getattr(frame, change)
    if change == 'params':
        other = dict(value, jaw=value['jaw'] + 1e-6)
    else:
        other = value + (1 if change == 'time' else '1' if change == 'camera' else 1e-6)
    pair = [Clip([x]).fingerprint() for x in (frame, replace(frame, **{change: other}))]
    assert len(what_changed(*pair)) == 1


def test_painted_people_are_known_by_their_recipe():
    crowd = people(mono(64, instants=2), 3)
    names = [clip.fingerprint()['recipe'] for clip in crowd]
    assert len(set(names)) == 3
    assert names == [clip.fingerprint()['recipe'] for clip in people(mono(64, instants=2), 3)]
    for other in (mono(64, instants=3), mono(32, instants=2)):
        assert people(other, 1)[0].fingerprint()['recipe'] != names[0]
    assert (
        mono_clip(make_person(0), 8, 32).fingerprint()
        != mono_clip(make_person(0), 8, 32, seed=1).fingerprint()
    )


def test_every_kind_of_value_counts():
    values = [0, 1, 1.0, True, '1', b'1', None, (1,), [1, 2], [[1], 2], dict(a=1), dict(b=1)]
    values += [torch.ones(1), torch.ones(1, 1), torch.ones(1).double(), np.ones(1), np.ones(2)]
    names = [hash_of(value) for value in values]
    assert len(set(names)) == len(names)
    assert hash_of((1, 2)) == hash_of([1, 2])  # as a JSON file has it

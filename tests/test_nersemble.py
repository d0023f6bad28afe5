"""Data sets of many sequences and cameras, as VHAP and its script for joining lay them: read, cut,
counted by people, judged, with the head that the data need."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spatialavatar0 import cli
from spatialavatar0.avatar.avatar import load_avatar, new_avatar, save_avatar
from spatialavatar0.ground.core import InputError
from spatialavatar0.ground.geometry import intrinsics, orbit
from spatialavatar0.head.flame_files import HeadFile, fitting_head, write_flame_folder
from spatialavatar0.head.head import open_head
from spatialavatar0.judge.benchmark import jobs_of, parts_of_folder, person_of, subjects
from spatialavatar0.judge.results import Results, protocol_of
from spatialavatar0.pictures.clips import (
    Frame,
    is_joined,
    offset_counts,
    read_vhap,
    sequences_of,
    write_vhap,
)
from spatialavatar0.pictures.formats import head_for, load_clip, train_test
from spatialavatar0.pictures.people import make_person, mono_clip

PATHS = 'file_path', 'fg_mask_path', 'flame_param_path'


@pytest.fixture(scope='module')
def flame(tmp_path_factory):
    "The open head as a FLAME folder."
    return write_flame_folder(open_head(), tmp_path_factory.mktemp('flame'))


def shot(time, camera=0, seed=0, **params):
    "A small frame that differs from every other."
    random = torch.Generator().manual_seed(10_000 * seed + 100 * time + camera)
    image = torch.rand(12, 16, 3, generator=random)
    mask = torch.ones(12, 16)
    view = orbit(10 * camera, 0, 0.6)
    name = f'2222000{30 + camera}'
    return Frame(image, mask, view, intrinsics(20.0, 16, 12), params, time, name, camera)


def sequence(folder, steps=4, cameras=1, seed=0, head=None):
    "One sequence, as VHAP exports it; as a folder from elsewhere it does not say its head."
    frames = [shot(t, c, seed) for t in range(steps) for c in range(cameras)]
    write_vhap(frames, folder, head or open_head())
    for path in folder.glob('transforms*.json'):
        top = json.loads(path.read_text())
        top.pop('head')
        path.write_text(json.dumps(top))
    return folder


def entries(folder, first=0):
    "Entries of a sequence as a joined set has them."
    top = json.loads((folder / 'transforms.json').read_text())
    for entry in top['frames']:
        entry['timestep_index'] += first
        entry |= {name: f'../{folder.name}/{entry[name]}' for name in PATHS}
        del entry['timestep_index_original'], entry['timestep_id']
    return top['frames']


def join(folder, train, test, val_camera=8, go_on=True):
    "What VHAP's script writes: three lists, no pictures, no transforms.json."
    folder.mkdir()
    first, parts = 0, dict(train=[], val=[], test=[])
    for part, sequences in dict(train=train, test=test).items():
        for one in sequences:
            found = entries(one, first * go_on)
            first += len({entry['timestep_index'] for entry in found})
            for entry in found:
                held = part == 'train' and entry['camera_index'] == val_camera
                parts['val' if held else part].append(entry)
    for part, frames in parts.items():
        (folder / f'transforms_{part}.json').write_text(json.dumps(dict(frames=frames)))
    np.savez(folder / 'canonical_flame_param.npz', shape=np.zeros(300, np.float32))
    return folder


def times(clip):
    return [frame.time for frame in clip]


# ---- joined sets


@pytest.mark.parametrize('go_on', [True, False])
def test_a_joined_set_is_read(tmp_path, go_on):
    "Its three lists are one clip, and time goes on from sequence to sequence, whatever they say."
    one, two, three = (sequence(tmp_path / f'306_EXP-{k}', 3, seed=k) for k in (1, 2, 3))
    union = join(tmp_path / 'UNION10_306_EXP123', [one, two], [three], go_on=go_on)
    assert is_joined(union) and not is_joined(one)
    assert sequences_of(union) == [one, two, three]
    everything = load_clip(union)
    assert times(everything) == list(range(9))
    assert times(load_clip(union, split='train')) == list(range(6))
    assert times(load_clip(union, split='test')) == [6, 7, 8]
    assert len(load_clip(union, split='val')) == 0
    assert torch.equal(everything[4].image, load_clip(two)[1].image)
    assert [len(part) for part in train_test(union)] == [6, 3]


def test_gaps_in_the_steps_stay(tmp_path):
    "A sequence that counts from 100, and one that skips: only what collides is moved."
    one, two = (sequence(tmp_path / f'0{k}_EMO-1', 3, seed=k) for k in (11, 12))
    union = join(tmp_path / 'UNION_0', [one], [two], go_on=False)
    for part, first, step in (('train', 100, 2), ('test', 100, 1)):
        path = union / f'transforms_{part}.json'
        top = json.loads(path.read_text())
        for entry in top['frames']:
            entry['timestep_index'] = first + step * entry['timestep_index']
        path.write_text(json.dumps(top))
    assert times(load_clip(union)) == [100, 102, 104, 105, 106, 107]


def test_sequences_as_a_list(tmp_path):
    one, two = (sequence(tmp_path / f'306_SEN-0{k}', 2, 2, seed=k) for k in (1, 2))
    clip = load_clip([one, two])
    assert times(clip) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert torch.equal(clip[6].image, load_clip(two)[2].image)
    assert clip.fingerprint() != load_clip([two, one]).fingerprint()
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other/flame_params.json').write_text('{}')
    with pytest.raises(InputError, match='only sequences in VHAP format are joined'):
        load_clip([one, tmp_path / 'other'])


def test_a_frame_of_two_parts(tmp_path):
    "It counts once among all; that it is held out and learned from is said."
    one, two = (sequence(tmp_path / f'306_EMO-{k}', 3, seed=k) for k in (1, 2))
    union = join(tmp_path / 'UNION_306', [one, two], [two])
    train = json.loads((union / 'transforms_train.json').read_text())['frames']
    (union / 'transforms_test.json').write_text(json.dumps(dict(frames=train[4:])))
    assert len(load_clip(union)) == 6
    with pytest.warns(UserWarning, match='2 of 2 held-out frames are among those to learn from'):
        train_test(union)


def test_parts_that_lack(tmp_path):
    union = join(tmp_path / 'UNION_1', [sequence(tmp_path / '1_EMO-1')], [])
    with pytest.raises(InputError, match='has no test frames'):
        load_clip(union, split='test')
    (union / 'transforms_test.json').unlink()
    with pytest.raises(InputError, match='has no transforms.json; it has transforms_train.json'):
        load_clip(union)


@pytest.mark.parametrize('lost', ['both', 'test', 'frames'])
def test_a_set_without_a_cut(tmp_path, lost):
    "Only transforms.json, or a test list that is missing or empty: the last fifth, and it is said."
    folder = sequence(tmp_path / '306_EMO-1', 10)
    path = folder / 'transforms_test.json'
    if lost == 'frames':
        path.write_text('{"frames": []}')
    else:
        path.unlink()
    if lost == 'both':
        (folder / 'transforms_train.json').unlink()
    with pytest.warns(UserWarning, match='the last fifth is held out'):
        train, test = train_test(folder)
    assert (len(train), times(test)) == (8, [8, 9])


# ---- cameras and order


def test_sixteen_cameras(tmp_path):
    "NeRSemble's: camera 8 is kept for new views, the last sequence for new expressions."
    one, two = (sequence(tmp_path / f'306_EMO-{k}', 4, 16, seed=k) for k in (1, 2))
    union = join(tmp_path / 'UNION_306', [one], [two])
    clip = load_clip(union)
    order = [(frame.time, frame.camera_index) for frame in clip]
    assert order == [(time, camera) for time in range(8) for camera in range(16)]
    head = open_head()
    views = parts_of_folder(union, protocol_of('vhap_camera'), head)
    assert (len(views['train']), len(views['test'])) == (60, 4)
    assert {frame.camera_index for frame in views['test']} == {8}
    moments = parts_of_folder(union, protocol_of('vhap_time'), head)
    assert (len(moments['train']), len(moments['test'])) == (60, 64)
    assert sorted(set(times(moments['test']))) == [4, 5, 6, 7]
    # a single sequence is cut by the rule: 70% of four time steps are three
    alone = parts_of_folder(one, protocol_of('vhap_camera'), head)
    assert (len(alone['train']), len(alone['test'])) == (45, 3)
    with pytest.raises(InputError, match='no frame of the cameras .8.*and here are 0, 1'):
        few = sequence(tmp_path / '017_EMO-1', 4, 2)
        parts_of_folder(few, protocol_of('vhap_camera'), head)


@pytest.mark.parametrize('numbered', [True, False])
def test_order_of_time_then_camera(tmp_path, numbered):
    "Whatever order the file has; camera 10 after camera 9, by number or by name."
    folder = sequence(tmp_path / '306_EMO-1', 2, 11)
    path = folder / 'transforms.json'
    top = json.loads(path.read_text())
    for entry in top['frames']:
        entry['camera_id'] = str(entry['camera_index'])
        if not numbered:
            del entry['camera_index']
    mixed = np.random.default_rng(0).permutation(len(top['frames']))
    path.write_text(json.dumps(dict(top, frames=[top['frames'][i] for i in mixed])))
    places = [(frame.time, frame.camera) for frame in load_clip(folder)]
    assert places == [(time, str(camera)) for time in (0, 1) for camera in range(11)]


# ---- people


def test_names_of_people():
    for name, who in {
        'UNION10_074_EMO1234EXP234589_v16_DS4_whiteBg': '074',
        'UNIONshort_074_EMO1EXP12': '074',
        '074_EMO-1_v16_DS4_whiteBg_staticOffset_maskBelowLine': '074',
        'anna_SEN-01': 'anna',
        '460_smile': '460',
        'nf_01': 'nf_01',
        'person_0004': 'person_0004',
        'anna_free': 'anna_free',
    }.items():
        assert person_of(name) == who


def test_people_are_counted(tmp_path):
    "A joined set stands for its sequences; without one they are joined; others stay alone."
    for k, name in enumerate(('306_EMO-1', '306_EXP-2', '306_FREE', '017_A', '017_B', 'nf_01')):
        sequence(tmp_path / name, 2, seed=k)
    join(tmp_path / 'UNION_306', [tmp_path / '306_EMO-1'], [tmp_path / '306_EXP-2'])
    said = []
    found = subjects(tmp_path, said.append)
    assert found == {
        '017': [tmp_path / '017_A', tmp_path / '017_B'],
        '306': tmp_path / 'UNION_306',
        'nf_01': tmp_path / 'nf_01',
    }
    assert 'UNION_306 stands for 306_EMO-1, 306_EXP-2; left out: 306_FREE' in said[1]
    assert '2 sequences of one person are joined, 017_A, 017_B' in said[0]
    jobs = jobs_of(tmp_path, 'share:.5', 'warp')
    assert [job.shown for job in jobs] == ['017', '306', 'nf_01']
    assert [len(job.shown_at) for job in jobs] == [2, 1, 1]


def test_the_larger_set_stands(tmp_path):
    ones = [sequence(tmp_path / f'306_EXP-{k}', 2, seed=k) for k in range(3)]
    join(tmp_path / 'UNION2_306', ones[:1], ones[1:2])
    join(tmp_path / 'UNION3_306', ones[:2], ones[2:])
    said = []
    assert subjects(tmp_path, said.append) == {'306': tmp_path / 'UNION3_306'}
    assert 'left out: UNION2_306' in said[0]


def test_a_broken_set_costs_one_person(tmp_path):
    sequence(tmp_path / '306_EMO-1', 2)
    sequence(tmp_path / 'anna', 2)
    union = join(tmp_path / 'UNION_306', [tmp_path / '306_EMO-1'], [])
    (union / 'transforms_train.json').write_text('{')
    assert 'anna' in subjects(tmp_path)


# ---- the head by the data


def with_offsets(folder, vertices, size=1e-4):
    "A sequence with static offsets for so many vertices."
    sequence(folder, 3)
    for path in folder.glob('flame_param/*.npz'):
        with np.load(path) as old:
            offset = np.full((1, vertices, 3), size, np.float32)
            np.savez(path, **{**old, 'static_offset': offset})
    return folder


@pytest.mark.parametrize('size', [1e-4, 0.0])
def test_teeth_by_the_data(tmp_path, flame, size):
    V = open_head().num_verts
    folder = with_offsets(tmp_path / 'a', V + 120, size)
    assert offset_counts(folder) == {V + 120}
    head = head_for(folder, flame)
    assert head.num_verts == V + 120
    assert ('static_offset' in load_clip(folder, head)[0].params) == (size > 0)


def test_sequences_with_and_without_teeth(tmp_path, flame):
    "One head for both: where there are no teeth in the offsets, teeth do not move."
    V = open_head().num_verts
    one, two = with_offsets(tmp_path / '1_EMO-1', V), with_offsets(tmp_path / '1_EMO-2', V + 120)
    head = head_for([one, two], flame)
    offsets = [frame.params['static_offset'] for frame in load_clip([one, two], head)]
    assert {tuple(offset.shape) for offset in offsets} == {(1, V + 120, 3)}
    assert not offsets[0][0, V:].any() and offsets[0][0, :V].all() and offsets[-1].all()


@pytest.mark.parametrize('vertices', [5023, 5143, 7])
def test_offsets_of_another_mesh(tmp_path, flame, vertices):
    folder = with_offsets(tmp_path / 'a', vertices)
    for given in (None, flame, HeadFile(flame, 100, 52)):
        with pytest.raises(InputError, match=rf'is for {vertices:,} vertices.*--head') as error:
            head_for(folder, given)
        assert '\n' not in str(error.value)


def test_teeth_without_lips(tmp_path):
    "A model that has no landmarks beside it gets one line that says what to put there."
    import flame_files as ff

    path = ff.write_original(tmp_path / 'generic_model.pkl', ff.model())
    with pytest.raises(InputError, match='landmark_embedding.npy beside the model'):
        fitting_head(path, {180}, 'a film')


def test_an_avatar_on_a_head_with_teeth(tmp_path, flame):
    "Commands that load it are told the same file, and nobody says teeth."
    V = open_head().num_verts
    for name, counts in (('a', {V + 120}), ('b', {V})):
        path = tmp_path / f'{name}.safetensors'
        save_avatar(new_avatar(fitting_head(flame, counts), 16), path)
        assert {load_avatar(path, flame).head.num_verts} == counts
    with pytest.raises(InputError, match='made on another head'):
        load_avatar(tmp_path / 'a.safetensors', HeadFile(flame, 100, 52))


# ---- the whole road, at the command line


def run(capfd, *args):
    code = cli.main([str(arg) for arg in args])
    said = capfd.readouterr()
    return code, said.out, said.err


@pytest.fixture(scope='module')
def studio(tmp_path_factory):
    "A person in two sequences and their joined set, painted; and another person."
    home = tmp_path_factory.mktemp('studio')
    for number, name in ((4, '306_EMO-1'), (4, '306_EXP-2'), (9, '017_SEN-01')):
        clip = mono_clip(make_person(number), 8, 48, seed=len(name))[: 3 if '2' in name else 8]
        frames = [replace(f, camera='0', camera_index=0) for f in clip]
        sequence_of_frames(frames, home / name)
    join(home / 'UNION_306', [home / '306_EMO-1'], [home / '306_EXP-2'])
    return home


def sequence_of_frames(frames, folder):
    write_vhap(frames, folder, open_head())
    for path in folder.glob('transforms*.json'):
        top = json.loads(path.read_text())
        top.pop('head')
        path.write_text(json.dumps(top))


def test_the_road(tmp_path, studio, flame, capfd):
    "refine, evaluate, benchmark: three commands from the folders to a table of people."
    union, out = studio / 'UNION_306', tmp_path / 'out'
    small = '--iters', 2, '--resolution', 16, '--head', flame
    code, said, err = run(capfd, 'refine', 'new', union, '--out', out, *small)
    assert code == 0, err
    assert '8 frames to learn from, 3 held out' in said
    avatar, book = out / 'avatar.safetensors', tmp_path / 'e.jsonl'
    where = '--protocol', 'vhap_time', '--head', flame, '--out', book
    code, said, err = run(capfd, 'evaluate', avatar, union, *where)
    assert code == 0, err
    line = Results(book).lines[0]
    assert (line.subject, line.scores['frames']) == ('UNION_306', 3)
    assert line.more['cut'] == 'transforms_train.json, transforms_test.json'
    book = tmp_path / 'b.jsonl'
    how = '--protocol', 'vhap_time', '--method', 'warp', '--out', book, '--head', flame
    code, said, err = run(capfd, 'benchmark', studio, *how, '--resolution', 16)
    assert code == 0, err
    assert 'UNION_306 stands for 306_EMO-1, 306_EXP-2' in said
    assert [line.subject for line in Results(book).lines] == ['017_SEN-01', '306']


def test_somebody_drives_from_a_joined_set(tmp_path, studio, flame, capfd):
    save_avatar(new_avatar(fitting_head(flame), 16), tmp_path / 'a.safetensors')
    film = tmp_path / 'film.gif'
    how = '--head', flame, '--seconds', 0.2, '--size', 32, '--out', film
    code, _, err = run(capfd, 'animate', tmp_path / 'a.safetensors', studio / 'UNION_306', *how)
    assert code == 0, err
    assert film.stat().st_size > 0


def test_a_night(tmp_path, studio, flame, capfd):
    "Pictures that are all black: one line, before the first step."
    frames = [replace(f, image=0 * f.image) for f in read_vhap(studio / '306_EMO-1')]
    sequence_of_frames(frames, tmp_path / 'night')
    how = '--iters', 2, '--out', tmp_path / 'out', '--head', flame
    code, _, err = run(capfd, 'refine', 'new', tmp_path / 'night', *how)
    assert (code, err.count('\n')) == (1, 1), err
    assert 'pictures are black where the person is' in err
    assert not Path(tmp_path / 'out/state.safetensors').exists()


def test_options_of_a_head(tmp_path, studio, capfd):
    "Another split of the bases: the error says the options, and the options work."
    import flame_files as ff

    model = ff.model(columns=150)
    path = ff.write_original(tmp_path / 'generic_model.pkl', model)
    code, _, err = run(capfd, 'inspect', path)
    assert '--num-shape N --num-expr M' in err
    code, said, _ = run(capfd, 'inspect', path, '--head', path, '--num-shape', 90, '--num-expr', 60)
    assert code == 0 and '90' in said and '60' in said
    code, _, err = run(capfd, 'view', 'no.safetensors', '--num-shape', 90)
    assert code == 1 and 'give one' in err


def test_links_at_the_command_line(tmp_path, studio, flame, capfd):
    "A linked folder is read and said; a single file only with --follow-links, which ends there."
    sequence_of_frames(read_vhap(studio / '306_EXP-2'), tmp_path / 'sets/film')

    def inspected(*options):
        how = tmp_path / 'sets/film', '--head', flame
        return ' '.join(run(capfd, 'inspect', *how, *options)[1].split())

    def linked(name, place):
        there, here = tmp_path / place, tmp_path / 'sets/film' / name
        there.parent.mkdir(exist_ok=True)
        here.rename(there)
        here.symlink_to(there)

    linked('images', 'disk/images')
    assert f'images links to {tmp_path / "disk/images"}' in inspected()
    linked('fg_masks/00000_00.png', 'mine.png')
    assert f'to {tmp_path / "mine.png"}; --follow-links' in inspected()
    assert 'files of fg_masks link to' in inspected('--follow-links')
    assert 'leads out of the data set' in inspected()


@pytest.mark.parametrize('lost', [(7,), (0, 6), (2, 3, 4)])
def test_frames_without_a_person(tmp_path, studio, flame, capfd, lost):
    "Named before the first step, left out, and metrics are written."
    frames = [
        replace(f, mask=f.mask * (f.time not in lost)) for f in read_vhap(studio / '306_EMO-1')
    ]
    sequence_of_frames(frames, tmp_path / 'film')
    how = '--iters', 2, '--resolution', 16, '--head', flame, '--out', tmp_path / 'out'
    code, said, err = run(capfd, 'refine', 'new', tmp_path / 'film', *how)
    assert code == 0, err
    for time in lost:
        assert f'images/{time:05d}_00.png' in said
    learned = 6 - sum(time < 6 for time in lost)
    held = 2 - sum(time >= 6 for time in lost)
    assert f'{learned} frames to learn from, {held} held out' in said
    numbers = json.loads((tmp_path / 'out/metrics.json').read_text())
    assert numbers['refined']['head_psnr'] > 0

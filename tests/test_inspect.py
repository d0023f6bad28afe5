"""What a thing is, what is wrong with it, and the exact command that comes next; and the same
checks before the first step of every command."""

import json
import pickle
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import flame_files
import imageio_ffmpeg
import numpy as np
import pytest
import skimage.data
import torch
import typer
from PIL import Image
from test_formats import MAKE, made, unmarked

from spatialavatar0 import cli, inspection, pipeline
from spatialavatar0.avatar.avatar import new_avatar
from spatialavatar0.ground.core import InputError
from spatialavatar0.head.flame_files import HeadFile
from spatialavatar0.head.head import open_head
from spatialavatar0.inspection import inspect_path, report_text, shell_line
from spatialavatar0.judge.results import Results
from spatialavatar0.pictures import checks
from spatialavatar0.pictures.checks import check_clip, faults_of
from spatialavatar0.pictures.clips import Clip, read_vhap, write_vhap
from spatialavatar0.pictures.formats import load_clip
from spatialavatar0.pictures.people import make_person, mono_clip
from spatialavatar0.stage1.generator import from_preset
from spatialavatar0.use.export import write_splats

HEAD = open_head()
FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


def parsed(line):
    "Name and parameters of a command, as the command line takes them; wrong usage is an error."
    program, name, *words = shlex.split(line)
    assert program == 'spatialavatar0'
    with typer.main.get_command(cli.app).commands[name].make_context(name, words) as context:
        return name, context.params


def next_of(path, head=None):
    "The last command that comes next, and what the command line makes of it."
    report = inspect_path(path, head)
    lines = [shell_line(words) for words in report.commands]
    for line in lines:
        parsed(line)
    return lines[-1], *parsed(lines[-1])


@pytest.fixture(scope='module')
def frames():
    "Twelve frames of a painted person; nothing is wrong with them."
    return list(mono_clip(make_person(2), 12, 64, seed=2))


def without_person(frame):
    return replace(frame, mask=torch.zeros_like(frame.mask))


def moved(frame, *metres):
    return replace(frame, params=frame.params | dict(translation=torch.tensor([metres])))


def written(folder, frames, **faults):
    "A clip with some frames in place of others: _3=frame."
    frames = list(frames)
    for name, frame in faults.items():
        frames[int(name[1:])] = frame
    return write_vhap(frames, folder, HEAD)


@pytest.fixture(scope='module')
def avatar(tmp_path_factory):
    path = tmp_path_factory.mktemp('avatar') / 'me.safetensors'
    new_avatar(HEAD, 16).save(path)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- every kind, with its command


def photo(folder, frames):
    Image.fromarray(skimage.data.astronaut()).save(folder / 'me.png')
    return folder / 'me.png'


def film(folder, frames):
    lines = ['-f', 'lavfi', '-i', 'testsrc=d=1:r=10:s=96x80', str(folder / 'me.mp4')]
    subprocess.run([FFMPEG, '-v', 'error', *lines], check=True)
    return folder / 'me.mp4'


def pictures(folder, frames):
    (folder / 'shots').mkdir()
    for i in range(3):
        Image.new('RGB', (96, 80), (80 * i, 0, 0)).save(folder / f'shots/a{9 + i}.png')
    return folder / 'shots'


def clip(folder, frames):
    return written(folder / 'me', frames)


def people(folder, frames):
    for name in ('anna', 'bert'):
        written(folder / 'people' / name, frames)
    return folder / 'people'


def generator(folder, frames):
    from_preset('tiny', HEAD, 0).save(folder / 'g.safetensors', steps=3)
    return folder / 'g.safetensors'


def results(folder, frames):
    text = json.dumps(
        dict(method='warp', protocol='own split last:4', subject='a', driver='a', seed=0, scores={})
    )
    (folder / 'r.jsonl').write_text(text + '\n')
    return folder / 'r.jsonl'


def recording(folder, frames):
    rows = [f'{i / 60},{i / 30},0.1' for i in range(30)]
    (folder / 'take.csv').write_text('\n'.join(['time,jawOpen,eyeBlinkLeft', *rows]))
    return folder / 'take.csv'


def splats(folder, frames):
    return write_splats(folder / 'head.ply', *new_avatar(HEAD, 16).world())


def flame(folder, frames):
    return flame_files.write_original(folder / 'flame2020.pkl', flame_files.model())


KINDS = dict(
    photo=(photo, 'build {} --out out'),
    film=(film, 'build {} --out out'),
    pictures=(pictures, 'track {} --out clip'),
    clip=(clip, 'refine new {} --out out'),
    people=(people, 'benchmark {} --protocol vhap_time --out results.jsonl'),
    generator=(generator, 'benchmark PEOPLE --method {} --out results.jsonl'),
    results=(results, 'benchmark PEOPLE --protocol last:4 --method warp --out {}'),
    recording=(recording, 'animate out/avatar.safetensors {} --out film.mp4'),
    head=(flame, 'inspect CLIP --head {}'),
)


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind(here, frames, kind):
    make, command = KINDS[kind]
    path = make(here, frames)
    assert inspect_path(path).kind == kind
    line, _, _ = next_of(path)
    assert line == f'spatialavatar0 {command.format(path)}'


def test_avatar(avatar, here):
    line, name, said = next_of(avatar)
    assert line == f'spatialavatar0 view {avatar} --out me.html'
    report = inspect_path(avatar)
    assert report.facts['gaussians'] == len(new_avatar(HEAD, 16))
    assert report.facts['head'] == 'open head' and not report.notes


def test_splats(here):
    path = splats(here, None)
    report = inspect_path(path)
    assert (report.kind, report.commands) == ('splats', [])
    assert report.facts['gaussians'] == len(new_avatar(HEAD, 16))


def test_bad_splats_are_counted(here):
    path = splats(here, None)
    data = bytearray(path.read_bytes())
    at = data.index(b'end_header\n') + len(b'end_header\n')
    data[at : at + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    report = inspect_path(path)
    assert report.facts['gaussians'] == len(new_avatar(HEAD, 16)) - 1
    assert any('left out 1 of' in note for note in report.notes)


@pytest.mark.parametrize('name', MAKE)
def test_every_format(here, name):
    path = made(name, here / name, T=5)
    report = inspect_path(path)
    assert report.what.endswith(inspection.FORMATS[name])
    assert report.facts['frames'] == 5
    assert sum(report.facts['splits'].values()) == 5
    assert next_of(path)[0] == f'spatialavatar0 refine new {path} --out out'


@pytest.mark.parametrize('name', [name for name in MAKE if name != 'vhap'])
def test_which_head(here, name):
    "Codes of a FLAME model that nobody names: the next command asks for one, and then goes on."
    folder = unmarked(name, here / name)
    report = inspect_path(folder)
    assert 'FLAME model' in report.facts['head needed']
    assert any('does not say which' in note for note in report.notes)
    line, command, said = next_of(folder)
    assert (command, str(said['head'])) == ('inspect', 'flame2020')
    model = flame(here, None)
    line, command, said = next_of(folder, HeadFile(str(model)))
    assert (command, said['head'], said['out']) == ('refine', model, Path('out'))


def test_teeth(here):
    "Offsets of a head with more vertices are no fault of the clip; the report says for how many."
    folder = made('vhap', here / 'a', T=2)
    for path in (folder / 'flame_param').iterdir():
        arrays = dict(np.load(path))
        vertices = HEAD.num_verts + 120
        np.savez(path, **arrays | dict(static_offset=np.full((1, vertices, 3), 1e-3, 'f4')))
    report = inspect_path(folder)
    assert f'{HEAD.num_verts + 120:,} vertices' in report.facts['head needed']
    assert next_of(folder)[1] == 'inspect'


def joined(folder, frames):
    "Two sequences of one person, and the set that VHAP's script makes of them."
    parts = dict(train=[], val=[], test=[])
    for take in ('EMO-1', 'SEN-2'):
        one = written(folder / f'306_{take}', frames)
        for part in parts:
            top = json.loads((one / f'transforms_{part}.json').read_text())
            for entry in top['frames']:
                names = 'file_path', 'fg_mask_path', 'flame_param_path'
                parts[part].append(entry | {k: f'../306_{take}/{entry[k]}' for k in names})
                parts[part][-1]['timestep_index'] += 100 * (take == 'SEN-2')
    union = folder / 'UNION_306'
    union.mkdir()
    (union / 'canonical_flame_param.npz').write_bytes(
        (one / 'canonical_flame_param.npz').read_bytes()
    )
    for part, entries in parts.items():
        text = json.dumps(top | dict(frames=entries))
        (union / f'transforms_{part}.json').write_text(text)
    return union


def test_sequences_are_not_people(here, frames):
    union = joined(here / 'set', frames)
    report = inspect_path(union)
    assert report.facts['joins'] == ['306_EMO-1', '306_SEN-2']
    assert (report.facts['frames'], report.facts['splits']['train']) == (24, 18)
    assert next_of(union)[0] == f'spatialavatar0 refine new {union} --out out'
    report = inspect_path(here / 'set')
    assert len(report.facts['people']) == 1
    assert any('UNION_306 stands for' in note for note in report.notes)
    assert next_of(here / 'set')[2]['protocol'] == 'vhap_time'


# ---- films


def made_film(path, *words):
    source = ['-f', 'lavfi', '-i', 'testsrc=d=1:r=25:s=128x96']
    subprocess.run([FFMPEG, '-v', 'error', *source, *words, str(path)], check=True)
    return path


HLG = 'color_primaries=bt2020:color_trc=arib-std-b67:colorspace=bt2020nc'
FILMS = dict(
    interlaced=('a.mpg', ['-vf', 'setfield=tff', '-c:v', 'mpeg2video', '-flags', '+ildct+ilme']),
    uneven=('a.mp4', ['-vf', "select='not(mod(n,7))+not(mod(n,5))'", '-fps_mode', 'vfr']),
    high_range=('a.mov', ['-vf', f'format=yuv420p10le,setparams={HLG}', '-c:v', 'libx265']),
)


@pytest.mark.parametrize('odd', FILMS)
def test_odd_films(here, odd):
    name, words = FILMS[odd]
    facts = inspect_path(made_film(here / name, *words)).facts
    assert facts['size'] == [128, 96]
    assert {k for k in FILMS if facts[k]} == {odd}, facts
    assert next_of(here / name)[1] == 'build'


def test_a_turned_film(here):
    flat = made_film(here / 'flat.mp4')
    words = ['-display_rotation', '90', '-i', str(flat), '-c', 'copy', str(here / 'up.mp4')]
    subprocess.run([FFMPEG, '-v', 'error', *words], check=True)
    assert abs(inspect_path(here / 'up.mp4').facts['turned']) == 90
    assert inspect_path(flat).facts['turned'] == 0


def test_photos_say_what_they_are(here):
    from PIL import ImageCms

    face = Image.fromarray(skimage.data.astronaut()[:128, :96])
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile('LAB')).tobytes()
    face.save(here / 'lab.jpg', icc_profile=icc)
    face.putalpha(100)
    face.save(here / 'alpha.png')
    turned = Image.Exif()
    turned[0x0112] = 6
    face.convert('RGB').save(here / 'turned.jpg', exif=turned)
    assert 'untagged' not in inspect_path(here / 'lab.jpg').facts['colours']
    assert inspect_path(here / 'alpha.png').facts['transparent']
    assert inspect_path(here / 'turned.jpg').facts['turned']
    face.resize((40, 40)).save(here / 'stamp.png')
    small = inspect_path(here / 'stamp.png')
    assert not small.commands and 'at least 64 pixels' in small.notes[0]


# ---- what is wrong with a clip


def test_faults_are_named(here, frames):
    behind = replace(
        frames[5], viewmat=torch.diag(torch.tensor([-1.0, 1, -1, 1])) @ frames[5].viewmat
    )
    path = written(
        here / 'a',
        frames,
        _3=without_person(frames[3]),
        _5=behind,
        _7=moved(frames[7], 3.0, 0.0, 0.0),
        _9=replace(frames[8], time=9),
    )
    said = '\n'.join(inspect_path(path).notes)
    assert re.search('matte is empty.*images/00003_00.png', said), said
    assert re.search('behind the camera.*images/00005_00.png', said), said
    assert re.search('outside of the picture.*images/00007_00.png', said), said
    assert 'the same picture under several names: images/00008_00.png, images/00009_00.png' in said
    assert not inspect_path(written(here / 'b', frames)).notes


def test_faults_of_all_frames(here, frames):
    inverted = [replace(frame, mask=1 - frame.mask) for frame in frames]
    black = [replace(frame, image=torch.zeros_like(frame.image)) for frame in frames]
    assert any('inside out' in note for note in check_clip(Clip(inverted), HEAD).notes)
    some = [*black[:1], *frames[1:]]
    assert any('is black' in note for note in check_clip(Clip(some), HEAD).notes)
    with pytest.raises(InputError, match='all 12 pictures are black'):
        check_clip(Clip(black), HEAD)
    assert not check_clip(Clip(frames), HEAD).notes


def repainted(path, is_matte, share):
    "The file of a matte, or of a picture with transparency, with a share of it covered."
    with Image.open(path) as picture:
        width, height = picture.size
        covered = np.zeros((height, width), np.uint8)
        covered[: round(share * height)] = 255
        if is_matte and picture.mode != 'RGBA':
            return Image.fromarray(covered).convert(picture.mode).save(path, quality=95)
        whole = picture.convert('RGB')
    whole.putalpha(Image.fromarray(covered))
    whole.save(path)


@pytest.mark.parametrize('name', MAKE)
def test_empty_mattes_in_every_format(here, name):
    "By a matte of its own, or by an alpha channel."
    folder = made(name, here / name, T=4)
    clip = load_clip(folder)
    for i, share in enumerate((0.5, 1, 0, 0.25)):
        leaf = clip.leaf(i)
        path = leaf.get('mattes') or leaf['pictures']
        repainted(path, bool(leaf.get('mattes')), share)
    shares = checks.shares_of(load_clip(folder))
    assert [round(share, 1) for share in shares.values()] == pytest.approx(
        [0.5, 1, 0, 0.2], abs=0.11
    )
    truth = [float((frame.mask > 0.5).float().mean()) for frame in load_clip(folder)]
    assert list(shares.values()) == pytest.approx(truth, abs=0.01)
    checked = check_clip(load_clip(folder))
    assert list(checked.left_out.values()) == ['empty'] and len(checked.clip) == 3


def test_mattes_are_decoded_once(here, frames, monkeypatch):
    "A second look needs hashes only; a matte that changed is looked at again."
    monkeypatch.setenv('SPATIALAVATAR0_DATA', str(here / 'data'))
    path = written(here / 'a', [moved(f, 0.0, 0.0, i / 1e4) for i, f in enumerate(frames)])
    looked = []
    look = checks.matte_share

    def counted(*words):
        looked.append(words)
        return look(*words)

    monkeypatch.setattr(checks, 'matte_share', counted)
    distinct = len({p.read_bytes() for p in (path / 'fg_masks').iterdir()})
    assert faults_of(read_vhap(path, head=HEAD), HEAD) == {}
    assert len(looked) == distinct
    assert faults_of(read_vhap(path, head=HEAD), HEAD) == {}
    assert len(looked) == distinct
    Image.new('L', (64, 64)).save(path / 'fg_masks/00004_00.png')
    assert faults_of(read_vhap(path, head=HEAD), HEAD) == {4: 'empty'}
    assert len(looked) == distinct + 1


def test_a_database_of_pictures_is_not_decoded(frames):
    "Pictures in a tracker's database have no mattes: one look tells."
    made = []

    def make(i):
        made.append(i)
        return replace(frames[i], mask=torch.ones_like(frames[i].mask))

    clip = Clip(make, 12, leaf=lambda i: dict(pictures=f'hash {i}', cameras=[i], codes=[i]))
    assert list(checks.shares_of(clip).values()) == [1.0] * 12
    assert made == [0]


def test_codes_of_some_frames(frames):
    "One lost head among those that are looked at: then all frames are."
    many = [moved(frames[i % 12], 3.0 * (100 <= i < 140), 0.0, 0.0) for i in range(300)]
    assert list(faults_of(Clip(many), HEAD, most=30)) == list(range(100, 140))


def test_a_damaged_matte_is_found_first(here, frames):
    path = written(here / 'a', frames)
    (path / 'fg_masks/00007_00.png').write_bytes(b'no picture')
    with pytest.raises(InputError, match='00007_00.png'):
        faults_of(read_vhap(path, head=HEAD), HEAD)
    assert any('00007_00.png' in note for note in inspect_path(path).notes)


# ---- commands check first


def run(capfd, *args):
    code = cli.main([str(a) for a in args])
    said = capfd.readouterr()
    return code, said.out, said.err


def test_refine_leaves_out_empty_frames(here, frames, capfd):
    "One held-out frame without a person: named, left out, and the numbers are written."
    path = written(here / 'a', frames, _11=without_person(frames[11]))
    words = ['--iters', 2, '--resolution', 16, '--out', here / 'out']
    code, out, err = run(capfd, 'refine', 'new', path, *words)
    assert code == 0, err
    assert 'images/00011_00.png' in out and '2 held out' in out
    assert json.loads((here / 'out/metrics.json').read_text())['refined']['psnr'] > 5


def test_refine_refuses_before_the_first_step(here, frames, capfd):
    empty = {f'_{i}': without_person(frames[i]) for i in (9, 10, 11)}
    path = written(here / 'a', frames, **empty)
    code, out, err = run(capfd, 'refine', 'new', path, '--iters', 2, '--out', here / 'out')
    assert code == 1 and err.count('\n') == 1
    assert 'no frame that can be used' in err and '00009_00.png' in err
    assert not (here / 'out').exists()


def test_evaluate_notes_what_it_leaves_out(here, frames, capfd):
    path = written(here / 'a', frames, _10=without_person(frames[10]))
    words = ['--protocol', 'last:4', '--out', here / 'r.jsonl']
    code, out, err = run(capfd, 'evaluate', 'warp', path, *words)
    assert code == 0, err
    assert 'images/00010_00.png' in out
    assert Results(here / 'r.jsonl').lines[0].more['left_out'] == ['images/00010_00.png']


def test_benchmark_notes_what_it_leaves_out(here, frames, capfd):
    written(here / 'people/bert', frames, _10=without_person(frames[10]))
    words = ['--protocol', 'last:4', '--method', 'warp', '--resolution', 16]
    code, out, err = run(capfd, 'benchmark', here / 'people', *words, '--out', here / 'r.jsonl')
    assert code == 0, err
    (line,) = Results(here / 'r.jsonl').lines
    assert line.more['left_out'] == ['images/00010_00.png']
    assert not (here / 'r_states').exists(), (
        'nothing was refined, so there is nothing to go on with'
    )


def test_a_driver_without_a_person_is_bridged(here, frames, avatar, capfd):
    away = moved(frames[4], 5.0, 0.0, 0.0)
    path = written(here / 'a', frames, _4=away)
    words = ['--out', here / 'film.gif', '--size', 32]
    code, out, err = run(capfd, 'animate', avatar, path, *words)
    assert code == 0, err
    assert 'images/00004_00.png' in out


def test_track_refuses_pictures_of_two_sizes(here, capfd):
    folder = pictures(here, None)
    Image.new('RGB', (200, 200)).save(folder / 'a7.png')
    code, out, err = run(capfd, 'track', folder, '--out', here / 'clip')
    assert code == 1 and '1 another: a7.png' in err, err
    assert not (here / 'clip').exists()
    line, name, said = next_of(folder)
    assert name == 'build' and folder / 'a7.png' in said['photos']


def test_build_says_that_two_photos_are_one(here, monkeypatch):
    said = []
    face = photo(here, None)
    (here / 'copy.png').write_bytes(face.read_bytes())
    pipeline._check_photos([face, here / 'copy.png'], here / 'out', said.append)
    assert said == ['note: me.png and copy.png are the same picture']


# ---- how to go on


def test_a_run_says_how_to_go_on(here, frames, capfd):
    "The printed command, typed, finishes what was begun."
    path = written(here / 'a b', frames)
    words = ['--iters', 3, '--resolution', 16, '--seed', 4, '--out', 'my run']
    assert run(capfd, 'refine', 'new', path, *words)[0] == 0
    (here / 'my run/metrics.json').unlink()
    report = inspect_path('my run')
    assert not report.facts['finished'] and (report.facts['step'], report.facts['of']) == (3, 3)
    line, name, said = next_of('my run')
    assert (name, said['seed'], said['iters'], said['clip']) == ('refine', 4, 3, Path('a b'))
    code, out, err = run(capfd, *shlex.split(line)[1:])
    assert code == 0 and (here / 'my run/metrics.json').exists(), err
    assert next_of('my run')[:2] == (
        "spatialavatar0 animate 'my run/avatar.safetensors' --out film.mp4",
        'animate',
    )
    state = inspect_path(here / 'my run/state.safetensors')
    assert (state.kind, state.facts['seed']) == ('refinement', 4)
    assert state.fingerprint['clip']['frames'] == 9
    states = here / 'r_states'
    states.mkdir()
    (here / 'my run/state.safetensors').rename(states / 'anna_0.safetensors')
    inspection.keep_command(states, 'benchmark', here / 'people', protocol='last:4', jobs=2)
    report = inspect_path(states)
    assert (report.kind, report.facts) == ('states', {'anna_0': 3})
    assert next_of(states)[0] == 'spatialavatar0 benchmark people --protocol last:4 --jobs 2'


def test_another_clip_leaves_the_first_command(here, frames, capfd):
    one, other = written(here / 'a', frames), written(here / 'b', frames[::-1])
    words = ['--iters', 2, '--resolution', 16, '--out', here / 'out']
    assert run(capfd, 'refine', 'new', one, *words)[0] == 0
    assert run(capfd, 'refine', 'new', other, *words)[0] == 1
    assert str(one.name) in inspect_path(here / 'out').facts['made_by']


def test_a_training(here, frames, capfd):
    for kind in ('mono', 'multi'):
        people(here / kind, frames)
    Image.new('L', (64, 64)).save(here / 'mono/people/bert/fg_masks/00005_00.png')
    words = '--preset tiny --steps 2 --batch 1 --mono mono/people --multi multi/people'.split()
    code, out, err = run(capfd, 'train', *words, '--out', 'net')
    assert code == 0 and re.search('bert: 1 of 12 frames is left out.*00005_00.png', out), err
    report = inspect_path('net/state.safetensors')
    assert (report.kind, report.facts['step'], report.facts['finished']) == ('training', 2, True)
    assert next_of('net/state.safetensors')[1] == 'train'
    assert next_of('net/state.safetensors')[2]['mono'] == Path('mono/people')
    line, name, said = next_of('net')
    assert (name, said['method']) == ('benchmark', 'net/generator.safetensors')


def test_a_half_written_clip_and_its_tracking(here):
    work = here / 'clip.tracking'
    work.mkdir()
    (work / 'about.json').write_text('{}')
    inspection.keep_command(work, 'track', here / 'me.mp4', out=here / 'clip', fps=30.0)
    (here / 'clip').mkdir()
    (here / 'clip/writing.jsonl').write_text('{"frames": 3}\n')
    for path in (work, here / 'clip'):
        line, name, said = next_of(path)
        assert line == 'spatialavatar0 track me.mp4 --out clip --fps 30.0'


def test_a_tracked_clip_says_of_what(here, frames):
    path = written(here / 'a', frames)
    pictures = [dict(time=i, use=i < 12, reason='' if i < 12 else 'no face') for i in range(15)]
    (path / 'tracking.json').write_text(json.dumps(dict(film='me.mp4', pictures=pictures)))
    facts = inspect_path(path).facts
    assert (facts['tracked from'], facts['of its pictures']) == ('me.mp4', '12 of 15')
    assert facts['left out for'] == {'no': 3}


@pytest.mark.parametrize(
    'text',
    [
        '[]',
        '{"name": "build; rm -rf ~", "things": [], "options": {}}',
        '{"name": "build", "things": 3, "options": {}}',
        '{"name": "build", "things": [], "options": []}',
        '{"name": "build", "things": [{}], "options": {}}',
        '[' * 100_000,
    ],
    ids=range(6),
)
def test_a_strangers_note_of_a_command(here, avatar, text):
    (here / 'out').mkdir()
    (here / 'out/avatar.safetensors').write_bytes(avatar.read_bytes())
    (here / 'out' / inspection.COMMAND).write_text(text)
    report = inspect_path(here / 'out')
    assert report.facts['made_by'] == 'not noted' and not report.commands


def test_home_in_quotes(here, frames, monkeypatch):
    monkeypatch.setenv('HOME', str(here))
    written(here / 'me', frames)
    assert inspect_path('~/me').kind == 'clip'
    with pytest.raises(InputError, match='check the name'):
        inspect_path('~nobody_of_that_name/me')


def test_a_flame_folder_and_npz_files(here):
    (here / 'models').mkdir()
    flame(here / 'models', None)
    assert inspect_path(here / 'models').kind == 'head'
    assert (
        parsed(shell_line(inspect_path(here / 'models').commands[0]))[1]['head'] == here / 'models'
    )
    write_splats(here / 's.npz', *new_avatar(HEAD, 16).world())
    assert inspect_path(here / 's.npz').kind == 'splats'


def test_who_writes_now(here, avatar):
    from spatialavatar0.ground.lease import lease

    (here / 'out').mkdir()
    (here / 'out/avatar.safetensors').write_bytes(avatar.read_bytes())
    with lease(here / 'out'):
        assert 'process' in inspect_path(here / 'out').facts['being written by']
    assert 'being written by' not in inspect_path(here / 'out').facts


# ---- words


NAMES = [
    "it's",
    '-x',
    'a b',
    '"q"',
    '$HOME',
    'new\nline',
    '\x1b[31m',
    'tab\t',
    'é\u202e',
    '`id`',
    '!',
]


def test_commands_survive_a_shell():
    "What bash makes of a printed command is what was meant."
    for name in NAMES:
        words = inspection.command('build', Path(name), out=Path(f'{name}/out'))
        line = shell_line(words)
        assert line.isprintable()
        script = f'set -- {line}; printf "%s\\0" "$@"'
        done = subprocess.run(['bash', '-c', script], capture_output=True, check=True)
        assert done.stdout.decode().split('\0')[:-1] == words
        assert Path(words[2]) == Path(name) and not words[2].startswith('-')


def test_strangers_words_do_not_reach_the_terminal(here, frames):
    folder = here / 'a\x1b[31m'
    written(folder, frames, _3=without_person(frames[3]))
    assert '\x1b' not in report_text(inspect_path(folder))


def test_json(here, frames, capfd):
    path = written(here / 'a', frames)
    code, out, err = run(capfd, 'inspect', path, '--json')
    assert code == 0, err
    found = json.loads(out)
    assert (found['kind'], found['facts']['frames']) == ('clip', 12)
    assert set(found['fingerprint']) >= {'pictures', 'mattes', 'cameras', 'codes'}
    assert parsed(found['commands'][0])[0] == 'refine'


def test_plain_text(here, frames, capfd):
    path = written(here / 'a', frames)
    code, out, err = run(capfd, 'inspect', path)
    assert code == 0 and out.isascii() and '\x1b' not in out
    assert out.splitlines()[-1].endswith(f'spatialavatar0 refine new {path} --out out')


@pytest.mark.parametrize(
    'name, content, said',
    [
        ('a.zip', b'PK', 'unpack it first'),
        ('a.mp3', b'ID3', 'nothing here listens'),
        ('a.xyz', b'?', 'Expected: '),
        ('transforms.json', b'{}', 'belongs to a clip'),
        ('metrics.json', b'{}', 'belongs to a folder of results'),
        ('a.safetensors', b'\0' * 9, 'nothing that can be read'),
        ('a.html', b'<p>', 'a browser or a viewer'),
        (None, None, 'the folder is empty'),
    ],
)
def test_what_nobody_knows(here, capfd, name, content, said):
    path = here / (name or 'empty')
    path.write_bytes(content) if name else path.mkdir()
    code, out, err = run(capfd, 'inspect', path)
    assert (code, err.count('\n')) == (1, 1) and said in err, err


@pytest.mark.parametrize('name', ['a.csv', 'a.json', 'a.ply', 'a.png', 'a.mp4', 'a.npz', 'a.jsonl'])
@pytest.mark.parametrize('content', [b'', b'no such thing', pickle.dumps([1])], ids=len)
def test_damaged_things_are_one_line(here, capfd, name, content):
    (here / name).write_bytes(content)
    code, out, err = run(capfd, 'inspect', here / name)
    assert (code, err.count('\n')) == (1, 1), (out, err)
    assert err.startswith('error: ') and name in err


@pytest.mark.parametrize('make', [photo, recording, splats, generator, results, flame])
def test_bytes_that_changed(here, make):
    "Forty broken copies of a file: a report or one clear error, never another."
    source = make(here, None)
    whole = source.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(40):
        data = bytearray(whole)
        for at in random.integers(0, min(len(data), 2000), random.integers(1, 9)):
            data[at] = random.integers(256)
        source.write_bytes(data[: random.integers(len(data)) if random.random() < 0.3 else None])
        try:
            inspection.report_json(inspect_path(source))
        except InputError as error:
            assert source.name in str(error)


def test_nothing_there(capfd):
    code, out, err = run(capfd, 'inspect', 'nobody')
    assert code == 1 and 'check the name' in err


def test_a_result_goes_where_nothing_is(here, frames):
    path = written(here / 'a', frames)
    (here / 'out').mkdir()
    assert next_of(path)[2]['out'] == Path('out_2')

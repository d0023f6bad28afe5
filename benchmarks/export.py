"""Every file this kit exports, opened by somebody else's program, and rendered from what that
program says.

    python benchmarks/export.py [--resolution 128] [--out results/export.json]

An avatar with an open mouth is written in each format. Its splats are read back by an independent
reader (plyfile, NumPy; .splat and compressed PLY are first converted by npm's
@playcanvas/splat-transform), drawn from two sides and compared with the avatar: PSNR of the whole
picture. The mesh for engines is read by trimesh and, where npm can fetch it, checked by Khronos'
gltf-validator.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import common  # first: waiting threads shall sleep
import numpy as np
import torch

from spatialavatar0.avatar.portrait import from_frame
from spatialavatar0.capture.photo import refine_photo
from spatialavatar0.ground.geometry import intrinsics, orbit, quat_mul, quat_rotate
from spatialavatar0.head.head import open_head
from spatialavatar0.pictures.metrics import psnr
from spatialavatar0.pictures.people import face_centre, make_person, paint
from spatialavatar0.splats.renderers import rasterize
from spatialavatar0.use.export import write_sequence, write_splats
from spatialavatar0.use.gaussian_avatars import write_gaussian_avatar
from spatialavatar0.use.gltf import corners_of, write_glb

TRANSFORM = '@playcanvas/splat-transform@2.7.1'
VALIDATOR = 'gltf-validator@2.0.0-dev.3.10'
SH0 = 0.28209479177387814
SPLATS = 'means', 'quats', 'scales', 'opacities', 'colors'
PLY_COLUMNS = dict(
    means=('x', 'y', 'z'),
    quats=('rot_0', 'rot_1', 'rot_2', 'rot_3'),
    scales=('scale_0', 'scale_1', 'scale_2'),
    opacities=('opacity',),
    colors=('f_dc_0', 'f_dc_1', 'f_dc_2'),
)
VALIDATE = """
const validator = require('gltf-validator'), fs = require('fs');
validator.validateBytes(new Uint8Array(fs.readFileSync(process.argv[1])))
    .then(report => console.log(JSON.stringify(report.issues)))
"""


class Splats(NamedTuple):
    "Gaussians in the world, as `rasterize` takes them."

    means: torch.Tensor  # (N,3) metres
    quats: torch.Tensor  # (N,4) wxyz
    scales: torch.Tensor  # (N,3) metres
    opacities: torch.Tensor  # (N,) 0..1
    colors: torch.Tensor  # (N,3)


def draw(splats, size=256):
    "Pictures from the front and from the side."
    center = face_centre(open_head())
    K = intrinsics(2.9 * size, size, size)
    white = torch.ones(1, 3)
    pictures = []
    for viewmat in (orbit(0, 0, 0.9, center), orbit(60, 20, 0.9, center)):
        rgb, _, _ = rasterize(*splats, viewmat[None], K[None], size, size, backgrounds=white)
        pictures.append(rgb[0].clamp(0, 1))
    return pictures


def vertices(path):
    "The vertex table of a PLY file."
    from plyfile import PlyData

    return PlyData.read(str(path))['vertex']


def by_plyfile(path):
    "Splats of a plain PLY."
    table = vertices(path)
    raw = {}
    for name, columns in PLY_COLUMNS.items():
        values = np.stack([np.asarray(table[column], np.float32) for column in columns], -1)
        raw[name] = torch.from_numpy(values)
    return Splats(
        raw['means'],
        raw['quats'],
        raw['scales'].exp(),
        raw['opacities'][:, 0].sigmoid(),
        (0.5 + SH0 * raw['colors']).clamp_min(0),
    )


def converted(path):
    "Splats of any splat file, by way of a plain PLY that splat-transform makes of it."
    out = path.with_name(path.name + '.plain.ply')
    npm = ['npm', 'exec', '--yes', f'--package={TRANSFORM}', '--']
    call = [*npm, 'splat-transform', '-w', str(path), str(out)]
    subprocess.run(call, check=True, capture_output=True, text=True)
    return by_plyfile(out)


def by_numpy(path):
    "Splats of an npz."
    with np.load(path) as arrays:
        return Splats(*(torch.from_numpy(arrays[name]) for name in SPLATS))


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def quats_of(R):
    "Quaternions wxyz of rotations, by SciPy."
    from scipy.spatial.transform import Rotation

    xyzw = Rotation.from_matrix(R.double().numpy()).as_quat()
    return torch.from_numpy(xyzw[:, [3, 0, 1, 2]]).float()


def gaussian_avatars(folder, verts, faces):
    """The world-space splats that GaussianAvatars' own formulas give: frame of the triangle, offset
    from its centre."""
    path = folder / 'point_cloud.ply'
    local = by_plyfile(path)
    binding = np.asarray(vertices(path)['binding_0']).astype('i8')
    corners = verts[faces[torch.from_numpy(binding)]]
    edge, other = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    a0 = unit(edge)
    a1 = unit(torch.linalg.cross(a0, other))
    a2 = -unit(torch.linalg.cross(a1, a0))
    size = (edge.norm(dim=-1) + (other * a2).sum(-1).abs()) / 2
    turn = quats_of(torch.stack([a0, a1, a2], -1))
    return Splats(
        size[:, None] * quat_rotate(turn, local.means) + corners.mean(1),
        quat_mul(turn, unit(local.quats)),
        local.scales * size[:, None],
        local.opacities,
        local.colors,
    )


def validated(path, folder):
    "How many errors, warnings and notes Khronos' validator has for a glTF file."
    npm = ['npm', 'install', '--prefix', str(folder), VALIDATOR]
    node = ['node', '-e', VALIDATE, str(path)]
    try:
        subprocess.run(npm, check=True, capture_output=True)
        done = subprocess.run(node, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f'not asked: {str(error)[:80]}'
    issues = json.loads(done.stdout)
    return {name: issues[name] for name in ('numErrors', 'numWarnings', 'numInfos')}


def mesh(avatar, folder):
    "What trimesh finds in the mesh for engines, and what the validator says."
    import trimesh

    path = write_glb(avatar, folder / 'head.glb')
    read = next(iter(trimesh.load(path).geometry.values()))
    vertex_ids, _, triangles = corners_of(avatar.head)
    off = np.abs(read.vertices - avatar.verts()[vertex_ids].numpy()).max()
    return dict(
        bytes=path.stat().st_size,
        vertices=len(read.vertices),
        triangles=len(read.faces),
        worst_vertex_mm=round(float(off * 1e3), 6),
        same_triangles=bool((read.faces == triangles.numpy()).all()),
        validator=validated(path, folder),
    )


def sharpened(resolution):
    "An avatar of a painted person, refined on its picture."
    camera = orbit(0, 0, 0.9, face_centre(open_head()))
    picture = paint(make_person(12), camera, intrinsics(740, 256, 256), 256)
    with torch.enable_grad():
        avatar, _ = refine_photo(from_frame(picture, resolution), picture, 100)
    return avatar


def readers():
    "Ending of a file -> who reads it, and the function that asks them."
    found = {'.ply': ('plyfile', by_plyfile), '.npz': ('NumPy', by_numpy)}
    if shutil.which('npm'):
        return found | {
            '.compressed.ply': (TRANSFORM, converted),
            '.splat': (TRANSFORM, converted),
        }
    print('no npm here: .splat and .compressed.ply are not read by anybody else')
    return found


def files(avatar, pose, world, folder):
    "Name of a format, who read it, the splats they found, and the bytes of the file."
    for ending, (reader, read) in readers().items():
        path = write_splats(folder / f'head{ending}', *world)
        yield ending, reader, read(path), path.stat().st_size
    written = write_sequence(avatar, [{}, pose], folder / 'frames')
    second = sorted(written.glob('frame_*'))[1]
    yield 'sequence, second frame', 'plyfile', by_plyfile(second), second.stat().st_size
    written = write_gaussian_avatar(avatar, folder / 'ga', [pose])
    splats = gaussian_avatars(written, avatar.verts(**pose), avatar.head.faces)
    size = sum(file.stat().st_size for file in written.iterdir())
    yield 'GaussianAvatars', "plyfile and its paper's formulas", splats, size


def row(reader, splats, size, truth):
    "One line of the table."
    dB = [float(psnr(theirs, ours)) for theirs, ours in zip(draw(splats), truth)]
    return dict(
        reader=reader,
        dB=[round(min(value, 150.0), 1) for value in dB],
        bytes=size,
        gaussians=len(splats[0]),
    )


def show(rows, n):
    "Print the table."
    titles = f'{"bytes each":>11}{"front dB":>10}{"side dB":>9}'
    print(f'{n:,} Gaussians\n{"format":24}{"read by":38}{titles}')
    for name, found in rows.items():
        front, side = found['dB']
        numbers = f'{found["bytes"] / n:11.1f}{front:10.1f}{side:9.1f}'
        print(f'{name:24}{found["reader"]:38}{numbers}')


def options():
    "What the command line asks for."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--resolution', type=int, default=128)
    parser.add_argument('--out', default='results/export.json')
    return parser.parse_args()


@torch.no_grad()
def main():
    given = options()
    common.set_threads(2)
    avatar = sharpened(given.resolution)
    pose = avatar.head.arkit(dict(jawOpen=0.4, mouthSmileLeft=0.6, mouthSmileRight=0.6))
    world = avatar.world(**pose)
    truth = draw(world)
    with tempfile.TemporaryDirectory() as folder:
        found = files(avatar, pose, world, Path(folder))
        rows = {name: row(reader, splats, size, truth) for name, reader, splats, size in found}
        glb = mesh(avatar, Path(folder))
    show(rows, len(avatar))
    print('.glb:', glb)
    result = dict(gaussians=len(avatar), formats=rows, glb=glb, machine=common.machine())
    common.save(given.out, result)


if __name__ == '__main__':
    main()

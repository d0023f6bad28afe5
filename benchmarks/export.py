"""Every file this kit exports, opened by somebody else's program, and rendered from what that program says.

    python benchmarks/export.py [--resolution 128] [--out results/export.json]

An avatar with an open mouth is written in each format. Its splats are read back by an independent reader (plyfile, NumPy; .splat and
compressed PLY are first converted by npm's @playcanvas/splat-transform), drawn from two sides and compared with the avatar: PSNR of
the whole picture. The mesh for engines is read by trimesh and, where npm can fetch it, checked by Khronos' gltf-validator.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

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


def draw(splats, size=256):
    "Pictures from the front and from the side."
    c = face_centre(open_head())
    K = intrinsics(2.9 * size, size, size)
    return [
        rasterize(*splats, V[None], K[None], size, size, backgrounds=torch.ones(1, 3))[0][0].clamp(
            0, 1
        )
        for V in (orbit(0, 0, 0.9, c), orbit(60, 20, 0.9, c))
    ]


def by_plyfile(path):
    "Splats of a plain PLY, and its vertex table."
    from plyfile import PlyData

    v = PlyData.read(str(path))['vertex']

    def col(*n):
        return torch.from_numpy(np.stack([np.asarray(v[k], np.float32) for k in n], -1))

    rgb = 0.5 + SH0 * col('f_dc_0', 'f_dc_1', 'f_dc_2')
    return (
        col('x', 'y', 'z'),
        col('rot_0', 'rot_1', 'rot_2', 'rot_3'),
        col('scale_0', 'scale_1', 'scale_2').exp(),
        col('opacity')[:, 0].sigmoid(),
        rgb.clamp_min(0),
    ), v


def converted(path):
    "A plain PLY made of any splat file by splat-transform."
    out = path.with_name(path.name + '.plain.ply')
    subprocess.run(
        [
            'npm',
            'exec',
            '--yes',
            f'--package={TRANSFORM}',
            '--',
            'splat-transform',
            '-w',
            str(path),
            str(out),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return by_plyfile(out)[0]


def by_numpy(path):
    with np.load(path) as d:
        return tuple(
            torch.from_numpy(d[k]) for k in ('means', 'quats', 'scales', 'opacities', 'colors')
        )


def gaussian_avatars(folder, verts, faces):
    """The world-space splats that GaussianAvatars' own formulas give: frame of the triangle, offset
    from its centre."""
    (x, q, s, o, c), v = by_plyfile(folder / 'point_cloud.ply')
    tri = verts[faces[torch.from_numpy(np.asarray(v['binding_0']).astype('i8'))]]

    def unit(a):
        return a / a.norm(dim=-1, keepdim=True)

    a0 = unit(tri[:, 1] - tri[:, 0])
    a1 = unit(torch.linalg.cross(a0, tri[:, 2] - tri[:, 0]))
    a2 = -unit(torch.linalg.cross(a1, a0))
    size = ((tri[:, 1] - tri[:, 0]).norm(dim=-1) + ((tri[:, 2] - tri[:, 0]) * a2).sum(-1).abs()) / 2
    from scipy.spatial.transform import Rotation

    R = torch.stack([a0, a1, a2], -1)
    Q = torch.from_numpy(
        Rotation.from_matrix(R.double().numpy()).as_quat()[:, [3, 0, 1, 2]]
    ).float()
    return (
        size[:, None] * quat_rotate(Q, x) + tri.mean(1),
        quat_mul(Q, unit(q)),
        s * size[:, None],
        o,
        c,
    )


def mesh(avatar, folder):
    "What trimesh finds in the mesh for engines, and what the validator says."
    import trimesh

    path = write_glb(avatar, folder / 'head.glb')
    m = next(iter(trimesh.load(path).geometry.values()))
    vid, _, triangles = corners_of(avatar.head)
    out = dict(
        bytes=path.stat().st_size,
        vertices=len(m.vertices),
        triangles=len(m.faces),
        worst_vertex_mm=round(
            float(np.abs(m.vertices - avatar.verts()[vid].numpy()).max() * 1e3), 6
        ),
        same_triangles=bool((m.faces == triangles.numpy()).all()),
    )
    script = (
        "const v=require('gltf-validator'),fs=require('fs');v.validateBytes(new "
        'Uint8Array(fs.readFileSync(process.argv[1]))).then(r=>console.log(JSON.stringify(r.issues)))'
    )
    try:
        subprocess.run(
            ['npm', 'install', '--prefix', str(folder), VALIDATOR], check=True, capture_output=True
        )
        done = subprocess.run(
            ['node', '-e', script, str(path)],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
        out['validator'] = {
            k: json.loads(done.stdout)[k] for k in ('numErrors', 'numWarnings', 'numInfos')
        }
    except (OSError, subprocess.CalledProcessError) as e:
        out['validator'] = f'not asked: {str(e)[:80]}'
    return out


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--resolution', type=int, default=128)
    p.add_argument('--out', default='results/export.json')
    a = p.parse_args()
    common.set_threads(2)
    picture = paint(
        make_person(12), orbit(0, 0, 0.9, face_centre(open_head())), intrinsics(740, 256, 256), 256
    )
    with torch.enable_grad():
        avatar, _ = refine_photo(from_frame(picture, a.resolution), picture, 100)
    pose = avatar.head.arkit(dict(jawOpen=0.4, mouthSmileLeft=0.6, mouthSmileRight=0.6))
    world = avatar.world(**pose)
    truth, rows = draw(world), {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        readers = {'.ply': ('plyfile', lambda p: by_plyfile(p)[0]), '.npz': ('NumPy', by_numpy)}
        if shutil.which('npm'):
            readers |= {'.compressed.ply': (TRANSFORM, converted), '.splat': (TRANSFORM, converted)}
        else:
            print('no npm here: .splat and .compressed.ply are not read by anybody else')

        def add(name, reader, splats, size):
            rows[name] = dict(
                reader=reader,
                dB=[round(min(float(psnr(b, t)), 150.0), 1) for b, t in zip(draw(splats), truth)],
                bytes=size,
                gaussians=len(splats[0]),
            )

        for end, (reader, read) in readers.items():
            path = write_splats(folder / f'head{end}', *world)
            add(end, reader, read(path), path.stat().st_size)
        frame = sorted(write_sequence(avatar, [{}, pose], folder / 'frames').glob('frame_*'))[1]
        add('sequence, second frame', 'plyfile', by_plyfile(frame)[0], frame.stat().st_size)
        ga = write_gaussian_avatar(avatar, folder / 'ga', [pose])
        add(
            'GaussianAvatars',
            "plyfile and its paper's formulas",
            gaussian_avatars(ga, avatar.verts(**pose), avatar.head.faces),
            sum(f.stat().st_size for f in ga.iterdir()),
        )
        glb = mesh(avatar, folder)
    print(
        f'{len(avatar):,} '
        f'Gaussians\n{"format":24}{"read by":38}{"bytes each":>11}{"front dB":>10}{"side dB":>9}'
    )
    for k, r in rows.items():
        print(
            f'{k:24}{r["reader"]:38}{r["bytes"] / len(avatar):11.1f}{r["dB"][0]:10.1f}{r["dB"][1]:9.1f}'
        )
    print('.glb:', glb)
    common.save(a.out, dict(gaussians=len(avatar), formats=rows, glb=glb, machine=common.machine()))


if __name__ == '__main__':
    main()

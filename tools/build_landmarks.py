"""Build spatialavatar0/assets/open_landmarks.npz: where MediaPipe's 478 face landmarks lie on the open head.

    python tools/build_landmarks.py [--model face_landmarker.task] [--out spatialavatar0/assets/open_landmarks.npz] [--picture FILE.png]

Nobody publishes this table for this head, so we measure it: paint 16 people from 13 sides, let MediaPipe find its landmarks, look up
in the z-buffer which triangle lies under each, and take a robust mean over people and views. Three precautions (all matter).
Landmarks slide along the silhouette when they are turned away, up to the nose: each is taken only from views that do not turn its side
away, those of the face's outline from nearly frontal views. Closed lips meet in one line: the inner lips are taken from open mouths.
And every landmark gets a spread `sigma`, so that a fit can weight it by 1/sigma. The result is symmetric. Needs the extra `track`; a minute.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from scipy.optimize import linear_sum_assignment
from spatialavatar0.ground.core import atomic_path, set_seed, to_uint8
from spatialavatar0.ground.geometry import intrinsics, orbit
from spatialavatar0.head.head import open_head
from spatialavatar0.pictures import people as synth
from spatialavatar0.splats.mesh import rasterize_mesh, vertex_normals

PEOPLE = 16
FIRST_SEED = 500
SIZE = 384
VIEWS = [(y, 0) for y in (-45, -30, -15, 0, 15, 30, 45)] + [
    (y, p) for y in (-20, 0, 20) for p in (-15, 15)
]
LIGHTS = [synth.STUDIO, synth.Light((0.5, 0.5, 0.7), 0.6, 0.4, in_room=False)]
IRIS = list(range(468, 478))
# MediaPipe's numbering of one side, and in the same order of the other; what is left is paired by
# position
RIGHT = dict(
    contour=[109, 67, 103, 54, 21, 162, 127, 234, 93, 132, 58, 172, 136, 150, 149, 176, 148],
    eyes=[33, 7, 163, 144, 145, 153, 154, 155, 133, 173, 157, 158, 159, 160, 161, 246],
    brows=[70, 63, 105, 66, 107, 55, 65, 52, 53, 46],
    lips_out=[61, 146, 91, 181, 84, 37, 39, 40, 185],
    lips_in=[78, 95, 88, 178, 87, 82, 81, 80, 191],
    nose=[97, 98, 129, 48, 115],
)
LEFT = dict(
    contour=[338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377],
    eyes=[263, 249, 390, 373, 374, 380, 381, 382, 362, 398, 384, 385, 386, 387, 388, 466],
    brows=[300, 293, 334, 296, 336, 285, 295, 282, 283, 276],
    lips_out=[291, 375, 321, 405, 314, 267, 269, 270, 409],
    lips_in=[308, 324, 318, 402, 317, 312, 311, 310, 415],
    nose=[326, 327, 358, 278, 344],
)
MIDDLE = dict(
    contour=[10, 152],
    eyes=[],
    brows=[],
    lips_out=[0, 17],
    lips_in=[13, 14],
    nose=[1, 2, 4, 5, 6, 19, 94, 168, 195, 197],
)
GROUPS = {**{k: RIGHT[k] + LEFT[k] + MIDDLE[k] for k in RIGHT}, 'iris': IRIS}
LOWER_LIP = [95, 88, 178, 87, 14, 317, 402, 318, 324]  # of the inner lips
FLOOR, UNSEEN, MIN_SEEN, OFF = (
    0.0015,
    0.05,
    12,
    8,
)  # metres, metres, observations, pixels beside the skin that still count as its edge
OPEN = {
    'jawOpen': 0.3
}  # every second person: only an open mouth tells the upper lip from the lower


# ---------------------------------------------------------------- look
def detector(model):
    "MediaPipe's face landmarker for single pictures: image (H,W,3) -> (478,2) pixels or None."
    import mediapipe as mp
    from mediapipe.tasks import python as tasks
    from mediapipe.tasks.python import vision

    options = vision.FaceLandmarkerOptions(
        base_options=tasks.BaseOptions(model_asset_path=str(model)), num_faces=1
    )
    landmarker = vision.FaceLandmarker.create_from_options(options)

    def detect(image):
        rgb = np.ascontiguousarray(to_uint8(image))
        h, w = rgb.shape[:2]
        found = landmarker.detect(
            mp.Image(image_format=mp.ImageFormat.SRGB, data=rgb)
        ).face_landmarks
        return np.array([[p.x * w, p.y * h] for p in found[0]]) if found else None

    detect.close = landmarker.close
    return detect


def camera(yaw, pitch, head):
    "A camera 55 cm from the middle of the head."
    return orbit(yaw, pitch, 0.55, synth.face_centre(head)), intrinsics(1.95 * SIZE, SIZE, SIZE)


def observe(person, params, view, light, head, detect):
    """One painted picture: for each landmark the triangle, barycentrics and facing (cosine) under
    it; -1 where there is none; or None."""
    viewmat, K = camera(*view, head)
    fine = 2
    lmks = detect(synth.paint(person, viewmat, K, SIZE, params=params, light=light).image)
    if lmks is None:
        return None
    verts = head(shape=person.shape, static_offset=person.static_offset, **params)[0]
    ids, bary, _ = rasterize_mesh(
        verts,
        head.faces,
        viewmat,
        K * torch.tensor([fine, fine, 1.0])[:, None],
        SIZE * fine,
        SIZE * fine,
    )
    t = np.full(478, -1)
    b = np.zeros((478, 3), np.float32)
    for which, names, off in (
        (np.arange(468), ('skin',), OFF),
        (np.array(IRIS), ('eye_l', 'eye_r'), 0.5),
    ):
        wanted = (ids >= 0) & torch.isin(
            head.parts[ids.clamp_min(0)], torch.tensor([head.part_names.index(n) for n in names])
        )
        t[which], b[which] = look_up(
            lmks[which] * fine, wanted.numpy(), ids.numpy(), bary.numpy(), off * fine
        )
    f = head.faces[torch.as_tensor(t).clamp_min(0)]

    def at(values):
        return (values[f] * torch.as_tensor(b)[..., None]).sum(1)

    to_eye = torch.nn.functional.normalize(-viewmat[:3, :3].T @ viewmat[:3, 3] - at(verts), dim=-1)
    facing = (
        torch.nn.functional.normalize(at(vertex_normals(verts, head.faces)), dim=-1) * to_eye
    ).sum(-1)
    return t, b, facing.numpy()


def look_up(xy, wanted, ids, bary, off):
    """Face and barycentrics at pixels (n,2), or at the nearest wanted pixel if that is at most
    `off` pixels away; else -1."""
    x, y = xy.astype(int).clip(0, len(ids) - 1).T
    gap, near = distance_transform_edt(~wanted, return_indices=True)
    gap = gap[y, x]
    y, x = near[:, y, x]
    return np.where(gap <= off, ids[y, x], -1), bary[y, x]


def observations(head, detect, people=PEOPLE):
    """All pictures: arrays (M,478) face ids, (M,478,3) barycentrics, (M,478) facing, and (M,2)
    person and view."""
    out, tags = [], []
    for p in range(people):
        person = synth.make_person(FIRST_SEED + p, head)
        person.static_offset = torch.zeros_like(person.static_offset)
        params = head.arkit(OPEN if p % 2 else {})
        for v, view in enumerate(VIEWS):
            o = observe(person, params, view, LIGHTS[p // 2 % 2], head, detect)
            if o is not None:
                out.append(o)
                tags.append((p, v))
    print(f'MediaPipe found the face in {len(out)} of {people * len(VIEWS)} pictures')
    return [np.stack(x) for x in zip(*out)] + [np.array(tags)]


# ---------------------------------------------------------------- average
def geometric_median(x, w, steps=30):
    """The point with the least weighted sum of distances (Weiszfeld); outliers hardly move it.
    Metres."""
    c = np.median(x, 0)
    for _ in range(steps):
        k = w / (np.linalg.norm(x - c, axis=1) + 5e-4)
        c = (k[:, None] * x).sum(0) / k.sum()
    return c


def average(points, ok, facing, tags):
    "Robust mean (478,3), spread (478,) in metres and number of observations of each landmark."
    yaw, pitch = np.array([VIEWS[v] for _, v in tags]).T
    opened = tags[:, 0] % 2 == 1
    mean = np.zeros((478, 3))
    spread = np.full(478, np.nan)
    seen = np.zeros(478, int)
    for i in range(478):
        if not (ok[:, i] & (yaw == 0)).any():
            continue
        side = np.median(points[ok[:, i] & (yaw == 0), i, 0])
        towards = (yaw * side >= 0) | (abs(side) < 0.02)  # not from the side that is turned away
        use, w = ok[:, i] & towards, facing[:, i] ** 2
        if i in GROUPS['contour']:
            use = use & (np.abs(yaw) <= 15) & (pitch == 0)
            w = np.ones(len(w))
        else:
            use &= facing[:, i] > 0.35
        if i in GROUPS['lips_in']:
            use &= opened
        seen[i] = use.sum()
        if seen[i] < MIN_SEEN:
            continue
        x = points[use, i]
        mean[i] = geometric_median(x, w[use])
        spread[i] = np.median(np.linalg.norm(x - mean[i], axis=1))
    return mean, spread, seen


def mirror_table(mean):
    "Each landmark's twin on the other side, by the best one-to-one matching of mirrored positions."
    mirror = np.arange(478)
    for k in RIGHT:
        mirror[RIGHT[k]] = LEFT[k]
        mirror[LEFT[k]] = RIGHT[k]
    rest = np.setdiff1d(np.arange(468), sum(GROUPS.values(), []))
    for ids in (rest, np.array(IRIS)):
        cost = np.linalg.norm(mean[ids][:, None] - mean[ids][None] * [-1, 1, 1], axis=-1)
        mirror[ids] = ids[linear_sum_assignment(cost + cost.T)[1]]
    assert (mirror[mirror] == np.arange(478)).all(), 'the mirror table is not an involution'
    return mirror


def closest(p, tri):
    "Closest point to p on triangles (F,3,3): (index, barycentrics, distance)."
    a = tri[:, 0]
    ab = tri[:, 1] - tri[:, 0]
    ac = tri[:, 2] - tri[:, 0]
    ap = p - a
    g = np.stack(
        [(ab * ab).sum(1), (ab * ac).sum(1), (ac * ac).sum(1), (ab * ap).sum(1), (ac * ap).sum(1)]
    )
    det = np.maximum(g[0] * g[2] - g[1] ** 2, 1e-30)
    v = (g[2] * g[3] - g[1] * g[4]) / det
    w = (g[0] * g[4] - g[1] * g[3]) / det
    cand = [np.stack([1 - v - w, v, w], 1)]
    for i, j in ((0, 1), (1, 2), (2, 0)):  # the three edges
        e = tri[:, j] - tri[:, i]
        t = (((p - tri[:, i]) * e).sum(1) / np.maximum((e * e).sum(1), 1e-30)).clip(0, 1)
        b = np.zeros((len(tri), 3))
        b[:, i], b[:, j] = 1 - t, t
        cand.append(b)
    cand = np.stack(cand, 1)
    d = np.linalg.norm((cand[..., None] * tri[:, None]).sum(2) - p, axis=-1)
    d[(cand < -1e-9).any(-1)] = np.inf
    k = d.argmin()
    return k // 4, cand.reshape(-1, 3)[k], d.flat[k]


def snap(points, which, verts, faces):
    "Points onto the triangles `which[i]`: face ids, barycentrics, distances."
    out = [closest(p, verts[faces[w]]) for p, w in zip(points, which)]
    return (
        np.array([w[k] for (k, _, _), w in zip(out, which)]),
        np.stack([b for _, b, _ in out]),
        np.array([d for *_, d in out]),
    )


# ---------------------------------------------------------------- build
def build(head, detect):
    "The table, and what it was measured from."
    ids, bary, facing, tags = observations(head, detect)
    verts = head()[0].numpy().astype(float)
    faces = head.faces.numpy()
    parts = np.asarray(head.parts)
    points = (verts[faces[ids.clip(0)]] * bary[..., None]).sum(2)

    def label(*n):
        return np.isin(parts, [head.part_names.index(x) for x in n])

    skin = np.flatnonzero(label('skin'))
    eyes = [np.flatnonzero(label(n)) for n in ('eye_l', 'eye_r')]
    ok = ids >= 0
    mean, spread, seen = average(points, ok, facing, tags)
    valid = seen >= MIN_SEEN
    mirror = mirror_table(mean)
    valid &= valid[mirror]
    apart = np.linalg.norm(mean - mean[mirror] * [-1, 1, 1], axis=1)[valid]
    assert apart.max() < 0.012, f'twins {apart.max() * 1e3:.0f} mm apart'
    both = (mean + mean[mirror] * [-1, 1, 1]) / 2
    spread = np.fmax(spread, spread[mirror])
    where = [skin if i < 468 else eyes[int(i < 473)] for i in range(478)]
    swing = (head(**head.arkit({'jawOpen': 1.0})) - head())[0].norm(dim=-1).numpy()[faces].mean(1)
    jaw = swing[skin] > 0.35 * swing.max()
    for i in set(GROUPS['lips_in']) - {78, 308}:
        where[i] = skin[
            jaw == (i in LOWER_LIP)
        ]  # at rest the lips touch: the opening jaw tells one from the other
    face_ids, b, gap = snap(both, where, verts, faces)
    sigma = np.where(valid, np.fmax(spread, FLOOR), UNSEEN)
    sigma[gap > 0.003] = np.maximum(sigma[gap > 0.003], 0.006)
    table = dict(
        face_ids=face_ids.astype(np.int32),
        bary=b.round(6).astype(np.float32),
        sigma=sigma.round(6).astype(np.float32),
        contour=np.isin(np.arange(478), GROUPS['contour']),
        valid=valid,
        mirror=mirror.astype(np.int32),
    )
    return table, dict(points=points, ok=ok, facing=facing, tags=tags, spread=spread, gap=gap)


def write_npz(path, arrays):
    "An npz which is the same file, byte for byte, for the same arrays."
    import io
    import zipfile

    with atomic_path(path) as tmp, zipfile.ZipFile(tmp, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, a in arrays.items():
            buf = io.BytesIO()
            np.lib.format.write_array(buf, np.ascontiguousarray(a), version=(1, 0))
            z.writestr(
                zipfile.ZipInfo(f'{name}.npy', (1980, 1, 1, 0, 0, 0)),
                buf.getvalue(),
                zipfile.ZIP_DEFLATED,
            )


# ---------------------------------------------------------------- report
def split_half(raw):
    "Distance between the tables of the first and the second half of the people, metres."
    half = [
        average(
            *(
                raw[k][(raw['tags'][:, 0] < PEOPLE // 2) == h]
                for k in ('points', 'ok', 'facing', 'tags')
            )
        )[0]
        for h in (True, False)
    ]
    d = np.linalg.norm(half[0] - half[1], axis=1)
    return d[(half[0] != 0).any(1) & (half[1] != 0).any(1)]


def report(table, raw):
    "Numbers per group, in millimetres."
    mm = raw['spread'] * 1e3
    v = table['valid']
    print(
        f'usable {v.sum()} of 478; median spread {np.nanmedian(mm[v]):.2f} mm, split-half {np.median(split_half(raw)) * 1e3:.2f} mm, '
        f'distance to the mesh median {np.median(raw["gap"][v]) * 1e3:.2f} mm; unusable: {np.flatnonzero(~v).tolist()}'
    )
    rest = sorted(set(range(478)) - set(sum(GROUPS.values(), [])))
    for name, ids in {**GROUPS, 'rest': rest}.items():
        ids = np.array(ids)
        u = ids[v[ids]]
        print(
            f'{name:9} usable {len(u):3} of {len(ids):3}  median {np.median(mm[u]):.2f}  p90 '
            f'{np.quantile(mm[u], 0.9):.2f} mm'
        )


def picture(table, head, path):
    """The landmarks on the grey head, front and side: green below 2 mm, orange below 4, red above,
    blue: contour."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from spatialavatar0.ground.geometry import project
    from spatialavatar0.splats.mesh import shade_mesh, visible_points

    verts = head()[0]
    p = (verts[head.faces[table['face_ids']]] * torch.as_tensor(table['bary'])[..., None]).sum(1)
    fig, axs = plt.subplots(1, 2, figsize=(18, 9.3), layout='constrained')
    for ax, yaw in zip(axs, (0, 50)):
        V, _ = camera(yaw, 0, head)
        K = intrinsics(1900, 900, 900)
        ax.imshow(shade_mesh(verts, head.faces, V, K, 900, 900)[0])
        ax.axis('off')
        see = (
            visible_points(p, rasterize_mesh(verts, head.faces, V, K, 900, 900)[2], V, K).numpy()
            & table['valid']
        )
        xy = project(p, V, K)[0].numpy()
        s = table['sigma']
        colour = np.where(
            table['contour'],
            'royalblue',
            np.where(s < 0.002, 'green', np.where(s < 0.004, 'darkorange', 'red')),
        )
        ax.scatter(*xy[see].T, s=9, c=colour[see])
        for i in np.flatnonzero(see):
            ax.annotate(str(i), xy[i], fontsize=4.5)
    fig.savefig(path, dpi=100)


if __name__ == '__main__':
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument(
        '--model', help='face_landmarker.task; default: the asset face_landmarker of the manifest'
    )
    args.add_argument(
        '--out',
        default=Path(__file__).parents[1] / 'spatialavatar0/assets/open_landmarks.npz',
        type=Path,
    )
    args.add_argument('--picture', type=Path, help='also draw the table here')
    args = args.parse_args()
    set_seed(0)
    head = open_head()
    if args.model is None:
        from spatialavatar0.ground.assets import asset

        args.model = asset('face_landmarker')
    detect = detector(args.model)
    table, raw = build(head, detect)
    detect.close()
    write_npz(args.out, table)
    report(table, raw)
    print(f'wrote {args.out} ({args.out.stat().st_size / 1e3:.0f} kB)')
    if args.picture:
        picture(table, head, args.picture)

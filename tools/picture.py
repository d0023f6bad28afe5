"""The README's pictures, from the results of the demo.

spatialavatar0 demo --out demo && python tools/picture.py demo
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from spatialavatar0.avatar.avatar import Avatar, head_square
from spatialavatar0.capture.track import fit
from spatialavatar0.ground.core import to_uint8
from spatialavatar0.ground.geometry import crop_intrinsics
from spatialavatar0.use.animate import both, render_motion, swing, turn, write_film

OUT = Path(__file__).resolve().parents[1] / 'nbs' / 'images'
ROWS = [
    [
        ('photo', 0, {}),
        ('', 0, dict(mouthSmile=0.75, cheekSquint=0.3)),
        ('', -45, dict(mouthSmile=0.75, cheekSquint=0.3)),
        ('', 45, dict(mouthSmile=0.75, cheekSquint=0.3)),
    ],
    [
        ('', -20, dict(jawOpen=0.65)),
        ('', 0, dict(eyeBlink=1.0)),
        ('', 75, dict(mouthSmile=0.75)),
        ('', 25, dict(browInnerUp=0.9, mouthPucker=0.7)),
    ],
]


def main(folder, n=300, cut=0.11):
    import skimage.data

    avatar = Avatar.load(Path(folder) / 'avatar.safetensors')
    cam = avatar.info['camera']
    size = cam['size']
    V = torch.tensor(cam['viewmat'])
    K0 = torch.tensor(cam['K'])
    v = avatar.verts()
    middle = ((v.amin(0) + v.amax(0)) / 2 * v.new_tensor([0, 1, 1])).tolist()

    def camera(px):
        return crop_intrinsics(K0, size * cut, size * cut, px / (size * (1 - 2 * cut)))

    def cell(what, yaw, weights):
        if what != 'photo':
            return to_uint8(
                avatar.render(
                    turn(V, yaw, 0, middle),
                    camera(n),
                    n,
                    n,
                    background=1.0,
                    **avatar.head.arkit(both(**weights)),
                )[0]
            )
        photo = skimage.data.astronaut()
        x, y, side = head_square(fit(photo))
        box = [x + side * cut, y + side * cut, x + side * (1 - cut), y + side * (1 - cut)]
        return np.asarray(
            Image.fromarray(photo)
            .crop([int(b) for b in box])
            .resize((n, n), Image.Resampling.LANCZOS)
        )

    OUT.mkdir(exist_ok=True)
    Image.fromarray(
        np.concatenate([np.concatenate([cell(*c) for c in row], 1) for row in ROWS], 0)
    ).save(OUT / 'head.jpg', quality=88)
    smile = avatar.head.arkit(both(mouthSmile=0.75, cheekSquint=0.3))
    frames = render_motion(
        avatar,
        [turn(V, y, p, middle) for y, p in swing(36, 55)],
        [smile] * 36,
        camera(176),
        176,
        176,
    )
    write_film(frames, OUT / 'turntable.gif', 12)


if __name__ == '__main__':
    main(*sys.argv[1:])

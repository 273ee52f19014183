"""The pictures that the built-in model is trained on: cartoon portraits, drawn here.

A `Portrait` says what is in a picture, `sample` draws one by chance, `draw` renders it. Everything
that a prompt can ask for is a field of `Portrait`; everything else (place, tilt, shades, the side
of the parting) is chance, so that the model has something to vary with the seed.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import skia

SIZE = 128

HAIR_COLORS = {
    "black": (36, 32, 38), "brown": (118, 72, 40), "blonde": (242, 208, 104),
    "red": (204, 72, 30), "gray": (206, 208, 214), "pink": (240, 118, 182),
    "blue": (58, 104, 214),
}
SKINS = {
    "pale": (253, 226, 206), "tan": (230, 178, 132), "brown": (164, 108, 72), "dark": (108, 70, 50),
}
BACKGROUNDS = {
    "red": (212, 62, 60), "orange": (246, 150, 54), "yellow": (252, 222, 92),
    "green": (94, 184, 102), "blue": (86, 148, 234), "purple": (150, 100, 206),
    "pink": (250, 166, 200), "gray": (164, 168, 176),
}
SHIRTS = {
    "red": (206, 50, 54), "orange": (242, 138, 40), "yellow": (248, 214, 66),
    "green": (72, 168, 84), "blue": (62, 122, 222), "purple": (134, 82, 196),
    "pink": (246, 146, 188), "white": (246, 246, 248), "black": (46, 46, 54),
}
STYLES = {
    "girl": ("long", "short", "ponytail", "bun", "curly"),
    "boy": ("short", "spiky", "curly"),
}
GLASSES = ("none", "glasses", "sunglasses")
HATS = ("none", "cap", "beanie", "crown", "top hat")
MOUTHS = ("smile", "neutral", "surprised")


@dataclass(frozen=True)
class Portrait:
    """What is in a picture; `hat_color` counts for a cap and a beanie only."""

    person: str
    style: str
    hair: str
    skin: str
    glasses: str
    hat: str
    hat_color: str
    mouth: str
    beard: bool
    shirt: str
    background: str

    def held_out(self):
        """Whether the pair of hair and background is one that training never sees (8 of 56)."""
        hair = list(HAIR_COLORS).index(self.hair)
        background = list(BACKGROUNDS).index(self.background)
        return (hair + 3 * background) % 7 == 2


def sample(chance, held_out=False):
    """A portrait by chance, its pair of hair and background held out or not as asked."""
    while True:
        person = chance.choice(("girl", "boy"))
        portrait = Portrait(
            person=person,
            style=chance.choice(STYLES[person]),
            hair=chance.choice(list(HAIR_COLORS)),
            skin=chance.choice(list(SKINS)),
            glasses=chance.choices(GLASSES, (50, 28, 22))[0],
            hat=chance.choices(HATS, (48, 13, 13, 13, 13))[0],
            hat_color=chance.choice(list(SHIRTS)),
            mouth=chance.choices(MOUTHS, (45, 30, 25))[0],
            beard=person == "boy" and chance.random() < 0.3,
            shirt=chance.choice(list(SHIRTS)),
            background=chance.choice(list(BACKGROUNDS)),
        )
        if portrait.held_out() == held_out:
            return portrait


def draw(portrait, chance):
    """The picture of `portrait`: (128, 128, 3) of uint8, RGB."""
    surface = skia.Surface(SIZE, SIZE)
    Painter(surface.getCanvas(), portrait, chance).paint()
    pixels = surface.toarray(colorType=skia.ColorType.kRGBA_8888_ColorType)
    return np.ascontiguousarray(pixels[:, :, :3])


def shade(rgb, factor=1.0, jitter=None):
    """A colour made darker (`factor` < 1) or lighter, with a little chance where asked."""
    off = [jitter.uniform(-6, 6) if jitter else 0.0 for _ in rgb]
    return tuple(max(0, min(255, int(v * factor + o))) for v, o in zip(rgb, off))


def fill(rgb, alpha=255):
    return skia.Paint(AntiAlias=True, Color=skia.Color(*rgb, alpha))


def line(rgb, width):
    paint = fill(rgb)
    paint.setStyle(skia.Paint.kStroke_Style)
    paint.setStrokeWidth(width)
    paint.setStrokeCap(skia.Paint.kRound_Cap)
    return paint


class Painter:
    """One drawing: the origin is between the eyes, and a unit is about one pixel."""

    def __init__(self, canvas, portrait, chance):
        self.canvas, self.portrait, self.chance = canvas, portrait, chance
        self.girl = portrait.person == "girl"
        self.width = 27 if self.girl else 29  # half of the face's
        self.skin = shade(SKINS[portrait.skin], 1.0, chance)
        self.hair = shade(HAIR_COLORS[portrait.hair], 1.0, chance)
        self.side = chance.choice((-1, 1))

    def paint(self):
        self.backdrop()
        chance = self.chance
        self.canvas.translate(64 + chance.uniform(-3, 3), 61 + chance.uniform(-2.5, 2.5))
        scale = 1.06 * chance.uniform(0.96, 1.05)
        self.canvas.scale(scale, scale)
        self.canvas.rotate(chance.uniform(-2.5, 2.5))
        self.back_hair()
        self.body()
        self.head()
        if self.portrait.beard:
            self.beard()
        self.eyes()
        self.mouth()
        self.front_hair()
        if self.portrait.glasses != "none":
            self.glasses()
        if self.portrait.hat != "none":
            self.hat()

    def oval(self, x, y, rx, ry, paint):
        self.canvas.drawOval(skia.Rect.MakeLTRB(x - rx, y - ry, x + rx, y + ry), paint)

    def path(self, paint, *points):
        """A curve through `points`: the first is where it starts, then 2, 4 or 6 numbers each."""
        path = skia.Path()
        path.moveTo(*points[0])
        for point in points[1:]:
            {2: path.lineTo, 4: path.quadTo, 6: path.cubicTo}[len(point)](*point)
        self.canvas.drawPath(path, paint)

    def backdrop(self):
        rgb = BACKGROUNDS[self.portrait.background]
        top, bottom = shade(rgb, 1.04, self.chance), shade(rgb, 0.93, self.chance)
        paint = skia.Paint(AntiAlias=True)
        ends = [skia.Point(0, 0), skia.Point(0, SIZE)]
        colors = [skia.Color(*top), skia.Color(*bottom)]
        paint.setShader(skia.GradientShader.MakeLinear(ends, colors))
        self.canvas.drawPaint(paint)

    def back_hair(self):
        dark, side, w = fill(shade(self.hair, 0.84)), self.side, self.width
        style = self.portrait.style
        if style == "long":
            end = self.chance.uniform(50, 60)
            self.path(dark, (-w - 9, -4), (-w - 10, -52, w + 10, -52, w + 9, -4),
                      (w + 12, 20, w + 14, end - 16, w + 8, end), (-w - 8, end),
                      (-w - 14, end - 16, -w - 12, 20, -w - 9, -4))
        elif style == "ponytail":
            self.path(dark, (side * 14, -34), (side * 54, -46, side * 60, 4, side * 46, 42),
                      (side * 42, 22, side * 38, -2, side * 16, -10))
        elif style == "bun":
            self.oval(0, -46, 15, 13, dark)
        elif style == "curly":
            for i in range(13):
                angle = math.pi * (-0.12 + 1.24 * i / 12)
                self.oval(math.cos(angle) * (w + 6), -8 - math.sin(angle) * (w + 4), 11, 11, dark)
            for x in (-w - 6, w + 6) if self.girl else ():
                for i in range(3):
                    self.oval(x, 6 + i * 9, 10, 9.5, dark)

    def body(self):
        rgb = SHIRTS[self.portrait.shirt]
        w = 38 if self.girl else 46
        self.canvas.drawRect(skia.Rect.MakeLTRB(-9, 18, 9, 46), fill(shade(self.skin, 0.84)))
        self.path(fill(shade(rgb, 1.0, self.chance)),
                  (-w - 6, 90), (-w - 3, 50, -w + 8, 42, -14, 38),
                  (-8, 49, 8, 49, 14, 38), (w - 8, 42, w + 3, 50, w + 6, 90))
        self.path(line(shade(rgb, 0.76), 2.6), (-14, 38), (-8, 49, 8, 49, 14, 38))

    def head(self):
        w = self.width
        for x in (-w, w):
            self.oval(x, 3, 5.5, 7, fill(shade(self.skin, 0.86)))
        chin, jaw = (33, 14) if self.girl else (35, 18)
        self.path(fill(self.skin), (-w, -8), (-w, -42, w, -42, w, -8), (w, 17, jaw, chin, 0, chin),
                  (-jaw, chin, -w, 17, -w, -8))
        if self.girl:
            for x in (-17, 17):
                self.oval(x, 13, 5.5, 3.8, fill((240, 110, 110), 80))

    def beard(self):
        w = self.width
        self.path(fill(shade(self.hair, 0.9)), (-w, 2), (-w - 1, 24, -17, 41, 0, 41),
                  (17, 41, w + 1, 24, w, 2), (w - 6, 16, 11, 11, 0, 12),
                  (-11, 11, -w + 6, 16, -w, 2))

    def eyes(self):
        iris = self.chance.choice(((70, 46, 34), (58, 100, 160), (64, 122, 74)))
        for x in (-12, 12):
            if self.portrait.glasses != "sunglasses":
                self.oval(x, 0, 6, 6.4, fill((255, 255, 255)))
                self.oval(x, 0.6, 4, 4.6, fill(iris))
                self.oval(x, 0.6, 2.2, 2.7, fill((20, 16, 16)))
                if self.girl:
                    lash = line((34, 26, 28), 2.2)
                    self.path(lash, (x - 6.5, -3), (x - 3, -8, x + 3, -8, x + 6.5, -3))
            brow = line(shade(self.hair, 0.7), 2.2 if self.girl else 3)
            self.path(brow, (x - 5.5, -12), (x, -14.5, x + 5.5, -12))

    def mouth(self):
        red = (190, 48, 62) if self.girl else (140, 54, 50)
        self.path(line(shade(self.skin, 0.78), 2), (-2.2, 9.5), (0, 11.5, 2.2, 9.5))
        if self.portrait.mouth == "smile":
            self.path(fill(red), (-11, 16), (0, 18, 11, 16), (0, 34, -11, 16))
            self.path(fill((255, 255, 255)), (-8, 17.2), (0, 19, 8, 17.2), (0, 23.5, -8, 17.2))
        elif self.portrait.mouth == "surprised":
            self.oval(0, 22, 5.4, 6.6, fill((90, 24, 30)))
        else:
            self.path(line(red, 3), (-8, 21), (8, 21))

    def front_hair(self):
        style, paint, k = self.portrait.style, fill(self.hair), self.side
        w = self.width
        shine = line(shade(self.hair, 1.0 if min(self.hair) > 180 else 1.25), 2.4)
        if style == "curly":
            for i in range(8):
                angle = math.pi * (0.06 + 0.88 * i / 7)
                self.oval(math.cos(angle) * (w - 1), -14 - math.sin(angle) * 18, 9, 8.6, paint)
        elif style == "spiky":
            self.spikes(paint)
        elif self.girl:
            low = {"long": 14, "short": 22, "ponytail": -2, "bun": -2}[style]
            out = w + (9 if style == "short" else 5)
            self.path(paint, (-k * out, low),
                      (-k * (out + 4), -54, k * (out + 4), -54, k * out, low),
                      (k * (w - 1), low - 6, k * (w - 1), -8, k * 17, -24),
                      (k * 8, -13, -k * (w - 6), -15, -k * (w - 1), -7),
                      (-k * (w - 1), 0, -k * w, low - 4, -k * out, low))
            self.path(shine, (-17, -32), (-4, -40, 11, -35))
        else:
            self.path(paint, (-k * (w + 2), -1),
                      (-k * (w + 8), -52, k * (w + 8), -52, k * (w + 2), -1),
                      (k * (w - 2), -11), (k * 18, -26, -k * 8, -15, -k * (w - 4), -15))
            self.path(shine, (-15, -32), (-2, -39, 11, -34))

    def spikes(self, paint):
        w, points = self.width, [(-self.width - 2, -3)]
        edges = np.linspace(-w - 6, w + 6, 7)
        for i in range(6):
            rise = math.sin(math.pi * (i + 0.5) / 6)
            tip = edges[i] * 1.12 + self.chance.uniform(-2, 2)
            points.append((tip, -32 - 20 * rise + self.chance.uniform(-3, 3)))
            points.append(((edges[i] + edges[i + 1]) / 2 + 4, -28 - 7 * rise))
        points += [(w + 8, -38), (w + 2, -3), (w - 4, -16), (10, -13, -10, -25, -w + 4, -15)]
        self.path(paint, *points)

    def glasses(self):
        frame = line((28, 28, 34), 2.8)
        for x in (-12.5, 12.5):
            if self.portrait.glasses == "sunglasses":
                self.oval(x, 0, 10.8, 9.4, fill((26, 26, 32)))
                self.path(line((150, 152, 172), 2), (x - 5, -3), (x - 1, -5.5))
            else:
                self.oval(x, 0, 10.4, 9.8, fill((255, 255, 255), 60))
                self.oval(x, 0, 10.4, 9.8, frame)
            self.path(frame, (math.copysign(22.5, x), -1), (math.copysign(self.width, x), -3))
        self.path(frame, (-2.4, -1), (2.4, -1))

    def hat(self):
        kind, rgb = self.portrait.hat, SHIRTS[self.portrait.hat_color]
        color, dark, w = fill(shade(rgb, 1.0, self.chance)), fill(shade(rgb, 0.78)), self.width + 6
        if kind == "cap":
            self.path(color, (-w, -18), (-w, -58, w, -58, w, -18))
            k = self.side
            self.path(dark, (-k * w, -19), (0, -27, k * w, -19),
                      (k * (w + 10), -13, k * (w + 13), -8, k * (w + 5), -9), (0, -17, -k * w, -14))
        elif kind == "beanie":
            self.path(color, (-w, -19), (-w, -62, w, -62, w, -19))
            band = skia.Rect.MakeLTRB(-w - 2, -28, w + 2, -16)
            self.canvas.drawRoundRect(band, 5, 5, dark)
            self.oval(0, -51, 7, 7, fill(shade(rgb, 0.5 if min(rgb) > 200 else 1.3)))
        elif kind == "top hat":
            self.canvas.drawRect(skia.Rect.MakeLTRB(-22, -66, 22, -24), fill((36, 34, 42)))
            self.canvas.drawRect(skia.Rect.MakeLTRB(-22, -37, 22, -28), fill((184, 42, 52)))
            self.oval(0, -25, 41, 6.5, fill((36, 34, 42)))
        else:
            self.path(fill((250, 202, 44)), (-24, -22), (-29, -52), (-13, -39), (0, -58), (13, -39),
                      (29, -52), (24, -22))
            self.path(line((216, 152, 24), 4), (-24, -23.5), (24, -23.5))
            for x, jewel in ((-14, (220, 40, 60)), (0, (50, 110, 230)), (14, (220, 40, 60))):
                self.oval(x, -31, 3.4, 3.4, fill(jewel))


def main():
    """Writes a sheet of sixty portraits to the file that is named: what the data looks like."""
    import sys

    from PIL import Image

    chance = random.Random(0)
    pictures = [draw(sample(chance), chance) for _ in range(60)]
    rows = [np.concatenate(pictures[i : i + 10], 1) for i in range(0, 60, 10)]
    Image.fromarray(np.concatenate(rows, 0)).save(sys.argv[1])


if __name__ == "__main__":
    main()

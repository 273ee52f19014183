"""The ways people ask for a portrait: `caption` says what a picture shows, in varied words.

Glasses, hats and beards are always said, so that leaving them out of a prompt leaves them out of
the picture; hair, skin, mouth, shirt and background are left out now and then, and chance decides.
"""

import re

PEOPLE = {
    "girl": ("girl", "girl", "girl", "woman", "woman", "lady", "young woman", "young girl"),
    "boy": ("boy", "boy", "boy", "man", "man", "guy", "young man", "young boy"),
}
PRAISE = {"girl": ("pretty", "beautiful", "cute", "lovely"), "boy": ("handsome", "cute", "cool")}
OPENINGS = (
    "portrait of a", "portrait of a", "portrait of a", "a portrait of a", "cartoon portrait of a",
    "a cartoon of a", "drawing of a", "picture of a", "illustration of a", "photo of a", "a", "",
)
COLOR_WORDS = {"gray": ("gray", "grey")}
HAIR_WORDS = {
    "blonde": ("blonde", "blonde", "blond", "golden"), "red": ("red", "red", "ginger"),
    "gray": ("gray", "grey", "silver", "white"), "black": ("black", "black", "dark"),
}
SKIN_WORDS = {
    "pale": ("pale skin", "light skin", "fair skin"), "tan": ("tan skin", "tanned skin"),
    "brown": ("brown skin",), "dark": ("dark skin", "black skin"),
}
MOUTH_WORDS = {
    "smile": ("smiling", "smiling", "a smile", "a big smile", "happy", "laughing"),
    "neutral": ("serious", "calm", "neutral expression", "not smiling"),
    "surprised": ("surprised", "shocked", "open mouth", "amazed"),
}
GARMENTS = ("shirt", "shirt", "shirt", "t-shirt", "sweater", "top")
STYLE_WORDS = {
    "long": ("long {} hair", "long, {} hair", "{} long hair"),
    "short": ("short {} hair", "short, {} hair", "{} short hair"),
    "curly": ("curly {} hair", "{} curly hair", "{} curls"),
    "spiky": ("spiky {} hair", "{} spiky hair"),
    "ponytail": ("a {} ponytail", "{} hair in a ponytail", "{} ponytail"),
    "bun": ("{} hair in a bun", "a {} bun", "{} hair tied in a bun"),
}
FILLERS = (
    "highly detailed", "4k", "8k", "masterpiece", "best quality", "digital art", "studio lighting",
    "vector art", "flat design", "simple", "centered", "sharp focus", "trending on artstation",
    "professional", "colorful", "minimalist", "soft light", "close up", "looking at the viewer",
    "high resolution", "beautiful", "elegant", "anime style", "oil painting", "realistic",
)
LETTERS = "eeeaaarrriiiooottnnnsslldcumpgbhfywkvxzjq"


def color(word, chance):
    return chance.choice(COLOR_WORDS.get(word, (word,)))


def hair(portrait, chance):
    word = chance.choice(HAIR_WORDS.get(portrait.hair, (portrait.hair,)))
    if chance.random() < 0.12:
        return f"{word} hair"
    return chance.choice(STYLE_WORDS[portrait.style]).format(word)


def hat(portrait, chance):
    colored = portrait.hat in ("cap", "beanie") and chance.random() < 0.85
    name = f"{color(portrait.hat_color, chance)} {portrait.hat}" if colored else portrait.hat
    return chance.choice((f"a {name}", f"wearing a {name}", name))


def details(portrait, chance):
    """What is said of a portrait besides who it is, hair first, by chance."""
    said = []
    if portrait.glasses != "none":
        name = portrait.glasses
        said.append(chance.choice((name, name, f"wearing {name}")))
    if portrait.hat != "none":
        said.append(hat(portrait, chance))
    if portrait.beard:
        said.append(chance.choice(("a beard", "beard", "a full beard")))
    if chance.random() < 0.75:
        said.append(chance.choice(MOUTH_WORDS[portrait.mouth]))
    if chance.random() < 0.65:
        said.append(chance.choice(SKIN_WORDS[portrait.skin]))
    if chance.random() < 0.78:
        name = f"{color(portrait.shirt, chance)} {chance.choice(GARMENTS)}"
        said.append(chance.choice((name, f"a {name}", f"wearing a {name}")))
    if chance.random() < 0.82:
        name = color(portrait.background, chance)
        said.append(chance.choice((f"{name} background",) * 3 + (f"on a {name} background",
                                  f"{name} backdrop", f"in front of a {name} wall")))
    chance.shuffle(said)
    if chance.random() < 0.9:
        said.insert(0 if chance.random() < 0.75 else chance.randint(0, len(said)),
                    hair(portrait, chance))
    return said


def strange(chance):
    """What the model cannot know: words that it has to learn to pass over."""
    if chance.random() < 0.7:
        return chance.choice(FILLERS)
    word = lambda: "".join(chance.choice(LETTERS) for _ in range(chance.randint(3, 8)))
    return " ".join(word() for _ in range(chance.randint(1, 2)))


def caption(portrait, chance):
    opening, person = chance.choice(OPENINGS), chance.choice(PEOPLE[portrait.person])
    praise = chance.choice(PRAISE[portrait.person]) if chance.random() < 0.35 else ""
    start = " ".join(word for word in (opening, praise, person) if word)
    parts = details(portrait, chance)
    for _ in range(chance.choices((0, 1, 2), (82, 12, 6))[0]):
        parts.insert(chance.randint(0, len(parts)), strange(chance))
    form = chance.random()
    if form < 0.5 and parts:
        text = f"{start} with {parts[0]}"
        if len(parts) > 1:
            joint = chance.choice((" and ", " and ", ", "))
            text += joint + ", ".join(parts[1:])
    elif form < 0.9:
        text = ", ".join([start, *parts])
    else:
        text = " ".join([start, *parts])
    text = re.sub(r"\ba (?=[aeio])", "an ", text)
    return text.capitalize() if chance.random() < 0.5 else text


def plain(portrait):
    """The same for every portrait: everything that is promised, said once."""
    parts = [STYLE_WORDS[portrait.style][0].format(portrait.hair)]
    if portrait.glasses != "none":
        parts.append(portrait.glasses)
    if portrait.hat != "none":
        color_of_hat = f"{portrait.hat_color} " if portrait.hat in ("cap", "beanie") else ""
        parts.append(f"a {color_of_hat}{portrait.hat}")
    if portrait.beard:
        parts.append("a beard")
    parts += [MOUTH_WORDS[portrait.mouth][0], SKIN_WORDS[portrait.skin][0]]
    parts += [f"{portrait.shirt} shirt", f"{portrait.background} background"]
    return f"portrait of a {portrait.person} with " + ", ".join(parts)

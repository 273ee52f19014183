"""Trains the byte-pair encoding of the built-in model, in the format of CLIP's tokenizer.

Every word of the captions ends as one token; any other text is spelled in bytes, so there is
nothing that it cannot say. Leaves `WORK/tokenizer`.
"""

import argparse
import json
import random
import re
from collections import Counter
from pathlib import Path

from captions import FILLERS, caption
from portraits import sample

CONTEXT = 48  # tokens, with the start and the end
START, END = "<|startoftext|>", "<|endoftext|>"
WORD = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]+")  # CLIP's, for what the captions have


def alphabet():
    """GPT-2's printable stand-ins of all bytes, in its order, which is CLIP's too."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def words(captions):
    counts = Counter()
    for text in captions:
        counts.update(WORD.findall(text.lower()))
    return {word: count for word, count in counts.items() if word.isascii()}


def merges(counts):
    """Greedy byte-pair encoding until every word is one piece: the pairs, in order."""
    pieces = {word: (*word[:-1], word[-1] + "</w>") for word in counts}
    found = []
    while True:
        pairs = Counter()
        for word, split in pieces.items():
            for pair in zip(split, split[1:]):
                pairs[pair] += counts[word]
        if not pairs:
            return found
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        found.append(best)
        pieces = {word: merged(split, best) for word, split in pieces.items()}


def merged(split, pair):
    out, i = [], 0
    while i < len(split):
        both = split[i : i + 2] == pair
        out.append(split[i] + split[i + 1] if both else split[i])
        i += 2 if both else 1
    return tuple(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("work"))
    folder = parser.parse_args().work / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random("tokenizer")
    texts = [caption(sample(chance), chance) for _ in range(20_000)]
    counts = words(texts)
    known = {word for text in FILLERS for word in WORD.findall(text)}
    counts = {word: n for word, n in counts.items() if n >= 150 or word in known}
    pairs = merges(counts)
    letters = alphabet()
    tokens = letters + [c + "</w>" for c in letters] + ["".join(p) for p in pairs] + [START, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2"] + [" ".join(pair) for pair in pairs]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    special = dict(bos_token=START, eos_token=END, unk_token=END, pad_token=END)
    config = dict(special, tokenizer_class="CLIPTokenizer", model_max_length=CONTEXT,
                  do_lower_case=True, add_prefix_space=False, errors="replace")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{len(counts)} words, {len(pairs)} merges, {len(tokens)} tokens")


if __name__ == "__main__":
    main()

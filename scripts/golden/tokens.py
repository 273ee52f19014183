"""CLIP's tokenizer files (full and truncated vocabulary) and the ids transformers gives.

The merges are OpenAI's bpe_simple_vocab_16e6.txt.gz, which the PyPI package open_clip_torch ships.
"""

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import CLIPTokenizer

from prompts import PROMPTS

PACKAGE = "open_clip_torch==3.3.0"
MERGES_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
FULL_MERGES = 48_894
START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"


def download_merges() -> list[str]:
    """The 48,894 merges, in order, out of a wheel from PyPI."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
        subprocess.run(command, check=True)
        wheel = next(Path(folder).glob("*.whl"))
        packed = zipfile.ZipFile(wheel).read("open_clip/bpe_simple_vocab_16e6.txt.gz")
    assert hashlib.sha256(packed).hexdigest() == MERGES_SHA256, "not OpenAI's file"
    lines = gzip.open(io.BytesIO(packed), "rt", encoding="utf-8").read().split("\n")
    return lines[1 : 1 + FULL_MERGES]


def vocabulary(merges: list[str]) -> dict[str, int]:
    """Bytes, bytes that end a word, merges, the two specials: CLIP's order of ids."""
    byte_symbols = list(bytes_to_unicode().values())
    words = byte_symbols + [symbol + "</w>" for symbol in byte_symbols]
    words += ["".join(merge.split()) for merge in merges] + [START_OF_TEXT, END_OF_TEXT]
    return {word: id for id, word in enumerate(words)}


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    stand_ins = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(hidden))]
    return dict(zip(printable + hidden, stand_ins))


def special(content: str) -> dict:
    return {
        "content": content,
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    }


def write_settings(folder: Path, pad_token: str) -> None:
    """tokenizer_config.json and special_tokens_map.json as SD 1.5 and SD 2.1 publish them.

    SD 2.1's own files disagree about the pad token; special_tokens_map.json is the one that counts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    typed = {"__type": "AddedToken"}
    config = {
        "add_prefix_space": False,
        "bos_token": typed | special(START_OF_TEXT),
        "do_lower_case": True,
        "eos_token": typed | special(END_OF_TEXT),
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": typed | special(END_OF_TEXT),
    }
    tokens = {
        "bos_token": special(START_OF_TEXT),
        "eos_token": special(END_OF_TEXT),
        "pad_token": pad_token,
        "unk_token": special(END_OF_TEXT),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens, indent=2) + "\n")


def write_vocabulary(folder: Path, merges: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(vocabulary(merges), ensure_ascii=False, separators=(",", ":"))
    (folder / "vocab.json").write_text(text, encoding="utf-8")
    lines = "\n".join(["#version: 0.2", *merges]) + "\n"
    (folder / "merges.txt").write_text(lines, encoding="utf-8")


def write_model_tokenizer(folder: Path, merges: list[str], pad_token: str, one_file: bool) -> None:
    """A model's tokenizer/: CLIP's two files, or (as transformers 5 saves it) tokenizer.json."""
    write_vocabulary(folder, merges)
    write_settings(folder, pad_token)
    if one_file:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        shutil.rmtree(folder)
        tokenizer.save_pretrained(folder)


def golden_ids(tokenizer: CLIPTokenizer) -> list[dict]:
    """For each prompt what StableDiffusionPipeline feeds the text encoder and what it cuts off."""
    cases = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        whole = tokenizer(prompt).input_ids
        cut = tokenizer.decode(whole[76:-1]) if len(whole) > 77 else None
        cases.append({"prompt": prompt, "ids": ids, "token_count": len(whole), "cut_off": cut})
    return cases


def write_tokenizer_goldens(fixtures: Path, merges: list[str]) -> None:
    """fixtures/tokenizer* (inputs) and fixtures/golden/tokenizer.json (ids)."""
    full = fixtures / "tokenizer"
    write_vocabulary(full, merges)
    write_settings(full, END_OF_TEXT)
    write_settings(fixtures / "tokenizer-padded-with-exclamation", "!")
    golden = {"tokenizer": golden_ids(CLIPTokenizer.from_pretrained(full))}
    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(Path(folder), merges)
        write_settings(Path(folder), "!")
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        golden["tokenizer-padded-with-exclamation"] = golden_ids(tokenizer)
    first, second = (cases[0]["ids"] for cases in golden.values())
    assert first == [49406] + [49407] * 76, first
    assert second == [49406, 49407] + [0] * 75, second
    rows = ",\n".join(
        f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]"
        for name, cases in golden.items()
    )
    (fixtures / "golden" / "tokenizer.json").write_text("{\n" + rows + "\n}\n")
    print(f"tokenizer: {len(first)} ids for each of {len(PROMPTS)} prompts, two pad tokens")

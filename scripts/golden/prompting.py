#!/usr/bin/env python3
"""Makes tests/fixtures/golden/prompts: what becomes of prompts beside diffusers' plain way.

    python -m pip install -r scripts/requirements.txt
    python scripts/golden/prompting.py

Uses the models that generate.py has made. clip_skip is diffusers' own. AUTOMATIC1111's web UI cannot
be installed from a package registry, so its prompts are read here by a reference of its known
algorithm (modules/prompt_parser.py, modules/sd_hijack_clip.py, the emphasis mode "Original", 20 tokens
of comma backtracking), and go through transformers' text encoder and diffusers' pipeline.
"""

import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import goldens

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures"
VARIANTS = {"tiny": None, "sd1": None, "sd2": "fp16"}
ROOM = 75  # tokens of a chunk between start and end
BACKTRACK = 20
STEP = 1.1

LONG = "a portrait of a pretty girl with red hair, standing in a garden full of white roses " * 3
AFTER_COMMA = "x " * 60 + ", with a very long tail of words that does not fit into the first chunk"
PROMPTS = {
    "plain words": "Portrait of a pretty girl",
    "weights": "a (red:1.4) boat, [stormy] sea, ((sunset)), (calm:0.3)",
    "negative weight": "(a girl:-0.5) and \\(a\\) boat",
    "unbalanced": "(a red boat [on a sea",
    "break": "a red boat BREAK a (stormy:1.2) sea",
    "long": LONG,
    "after a comma": AFTER_COMMA,
    "nothing": "",
}


def main() -> None:
    torch.set_num_threads(1)
    folder = FIXTURES / "golden" / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    cases, tensors = [], {}
    for model, variant in VARIANTS.items():
        pipe = goldens.load(FIXTURES / "models" / model, variant=variant)
        # Where diffusers 0.42 looks for the last norm; transformers 5 has no such level any more.
        object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
        pad = pipe.tokenizer.pad_token_id
        for name, prompt in PROMPTS.items():
            chunks = chunked(pipe.tokenizer, prompt)
            key = f"{model}.{name}"
            tensors[f"{key}.ids"] = torch.tensor([ids for ids, _ in chunks])
            tensors[f"{key}.weights"] = torch.tensor([weights for _, weights in chunks])
            if model == "sd1" or name == "weights":
                tensors[f"{key}.embeddings"] = embedded(pipe, chunks, clip_skip=0)
        assert tensors[f"{model}.nothing.ids"][0, 2] == pad
        cases += pictures(pipe, model, folder)
    goldens.save(tensors, folder / "a1111.safetensors")
    rows = ",\n".join(json.dumps(case) for case in cases)
    (folder / "cases.json").write_text(f"[\n{rows}\n]\n")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{len(tensors)} tensors, {len(cases)} pictures, {size:,} bytes")


# --- AUTOMATIC1111's way, as a reference -------------------------------------------------------


def parts(prompt: str) -> list[tuple[str | None, float]]:
    """Text and weight; None for BREAK. A stack of lists, each closed bracket scaled as it ends."""
    lexemes = re.findall(r"\\[()\[\]\\]|\\|:\s*[+-]?[.\d]+\s*\)|[()\[\]:]|[^\\()\[\]:]+", prompt)
    open_brackets: list[tuple[str, list]] = [("", [])]

    def close(factor: float) -> None:
        _, inner = open_brackets.pop()
        open_brackets[-1][1].extend((text, weight * factor) for text, weight in inner)

    def is_open(bracket: str) -> bool:
        return open_brackets[-1][0] == bracket

    for lexeme in lexemes:
        here = open_brackets[-1][1]
        if lexeme.startswith("\\"):
            here.append((lexeme[1:], 1.0))
        elif lexeme in "([":
            open_brackets.append((lexeme, []))
        elif lexeme.startswith(":") and len(lexeme) > 1 and is_open("("):
            close(float(lexeme[1:-1]))
        elif lexeme == ")" and is_open("("):
            close(STEP)
        elif lexeme == "]" and is_open("["):
            close(1 / STEP)
        else:
            for i, text in enumerate(re.split(r"\s*\bBREAK\b\s*", lexeme)):
                here.extend([(None, 1.0)] if i else [])
                here.append((text, 1.0))
    while len(open_brackets) > 1:
        close(STEP if is_open("(") else 1 / STEP)
    merged: list[tuple[str | None, float]] = []
    for text, weight in open_brackets[0][1] or [("", 1.0)]:
        if text is not None and merged and merged[-1][0] is not None and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged


def chunked(tokenizer, prompt: str) -> list[tuple[list[int], list[float]]]:
    """77 ids and weights for each chunk."""
    comma = tokenizer.get_vocab()[",</w>"]
    chunks: list[list[tuple[int, float]]] = [[]]
    comma_at = None
    for text, weight in parts(prompt):
        if text is None:
            chunks.append([])
            comma_at = None
            continue
        for id in tokenizer(text, add_special_tokens=False, truncation=False).input_ids:
            full = len(chunks[-1]) == ROOM
            if id == comma:
                comma_at = len(chunks[-1])
            elif full and comma_at is not None and ROOM - comma_at <= BACKTRACK:
                moved = chunks[-1][comma_at + 1 :]
                del chunks[-1][comma_at + 1 :]
                chunks.append(moved)
                comma_at = None
            if len(chunks[-1]) == ROOM:
                chunks.append([])
                comma_at = None
            chunks[-1].append((id, weight))
    if not chunks[-1] and len(chunks) > 1:
        chunks.pop()
    return [framed(tokenizer, chunk) for chunk in chunks]


def framed(tokenizer, chunk: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = [start, *(id for id, _ in chunk), end]
    ids += [pad] * (ROOM + 2 - len(ids))
    weights = [1.0, *(weight for _, weight in chunk)]
    return ids, weights + [1.0] * (ROOM + 2 - len(weights))


@torch.no_grad()
def embedded(pipe, chunks, clip_skip: int, fixes=()) -> torch.Tensor:
    """[1, chunks × 77, hidden]: weighted, each chunk with the mean it had before."""
    found = []
    for ids, weights in chunks:
        output = pipe.text_encoder(torch.tensor([ids]), output_hidden_states=True)
        hidden = output.hidden_states[-(clip_skip + 1)]
        hidden = pipe.text_encoder.text_model.final_layer_norm(hidden) if clip_skip else output[0]
        mean = hidden.mean()
        hidden = hidden * torch.tensor(weights)[None, :, None]
        found.append(hidden * (mean / hidden.mean()))
    return torch.cat(found, dim=1)


# --- final pictures ----------------------------------------------------------------------------


def pictures(pipe, model: str, folder: Path) -> list[dict]:
    """<model>-<name>.png of each case, and the cases."""
    base = {
        "model": model,
        "prompt": "Portrait of a pretty girl",
        "negative_prompt": "ugly, blurry",
        "prompt_syntax": "plain",
        "clip_skip": 0,
        "steps": 3,
        "seed": 42,
    }
    a1111 = {**base, "prompt_syntax": "a1111"}
    cases = {
        "clip-skip-1": {**base, "clip_skip": 1},
        "clip-skip-2": {**base, "clip_skip": 2},
        "weights": {**a1111, "prompt": PROMPTS["weights"]},
        "long-prompt": {**a1111, "prompt": LONG, "negative_prompt": "(ugly:1.3)"},
        "long-negative": {**a1111, "negative_prompt": "blurry BREAK ugly BREAK", "clip_skip": 1},
    }
    if model != "tiny":
        cases = {name: cases[name] for name in ["clip-skip-1", "long-prompt"]}
    made = []
    for name, case in cases.items():
        picture = paint(pipe, case)
        Image.fromarray(picture).save(folder / f"{model}-{name}.png", optimize=True)
        made.append({"name": f"{model}-{name}", **case})
    return made


def paint(pipe, case: dict) -> np.ndarray:
    common = {
        "width": 64,
        "height": 64,
        "num_inference_steps": case["steps"],
        "guidance_scale": 7.5,
        "generator": torch.Generator("cpu").manual_seed(case["seed"]),
    }
    texts = [case["prompt"], case["negative_prompt"]]
    if case["prompt_syntax"] == "plain":
        prompts = {"prompt": texts[0], "negative_prompt": texts[1]}
        result = pipe(**prompts, **common, clip_skip=case["clip_skip"] or None)
    else:
        chunks = [chunked(pipe.tokenizer, text) for text in texts]
        longest = max(len(of_text) for of_text in chunks)
        nothing = chunked(pipe.tokenizer, "")
        chunks = [of_text + nothing * (longest - len(of_text)) for of_text in chunks]
        prompt, negative = (embedded(pipe, of_text, case["clip_skip"]) for of_text in chunks)
        result = pipe(prompt_embeds=prompt, negative_prompt_embeds=negative, **common)
    return np.array(result.images[0])


if __name__ == "__main__":
    main()

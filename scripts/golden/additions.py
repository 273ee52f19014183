#!/usr/bin/env python3
"""Makes tests/fixtures/golden/additions: embeddings and LoRAs as files, and diffusers' pictures.

    python -m pip install -r scripts/requirements.txt
    python scripts/golden/additions.py

Uses the models that generate.py has made. Each file is written in the layout that its name says, with
random values, and loaded by diffusers itself (load_textual_inversion, load_lora_weights). By their
formula are added what it cannot load: convolutions of three factors, and changes of the text encoder.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import goldens

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures"
FOLDER = FIXTURES / "golden" / "additions"
PROMPT = "a portrait of a pretty girl"
RANK = 2


def main() -> None:
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    cases = embedding_cases() + lora_cases()
    rows = ",\n".join(json.dumps(case) for case in cases)
    (FOLDER / "cases.json").write_text(f"[\n{rows}\n]\n")
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"{len(cases)} pictures, {size:,} bytes")


def load(model: str):
    pipe = goldens.load(FIXTURES / "models" / model)
    # Where diffusers 0.42 looks for parts of the text encoder; transformers 5 has no such level.
    object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    return pipe


def paint(pipe, name: str, prompt: str) -> np.ndarray:
    result = pipe(
        prompt,
        negative_prompt="ugly",
        width=64,
        height=64,
        num_inference_steps=3,
        guidance_scale=7.5,
        generator=torch.Generator("cpu").manual_seed(42),
    )
    picture = np.array(result.images[0])
    Image.fromarray(picture).save(FOLDER / f"{name}.png", optimize=True)
    return picture


# --- embeddings --------------------------------------------------------------------------------


def embedding_cases() -> list[dict]:
    generator = torch.Generator().manual_seed(71)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    save_file({"emb_params": draw(3, 32)}, FOLDER / "Wash-Style.safetensors")
    torch.save({"<cat-toy>": draw(32)}, FOLDER / "learned_embeds.bin")
    a1111 = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": draw(2, 32).half()},
        "name": "another name",
        "step": 499,
        "sd_checkpoint": "cc6cb27103",
        "sd_checkpoint_name": "v1-5",
    }
    torch.save(a1111, FOLDER / "inked.pt")
    save_file({"emb_params": draw(2, 24)}, FOLDER / "narrow.safetensors")
    cases = []
    for name, prompt, embeddings in [
        # Of a name with capitals diffusers takes the first vector only.
        ("vectors", "a girl, wash-style, in a garden", ["wash-style=Wash-Style.safetensors"]),
        ("one-vector", "a photo of a <cat-toy>-like girl", ["learned_embeds.bin"]),
        (
            "three-files",
            "inked girl and <cat-toy>, wash-style_1",
            ["wash-style=Wash-Style.safetensors", "learned_embeds.bin", "inked.pt"],
        ),
    ]:
        pipe = load("tiny")
        for embedding in embeddings:
            token, _, file = embedding.rpartition("=")
            if not token and not file.startswith("learned"):
                token = Path(file).stem  # what AUTOMATIC1111 calls it
            source = load_file(FOLDER / file) if file.endswith("s") else FOLDER / file
            pipe.load_textual_inversion(source, token=token or None)
        paint(pipe, name, prompt)
        cases.append({"name": name, "model": "tiny", "prompt": prompt, "embeddings": embeddings})
    return cases


# --- LoRA --------------------------------------------------------------------------------------


PLACES = ["down_blocks.0", "mid_block", "up_blocks.2", "layers.1"]


def modules(network: torch.nn.Module, kinds, words: list[str]):
    """The layers whose names have one of the words, in some places of the network."""
    for name, module in network.named_modules():
        is_there = any(place in name for place in PLACES)
        if is_there and isinstance(module, kinds) and any(word in name for word in words):
            yield name, module


def factors(module: torch.nn.Module, generator, gain: float = 0.5) -> tuple:
    """Down and up of a linear layer or a convolution, as large as to be seen."""
    weight = module.weight
    down = torch.randn(RANK, *weight.shape[1:], generator=generator)
    up = torch.randn(weight.shape[0], RANK, *[1] * (weight.dim() - 2), generator=generator)
    return down * gain / weight[0].numel() ** 0.5, up * gain


def write_kohya(pipe, path: Path, conv: bool) -> None:
    """lora_unet_ and lora_te_ with underscores, an alpha for each."""
    generator = torch.Generator().manual_seed(81)
    kinds = (torch.nn.Linear, torch.nn.Conv2d) if conv else torch.nn.Linear
    words = ["attn", "proj_in", "ff.net", "resnets"] if conv else ["attn", "ff.net"]
    tensors = {}
    for prefix, level, network in [
        ("lora_unet", "", pipe.unet),
        ("lora_te", "text_model.", pipe.text_encoder),
    ]:
        for name, module in modules(network, kinds, [*words, "mlp"]):
            name = level + name.removeprefix("text_model.")
            down, up = factors(module, generator)
            key = f"{prefix}_{name.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = down.half().contiguous()
            tensors[f"{key}.lora_up.weight"] = up.half().contiguous()
            tensors[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)


def write_named(pipe, path: Path, style: str) -> None:
    """diffusers' and PEFT's names, by `style`."""
    generator = torch.Generator().manual_seed(82)
    tensors = {}
    for prefix, level, network, words in [
        ("unet", "", pipe.unet, ["attn1.", "attn2."]),
        ("text_encoder", "text_model.", pipe.text_encoder, ["q_proj", "v_proj", "out_proj"]),
    ]:
        for name, module in modules(network, torch.nn.Linear, words):
            name = level + name.removeprefix("text_model.")
            if style == "processors":
                if prefix == "text_encoder":
                    continue
                place, layer = name.removesuffix(".0").rsplit(".", 1)
                ends = [f"{place}.processor.{layer}_lora.{part}.weight" for part in ["down", "up"]]
            elif style == "lora":
                part = "lora" if prefix == "unet" else "lora_linear_layer"
                ends = [f"{name}.{part}.{direction}.weight" for direction in ["down", "up"]]
            else:
                ends = [f"{name}.lora_{part}.weight" for part in ["A", "B"]]
            for end, factor in zip(ends, factors(module, generator)):
                tensors[f"{prefix}.{end}"] = factor.half().contiguous()
    metadata = {"format": "pt"}
    if style == "peft":
        config = {"r": RANK, "lora_alpha": 3, "use_rslora": False}
        names = {"unet": ["to_q", "to_k", "to_v", "to_out.0"]}
        names["text_encoder"] = ["q_proj", "v_proj", "out_proj"]
        full = {
            f"{part}.{key}": value
            for part in names
            for key, value in {**config, "target_modules": names[part]}.items()
        }
        metadata["lora_adapter_metadata"] = json.dumps(full)
    save_file(tensors, path, metadata=metadata)


def write_tucker(pipe, path: Path) -> None:
    """kohya's lora_mid: a convolution as three factors."""
    generator = torch.Generator().manual_seed(83)
    tensors = {}
    for name, module in modules(pipe.unet, torch.nn.Conv2d, ["resnets.0.conv1"]):
        out, inner, *kernel = module.weight.shape
        draw = lambda *shape: torch.randn(*shape, generator=generator)
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = draw(RANK, inner, 1, 1) * inner**-0.5
        tensors[f"{key}.lora_mid.weight"] = draw(3, RANK, *kernel) * 0.3
        tensors[f"{key}.lora_up.weight"] = draw(out, 3, 1, 1) * 0.5
        tensors[f"{key}.alpha"] = torch.tensor(1.5)
    save_file(tensors, path)


@torch.no_grad()
def add_tucker(pipe, path: Path, scale: float) -> None:
    tensors = load_file(path)
    for name, module in modules(pipe.unet, torch.nn.Conv2d, ["resnets.0.conv1"]):
        key = f"lora_unet_{name.replace('.', '_')}"
        part = lambda kind: tensors[f"{key}.lora_{kind}.weight"].double()
        change = torch.einsum(
            "oa,abkl,bi->oikl", part("up")[..., 0, 0], part("mid"), part("down")[..., 0, 0]
        )
        module.weight += (scale * tensors[f"{key}.alpha"].item() / RANK * change).float()


@torch.no_grad()
def load_lora(pipe, path: Path, scale: float, adapter: str) -> None:
    """The UNet's part by diffusers. The text encoder's by its formula: diffusers 0.42 does not find
    the layers of transformers 5's."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
    else:
        tensors, metadata = torch.load(path), {}
    text = {key: value for key, value in tensors.items() if key.startswith(("lora_te", "text_"))}
    with tempfile.TemporaryDirectory() as folder:
        rest = {key: value for key, value in tensors.items() if key not in text}
        save_file(rest, Path(folder) / "unet.safetensors", metadata=unet_only(metadata))
        pipe.load_lora_weights(folder, weight_name="unet.safetensors", adapter_name=adapter)
    alpha = json.loads((metadata or {}).get("lora_adapter_metadata", "{}"))
    alpha = alpha.get("text_encoder.lora_alpha", RANK)
    used = set()
    for name, module in pipe.text_encoder.named_modules():
        name = "text_model." + name.removeprefix("text_model.")
        kohya = f"lora_te_{name.replace('.', '_')}"
        for down, up in [
            (f"{kohya}.lora_down.weight", f"{kohya}.lora_up.weight"),
            (f"text_encoder.{name}.lora_A.weight", f"text_encoder.{name}.lora_B.weight"),
            *[
                (f"text_encoder.{name}.{part}.down.weight", f"text_encoder.{name}.{part}.up.weight")
                for part in ["lora_linear_layer"]
            ],
        ]:
            if down in text:
                of_layer = text.get(f"{kohya}.alpha", torch.tensor(float(alpha))).item()
                change = text[up].double() @ text[down].double()
                module.weight += (scale * of_layer / RANK * change).float()
                used |= {down, up, f"{kohya}.alpha"}
    assert set(text) <= used, set(text) - used


def unet_only(metadata: dict | None) -> dict:
    kept = dict(metadata or {})
    if "lora_adapter_metadata" in kept:
        config = json.loads(kept["lora_adapter_metadata"])
        config = {key: value for key, value in config.items() if key.startswith("unet.")}
        kept["lora_adapter_metadata"] = json.dumps(config)
    return kept


def lora_cases() -> list[dict]:
    pipe = load("sd1")
    write_kohya(pipe, FOLDER / "kohya.safetensors", conv=False)
    write_named(pipe, FOLDER / "lora.safetensors", "lora")
    write_named(pipe, FOLDER / "peft.safetensors", "peft")
    write_named(pipe, FOLDER / "processors.safetensors", "processors")
    tiny = load("tiny")
    write_kohya(tiny, FOLDER / "conv.safetensors", conv=True)
    write_tucker(tiny, FOLDER / "tucker.safetensors")
    pickled = load_file(FOLDER / "lora.safetensors")
    torch.save({key: pickled[key] for key in list(pickled)[:8]}, FOLDER / "pickled.bin")
    cases = []
    for name, model, loras in [
        ("kohya", "sd1", ["kohya.safetensors:0.8"]),
        ("lora", "sd1", ["lora.safetensors"]),
        ("peft", "sd1", ["peft.safetensors:-0.5"]),
        ("processors", "sd1", ["processors.safetensors"]),
        ("two", "sd1", ["kohya.safetensors:0.5", "peft.safetensors:0.7"]),
        ("pickled", "sd1", ["pickled.bin"]),
        ("conv", "tiny", ["conv.safetensors:0.7"]),
        ("tucker", "tiny", ["tucker.safetensors:0.9"]),
    ]:
        pipe = load(model)
        before = paint(pipe, name, PROMPT)
        adapters, scales = [], []
        for index, lora in enumerate(loras):
            file, _, scale = lora.partition(":")
            scale = float(scale or 1)
            if name == "tucker":
                add_tucker(pipe, FOLDER / file, scale)
                continue
            load_lora(pipe, FOLDER / file, scale, f"a{index}")
            adapters.append(f"a{index}")
            scales.append(scale)
        if adapters:
            pipe.set_adapters(adapters, scales)
        after = paint(pipe, name, PROMPT)
        difference = np.mean((before.astype(float) - after) ** 2)
        print(f"{name}: {10 * np.log10(255**2 / difference):.1f} dB from the picture without")
        cases.append({"name": name, "model": model, "prompt": PROMPT, "loras": loras})
    return cases


if __name__ == "__main__":
    main()

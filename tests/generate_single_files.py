"""Writes tests/fixtures/single: models in one file, under the names of the original code.

    python tests/generate_single_files.py
    (torch 2.15.0, diffusers 0.42.1, transformers 5.23.0, safetensors)

`NAME.txt` says of each tensor of the original code's file of tests/fixtures/models/NAME which
tensors of ours it is made of, in their order: the tests put the files together. A line that is not
indented names a component and how all of its names begin in the file; `=` before a name of ours
says that the file has the matrix as a convolution of one pixel, and `*` stands for weight and bias.
The mapping here goes from diffusers' names to the original ones, the other way than the program's,
and is checked with diffusers, which finds the very weights in the files with `from_single_file`.

`lone.ckpt` is a training checkpoint as pytorch_lightning saves it, of a model with the proportions of
Stable Diffusion 1.5 and nothing beside it: no configuration, no tokenizer. All of its weights are
views of two storages, so that it is small. `lone.png` is what diffusers makes of it, with the
published configurations.
"""

import json
import re
import sys
import tempfile
import types
from collections import OrderedDict, defaultdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

FIXTURES = Path(__file__).parent / "fixtures"
OUT = FIXTURES / "single"

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_name(name: str, layers: int, levels: int, attends_up: list) -> str:
    """The original name of a UNet's tensor; `layers` resnets a block on the way down."""
    for ours, theirs in UNET_TOP.items():
        if name.startswith(ours + "."):
            return name.replace(ours, theirs, 1)
    parts = name.split(".")
    if parts[0] == "mid_block":
        number = 1 if parts[1] == "attentions" else 2 * int(parts[2])
        rest = parts[3:]
        if parts[1] == "resnets":
            rest[0] = RESNET[rest[0]]
        return ".".join(["middle_block", str(number), *rest])
    way, block, kind, index = parts[0], int(parts[1]), parts[2], int(parts[3])
    rest = parts[4:]
    if way == "down_blocks":
        start, number = "input_blocks", 1 + block * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{number + layers}.0.op.{rest[-1]}"
    else:
        start, number = "output_blocks", block * (layers + 1)
        if kind == "upsamplers":
            place = 2 if attends_up[block] else 1
            return f"output_blocks.{number + layers}.{place}.conv.{rest[-1]}"
    if kind == "attentions":
        return ".".join([start, str(number + index), "1", *rest])
    return ".".join([start, str(number + index), "0", RESNET[rest[0]], *rest[1:]])


def vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    up = lambda m: f"up.{levels - 1 - int(m[1])}."
    name = re.sub(r"up_blocks\.(\d)\.", up, name)
    name = re.sub(r"(up\.\d)\.resnets\.", r"\1.block.", name)
    name = name.replace("upsamplers.0", "upsample")
    for ours, theirs in [
        ("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")
    ]:  # fmt: skip
        name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    return name


def open_clip_name(name: str) -> str:
    name = name.removeprefix("text_model.")
    for ours, theirs in [
        ("embeddings.position_embedding.weight", "positional_embedding"),
        ("embeddings.token_embedding", "token_embedding"),
        ("final_layer_norm", "ln_final"),
        ("encoder.layers", "transformer.resblocks"),
        ("layer_norm1", "ln_1"),
        ("layer_norm2", "ln_2"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("self_attn.", "attn."),
    ]:
        name = name.replace(ours, theirs)
    return name


def rows(unet: dict, vae: dict, text: dict, configs: dict, is_v2: bool) -> dict:
    """Original name → (component, names of ours, shape) of a whole model."""
    layers, levels = configs["unet"]["layers_per_block"], len(configs["vae"]["up_block_types"])
    attends_up = [kind.startswith("Cross") for kind in configs["unet"]["up_block_types"]]
    result = OrderedDict()
    for name, tensor in unet.items():
        original = "model.diffusion_model." + unet_name(name, layers, levels, attends_up)
        result[original] = ("unet", [name], list(tensor.shape))
    for name, tensor in vae.items():
        shape = list(tensor.shape)
        if re.search(r"attentions\.0\.to_.*weight$", name):
            shape += [1, 1]
        result["first_stage_model." + vae_name(name, levels)] = ("vae", [name], shape)
    if not is_v2:
        for name, tensor in text.items():
            shape = list(tensor.shape)
            result[f"cond_stage_model.transformer.{name}"] = ("text_encoder", [name], shape)
        return result
    for name, tensor in text.items():
        shape = list(tensor.shape)
        if fused := re.search(r"(.*\.self_attn)\.q_proj\.(weight|bias)$", name):
            names = [f"{fused[1]}.{part}_proj.{fused[2]}" for part in "qkv"]
            original = open_clip_name(fused[1] + ".") + "in_proj_" + fused[2]
            shape[0] *= 3
        elif re.search(r"\.self_attn\.[kv]_proj\.", name):
            continue
        else:
            names, original = [name], open_clip_name(name)
        result[f"cond_stage_model.model.{original}"] = ("text_encoder", names, shape)
    return result


def assemble(mapping: dict, parts: dict) -> dict:
    return {
        original: torch.cat([parts[component][name] for name in names]).reshape(shape).contiguous()
        for original, (component, names, shape) in mapping.items()
    }


def read_component(folder: Path) -> dict:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    for path in sorted(folder.glob("*.bin")):
        tensors |= torch.load(path, weights_only=True)
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    today = {}
    for name, tensor in tensors.items():
        for a, b in old.items():
            name = name.replace(f".attentions.0.{a}.", f".attentions.0.{b}.")
        if folder.name == "text_encoder" and not name.startswith("text_model."):
            name = "text_model." + name
        if not name.endswith("position_ids"):
            today[name] = tensor
    return today


def check_with_diffusers(path: Path, configs: Path, parts: dict) -> None:
    """diffusers reads the file, and finds the very weights."""
    options = {"config": str(configs), "local_files_only": True}
    unet = UNet2DConditionModel.from_single_file(path, subfolder="unet", **options)
    vae = AutoencoderKL.from_single_file(path, subfolder="vae", **options)
    pipeline = StableDiffusionPipeline.from_single_file(
        path, unet=unet, vae=vae, safety_checker=None, requires_safety_checker=False, **options
    )
    text = {
        f"text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in pipeline.text_encoder.state_dict().items()
    }
    for name, found in [("unet", unet.state_dict()), ("vae", vae.state_dict()), ("text_encoder", text)]:
        expected = parts[name]
        found = {key: value for key, value in found.items() if not key.endswith("position_ids")}
        assert set(found) == set(expected), (name, set(found) ^ set(expected))
        for key, tensor in found.items():
            assert torch.equal(tensor.float(), expected[key].float()), (name, key)


def text_of(mapping: dict) -> str:
    lines, component = [], None
    prefixes = {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.transformer.",
    }
    for original, (part, names, shape) in mapping.items():
        prefix = prefixes[part]
        if not original.startswith(prefix):
            prefix = "cond_stage_model.model."
        if part != component:
            lines.append(f"{part} {prefix}")
            component = part
        mark = "=" if part == "vae" and ".attn_1." in original and len(shape) == 4 else ""
        if original.endswith(".bias") and original[:-4] + "weight" in mapping:
            continue
        if original.endswith(".weight") and original[:-6] + "bias" in mapping:
            original, names = original[:-6] + "*", [names[0][:-6] + "*"]
        lines.append(f" {original.removeprefix(prefix)} {mark}{' '.join(names)}")
    return "\n".join(lines) + "\n"


CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


class Shares:
    """Weights that are views of one storage each for convolutions and matrices."""

    def __init__(self):
        generator = torch.Generator().manual_seed(7)
        randn = lambda n: torch.randn(n, generator=generator)
        self.kernels = (randn(18_500) * 0.06).half()
        self.matrices = (randn(49_600) * 0.16).half()
        self.norms = (1 + 0.1 * randn(400)).half()
        self.count = 0

    def view(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        self.count += 1
        shape = tuple(tensor.shape)
        if name.endswith("token_embedding.weight"):
            # Each row begins one element after the one before.
            return torch.as_strided(self.matrices, shape, (1, 1))
        is_norm = "norm" in name and name.endswith("weight")
        storage = self.norms if is_norm else self.kernels if len(shape) == 4 else self.matrices
        stride, size = [], 1
        for dim in reversed(shape):
            stride.insert(0, size)
            size *= dim
        offset = self.count * 997 % (len(storage) - size + 1)
        return torch.as_strided(storage, shape, stride, offset)


def lone_configs() -> dict:
    """The published configurations of Stable Diffusion 1.5, with other widths."""
    models = FIXTURES.parent.parent / "models" / "stable-diffusion-v1"
    read = lambda name: json.loads((models / name).read_text())
    unet, vae = read("unet/config.json"), read("vae/config.json")
    text = read("text_encoder/config.json")
    unet |= {"block_out_channels": [32] * 4, "cross_attention_dim": 64}
    vae |= {"block_out_channels": [32] * 4}
    text |= {
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1,
        "num_hidden_layers": 2, "projection_dim": 64,
    }  # fmt: skip
    scheduler = read("scheduler/scheduler_config.json")
    return {"unet": unet, "vae": vae, "text_encoder": text, "scheduler": scheduler}


def write_configs(configs: dict, folder: Path) -> None:
    for part, config in configs.items():
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part).mkdir()
        (folder / part / name).write_text(json.dumps(config))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def training_checkpoint(state_dict: dict) -> dict:
    """What pytorch_lightning saves beside the weights, of which nothing is needed."""
    for name in ["", ".callbacks", ".callbacks.model_checkpoint"]:
        module = types.ModuleType("pytorch_lightning" + name)
        sys.modules[module.__name__] = module
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    instance = module.ModelCheckpoint()
    instance.best_model_score = torch.tensor(0.5, dtype=torch.float64)
    steps = torch.tensor(840_000, dtype=torch.int32)
    extra = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": steps}
    return {
        "epoch": 3,
        "global_step": 840_000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": OrderedDict(state_dict | extra),
        "callbacks": {module.ModelCheckpoint: {"best": instance, "counts": defaultdict(int, a=1)}},
        "optimizer_states": [{"state": {0: {"step": 2**70, "lr": 1e-4}}, "param_groups": [{}]}],
        "lr_schedulers": [{"best": {1, 2}, "range": range(3)}],
    }


def write_lone() -> None:
    configs, shares = lone_configs(), Shares()
    networks = {
        "unet": UNet2DConditionModel.from_config(configs["unet"]),
        "vae": AutoencoderKL.from_config(configs["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
    }
    parts = {}
    for part, network in networks.items():
        prefix = "text_model." if part == "text_encoder" else ""
        names = network.state_dict().items()
        parts[part] = {
            prefix + name.removeprefix(prefix): shares.view(name, tensor)
            for name, tensor in names
            if not name.endswith("position_ids")
        }
    mapping = rows(parts["unet"], parts["vae"], parts["text_encoder"], configs, False)
    file = {
        original: parts[component][names[0]].reshape(shape)
        for original, (component, names, shape) in mapping.items()
    }
    torch.save(training_checkpoint(file), OUT / "lone.ckpt")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "configs"
        folder.mkdir()
        write_configs(configs, folder)
        path = Path(scratch) / "plain.ckpt"
        torch.save({"state_dict": file}, path)
        check_with_diffusers(path, folder, parts)
        pipeline = StableDiffusionPipeline.from_single_file(
            path, config=str(folder), local_files_only=True, torch_dtype=torch.float32,
            tokenizer=CLIPTokenizer.from_pretrained(FIXTURES / "tokenizer"),
            safety_checker=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        paint = lambda prompt: pipeline(
            prompt, height=64, width=96, num_inference_steps=4, guidance_scale=7.5,
            generator=torch.Generator().manual_seed(5),
        ).images[0]  # fmt: skip
        picture, other = paint("A red fox, 4k"), paint("Portrait of a pretty girl")
        picture.save(OUT / "lone.png")
        pixels = [torch.tensor(list(image.tobytes())).double() for image in [picture, other]]
        psnr = 10 * torch.log10(255**2 / (pixels[0] - pixels[1]).pow(2).mean())
        spread, clipped = pixels[0].std(), (pixels[0] % 255 == 0).double().mean()
        print(f"lone: spread {spread:.0f}, {clipped:.1%} clipped, another prompt {psnr:.1f} dB")
        assert spread > 20 and clipped < 0.2 and psnr < 35


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    for name in ["sd2", "tiny"]:
        folder = FIXTURES / "models" / name
        configs = {
            part: json.loads((folder / part / "config.json").read_text()) for part in ["unet", "vae"]
        }
        parts = {
            part: read_component(folder / part) for part in ["unet", "vae", "text_encoder"]
        }
        mapping = rows(parts["unet"], parts["vae"], parts["text_encoder"], configs, name == "sd2")
        (OUT / f"{name}.txt").write_text(text_of(mapping))
        print(name, len(mapping), "tensors")
        if configs["unet"].get("mid_block_type", "") is None:
            continue  # diffusers reads no UNet without a block in the middle from one file
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.safetensors"
            save_file(assemble(mapping, parts), path)
            check_with_diffusers(path, folder, parts)
            print(name, "is what diffusers reads")
    write_lone()


if __name__ == "__main__":
    main()

"""Writes full-size.json: configuration files, tensor names, shapes and scales of tiny-sd's layout.

    python3 scripts/gpu_check/make_layout.py

Separate from weights.py, which makes the model of that file on machines that have nothing but
Python: this needs torch, diffusers and transformers (scripts/requirements.txt), once, here. Names
and shapes are those of the networks on torch's meta device; scales and the wiring of the UNet,
which keeps trajectories in the range in which real models move, are those of scripts/golden.
"""

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "golden"))

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from configs import TINY_SD
from models import GAINS

PARAMETERS = {"text_encoder": 123_060_480, "unet": 323_384_964, "vae": 83_653_863}
FILES = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}


def networks() -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TINY_SD.text_encoder)),
            "unet": UNet2DConditionModel.from_config(TINY_SD.unet),
            "vae": AutoencoderKL.from_config(TINY_SD.vae),
        }


def tensors(name: str, network: nn.Module) -> dict[str, list]:
    """Each tensor's shape, mean and standard deviation, as models.fill draws them."""
    gains = GAINS[name] | TINY_SD.gains.get(name, {})
    found = {}
    for module_name, module in network.named_modules():
        is_norm = isinstance(module, (nn.GroupNorm, nn.LayerNorm))
        for kind, value in module.named_parameters(recurse=False):
            full = f"{module_name}.{kind}"
            gain = next((g for pattern, g in gains.items() if re.search(pattern, full)), 1.0)
            mean, deviation = 0.0, 0.1
            if is_norm:
                mean, deviation = (1.0 if kind == "weight" else 0.0), 0.2
            elif isinstance(module, nn.Embedding):
                deviation = gain
            elif value.dim() > 1:
                deviation = gain / (value[0].numel() ** 0.5)
            if name == "text_encoder":
                full = "text_model." + full.removeprefix("text_model.")
            found[full] = [list(value.shape), mean, float(f"{deviation:.6g}")]
    count = sum(torch.Size(shape).numel() for shape, _, _ in found.values())
    assert count == PARAMETERS[name], f"{name}: {count}"
    return found


def wiring(unet: nn.Module, found: dict[str, list]) -> dict[str, list]:
    """models.wire_denoiser as runs [first element, elements, value], laid over what is drawn."""
    norm, block = unet.conv_norm_out, unet.up_blocks[-1]
    group = norm.num_channels // norm.num_groups
    wired = -(-8 // group) * group
    last = f"up_blocks.{len(unet.up_blocks) - 1}"
    resnet = f"{last}.resnets.{len(block.resnets) - 1}"
    attention = f"{last}.attentions.{len(block.attentions) - 1}"
    skip = block.resnets[-2].conv2.out_channels
    runs = {}
    for layer in ["conv_in", f"{resnet}.conv_shortcut", f"{resnet}.conv2",
                  f"{attention}.proj_out", "conv_norm_out"]:
        for kind in ["weight", "bias"]:
            row = torch.Size(found[f"{layer}.{kind}"][0][1:]).numel()
            runs[f"{layer}.{kind}"] = [[0, wired * row, 0]]
    runs["conv_norm_out.weight"] = [[0, wired, 1]]
    inputs = found[f"{resnet}.conv_shortcut.weight"][0][1]
    for channel in range(wired):
        sign = 1 if channel % 2 == 0 else -1
        # The middle of a kernel of 3×3.
        runs["conv_in.weight"].append([(channel * 4 + channel // 2 % 4) * 9 + 4, 1, sign])
        runs[f"{resnet}.conv_shortcut.weight"].append([channel * inputs + skip + channel, 1, 1])
    for kind in ["weight", "bias"]:
        found[f"conv_out.{kind}"][2] *= TINY_SD.residual
    channels = found["conv_out.weight"][0][1]
    runs["conv_out.weight"] = []
    for channel in range(4):
        first = channel * channels * 9
        runs["conv_out.weight"].append([first, wired * 9, 0])
        for offset, sign in [(0, 1), (1, -1)]:
            runs["conv_out.weight"].append([first + (2 * channel + offset) * 9 + 4, 1, sign])
    return runs


def main() -> None:
    files = {
        "model_index.json": TINY_SD.model_index,
        "scheduler/scheduler_config.json": TINY_SD.scheduler,
    }
    components = {}
    for name, network in networks().items():
        files[f"{name}/config.json"] = getattr(TINY_SD, name)
        found = tensors(name, network)
        runs = wiring(network, found) if name == "unet" else {}
        rows = [
            [tensor, *value, *([runs[tensor]] if tensor in runs else [])]
            for tensor, value in found.items()
        ]
        components[f"{name}/{FILES[name]}"] = rows
    parts = [
        ",\n".join(f"  {json.dumps(path)}: {json.dumps(value)}" for path, value in files.items()),
        ",\n".join(
            f"  {json.dumps(path)}: [\n"
            + ",\n".join(f"   {json.dumps(row, separators=(',', ':'))}" for row in rows)
            + "\n  ]"
            for path, rows in components.items()
        ),
    ]
    text = f'{{\n "files": {{\n{parts[0]}\n }},\n "weights": {{\n{parts[1]}\n }}\n}}\n'
    json.loads(text)
    (HERE / "full-size.json").write_text(text)
    print(f"full-size.json: {len(text):,} bytes, {sum(map(len, components.values()))} tensors")


if __name__ == "__main__":
    main()

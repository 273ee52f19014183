"""Builds a model from its configuration files, fills it with random weights, and stores it.

Random weights as they come hide faults: every prompt gives the same picture and the picture is
noise. So the gains are raised where the text enters, norms get random scales and shifts, and a
UNet that predicts noise is wired to predict mostly its own sample, which keeps the trajectory in
the range in which real models move.
"""

import json
import re
from collections import OrderedDict
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

# The first pattern that a weight's name matches sets its gain; 1 elsewhere.
GAINS = {
    "text_encoder": {
        r"token_embedding": 1.0,
        r"position_embedding": 0.4,
        r"[qk]_proj": 1.6,
        r"v_proj|out_proj": 1.2,
    },
    "unet": {
        r"attn2\.to_[qk]": 1.5,
        r"attn2\.to_(v|out)": 3.5,
        r"ff\.net": 2.0,
        r"time_emb": 2.0,
    },
    "vae": {
        r"decoder\.conv_out": 0.7,
        r"to_[qk]": 1.5,
    },
}


def build(spec) -> dict:
    """The three networks of `spec` in f16, keyed by the folders they are stored in."""
    torch.manual_seed(spec.seed)  # what torch draws before fill() overwrites it
    unet = UNet2DConditionModel.from_config(spec.unet)
    vae = AutoencoderKL.from_config(spec.vae)
    text_encoder = CLIPTextModel(CLIPTextConfig(**spec.text_encoder))
    networks = {"text_encoder": text_encoder, "unet": unet, "vae": vae}
    for offset, (name, network) in enumerate(networks.items()):
        fill(network, spec.seed + offset, GAINS[name] | spec.gains.get(name, {}))
    if spec.residual:
        wire_denoiser(unet, spec.residual)
    return {name: network.half().eval() for name, network in networks.items()}


@torch.no_grad()
def fill(network: nn.Module, seed: int, gains: dict) -> None:
    """Seeded normal weights: gain / sqrt(fan_in), norms around 1, biases of 0.1."""
    generator = torch.Generator().manual_seed(seed)
    for module_name, module in network.named_modules():
        is_norm = isinstance(module, (nn.GroupNorm, nn.LayerNorm))
        for kind, value in module.named_parameters(recurse=False):
            value.normal_(generator=generator)
            name = f"{module_name}.{kind}"
            gain = next((g for pattern, g in gains.items() if re.search(pattern, name)), 1.0)
            if is_norm:
                value.mul_(0.2).add_(1.0 if kind == "weight" else 0.0)
            elif isinstance(module, nn.Embedding):
                value.mul_(gain)
            elif value.dim() > 1:
                value.mul_(gain / value[0].numel() ** 0.5)
            else:
                value.mul_(0.1)


@torch.no_grad()
def wire_denoiser(unet: UNet2DConditionModel, residual: float) -> None:
    """Makes the output `sample / std(sample) + residual × (the random network's output)`.

    The sample's channels go as pairs (x, -x) through conv_in, the outermost skip connection and
    the last shortcut into conv_norm_out's first groups; silu(x) - silu(-x) = x gives them back.
    """
    group = unet.conv_norm_out.num_channels // unet.conv_norm_out.num_groups
    wired = -(-8 // group) * group
    block = unet.up_blocks[-1]
    resnet = block.resnets[-1]
    skip = block.resnets[-2].conv2.out_channels  # the skip's first channel after the concatenation
    for weight, bias in [
        (unet.conv_in.weight, unet.conv_in.bias),
        (resnet.conv_shortcut.weight, resnet.conv_shortcut.bias),
        (resnet.conv2.weight, resnet.conv2.bias),
        (block.attentions[-1].proj_out.weight, block.attentions[-1].proj_out.bias),
        (unet.conv_norm_out.weight, unet.conv_norm_out.bias),
    ]:
        weight[:wired] = 0
        bias[:wired] = 0
    unet.conv_norm_out.weight[:wired] = 1
    for channel in range(wired):
        sign = 1 if channel % 2 == 0 else -1
        unet.conv_in.weight[channel, channel // 2 % 4, 1, 1] = sign
        resnet.conv_shortcut.weight[channel, skip + channel, 0, 0] = 1
    unet.conv_out.weight.mul_(residual)
    unet.conv_out.bias.mul_(residual)
    unet.conv_out.weight[:, :wired] = 0
    for channel in range(4):
        unet.conv_out.weight[channel, 2 * channel, 1, 1] = 1
        unet.conv_out.weight[channel, 2 * channel + 1, 1, 1] = -1


def write(spec, networks: dict, folder: Path) -> None:
    """Stores configuration files and weights as the published repositories do."""
    write_json(folder / "model_index.json", spec.model_index)
    write_json(folder / "scheduler" / "scheduler_config.json", spec.scheduler)
    for name in ["text_encoder", "unet", "vae"]:
        write_json(folder / name / "config.json", getattr(spec, name))
    {"pickle": write_pickles, "safetensors": write_safetensors, "sharded-fp16": write_sharded}[
        spec.layout
    ](networks, folder)


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_pickles(networks: dict, folder: Path) -> None:
    """segmind/tiny-sd: f16 pickles, UNet channels_last, VAE attention under its old names."""
    unet = networks["unet"].to(memory_format=torch.channels_last)
    torch.save(unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
    vae = old_attention_names(networks["vae"].state_dict())
    torch.save(vae, folder / "vae" / "diffusion_pytorch_model.bin")
    text = dict(text_tensors(networks["text_encoder"], prefix="text_model."))
    torch.save(text, folder / "text_encoder" / "pytorch_model.bin")


def write_safetensors(networks: dict, folder: Path) -> None:
    """SD 1.5: one file each; the text encoder carries the unused position_ids."""
    for name in ["unet", "vae"]:
        tensors = networks[name].state_dict()
        save(tensors, folder / name / "diffusion_pytorch_model.safetensors")
    text = text_tensors(networks["text_encoder"], prefix="text_model.")
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save(text, folder / "text_encoder" / "model.safetensors")


def write_sharded(networks: dict, folder: Path) -> None:
    """Only an .fp16 variant, the UNet in shards, the text encoder without `text_model.`."""
    config = {name: (folder / name / "config.json").read_text() for name in ["unet", "vae"]}
    networks["unet"].save_pretrained(folder / "unet", variant="fp16", max_shard_size="400KB")
    networks["vae"].save_pretrained(folder / "vae", variant="fp16")
    for name, text in config.items():
        (folder / name / "config.json").write_text(text)
    text = text_tensors(networks["text_encoder"], prefix="")
    save(text, folder / "text_encoder" / "model.fp16.safetensors")


def save(tensors: dict, path: Path) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def text_tensors(text_encoder: CLIPTextModel, prefix: str) -> OrderedDict:
    tensors = OrderedDict()
    for name, tensor in text_encoder.state_dict().items():
        tensors[prefix + name.removeprefix("text_model.")] = tensor
    return tensors


def old_attention_names(tensors: OrderedDict) -> OrderedDict:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = OrderedDict()
    for name, tensor in tensors.items():
        for new_part, old_part in old.items():
            name = name.replace(f"attentions.0.{new_part}.", f"attentions.0.{old_part}.")
        renamed[name] = tensor
    return renamed

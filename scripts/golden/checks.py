"""The figures that make the fixtures worth comparing with: faults show, and f32 is enough.

Every check prints its figure; those out of their limits end the run after all were printed.
"""

import contextlib
import copy
import io
import itertools
import pickletools
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from goldens import FRACTIONAL_TIMESTEP, SCHEDULERS, cases, picture

ALLOWED_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch HalfStorage",
}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two u8 pictures, in dB."""
    assert a.shape == b.shape, f"{a.shape} is not {b.shape}"
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


FAILED: list[str] = []


def check(name: str, figure: float, at_most: float = np.inf, at_least: float = -np.inf) -> None:
    limit = f"<= {at_most:g}" if at_most < np.inf else f">= {at_least:g}"
    passed = at_least <= figure <= at_most
    print(f"  {name}: {figure:.4g} ({limit}){'' if passed else ' FAILED'}")
    if not passed:
        FAILED.append(f"{name}: {figure:.4g} is not {limit}")


def check_pictures(pictures: dict[str, np.ndarray], own_scheduler: str) -> None:
    base = pictures["base"]
    for name in ["another-prompt", "empty-prompt", "over-long-prompt", "non-latin-and-emoji"]:
        check(f"{name} against base, dB", psnr(base, pictures[name]), at_most=20)
    for name in ["another-seed", "negative-prompt", "guidance-1"]:
        check(f"{name} against base, dB", psnr(base, pictures[name]), at_most=25)
    by_scheduler = {
        name: pictures["base" if name == own_scheduler else f"scheduler-{name}"]
        for name in SCHEDULERS
    }
    for a, b in itertools.combinations(by_scheduler, 2):
        check(f"{a} against {b}, dB", psnr(by_scheduler[a], by_scheduler[b]), at_most=45)
    for name, pixels in pictures.items():
        saturated = np.isin(pixels, [0, 255]).mean()
        check(f"{name}: share of samples at 0 or 255", saturated, at_most=0.2)
        check(f"{name}: standard deviation of samples", pixels.std(), at_least=25)


def check_precision(pipe, stages: dict, pictures: dict, own_scheduler: str) -> None:
    """The same in f64: what is left between two right implementations in f32."""
    double = copy.deepcopy(pipe).to(torch.float64)
    for case in cases(own_scheduler):
        figure = psnr(picture(double, case), pictures[case["name"]])
        check(f"{case['name']}: f32 against f64, dB", figure, at_least=70)
    with torch.no_grad():
        sample, text = stages["unet_sample"], stages["negative_embeddings"]
        text = torch.cat([text, stages["prompt_embeddings"]]).double()
        output = double.unet(sample.double(), FRACTIONAL_TIMESTEP, text).sample
        check("unet: f32 against f64", relative(stages["unet_output"], output), at_most=3e-6)
        ids, right = stages["prompt_ids"], stages["prompt_embeddings"]
        check("text: f32 against f64", relative(right, double.text_encoder(ids)[0]), at_most=1e-5)
        latents = stages["vae_latents"].double() / double.vae.config.scaling_factor
        image = double.vae.decode(latents).sample
        check("vae: f32 against f64", relative(stages["vae_image"], image), at_most=1e-5)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.no_grad()
def check_stages(pipe, stages: dict[str, torch.Tensor]) -> None:
    """Single faults, each far above the 1e-4 that a stage's test allows."""
    embeddings = torch.cat([stages["negative_embeddings"], stages["prompt_embeddings"]])
    sample, output = stages["unet_sample"], stages["unet_output"]

    def changed(timestep=FRACTIONAL_TIMESTEP, text=embeddings):
        return relative(pipe.unet(sample, timestep, text).sample, output)

    check("unet: timestep rounded", changed(timestep=333), at_least=1e-3)
    check("unet: prompts swapped", changed(text=embeddings.flip(0)), at_least=1e-2)
    with quick_gelu():
        check("unet: quick_gelu in geglu", changed(), at_least=3e-4)
    ids, right = stages["prompt_ids"], stages["prompt_embeddings"]
    with another_activation(pipe.text_encoder):
        check("text: another gelu", relative(pipe.text_encoder(ids)[0], right), at_least=3e-3)
    padded = ids.clone()
    padded[:, ids[0].tolist().index(pipe.tokenizer.eos_token_id) + 1 :] = 7
    check("text: pad token", relative(pipe.text_encoder(padded)[0], right), at_least=0.1)


@contextlib.contextmanager
def quick_gelu():
    exact = functional.gelu
    functional.gelu = lambda x, approximate="none": x * torch.sigmoid(1.702 * x)
    try:
        yield
    finally:
        functional.gelu = exact


@contextlib.contextmanager
def another_activation(text_encoder):
    """gelu for quick_gelu and the other way round."""
    layers = text_encoder.encoder.layers
    own = layers[0].mlp.activation_fn
    is_quick = text_encoder.config.hidden_act == "quick_gelu"
    for layer in layers:
        layer.mlp.activation_fn = ACT2FN["gelu" if is_quick else "quick_gelu"]
    try:
        yield
    finally:
        for layer in layers:
            layer.mlp.activation_fn = own


def check_pickle(path: Path, channels_last: bool) -> None:
    """The globals that the file imports and, for the UNet, strides that are not contiguous."""
    with zipfile.ZipFile(path) as archive:
        (pickle,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        code = archive.read(pickle)
    found = {arg for op, arg, _ in pickletools.genops(io.BytesIO(code)) if op.name == "GLOBAL"}
    assert found <= ALLOWED_GLOBALS, found
    assert "torch HalfStorage" in found, found
    tensors = torch.load(path, weights_only=True)
    strided = [name for name, tensor in tensors.items() if not tensor.is_contiguous()]
    print(f"  {path.parent.name}/{path.name}: {len(tensors)} tensors, {len(strided)} strided")
    assert bool(strided) == channels_last
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())

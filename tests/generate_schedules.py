"""Writes tests/fixtures/schedules.json: whole trajectories of diffusers' schedulers.

Needs torch, diffusers and scipy. Run it from the repository's root: python tests/generate_schedules.py

Each case is a model's scheduler_config.json, a scheduler and a number of steps. The configuration
goes through StableDiffusionPipeline and, where the scheduler is another one, through from_config,
as a user's would. The sample has three numbers; the "model" is a formula of its scaled input and
the timestep, and the noise a formula of step and place, both repeated in the Rust test.

Cases with a strength begin with an image, as StableDiffusionImg2ImgPipeline does, and their second
number is masked: after every step it is the image's again, with the noise of
StableDiffusionInpaintPipeline. Of long runs only the last timesteps and samples are kept: a sample that
is wrong before is wrong there, too.
"""

import json
import logging
import math
import sys
import warnings
from types import SimpleNamespace

import diffusers
import numpy
import torch

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

KINDS = {
    "dpm++2m": diffusers.DPMSolverMultistepScheduler,
    "dpm++2m-sde": diffusers.DPMSolverMultistepScheduler,
    "dpm++2s": diffusers.DPMSolverSinglestepScheduler,
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-a": diffusers.EulerAncestralDiscreteScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "deis": diffusers.DEISMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "kdpm2": diffusers.KDPM2DiscreteScheduler,
    "kdpm2-a": diffusers.KDPM2AncestralDiscreteScheduler,
    "lcm": diffusers.LCMScheduler,
    "tcd": diffusers.TCDScheduler,
}
ALGORITHMS = {
    "dpm++2m": {"algorithm_type": "dpmsolver++"},
    "dpm++2m-sde": {"algorithm_type": "sde-dpmsolver++"},
}
NAMES = {cls.__name__: name for name, cls in reversed(KINDS.items())}
SPREADS = ["karras", "exponential", "beta"]
SPREADABLE = [
    "dpm++2m", "dpm++2m-sde", "dpm++2s", "euler", "heun", "lms", "deis", "unipc", "kdpm2", "kdpm2-a"
]

STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TINY = {
    "_class_name": "DPMSolverMultistepScheduler",
    "_diffusers_version": "0.19.0.dev0",
    **STABLE,
    "algorithm_type": "dpmsolver++",
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "lambda_min_clipped": float("-inf"),
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 1,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_karras_sigmas": False,
    "variance_type": None,
}
SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    **STABLE,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SD21 = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.8.0",
    **STABLE,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
CONFIGS = {"tiny-sd": TINY, "sd15": SD15, "sd21": SD21}
COUNTS = {"tiny-sd": [1, 2, 3, 4, 10, 14, 15, 25], "sd15": [3, 15], "sd21": [1, 2, 6, 14, 25]}
CASES = [(config, kind, steps) for config in COUNTS for kind in KINDS for steps in COUNTS[config]]
CASES += [
    (config, f"{kind}-{spread}", steps)
    for config, steps in [("tiny-sd", 1), ("tiny-sd", 2), ("tiny-sd", 10), ("tiny-sd", 25), ("sd21", 6)]
    for kind in SPREADABLE
    for spread in SPREADS
]
EVERYONE = list(KINDS)
# The ones that have a formula for what is not the noise.
SAMPLES = [kind for kind in KINDS if kind not in ["pndm", "euler-a", "kdpm2", "kdpm2-a"]]
SOLVERS = ["dpm++2m", "dpm++2m-sde", "dpm++2s", "deis", "unipc"]
UNCLIPPED = [kind for kind in KINDS if kind not in ["ddim", "ddpm"]]


def variant(name, base, changes, kinds, steps=(7,)):
    CONFIGS[name] = {**base, **changes}
    for key in [key for key, value in changes.items() if value is ...]:
        del CONFIGS[name][key]
    CASES.extend((name, kind, count) for kind in kinds for count in steps)


def own(kind, **changes):
    return {"_class_name": KINDS[kind].__name__, **changes}


for spacing in ["leading", "trailing", "linspace"]:
    variant(f"{spacing} epsilon", TINY, {"timestep_spacing": spacing}, EVERYONE, (6, 23))
    variant(f"{spacing} velocity", SD21, {"timestep_spacing": spacing}, EVERYONE, (9,))
# Each class's own defaults, alone and as what another one's configuration leaves open.
for kind in KINDS:
    bare = own(kind, skip_prk_steps=True) if kind == "pndm" else own(kind)
    users = [kind, "dpm++2m", "euler", "euler-a"] if kind in ["pndm", "ddim", "euler"] else [kind]
    variant(f"bare {kind}", bare, {}, users)
variant("bare for pndm and ddim", own("euler", skip_prk_steps=True, clip_sample=False), {},
        EVERYONE)
variant("an old offset is corrected", SD15, {"steps_offset": 0}, EVERYONE)
variant("a missing offset", SD15, {"steps_offset": ...}, EVERYONE)
variant("clipping is corrected", SD21, {"clip_sample": True}, EVERYONE)
variant("defaults are the class's own", TINY, {
    "_use_default_values": ["timestep_spacing", "set_alpha_to_one", "steps_offset", "beta_end"]
}, EVERYONE)
variant("sample prediction", TINY, {"prediction_type": "sample"}, SAMPLES)
variant("linear betas", TINY, {"beta_schedule": "linear"}, EVERYONE)
variant("cosine betas", TINY, {
    "beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1
}, [kind for kind in KINDS if kind not in ["unipc", "deis", "dpm++2m-sde", "kdpm2-a"]])
for spacing in ["leading", "trailing"]:
    variant(f"cosine betas {spacing}", TINY, {
        "beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1,
        "timestep_spacing": spacing,
    }, ["dpm++2m"])
variant("trained betas", TINY, {
    "num_train_timesteps": 20, "trained_betas": [0.01 + 0.005 * i for i in range(20)]
}, [kind for kind in KINDS if kind not in ["lcm", "tcd"]], (5,))
variant("fewer training timesteps", TINY, {"num_train_timesteps": 333}, EVERYONE)
variant("zero terminal snr", SD21, {
    "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"
}, EVERYONE)
variant("karras", TINY, {"use_karras_sigmas": True}, UNCLIPPED)
variant("karras with ends", TINY, {
    "use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0
}, ["euler", "dpm++2m", "unipc", "lms"])
variant("exponential with ends", TINY, {
    "use_exponential_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0
}, ["lms", "deis"])
for spread in SPREADS:
    variant(f"cosine betas {spread}", TINY, {
        "beta_schedule": "squaredcos_cap_v2", "sigma_max": 20.0, f"use_{spread}_sigmas": True
    }, ["dpm++2m", "dpm++2s", "heun"], (5,))
    variant(f"{spread} to sigma_min", TINY, {
        "final_sigmas_type": "sigma_min", f"use_{spread}_sigmas": True
    }, ["dpm++2m", "dpm++2s", "euler"])
    variant(f"{spread} leading", TINY, {
        "timestep_spacing": "leading", f"use_{spread}_sigmas": True
    }, ["euler", "lms", "kdpm2"])
variant("alpha to one", SD15, {"set_alpha_to_one": True}, ["ddim", "pndm"])
variant("sigma_min", TINY, {"final_sigmas_type": "sigma_min"}, ["dpm++2m", "euler"], (14, 15))
for spacing in ["leading", "trailing", "linspace"]:
    variant(f"runge-kutta {spacing}", SD21, {
        "skip_prk_steps": ..., "timestep_spacing": spacing
    }, ["pndm"], (4, 23))
SOLVER = ["dpm++2m"]
variant("heun", TINY, {"solver_type": "heun"}, SOLVERS)
variant("bh1", own("unipc", **STABLE, final_sigmas_type="sigma_min", solver_type="bh1"), {}, ["unipc"])
variant("bh2", TINY, {"solver_type": "bh2"}, SOLVERS)
variant("logrho", TINY, {"solver_type": "logrho"}, SOLVERS)
variant("first order", TINY, {"solver_order": 1}, SOLVERS)
variant("third order", TINY, {"solver_order": 3}, SOLVERS, (2, 3, 4, 5, 14, 20))
variant("third order heun", TINY, {"solver_order": 3, "solver_type": "heun"}, SOLVERS, (7, 20))
variant("groups that fit", TINY, {
    "solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"
}, ["dpm++2s"], (6, 7, 8))
variant("groups that fit, heun", TINY, {
    "solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min",
    "solver_type": "heun", "algorithm_type": "sde-dpmsolver++"
}, ["dpm++2s"], (6,))
variant("noise", TINY, {"predict_x0": False, "final_sigmas_type": "sigma_min"}, ["unipc"], (6, 20))
variant("uncorrected", TINY, {"disable_corrector": [0, 2], "solver_order": 3}, ["unipc"], (6, 20))
variant("high order deis", TINY, {"lower_order_final": False, "solver_order": 3}, ["deis"], (6, 20))
for kind in ["fixed_small", "fixed_small_log", "fixed_large"]:
    variant(kind, TINY, {"variance_type": kind}, ["ddpm"])
variant("other consistency", TINY, {
    "original_inference_steps": 30, "timestep_scaling": 5.0, "set_alpha_to_one": True
}, ["lcm", "tcd"], (4, 7, 30))
variant("third order to sigma_min", TINY, {
    "solver_order": 3, "final_sigmas_type": "sigma_min", "prediction_type": "v_prediction"
}, SOLVER, (8, 14, 15, 20))
variant("high order to the end", TINY, {
    "lower_order_final": False, "final_sigmas_type": "sigma_min"
}, SOLVER)
variant("euler at final", TINY, {
    "lower_order_final": False, "euler_at_final": True, "final_sigmas_type": "sigma_min"
}, SOLVER)


# How much of a run is left, and runs in which nothing is left of the first steps' kept outputs.
STRENGTHS = [(7, 1.0), (7, 0.6), (20, 0.29), (4, 0.5)]
IMAGE_CASES = [
    (config, kind, steps, strength)
    for config in ["tiny-sd", "sd21", "leading velocity", "trailing epsilon"]
    for kind in KINDS
    for steps, strength in STRENGTHS
]
IMAGE_CASES += [
    (config, kind, steps, strength)
    for config, kind in [
        ("runge-kutta leading", "pndm"), *[("third order", kind) for kind in SOLVERS]
    ]
    for steps, strength in [(4, 0.5), (12, 0.9), (20, 0.6)]
]
IMAGE_CASES += [("tiny-sd", f"{kind}-karras", 9, 0.6) for kind in SPREADABLE]
# In a step to a 500th of its sigma, f32 leaves kdpm2-a two digits of the sigma without noise.
CASES = [case for case in CASES if not (case[1].startswith("kdpm2-a") and case[2] == 2)]


def pipeline_of(config, kind):
    loaded = KINDS[NAMES[config["_class_name"]]].from_config(config)
    pipe = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=None, scheduler=loaded,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    kind, spread = (kind.rsplit("-", 1) + [""])[:2] if kind.split("-")[-1] in SPREADS else (kind, "")
    changes = {f"use_{name}_sigmas": name == spread for name in SPREADS if spread}
    if NAMES[config["_class_name"]] != kind or changes:
        changes |= ALGORITHMS.get(kind, {})
        pipe.scheduler = KINDS[kind].from_config(pipe.scheduler.config, **changes)
    return pipe


def model(values, timestep):
    outputs = [math.sin(v + timestep / 100) for v in values.double().flatten().tolist()]
    return torch.tensor([outputs], dtype=torch.float32)


def noise(draw):
    values = [1.5 * math.sin(12.9898 * (3 * draw + place) + 1) for place in range(3)]
    return torch.tensor([values], dtype=torch.float32)


IMAGE = torch.tensor([[0.4, -0.7, 1.1]])
KEPT = torch.tensor([[False, True, False]])


def digits(sample):
    return [float(f"{value:.7g}") for value in sample.flatten().tolist()]


def shortest(timestep):
    """The fewest digits that are this f32."""
    return float(numpy.format_float_positional(numpy.float32(timestep), unique=True))


def last(values, count):
    """All of twice as many; of more, so many."""
    return values if len(values) <= 2 * count else values[-count:]


def first_timesteps(scheduler, steps, strength):
    """get_timesteps of both pipelines."""
    pipeline = SimpleNamespace(scheduler=scheduler)
    timesteps, _ = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(
        pipeline, steps, strength, "cpu"
    )
    return timesteps


def trajectory(config_name, kind, steps, strength=None):
    pipe = pipeline_of(CONFIGS[config_name], kind)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    draws = iter(range(1, 10_000))
    for name, module in sys.modules.items():
        if name.startswith("diffusers.schedulers.") and "randn_tensor" in vars(module):
            module.randn_tensor = lambda *args, **kwargs: noise(next(draws))
    extra = pipe.prepare_extra_step_kwargs(None, 0.0)
    timesteps = scheduler.timesteps
    sample = noise(0) * scheduler.init_noise_sigma
    start = {"init_noise_sigma": float(scheduler.init_noise_sigma)}
    if strength is not None:
        timesteps = first_timesteps(scheduler, steps, strength)
        sample = scheduler.add_noise(IMAGE, noise(0), timesteps[:1])
        start = {"strength": strength, "first": digits(sample)}
    samples = []
    for index, timestep in enumerate(timesteps):
        scaled = scheduler.scale_model_input(sample, timestep)
        output = model(scaled, timestep.item())
        sample = scheduler.step(output, timestep, sample, **extra, return_dict=False)[0]
        if strength is not None:
            image = IMAGE
            if index < len(timesteps) - 1:
                image = scheduler.add_noise(IMAGE, noise(0), timesteps[index + 1 : index + 2])
            sample = torch.where(KEPT, image, sample)
        samples.append(digits(sample))
    assert all(math.isfinite(v) for row in samples for v in row), (config_name, kind, steps)
    return {
        "config": config_name,
        "scheduler": kind,
        "steps": steps,
        "evaluations": len(timesteps),
        "timesteps": last([shortest(timestep) for timestep in timesteps.tolist()], 8),
        **start,
        "samples": last(samples, 4),
    }


def readable(config):
    """As the program's JSON reader hands it on: -Infinity is a string."""
    text = {float("-inf"): "-Infinity"}
    return {k: text.get(v, v) if isinstance(v, float) else v for k, v in config.items()}


def line(value):
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace(".0,", ",").replace(".0]", "]")


with open("tests/fixtures/schedules.json", "w") as out:
    configs = ",\n".join(f"{json.dumps(k)}:{line(readable(v))}" for k, v in CONFIGS.items())
    cases = ",\n".join(line(trajectory(*case)) for case in CASES + IMAGE_CASES)
    out.write(f'{{"configs":{{\n{configs}\n}},\n"cases":[\n{cases}\n]}}\n')
print(len(CASES + IMAGE_CASES), "cases")

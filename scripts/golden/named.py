"""tiny-sd's names of schedulers, and what they are in diffusers."""

import diffusers

PREFIXES = {
    "dpm++2m": "DPMSolverMultistep",
    "dpm++2m-sde": "DPMSolverMultistep",
    "dpm++2s": "DPMSolverSinglestep",
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "pndm": "PNDM",
    "euler": "EulerDiscrete",
    "euler-a": "EulerAncestralDiscrete",
    "heun": "HeunDiscrete",
    "lms": "LMSDiscrete",
    "deis": "DEISMultistep",
    "unipc": "UniPCMultistep",
    "kdpm2": "KDPM2Discrete",
    "kdpm2-a": "KDPM2AncestralDiscrete",
    "lcm": "LCM",
    "tcd": "TCD",
}
ALGORITHMS = {"dpm++2m": "dpmsolver++", "dpm++2m-sde": "sde-dpmsolver++"}
SPREADS = ["karras", "exponential", "beta"]


def kind(name: str) -> type:
    return getattr(diffusers, f"{PREFIXES[name]}Scheduler")


def names() -> list[str]:
    """All of them, with each of the spacings of sigmas that the class knows."""
    every = []
    for name in PREFIXES:
        known = [spread for spread in SPREADS if f"use_{spread}_sigmas" in kind(name)().config]
        every += [name, *(f"{name}-{spread}" for spread in known)]
    return every


def stepper(name: str, config: dict):
    """The scheduler of this name with the configuration of another one."""
    changes = {}
    head, _, spread = name.rpartition("-")
    if spread in SPREADS:
        name = head
        changes = {f"use_{other}_sigmas": other == spread for other in SPREADS}
    if name in ALGORITHMS:
        changes["algorithm_type"] = ALGORITHMS[name]
    return kind(name).from_config(config, **changes)

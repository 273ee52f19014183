"""The configuration files of the miniature models: the published ones with smaller numbers.

Separate from the code that builds them, because these keys (present, absent, null) are what the
reader under test has to understand: tiny has every key that diffusers 0.19 wrote, sd1 only the few
of SD 1.5 (defaults count: mid block, scaling factor, timestep spacing), sd2 those of SD 2.1.
"""

from dataclasses import dataclass, field, replace

VOCABULARY = 1514  # 512 bytes, 1000 merges, 2 specials
START, END = 1512, 1513

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
PLAIN_DOWN, PLAIN_UP = "DownBlock2D", "UpBlock2D"


@dataclass
class Spec:
    """One model: its files' contents, its weights' seed and gains, and how it is stored."""

    name: str
    seed: int
    unet: dict
    vae: dict
    text_encoder: dict
    scheduler: dict
    model_index: dict
    layout: str  # "pickle", "safetensors" or "sharded-fp16"
    pad_token: str = "<|endoftext|>"
    own_scheduler: str = "dpm++2m"
    # How much of the UNet's output is not "the noise is the sample itself"; 0 = no such wiring.
    residual: float = 0.0
    gains: dict = field(default_factory=dict)


def unet_config(**changed) -> dict:
    base = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "center_input_sample": False,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "out_channels": 4,
        "sample_size": 8,
    }
    return {**base, **changed}


def vae_config(**changed) -> dict:
    base = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "out_channels": 3,
        "sample_size": 64,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    return {**base, **changed}


def text_config(**changed) -> dict:
    base = {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "pad_token_id": 1,
        "torch_dtype": "float16",
        "vocab_size": VOCABULARY,
    }
    return {**base, **changed}


def model_index(**changed) -> dict:
    base = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    return {**base, **changed}


NO_CHECKER = {
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
}

# segmind/tiny-sd's scheduler_config.json; json.dumps writes the bare -Infinity.
DPM_SOLVER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
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

PNDM = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}

DDIM = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.8.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}

TINY_UNET = unet_config(
    _diffusers_version="0.19.0.dev0",
    addition_embed_type=None,
    addition_embed_type_num_heads=64,
    addition_time_embed_dim=None,
    attention_head_dim=8,
    block_out_channels=[16, 24, 40],
    class_embed_type=None,
    class_embeddings_concat=False,
    conv_in_kernel=3,
    conv_out_kernel=3,
    cross_attention_dim=32,
    cross_attention_norm=None,
    down_block_types=[CROSS_DOWN] * 3,
    dual_cross_attention=False,
    encoder_hid_dim=None,
    encoder_hid_dim_type=None,
    layers_per_block=1,
    mid_block_only_cross_attention=None,
    mid_block_type=None,
    norm_num_groups=8,
    num_attention_heads=None,
    num_class_embeds=None,
    only_cross_attention=False,
    projection_class_embeddings_input_dim=None,
    resnet_out_scale_factor=1.0,
    resnet_skip_time_act=False,
    resnet_time_scale_shift="default",
    time_cond_proj_dim=None,
    time_embedding_act_fn=None,
    time_embedding_dim=None,
    time_embedding_type="positional",
    timestep_post_act=None,
    transformer_layers_per_block=1,
    up_block_types=[CROSS_UP] * 3,
    upcast_attention=False,
    use_linear_projection=False,
)

TINY = Spec(
    name="tiny",
    seed=101,
    unet=TINY_UNET,
    vae=vae_config(
        _diffusers_version="0.19.0.dev0",
        block_out_channels=[8, 8, 16, 16],
        layers_per_block=2,
        norm_num_groups=8,
        scaling_factor=0.18215,
    ),
    text_encoder=text_config(
        hidden_act="quick_gelu",
        hidden_size=32,
        intermediate_size=128,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=32,
    ),
    scheduler=DPM_SOLVER,
    model_index=model_index(_diffusers_version="0.19.0.dev0", **NO_CHECKER),
    layout="pickle",
    residual=0.15,
)

SD1 = Spec(
    name="sd1",
    seed=201,
    unet=unet_config(
        _diffusers_version="0.15.0",
        attention_head_dim=4,
        block_out_channels=[16, 16, 24, 24],
        cross_attention_dim=24,
        down_block_types=[CROSS_DOWN] * 3 + [PLAIN_DOWN],
        layers_per_block=2,
        norm_num_groups=8,
        up_block_types=[PLAIN_UP] + [CROSS_UP] * 3,
    ),
    vae=vae_config(
        _diffusers_version="0.15.0",
        block_out_channels=[8, 8, 16, 16],
        layers_per_block=2,
        norm_num_groups=8,
    ),
    text_encoder=text_config(
        hidden_act="quick_gelu",
        hidden_size=24,
        intermediate_size=96,
        num_attention_heads=3,
        num_hidden_layers=4,
        projection_dim=24,
    ),
    scheduler=PNDM,
    model_index=model_index(
        _diffusers_version="0.15.0", scheduler=["diffusers", "PNDMScheduler"]
    ),
    layout="safetensors",
    own_scheduler="pndm",
    residual=0.2,
)

SD2 = Spec(
    name="sd2",
    seed=311,
    unet=unet_config(
        _diffusers_version="0.10.0",
        attention_head_dim=[1, 2, 3, 3],
        block_out_channels=[8, 16, 24, 24],
        cross_attention_dim=32,
        down_block_types=[CROSS_DOWN] * 3 + [PLAIN_DOWN],
        dual_cross_attention=False,
        layers_per_block=2,
        norm_num_groups=4,
        num_class_embeds=None,
        only_cross_attention=False,
        up_block_types=[PLAIN_UP] + [CROSS_UP] * 3,
        upcast_attention=True,
        use_linear_projection=True,
    ),
    vae=vae_config(
        _diffusers_version="0.10.0",
        block_out_channels=[8, 8, 16, 16],
        layers_per_block=2,
        norm_num_groups=4,
        scaling_factor=0.18215,
    ),
    text_encoder=text_config(
        hidden_act="gelu",
        hidden_size=32,
        intermediate_size=128,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=64,
    ),
    scheduler=DDIM,
    model_index=model_index(
        _diffusers_version="0.10.0", scheduler=["diffusers", "DDIMScheduler"], **NO_CHECKER
    ),
    layout="sharded-fp16",
    pad_token="!",
    own_scheduler="ddim",
    gains={"unet": {r"attn2\.to_(v|out)": 2.5}, "vae": {r"decoder\.conv_out": 0.6}},
)

SPECS = [TINY, SD1, SD2]

# segmind/tiny-sd in its published size, for scripts/full-size.
TINY_SD = replace(
    TINY,
    name="tiny-sd",
    unet=TINY_UNET
    | {
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 768,
        "norm_num_groups": 32,
        "sample_size": 64,
    },
    vae=TINY.vae
    | {"block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32, "sample_size": 512},
    text_encoder=TINY.text_encoder
    | {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
        "vocab_size": 49408,
    },
)

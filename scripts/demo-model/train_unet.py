"""Trains the text encoder and the UNet of the built-in model, on `WORK/latents.pt`.

v-prediction on a schedule that ends in pure noise (Lin et al. 2023), so that backgrounds of one
colour come out in it; a tenth of the captions is dropped for classifier-free guidance. The text
encoder starts by learning to name what captions say. Goes on from `WORK/unet.checkpoint`, and
leaves the moving averages in `WORK/text_encoder` and `WORK/unet`.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import parallel
import portraits as drawn
from captions import caption
from train_tokenizer import CONTEXT

WIDTH = 112
BATCH = 64  # over all processes
RATE = 1e-3
DECAY = 0.4  # the part of the training, its last, in which the rate falls
DROPPED = 0.1
FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
WARM_UP = 500  # steps of the text encoder alone
SCHEDULE = dict(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000,
    prediction_type="v_prediction", rescale_betas_zero_snr=True,
)
LABELS = dict(
    style=("long", "short", "ponytail", "bun", "curly", "spiky"), hair=tuple(drawn.HAIR_COLORS),
    skin=tuple(drawn.SKINS), glasses=drawn.GLASSES, hat=drawn.HATS, mouth=drawn.MOUTHS,
    hat_color=tuple(drawn.SHIRTS), shirt=tuple(drawn.SHIRTS), background=tuple(drawn.BACKGROUNDS),
    person=("girl", "boy"), beard=(False, True),
)


def text_encoder(tokenizer):
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=CONTEXT,
        projection_dim=WIDTH, hidden_act="quick_gelu", bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    ))


def unet():
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 80, 96),
        layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=2, norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type=None,
    )


def tokens(tokenizer, texts):
    """(batch, CONTEXT) of ids."""
    ids = tokenizer(texts, padding="max_length", max_length=CONTEXT, truncation=True,
                    return_tensors="pt").input_ids
    return ids.to(parallel.DEVICE)


def warm_up(encoder, tokenizer, portraits, rank, processes):
    """Teaches the encoder to tell each attribute from captions, with heads that are not kept."""
    query = torch.nn.Parameter(torch.randn(len(LABELS), WIDTH, device=parallel.DEVICE) * 0.3)
    pair = torch.nn.Linear(WIDTH, 2 * WIDTH).to(parallel.DEVICE)
    heads = torch.nn.ModuleList(torch.nn.Linear(WIDTH, len(names)) for names in LABELS.values())
    heads.to(parallel.DEVICE)
    parameters = [*encoder.parameters(), query, *pair.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1.5e-3, (0.9, 0.98))
    gradients, right = parallel.Gradients(parameters), []
    for step in range(WARM_UP):
        chance = random.Random(f"warm-up {rank} {step}")
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 50) * (1 - 0.8 * step / WARM_UP)
        batch = chance.choices(portraits, k=BATCH // processes)
        hidden = encoder(tokens(tokenizer, [caption(p, chance) for p in batch])).last_hidden_state
        key, value = pair(hidden).chunk(2, -1)
        seen = torch.softmax(query @ key.transpose(1, 2) / WIDTH**0.5, -1) @ value
        loss, right = 0, right[-49:] + [[]]
        for i, (name, values) in enumerate(LABELS.items()):
            label = [values.index(getattr(p, name)) for p in batch]
            label = torch.tensor(label, device=parallel.DEVICE)
            guess = heads[i](seen[:, i])
            loss = loss + functional.cross_entropy(guess, label)
            right[-1].append((guess.argmax(1) == label).float().mean().item())
        gradients.zero()
        loss.backward()
        gradients.share(5.0)
        optimizer.step()
    if rank == 0:
        shares = np.mean(right, 0).round(2).tolist()
        print("told from captions:", dict(zip(LABELS, shares)), flush=True)
    for parameter in encoder.parameters():
        parameter.grad = None


class Training:
    """The models, and all that a checkpoint keeps."""

    def __init__(self, work, rank, processes, steps):
        self.work, self.rank, self.processes, self.steps = work, rank, processes, steps
        torch.manual_seed(1)
        kept = torch.load(work / "latents.pt")
        self.latents = kept["latents"]
        self.portraits = [drawn.Portrait(*fields) for fields in kept["portraits"]]
        self.tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        self.encoder, self.unet = text_encoder(self.tokenizer), unet()
        self.encoder.to(parallel.DEVICE), self.unet.to(parallel.DEVICE)
        self.parameters = [*self.encoder.parameters(), *self.unet.parameters()]
        checkpoint = work / "unet.checkpoint"
        if not checkpoint.exists():
            warm_up(self.encoder, self.tokenizer, self.portraits, rank, processes)
        self.gradients = parallel.Gradients(self.parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters, RATE, (0.9, 0.99), weight_decay=0.01, fused=True)
        self.average, self.start = parallel.Average(self.parameters, 0.999), 0
        if checkpoint.exists():
            kept = torch.load(checkpoint, map_location=parallel.DEVICE)
            self.encoder.load_state_dict(kept["encoder"])
            self.unet.load_state_dict(kept["unet"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.average.mean, self.start = kept["average"], kept["step"]
        self.noise = DDPMScheduler(**SCHEDULE)

    def rate(self, step):
        return RATE * min(1, (step + 1) / 200, max(0.01, (1 - step / self.steps) / DECAY))

    def loss(self, step):
        """The mean squared error of the velocity, for latents by chance and times spread evenly."""
        torch.manual_seed(1_000_003 * self.rank + step)
        chance, count = random.Random(f"unet {self.rank} {step}"), BATCH // self.processes
        chosen = torch.randint(len(self.latents), (count,))
        texts = ["" if chance.random() < DROPPED else caption(self.portraits[i], chance)
                 for i in chosen.tolist()]
        timesteps = ((torch.arange(count) + torch.rand(1)) * 1000 / count).long()
        latents, noise = self.latents[chosen], torch.randn(count, 4, 16, 16)
        noisy = self.noise.add_noise(latents, noise, timesteps)
        velocity = self.noise.get_velocity(latents, noise, timesteps).to(parallel.DEVICE)
        noisy, timesteps = noisy.to(parallel.DEVICE), timesteps.to(parallel.DEVICE)
        with torch.autocast(parallel.DEVICE.type, torch.bfloat16):
            hidden = self.encoder(tokens(self.tokenizer, texts)).last_hidden_state
            predicted = self.unet(noisy, timesteps, hidden).sample
        return ((predicted.float() - velocity) ** 2).mean()

    def save(self, step):
        parallel.save(self.work / "unet.checkpoint", dict(
            encoder=self.encoder.state_dict(), unet=self.unet.state_dict(), step=step,
            optimizer=self.optimizer.state_dict(), average=self.average.mean))
        self.average.swap()
        self.encoder.save_pretrained(self.work / "text_encoder")
        self.unet.save_pretrained(self.work / "unet")
        self.average.swap()

    def run(self):
        began, errors, lasting = time.time(), [], []
        for step in range(self.start, self.steps):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(step)
            self.gradients.zero()
            loss = self.loss(step)
            loss.backward()
            self.gradients.share(1.0)
            self.optimizer.step()
            self.average.update(step)
            errors.append(loss.item())
            if self.rank == 0 and (step + 1) % 100 == 0:
                speed = (step + 1 - self.start) / (time.time() - began)
                loss = np.mean(errors)
                print(f"step {step + 1}: loss {loss:.4f}, {speed:.2f} steps/s", flush=True)
                lasting = [*lasting[-9:], float(np.mean(errors))]
                errors.clear()
            if self.rank == 0 and ((step + 1) % 500 == 0 or step + 1 == self.steps):
                self.save(step + 1)
                loss = round(float(np.mean(lasting or errors)), 4)
                facts = dict(steps=step + 1, samples=(step + 1) * BATCH,
                             pictures=len(self.latents), loss=loss)
                (self.work / "unet.json").write_text(json.dumps(facts) + "\n")


def train(rank, processes, steps, work):
    # The fused kernel's backward pass is slow on a CPU: without it, a third more steps a second.
    with sdpa_kernel(SDPBackend.MATH if parallel.DEVICE.type == "cpu" else list(FUSED)):
        Training(work, rank, processes, steps).run()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--processes", type=int, default=parallel.PROCESSES)
    args = parser.parse_args()
    parallel.spawn(train, args.processes, args.steps, args.work)


if __name__ == "__main__":
    main()

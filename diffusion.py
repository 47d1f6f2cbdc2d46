"""diffusion.py: stage 2, image-conditioned latent diffusion (3.2, Algorithms 1, 2).

    python diffusion.py                       # the paper's run: COCO, 512 px, one GPU
    torchrun --nproc_per_node=8 diffusion.py  # on eight; --batch_size is that of all
    python diffusion.py --model small         # from scratch, no download
    python diffusion.py --ckpt checkpoints/ldm.pt --classes --out classes    # Table 2
    python diffusion.py --ckpt checkpoints/ldm.pt --distill 1 --iters 5000 --out few

Symbols (paper, section 3): x image, y id map, j timestep in 0..T-1,
    ab_j               alphas_cumprod[j]
    z = scale * E(y)   latent of the id map                       B x 4 x h x w
    eps                Gaussian noise                             B x 4 x h x w
    z^j                z with noise eps at timestep j (eq. 3)     B x 4 x h x w
    image_latent       latent of the image, z_i in the paper      B x c x h x w
    condition          what the UNet sees of the image: in the paper image_latent
    self_cond          the previous estimate of z, called z^0     B x 4 x h x w
Builds on stage 1 (ae.pt in --out, or --ckpt). Writes ldm.pt (all that sampling needs),
ldm_state.pt (for --resume), ldm_log.jsonl, ldm.json and ldm.png to --out.
"""

import contextlib
import fnmatch
import functools
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import data  # before torch: sets a variable that PyTorch reads on import
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

import ae
import pq
from data import BadInput, amount, flag, fraction, natural, number, positive

SD_SCALE = 0.18215  # Stable Diffusion's factor on its VAE's latents


# ----------------------------------------------------------------------------- settings
@dataclass
class Settings(data.Settings):
    """The paper's values; where the paper is silent, those of the authors' release."""

    iters: int = flag(50_000, "iterations; 0: only evaluate --ckpt", natural)
    batch_size: int = flag(256, "images per iteration, over all processes", positive)
    micro_batch: int = flag(32, "images per device and forward pass", positive)
    lr: float = flag(1e-4, "peak learning rate of AdamW", amount)
    loss_weight: str = flag(
        "linear", "w_j of eq. 4 (the authors' code: snr)", ["linear", "snr", "none"]
    )
    latent_scale: float = flag(
        SD_SCALE, "factor that scales the latents of id maps", number(float, 1e-6)
    )
    classes: bool = flag(False, "Table 2: train only the classifier", bool)
    size: int = 512  # side S of the square network input: that of stage 1
    self_cond_share: float = 1.0  # of samples that are self-conditioned (authors: all)
    scheduler: str = "ddim"  # see SCHEDULERS
    steps: int = 50  # sampling steps
    weight_decay: float = 0.05
    schedule: str = "cosine"  # learning rate after the warm-up: constant or cosine
    clip: float = 1.0  # the gradient's norm is clipped to this
    eval_images: int = 256  # the first of val_split; sample.py evaluates them all

    # beyond the paper
    given: float = flag(
        0.0, "share of samples that are told a part of the map", fraction
    )
    distill: int = flag(0, "learn to sample in few passes: see `few_passes`", natural)
    augment: float = flag(
        0.0, "other colours, turns and scaled crops, by so much", amount
    )

    stage = "ldm"
    NETWORK = ("latent_scale", "scheduler", "steps")

    def start(self):
        """The checkpoint to start from: stage 1's, or stage 2's to train further."""
        path = self.ckpt or f"{self.out}/ae.pt"
        if self.resume:
            path = f"{self.out}/ldm.pt"
        if not self.ckpt and not Path(path).is_file():
            raise BadInput(
                f"{path}: not there; train stage 1 first (python ae.py --out "
                f"{self.out}), or name its checkpoint with --ckpt"
            )
        return path

    def stored(self):
        """The checkpoint to start from and its settings."""
        path = self.start()
        return path, read_checkpoint(path)["settings"]


# --model small: from scratch, without Stable Diffusion. Beyond the paper, the network
# predicts v, its schedule ends in pure noise (ab_(T-1) = 0), and its weights are
# averaged: all of this helps a small network that trains for a short time.
SMALL = {
    "iters": 12_000,
    "batch_size": 32,
    "lr": 1e-3,
    "loss_weight": "none",
    "latent_scale": 0.36,
    "self_cond_share": 0.5,
    "scheduler": "ddim-v",
    "steps": 10,
    "weight_decay": 0.01,
    "ema": 0.998,
    "eval_images": 64,
}


# ------------------------------------------------------------------- the DDIM scheduler
class DDIM:
    """Stable Diffusion's noise schedule, DDIM's sampler (Song et al. 2021; eta = 0)."""

    T = 1000

    def __init__(self, beta_start=0.00085, beta_end=0.012):
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, self.T) ** 2
        self.alphas_cumprod = (1 - betas).cumprod(0)  # T, float32

    def scales(self, j, z):
        """sqrt(ab_j), sqrt(1 - ab_j) of j (int or B), to multiply B x 4 x h x w."""
        self.alphas_cumprod = self.alphas_cumprod.to(z.device)  # moves once
        ab = self.alphas_cumprod[j].reshape(-1, 1, 1, 1)
        return ab.sqrt(), (1 - ab).sqrt()

    def add_noise(self, z, eps, j):
        """eq. 3: z^j = sqrt(ab_j) z + sqrt(1 - ab_j) eps."""
        a, b = self.scales(j, z)
        return a * z + b * eps

    def target(self, z, eps, j):
        """What the network learns to predict: eps in the paper."""
        return eps

    def remove_noise(self, zj, output, j):
        """eq. 3 solved for z: the estimate of z^0 from z^j and the network's output."""
        a, b = self.scales(j, zj)
        return (zj - b * output) / a

    def step(self, zj, z0, j, j_prev):
        """eq. 5, eta = 0: from z^j and an estimate of z^0 to the next timestep, j_prev.

        eps is worked out from z0, which Algorithm 3 changes. After the last timestep
        j_prev is -1 and z goes to ab_0, as in Stable Diffusion; sampling returns z0.
        """
        a, b = self.scales(j, zj)
        eps = (zj - a * z0) / b
        return self.add_noise(z0, eps, max(j_prev, 0))

    def timesteps(self, steps):
        """`steps` equidistant timesteps from T-1 down: [(j, the next j or -1), ...].

        Raises BadInput unless there are 1 to T of them.
        """
        if not 1 <= steps <= self.T:
            raise BadInput(f"--steps {steps}: must be in 1..{self.T}")
        stride = self.T / steps
        timesteps = [round((i + 1) * stride) - 1 for i in reversed(range(steps))]
        return list(zip(timesteps, [*timesteps[1:], -1]))

    def loss_weights(self, kind):
        """w_j of eq. 4: T floats.

        linear: 1, but decayed linearly towards 0 over the lowest quarter of the
        timesteps (the paper); snr: min(SNR, 2) / SNR (the authors' code); none: 1.
        """
        if kind == "linear":
            return (torch.arange(1, self.T + 1) / (self.T / 4)).clamp(max=1)
        if kind == "snr":
            snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
            return (2 / snr).clamp(max=1)
        return torch.ones(self.T)


# ------------------------------------------------------------------------- the networks
class SDEncoder(nn.Module):
    """The encoder of Stable Diffusion's VAE: the latent's mode times 0.18215.

    vae: an AutoencoderKL; None: an untrained one of this config.
    """

    def __init__(self, scale=SD_SCALE, vae=None, **config):
        super().__init__()
        vae = vae or AutoencoderKL(**config)
        self.config = {**vae.config, "kind": "sd", "scale": scale}
        self.scale = scale
        self.channels = vae.config.latent_channels
        self.factor = 2 ** (len(vae.encoder.down_blocks) - 1)
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv

    def forward(self, x):
        """x: B x 3 x H x W in -1..1 -> B x 4 x H/8 x W/8."""
        mean, _ = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return self.scale * mean


class Pixels(nn.PixelUnshuffle):
    """No network (--model small): B x 3 x H x W in -1..1 -> B x 3 f^2 x H/f x W/f."""

    def __init__(self, factor):
        super().__init__(factor)
        self.config = {"kind": "pixels", "factor": factor}
        self.channels = 3 * factor**2
        self.factor = factor


IMAGE_ENCODERS = {"sd": SDEncoder, "pixels": Pixels}


def build_unet(config):
    """Stable Diffusion's UNet without cross-attention (diffusers skips a None)."""
    unet = UNet2DConditionModel(**config)
    for block in unet.modules():
        if hasattr(block, "attn2"):
            block.attn2 = None
            block.norm2 = None
    return unet


def small_unet_config(in_channels, latent_size, channels=48):
    """Config of a small UNet: three levels, self-attention up to 32 x 32 cells."""
    down, up = [], []
    for level in range(3):
        side = latent_size >> level
        kind = "CrossAttn" if side**2 <= 1024 else ""
        down.append(f"{kind}DownBlock2D")
        up.insert(0, f"{kind}UpBlock2D")
    return {
        "in_channels": in_channels,
        "block_out_channels": [channels, 2 * channels, 2 * channels],
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "attention_head_dim": 4,  # the number of heads, in spite of the name
        "cross_attention_dim": 8,  # without effect
    }


def grow_conv_in(unet, count, place):
    """The UNet without cross-attention, and `count` new input channels before `place`.

    Their weights are zero, so that at first it computes what it did before.
    """
    in_channels = unet.config.in_channels + count
    grown = build_unet({**unet.config, "in_channels": in_channels})
    weights = unet.state_dict()
    old = weights["conv_in.weight"]  # C x in x 3 x 3
    zeros = torch.zeros(len(old), count, 3, 3)
    weights["conv_in.weight"] = torch.cat(
        [old[:, :place], zeros, old[:, place:]], dim=1
    )
    # strict=False: the weights of cross-attention are not used
    grown.load_state_dict(weights, strict=False)
    return grown


# ------------------------------------------------------------------- Algorithms 1 and 2
class LDM(nn.Module):
    """The whole model: `forward` is Algorithm 1, `sample` is Algorithm 2.

    autoencoder: stage 1; image_encoder: one of IMAGE_ENCODERS; both are frozen.
    settings: as a checkpoint stores them (see DEFAULTS).
    """

    def __init__(self, autoencoder, image_encoder, unet, settings):
        super().__init__()
        self.autoencoder = autoencoder.requires_grad_(False)
        self.image_encoder = image_encoder.requires_grad_(False)
        self.condition_channels = image_encoder.channels
        self.unet = unet
        self.settings = {
            **settings,
            "autoencoder": autoencoder.settings,
            "image_encoder": image_encoder.config,
            "unet": dict(unet.config),
        }
        scheduler = SCHEDULERS[settings["scheduler"]]
        self.ddim = scheduler(settings["beta_start"], settings["beta_end"])
        self.scale = settings["latent_scale"]
        # For training only: w_j, and the share of samples that are self-conditioned.
        self.loss_weights = torch.ones(self.ddim.T)
        self.self_cond_share = 1.0
        self.classifier = None  # Table 2

    def train(self, mode=True):
        """Frozen parts stay in evaluation mode."""
        super().train(mode)
        self.autoencoder.eval()
        self.image_encoder.eval()
        return self

    def encode(self, ids):
        """y (B x S x S ids) -> z (B x 4 x h x w)."""
        mean, _ = self.autoencoder.encode(ids)
        return self.scale * mean

    def decode(self, z):
        """z (B x 4 x h x w) -> logits (B x N x 4h x 4w), in fp32."""
        with torch.autocast(z.device.type, enabled=False):
            return self.autoencoder.decode(z / self.scale)

    def encode_image(self, images):
        """Images (B x 3 x S x S, uint8) -> image_latent (B x c x h x w)."""
        # In parts of eight: nothing here takes more memory than the VAE's encoder.
        latents = []
        for part in images.split(8):
            latents.append(self.image_encoder(part.float() / 127.5 - 1).float())
        return torch.cat(latents)

    def condition(self, batch):
        """What the UNet sees of the image: image_latent. batch: see `forward`."""
        return self.encode_image(batch["image"])

    def denoise(self, zj, condition, self_cond, j):
        """The UNet output at timestep j (int or B), in the paper eps: B x 4 x h x w."""
        x = torch.cat([zj, condition, self_cond], dim=1)
        x = x[:, : self.unet.config.in_channels]  # no self_cond if trained without
        return self.unet(x, j, encoder_hidden_states=None).sample.float()

    def draw(self, ids):
        """Noise and timesteps of Algorithm 1: eps (B x 4 x h x w) and j (B)."""
        b = len(ids)
        side = ids.shape[-1] // self.autoencoder.factor
        eps = torch.randn(b, 4, side, side, device=ids.device)
        j = torch.randint(0, self.ddim.T, (b,), device=ids.device)
        return eps, j

    def forward(self, batch, eps, j):
        """Algorithm 1: the loss of eq. 4, a mean over all cells.

        batch: ids (B x S x S, uint8), image (B x 3 x S x S, uint8); eps, j: see `draw`.
        """
        with torch.no_grad():
            z = self.encode(batch["ids"])  # encode the target: B x 4 x h x w
            condition = self.condition(batch)  # encode the image: B x c x h x w
            zj = self.ddim.add_noise(z, eps, j)  # eq. 3

            # self-conditioning: a first pass estimates z^0 of the first k samples
            self_cond = torch.zeros_like(z)
            k = math.ceil(self.self_cond_share * len(z))
            if k > 0:
                output = self.denoise(zj[:k], condition[:k], self_cond[:k], j[:k])
                self_cond[:k] = self.ddim.remove_noise(zj[:k], output, j[:k])
        # Drop autocast's cached copies of the weights, which have no gradient.
        torch.clear_autocast_cache()

        output = self.denoise(zj, condition, self_cond, j)
        error = (output - self.ddim.target(z, eps, j)).square()  # B x 4 x h x w
        self.loss_weights = self.loss_weights.to(j.device)  # moves once
        w = self.loss_weights[j].view(-1, 1, 1, 1)  # B x 1 x 1 x 1
        return (w * error * self.cell_weights(batch["ids"])).mean()

    def cell_weights(self, ids):
        """B x S x S ids -> B x 1 x h x w: void has no loss, but counts in the mean."""
        factor = self.autoencoder.factor
        return (ids[:, None, ::factor, ::factor] > 0).float()  # a cell's top-left pixel

    @torch.no_grad()
    def sample(self, condition, noise, steps, trace=None):
        """Algorithm 2: DDIM from pure noise (B x 4 x h x w) to an estimate of z.

        condition: from `condition`; trace: a list to collect all steps' estimates.
        """
        z = noise
        self_cond = torch.zeros_like(noise)
        for j, j_prev in self.ddim.timesteps(steps):
            output = self.denoise(z, condition, self_cond, j)
            z0 = self.ddim.remove_noise(z, output, j)
            z = self.ddim.step(z, z0, j, j_prev)  # eq. 5
            self_cond = z0
            if trace is not None:
                trace.append(z0)
        return z0


# -------------------------------------------------------------- sampling and evaluation
def batch_of(model, samples):
    """Samples (image: H x W x 3, uint8) -> the batch that `LDM.condition` takes."""
    images = [data.resize_image(s["image"], model.settings["size"]) for s in samples]
    return {"image": torch.stack(images).to(model.unet.device)}  # B x 3 x S x S


def noise_of(model, samples, seed):
    """Two noises, B x 4 x h x w each: Algorithm 2's (or 3's), and Algorithm 3's eps0.

    They follow from the seed and a sample's image_id, not from the rest of its batch.
    """
    side = model.settings["size"] // model.autoencoder.factor
    noises = []
    for s in samples:
        name = f"{seed}/{s['image_id']}".encode(errors="surrogateescape")
        generator = torch.Generator().manual_seed(zlib.crc32(name))
        noises.append(torch.randn(8, side, side, generator=generator))
    return torch.stack(noises).to(model.unet.device).chunk(2, dim=1)


def to_ids(model, logits, height, width):
    """Logits (N x h x w) -> ids (height x width, int32) and their probability."""
    if model.settings["postprocess"] != "paper":  # beyond the paper
        return POSTPROCESS[model.settings["postprocess"]](model, logits, height, width)
    return ae.likeliest(logits, height, width)


def background_of(model):
    """The background's id in the maps of a model of instances (beyond the paper)."""
    instances = model.settings["postprocess"] == "instances"
    return data.BACKGROUND_SEGMENT if instances else None  # panoptic maps have none


def sample_maps(model, samples, steps, seed):
    """Algorithm 2 on samples (image: H x W x 3): (ids, probability) for each."""
    condition = model.condition(batch_of(model, samples))
    noise, _ = noise_of(model, samples, seed)
    logits = model.decode(model.sample(condition, noise, steps))  # B x N x 4h x 4w
    found = []
    for own, s in zip(logits, samples):
        found.append(to_ids(model, own, *s["image"].shape[:2]))
    return found


@torch.no_grad()
def evaluate(model, held_out, sample_batch, batch_size):
    """Figures in percent over held-out samples, and rows of pictures.

    sample_batch: a function of a list of samples that returns (ids, probability) for
    each, as `sample_maps` does. With a classifier of the source's categories the
    figures include PQ with classes (Table 2).
    """
    was_training = model.training
    model.eval()
    score = pq.Score()
    classes = ClassScore(model, held_out.source.categories)
    rows = []
    for samples in held_out.batches(batch_size):
        for s, (ids, probability) in zip(samples, sample_batch(samples)):
            found = ae.void_uncertain(ids, probability, model.settings["min_area"])
            score.update(s, found)
            classes.update(s, found)
            if len(rows) < data.PICTURES:
                rows.append(data.comparison(s, ids, found))
    model.train(was_training)
    return {"images": len(held_out), **score.result(), **classes.result()}, rows


# ----------------------------------------------------------------------------- training
def new_model(args):
    """The model to train: that of --ckpt, or a new one on top of stage 1."""
    path = args.start()
    if read_checkpoint(path)["kind"] == "ldm":
        return load_model(path)
    autoencoder = ae.load_autoencoder(path)
    factor = autoencoder.factor
    if args.size % (4 * factor) != 0:
        raise BadInput(
            f"{path}: its size {args.size} must be a multiple of {4 * factor}"
        )
    settings = {**DEFAULTS, **data.settings_of(args)}
    if args.model == "small":
        image_encoder = Pixels(factor)
        channels = 4 + image_encoder.channels + 4  # z^j, image_latent, self_cond
        unet = build_unet(small_unet_config(channels, args.size // factor))
    else:
        image_encoder = SDEncoder(vae=ae.load_sd(args.model, AutoencoderKL, "vae"))
        unet = ae.load_sd(args.model, UNet2DConditionModel, "unet")
        unet = grow_conv_in(unet, image_encoder.channels + 4, place=4)
    if image_encoder.factor != factor:
        raise BadInput(
            f"{path}: the autoencoder shrinks by {factor}, the image encoder by "
            f"{image_encoder.factor}; train stage 1 with the same --model"
        )
    return LDM(autoencoder, image_encoder, unet, settings)


def prepare(model, args, source):
    """Freeze what stays as it is, and note in the model's settings what it is for."""
    model.settings.update(data.settings_of(args))
    model.loss_weights = model.ddim.loss_weights(args.loss_weight)
    self_conditioned = model.unet.config.in_channels > 4 + model.condition_channels
    model.self_cond_share = args.self_cond_share if self_conditioned else 0
    if args.model != "small":
        model.unet.time_embedding.requires_grad_(False)  # as the authors do
        model.unet.enable_gradient_checkpointing()
    if model.settings["postprocess"] == "instances":  # of --ckpt's data
        model.settings.update(postprocess="paper", min_area=None, min_score=0.0)
    if source.background_id is not None:  # beyond the paper: instances are in one piece
        model.settings["postprocess"] = "instances"
        model.cell_weights = functools.partial(instance_weights, model)
        model.settings["min_area"] = data.least_area(
            source,
            args.size,
            crop=args.crop,
            num_ids=model.autoencoder.num_ids,
            factor=model.autoencoder.factor,
        )


def decay_groups(network):
    """Trained parameters in two groups for AdamW: no decay of norm layers (authors)."""
    norms, others = [], []
    for module in network.modules():
        is_norm = isinstance(module, (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d))
        group = norms if is_norm else others
        group += [p for p in module.parameters(recurse=False) if p.requires_grad]
    return [{"params": others}, {"params": norms, "weight_decay": 0.0}]


@data.command
def main(argv=None):
    """Command line: train and evaluate stage 2."""
    args = data.configure(Settings, SMALL, __doc__, argv)
    device, precision = data.setup(args)
    torch.backends.cudnn.benchmark = True  # shapes stay the same
    mixed = data.autocast(device, precision)
    sampling = data.sampling_autocast(device)

    # model
    train_source = data.open_split(args, args.train_split)
    val_source = data.open_split(args, args.val_split)
    model = new_model(args)
    if args.given:  # beyond the paper
        model = tell_given(model)
    if args.distill:  # beyond the paper
        prepare_few_passes(model, args)
    prepare(model, args, train_source)
    prepare_classifier(model, args, train_source)  # Table 2
    model.to(device, memory_format=torch.channels_last).train()
    network = model.classifier if args.classes else model  # the part to train
    ddp = data.distributed(network)

    # data
    num_ids = model.autoencoder.num_ids
    training = data.TrainingSet(
        train_source, args.size, num_ids=num_ids, seed=args.seed
    )
    instances = train_source.background_id is not None  # beyond the paper
    if instances or args.crop or args.augment or args.given:  # beyond the paper
        training = data.Augmented(
            training,
            crop=args.crop,
            augment=args.augment,
            given=args.given,
            background=instances,
        )
    if args.crop:  # beyond the paper
        val_source = data.Crops(val_source, args.crop)
    held_out = data.HeldOut(val_source, args.eval_images)
    held_out.check()
    factor = model.autoencoder.factor
    data.warn_of_ceiling(train_source, args, num_ids, factor=factor)
    sample_batch = functools.partial(
        sample_maps, model, steps=args.steps, seed=args.seed
    )

    # optimiser
    groups = decay_groups(network)
    weights = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(
        groups, lr=args.lr, weight_decay=args.weight_decay, fused=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    average = data.Average(weights, args.ema)
    run = data.Run(args, model, optimizer=optimizer, scaler=scaler, average=average)
    pieces = math.ceil(args.batch_size / (data.WORLD * args.micro_batch))
    batches = iter(data.training_batches(training, run.left, args, pieces=pieces))
    data.say_once(f"stage 2 on {device} in {precision}")

    for it in run.iterations():
        loss = 0.0
        for piece in range(pieces):  # micro-batches
            batch = next(batches)
            batch = {key: v.to(device, non_blocking=True) for key, v in batch.items()}
            eps, j = model.draw(batch["ids"])
            if args.distill and not args.classes:  # beyond the paper
                with mixed, average.in_place():
                    batch, j = few_passes(
                        model, batch, eps=eps, j=j, passes=args.distill
                    )

            # Gradients accumulate in each process over its micro-batches. DDP averages
            # them over processes in the last backward() only: each exchange transfers
            # as many numbers as the network has weights.
            exchange = piece == pieces - 1 or data.WORLD == 1
            with contextlib.nullcontext() if exchange else ddp.no_sync():
                with mixed:
                    piece_loss = ddp(batch, eps, j) / pieces  # Algorithm 1
                scaler.scale(piece_loss).backward()
            loss = loss + piece_loss.detach()

        # optimiser step, skipped if the gradient has overflowed
        lr = data.learning_rate(it, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(weights, args.clip)  # before clipping
        if run.may_step(grad_norm):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average.update(it)

        # now and then log, save and evaluate
        done = it + 1
        if run.time_to_log(done):
            loss = data.mean_over_processes(loss)
            run.log(done, loss=loss, grad_norm=grad_norm, lr=lr)
        if run.time_to_save(done):
            # save first, so that a failing evaluation loses nothing
            run.save(done, model.settings)
            with average.in_place(), sampling:
                figures, rows = evaluate(
                    model, held_out, sample_batch, args.micro_batch
                )
            run.log(done, val_pq=figures["pq"])

    if not run.left:  # --iters 0, or --resume of a finished run
        with average.in_place(), sampling:
            figures, rows = evaluate(model, held_out, sample_batch, args.micro_batch)
    run.report(figures, rows, data.COMPARISON)


# ------------------------------------------------- checkpoints of this stage, read back
# The settings of a checkpoint, with the values to assume where it lacks one.
DEFAULTS = {
    "model": "sd",
    "data": "data/coco",
    "train_split": "train2017",
    "val_split": "val2017",
    "keep_crowds": False,
    "seed": 0,
    "size": 512,
    "crop": 0,
    "scheduler": "ddim",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "latent_scale": SD_SCALE,
    "steps": 50,
    "postprocess": "paper",  # or one of POSTPROCESS
    "min_area": None,  # see `ae.void_uncertain`
    "min_score": 0.0,  # see `sample.doubt`
    "told": False,  # whether it was trained with --given
}


def read_checkpoint(path):
    """A checkpoint of either stage: {kind: "ae" or "ldm", settings, weights}.

    The authors' are read as if they were ours (of stage 1 the kind alone). Raises
    BadInput.
    """
    content = data.load(path)
    if content["kind"] == "release_ldm":  # beyond the paper
        return from_release(content, path)
    if content["kind"] == "release_ae":
        return {"kind": "ae", "settings": {}}
    return content


def load_model(path, **changes):
    """The LDM in a checkpoint, ours or the authors'; `changes` override its settings.

    Raises BadInput.
    """
    content = read_checkpoint(path)
    if content["kind"] != "ldm":
        raise BadInput(
            f"{path}: is a checkpoint of stage 1; one of diffusion.py is needed"
        )
    settings = {**DEFAULTS, **content["settings"]}
    for name, default in DEFAULTS.items():
        kinds = (int, type(None)) if default is None else type(default)
        kinds = (int, float) if kinds is float else kinds
        if not isinstance(settings[name], kinds):
            raise BadInput(f"{path}: its setting {name} is {settings[name]!r:.40}")
    if settings["postprocess"] not in ("paper", *POSTPROCESS):
        raise BadInput(
            f"{path}: its setting postprocess is {settings['postprocess']!r:.40}"
        )
    settings.update(changes)
    with data.reading(path, "checkpoint whose weights fit its settings"):
        image_encoder = dict(settings["image_encoder"])
        kind = IMAGE_ENCODERS[image_encoder.pop("kind")]
        network = ToldLDM if settings["told"] else LDM
        model = network(
            ae.build(settings["autoencoder"]),
            kind(**image_encoder),
            build_unet(settings["unet"]),
            settings,
        )
        if "categories" in settings:
            model.classifier = Classifier(settings["categories"], settings["model"])
        model.load_state_dict(content["weights"])
    return model.eval()


# ------------------------------------------------------- labels for the masks (Table 2)
class Classifier(nn.Module):
    """Labels coarse cells: DeepLabv3's head on a ResNet-50 (small: on four layers).

    `forward` is the training loss. categories: list of {id, name, isthing}.
    """

    def __init__(self, categories, model, pretrained=False):
        super().__init__()
        self.categories = categories
        count = len(categories)
        # of ImageNet's pictures
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        if model == "small":
            layer = torchvision.ops.Conv2dNormActivation  # with batch norm and ReLU
            self.backbone = nn.Sequential(
                *layer(3, 32, stride=2),
                *layer(32, 64, stride=2),
                *layer(64, 64),
                *layer(64, 64),
            )
            pyramid = torchvision.models.segmentation.deeplabv3.ASPP(64, [2, 4, 6], 64)
            self.head = nn.Sequential(pyramid, *layer(64, 64), nn.Conv2d(64, count, 1))
        else:
            network = torchvision.models.segmentation.deeplabv3_resnet50(
                num_classes=count, weights_backbone="DEFAULT" if pretrained else None
            )
            self.backbone = nn.Sequential(*network.backbone.children())
            self.head = network.classifier

    def logits(self, images):
        """Images (B x 3 x H x W, 0..255) -> logits, B x C x H/8 x W/8 (small: H/4)."""
        x = (images / 255 - self.mean) / self.std
        return self.head(self.backbone(x))

    def forward(self, batch, eps=None, j=None):
        """Cross-entropy over the cells that have a category; eps, j: not used."""
        logits = self.logits(batch["image"])  # B x C x h x w
        ids = batch["ids"][:, None].float()  # B x 1 x S x S
        ids = F.interpolate(ids, logits.shape[2:])  # each cell's top-left pixel
        truth = batch["classes"].gather(1, ids.flatten(1).long())  # B x hw, -1 = none
        total = F.cross_entropy(
            logits.flatten(2), truth, ignore_index=-1, reduction="sum"
        )
        return total / (truth >= 0).sum().clamp(min=1)


def same_categories(some, others):
    """Whether two lists of categories have the same ids and names, in any order."""
    some = {(c["id"], c["name"]) for c in some}
    others = {(c["id"], c["name"]) for c in others}
    return some == others


def prepare_classifier(model, args, source):
    """Give the model a classifier of the source's categories for --classes to train.

    An old one of other categories is dropped. Raises BadInput.
    """
    old = model.settings.get("categories")
    if old and same_categories(old, source.categories):
        source.categories = old  # in the order of the classifier's outputs
    elif old:
        data.say_once("note: the classifier of --ckpt knows other categories: dropped")
        model.classifier = None
        del model.settings["categories"]
    if args.classes and model.classifier is None:
        pretrained = args.model not in ("small", "none")
        model.classifier = Classifier(source.categories, args.model, pretrained)
        model.settings["categories"] = source.categories
    at_once = min(args.micro_batch, args.batch_size // data.WORLD)
    if args.classes and at_once < 2:
        raise BadInput("--classes: batch norm needs at least two images on each device")
    if model.classifier is not None:
        model.classifier.requires_grad_(args.classes)


@torch.no_grad()
def label(model, image, ids, merge=True):
    """Label the segments of ids (H x W) of an image (H x W x 3, uint8).

    A segment gets the category of most of its pixels, with their share as the score.
    merge: the segments of a stuff category become one. Without a classifier, every
    segment is of category 1. Returns ids and segments_info.
    """
    if model.classifier is None:
        return ids, data.describe(ids)
    # The classifier sees a picture at the scale of its training (S x S, or of crops).
    size, crop = model.settings["size"], side_of_tiles(model, ids)
    sides = [max(8, round(n * size / (crop or n))) for n in ids.shape]
    x = torch.tensor(image, device=model.unet.device).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, sides, mode="bilinear", antialias=True)  # 1 x 3 x H' x W'
    classes, _ = ae.likeliest(model.classifier.logits(x)[0], *ids.shape)  # H x W

    categories = model.classifier.categories
    best = {}  # id -> (the category of most of its pixels, how many)
    for i, k, pixels in pq.overlaps(ids, classes):
        if i != 0 and pixels > best.get(i, (None, 0))[1]:
            best[i] = k, pixels
    first = {}  # stuff category -> its first segment
    for i, (k, _) in sorted(best.items()):
        if merge and not categories[k]["isthing"]:
            ids = np.where(ids == i, first.setdefault(k, i), ids)
    segments = data.describe(ids)
    for s in segments:
        k, _ = best[s["id"]]
        s["category_id"] = categories[k]["id"]
        s["score"] = round((classes[ids == s["id"]] == k).mean().item(), 4)
    return ids, segments


class ClassScore:
    """PQ with classes, for a model with a classifier of the truth's categories."""

    def __init__(self, model, categories):
        own = model.settings.get("categories")
        self.model = model
        self.quality = None
        if own and same_categories(own, categories):
            self.quality = pq.PanopticQuality(categories)

    def update(self, sample, found):
        """Add an id map (H x W, 0 = void) for a sample."""
        if self.quality is not None:
            labelled = label(self.model, sample["image"], found)
            truth = sample["ids"], sample["segments_info"]
            try:
                self.quality.update(*truth, *labelled, image=sample["file_name"])
            except BadInput as error:  # a category of the truth is not in its list
                data.say_once(f"note: not scored with classes: {error}", anywhere=True)

    def result(self):
        """{"pq_classes", "pq_things", "pq_stuff"} in percent, or nothing."""
        if self.quality is None:
            return {}
        result = self.quality.result()
        groups = {"pq_classes": "All", "pq_things": "Things", "pq_stuff": "Stuff"}
        return pq.percent({name: result[group]["pq"] for name, group in groups.items()})


# ===================================================== beyond the paper: v and zero SNR
class VDDIM(DDIM):
    """The network estimates v = sqrt(ab_j) eps - sqrt(1 - ab_j) z (Salimans and Ho
    2022), and z^(T-1) is pure noise: ab_(T-1) = 0 (Lin et al. 2023). A first estimate
    from pure noise then means something, and training sees what sampling begins
    with.
    """

    def __init__(self, beta_start=0.00085, beta_end=0.012):
        super().__init__(beta_start, beta_end)
        a = self.alphas_cumprod.sqrt()
        a = (a - a[-1]) * a[0] / (a[0] - a[-1])  # the first stays, the last becomes 0
        self.alphas_cumprod = a**2

    def target(self, z, eps, j):
        """v of z noised with eps to timestep j."""
        a, b = self.scales(j, z)
        return a * eps - b * z

    def remove_noise(self, zj, output, j):
        """The estimate of z^0 from z^j and the network's estimate of v."""
        a, b = self.scales(j, zj)
        return a * zj - b * output


# ============================================= beyond the paper: the given part is told
class ToldLDM(LDM):
    """A part of the map that is given (--given, inpaint.py) is told to the network.

    Its latent is a further input, as in Stable Diffusion's inpainting UNet: the
    condition is cat([image_latent, known]), where known is 0 in cells without a given
    pixel. Algorithm 3 alone, which holds given cells at their noised latents, says
    nothing at high noise, where it is decided which segment gets which id.
    """

    def __init__(self, autoencoder, image_encoder, unet, settings):
        super().__init__(autoencoder, image_encoder, unet, settings)
        self.condition_channels = image_encoder.channels + 4

    def condition(self, batch):
        """As LDM's, of a batch that may hold `given` (B x S x S ids, 0 = unknown)."""
        image_latent = super().condition(batch)  # B x c x h x w
        b, _, height, width = image_latent.shape
        known = image_latent.new_zeros(b, 4, height, width)
        if "given" in batch:
            given = (batch["given"] > 0).float()[:, None]  # B x 1 x S x S
            cells = F.max_pool2d(given, self.autoencoder.factor) > 0  # B x 1 x h x w
            known = torch.where(cells, self.encode(batch["given"]), known)
        return torch.cat([image_latent, known], dim=1)


def tell_given(model):
    """The model with four more input channels for what is given, which begin at
    zero.
    """
    if model.settings["told"]:
        return model
    unet = grow_conv_in(model.unet, 4, place=4 + model.image_encoder.channels)
    settings = {**model.settings, "told": True}
    told = ToldLDM(model.autoencoder, model.image_encoder, unet, settings)
    told.classifier = model.classifier
    return told


# ========================================================= beyond the paper: few passes
# From pure noise the best estimate of z^0 is a mean over all numberings of the
# segments, for ids are random: one pass shows a blur. So with --distill the noise
# chooses the numbering: each true segment gets the id that the model's own sample from
# this very noise would give it. (The background of instances has one id in any case.)
def few_passes(model, batch, eps, j, passes):
    """The batch with ids that the noise chooses, and timesteps of which half are T-1.

    batch, eps, j: as `LDM.forward` takes them; passes: of the sample that shows the
    noise's choice.
    """
    batch = dict(batch)
    background = background_of(model)
    batch["ids"] = name_by_noise(
        model,
        batch["ids"],
        condition=model.condition({"image": batch["image"]}),
        noise=eps,
        passes=passes,
        fixed=background,
        near=None if background is None else model.autoencoder.factor,
    )
    if "given" in batch:
        batch["given"] = torch.where(batch["given"] > 0, batch["ids"], 0)
    j = j.clone()
    # the last ones, which are not self-conditioned if half of the samples are
    j[math.ceil(len(j) / 2) :] = model.ddim.T - 1
    return batch, j


@torch.no_grad()
def name_by_noise(model, ids, condition, noise, passes, fixed=None, near=None):
    """Rename the segments of id maps (B x S x S) as a sample from this noise would.

    condition, noise: as `LDM.sample` takes them; fixed, near: see `names_of`.
    """
    renamed = torch.zeros_like(ids)
    z0 = model.sample(condition, noise, passes)
    with torch.autocast(ids.device.type, enabled=False):  # sums over all pixels
        for b, logits in enumerate(model.decode(z0)):  # B x N x S x S would be large
            logits = ae.resize(logits, *ids.shape[1:])  # N x S x S
            name = names_of(ids[b], logits.log_softmax(0), fixed, near)
            renamed[b] = name[ids[b].long()]
    return renamed


def names_of(ids, chances, fixed=None, near=None):
    """New names for the segments of an id map (S x S): a table of N ids.

    From the largest to the smallest segment, each takes the free id that is likeliest
    on its pixels by `chances`, the log-probabilities (N x S x S) of a sample. So a
    segment that the sample merges with another has a name that follows from the noise,
    too.

    For maps of instances: `fixed` is the id of the background, which keeps it; `near`
    is the side of a cell in pixels: two segments need different ids only if they come
    within a cell of each other, because parts that do not touch become segments anyway
    (`instance_ids`).
    """
    masks = masks_of(ids, len(chances))  # N x S x S
    pixels = masks.sum((1, 2))  # N
    scores = chances.flatten(1) @ masks.flatten(1).T  # N new x N old
    scores = (scores / pixels.clamp(min=1)).T.cpu()  # N old x N new ids
    scores[:, 0] = -torch.inf  # void is no name
    competes = torch.ones(len(chances), len(chances), dtype=torch.bool)
    if near is not None:
        around = cells_around(masks, near).flatten(1)  # N x hw
        competes = (around @ around.T > 0).cpu()  # N x N: some cell has both around it
    if fixed is not None:
        scores[:, fixed] = -torch.inf
        scores[fixed, fixed] = 0  # certain

    pixels = pixels.cpu()
    by_size = pixels.argsort(descending=True).tolist()
    present = [old for old in by_size if old != 0 and pixels[old] > 0]
    # In a partial map: what the sample shows only where nothing is given needs its ids
    # itself. They are given away last.
    elsewhere = chances.argmax(0)[ids == 0].unique().tolist()
    likeliest = scores[present].argmax(1).tolist()
    scores[:, [i for i in elsewhere if i not in likeliest]] -= 1e6
    name = torch.zeros(len(chances), dtype=ids.dtype)
    for old in present:
        new = int(scores[old].argmax())
        name[old] = new
        scores[competes[old], new] = -torch.inf  # taken
    return name.to(ids.device)


def prepare_few_passes(model, args):
    """Of pure noise, an estimate of eps says nothing about z^0: estimate v instead."""
    args.scheduler = "ddim-v"
    model.ddim = VDDIM(model.settings["beta_start"], model.settings["beta_end"])


# ========================================================== beyond the paper: instances
def instance_ids(model, logits, height, width):
    """Each connected part of an id becomes a segment of its own, except for the
    background (BACKGROUND_SEGMENT), which stays whole.
    """
    ids, probability = ae.likeliest(logits, height, width)
    return ae.connected(ids, background=data.BACKGROUND_SEGMENT), probability


def side_of_tiles(model, ids):
    """Side of a picture's tiles: --crop, or for instances what its objects ask for.

    ids: an id map of the picture (H x W, 0 = void).
    """
    crop = model.settings["crop"]
    background = background_of(model)
    if not crop or background is None:
        return crop
    area = data.areas(ids)
    area.pop(background, None)
    return data.tile_side(list(area.values()), crop)


# Loss weight of a cell if it and its neighbours together hold parts of two or more
# objects. Few cells do, and they alone decide whether objects that touch are told
# apart.
MEETING = 5.0


def instance_weights(model, ids):
    """`LDM.cell_weights` for instances: B x S x S ids -> B x 1 x h x w."""
    weights = LDM.cell_weights(model, ids)
    for b, y in enumerate(ids):  # B x N x S x S would be large
        masks = masks_of(y, model.autoencoder.num_ids)  # N x S x S
        around = cells_around(masks, model.autoencoder.factor)  # N x h x w
        around[[pq.VOID, data.BACKGROUND_SEGMENT]] = 0
        objects = around.sum(0)  # h x w
        weights[b, 0] *= torch.where(objects >= 2, MEETING, 1.0)
    return weights


def masks_of(ids, num_ids):
    """S x S ids -> N x S x S, float: 1 where a pixel has an id, else 0."""
    return F.one_hot(ids.long(), num_ids).permute(2, 0, 1).float()


def cells_around(masks, factor):
    """N x S x S masks -> N x h x w: 1 if a mask is in a cell or in one next to it."""
    return F.max_pool2d(masks, 3 * factor, stride=factor, padding=factor)


# =========================================== beyond the paper: the authors' checkpoints
# Settings in their files that change what the network computes, and the values that
# work here.
RELEASE = {
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "parametrization": "gaussian",
    "encoding_mode": "bits",
    "fill_value": 0.5,
    "image_descriptors": "remove",
    "backbone": "unet",
    "act_fn": "none",
    "num_upscalers": 2,
    "num_mid_blocks": 0,
    "clip_sample": False,
    "thresholding": False,
    "set_alpha_to_one": False,
    "clamp_output": False,
    "fuse_rgb": False,
    "resize_input": False,
    "skip_encoder": False,
    "shared_vae_encoder": False,
    "separate_conv": False,
    "separate_encoder": False,
    "add_adaptor": False,
}
# Their names for our parts.
RELEASE_PARTS = {
    "autoencoder": "vae_semseg",
    "image_encoder": "vae_image",
    "unet": "unet",
}
# What is not used: conv_in once more, and the half of the VAE that makes pictures.
RELEASE_UNUSED = ("unet.new_conv.", "image_encoder.post_quant_conv.")
# Attention layers had other names up to diffusers 0.16, which they used.
RELEASE_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}


class ReleaseDDIM(DDIM):
    """The authors' timesteps, which begin below T-1 where the steps do not divide T."""

    def timesteps(self, steps):
        """As DDIM's, with a stride of whole timesteps: 30 steps begin at 989."""
        stride = self.T // max(1, steps)
        if stride == 0:
            return super().timesteps(steps)  # says what is wrong
        timesteps = [(i + 1) * stride - 1 for i in reversed(range(steps))]
        return list(zip(timesteps, [*timesteps[1:], -1]))


def release_ids(model, logits, height, width):
    """The authors' evaluation: logits go through the training size, and a segment that
    holds less than half of the pixels where its own sigmoid is over 0.5 becomes
    void.
    """
    size = model.settings["size"]
    logits = ae.resize(logits, size, size)
    ids, probability = ae.likeliest(logits, height, width)
    sure = data.areas(np.where(probability >= 0.5, ids, 0))
    for i in data.areas(ids):
        own = ae.resize(logits[i : i + 1], height, width)  # 1 x height x width
        if 2 * sure.get(i, 0) < (own >= 0).sum().item():
            ids = np.where(ids == i, 0, ids)
    return ids, probability


def flatten(settings, depth=3):
    """Settings nested to some depth as one dict; inner ones decide."""
    flat = dict(settings)
    for value in settings.values():
        if isinstance(value, dict) and depth > 0:
            flat.update(flatten(value, depth - 1))
    return flat


def release_weights(content):
    """The tensors of the authors' checkpoint by our names."""
    weights = {}
    for part, theirs in RELEASE_PARTS.items():
        for key, value in content[theirs].items():
            words = key.removeprefix("module.").split(".")
            words = [RELEASE_ATTENTION.get(word, word) for word in words]
            name = ".".join([part, *words])
            if not name.startswith(RELEASE_UNUSED):
                weights[name] = value
    return weights


def release_blocks(weights, part):
    """The widths and the depth of a network of four resolutions, as its tensors
    tell.
    """
    pattern = f"{part}.down_blocks.*.resnets.*.conv1.weight"
    first_convs = fnmatch.filter(weights, pattern)
    depth = len(first_convs) // 4
    widths = [len(weights[name]) for name in first_convs[::depth]]
    return {"block_out_channels": widths, "layers_per_block": depth}


def from_release(content, path):
    """The authors' diffusion checkpoint as one of ours: Stable Diffusion's classes, as
    wide as the tensors tell. Its settings are honoured or refused by name. Raises
    BadInput.
    """
    with data.reading(path, "checkpoint of the authors' release"):
        told = flatten(content.get("p") or {})
        for name, works in RELEASE.items():
            if told.get(name, works) != works:
                raise BadInput(
                    f"{path}: its setting {name} is {told[name]!r:.40}; "
                    f"{works!r} works here"
                )
        weights = release_weights(content)
        unet = release_blocks(weights, "unet")
        unet["in_channels"] = weights["unet.conv_in.weight"].shape[1]
        vae = {**ae.SD_VAE, **release_blocks(weights, "image_encoder.encoder")}
        vae["kind"] = "sd"
        vae["scale"] = told.get("image_scaling_factor", SD_SCALE)
        settings = {
            "scheduler": "ddim-release",
            "postprocess": "release",
            "autoencoder": ae.release_settings(content["vae_semseg"]),
            "image_encoder": vae,
            "unet": unet,
            "latent_scale": told.get("scaling_factor", SD_SCALE),
        }
        for name in ("size", "beta_start", "beta_end"):
            if name in told:
                settings[name] = told[name]
        return {"kind": "ldm", "settings": settings, "weights": weights}


SCHEDULERS = {"ddim": DDIM, "ddim-v": VDDIM, "ddim-release": ReleaseDDIM}
POSTPROCESS = {"instances": instance_ids, "release": release_ids}


if __name__ == "__main__":
    main()

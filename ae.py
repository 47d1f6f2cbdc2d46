"""ae.py: stage 1, a shallow autoencoder from a map of segment ids to a 4-channel latent and back (paper section 3.1).

    python ae.py                                          # the paper's run: COCO in data/coco, 512 px, N = 128
    torchrun --nproc_per_node=8 ae.py                     # the same on eight GPUs (several nodes: torchrun's own flags)
    python ae.py --model small --data shapes              # built-in scenes, minutes on a laptop
    python ae.py --arch sd_vae                            # fine-tune Stable Diffusion's VAE instead (Table 1's variant)
    python ae.py --arch shallow sd_vae                    # train both alike, and a table
    python ae.py --encoding bits rgb onehot positional    # each trained alike, and a table (section 3.1)
    python ae.py --kl 0 1e-6 1e-5 1e-4 1e-3               # the same over the weight of a KL term, and a plot (Fig. 9, middle)
    python ae.py --ckpt checkpoints/ae.pt --iters 0       # only evaluate: reconstruction PQ and a picture
    python ae.py --bench                                  # time a step beside its straightforward form, and how it grows
    python ae.py --ckpt checkpoints/ae.pt --drop_input    # teach its encoder to read partial maps, for inpaint.py --ae (4.2)

Symbols (paper section 3): y id map, N number of ids, z = E(y) the latent, f the resizing factor, y_hat = D(z) logits.
Writes to --out: ae.pt (last weights), ae_best.pt, ae_state.pt (to --resume from), log.jsonl, ae.png, ae_loss.png.
"""
import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from collections import OrderedDict
from pathlib import Path

import data
import pq
from data import BadInput, is_main

# Settings of `--model`; each can be set by the flag of its name.
MODELS = {
    "sd": dict(size=512, num_ids=128, factor=8, width=256, iters=60_000, batch_size=16, lr=1e-4, schedule="constant"),
    "small": dict(size=64, num_ids=16, factor=4, width=64, iters=1_500, batch_size=32, lr=2e-3, schedule="cosine"),
}

parser = data.Parser(__doc__, out="checkpoints", mix=True)
data.training_flags(parser, MODELS)
add = parser.add_argument
add("--arch", choices=["shallow", "sd_vae"], nargs="+", help="shallow: the paper's; sd_vae: Stable Diffusion's VAE, "
    "from --sd or with --model small narrow and untrained; both are compared (default shallow)")
add("--num_ids", type=int, choices=[4, 8, 16, 32, 64, 128, 256], help="N, ids and logit channels; id 0 is void")
add("--encoding", choices=data.ENCODINGS, nargs="+", help="of the ids at the input; several are compared (default bits)")
add("--factor", type=int, choices=[4, 8], help="f, image side over latent side")
add("--width", type=int, choices=[32, 64, 128, 256, 512], help="channels at the bottleneck (not of a VAE from --sd)")
add("--points", type=data.positive, help="points of each loss (default 12544 at 512 px, in proportion, at least 256)")
add("--clip", type=data.amount, default=3.0, help="largest gradient norm (default %(default)s)")
add("--gradient_checkpointing", action=argparse.BooleanOptionalAction, help="compute activations again in the backward pass "
    "instead of keeping them: less memory, the same gradients (default: only the shallow one of sd without a GPU, where it takes no longer)")
add("--drop_input", action="store_true", help="train only the encoder of --ckpt: a partially dropped map should get the "
    "latents of the full one (decoder and diffusion model stay as they are)")
add("--bench", action="store_true", help="only time a step, with random weights and made-up maps")
add("--kl", type=data.amount, nargs="+", default=0.0, help="weight of a KL term; several are compared (default %(default)s)")
if __name__ == "__main__":
    parser.at_once()                                                       # --help and wrong flags need not wait for torch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------- the model


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of B x C x H x W, on the fused kernel."""

    def forward(self, x):
        """B x C x H x W -> B x C x H x W."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Double(nn.ConvTranspose2d):
    """The transposed convolution of kernel and stride 2 as the matrix product that it is: each pixel becomes 2 x 2."""

    def forward(self, x):
        """B x C x H x W -> B x D x 2H x 2W."""
        weight = self.weight.permute(2, 3, 1, 0).flatten(0, 2)             # 4D x C
        x = F.linear(x.permute(0, 2, 3, 1), weight, self.bias.repeat(4))   # B x H x W x 4D
        x = x.unflatten(3, (2, 2, -1)).transpose(2, 3)                     # B x H x 2 x W x 2 x D
        return x.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


# keeps only the input of a function for the backward pass, which calls it again
recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class Autoencoder(nn.Module):
    """The shallow autoencoder (paper 3.1, "Architectural Design"); 2.02 M parameters at the paper's setting.

    num_ids: N, a power of two up to 256; factor: f, 8 or 4 ("shallower"); width: channels at the bottleneck."""

    arch = "shallow"
    checkpointing = False

    def __init__(self, num_ids=128, encoding="bits", factor=8, width=256, latent_channels=4):
        super().__init__()
        self.settings = dict(num_ids=num_ids, encoding=encoding, factor=factor, width=width, latent_channels=latent_channels)
        self.num_ids, self.encoding, self.factor, self.width = num_ids, encoding, factor, width
        stages = int(math.log2(factor))
        c = width >> stages
        layers = [nn.Conv2d(data.id_channels(encoding, num_ids), c, 3, padding=1), nn.SiLU()]
        for _ in range(stages):
            layers += [nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), nn.SiLU()]
            c *= 2
        self.encoder = nn.Sequential(
            *layers, nn.Conv2d(c, c, 3, padding=1), nn.Identity(),
            nn.GroupNorm(32, c, eps=1e-6), nn.SiLU(), nn.Conv2d(c, 2 * latent_channels, 3, padding=1))
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, c, 3, padding=1), nn.Identity(),
            Double(c, c, 2, stride=2), ChannelNorm(c, eps=1e-6), nn.SiLU(),
            Double(c, c, 2, stride=2), ChannelNorm(c, eps=1e-6), nn.SiLU(),
            nn.GroupNorm(32, c, eps=1e-5), nn.SiLU(), nn.Conv2d(c, num_ids, 3, padding=1))
        self.ends = {self.encoder: range(4, 4 + 3 * stages, 3), self.decoder: (3, 6, 8, 10)}       # of the stages of `run`

    def enable_gradient_checkpointing(self):
        """Compute activations again in the backward pass instead of keeping them: half the memory, the same gradients."""
        self.checkpointing = True

    def run(self, layers, x):
        """Encoder or decoder (`layers`) on x; when checkpointing, stage by stage. A convolution that ends a stage is not computed again."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            return layers(x)
        for begin, end in itertools.pairwise((0, *self.ends[layers], len(layers))):
            x = recompute(layers[begin:end], x)
        return x

    def encode(self, ids):
        """Ids (B x H x W, 0..N-1, 0 = void or unknown) -> mean and log-variance of z, each B x 4 x H/f x W/f."""
        x = data.encode_ids(ids, self.num_ids, self.encoding)              # B x n x H x W
        mean, logvar = self.run(self.encoder, x).chunk(2, dim=1)           # B x 4 x h x w
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """Latent (B x 4 x h x w) -> logits over ids (B x N x 4h x 4w; SDAutoencoder: x fh x fw)."""
        return self.run(self.decoder, z)

    def forward(self, ids, noise=None):
        """One training pass: ids -> logits at z ~ N(mean, var), mean, logvar. noise: B x 4 x h x w, drawn if None."""
        mean, logvar = self.encode(ids)
        noise = torch.randn_like(mean) if noise is None else noise
        return self.decode(mean + (0.5 * logvar).exp() * noise), mean, logvar


class SDAutoencoder(Autoencoder):
    """Stable Diffusion's own VAE in its place (Table 1, "Stable Diffusion's VAE fine-tuned"); 84 M parameters.

    Ids go in and N logits come out through a new first and last layer; every other layer is the VAE's.
    vae: a pretrained AutoencoderKL of diffusers, or its config; None is a narrow one of this factor and width, untrained."""

    arch = "sd_vae"

    def __init__(self, num_ids=128, encoding="bits", factor=4, width=64, vae=None):
        from diffusers import AutoencoderKL
        nn.Module.__init__(self)
        if not isinstance(vae, nn.Module):
            widths = [width >> i for i in reversed(range(factor.bit_length()))]
            vae = AutoencoderKL(**vae or dict(
                block_out_channels=widths, norm_num_groups=max(1, widths[0] // 4), down_block_types=["DownEncoderBlock2D"] * len(widths),
                up_block_types=["UpDecoderBlock2D"] * len(widths)))
        vae.encoder.conv_in = nn.Conv2d(data.id_channels(encoding, num_ids), vae.encoder.conv_in.out_channels, 3, padding=1)
        vae.decoder.conv_out = nn.Conv2d(vae.decoder.conv_out.in_channels, num_ids, 3, padding=1)
        self.encoder, self.decoder = nn.Sequential(vae.encoder, vae.quant_conv), nn.Sequential(vae.post_quant_conv, vae.decoder)
        self.num_ids, self.encoding = num_ids, encoding
        self.factor, self.width = 2 ** (len(vae.config.block_out_channels) - 1), vae.config.block_out_channels[-1]
        self.settings = dict(num_ids=num_ids, encoding=encoding, factor=self.factor, width=self.width, vae=plain(vae.config))

    def enable_gradient_checkpointing(self):
        """The same with the means of diffusers."""
        for part in (self.encoder[0], self.decoder[1]):
            part.gradient_checkpointing, part._gradient_checkpointing_func = True, recompute


def from_settings(settings):
    """The untrained autoencoder of either kind that has these `settings`."""
    return (SDAutoencoder if "vae" in settings else Autoencoder)(**settings)


def plain(config):
    """A diffusers config as a dict of plain values, without its private entries."""
    return {k: v for k, v in dict(config).items() if not k.startswith("_")}


# Stable Diffusion 1.4's networks, where its classes' defaults differ.
SD = {"unet": dict(sample_size=64, cross_attention_dim=768),
      "vae": dict(sample_size=512, block_out_channels=[128, 256, 512, 512], layers_per_block=2, norm_num_groups=32,
                  down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)}


def load_sd(name, part):
    """Stable Diffusion's "unet" or "vae" with its weights, from a hub id or a folder; "none": untrained. Raises BadInput."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    network = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part]
    try:
        return network(**SD[part]) if name == "none" else network.from_pretrained(name, subfolder=part)
    except (OSError, ValueError) as error:
        raise BadInput(f"--sd {name}: can't be loaded ({str(error).strip().splitlines()[0][:120]}); give a hub id with network, "
                       "or a folder with unet/ and vae/; --model small needs no download") from None


# ------------------------------------------------------------------------- the losses, on points (PointRend)


def sample_at(x, points, mode="bilinear"):
    """Values of x (B x C x H x W) at points (B x P x 2, x and y in 0..1) -> B x C x P; zero outside."""
    return F.grid_sample(x.float(), 2 * points[:, None] - 1, mode=mode, align_corners=False)[:, :, 0]


def mask_at(ids, image_of, id_of, points):
    """Bilinear value of K segments' binary masks at K x P points -> K x P, without ever making the masks.

    ids: B x H x W; image_of, id_of: K, the image and the id of each segment; points: K x P x 2 in 0..1."""
    height, width = ids.shape[1:]
    x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5     # K x P
    total = 0
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        col, row = x.floor() + dx, y.floor() + dy
        weight = (1 - (x - col).abs()) * (1 - (y - row).abs())
        inside = (col >= 0) & (col < width) & (row >= 0) & (row < height)
        found = ids[image_of[:, None], row.clamp(0, height - 1).long(), col.clamp(0, width - 1).long()]
        total = total + weight * (inside & (found == id_of[:, None]))
    return total


def uncertain_points(uncertainty, batch, count, device):
    """PointRend's training points: batch x count x 2 in 0..1.

    Draw 3 x count uniform points, keep the 75% x count most uncertain, add 25% x count uniform ones.
    uncertainty: function of points (batch x P x 2) -> batch x P, larger is less certain."""
    points = torch.rand(batch, 3 * count, 2, device=device)
    keep = int(0.75 * count)
    top = uncertainty(points).topk(keep, dim=1).indices                    # batch x keep
    chosen = points.gather(1, top[..., None].expand(-1, -1, 2))
    return torch.cat([chosen, torch.rand(batch, count - keep, 2, device=device)], 1)


def segments_of(ids, num_ids):
    """All segments of a batch of id maps (B x H x W): image index and id of each, by image, then by id (K and K)."""
    present = torch.zeros(len(ids), num_ids, dtype=torch.bool, device=ids.device)
    present.scatter_(1, ids.flatten(1).long(), True)
    present[:, 0] = False
    return present.nonzero().unbind(1)


@torch.no_grad()
def draw_points(logits, ids, count):
    """Points for both losses where the logits are least certain: CE (B x count x 2), masks (K x count x 2)."""
    image_of, id_of = segments_of(ids, logits.shape[1])
    def ce_uncertainty(points):
        """How close the second largest logit is to the largest: batch x P x 2 -> batch x P."""
        second, first = sample_at(logits, points).topk(2, dim=1).values.flip(1).unbind(1)
        return second - first
    own = logits[image_of, id_of][:, None]                                 # K x 1 x h x w
    ce_points = uncertain_points(ce_uncertainty, len(ids), count, ids.device)
    return ce_points, uncertain_points(lambda p: -sample_at(own, p)[:, 0].abs(), len(own), count, ids.device)


def segmentation_losses(logits, ids, ce_points, mask_points):
    """L_ce and L_mask of eq. 2 as sums, with the counts that normalise them.

    logits: B x N x h x w; ids: B x H x W; points from `draw_points`. Returns CE summed over non-void points, their
    number; BCE + Dice summed over segments, their number. Sums, so that ranks and accumulation steps can share counts."""
    labels = sample_at(ids[:, None].float(), ce_points, "nearest")[:, 0].long()            # B x P
    ce = F.cross_entropy(sample_at(logits, ce_points).float(), labels, ignore_index=0, reduction="sum")
    image_of, id_of = segments_of(ids, logits.shape[1])
    own = sample_at(logits[image_of, id_of][:, None], mask_points)[:, 0].float()           # K x P
    mask = mask_at(ids, image_of, id_of, mask_points)                                      # K x P
    bce = F.binary_cross_entropy_with_logits(own, mask, reduction="none").mean(1)
    p = own.sigmoid()
    dice = 1 - (2 * (p * mask).sum(1) + 1) / (p.sum(1) + mask.sum(1) + 1)
    return ce, (labels > 0).sum(), (bce + dice).sum(), len(own)


def kl_loss(mean, logvar):
    """KL of the latent's Gaussian from N(0, I): summed over channels and cells and the batch (Fig. 9's ablation)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum()


def drop_input(ids):
    """Partial maps to train an encoder on: of each id map (B x H x W) a random share of a random grid's blocks becomes 0.

    The share is 0..0.95, and 0 for a quarter of the maps, so that full maps keep their latents."""
    dropped = ids.clone()
    for y in dropped:                                                      # H x W
        rate, block = 1.25 * torch.rand(1).item() - 0.3, 2 ** torch.randint(0, int(math.log2(len(y))) - 2, (1,)).item()
        grid = torch.rand(1, 1, -(-y.shape[0] // block), -(-y.shape[1] // block), device=y.device)
        y[F.interpolate(grid, scale_factor=block)[0, 0, :y.shape[0], :y.shape[1]] < rate] = 0
    return dropped


# --------------------------------------------------------------------------- from logits to a segmentation


@torch.no_grad()
def argmax(logits, height, width):
    """Logits (N x h x w), resized bilinearly -> the likeliest id of each pixel (height x width, int32) and its probability (float32).

    Works in strips of rows, so that N channels never stand at the image's full size."""
    n, h, _ = logits.shape
    y = ((torch.arange(height, device=logits.device) + 0.5) * h / height - 0.5).clamp(min=0)
    ids = torch.empty(height, width, dtype=torch.int32, device=logits.device)
    certainty = torch.empty(height, width, device=logits.device)
    for rows in torch.arange(height, device=logits.device).split(max(1, (1 << 22) // (n * width))):    # 16 MB each: fits the cache
        top = y[rows].long()
        strip = torch.lerp(logits[:, top].float(), logits[:, (top + 1).clamp(max=h - 1)].float(), (y[rows] - top)[:, None])     # N x rows x w
        strip = F.interpolate(strip[None], size=(len(rows), width), mode="bilinear", align_corners=False)[0]                    # N x rows x width
        best, found = strip.max(0)
        ids[rows], certainty[rows] = found.int(), (best - strip.logsumexp(0)).exp()
    return ids.cpu().numpy(), certainty.cpu().numpy()


def connected(ids):
    """Make parts of a segment that do not touch (by an edge) segments of their own: H x W ids -> H x W int32, 0 = void.

    The largest segment stays whole, since others may cut a background into pieces. For data whose objects are in one piece; not in
    the paper."""
    new = np.ones(ids.shape, bool)                                         # where a run begins, along each row
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    run = new.cumsum().reshape(ids.shape) - 1                              # of each pixel
    touching = ids[1:] == ids[:-1]
    a, b = np.unique(np.stack([run[:-1][touching], run[1:][touching]]), axis=1)
    part = np.arange(run[-1, -1] + 1)                                      # run -> the first run of its part
    while True:
        lower = part.copy()
        np.minimum.at(lower, a, part[b])
        np.minimum.at(lower, b, part[a])
        lower = lower[lower]
        if np.array_equal(lower, part):
            break
        part = lower
    largest = np.bincount(np.where(ids > 0, ids, 0).ravel())[1:].argmax() + 1 if ids.any() else 0
    for i, stands_for in ((0, -1), (largest, part.size)):                  # void; the largest
        part = np.where(ids[new] == i, stands_for, part)
    return (np.unique(np.append(part, -1), return_inverse=True)[1][:-1])[run].astype(np.int32)


def keep(ids, certainty, threshold=0.5, min_area=0):
    """The paper's evaluation protocol (supplement B): pixels under `threshold` and segments under `min_area` pixels become void (0)."""
    ids = np.where(certainty < threshold, 0, ids)
    return np.where((np.bincount(ids.ravel()) < min_area)[ids], 0, ids)


def postprocess(logits, height, width, threshold=0.5, min_area=0):
    """Logits (N x h x w) -> id map (height x width, int32, 0 = void): `argmax`, then `keep`."""
    return keep(*argmax(logits, height, width), threshold, min_area)


def describe(ids, category_id=1):
    """segments_info of an id map (H x W)."""
    known, areas = np.unique(ids, return_counts=True)
    return [{"id": int(i), "category_id": category_id, "iscrowd": 0, "area": int(a)} for i, a in zip(known, areas) if i]


def reduce_sum(value, device):
    """Sum a number or a float64 array over all processes."""
    if not dist.is_initialized():
        return value.cpu().numpy() if torch.is_tensor(value) else value
    total = torch.as_tensor(value, dtype=torch.float64).to(torch.float32 if device.type == "mps" else torch.float64).to(device)
    dist.all_reduce(total)
    return total.item() if total.ndim == 0 else total.cpu().numpy()


# ------------------------------------------------------- processes, devices, checkpoints (shared by the tower)


def setup(args):
    """Choose the device and, under torchrun, join the other processes: -> device, rank, world. Raises BadInput."""
    rank, world, name = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and world == 1 else "cpu"
    known = ["cpu"] + ["mps"] * torch.backends.mps.is_available() + ["cuda"] * torch.cuda.is_available()
    known += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in known:
        raise BadInput(f"--device {name}: not available here; there is {', '.join(known)}")
    if name.startswith("cuda"):
        name = name if ":" in name else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(name)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if name.startswith("cuda") else "gloo")
    torch.manual_seed(args.seed)
    return torch.device(name), rank, world


def move(tensor, device):
    """A tensor of the CPU on the device. CUDA's copy is not waited for; on MPS it must be, which would read memory that is free by then."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def alone(world, flag):
    """Refuse a flag that is for one process. Raises BadInput."""
    if world > 1:
        raise BadInput(f"{flag}: works in one process; start it without torchrun")


def leave():
    """Wait for the other processes and part from them."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


class Stop:
    """Notes SIGTERM, Ctrl-C and SIGUSR1 (a scheduler's warning), so that a training saves its state before it ends.

    Called once an iteration by every process: True for all once one of them was signalled. A second signal ends at once."""

    def __init__(self):
        self.number, self.before = 0, {}
        for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGTERM)):
            with contextlib.suppress(ValueError):                          # not the main thread: leave signals alone
                self.before[number] = signal.signal(number, self.note)

    def note(self, number, frame):
        """The signal handler."""
        self.number = number
        self.restore()

    def restore(self):
        """Put the former handlers back."""
        while self.before:
            signal.signal(*self.before.popitem())

    def __call__(self):
        agreed = self.number
        if dist.is_initialized():                                          # a CPU tensor: the device is not waited for
            agreed = torch.tensor(agreed)
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
        if agreed:                                                         # a signal that came meanwhile waits for the next iteration
            self.number = int(agreed)
        return bool(agreed)

    def leave(self, state, it):
        """Part from the other processes; after a signal end with the shell's exit code for it, 128 + its number."""
        self.restore()
        leave()
        if self.number:
            if is_main():
                print(f"stopped by {signal.Signals(self.number).name} after iteration {it}: {state} holds everything; add --resume to go on")
            raise SystemExit(128 + self.number)


MAX_SKIPPED = 50  # steps in a row without a finite gradient, after which a training gives up


def guarded_step(optimizer, scaler, norm, skipped):
    """An optimiser step that is left out, on the device and without waiting for it, where the gradient's norm is not finite.

    skipped: 2 floats on the device, such steps in all and in a row; updated in place, to be read late by `check_skipped`."""
    bad = (~norm.isfinite()).float()
    if not scaler.is_enabled():
        optimizer.found_inf = bad                                          # what GradScaler sets: fused AdamW skips by it
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    skipped.add_(bad)[1].mul_(bad)


def check_skipped(skipped, it, out):
    """Number of skipped steps; raises BadInput where too many came in a row: the weights are those before them."""
    total, row = skipped.tolist()
    if row >= MAX_SKIPPED:
        raise BadInput(f"no finite gradient in the last {int(row)} of {it} iterations; the last good state is in {out}: "
                       "start again with a lower --lr, or with --precision fp32")
    return int(total)


def check_batch(args, world):
    """The global batch must split evenly over processes and accumulation steps. Raises BadInput."""
    if args.batch_size % (world * args.accum):
        raise BadInput(f"--batch_size {args.batch_size}: must be a multiple of processes x accumulation steps = {world} x {args.accum}")


def autocast(precision, device):
    """The context of mixed precision: 'fp32' does nothing; 'bf16' and 'fp16' are torch.autocast."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def pick_precision(precision, device):
    """'auto' is bf16 where a GPU has it, else fp16 on CUDA and fp32 elsewhere."""
    if precision != "auto":
        return precision
    return "fp32" if device.type != "cuda" else "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def learning_rate(it, args):
    """Linear warm-up from 0, then constant or cosine to 1% of the peak."""
    if it < args.warmup:
        return args.lr * it / args.warmup
    if args.schedule == "constant":
        return args.lr
    done = (it - args.warmup) / max(args.iters - args.warmup, 1)
    return args.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1))))


def seed_iteration(seed, it, rank):
    """All randomness of an iteration follows from (seed, iteration, rank), so that a resumed run repeats it exactly."""
    torch.manual_seed(((seed * 1_000_003 + it) * 4096 + rank) % 2 ** 63)


def save(path, content):
    """Write a checkpoint beside its place, flush it, then move it there: never half a file. Raises BadInput if the disk is full."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:                               # torch's writer turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise BadInput(f"{path}: can't be written ({str(error).splitlines()[0][:100]}); what was there before is unharmed") from None
    os.replace(temporary, path)


# What a checkpoint of each kind must hold; its parts are checked where they are used, inside `fitting`.
ENTRIES = {"ae": ("autoencoder", "weights", "settings"), "ldm": ("weights", "settings"),
           "ae_state": ("flags", "weights", "optimizer", "iteration"), "ldm_state": ("flags", "settings", "unet", "optimizer", "iteration")}


@contextlib.contextmanager
def fitting(path):
    """Turn whatever goes wrong when a checkpoint's content is put to use into BadInput."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[-1].strip()[:150]
        raise BadInput(f"{path}: its weights and settings don't fit together ({type(error).__name__}: {reason}): it is damaged or foreign") from None


def fill(build, weights):
    """The module that `build()` makes, with these weights, in float32 and eval mode.

    It is built without memory of its own: hostile settings can't ask for more than the file holds."""
    with torch.device("meta"):
        model = build()
    model.load_state_dict({k: v.to(torch.float32, copy=True) if v.is_floating_point() else v for k, v in weights.items()}, assign=True)
    return model.eval()


class Inert:
    """Stands in for whatever class a foreign file names: takes any arguments and any state, and runs nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def strip(weights):
    """A module's tensors under its own names, whether or not it was wrapped for several GPUs."""
    return {k.removeprefix("module."): v for k, v in weights.items() if torch.is_tensor(v)}


def from_release(content):
    """The authors' autoencoder checkpoint as one of ours: its settings follow from the shapes of its tensors."""
    weights = strip(content["vae"])
    first, bottleneck, num_ids = weights["encoder.0.weight"], weights["decoder.0.weight"], len(weights["decoder.10.weight"])
    encoding = next(e for e in data.ENCODINGS if data.id_channels(e, num_ids) == first.shape[1])
    shape = dict(num_ids=num_ids, encoding=encoding, factor=len(bottleneck) // len(first), width=len(bottleneck), latent_channels=bottleneck.shape[1])
    return {"kind": "ae", "autoencoder": shape, "weights": weights, "settings": RELEASE_SETTINGS}


RELEASE_SETTINGS = dict(model="sd", size=512, data="data/coco", train_split="train2017", val_split="val2017", background="segment", seed=0)
RELEASE_MARK = {"ae": "vae", "ldm": "vae_semseg"}  # the entry by which a checkpoint of the authors' release is known
FROM_RELEASE = {"ae": from_release}                # makes it one of ours; diffusion.py adds its own


def load(path, kind):
    """Read a checkpoint, ours or the authors' release, without executing anything from it. Raises BadInput.

    kind: 'ae', 'ldm', 'ae_state', 'ldm_state'. The release pickled its settings: PyTorch's restricted unpickler is given
    a plain dict or an `Inert` for every class in the file that is neither tensor nor plain value."""
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)     # scans the pickle, runs nothing
        with torch.serialization.safe_globals([(OrderedDict if name.endswith("Dict") else Inert, name) for name in named]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=bool(named))    # the release's optimiser stays on disk
        entries = content if isinstance(content, dict) else {}
        found = entries.get("kind") or next((k for k, mark in RELEASE_MARK.items() if mark in entries), None)
        if named and (entries.get("kind") or not found):
            raise ValueError("only the release may hold more than tensors")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such checkpoint") from None
    except Exception:
        raise BadInput(f"{path}: not a readable checkpoint (cut short, foreign, or holding more than tensors)") from None
    if (found, kind) == ("ldm", "ae"):                                     # stage 2's checkpoint holds stage 1
        found = "ae"
        with fitting(path):
            if entries.get("kind"):
                weights = {k.removeprefix("autoencoder."): v for k, v in content["weights"].items() if k.startswith("autoencoder.")}
                content = {"kind": "ae", "autoencoder": content["settings"]["autoencoder"], "weights": weights, "settings": content["settings"]}
            else:
                content = {"vae": content["vae_semseg"]}
    if found != kind:
        raise BadInput(f"{path}: is {'a checkpoint of kind ' + repr(found) if found else 'no checkpoint of this project'}, needed is {kind!r}")
    with fitting(path):
        content = content if content.get("kind") else FROM_RELEASE[kind](content)
        missing = [name for name in ENTRIES[kind] if not isinstance(content.get(name), int if name == "iteration" else dict)]
        if missing:
            raise BadInput(f"{path}: is not complete: it has no {missing[0]}")
    return content


def load_autoencoder(path):
    """Checkpoint of stage 1, ours or the authors' -> Autoencoder, in eval mode on the CPU. Raises BadInput.

    Its `trained_with` holds what training it was told: data, train_split, val_split, background, size, seed, model."""
    content = load(path, "ae")
    with fitting(path):
        model = fill(lambda: from_settings(content["autoencoder"]), content["weights"])
    model.trained_with = content["settings"]
    return model


def log(path, **entry):
    """Append one line of JSON (rank 0)."""
    with open(path, "a+b") as file:
        cut = file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n"            # a kill may have cut the last line
        line = json.dumps({k: v if not isinstance(v, float) else float(f"{v:.6g}") for k, v in entry.items()})
        file.write((b"\n" if cut else b"") + line.encode() + b"\n")


def read_log(path, stage):
    """A log.jsonl -> the entries of a stage's last run; what a resumed run repeats replaces its first account."""
    entries = {}
    for line in open(path):
        with contextlib.suppress(ValueError):                              # a line that a kill cut short
            entry = json.loads(line)
            if entry.get("stage") == stage:
                if entry.get("start") == 0:
                    entries = {}
                entries.setdefault(entry.get("iteration", 0), {}).update(entry)
    return [entries[k] for k in sorted(entries)]


# Flags that a resumed run may change without becoming another run.
FREE = {"resume", "iters", "out", "json", "export", "device", "num_workers", "log_every", "save_every", "eval_every", "eval_images",
        "steps", "accum", "ckpt", "ae", "sd", "gradient_checkpointing", "val_split", "max_pixels"}


def load_state(path, kind, args):
    """The state that --resume continues from. Raises BadInput if it was a run with other flags, naming the first."""
    state = load(path, kind)
    with fitting(path):
        started = state["flags"].items()
    for name, value in started:
        if getattr(args, name, None) != value:
            flag = {"train_sets": "data and --train_split"}.get(name, name)
            raise BadInput(f"--resume: the run in {path} has --{flag} {value}, not {getattr(args, name, None)}: give the flags that it was "
                           "started with, or start a new run from its weights with --ckpt")
    return state


def flags(args):
    """The flags that make a run what it is, as plain values, for its state."""
    return {k: v for k, v in vars(args).items() if k not in FREE}


def parse(parser, models, argv, kind):
    """Parse flags; what was not given is as in --ckpt, else as in the table of --model. Raises BadInput."""
    args = parser.parse_args(argv)
    stored = {}
    if args.ckpt:
        content = load(args.ckpt, kind)
        with fitting(args.ckpt):
            stored = {**content["settings"], **content.get("autoencoder", {})}
            if not stored.pop("self_cond", True):                          # there a yes or no, here a share
                stored["self_cond"] = 0.0
    args.model = args.model or stored.get("model") or "sd"
    fallback = {"data": "data/coco", "train_split": "train2017", "val_split": "val2017", "background": "segment", **models[args.model], **stored}
    for name, value in vars(args).items():
        if value is None and name in fallback:
            setattr(args, name, fallback[name])
    # of several sets the first is the one that a checkpoint names and that is evaluated
    args.train_sets = [names if isinstance(names, list) else [names] for names in (args.data, args.train_split)]
    args.data, args.train_split = (names[0] for names in args.train_sets)
    return args


def compare(main, argv, args, flags, more=()):
    """Where a flag has several values: run `main` with each, alike in all else and in a folder of its own, then print a table.

    more: flags that every run gets. Over numbers PQ is plotted too. Returns whether there was such a flag; otherwise args get the single values. Raises BadInput."""
    several = {name: getattr(args, name) for name in flags if isinstance(getattr(args, name), list) and len(getattr(args, name)) > 1}
    if several and args.bench:
        raise BadInput(f"--bench: one value for --{next(iter(several))}")
    if len(several) > 1:
        raise BadInput(f"--{' and --'.join(several)}: several values for one flag at a time")
    for name, values in several.items():
        figures, out = {}, Path(args.out)
        for value in values:
            folder = out / f"{name}_{value}"
            main([*(sys.argv[1:] if argv is None else argv), f"--{name}", str(value), "--out", str(folder), "--json", str(folder / "figures.json"), *more])
            figures[value] = json.loads((folder / "figures.json").read_text())
        if is_main():
            widths = {k: max(len(k), 6) + 2 for k in figures[value] if k != "images"}
            print("".join([f"{name:>12}", *(f"{k:>{w}}" for k, w in widths.items())]))
            for value, row in figures.items():
                print("".join([f"{value:>12}", *(f"{row[k]:{w}.4g}" for k, w in widths.items())]))
            if not isinstance(value, str):                                 # 0 has no logarithm: it stands a decade to the left
                zero = min([v for v in figures if v], default=1) / 10
                points = sorted((math.log10(v or zero), row["pq"]) for v, row in figures.items())
                data.plot(out / f"{name}.png", {"PQ": zip(*points)}, f"log10 of --{name}" + " (left end: 0)" * (0 in figures), "PQ")
                print(f"-> {out / f'{name}.png'}")
            if args.json:
                data.write_json(args.json, {f"by_{name}": figures})
    for name in flags:
        value = getattr(args, name)
        setattr(args, name, value[0] if isinstance(value, list) else value)
    return bool(several)


# -------------------------------------------------------------------------------------------- evaluation


FIGURES = {"pq": "PQ", "sq": "SQ", "rq": "RQ", "ap50": "AP50", "pq_with_background": "PQ with background"}


class Score:
    """Class-agnostic PQ, SQ and RQ over a set of samples.

    In the instances layout, where all that is no instance is one background segment, they are those of the instances alone:
    maps are matched whole, without the true background and the segment that covers most of it (and lies mostly on it); with them
    come ap50 = TP / (TP + FP + FN), and pq_with_background, which counts every segment."""

    def __init__(self):
        self.all = pq.PanopticQuality()
        self.alone = pq.PanopticQuality([{"id": 1, "name": "object", "isthing": 1}, {"id": 2, "name": "background", "isthing": 0}])

    def update(self, sample, found, ids=None, segments_info=None):
        """Add an id map (H x W, 0 = void); ids and segments_info: the truth, if it is not the sample's own."""
        ids, name = sample["ids"] if ids is None else ids, str(sample["file_name"])
        truth, segments = sample["segments_info"] if segments_info is None else segments_info, describe(found)
        self.all.update(ids, truth, found, segments, name)
        if "background_id" in sample:
            background = next((s["id"] for s in truth if s["category_id"] == sample["background_id"]), None)
            pixels = np.bincount(found[ids == background], minlength=1)
            pixels[0] = 0                                                  # void
            covering = int(pixels.argmax())
            covering = covering if 2 * pixels[covering] > (found == covering).sum() else None
            second = lambda segments, i: [{**s, "category_id": 1 + (s["id"] == i)} for s in segments]
            self.alone.update(ids, second(truth, background), found, second(segments, covering), name)

    def result(self):
        """The figures by name, as fractions."""
        figures = lambda quality, group: {k: quality.result()[group][k] for k in ("pq", "sq", "rq")}
        if not self.alone.counts.any():
            return figures(self.all, "All")
        tp, fp, fn = self.alone.counts[0]
        return {**figures(self.alone, "Things"), "ap50": tp / max(tp + fp + fn, 1), "pq_with_background": self.all.result()["All"]["pq"]}


@torch.no_grad()
def evaluate(model, dataset, args, device, rank=0, world=1):
    """Reconstruction PQ (class-agnostic) of a held-out set, and picture rows: ids, reconstruction, error.

    Every image's segments get random distinct ids, as in training; crowd is void."""
    model.eval()
    score, rows, moments = Score(), [], np.zeros(3)                      # of z: count, sum, sum of squares
    largest = 0.0
    for samples in data.evaluation_batches(dataset, args.batch_size, rank, world, args.num_workers):
        new_ids = [{} for _ in samples]
        maps = [data.relabel(s["ids"], s["segments_info"], model.num_ids, np.random.default_rng((args.seed, 3, *str(s["image_id"]).encode())),
                             mapping=new) for s, new in zip(samples, new_ids)]
        ids = torch.from_numpy(np.stack([data.resize_ids(m, args.size, args.size) for m in maps])).to(device)
        z = model.encode(ids)[0]
        moments += [z.numel(), z.sum().item(), z.square().sum().item()]
        largest = max(largest, z.abs().max().item())
        for sample, truth, new, logits in zip(samples, maps, new_ids, model.decode(z)):
            found = postprocess(logits, *truth.shape, min_area=min_area(args.crop or args.size))
            score.update(sample, found, truth, [{**s, "id": new[s["id"]]} for s in sample["segments_info"] if new.get(s["id"])])
            if len(rows) < 6:
                error = np.where((found != truth) & (truth > 0), 255, 40).astype(np.uint8)
                rows.append([sample["image"], data.colorize(truth), data.colorize(found), np.repeat(error[..., None], 3, 2)])
    model.train()
    for q in (score.all, score.alone):
        q.state = reduce_sum(q.state, device)
    count, total, squares = reduce_sum(moments, device)
    mean = total / max(count, 1)
    std = max(squares / max(count, 1) - mean ** 2, 0) ** 0.5
    return score.result(), rows, {"latent_mean": mean, "latent_std": std, "latent_max": largest}


def min_area(size):
    """The paper's least area of a predicted segment: 512 px for training at 512 x 512, in proportion at other sizes."""
    return round(512 * (size / 512) ** 2)


# ------------------------------------------------------------------------------------------------- speed


class Meter:
    """Memory and time of the steps that a bench tries."""

    def __init__(self, device, limit=600):
        self.device, self.limit = device, limit

    def reset(self):
        """Let `gigabytes` begin anew: on CUDA, and on Linux; elsewhere peaks of the CPU can only grow."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def gigabytes(self):
        """Most memory in use since `reset`: on CUDA that of the tensors, on the CPU that of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        with contextlib.suppress(OSError):
            return self._kilobytes("/proc/self/status", "VmHWM") / 1e6
        import resource                                                    # macOS; there is none on Windows
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)

    def limit_gigabytes(self):
        """What `gigabytes` can become: memory that is free, and what this process has; infinity where the system does not say."""
        if self.device.type == "cuda":
            return (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / 1e9
        try:
            return (self._kilobytes("/proc/meminfo", "MemAvailable") + self._kilobytes("/proc/self/status", "VmRSS")) / 1e6
        except OSError:
            return math.inf

    @staticmethod
    def _kilobytes(file, name):
        """An entry of a file of Linux's. Raises OSError where there is none."""
        found = re.search(rf"{name}:\s+(\d+)", Path(file).read_text())
        if not found:
            raise OSError(f"{file} has no {name}")
        return int(found[1])

    @staticmethod
    def tflop(step):
        """Floating point operations of a step's products, in units of 1e12."""
        from torch.utils.flop_counter import FlopCounterMode
        with FlopCounterMode(display=False) as counter:
            step()
        return counter.get_total_flops() / 1e12

    def matmul_rate(self, precision):
        """TFLOP/s of a large matrix product in this precision."""
        n = 8192 if self.device.type == "cuda" else 2048
        a = torch.randn(n, n, device=self.device, dtype={"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision])
        return 2 * n ** 3 / data.side_by_side({"matmul": lambda: a @ a}, 5, self.device)["matmul"] / 1e12

    def growth(self, what, cases, step):
        """Time step(make()) for growing cases: {name: (relative size, make)}. Leaves out, by name, what memory or time won't allow."""
        results, done = {}, []                                             # done: size, gigabytes, seconds
        for name, (size, make) in cases.items():
            need, seconds = 0, 0
            if len(done) > 1:                                              # along a line; two runs, the first to warm up
                (s0, m0, _), (s1, m1, t1) = done[-2:]
                need, seconds = m1 + max(m1 - m0, 0) * (size - s1) / max(s1 - s0, 1e-9), 2 * t1 * size / s1
            if need > 0.9 * self.limit_gigabytes() or seconds > self.limit:
                print(f"{what} {name}: left out, it would take some {need:.0f} GB and {seconds:.0f} s")
                break
            try:
                case = make()
                self.reset()
                done = done or [(0, self.gigabytes(), 0)]                  # what there is without a step
                took = data.side_by_side({name: lambda: step(case)}, 1, self.device)[name]
            except torch.OutOfMemoryError:
                print(f"{what} {name}: left out, out of memory")
                break
            results[str(name)] = {"seconds": took, "gigabytes": self.gigabytes()}
            done.append((size, self.gigabytes(), took))
            print(f"{what} {name:>6}: {took:9.3f} s  {took / size:9.4f} s each  {self.gigabytes():7.2f} GB", flush=True)
        return results


def segments_map(batch, size, count, device):
    """A made-up batch of id maps: `count` segments, each pixel of the nearest of as many random points (B x size x size, uint8)."""
    rng, pixels = np.random.default_rng(0), np.indices((size, size)).reshape(2, 1, -1)
    maps = [((pixels - rng.integers(0, size, (2, count, 1))) ** 2).sum(0).argmin(0).reshape(size, size) + 1 for _ in range(batch)]
    return torch.from_numpy(np.stack(maps).astype(np.uint8)).to(device)


def bench(args, device, precision):
    """A step of stage 1 beside its straightforward form, with random weights and made-up maps; how it grows. Returns the figures.

    Memory is what a step takes beyond what there was before the first."""
    class PlainNorm(ChannelNorm):
        """The channels' LayerNorm, written out over B x C x H x W."""

        def forward(self, x):
            """B x C x H x W -> B x C x H x W."""
            mean = x.mean(1, keepdim=True)
            x = (x - mean) / ((x - mean).square().mean(1, keepdim=True) + self.eps).sqrt()
            return x * self.weight[:, None, None] + self.bias[:, None, None]

    def plain_losses(logits, ids, count):
        """Both losses with a mask of full size for every segment, sampled one after the other."""
        image_of, id_of = segments_of(ids, logits.shape[1])
        ce_points, mask_points = draw_points(logits, ids, count)
        labels = sample_at(ids[:, None].float(), ce_points, "nearest")[:, 0].long()
        ce = F.cross_entropy(sample_at(logits, ce_points), labels, ignore_index=0)
        masks, parts = torch.stack([ids[i] == k for i, k in zip(image_of.tolist(), id_of.tolist())]).float(), []
        for n, (i, k) in enumerate(zip(image_of.tolist(), id_of.tolist())):
            own, mask = (sample_at(m[None, None], mask_points[n:n + 1])[0, 0] for m in (logits[i, k], masks[n]))
            p = own.sigmoid()
            parts.append(F.binary_cross_entropy_with_logits(own, mask) + 1 - (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1))
        return ce + torch.stack(parts).mean()

    def losses(logits, ids, count):
        """Both losses as the training computes them."""
        ce, n_ce, mask, n_mask = segmentation_losses(logits, ids, *draw_points(logits, ids, count))
        return ce / n_ce + mask / n_mask

    torch.manual_seed(0)
    meter, size = Meter(device), args.size
    batch = args.batch_size if device.type == "cuda" or args.model == "small" else min(args.batch_size, 4)
    points = lambda size: max(256, round(12544 * (size / 512) ** 2))
    model = Autoencoder(args.num_ids, args.encoding or "bits", args.factor, args.width).to(device, memory_format=torch.channels_last)
    thrifty, plain = copy.deepcopy(model), copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    thrifty.enable_gradient_checkpointing()
    for layer in plain.decoder:
        layer.__class__ = {ChannelNorm: PlainNorm, Double: nn.ConvTranspose2d}.get(type(layer), type(layer))

    def step(model, loss, ids):
        """Forward, loss, backward; the loss."""
        torch.manual_seed(1)
        with autocast(precision, device):
            no_noise = torch.zeros(len(ids), model.settings["latent_channels"], *[ids.shape[-1] // model.factor] * 2, device=device)
            value = loss(model(ids, no_noise)[0], ids, points(ids.shape[-1]))
        value.backward()
        model.zero_grad()
        return value.detach()
    ids = segments_map(batch, size, min(30, args.num_ids - 1), device)
    cases = {"with --gradient_checkpointing": (thrifty, losses), "without": (model, losses), "straightforward": (plain, plain_losses)}
    meter.reset()
    start, values, peaks = meter.gigabytes(), {}, {}
    for name, (net, loss) in cases.items():                                # the smaller first, where peaks can only grow
        meter.reset()
        values[name] = step(net, loss, ids).item()
        peaks[name] = meter.gigabytes() - start
    seconds = data.side_by_side({name: functools.partial(step, *case, ids) for name, case in cases.items()}, 3, device)
    rate = meter.matmul_rate(precision)
    reached = meter.tflop(lambda: step(model, losses, ids)) / seconds["without"]
    print(f"--model {args.model}, untrained: {size} px, N = {args.num_ids}, batch {batch}, {device.type}, {precision}; forward, losses and backward")
    *_, straight = cases
    for name in cases:
        print(f"{name:>29}: {seconds[name]:8.3f} s  {batch / seconds[name]:8.2f} images/s  {peaks[name]:6.2f} GB  loss {values[name]:.5f}; "
              f"of straightforward: time {seconds[name] / seconds[straight]:.2f}, memory {peaks[name] / max(peaks[straight], 1e-9):.2f}")
    print(f"without: {reached:.3f} TFLOP/s, {100 * reached / rate:.0f}% of a matrix product's {rate:.3f}")
    figures = {"seconds": seconds, "loss": values, "gigabytes": peaks, "tflops": reached, "matmul_tflops": rate}
    chosen = thrifty if args.gradient_checkpointing else model
    forward = lambda ids: step(chosen, losses, ids)
    one = segments_map(1, size, min(30, args.num_ids - 1), device)
    maps = lambda size, count: lambda: segments_map(1, size, min(count, args.num_ids - 1), device)
    figures["by_segments"] = meter.growth("segments", {k: (1, maps(size, k)) for k in (5, 15, 30, 60, 120) if k < args.num_ids}, forward)
    figures["by_batch"] = meter.growth("batch", {b: (b, lambda b=b: one.expand(b, -1, -1)) for b in (1, 2, 4, 8, 16, 32, 64)}, forward)
    figures["by_size"] = meter.growth("size", {s: ((s / size) ** 2, maps(s, 30)) for s in (size // 2, size, 2 * size)}, forward)
    return figures


@data.command
def main(argv=None):
    """Command line: train and evaluate stage 1."""
    args = parse(parser, MODELS, argv, "ae")
    if compare(main, argv, args, ("arch", "encoding", "kl")):
        return
    args.accum, args.encoding, args.arch, args.crop = args.accum or 1, args.encoding or "bits", args.arch or "shallow", args.crop or 0
    if args.drop_input and not args.ckpt:
        raise BadInput("--drop_input: teaches the encoder of a trained autoencoder; give it with --ckpt")
    multiple = (4 if args.bench else 2) * args.factor                      # growth halves it
    if args.size % multiple:
        raise BadInput(f"--size {args.size}: must be a multiple of {multiple}{' with --bench' * args.bench}")
    device, rank, world = setup(args)
    precision = pick_precision(args.precision, device)
    if args.gradient_checkpointing is None:
        args.gradient_checkpointing = (args.model, args.arch, device.type) == ("sd", "shallow", "cpu")
    if args.bench:
        alone(world, "--bench")
        figures = bench(args, device, precision)
        return args.json and data.write_json(args.json, figures)
    check_batch(args, world)
    args.points = args.points or max(256, round(12544 * (args.size / 512) ** 2))

    # data
    val_source = data.open_data(args.data, args.val_split, args.crop or args.size, args.seed, args.background)
    train_set = data.open_training(*args.train_sets, args.size, args.num_ids, args.seed, args.background,
                                   min_area=args.min_segment, images=False, crop=args.crop, turns=args.turns)
    val_set = data.Evaluation(val_source, args.eval_images, args.crop)

    # model and optimiser; weight decay is the penalty of eq. 2
    if args.ckpt:
        model = load_autoencoder(args.ckpt)
    elif args.arch == "sd_vae":
        model = SDAutoencoder(args.num_ids, args.encoding, args.factor, args.width, load_sd(args.sd, "vae") if args.model == "sd" else None)
    else:
        model = Autoencoder(args.num_ids, args.encoding, args.factor, args.width)
    for name in ("arch", "num_ids", "encoding", "factor", "width") if args.ckpt else ("factor",):
        if getattr(model, name) != getattr(args, name):
            raise BadInput(f"--{name} {getattr(args, name)}: the autoencoder of --{'ckpt' if args.ckpt else 'sd'} has {getattr(model, name)}")
    model = model.to(device, memory_format=torch.channels_last).train()
    teacher = copy.deepcopy(model).eval() if args.drop_input else None
    model.decoder.requires_grad_(not args.drop_input)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    ddp = nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None) if world > 1 else model

    out, start, best, skipped = Path(args.out), 0, -1.0, torch.zeros(2, device=device)
    if args.resume:
        state = load_state(out / "ae_state.pt", "ae_state", args)
        with fitting(out / "ae_state.pt"):
            model.load_state_dict(state["weights"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            start, best = state["iteration"], state["best"]
            skipped.add_(torch.tensor(state["skipped"]).to(device))
    checkpoint = lambda: {"kind": "ae", "autoencoder": model.settings, "weights": {k: v.cpu() for k, v in model.state_dict().items()},
                          "settings": {k: getattr(args, k) for k in ("data", "train_split", "val_split", "background", "size", "crop", "seed", "model", "arch")}}
    if is_main():
        print(f"stage 1: {args.arch} {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {' + '.join(args.train_sets[0])}, {args.size} px, N = {args.num_ids}, "
              f"f = {args.factor}, batch {args.batch_size} on {world} x {device.type}, {precision}, iterations {start}..{args.iters}")
        log(out / "log.jsonl", stage="ae", start=start, seed=args.seed)

    # training: eq. 2
    batches = iter(data.training_batches(train_set, start, args.iters, args.batch_size, rank, world, args.accum, args.num_workers, device.type == "cuda"))
    progress = tqdm(range(start, args.iters), initial=start, total=args.iters, disable=not is_main(), unit="it", mininterval=1)
    seen, clock, result, stop = 0, time.time(), None, Stop()
    for it in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(it, args)
        seed_iteration(args.seed, it, rank)
        maps = [move(next(batches)[1], device) for _ in range(args.accum)]  # each b x size x size

        parts = torch.zeros(3, device=device)                              # the loss, L_ce and L_mask, for the log
        # The counts that normalise both losses are those of the whole batch: draw the points of all pieces first.
        points = []
        for ids in maps if args.accum > 1 else ():
            with torch.no_grad(), autocast(precision, device):
                points.append(draw_points(model(ids)[0], ids, args.points))
        for k, ids in enumerate(maps):
            last = k == args.accum - 1
            with contextlib.nullcontext() if last or world == 1 else ddp.no_sync():
                with autocast(precision, device):
                    inputs = drop_input(ids) if teacher else ids
                    logits, mean, logvar = ddp(inputs)                     # b x N x 4h x 4w
                if args.accum == 1:
                    points = [draw_points(logits, ids, args.points)]
                ce, n_ce, mask, n_mask = segmentation_losses(logits, ids, *points[k])
                if k == 0:
                    if args.accum > 1:
                        n_ce = sum((sample_at(y[:, None].float(), p[0], "nearest") > 0).sum() for y, p in zip(maps, points))
                        n_mask = sum(len(p[1]) for p in points)
                    counts = torch.stack([n_ce.float(), torch.full_like(n_ce, n_mask, dtype=torch.float32)])
                    if world > 1:
                        dist.all_reduce(counts)
                    counts = counts.clamp(min=1)
                loss = ce / counts[0] + mask / counts[1]
                if args.kl:
                    loss = loss + args.kl * kl_loss(mean, logvar) / args.batch_size
                if teacher:                                                # instead: the latents of the full map, where any of it is given
                    given = F.max_pool2d((inputs > 0).float()[:, None], args.factor)         # b x 1 x h x w
                    error = (mean - teacher.encode(ids)[0].detach()).square().mean(1, keepdim=True)
                    loss = (error * given).sum() / given.sum().clamp(min=1) / (args.accum * world)
                parts += torch.stack([loss, ce / counts[0], mask / counts[1]]).detach()
                scaler.scale(loss * world).backward()                      # DDP averages over ranks; the counts are global
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        guarded_step(optimizer, scaler, norm, skipped)

        seen += args.batch_size
        if (it + 1) % args.log_every == 0:
            loss, ce, mask = reduce_sum(parts, device).tolist()
            left_out = check_skipped(skipped, it + 1, out)
            if is_main():
                rate, seen, clock = seen / (time.time() - clock), 0, time.time()
                progress.set_postfix(loss=f"{loss:.3f}", images_s=f"{rate:.0f}")
                log(out / "log.jsonl", stage="ae", iteration=it + 1, loss=loss, ce=ce, mask=mask, grad_norm=norm.item(),
                    lr=learning_rate(it, args), images_per_second=rate, **{"skipped": left_out} if left_out else {})
        done = it + 1 == args.iters
        if (it + 1) % args.eval_every == 0 or done:
            result, rows, stats = evaluate(model, val_set, args, device, rank, world)
            if is_main():
                log(out / "log.jsonl", stage="ae", iteration=it + 1, val_pq=100 * result["pq"], **stats)
                data.picture(out / "ae.png", rows, ["image", "ids", "reconstruction", "error"])
                if result["pq"] > best:
                    best = result["pq"]
                    save(out / "ae_best.pt", checkpoint())
            clock, seen = time.time(), 0
        stopped = stop()
        if ((it + 1) % args.save_every == 0 or done or stopped) and is_main():
            save(out / "ae.pt", checkpoint())
            save(out / "ae_state.pt", {"kind": "ae_state", "flags": flags(args), "weights": model.state_dict(), "iteration": it + 1,
                                       "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "best": best,
                                       "skipped": skipped.tolist()})
        if stopped:
            progress.close()
            stop.leave(out / "ae_state.pt", it + 1)

    # what came of it
    if result is None:
        result, rows, stats = evaluate(model, val_set, args, device, rank, world)
        if is_main():
            data.picture(out / "ae.png", rows, ["image", "ids", "reconstruction", "error"])
    if is_main():
        percent, millions = {k: 100 * float(v) for k, v in result.items()}, sum(p.numel() for p in model.parameters()) / 1e6
        print(f"reconstruction of {len(val_set)} {args.val_split} images: " + "  ".join(f"{FIGURES[k]} {v:.1f}" for k, v in percent.items()) +
              f"  (latents: std {stats['latent_std']:.2f}, largest {stats['latent_max']:.1f}) -> {out / 'ae.png'}")
        if start < args.iters:
            entries = read_log(out / "log.jsonl", "ae")
            curves = {k: zip(*[(e["iteration"], e[k]) for e in entries if k in e]) for k in ("loss", "ce", "mask")}
            data.plot(out / "ae_loss.png", curves, "iteration", "loss", log_y=True)
        if args.json:
            data.write_json(args.json, {"images": len(val_set), **percent, **stats, "parameters_millions": millions})
    data.say_left_out(train_set, lambda value: reduce_sum(value, device))
    stop.leave(out / "ae_state.pt", args.iters)


if __name__ == "__main__":
    main()

"""diffusion.py: stage 2, denoise the latent of a segmentation map given the image (paper section 3.2, Algorithms 1 and 2).

    python diffusion.py                                   # the paper's run on one GPU: COCO in data/coco, 512 px
    torchrun --nproc_per_node=8 diffusion.py              # on eight GPUs; --batch_size is the global one
    torchrun --nnodes=2 --node_rank=R --master_addr=HOST --nproc_per_node=8 diffusion.py     # on two machines
    python diffusion.py --model small --data shapes       # built-in scenes, from scratch, no download
    python diffusion.py --data DATA --crop 64 --turns     # train on squares of large pictures (README: your own pictures)
    python diffusion.py --bench                           # time a step beside the UNet alone, and how it grows
    python diffusion.py --loss_weight snr linear none     # trained alike, one after the other, with a table (ablations)
    python diffusion.py --ckpt checkpoints/ldm.pt --iters 0 --export ldm.pt    # evaluate; write the weights in half precision
    python diffusion.py --ckpt checkpoints/ldm.pt --classes only --iters 20000 --out checkpoints/classes     # Table 2's classifier

Symbols (paper section 3): x image, y id map, j timestep in 0..T-1, ab_j = alphas_cumprod[j],
    z = scale * E(y)          latent of the id map               B x 4 x h x w
    image_latent              latent of the image, z_i           B x c x h x w
    self_cond                 the previous estimate of z, z^0    B x 4 x h x w
    eps                       Gaussian noise; z^j is z noised to timestep j by eq. 3
Needs the autoencoder of stage 1 (--ae). Writes to --out: ldm.pt (last weights; all that sampling needs), ldm_best.pt,
ldm_state.pt (to --resume from), log.jsonl, ldm.png, ldm_loss.png.
"""
import argparse
import collections
import contextlib
import copy
import functools
import hashlib
import json
import math
import shutil
import time
from pathlib import Path

import data
import pq
from data import BadInput, is_main

# Settings of `--model`; each can be set by the flag of its name.
MODELS = {
    "sd": dict(iters=50_000, batch_size=256, lr=1e-4, schedule="cosine", weight_decay=0.05, clip=1.0, ema=0.0, latent_scale=0.18215,
               loss_weight="linear", self_cond=1.0, gradient_checkpointing=True),
    "small": dict(iters=12_000, batch_size=32, lr=1e-3, schedule="cosine", weight_decay=0.01, clip=1.0, ema=0.999, latent_scale=0.0,
                  loss_weight="none", self_cond=0.5, gradient_checkpointing=False),
}

parser = data.Parser(__doc__, out="checkpoints", mix=True)
data.training_flags(parser, MODELS)
add = parser.add_argument
add("--ae", help="checkpoint of stage 1 (default: ae.pt in --out)")
add("--channels", type=int, default=48, choices=range(16, 321, 16), metavar="C",
    help="a new --model small: channels at the first resolution (default %(default)s)")
add("--prediction", choices=["epsilon", "sample", "v"], help="what the network estimates (default epsilon)")
add("--loss_weight", choices=["linear", "snr", "none", "balanced"], nargs="+", help="w_j of eq. 4; several are compared (default: sd linear, small none)")
add("--latent_scale", type=data.amount, nargs="+", help="factor on z; several are compared (default: sd 0.18215; small, or 0: half of unit "
    "variance, measured)")
add("--self_cond", type=data.fraction, nargs="+", help="share of samples with self-conditioning; several are compared (default: sd 1, small 0.5)")
add("--ema", type=data.fraction, help="decay of the averaged weights, 0 for none (default: sd 0, small 0.999)")
add("--clip", type=data.amount, help="largest gradient norm (default 1)")
add("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=None, help="(default: sd on, small off)")
add("--steps", type=data.positive, default=10, help="sampling steps of an evaluation (default %(default)s)")
add("--jitter", type=data.fraction, default=0.0, metavar="J", help="training pictures' brightness and contrast times 1-J..1+J (default %(default)s)")
add("--connected", action=argparse.BooleanOptionalAction, help="segments of this data are in one piece: sampling makes parts that do not touch "
    "segments of their own, but for a sample's largest segment (default: as in --ckpt, else not)")
add("--cache_latents", metavar="FOLDER", help="keep every training image's latents, as it is and flipped, in a file there (float16), and train "
    "without decoding and encoding images")
add("--classes", choices=["with", "only"], help="also train the classifier of Table 2: with the UNet, or only it, the rest of --ckpt frozen")
add("--resnet", default="imagenet", metavar="FILE", help="a new classifier of --model sd: its ResNet-50's weights, 'imagenet' downloads "
    "them, 'none' is random (default %(default)s)")
add("--export", metavar="FILE", help="at the end also write the weights in half precision")
add("--bench", action="store_true", help="only time a step of --model, with random weights and input")
add("--compile", action="store_true", help="with torch.compile (minutes at the start; needs a C++ compiler)")
parser.set_defaults(weight_decay=None)
if __name__ == "__main__":
    parser.at_once()                                                       # --help and wrong flags need not wait for torch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import ae

SD_SCALE = 0.18215  # Stable Diffusion's factor on its VAE's latents

# ------------------------------------------------------------------------------------------- the DDIM scheduler


class DDIM:
    """Noise schedule and deterministic sampler (Song et al. 2021; paper eq. 3 and 5), Stable Diffusion's numbers.

    prediction: what the network's output estimates, "epsilon" (the paper), "sample" (z^0) or "v"."""

    def __init__(self, prediction="epsilon", T=1000, beta_start=0.00085, beta_end=0.012):
        self.T, self.prediction = T, prediction
        betas = torch.linspace(beta_start ** 0.5, beta_end ** 0.5, T, device="cpu") ** 2
        self.alphas_cumprod = (1 - betas).cumprod(0)                       # T, float32

    def scales(self, j, z):
        """sqrt(ab_j) and sqrt(1 - ab_j), shaped to multiply z (B x 4 x h x w); j: int or B."""
        self.alphas_cumprod = self.alphas_cumprod.to(z.device)             # once: a copy makes a GPU wait
        ab = self.alphas_cumprod[j].reshape(-1, 1, 1, 1)
        return ab.sqrt(), (1 - ab).sqrt()

    def add_noise(self, z, eps, j):
        """eq. 3: z^j = sqrt(ab_j) z + sqrt(1 - ab_j) eps."""
        a, b = self.scales(j, z)
        return a * z + b * eps

    def target(self, z, eps, j):
        """What the network should put out for z noised with eps to timestep j."""
        a, b = self.scales(j, z)
        return {"epsilon": eps, "sample": z, "v": a * eps - b * z}[self.prediction]

    def remove_noise(self, zj, output, j):
        """The estimate of z^0 from z^j and the network's output (eq. 3 solved for z)."""
        a, b = self.scales(j, zj)
        if self.prediction == "sample":
            return output.clone()                                          # compiled with CUDA graphs, the network reuses its own
        return a * zj - b * output if self.prediction == "v" else (zj - b * output) / a

    def step(self, zj, z0, j, j_prev, eps=None):
        """eq. 5 with eta = 0: from z^j and an estimate of z^0 to the sample at the earlier timestep j_prev.

        Past the last timestep (j_prev < 0) the schedule ends at ab_0, as Stable Diffusion's does.
        eps: None is the paper's step, which keeps the noise that z^j holds; fresh noise instead forgets it."""
        if eps is None:
            a, b = self.scales(j, zj)
            eps = (zj - a * z0) / b
        a, b = self.scales(max(j_prev, 0), zj)
        return a * z0 + b * eps

    def timesteps(self, steps):
        """`steps` equidistant timesteps from T-1 down, as ints. Raises BadInput outside 1..T."""
        if not 1 <= steps <= self.T:
            raise BadInput(f"--steps {steps}: must be in 1..{self.T}")
        return [round((i + 1) * self.T / steps) - 1 for i in reversed(range(steps))]

    def loss_weights(self, kind, max_snr=2.0):
        """w_j of eq. 4, T floats. linear: 1, falling towards 0 over the lowest quarter of j (the paper);
        snr: min(SNR, 2) / SNR (the authors' release); none: 1; balanced: SNR^-1/2 over its mean, which lets the high noise,
        where it is decided which segment gets which id, weigh as much as the rest."""
        j, ab = torch.arange(self.T), self.alphas_cumprod.cpu()
        snr = ab / (1 - ab)
        return {"none": torch.ones(self.T), "linear": ((j + 1) / (self.T / 4)).clamp(max=1), "snr": snr.clamp(max=max_snr) / snr,
                "balanced": snr.rsqrt() / snr.rsqrt().mean()}[kind]


# ------------------------------------------------------------------------------------------------- the networks


class Pixels(nn.Module):
    """Image latent without a network: a lossless rearrangement of f x f pixels into 3 f^2 channels."""

    def __init__(self, factor):
        super().__init__()
        self.config = {"factor": factor}
        self.factor, self.channels = factor, 3 * factor ** 2

    def forward(self, x):
        """x: B x 3 x H x W in -1..1 -> B x 3 f^2 x H/f x W/f."""
        return F.pixel_unshuffle(x, self.factor)


class SDEncoder(nn.Module):
    """Image latent from Stable Diffusion's VAE encoder: the mode of its Gaussian, times 0.18215."""

    def __init__(self, vae):
        super().__init__()
        self.config, self.channels, self.factor = ae.plain(vae.config), vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, x):
        """x: B x 3 x H x W in -1..1 -> B x 4 x H/8 x W/8."""
        return SD_SCALE * self.quant_conv(self.encoder(x)).chunk(2, dim=1)[0]


def build_unet(config):
    """Stable Diffusion's UNet class with the cross-attention removed (its residual branch is skipped)."""
    from diffusers import UNet2DConditionModel
    unet = UNet2DConditionModel(**config)
    for block in unet.modules():
        if hasattr(block, "attn2"):
            block.attn2 = block.norm2 = None
    return unet


def small_unet_config(in_channels, latent_size, channels):
    """The same class with few channels; attention at every resolution of at most 1,024 cells."""
    widths = [channels, 2 * channels, 2 * channels]
    attention = [(latent_size >> i) ** 2 <= 1024 for i in range(len(widths))]
    return dict(sample_size=latent_size, in_channels=in_channels, out_channels=4, block_out_channels=widths, layers_per_block=1,
                attention_head_dim=4, cross_attention_dim=8, norm_num_groups=16,  # four heads (diffusers counts heads here)
                mid_block_type="UNetMidBlock2DCrossAttn",
                down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
                up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)])


def load_sd(name):
    """UNet and VAE of Stable Diffusion with their weights, from a hub id or a folder. Raises BadInput."""
    return ae.load_sd(name, "unet"), ae.load_sd(name, "vae")


def grow_conv_in(unet, in_channels):
    """Load a pretrained UNet into one with more input channels: [z: pretrained weights, image: zeros, self_cond: zeros]."""
    grown = build_unet({**ae.plain(unet.config), "in_channels": in_channels})
    state = {k: v for k, v in unet.state_dict().items() if k in grown.state_dict()}
    weight = torch.zeros_like(grown.conv_in.weight)
    weight[:, :unet.config.in_channels] = state["conv_in.weight"]
    grown.load_state_dict({**state, "conv_in.weight": weight})
    return grown


MOST_SHARES = 1 << 26  # of segments in cells, that `segment_means` holds at a time: 256 MB


def segment_means(x, ids, count):
    """Means of x (B x C x h x w) over the pixels of each id 0..count-1 of ids (B x H x W) -> B x count x C, 0 where an id is absent."""
    h, w = x.shape[2:]
    if len(x) * count * h * w > MOST_SHARES and count > 3:                 # one half of the ids, then the other; the rest as one segment
        half, ids = count // 2, ids.long()
        low, high = segment_means(x, ids.clamp(max=half), half + 1), segment_means(x, (ids - half + 1).clamp(min=0), count - half + 1)
        return torch.cat([low[:, :half], high[:, 1:]], 1)
    row, col = (((torch.arange(n, device=x.device) + 0.5) * cells / n).long() for n, cells in zip(ids.shape[1:], (h, w)))
    place = ((ids.long() * h + row[:, None]) * w + col).flatten(1)         # B x HW: of which id and in which cell each pixel is
    pixels = torch.zeros(len(x), count * h * w, device=x.device).scatter_add_(1, place, torch.ones(place.shape, device=x.device))
    pixels = pixels.view(len(x), count, h * w)
    return pixels @ x.float().flatten(2).mT / pixels.sum(2, keepdim=True).clamp(min=1)


class Classifier(nn.Module):
    """Labels proposals (paper 4.2, Table 2): DeepLabv3's head gives class logits of the image, their mean over a proposal labels it.

    categories: list of {id, name, isthing}; model: "sd" has a ResNet-50 under the head, "small" four layers, 0.27 M parameters
    in all. `forward` is the training loss."""

    def __init__(self, categories, model):
        super().__init__()
        import torchvision                                                 # here, since it takes longer to import than all else
        from torchvision.models.segmentation.deeplabv3 import ASPP
        self.categories = categories
        if model == "sd":
            resnet = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
            self.backbone = nn.Sequential(collections.OrderedDict(list(resnet.named_children())[:-2]))     # without pooling and fc
            channels, width, rates = 2048, 256, (12, 24, 36)
        else:
            channels, width, rates = 64, 64, (2, 4, 6)
            layer = lambda c, d, stride: [nn.Conv2d(c, d, 3, stride, 1, bias=False), nn.BatchNorm2d(d), nn.ReLU()]
            self.backbone = nn.Sequential(*layer(3, 32, 2), *layer(32, channels, 2), *layer(channels, channels, 1), *layer(channels, channels, 1))
        self.head = nn.Sequential(ASPP(channels, rates, width), nn.Conv2d(width, width, 3, padding=1, bias=False),
                                  nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, len(categories), 1))

    def logits(self, images):
        """Images (B x 3 x H x W, uint8) -> class logits (B x C x H/8 x W/8; small: H/4 x W/4)."""
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return self.head(self.backbone((images / 255 - mean) / std))       # as torchvision normalises

    def forward(self, images, ids, classes):
        """Cross-entropy of the segments' mean logits: mean over an image's segments, then over images, so that pieces add up.

        images: B x 3 x H x W, uint8; ids: B x H x W; classes: B x N, the class of each id, -1 where there is none."""
        means = segment_means(self.logits(images), ids, classes.shape[1])  # B x N x C
        image_of, id_of = ae.segments_of(ids, classes.shape[1])            # K and K
        losses = F.cross_entropy(means[image_of, id_of], classes[image_of, id_of], ignore_index=-1, reduction="none")
        return (losses / image_of.bincount()[image_of]).sum() / len(images)

    @torch.no_grad()
    def label(self, logits, ids, merge=True):
        """Class logits (C x h x w) and id map (H x W, int32, 0 = void) of an image -> id map and segments_info with category and score.

        merge: proposals of one stuff category become one segment, as COCO's panoptic format has it."""
        known, where = np.unique(ids, return_inverse=True)
        where = where.reshape(ids.shape)
        means = segment_means(logits[None], torch.from_numpy(where[None]).to(logits.device), len(known))[0].cpu()
        score, best = (t.numpy() for t in means.softmax(1).max(1))         # K each
        if merge:
            stuff = np.array([not c["isthing"] for c in self.categories])[best] & (known > 0)
            first = known[(best[:, None] == np.where(stuff, best, -1)).argmax(1)]
            return self.label(logits, np.where(stuff, first, known)[where], merge=False)
        labels = {i: {"category_id": self.categories[c]["id"], "score": round(float(s), 4)} for i, c, s in zip(known, best, score)}
        return ids, [{**s, **labels[s["id"]]} for s in ae.describe(ids)]


class LDM(nn.Module):
    """The whole model: `forward` is the training loss (Algorithm 1), `sample` generates masks (Algorithm 2).

    autoencoder: stage 1; image_encoder: Pixels or SDEncoder; both frozen. settings: what a checkpoint keeps.
    classifier: None, or what labels the masks."""

    def __init__(self, autoencoder, image_encoder, unet, settings, classifier=None):
        super().__init__()
        self.autoencoder, self.image_encoder, self.unet, self.settings = autoencoder.eval(), image_encoder.eval(), unet, settings
        self.autoencoder.requires_grad_(False)
        self.image_encoder.requires_grad_(False)
        self.scale, self.ddim, self.classifier = settings["latent_scale"], DDIM(settings["prediction"]), classifier

    def encode(self, ids):
        """y (B x H x W ids) -> z (B x 4 x h x w)."""
        return self.scale * self.autoencoder.encode(ids)[0]

    def decode(self, z):
        """z (B x 4 x h x w) -> logits (B x N x 4h x 4w)."""
        return self.autoencoder.decode(z / self.scale)

    def encode_image(self, images):
        """Images (B x 3 x H x W, uint8) -> image_latent (B x c x h x w); latents of `--cache_latents` (float16) are it already."""
        return images.float() if images.is_floating_point() else self.image_encoder(images.float() / 127.5 - 1)

    def denoise(self, zj, image_latent, self_cond, j):
        """eps_theta(concat[z^j, image_latent, self_cond], j) -> B x 4 x h x w; j: int or B."""
        j = j if torch.is_tensor(j) else torch.full((len(zj),), j, device=zj.device)
        return self.unet(torch.cat([zj, image_latent, self_cond], 1), j, encoder_hidden_states=None).sample.float()

    def forward(self, images, ids, eps, j, loss_weights, conditioned, classes=None):
        """Algorithm 1: the loss of eq. 4, mean over all cells; with classes (B x N) plus the classifier's loss.

        images: B x 3 x H x W, uint8, or their latents; ids: B x H x W; eps: B x 4 x h x w; j: B, timesteps; loss_weights: T;
        conditioned: B, bool, on the CPU: which samples get the estimate of a first pass (the authors: all; Analog Bits: half)."""
        with torch.no_grad():
            z = self.encode(ids).float()                                   # encode the target
            image_latent = self.encode_image(images).float()               # encode the image
            zj = self.ddim.add_noise(z, eps, j)                            # eq. 3
            self_cond, first = torch.zeros_like(z), ae.move(conditioned.nonzero()[:, 0], z.device)
            if len(first):                                                 # self-conditioning: a first estimate of z^0
                output = self.denoise(zj[first], image_latent[first], self_cond[first], j[first])
                self_cond[first] = self.ddim.remove_noise(zj[first], output, j[first])
        torch.clear_autocast_cache()                                       # or weights cast without gradient would be reused
        output = self.denoise(zj, image_latent, self_cond, j)
        error = (output - self.ddim.target(z, eps, j)).square()            # B x 4 x h x w
        valid = F.interpolate(ids[:, None].float(), size=z.shape[2:], mode="nearest") > 0
        loss = (loss_weights[j].view(-1, 1, 1, 1) * error * valid).mean()
        return loss if classes is None else loss + self.classifier(images, ids, classes)

    @torch.no_grad()
    def sample(self, image_latent, noise, steps, fresh=None, trace=None):
        """Algorithm 2: DDIM from pure noise (B x 4 x h x w) to the latent of a segmentation, B x 4 x h x w.

        fresh: None is Algorithm 2; a function of j that gives new noise (`fresh_noise`) makes the steps stochastic;
        trace: a list that receives the estimate of z^0 after each step."""
        z, self_cond = noise, torch.zeros_like(noise)
        timesteps = self.ddim.timesteps(steps)
        for j, j_prev in zip(timesteps, timesteps[1:] + [-1]):
            output = self.denoise(z, image_latent, self_cond, j)
            z0 = self.ddim.remove_noise(z, output, j)
            z = self.ddim.step(z, z0, j, j_prev, fresh and fresh(j))       # eq. 5
            self_cond = z0 if self.settings["self_cond"] else self_cond
            if trace is not None:
                trace.append(z0)
        return z0


def new_classifier(args, categories):
    """The classifier that a training starts from; --model sd: ResNet-50 with weights of --resnet. Raises BadInput."""
    classifier = Classifier(categories, args.model)
    if args.model == "sd" and args.resnet != "none":
        import torchvision
        try:
            imagenet = torchvision.models.ResNet50_Weights.DEFAULT
            state = imagenet.get_state_dict(progress=False) if args.resnet == "imagenet" else torch.load(args.resnet, "cpu", weights_only=True)
            classifier.backbone.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
        except Exception as error:
            raise BadInput(f"--resnet {args.resnet}: can't be loaded ({str(error).strip().splitlines()[0][:120]}); give a file with torchvision's "
                           "weights of resnet50, or 'none' to start from random ones") from None
    return classifier


def new_model(args, autoencoder, train_set, about):
    """The model that a training starts from: Stable Diffusion's networks (`--model sd`), or small ones from scratch."""
    if args.model == "sd":
        pretrained, vae = load_sd(args.sd)
        image_encoder = SDEncoder(vae)
        unet = grow_conv_in(pretrained, 4 + image_encoder.channels + 4)
    else:
        image_encoder = Pixels(autoencoder.factor)
        unet = build_unet(small_unet_config(4 + image_encoder.channels + 4, args.size // autoencoder.factor, args.channels))
    if image_encoder.factor != autoencoder.factor:
        raise BadInput(f"the image encoder shrinks by {image_encoder.factor}, the autoencoder by {autoencoder.factor}: "
                       f"train stage 1 with --factor {image_encoder.factor}")
    scale = args.latent_scale
    if not scale:                                                          # half of unit variance
        maps = torch.from_numpy(np.stack([train_set[n][1] for n in range(256)]))
        with torch.no_grad():
            scale = 0.5 / torch.cat([autoencoder.encode(m)[0] for m in maps.split(16)]).std().item()
    return LDM(autoencoder, image_encoder, unet, dict(
        autoencoder=autoencoder.settings, image_encoder=image_encoder.config, unet=ae.plain(unet.config), model=args.model,
        latent_scale=scale, prediction=args.prediction or "epsilon", **about))


def cache_latents(model, train_set, args, device, precision, rank, world):
    """Encode every training image once, as it is and flipped, into a memory map 2 x images x c x h x w of float16; train_set reads it.

    The file is named after what the latents depend on: the encoder's weights, size, precision and the images' names. A run that was
    killed goes on where it was; what can't be read counts as broken, as without a cache, and is tried again by the next run.
    A picture that was replaced under its old name is not noticed: delete the file then. Raises BadInput."""
    source, size, digest, folder = train_set.source, train_set.size, hashlib.sha256(), Path(args.cache_latents)
    shape = 2, len(source), model.image_encoder.channels, *[size // model.image_encoder.factor] * 2
    for part in (str(size), str(shape), precision, str(source.images_dir.resolve()), *(json.loads(item)[0]["file_name"] for item in source.items)):
        digest.update(part.encode() + b"\0")
    for value in model.image_encoder.state_dict().values():
        digest.update(value.cpu().contiguous().numpy().tobytes())
    path = folder / f"image_latents_{digest.hexdigest()[:16]}.npy"
    state_path = path.with_suffix(".state.npy")                            # of each image: 0 to do, 1 done, 2 broken
    gigabytes = 2 * math.prod(shape) / 1e9
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            fine = np.load(path, mmap_mode="r").shape == shape and np.load(state_path).shape == shape[1:2]
        except (OSError, ValueError):
            fine = False
        if not fine:
            if shutil.disk_usage(folder).free < 1.02e9 * gigabytes:
                raise BadInput(f"--cache_latents {folder}: {gigabytes:.1f} GB are needed there; free some space or name another folder")
            np.lib.format.open_memmap(state_path, "w+", np.uint8, shape[1:2]).flush()          # first: it must not speak for new latents
            np.lib.format.open_memmap(path, "w+", np.float16, shape).flush()
    if world > 1:
        dist.barrier()
    latents, state = np.load(path, mmap_mode="r+"), np.load(state_path, mmap_mode="r+")
    images = data.Images(source, size, [i for i in range(rank, len(source), world) if state[i] != 1])
    batches = data.loader(images, batch_size=args.batch_size // world // args.accum, num_workers=args.num_workers, collate_fn=list)
    for batch in tqdm(batches, "image latents", disable=not is_main() or not len(images)):
        fine = [(i, picture) for i, picture in batch if picture is not None]
        if fine:
            x = torch.from_numpy(np.stack([picture for _, picture in fine])).to(device)
            with torch.no_grad(), ae.autocast(precision, device):
                pair = torch.stack([model.encode_image(x), model.encode_image(x.flip(-1))])
            latents[:, [i for i, _ in fine]] = pair.half().cpu().numpy()
            latents.flush()                                                # before they are said to be done
        for i, picture in batch:
            state[i] = 2 if picture is None else 1
    state.flush()
    if world > 1:
        dist.barrier()
    if is_main():
        print(f"image latents: {path} ({gigabytes:.2f} GB)")
    train_set.latents = str(path)
    for i in np.flatnonzero(np.load(state_path) == 2):
        train_set.broken[i] = True


def untrained(kind, size=0):
    """A model of --model `kind` with random weights, to time it. size: side of its input, 0 for the usual one."""
    stage1 = {k: ae.MODELS[kind][k] for k in ("num_ids", "factor", "width")}
    args = argparse.Namespace(model=kind, sd="none", size=size or ae.MODELS[kind]["size"], channels=48, prediction=None, latent_scale=SD_SCALE)
    return new_model(args, ae.Autoencoder(**stage1), None, dict(size=args.size, min_area=ae.min_area(args.size), self_cond=True, crop=0, connected=False)).eval()


def image_noise(seed, keys, shape, device):
    """Gaussian noise that belongs to (seed, image): len(keys) x shape, whatever batch an image comes in."""
    draws = []
    for key in keys:
        digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
        draws.append(torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))))
    return ae.move(torch.stack(draws), torch.device(device))


def fresh_noise(seed, keys, shape, device):
    """A function of the timestep j that gives each image its own new noise at each step, len(keys) x shape."""
    return lambda j: image_noise(seed, [f"{key} at {j}" for key in keys], shape, device)


def network_input(images, size, device):
    """H x W x 3 uint8 arrays of any sizes, squashed to a square -> B x 3 x size x size, uint8."""
    return torch.from_numpy(np.stack([data.resize_image(image, size).transpose(2, 0, 1) for image in images])).to(device)


@torch.no_grad()
def sample_logits(model, images, keys, steps=50, seed=0, renoise=False, trace=None):
    """Algorithm 2 on H x W x 3 uint8 images of any sizes: logits over ids, B x N x 4h x 4w, and the noise, B x 4 x h x w.

    keys: what the noise of each image belongs to, with `seed`; the same key gives the same mask in any batch.
    renoise: draw the noise anew at each step instead of the paper's deterministic DDIM. trace: as in `LDM.sample`."""
    device, size = next(model.parameters()).device, model.settings["size"]
    image_latent = model.encode_image(network_input(images, size, device))                     # B x c x h x w
    place = keys, (4, *image_latent.shape[2:]), device
    fresh = fresh_noise(seed, *place) if renoise else None
    noise = image_noise(seed, *place)
    return model.decode(model.sample(image_latent, noise, steps, fresh, trace)), noise


def predict(model, images, keys, steps=50, seed=0, renoise=False):
    """Images as in `sample_logits` -> for each its ids (H x W, int32) and their certainty (H x W), as `ae.argmax` gives them."""
    logits, _ = sample_logits(model, images, keys, steps, seed, renoise)
    found = [ae.argmax(l, *image.shape[:2]) for l, image in zip(logits, images)]
    return [(ae.connected(ids), certainty) for ids, certainty in found] if model.settings["connected"] else found


@torch.no_grad()
def class_logits(model, images):
    """The classifier's logits (C x h x w) for each of a list of H x W x 3 uint8 images, seen at the size or (crops) scale of training."""
    size, crop, device = model.settings["size"], model.settings["crop"], next(model.parameters()).device
    if not crop:
        return model.classifier.logits(network_input(images, size, device))
    scaled = [F.interpolate(torch.tensor(image, device=device).permute(2, 0, 1)[None].float(), [max(8, round(n * size / crop)) for n in image.shape[:2]],
                            mode="bilinear", antialias=True) for image in images]
    return [model.classifier.logits(x)[0] for x in scaled]


def from_release(content):
    """The authors' diffusion checkpoint as one of ours: Stable Diffusion's classes, their sizes read off the tensors.

    Its `unet` is taken, since the release keeps no average of it; the latent scale is that of its settings."""
    unet, image, stage1 = ae.strip(content["unet"]), ae.strip(content["vae_image"]), ae.from_release({"vae": content["vae_semseg"]})
    count = lambda weights, prefix: len({k[len(prefix):].split(".")[0] for k in weights if k.startswith(prefix)})       # blocks
    widths = lambda weights, prefix: [len(weights[f"{prefix}{i}.resnets.0.conv1.weight"]) for i in range(count(weights, prefix))]
    types = lambda side: [("CrossAttn" if count(unet, f"{side.lower()}_blocks.{i}.attentions.") else "") + f"{side}Block2D"
                          for i in range(count(unet, f"{side.lower()}_blocks."))]
    config = dict(sample_size=64, in_channels=unet["conv_in.weight"].shape[1], out_channels=len(unet["conv_out.weight"]),
                  block_out_channels=widths(unet, "down_blocks."), layers_per_block=count(unet, "down_blocks.0.resnets."),
                  down_block_types=types("Down"), up_block_types=types("Up"), attention_head_dim=8)
    blocks = widths(image, "encoder.down_blocks.")
    vae = dict(block_out_channels=blocks, layers_per_block=count(image, "encoder.down_blocks.0.resnets."), sample_size=512,
               latent_channels=len(image["quant_conv.weight"]) // 2,
               down_block_types=["DownEncoderBlock2D"] * len(blocks), up_block_types=["UpDecoderBlock2D"] * len(blocks))
    scale = SD_SCALE
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        scale = float(content["p"]["vae_model_kwargs"]["scaling_factor"])
    # the image encoder needs no post_quant_conv; its attention had other names up to diffusers 0.16, which the release was made with
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    image = {".".join(names.get(part, part) for part in k.split(".")): v for k, v in image.items() if k.startswith(("encoder.", "quant_conv."))}
    parts = {"autoencoder": stage1["weights"], "image_encoder": image, "unet": unet}
    return {"kind": "ldm", "weights": {f"{part}.{k}": v for part, weights in parts.items() for k, v in weights.items()},
            "settings": dict(ae.RELEASE_SETTINGS, autoencoder=stage1["autoencoder"], image_encoder=vae, unet=config, latent_scale=scale,
                             prediction="epsilon", self_cond=True, min_area=ae.min_area(ae.RELEASE_SETTINGS["size"]))}


ae.FROM_RELEASE["ldm"] = from_release


AT_FIRST = {"crop": 0, "connected": False}  # settings of checkpoints from before there were these


def load_ldm(path):
    """Checkpoint of stage 2, ours or the authors' -> LDM in eval mode on the CPU; nothing is downloaded. Raises BadInput."""
    content = ae.load(path, "ldm")
    s = content["settings"]

    def build():
        """The model that the settings describe."""
        if s["image_encoder"].keys() == {"factor"}:
            image_encoder = Pixels(**s["image_encoder"])
        else:
            from diffusers import AutoencoderKL
            image_encoder = SDEncoder(AutoencoderKL(**s["image_encoder"]))
        classifier = Classifier(s["categories"], s["model"]) if "categories" in s else None
        return LDM(ae.from_settings(s["autoencoder"]), image_encoder, build_unet(s["unet"]), s, classifier)
    s = content["settings"] = {**AT_FIRST, **content["settings"]}
    with ae.fitting(path):
        for name, kind in {"size": int, "crop": int, "min_area": int, "latent_scale": float, "self_cond": bool, "connected": bool, "model": str, "seed": int,
                           "data": str, "train_split": str, "val_split": str, "background": str}.items():
            if type(s[name]) is not kind or kind in (int, float) and not 0 <= s[name] < 1e6 or name in ("size", "latent_scale") and not s[name]:
                raise BadInput(f"{path}: its setting {name} is {s[name]!r}, no {kind.__name__} in range")
        return ae.fill(build, content["weights"])


# ---------------------------------------------------------------------------------------------------- evaluation


COLUMNS = ["image", "argmax", "over threshold", "truth"]  # of the pictures


@torch.no_grad()
def evaluate(model, dataset, predict, device, batch_size=16, rank=0, world=1, num_workers=0, threshold=0.5):
    """Class-agnostic PQ of sampling a held-out set, and picture rows of `COLUMNS`.

    predict: function of lists of images and keys, which gives each one's ids and certainty, as `predict` above does.
    The figures are those of `ae.Score`. A model with a classifier of the set's categories also gets PQ over them (pq_classes, pq_things, pq_stuff; the whole
    result in `classes`) and label_accuracy, the share of the matched segments that are labelled rightly."""
    model.eval()
    score, rows, classifier = ae.Score(), [], model.classifier
    if classifier and not all(c in classifier.categories for c in data.categories_of(dataset.source)):
        data.say_once("note: the categories of this data are not those of the checkpoint's classifier: class-agnostic PQ only")
        classifier = None
    by_class = [pq.PanopticQuality(classifier.categories) for _ in range(2)] if classifier else []
    for samples in data.evaluation_batches(dataset, batch_size, rank, world, num_workers):
        images = [s["image"] for s in samples]
        logits = class_logits(model, images) if classifier else [None] * len(images)
        for s, of_classes, (raw, certainty) in zip(samples, logits, predict(images, [s["image_id"] for s in samples])):
            found = ae.keep(raw, certainty, threshold, model.settings["min_area"])
            score.update(s, found)
            for labelled, merge in zip(by_class, (False, True)):           # proposals as they are, and the panoptic format
                labelled.update(s["ids"], s["segments_info"], *classifier.label(of_classes, found, merge), str(s["file_name"]))
            if len(rows) < 6:
                rows.append([s["image"], *(data.overlay(s["image"], ids) for ids in (raw, found, s["ids"]))])
    for q in (score.all, score.alone, *by_class):
        q.state = ae.reduce_sum(q.state, device)
    result = score.result()
    if classifier:
        proposals, panoptic = by_class
        classes = panoptic.result()
        result.update({f"pq_{k}": classes[group]["pq"] for k, group in (("classes", "All"), ("things", "Things"), ("stuff", "Stuff"))},
                      label_accuracy=proposals.counts[:, 0].sum() / max(score.all.counts[0, 0], 1), classes=classes)
    return result, rows


def bench(args, device, precision):
    """A step of stage 2 beside the UNet alone, with random weights and input; what its parts cost; how it grows. Returns the figures."""
    torch.manual_seed(0)
    model, meter = untrained(args.model, args.size).to(device, memory_format=torch.channels_last).train(), ae.Meter(device)
    size, f = model.settings["size"], model.autoencoder.factor
    batch = min(args.batch_size, 32) if device.type == "cuda" or args.model == "small" else 1      # 32: the authors' share of a GPU
    if args.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    weights = [p for p in model.unet.parameters() if p.requires_grad]
    optimizer, weigh = torch.optim.AdamW(weights, lr=1e-6, fused=True), model.ddim.loss_weights("none").to(device)

    def made_up(batch, size):
        """A batch as training has it, and its image latents."""
        images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
        with torch.no_grad(), ae.autocast(precision, device):
            latents = torch.cat([model.encode_image(x) for x in images.split(1)])
        return images, latents.half(), ae.segments_map(1, size, min(30, model.autoencoder.num_ids - 1), device).expand(batch, -1, -1)

    def step(images, ids, share, unet_only=False):
        """A training step. share: of samples with self-conditioning; unet_only: its passes through the UNet and the optimiser alone."""
        z = torch.randn(len(ids), 4, ids.shape[-1] // f, ids.shape[-1] // f, device=device)
        j, first = torch.randint(0, model.ddim.T, (len(ids),), device=device), round(share * len(ids))
        with ae.autocast(precision, device):
            if unet_only:
                with torch.no_grad():
                    _ = first and model.denoise(z[:first], images[:first].float(), z[:first], j[:first])
                torch.clear_autocast_cache()
                loss = model.denoise(z, images.float(), z, j).square().mean()
            else:
                loss = model(images, ids, z, j, weigh, torch.arange(len(ids)) < first)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    images, latents, ids = made_up(batch, size)
    share = args.self_cond
    cases = {"UNet alone": lambda: step(latents, ids, share, unet_only=True), "step, image latents cached": lambda: step(latents, ids, share),
             "step, images encoded": lambda: step(images, ids, share), "self-conditioning on none": lambda: step(latents, ids, 0),
             "self-conditioning on half": lambda: step(latents, ids, 0.5), "self-conditioning on all": lambda: step(latents, ids, 1)}
    if batch == 1:
        del cases["self-conditioning on half"]
    meter.reset()
    seconds = data.side_by_side(cases, 7 if args.model == "small" else 3, device)
    gigabytes = meter.gigabytes()
    reached = meter.tflop(cases["UNet alone"]) / seconds["UNet alone"]
    rate = meter.matmul_rate(precision)
    print(f"--model {args.model}, untrained: UNet {sum(p.numel() for p in model.unet.parameters()) / 1e6:.1f} M parameters, {size} px, batch {batch}, "
          f"self-conditioning on {share:.0%}, gradient checkpointing {'on' if args.gradient_checkpointing else 'off'}, {device.type}, {precision}")
    for name, took in seconds.items():
        print(f"{name:>26}: {took:8.3f} s  {batch / took:8.2f} images/s  {took / seconds['UNet alone']:5.2f} of the UNet alone")
    print(f"UNet alone: {reached:.3f} TFLOP/s, {100 * reached / rate:.0f}% of a matrix product's {rate:.3f} (passes without gradient and recomputed ones "
          f"count); {gigabytes:.2f} GB")
    # alternatives of one pass forward and backward
    def pass_(unet, precision):
        """One pass with gradient."""
        with ae.autocast(precision, device):
            x = torch.cat([torch.randn(batch, 4, *latents.shape[2:], device=device), latents.float(), torch.zeros(batch, 4, *latents.shape[2:], device=device)], 1)
            unet(x, 500, encoder_hidden_states=None).sample.float().square().mean().backward()
        unet.zero_grad()
    optimizer.state.clear()                                                # its memory
    other = copy.deepcopy(model.unet).to(memory_format=torch.contiguous_format)
    compiled = copy.deepcopy(model.unet) if args.compile else None
    variants = {"channels_last": lambda: pass_(model.unet, precision), "contiguous": lambda: pass_(other, precision)}
    if precision == "fp32":
        variants["channels_last, bf16"] = lambda: pass_(model.unet, "bf16")
    if compiled:
        compiled.compile()
        variants["channels_last, compiled"] = lambda: pass_(compiled, precision)
    passes = data.side_by_side(variants, 3, device)
    for name, took in passes.items():
        print(f"{name:>26}: {took:8.3f} s a pass forward and backward, {took / passes['channels_last']:.2f} of channels_last")
    other = compiled = None                                                # their memory
    figures = {"seconds": seconds, "passes": passes, "tflops": reached, "matmul_tflops": rate, "gigabytes": gigabytes}
    grow = lambda case: step(case[1], case[2], share)
    figures["by_batch"] = meter.growth("batch", {b: (b, functools.partial(made_up, b, size)) for b in (1, 2, 4, 8, 16, 32, 64)}, grow)
    figures["by_size"] = meter.growth("size", {s: ((s / size) ** 2, functools.partial(made_up, 1, s)) for s in (size // 2, size, 2 * size)}, grow)
    return figures


def percent(result):
    """The figures of `evaluate` in percent, for JSON."""
    return {k: 100 * float(v) for k, v in result.items() if k != "classes"}


def class_table(result):
    """What `evaluate` found with classes, as lines of text."""
    return f"with classes:\n{pq.table(result['classes'])}\n{100 * result['label_accuracy']:.1f}% of the matched segments are labelled rightly"


@data.command
def main(argv=None):
    """Command line: train and evaluate stage 2."""
    args = ae.parse(parser, MODELS, argv, "ldm")
    if ae.compare(main, argv, args, ("loss_weight", "latent_scale", "self_cond"), ["--ae", str(args.ae or Path(args.out) / "ae.pt")]):
        return
    DDIM().timesteps(args.steps)
    if args.bench:
        if args.size and args.size % (8 * ae.MODELS[args.model]["factor"]):                    # growth halves it
            raise BadInput(f"--size {args.size}: must be a multiple of {8 * ae.MODELS[args.model]['factor']} with --bench")
        device, _, world = ae.setup(args)
        ae.alone(world, "--bench")
        figures = bench(args, device, ae.pick_precision(args.precision, device))
        return args.json and data.write_json(args.json, figures)
    data.require_data(args.data)
    device, rank, world = ae.setup(args)
    args.accum = args.accum or (-(-args.batch_size // (32 * world)) if args.model == "sd" else 1)   # the authors' 32 a GPU
    ae.check_batch(args, world)
    if args.classes == "only" and not args.ckpt:
        raise BadInput("--classes only: labels the masks of a trained model; give it with --ckpt")
    if args.classes and args.batch_size < 2 * world * args.accum:          # batch norm
        raise BadInput(f"--batch_size {args.batch_size}: --classes needs two images or more at a time")
    precision = ae.pick_precision(args.precision, device)
    out = Path(args.out)

    # stage 1 and the data; the autoencoder says at which size and for how many ids it was trained
    start_from = load_ldm(args.ckpt) if args.ckpt else None
    if start_from:
        autoencoder, seen = start_from.autoencoder, start_from.settings
    else:
        autoencoder = ae.load_autoencoder(args.ae or out / "ae.pt")
        seen = autoencoder.trained_with
    args.size, args.crop = args.size or seen["size"], seen.get("crop", 0) if args.crop is None else args.crop
    if args.size % (4 * autoencoder.factor):
        raise BadInput(f"--size {args.size}: must be a multiple of {4 * autoencoder.factor} for this autoencoder")
    if args.classes and len(args.train_sets[0]) > 1:
        raise BadInput("--classes: categories are those of one set; give one to --data")
    train_set = data.open_training(*args.train_sets, args.size, autoencoder.num_ids, args.seed, args.background, min_area=args.min_segment,
                                   classes=bool(args.classes), crop=args.crop, turns=args.turns, jitter=args.jitter)
    val_set = data.Evaluation(data.open_data(args.data, args.val_split, args.crop or args.size, args.seed, args.background), args.eval_images, args.crop)

    # the model
    about = dict(size=args.size, crop=args.crop, connected=bool(args.connected), min_area=ae.min_area(args.crop or args.size), data=args.data, train_split=args.train_split, val_split=args.val_split,
                 background=args.background, seed=args.seed, self_cond=args.self_cond > 0)
    if start_from:
        model = start_from
        for name in ("model", "prediction", "latent_scale"):
            if getattr(args, name) not in (None, model.settings[name]):
                raise BadInput(f"--{name} {getattr(args, name)}: the model of --ckpt has {model.settings[name]}")
        if args.classes == "only":
            about.pop("self_cond")                                         # stays as the UNet was trained
        model.settings.update(about)
    else:
        model = new_model(args, autoencoder, train_set, about)
    categories = args.classes and data.categories_of(train_set.source)
    if args.classes and not categories:
        raise BadInput(f"--classes: {args.data} lists no categories")
    if args.classes and model.settings.get("categories") != categories:
        model.settings["categories"], model.classifier = categories, new_classifier(args, categories)
    if model.classifier and not args.classes and not all(c in model.classifier.categories for c in data.categories_of(val_set.source)):
        if is_main():
            print("note: the classifier of --ckpt knows other categories than this data has: left out")
        model.classifier, _ = None, model.settings.pop("categories")
    if model.classifier:
        model.classifier.requires_grad_(bool(args.classes))
    model.unet.requires_grad_(args.classes != "only")
    if model.settings["model"] == "sd":
        model.unet.time_embedding.requires_grad_(False)                    # frozen, as in the authors' release
    if args.cache_latents:
        for name, wrong in {"data shapes": args.data == "shapes", "data with several sets": len(args.train_sets[0]) > 1, "crop": args.crop,
                            "turns": args.turns, "jitter": args.jitter, "classes": args.classes}.items():
            if wrong:
                raise BadInput(f"--cache_latents: not with --{name}, which needs the images themselves")
        cache_latents(model.to(device), train_set, args, device, precision, rank, world)
    if args.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    model = model.to(device, memory_format=torch.channels_last).train()
    if args.compile:
        model.unet.compile()
    weights = [p for p in model.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in weights] if args.ema else []     # EMA
    norms = {id(p) for m in model.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d)) for p in m.parameters()}
    optimizer = torch.optim.AdamW([{"params": [p for p in weights if id(p) not in norms]},
                                   {"params": [p for p in weights if id(p) in norms], "weight_decay": 0.0}],
                                  lr=args.lr, weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    ddp = model.classifier if args.classes == "only" else model
    if world > 1:
        ddp = nn.parallel.DistributedDataParallel(ddp, device_ids=[device.index] if device.type == "cuda" else None,
                                                  broadcast_buffers=bool(args.classes),    # batch norm's
                                                  gradient_as_bucket_view=True)            # no second copy of the gradients (sd: 3.3 GB)
    loss_weights = model.ddim.loss_weights(args.loss_weight).to(device)

    start, best, losses, skipped = 0, -1.0, [], torch.zeros(2, device=device)
    if args.resume:
        state = ae.load_state(out / "ldm_state.pt", "ldm_state", args)
        with ae.fitting(out / "ldm_state.pt"):
            model.settings, model.scale = {**AT_FIRST, **state["settings"]}, state["settings"]["latent_scale"]
            if model.classifier is None:
                model.settings.pop("categories", None)
            model.autoencoder.load_state_dict(state["autoencoder"])
            model.unet.load_state_dict(state["unet"])
            if model.classifier:
                model.classifier.load_state_dict(state["classifier"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            average = [a.to(device) for a in state["average"]]
            start, best, losses = state["iteration"], state["best"], state["losses"]
            skipped.add_(torch.tensor(state["skipped"]).to(device))

    def swap_ema():
        """Exchange the weights and their average."""
        for p, a in zip(weights, average):
            p.data, a.data = a.data, p.data

    def checkpoint(dtype=torch.float32):
        """What sampling needs; to be called with the averaged weights in place."""
        return {"kind": "ldm", "settings": model.settings, "weights": {k: v.to("cpu", dtype) for k, v in model.state_dict().items()}}

    if is_main():
        size_of = lambda m: f"{sum(p.numel() for p in m.parameters()) / 1e6:.2f} M parameters"
        print(f"stage 2: UNet {size_of(model.unet)}{' (frozen)' * (args.classes == 'only')}, "
              f"{f'classifier {size_of(model.classifier)}, ' if args.classes else ''}autoencoder {size_of(model.autoencoder)}, {' + '.join(args.train_sets[0])}, {args.size} px, "
              f"latent scale {model.scale:.4f}, batch {args.batch_size} on {world} x {device.type}, {precision}, iterations {start}..{args.iters}")
        ae.log(out / "log.jsonl", stage="ldm", start=start, seed=args.seed)
    per_process = args.batch_size // world

    def drain():
        """Losses of the iterations since the last reading, mean over ranks, as floats; only here is the device waited for."""
        values = (ae.reduce_sum(torch.stack(running).double().cpu(), device) / world).tolist() if running else []
        running.clear()
        return values

    def validate():
        """PQ of sampling the validation subset with the weights in place."""
        with ae.autocast(precision, device):
            return evaluate(model, val_set, lambda images, keys: predict(model, images, keys, args.steps, args.seed), device,
                            min(per_process // args.accum, 32), rank, world, args.num_workers)

    # training: Algorithm 1
    batches = iter(data.training_batches(train_set, start, args.iters, args.batch_size, rank, world, args.accum, args.num_workers, device.type == "cuda"))
    progress = tqdm(range(start, args.iters), initial=start, total=args.iters, disable=not is_main(), unit="it", mininterval=1)
    seen, clock, running, result, stop = 0, time.time(), [], None, ae.Stop()
    for it in progress:
        for group in optimizer.param_groups:
            group["lr"] = ae.learning_rate(it, args)
        ae.seed_iteration(args.seed, it, rank)
        for k in range(args.accum):
            images, ids, *classes = (ae.move(t, device) for t in next(batches))
            latent = (len(ids), 4, args.size // autoencoder.factor, args.size // autoencoder.factor)
            eps, j = torch.randn(latent, device=device), torch.randint(0, model.ddim.T, (len(ids),), device=device)
            place = torch.arange(len(ids)) + rank * per_process + k * len(ids)       # in the global batch
            conditioned = ((place + 1) * args.self_cond).floor() > (place * args.self_cond).floor()
            with contextlib.nullcontext() if k == args.accum - 1 or world == 1 else ddp.no_sync(), ae.autocast(precision, device):
                loss = ddp(images, ids, *classes) if args.classes == "only" else ddp(images, ids, eps, j, loss_weights, conditioned, *classes)
            scaler.scale(loss / args.accum).backward()
            running.append(loss.detach())                                  # read late: no waiting for the device here
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(weights, args.clip)
        ae.guarded_step(optimizer, scaler, norm, skipped)
        if average:
            torch._foreach_lerp_(average, [p.data for p in weights], 1 - min(args.ema, (it + 1) / (it + 10)))

        seen += args.batch_size
        if (it + 1) % args.log_every == 0:
            finite = [x for x in losses + drain() if math.isfinite(x)]
            value, rate, left_out = sum(finite) / max(len(finite), 1), seen / (time.time() - clock), ae.check_skipped(skipped, it + 1, out)
            seen, clock, losses = 0, time.time(), []
            progress.set_postfix(loss=f"{value:.4f}", images_s=f"{rate:.0f}")
            if is_main():
                ae.log(out / "log.jsonl", stage="ldm", iteration=it + 1, loss=value, grad_norm=norm.item(),
                       lr=ae.learning_rate(it, args), images_per_second=rate, **{"skipped": left_out} if left_out else {})
        done = it + 1 == args.iters
        if (it + 1) % args.eval_every == 0 or done:
            swap_ema()
            result, rows = validate()
            if is_main():
                ae.log(out / "log.jsonl", stage="ldm", iteration=it + 1, val_steps=args.steps, **{f"val_{k}": v for k, v in percent(result).items()})
                data.picture(out / "ldm.png", rows, COLUMNS)
                if result.get("pq_classes", result["pq"]) > best:
                    best = result.get("pq_classes", result["pq"])
                    ae.save(out / "ldm_best.pt", checkpoint())
            swap_ema()
            model.train()
            clock, seen = time.time(), 0
        stopped = stop()
        if (it + 1) % args.save_every == 0 or done or stopped:
            losses += drain()
            if is_main():
                swap_ema()
                ae.save(out / "ldm.pt", checkpoint())
                swap_ema()
                ae.save(out / "ldm_state.pt", {
                    "kind": "ldm_state", "flags": ae.flags(args), "settings": model.settings, "autoencoder": model.autoencoder.state_dict(),
                    "unet": model.unet.state_dict(), "average": average, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                    "classifier": model.classifier and model.classifier.state_dict(), "iteration": it + 1, "best": best, "losses": losses,
                    "skipped": skipped.tolist()})
        if stopped:
            progress.close()
            stop.leave(out / "ldm_state.pt", it + 1)

    # what came of it
    swap_ema()
    if result is None:
        result, rows = validate()
        if is_main():
            data.picture(out / "ldm.png", rows, COLUMNS)
    if is_main():
        print(f"sampling {len(val_set)} {args.val_split} images with {args.steps} steps: PQ {100 * result['pq']:.1f}  SQ {100 * result['sq']:.1f}  "
              f"RQ {100 * result['rq']:.1f} -> {out / 'ldm.png'}")
        if "classes" in result:
            print(class_table(result))
        if start < args.iters:
            entries = ae.read_log(out / "log.jsonl", "ldm")
            curve = lambda key: zip(*[(e["iteration"], e[key]) for e in entries if key in e])
            data.plot(out / "ldm_loss.png", {"loss": curve("loss")}, "iteration", "loss", log_y=True)
            data.plot(out / "ldm_pq.png", {"validation PQ": curve("val_pq")}, "iteration", "PQ")
            speed = sorted(e["images_per_second"] for e in entries if "images_per_second" in e)
            if speed:
                print(f"training took {1 / speed[len(speed) // 2]:.4f} s per image (median)")
        if args.json:
            data.write_json(args.json, {"images": len(val_set), **percent(result)})
        if args.export:
            ae.save(args.export, checkpoint(torch.float16))
            print(f"wrote {args.export} ({Path(args.export).stat().st_size / 1e6:.1f} MB)")
    data.say_left_out(train_set, lambda value: ae.reduce_sum(value, device))
    stop.leave(out / "ldm_state.pt", args.iters)


if __name__ == "__main__":
    main()

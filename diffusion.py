"""diffusion.py: stage 2, denoise the latent of an id map given the image (paper 3.2, Algorithm 1).

    python diffusion.py                              # the paper's run: COCO, 512 px, one GPU
    torchrun --nproc_per_node=8 diffusion.py         # on eight; --batch_size is the global one
    python diffusion.py --model small --data shapes  # built-in scenes, from scratch, no download
    python diffusion.py --ckpt checkpoints/ldm.pt --distill 1 --iters 5000 --out few    # few passes
    python diffusion.py --ckpt checkpoints/ldm.pt --classes only --out classes          # Table 2

Symbols (paper section 3): x image, y id map, j timestep in 0..T-1, ab_j = alphas_cumprod[j],
    z = scale * E(y)   latent of the id map                   B x 4 x h x w
    image_latent       latent of the image, z_i               B x c x h x w
    self_cond          the previous estimate of z, z^0        B x 4 x h x w
    eps                Gaussian noise; z^j is z noised to timestep j by eq. 3
Needs stage 1 (--ae). Writes to --out: ldm.pt (all that sampling needs), ldm_state.pt (to --resume),
ldm_log.jsonl, ldm.png, ldm_loss.png. What is marked "beyond the paper" is off for --model sd, but for
`connected` on data of instances.
"""

import collections
import contextlib
import hashlib
import itertools
from pathlib import Path

import data  # before torch: it sets what PyTorch reads on loading
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ae
import pq
from ae import plain
from data import BadInput, rank, world

SD_SCALE = 0.18215  # Stable Diffusion's factor on its VAE's latents
CLIP = 1.0  # largest norm of the gradient (authors)

# Settings of --model. sd is the paper's, with the authors' where it is silent; small is ours.
MODELS = {"sd": dict(size=512, iters=50_000, batch_size=256, lr=1e-4, weight_decay=0.05, ema=0.0)}
MODELS["sd"] |= dict(prediction="epsilon", loss_weight="linear", latent_scale=SD_SCALE)
MODELS["sd"] |= dict(self_cond=1.0, steps=50, snap=False)
MODELS["small"] = dict(size=64, iters=12_000, batch_size=32, lr=1e-3, weight_decay=0.01, ema=0.998)
MODELS["small"] |= dict(prediction="v", loss_weight="none", latent_scale=0.0)
MODELS["small"] |= dict(self_cond=0.5, steps=10, snap=True)
COLUMNS = ["image", "argmax", "over threshold", "truth"]  # of the pictures
# What a checkpoint says of how to sample; a missing entry means this.
SAMPLING = dict(distill=0, given=0.0, snap=False, td=0.0, steps=50, renoise=False)
SAMPLING |= dict(postprocess="paper", connected=False)

# ------------------------------------------------------------------------------ the DDIM scheduler


class DDIM:
    """Noise schedule and deterministic sampler (Song et al. 2021; eq. 3 and 5), Stable Diffusion's.

    prediction: what the network's output estimates, "epsilon" (the paper), "sample" (z^0) or "v".
    """

    def __init__(self, prediction="epsilon", T=1000, beta_start=0.00085, beta_end=0.012):
        self.prediction, self.T = prediction, T
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, T) ** 2
        self.alphas_cumprod = (1 - betas).cumprod(0)  # T, float32

    def scales(self, j, z):
        """sqrt(ab_j) and sqrt(1 - ab_j), shaped to multiply z (B x 4 x h x w); j: int or B."""
        self.alphas_cumprod = self.alphas_cumprod.to(z.device)  # once
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
        """The inverse of eq. 3: the estimate of z^0 from z^j and the network's output."""
        a, b = self.scales(j, zj)
        if self.prediction == "sample":
            return output.clone()  # CUDA graphs use the output's memory again
        return a * zj - b * output if self.prediction == "v" else (zj - b * output) / a

    def step(self, zj, z0, j, j_prev, eps=None):
        """eq. 5 with eta = 0: from z^j and an estimate of z^0 to the earlier timestep j_prev; past the
        last one (j_prev < 0) to ab_0, as Stable Diffusion's.

        eps: None is the paper's step, which keeps the noise of z^j. Beyond it: new noise instead.
        """
        if eps is None:
            a, b = self.scales(j, zj)
            eps = (zj - a * z0) / b
        return self.add_noise(z0, eps, max(j_prev, 0))

    def timesteps(self, steps, release=False):
        """`steps` equidistant timesteps down from T-1; release: from where the authors' begin, which
        is lower if `steps` does not divide T. Raises BadInput outside of 1..T."""
        if not 1 <= steps <= self.T:
            raise BadInput(f"--steps {steps}: must be in 1..{self.T}")
        stride = self.T // steps if release else self.T / steps
        return [round((i + 1) * stride) - 1 for i in reversed(range(steps))]

    def loss_weights(self, kind):
        """w_j of eq. 4, T floats. linear: 1, falling to 0 over the lowest quarter of j (the paper);
        snr: min(SNR, 2) / SNR (the authors' release); none: 1."""
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        linear = (torch.arange(1, self.T + 1) / (self.T / 4)).clamp(max=1)
        return {"none": torch.ones(self.T), "linear": linear, "snr": snr.clamp(max=2) / snr}[kind]


# ------------------------------------------------------------------------------------ the networks


class Pixels(nn.Module):
    """Image latent without a network: f x f pixels become 3 f^2 channels (--model small)."""

    def __init__(self, factor):
        super().__init__()
        self.config, self.factor, self.channels = {"factor": factor}, factor, 3 * factor**2

    def forward(self, x):
        """x: B x 3 x H x W in -1..1 -> B x 3 f^2 x H/f x W/f."""
        return F.pixel_unshuffle(x, self.factor)


class SDEncoder(nn.Module):
    """Image latent from Stable Diffusion's VAE: the mode of its Gaussian, times 0.18215.

    config: an AutoencoderKL's; or vae: one with its weights."""

    def __init__(self, scale=SD_SCALE, vae=None, **config):
        from diffusers import AutoencoderKL

        super().__init__()
        vae = vae or AutoencoderKL(**config)
        self.config, self.scale = {**plain(vae.config), "scale": scale}, scale
        self.channels, self.factor = vae.config.latent_channels, 2 ** (
            len(vae.encoder.down_blocks) - 1
        )
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, x):
        """x: B x 3 x H x W in -1..1 -> B x 4 x H/8 x W/8."""
        return self.scale * self.quant_conv(self.encoder(x)).chunk(2, dim=1)[0]


def build_unet(config):
    """Stable Diffusion's UNet class with the cross-attention removed: its branch is skipped."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**config)
    for block in unet.modules():
        if hasattr(block, "attn2"):
            block.attn2 = block.norm2 = None
    return unet


def small_unet_config(in_channels, latent_size, channels=48):
    """The same class with few channels; attention at every resolution of at most 1,024 cells."""
    kinds = ["CrossAttn" * ((latent_size >> i) ** 2 <= 1024) for i in range(3)]
    return dict(
        sample_size=latent_size,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=[channels, 2 * channels, 2 * channels],
        layers_per_block=1,
        attention_head_dim=4,  # four heads: diffusers counts heads here
        cross_attention_dim=8,
        norm_num_groups=16,
        mid_block_type="UNetMidBlock2DCrossAttn",
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
    )


def grow_conv_in(unet, in_channels):
    """Stable Diffusion's UNet with more input channels (4.1): [z: its weights, image and self_cond:
    zeros], without cross-attention."""
    grown = build_unet({**plain(unet.config), "in_channels": in_channels})
    state = {k: v for k, v in unet.state_dict().items() if k in grown.state_dict()}
    weight = torch.zeros_like(grown.conv_in.weight)
    weight[:, : unet.config.in_channels] = state["conv_in.weight"]
    grown.load_state_dict({**state, "conv_in.weight": weight})
    return grown


class LDM(nn.Module):
    """The whole model: `forward` is the training loss (Algorithm 1), `sample` makes masks (2).

    autoencoder: stage 1; image_encoder: Pixels or SDEncoder; both frozen. settings: what a checkpoint
    keeps. classifier: None, or what labels the masks (Table 2)."""

    def __init__(self, autoencoder, image_encoder, unet, settings, classifier=None):
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.image_encoder = image_encoder.eval().requires_grad_(False)
        self.unet, self.classifier, self.settings = unet, classifier, {**SAMPLING, **settings}
        self.settings |= dict(autoencoder=autoencoder.settings, unet=plain(unet.config))
        self.settings["image_encoder"] = image_encoder.config
        self.scale = settings["latent_scale"]
        betas = {k: settings[k] for k in ("beta_start", "beta_end") if k in settings}
        self.ddim = DDIM(settings["prediction"], **betas)

    def encode(self, ids):
        """y (B x H x W ids) -> z (B x 4 x h x w)."""
        return self.scale * self.autoencoder.encode(ids)[0]

    def decode(self, z):
        """z (B x 4 x h x w) -> logits (B x N x 4h x 4w)."""
        return self.autoencoder.decode(z / self.scale)

    def encode_image(self, images):
        """Images (B x 3 x H x W, uint8) -> image_latent (B x c x h x w)."""
        return self.image_encoder(images.float() / 127.5 - 1).float()

    def denoise(self, zj, image_latent, self_cond, j):
        """eps_theta(concat[z^j, image_latent, self_cond], j) -> B x 4 x h x w; j: int or B."""
        x = torch.cat([zj, image_latent, self_cond], 1)
        x = x[:, : self.unet.config.in_channels]  # a model may have no self-conditioning
        j = torch.as_tensor(j, device=zj.device).expand(len(zj))
        return self.unet(x, j, encoder_hidden_states=None).sample.float()

    def begin_training(self, args, source):
        """Take the settings of a training and say which weights it trains."""
        self.settings |= {
            k: getattr(args, k) for k in (*data.STORED, "distill", "given", "self_cond")
        }
        self.settings["connected"] = getattr(source, "background_id", None) is not None
        if args.distill and self.ddim.prediction == "epsilon":  # of pure noise it tells nothing
            self.settings["prediction"] = self.ddim.prediction = "v"
        if args.classes and self.settings.get("categories") != source.categories:
            self.classifier = Classifier(source.categories, args.model, args.sd != "none")
            self.settings["categories"] = source.categories
        self.unet.requires_grad_(args.classes != "only")
        if args.model == "sd":
            self.unet.time_embedding.requires_grad_(False)  # frozen by the authors
            self.unet.enable_gradient_checkpointing()
        if self.classifier:
            self.classifier.requires_grad_(bool(args.classes))

    def train(self, mode=True):
        """Stage 1 and the image encoder stay frozen."""
        super().train(mode)
        self.autoencoder.eval()
        self.image_encoder.eval()
        return self

    def forward(self, batch, eps, j, loss_weights, conditioned, classes=None):
        """Algorithm 1: the loss of eq. 4, the mean over all cells.

        batch: ids (B x H x W), image (B x 3 x H x W, uint8), given (partial ids); eps: B x 4 x h x w;
        j: B timesteps; loss_weights: T; conditioned: B, bool, which samples get the estimate of a
        first pass (the authors: all; Analog Bits: half); classes: "with" or "only" the classifier.
        """
        if classes == "only":
            return self.classifier(batch)
        with torch.no_grad():
            z = self.encode(batch["ids"])  # encode the target: B x 4 x h x w
            image_latent = self.encode_image(batch["image"])  # encode the image: B x c x h x w
            zj = self.ddim.add_noise(z, eps, j)  # eq. 3
            if self.settings["distill"]:  # beyond the paper: as sampling begins
                zj = torch.where((j == self.ddim.T - 1)[:, None, None, None], eps, zj)
            self_cond = self.first_estimate(zj, image_latent, j, batch["given"], conditioned)
        torch.clear_autocast_cache()  # or weights that were cast without gradient would be used again
        output = self.denoise(zj, image_latent, self_cond, j)
        error = (output - self.ddim.target(z, eps, j)).square()  # B x 4 x h x w
        valid = F.interpolate(batch["ids"][:, None].float(), size=z.shape[2:]) > 0  # B x 1 x h x w
        loss = (loss_weights[j].view(-1, 1, 1, 1) * error * valid).mean()
        return loss + self.classifier(batch) if classes else loss

    def first_estimate(self, zj, image_latent, j, given, conditioned):
        """Self-conditioning: z^0 from a first pass for the samples that are `conditioned`, else 0.

        Beyond the paper: where a cell has a given pixel, its known latent; snap as in `sample`."""
        known, cells = self.known(given)
        self_cond, i = cells * known, conditioned.nonzero()[:, 0]
        if len(i):
            output = self.denoise(zj[i], image_latent[i], self_cond[i], j[i])
            z0 = self.ddim.remove_noise(zj[i], output, j[i])
            if self.settings["snap"]:
                z0 = self.encode(self.likeliest(z0, given[i]))
            self_cond[i] = torch.where(cells[i], known[i], z0)
        return self_cond

    @torch.no_grad()
    def sample(self, image_latent, noise, steps, fresh=None, trace=None):
        """Algorithm 2: DDIM from pure noise (B x 4 x h x w) to the latent of a segmentation.

        fresh: None is Algorithm 2; beyond it, a function of j that gives new noise for each step.
        trace: a list that receives the estimate of z^0 after each step."""
        z, self_cond = noise, torch.zeros_like(noise)
        for j, j_prev in self.schedule(steps):
            output = self.denoise(z, image_latent, self_cond, j)
            z0 = self.ddim.remove_noise(z, output, j)
            if self.settings["snap"] and j_prev >= 0:  # beyond the paper
                z0 = self.encode(self.likeliest(z0))
            z = self.ddim.step(z, z0, j, j_prev, fresh and fresh(j))  # eq. 5
            self_cond = z0
            if trace is not None:
                trace.append(z0)
        return z0

    def schedule(self, steps):
        """Pairs of a timestep and the next, the last -1. Beyond the paper, td > 0 steps on by so many
        intervals more (Pix2Seq-D's asymmetric time intervals)."""
        timesteps = self.ddim.timesteps(steps, self.settings["postprocess"] == "release")
        further = int(self.settings["td"] * self.ddim.T / steps)
        ends = [max(j - further, 0) for j in timesteps[1:]] + [-1]
        return list(zip(timesteps, ends))

    def likeliest(self, z0, given=None):
        """Latent (B x 4 x h x w) -> the likeliest id of each pixel (B x S x S), the given ones kept."""
        size = [self.autoencoder.factor * n for n in z0.shape[2:]]
        logits = F.interpolate(self.decode(z0), size, mode="bilinear", align_corners=False)
        ids = logits.argmax(1)
        return ids if given is None else torch.where(given > 0, given.long(), ids)

    def known(self, given):
        """Partial ids (B x S x S, 0 = unknown) -> their latent (B x 4 x h x w), and which cells of it
        to tell the network (B x 1 x h x w, bool): those of a given pixel, if it learnt that."""
        told = (given > 0) & bool(self.settings["given"])
        cells = F.max_pool2d(told.float()[:, None], self.autoencoder.factor) > 0
        return self.encode(given), cells


# ------------------------------------------- beyond the paper: one pass, by ids that the noise chooses


def rename(ids, other, reserved=()):
    """Segments of an id map (H x W) get the id of another that they overlap most (0 = none), one to
    one, largest overlap first; the rest keep their ids, or get unused ones, none of `reserved`."""
    of_ids, of_other, pixels = pq.overlaps(ids, other)
    name, taken = {0: 0}, {0}
    for k in np.argsort(-pixels, kind="stable"):
        i, new = int(of_ids[k]), int(of_other[k])
        if i not in name and new not in taken:
            name[i] = new
            taken.add(new)
    taken |= set(reserved)
    for i in sorted(set(of_ids.tolist()) - name.keys()):
        name[i] = i if i not in taken else next(n for n in itertools.count(1) if n not in taken)
        taken.add(name[i])
    return np.array([name.get(i, 0) for i in range(int(ids.max()) + 1)])[ids]


@torch.no_grad()
def noise_chooses(model, batch, eps, passes):
    """`--distill`: rename the ids of a batch, and what is given of them, after what the model makes of
    this noise (B x 4 x h x w).

    From pure noise the best estimate of z^0 is a mean over all numberings of the segments, for ids
    are random: one pass shows a blur. So let the noise choose: each true segment gets the id that it
    has in the model's own sample from eps, one to one, by overlap."""
    image_latent = model.encode_image(batch["image"])
    found = model.likeliest(model.sample(image_latent, eps, passes))
    pairs = zip(batch["ids"].cpu().numpy(), found.cpu().numpy())
    ids = np.stack([rename(truth, other) for truth, other in pairs])
    batch["ids"] = torch.from_numpy(ids).to(eps.device)
    batch["given"] = torch.where(batch["given"] > 0, batch["ids"], 0)


# --------------------------------------------------------------- a classifier of the masks (Table 2)


def segment_means(x, ids, count):
    """Means of x (B x C x h x w) over the pixels of each id 0..count-1 of ids (B x H x W) -> B x count
    x C, 0 where an id is absent. Counts the pixels of each pair of id and cell that occurs."""
    (b, c, h, w), (_, height, width) = x.shape, ids.shape
    rows = (torch.arange(height, device=x.device) + 0.5) * h / height
    cols = (torch.arange(width, device=x.device) + 0.5) * w / width
    image = torch.arange(b, device=x.device)[:, None, None]
    cell = (image * h + rows.long()[:, None]) * w + cols.long()  # B x H x W
    pairs, pixels = torch.unique((image * count + ids) * (b * h * w) + cell, return_counts=True)
    segment, cell = pairs // (b * h * w), pairs % (b * h * w)
    values = x.float().permute(0, 2, 3, 1).reshape(-1, c)[cell] * pixels[:, None]
    sums = torch.zeros(b * count, c, device=x.device).index_add_(0, segment, values)
    area = torch.zeros(b * count, device=x.device).index_add_(0, segment, pixels.float())
    return (sums / area.clamp(min=1)[:, None]).view(b, count, c)


class Classifier(nn.Module):
    """Labels proposals (4.2, Table 2): DeepLabv3's head gives class logits of the image, their mean
    over a proposal labels it. `forward` is the training loss.

    categories: list of {id, name, isthing}; model: "sd" has a ResNet-50, "small" four layers."""

    def __init__(self, categories, model, pretrained=False):
        super().__init__()
        import torchvision
        from torchvision.models.segmentation.deeplabv3 import ASPP

        self.categories = categories
        if model == "sd":
            weights, dilate = "DEFAULT" if pretrained else None, [False, True, True]
            net = torchvision.models.resnet50(weights=weights, replace_stride_with_dilation=dilate)
            layers = list(net.named_children())[:-2]  # without pooling and fc
            self.backbone = nn.Sequential(collections.OrderedDict(layers))
            channels, width, rates = 2048, 256, (12, 24, 36)
        else:
            layers, channels, width, rates = [], 64, 64, (2, 4, 6)
            for c, d, stride in ((3, 32, 2), (32, 64, 2), (64, 64, 1), (64, 64, 1)):
                layers += [nn.Conv2d(c, d, 3, stride, 1, bias=False), nn.BatchNorm2d(d), nn.ReLU()]
            self.backbone = nn.Sequential(*layers)
        mix = [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        last = nn.Conv2d(width, len(categories), 1)
        self.head = nn.Sequential(ASPP(channels, rates, width), *mix, last)

    def logits(self, images):
        """Images (B x 3 x H x W, uint8) -> class logits (B x C x H/8 x W/8; small: H/4 x W/4)."""
        from torchvision.transforms.functional import normalize

        x = normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        return self.head(self.backbone(x))

    def forward(self, batch):
        """Cross-entropy of the segments' mean logits: mean over an image's segments, then images."""
        classes = batch["classes"]  # B x N, the class of each id, -1 = none
        means = segment_means(self.logits(batch["image"]), batch["ids"].long(), classes.shape[1])
        loss = F.cross_entropy(means.mT, classes, ignore_index=-1, reduction="none")  # B x N
        return (loss.sum(1) / (classes >= 0).sum(1).clamp(min=1)).mean()

    @torch.no_grad()
    def label(self, logits, ids, merge=True):
        """Class logits (C x h x w) and ids (H x W) of an image -> ids, segments_info with categories
        and scores. merge: proposals of one stuff category become one segment, as COCO has it."""
        known, place = np.unique(ids, return_inverse=True)
        place = place.reshape(ids.shape)
        means = segment_means(
            logits[None], torch.from_numpy(place[None]).to(logits.device), len(known)
        )
        score, best = (t.cpu().numpy() for t in means[0].softmax(1).max(1))
        first = {}
        for k, i in enumerate(known.tolist()):
            if merge and i and not self.categories[best[k]]["isthing"]:
                known[k] = first.setdefault(best[k], i)
        ids, label = known[place], dict(zip(known.tolist(), zip(best, score)))
        segments = data.describe(ids)
        for s in segments:
            best_of, score_of = label[s["id"]]
            s["category_id"] = self.categories[best_of]["id"]
            s["score"] = round(float(score_of), 4)
        return ids, segments


# ----------------------------------------------------------------------------------- checkpoints

# Settings of the authors' files that change what the network computes, and what is supported here.
RELEASE = dict(beta_schedule="scaled_linear", num_train_timesteps=1000, clip_sample=False)
RELEASE |= dict(thresholding=False, set_alpha_to_one=False, act_fn="none", clamp_output=False)
RELEASE |= dict(num_upscalers=2, num_mid_blocks=0, parametrization="gaussian", fuse_rgb=False)
RELEASE |= dict(resize_input=False, skip_encoder=False, shared_vae_encoder=False)
RELEASE |= dict(separate_conv=False, separate_encoder=False, add_adaptor=False, fill_value=0.5)
RELEASE |= dict(image_descriptors="remove", backbone="unet", encoding_mode="bits")


def from_release(content, path):
    """The authors' diffusion checkpoint as an LDM: Stable Diffusion's classes, as wide as the tensors
    tell; its settings are honoured or refused by name. Raises BadInput."""
    told, nested = {}, [content.get("p") or {}]
    for part in nested:  # the nested settings as one dict
        told |= part
        nested += [v for v in part.values() if isinstance(v, dict)]
    predictions = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v"}
    prediction = predictions.get(told.get("prediction_type", "epsilon"))
    for key, supported in [*RELEASE.items(), ("prediction_type", list(predictions))]:
        value = told.get(key, supported)
        if value != supported and not (key == "prediction_type" and prediction):
            raise BadInput(f"{path}: its setting {key} is {value!r}; {supported!r} works here")
    parts = {"autoencoder": "vae_semseg", "image_encoder": "vae_image", "unet": "unet"}
    for part, name in parts.items():
        parts[part] = {k.removeprefix("module."): v for k, v in content[name].items()}
    unet, image = parts["unet"], parts["image_encoder"]
    if any(".attn2." in k for k in unet):
        raise BadInput(f"{path}: its UNet kept its cross-attention; only one without works here")
    for name in ("new_conv.weight", "new_conv.bias"):  # conv_in's once more
        unet.pop(name, None)
    sizes = []
    for side, weights in (("", unet), ("encoder.", image)):
        first = [f"{side}down_blocks.{i}.resnets.0.conv1.weight" for i in range(4)]
        layers = sum(f"{side}down_blocks.0.resnets.{i}.conv1.weight" in weights for i in range(9))
        widths = [len(weights[name]) for name in first]
        sizes.append(dict(block_out_channels=widths, layers_per_block=layers))
    config, vae = dict(sample_size=64, **sizes[0]), ae.vae_config(**sizes[1])
    config["in_channels"] = unet["conv_in.weight"].shape[1]
    settings = dict(model="sd", data="data/coco", train_split="train2017", val_split="val2017")
    settings |= dict(background="segment", seed=0, crop=0, postprocess="release")
    settings |= dict(size=told.get("size", 512), self_cond=float(config["in_channels"] == 12))
    settings |= dict(latent_scale=told.get("scaling_factor", SD_SCALE), prediction=prediction)
    settings |= {k: told[k] for k in ("beta_start", "beta_end") if k in told}
    encoder = SDEncoder(told.get("image_scaling_factor", SD_SCALE), **vae)
    stage1 = ae.build(ae.release_settings(parts["autoencoder"]))
    model = LDM(stage1, encoder, build_unet(config), settings)
    # up to diffusers 0.16, which the release was made with, attention in a VAE had other names
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    kept = {k: v for k, v in image.items() if k.startswith(("encoder.", "quant_conv."))}
    parts["image_encoder"] = {
        ".".join(names.get(p, p) for p in k.split(".")): kept[k] for k in kept
    }
    weights = {f"{part}.{k}": v for part, tensors in parts.items() for k, v in tensors.items()}
    return ae.fill(model, weights, path)


def load_ldm(path):
    """Checkpoint of stage 2, ours or the authors' -> LDM in eval mode on the CPU. Nothing in it is
    executed, nothing is downloaded. Raises BadInput."""
    content = data.load(path, "ldm", "release_ldm")
    with data.reading(path, "checkpoint"):
        if content["kind"] == "release_ldm":
            return from_release(content, path)
        s = content["settings"]
        [s[k] for k in (*data.STORED, "self_cond")]  # all are there, or it is none of ours
        kind = Pixels if s["image_encoder"].keys() == {"factor"} else SDEncoder
        classifier = Classifier(s["categories"], s["model"]) if "categories" in s else None
        parts = ae.build(s["autoencoder"]), kind(**s["image_encoder"]), build_unet(s["unet"])
        return ae.fill(LDM(*parts, s, classifier), content["weights"], path)


def checkpoint(model, dtype=torch.float32):
    """What a checkpoint of stage 2 holds; dtype: torch.float16 makes it half as large."""
    types = {torch.float32: dtype}
    weights = {k: v.to("cpu", types.get(v.dtype)) for k, v in model.state_dict().items()}
    return {"kind": "ldm", "settings": model.settings, "weights": weights}


# ------------------------------------------------------------------------- sampling and evaluation


def network_input(model, images):
    """List of H x W x 3 uint8 arrays of any sizes -> B x 3 x S x S, uint8, on the model's device."""
    squares = [data.resize_image(i, model.settings["size"]).transpose(2, 0, 1) for i in images]
    return torch.from_numpy(np.stack(squares)).to(next(model.parameters()).device)


def image_noise(seed, keys, shape, device):
    """Noise that belongs to (seed, image), whatever batch it comes in: len(keys) x shape."""
    draws = []
    for key in keys:
        digest = hashlib.sha256(f"{seed}/{key}".encode(errors="surrogateescape")).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        draws.append(torch.randn(shape, generator=generator))
    return torch.stack(draws).to(device)


def noises(model, image_latent, keys, seed):
    """The noise that sampling begins with, and with `renoise` a function of j that draws it anew."""
    place = (4, *image_latent.shape[2:]), image_latent.device

    def fresh(j):
        """New noise for a step."""
        return image_noise(seed, [f"{key} at {j}" for key in keys], *place)

    return image_noise(seed, keys, *place), fresh if model.settings["renoise"] else None


def segments(model, logits, height, width):
    """Logits (N x h x w) of an image -> ids (height x width, int32, 0 = void) and their certainty,
    before the threshold and the least area.

    The authors' evaluation goes through the training size, and voids segments that hold less than
    half of the pixels where their own sigmoid is over 0.5."""
    release, size = model.settings["postprocess"] == "release", model.settings["size"]
    through = (size, size) if release else None
    ids, certainty, confident = ae.argmax(logits, height, width, through)
    if release:
        sure = np.bincount(np.where(certainty >= 0.5, ids, 0).ravel(), minlength=len(confident))
        ids = np.where((2 * sure < confident)[ids], 0, ids).astype(np.int32)
    return (ae.connected(ids) if model.settings["connected"] else ids), certainty


@torch.no_grad()
def predict(model, images, keys, steps, seed=0):
    """Algorithm 2 on a list of images (H x W x 3, uint8): of each its ids and their certainty.

    keys: what the noise of each belongs to, with the seed: the same mask in any batch."""
    image_latent = model.encode_image(network_input(model, images))  # B x c x h x w
    noise, fresh = noises(model, image_latent, keys, seed)
    logits = model.decode(model.sample(image_latent, noise, steps, fresh))  # B x N x 4h x 4w
    return [segments(model, l, *image.shape[:2]) for l, image in zip(logits, images)]


@torch.no_grad()
def class_logits(model, images):
    """The classifier's logits (C x h x w) of each image, seen at the size or scale of training."""
    size, crop = model.settings["size"], model.settings["crop"]
    if not crop:
        return model.classifier.logits(network_input(model, images))
    found = []
    for image in images:
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        sides = [max(8, round(n * size / crop)) for n in image.shape[:2]]
        x = F.interpolate(x, sides, mode="bilinear", antialias=True)
        found.append(model.classifier.logits(x.to(next(model.parameters()).device))[0])
    return found


def evaluate(model, dataset, find, args):
    """`ae.evaluate` of what `find` (lists of images and keys -> ids and certainty of each) gives.

    With a classifier also PQ over its categories (pq_classes, pq_things, pq_stuff) and the share of
    the matched segments that are labelled rightly (label_accuracy)."""
    known = model.classifier.categories if model.classifier else []
    labels = bool(known) and all(c in known for c in dataset.source.categories)
    panoptic, proposals, any_class = (pq.PanopticQuality(c) for c in (known, known, None))

    def predict_batch(samples):
        """Segments of one batch, and pictures: argmax, over threshold, truth."""
        images = [sample["image"] for sample in samples]
        logits = class_logits(model, images) if labels else [None] * len(images)
        maps = find(images, [sample["image_id"] for sample in samples])
        for sample, image, logit, (raw, certainty) in zip(samples, images, logits, maps):
            found = keep(model, image, raw, certainty)
            if labels:
                truth = sample["ids"], sample["segments_info"]
                panoptic.update(*truth, *model.classifier.label(logit, found))
                proposals.update(*truth, *model.classifier.label(logit, found, merge=False))
                any_class.update(*truth, found, data.describe(found))
            yield found, [data.overlay(image, ids) for ids in (raw, found, sample["ids"])]

    model.eval()
    score, rows = ae.evaluate(dataset, predict_batch, args.batch_size)
    if labels:
        for quality in (panoptic, proposals, any_class):
            quality.state = data.reduce_sum(quality.state)
        groups, matches = panoptic.result(), any_class.state[:, 1].sum()
        names = {"pq_classes": "All", "pq_things": "Things", "pq_stuff": "Stuff"}
        score |= {name: groups[group]["pq"] for name, group in names.items()}
        score["label_accuracy"] = proposals.state[:, 1].sum() / max(matches, 1)
    return score, rows


def keep(model, image, ids, certainty, threshold=0.5):
    """`ae.keep` what was found in an image: segments of at least `--min_area`, else `ae.least_area` of
    the image, or of the tiles that it is seen in."""
    side, area = model.settings["crop"], model.settings.get("min_area")
    if area is None:
        area = ae.least_area(*([side, side] if side else image.shape[:2]))
    return ae.keep(ids, certainty, area, threshold)


# --------------------------------------------------------------------------------------- training


def new_model(args, train_set, autoencoder):
    """The model that a training starts from. Raises BadInput."""
    sd, factor = args.model == "sd", autoencoder.factor
    image_encoder = SDEncoder(vae=ae.load_sd(args.sd, "vae")) if sd else Pixels(factor)
    if image_encoder.factor != factor:
        told = f"shrinks by {factor}: train one with --factor {image_encoder.factor}"
        raise BadInput(f"--ae: the autoencoder {told}")
    channels = 4 + image_encoder.channels + 4 * bool(args.self_cond)
    small = small_unet_config(channels, args.size // factor)
    unet = grow_conv_in(ae.load_sd(args.sd, "unet"), channels) if sd else build_unet(small)
    scale = args.latent_scale
    if not scale:  # half of unit variance
        maps = torch.from_numpy(np.stack([train_set[n]["ids"] for n in range(256)]))
        with torch.no_grad():
            z = torch.cat([autoencoder.encode(m)[0] for m in maps.split(16)])
        scale = 0.5 / z.std().item()
    settings = {k: getattr(args, k) for k in ("prediction", "self_cond", "snap", "steps")}
    return LDM(autoencoder, image_encoder, unet, {**settings, "latent_scale": scale})


def flags():
    """The command line."""
    parser = data.training_parser(__doc__)
    add = parser.add_argument
    add("--ae", help="checkpoint of stage 1 (default: ae.pt in --out)")
    add("--loss_weight", choices=["linear", "snr", "none"], help="w_j of eq. 4")
    add("--latent_scale", type=data.amount, help="factor on z; 0: half of unit variance, measured")
    add("--self_cond", type=data.fraction, help="share of samples with self-conditioning")
    add("--micro_batch", type=data.positive, default=32, help="images at a time on each device")
    add("--classes", choices=["with", "only"], help="also train Table 2's classifier, or only it")
    add("--given", type=data.fraction, default=0.0, help="share of samples with a partial map")
    add(
        "--distill",
        type=data.natural,
        default=0,
        help="let the noise choose ids, by so many passes",
    )
    add("--augment", type=data.fraction, help="turn by quarters, jitter brightness and contrast")
    parser.set_defaults(schedule="cosine")
    return parser


def start_model(args, train_source):
    """The model that a training goes on with, of --resume's run, of --ckpt or new, and its stream of
    training samples. Raises BadInput."""
    first = None
    if args.resume or args.ckpt:
        first = load_ldm(Path(args.out) / "ldm.pt" if args.resume else args.ckpt)
    autoencoder = (
        first.autoencoder if first else ae.load_autoencoder(args.ae or Path(args.out) / "ae.pt")
    )
    if args.size % (4 * autoencoder.factor):
        raise BadInput(f"--size {args.size}: must be a multiple of {4 * autoencoder.factor}")
    more = {"turns": args.augment is not None, "jitter": args.augment or 0.0, "given": args.given}
    train_set = data.Training(
        train_source, args.size, autoencoder.num_ids, args.seed, crop=args.crop, **more
    )
    model = first or new_model(args, train_set, autoencoder)
    model.begin_training(args, train_source)
    return model.train(), train_set


def decay_groups(model):
    """The trained parameters for AdamW: norm layers do not decay (authors)."""
    kinds = (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d)
    norms = {id(p) for m in model.modules() if isinstance(m, kinds) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if (id(p) in norms) == norm]} for norm in (False, True)
    ]
    groups[1]["weight_decay"] = 0.0
    return groups


def validate(model, dataset, args, device):
    """`evaluate` a held-out set by sampling with the model's usual number of steps."""

    def find(images, keys):
        """Segments of one batch."""
        return predict(model, images, keys, model.settings["steps"], args.seed)

    with data.autocast(args, device):
        found = evaluate(model, dataset, find, args)
    model.train()
    return found


@data.command
def main(argv=None):
    """Command line: train and evaluate stage 2."""
    args = data.parse(flags(), MODELS, argv, "ldm")
    device, out, log = data.setup(args), Path(args.out), Path(args.out, "ldm_log.jsonl")
    pieces = -(-args.batch_size // (world() * args.micro_batch))
    if args.batch_size % (world() * pieces):
        told = f"must be a multiple of {world()} processes x {pieces} pieces (--micro_batch)"
        raise BadInput(f"--batch_size {args.batch_size}: {told}")

    # data, model, optimiser
    train_source, val_source = data.open_splits(args)
    model, train_set = start_model(args, train_source)
    val_set = ae.HeldOut(val_source, args.eval_images, args.crop)
    model = model.to(device, memory_format=torch.channels_last)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True) if world() > 1 else model
    mixed = data.autocast(args, device)
    optimizer = data.Optimizer(decay_groups(model), args, device, CLIP)
    loss_weights = model.ddim.loss_weights(args.loss_weight).to(device)  # T
    start = data.restore(out / "ldm_state.pt", model, optimizer) if args.resume else 0
    millions = sum(p.numel() for p in model.unet.parameters()) / 1e6
    told = f"UNet {millions:.2f} M parameters, latent scale {model.scale:.4f}"
    data.say_once(f"stage 2: {told}, {device}, {args.precision}")
    if args.iters and not start:
        data.log(log, 0)

    # training: Algorithm 1
    its, result, bar = range(start, args.iters), None, data.progress(args, start)
    stream = data.training_batches(train_set, its, args.batch_size, pieces, args.num_workers)
    side, T, batches = args.size // model.autoencoder.factor, model.ddim.T, iter(stream)
    for it in its:
        data.seed_iteration(args.seed, it)
        loss = torch.zeros(1, device=device)
        for piece in range(pieces):
            batch = data.to_device(next(batches), device)
            b = len(batch["ids"])
            eps = torch.randn(b, 4, side, side, device=device)  # B x 4 x h x w
            j = torch.randint(0, T, (b,), device=device)  # B timesteps
            conditioned = torch.rand(b, device=device) < args.self_cond
            if (
                args.distill and not args.classes
            ):  # beyond the paper: a quarter is learnt where sampling begins
                j[torch.rand(b, device=device) < 0.25] = T - 1
                conditioned &= j < T - 1
                with mixed, optimizer.averaged():
                    noise_chooses(model, batch, eps, args.distill)
            waits = (
                ddp.no_sync() if world() > 1 and piece + 1 < pieces else contextlib.nullcontext()
            )
            with waits:  # ranks share the gradient of the whole batch
                with mixed:
                    part = ddp(batch, eps, j, loss_weights, conditioned, args.classes) / pieces
                optimizer.backward(part)
            loss += part.detach()
        norm = optimizer.step(it)

        # once in a while: log, evaluate, save
        bar.update(args.batch_size)
        last = it + 1 == args.iters
        if (it + 1) % data.LOG_EVERY == 0 or last:
            loss = data.mean_over_ranks(loss).item()
            bar.set_postfix(loss=f"{loss:.4f}")
            data.log(log, it + 1, loss=loss, grad_norm=norm, lr=optimizer.learning_rate(it))
        if (it + 1) % args.save_every == 0 or last:
            with optimizer.averaged():
                result, rows = validate(model, val_set, args, device)
                content = checkpoint(model)
            data.log(log, it + 1, val_pq=result["pq"])
            data.save_run(out, content, args, it + 1, model, optimizer)

    # what came of it
    if result is None:
        with optimizer.averaged():
            result, rows = validate(model, val_set, args, device)
    if rank() == 0:
        figures, steps = pq.percent(result), model.settings["steps"]
        print(f"{len(val_set)} {args.val_split} images, {steps} steps -> {out / 'ldm.png'}")
        print(pq.line(figures) + "\n" + pq.line(figures.values()))
        data.picture(out / "ldm.png", data.sheet(rows, COLUMNS))
        if its:
            data.plot_log(out / "ldm_loss.png", log, "loss")
        if args.json:
            data.write_json(args.json, {"images": len(val_set), **figures})
    data.leave()


if __name__ == "__main__":
    main()

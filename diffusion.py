"""diffusion.py: stage 2, denoise the latent of an id map given the image (paper 3.2, Algorithm 1).

    python diffusion.py                              # the paper's run: COCO, 512 px, one GPU
    torchrun --nproc_per_node=8 diffusion.py         # on eight; --batch_size is the global one
    python diffusion.py --model small --data shapes  # built-in scenes, from scratch, no download
    python diffusion.py --ckpt checkpoints/ldm.pt --distill 1 --iters 5000 --out few    # few passes
    python diffusion.py --ckpt checkpoints/ldm.pt --classes --out classes               # Table 2

Symbols (paper section 3): x image, y id map, j timestep in 0..T-1, ab_j = alphas_cumprod[j],
    z = scale * E(y)   latent of the id map                   B x 4 x h x w
    image_latent       latent of the image, z_i               B x c x h x w
    self_cond          the previous estimate of z, z^0        B x 4 x h x w
    eps                Gaussian noise; z^j is z noised to timestep j by eq. 3
Needs stage 1 (--ae). Writes to --out: ldm.pt (all that sampling needs), ldm_state.pt (to --resume),
ldm_log.jsonl, two pictures. "Beyond the paper" is off without a flag, but for `connected`."""

import fnmatch
import functools
import itertools
import operator
import zlib

import data  # before torch: it sets what PyTorch reads on loading
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

import ae
import pq
from data import BadInput

SD_SCALE = 0.18215  # Stable Diffusion's factor on its VAE's latents

# Settings of --model. sd is the paper's, with the authors' where it is silent; small is ours.
SD = dict(size=512, iters=50_000, batch_size=256, lr=1e-4, weight_decay=0.05, self_cond=1.0)
SD |= dict(prediction="epsilon", loss_weight="linear", latent_scale=SD_SCALE, steps=50)
SMALL = dict(size=64, iters=12_000, batch_size=32, lr=1e-3, weight_decay=0.01, ema=0.998)
SMALL |= dict(prediction="v", loss_weight="none", latent_scale=0.36, self_cond=0.5, steps=10)
MODELS = {"sd": SD, "small": SMALL}
# What a checkpoint's settings say, and what it means if they don't, as the authors' files.
SETTINGS = dict(model="sd", data="data/coco", train_split="train2017", val_split="val2017")
SETTINGS |= dict(size=512, crop=0, seed=0, prediction="epsilon")
SETTINGS |= dict(latent_scale=SD_SCALE, beta_start=0.00085, beta_end=0.012, steps=50)
SETTINGS |= dict(distill=0, given=0.0, postprocess="paper", connected=False, min_area=None)
COLUMNS = ["image", "argmax", "over threshold", "truth"]  # of the pictures


# ------------------------------------------------------------------------------ the DDIM scheduler
class DDIM:
    """Noise schedule and deterministic sampler (Song et al. 2021; eq. 3 and 5), Stable Diffusion's.
    prediction: what the network estimates, "epsilon" (the paper) or, beyond it, "v"; release: the
    authors' timesteps, which begin lower where `steps` does not divide T."""

    def __init__(self, prediction="epsilon", beta_start=0.00085, beta_end=0.012, release=False):
        self.prediction, self.release, self.T = prediction, release, 1000
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, self.T) ** 2
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
        return eps if self.prediction == "epsilon" else a * eps - b * z

    def remove_noise(self, zj, output, j):
        """The inverse of eq. 3: the estimate of z^0 from z^j and the network's output."""
        a, b = self.scales(j, zj)
        return (zj - b * output) / a if self.prediction == "epsilon" else a * zj - b * output

    def step(self, zj, z0, j, j_prev):
        """eq. 5 with eta = 0: from z^j and an estimate of z^0 to the earlier timestep j_prev; past
        the last one (j_prev < 0) to ab_0, as Stable Diffusion's."""
        a, b = self.scales(j, zj)
        eps = (zj - a * z0) / b
        return self.add_noise(z0, eps, max(j_prev, 0))

    def timesteps(self, steps):
        """`steps` timesteps from T-1 down, each with the next or else -1. Raises BadInput."""
        if not 1 <= steps <= self.T:
            raise BadInput(f"--steps {steps}: must be in 1..{self.T}")
        stride = self.T // steps if self.release else self.T / steps
        timesteps = [round((i + 1) * stride) - 1 for i in reversed(range(steps))]
        return list(zip(timesteps, [*timesteps[1:], -1]))

    def loss_weights(self, kind):
        """w_j of eq. 4, T floats. linear: 1, falling to 0 over the lowest quarter of j (the paper);
        snr: min(SNR, 2) / SNR (the authors' release); none: 1."""
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        linear = (torch.arange(1, self.T + 1) / (self.T / 4)).clamp(max=1)
        return {"none": torch.ones(self.T), "linear": linear, "snr": snr.clamp(max=2) / snr}[kind]


# ------------------------------------------------------------------------------------ the networks
class Pixels(nn.PixelUnshuffle):
    """Image latent without a network: B x 3 x H x W in -1..1 -> B x 3 f^2 x H/f x W/f."""

    def __init__(self, factor):
        super().__init__(factor)
        self.config, self.factor, self.channels = {"factor": factor}, factor, 3 * factor**2


class SDEncoder(nn.Module):
    """Image latent by Stable Diffusion's VAE: its mode, times 0.18215. vae, or config of one."""

    def __init__(self, scale=SD_SCALE, vae=None, **config):
        super().__init__()
        vae = vae or AutoencoderKL(**config)
        self.config, self.scale = {**vae.config, "scale": scale}, scale
        self.channels = vae.config.latent_channels
        self.factor = 2 ** (len(vae.encoder.down_blocks) - 1)
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, x):
        """x: B x 3 x H x W in -1..1 -> B x 4 x H/8 x W/8."""
        return self.scale * self.quant_conv(self.encoder(x)).chunk(2, dim=1)[0]


def build_unet(config):
    """Stable Diffusion's UNet class with the cross-attention removed: its branch is skipped."""
    unet = UNet2DConditionModel(**config)
    for block in unet.modules():
        if hasattr(block, "attn2"):
            block.attn2 = block.norm2 = None
    return unet


def small_unet_config(in_channels, latent_size, channels=48):
    """The same class with few channels; attention at every resolution of at most 1,024 cells."""
    kinds = ["CrossAttn" * ((latent_size >> i) ** 2 <= 1024) for i in range(3)]
    config = dict(in_channels=in_channels, layers_per_block=1, norm_num_groups=16)
    config["block_out_channels"] = [channels, 2 * channels, 2 * channels]
    config |= dict(attention_head_dim=4, cross_attention_dim=8)  # diffusers counts heads: four
    config["down_block_types"] = [f"{kind}DownBlock2D" for kind in kinds]
    return config | {"up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)]}


def grow_conv_in(unet, in_channels):
    """Stable Diffusion's UNet: zero weights for image and self_cond, without cross-attention."""
    grown = build_unet({**unet.config, "in_channels": in_channels})
    weights = unet.state_dict()
    zeros = (0, 0, 0, 0, 0, in_channels - 4)  # how many before and after, from the last axis on
    weights["conv_in.weight"] = F.pad(weights["conv_in.weight"], zeros)
    grown.load_state_dict(weights, strict=False)  # for those of cross-attention there is no place
    return grown


class LDM(nn.Module):
    """The whole model: `forward` is the training loss (Algorithm 1), `sample` makes masks (2).
    autoencoder: stage 1; image_encoder: Pixels or SDEncoder; both frozen. settings: what a
    checkpoint keeps. classifier: None, or what labels the masks (Table 2)."""

    def __init__(self, autoencoder, image_encoder, unet, settings, classifier=None):
        super().__init__()
        self.autoencoder = autoencoder.requires_grad_(False)
        self.image_encoder = image_encoder.requires_grad_(False)
        self.unet, self.classifier = unet, classifier
        self.settings = {**SETTINGS, **settings, "image_encoder": image_encoder.config}
        self.settings |= dict(autoencoder=autoencoder.settings, unet=dict(unet.config))
        s = self.settings
        self.scale = s["latent_scale"]
        release = s["postprocess"] == "release"
        self.ddim = DDIM(s["prediction"], s["beta_start"], s["beta_end"], release)

    def encode(self, ids):
        """y (B x H x W ids) -> z (B x 4 x h x w)."""
        return self.scale * self.autoencoder.encode(ids)[0]

    def decode(self, z):
        """z (B x 4 x h x w) -> logits (B x N x 4h x 4w)."""
        return self.autoencoder.decode(z / self.scale)

    def encode_image(self, images):
        """Images (B x 3 x H x W, uint8) -> image_latent (B x c x h x w)."""
        return self.image_encoder(images.float() / 127.5 - 1).float()

    def inputs(self, samples, seed):
        """Samples (dicts of image: H x W x 3, uint8; image_id) -> image_latent (B x c x h x w) and
        noise, two of B x 4 x h x w, which belongs to seed and image_id, in whatever batch."""
        squares = [data.resize_image(s["image"], self.settings["size"]) for s in samples]
        images = torch.from_numpy(np.stack(squares)).to(self.unet.device)  # B x S x S x 3
        image_latent = self.encode_image(images.permute(0, 3, 1, 2))
        draws = []
        for s in samples:
            key = f"{seed}/{s['image_id']}".encode(errors="surrogateescape")
            own = torch.Generator().manual_seed(zlib.crc32(key))
            draws.append(torch.randn(8, *image_latent.shape[2:], generator=own))
        return image_latent, torch.stack(draws).to(images.device).chunk(2, dim=1)

    def denoise(self, zj, image_latent, self_cond, j):
        """eps_theta(concat[z^j, image_latent, self_cond], j) -> B x 4 x h x w; j: int or B."""
        x = torch.cat([zj, image_latent, self_cond], 1)
        x = x[:, : self.unet.config.in_channels]  # a model may have no self-conditioning
        return self.unet(x, j, encoder_hidden_states=None).sample.float()

    def begin_training(self, args, source):
        """Take the settings of a training and say which weights it trains. Raises BadInput."""
        if args.size % (4 * self.autoencoder.factor):
            raise BadInput(f"--size {args.size}: no multiple of {4 * self.autoencoder.factor}")
        own = (*data.STORED, "distill", "given", "self_cond")
        self.settings |= {k: getattr(args, k) for k in own}
        self.settings["connected"] = bool(getattr(source, "background_id", None))
        if args.crop:  # `ae.keep` would count a picture's pixels, not a tile's
            self.settings["min_area"] = round(min(512, args.crop**2 / 512))
        if args.distill and self.ddim.prediction == "epsilon":  # of pure noise it tells nothing
            self.settings["prediction"] = self.ddim.prediction = "v"
        if args.classes and self.settings.get("categories") != source.categories:
            self.classifier = Classifier(source.categories, args.model, args.sd != "none")
            self.settings["categories"] = source.categories
        if args.model == "sd":
            self.unet.time_embedding.requires_grad_(False)  # frozen by the authors
            self.unet.enable_gradient_checkpointing()
        if self.classifier:
            self.classifier.requires_grad_(args.classes)

    def forward(self, batch, eps, j, loss_weights, conditioned):
        """Algorithm 1: the loss of eq. 4, the mean over all cells.
        batch: ids (B x S x S), image (B x 3 x S x S, uint8), given (B x S x S, > 0: id told);
        eps: B x 4 x h x w; j: B timesteps; loss_weights: T; conditioned: B, bool, which samples get
        the estimate of a first pass (the authors: all; Analog Bits: half)."""
        with torch.no_grad():
            z = self.encode(batch["ids"])  # encode the target: B x 4 x h x w
            image_latent = self.encode_image(batch["image"])  # encode the image: B x c x h x w
            zj = self.ddim.add_noise(z, eps, j)  # eq. 3
            if self.settings["distill"]:  # beyond the paper: as sampling begins
                zj = torch.where((j == self.ddim.T - 1)[:, None, None, None], eps, zj)
            given = batch["ids"] * (batch["given"] > 0)
            self_cond = self.first_estimate(zj, image_latent, j, given, conditioned)
        torch.clear_autocast_cache()  # or weights cast without gradient would be used again
        output = self.denoise(zj, image_latent, self_cond, j)
        error = (output - self.ddim.target(z, eps, j)).square()  # B x 4 x h x w
        valid = F.interpolate(batch["ids"][:, None].float(), size=z.shape[2:]) > 0  # B x 1 x h x w
        return (loss_weights[j].view(-1, 1, 1, 1) * error * valid).mean()

    def first_estimate(self, zj, image_latent, j, given, conditioned):
        """Self-conditioning: z^0 from a first pass for the samples that are `conditioned`, else 0.
        Beyond the paper, what is given (B x S x S) stands in it, as `inpaint.complete` does it."""
        known, cells = self.known(given)
        self_cond, i = cells * known, conditioned.nonzero()[:, 0]
        if len(i):
            output = self.denoise(zj[i], image_latent[i], self_cond[i], j[i])
            z0 = self.ddim.remove_noise(zj[i], output, j[i])
            if self.settings["given"]:
                pasted = torch.where(cells[i], known[i], self.encode(self.likeliest(z0, given[i])))
                z0 = torch.where(cells[i].amax((1, 2, 3), keepdim=True), pasted, z0)
            self_cond[i] = z0
        return self_cond

    @torch.no_grad()
    def sample(self, image_latent, noise, steps, trace=None):
        """Algorithm 2: DDIM from pure noise (B x 4 x h x w) to the latent of a segmentation.
        trace: a list that receives the estimate of z^0 after each step."""
        z, self_cond = noise, torch.zeros_like(noise)
        for j, j_prev in self.ddim.timesteps(steps):
            output = self.denoise(z, image_latent, self_cond, j)
            z0 = self.ddim.remove_noise(z, output, j)
            z = self.ddim.step(z, z0, j, j_prev)  # eq. 5
            self_cond = z0
            if trace is not None:
                trace.append(z0)
        return z0

    def likeliest(self, z0, given=None):
        """Latent (B x 4 x h x w) -> the likeliest id of each pixel (B x S x S); given ones stay."""
        ids = F.interpolate(self.decode(z0), self.settings["size"], mode="bilinear").argmax(1)
        return ids if given is None else torch.where(given > 0, given.long(), ids)

    def known(self, given):
        """Partial ids (B x S x S, 0 = unknown) -> their latent (B x 4 x h x w), and which cells of
        it to tell the network (B x 1 x h x w, bool): those of a given pixel, if it learnt that."""
        told = (given > 0) & bool(self.settings["given"])
        cells = F.max_pool2d(told.float()[:, None], self.autoencoder.factor) > 0
        return self.encode(given), cells

    @torch.no_grad()
    def label(self, image, ids, merge=True):
        """Ids (H x W) of an image (H x W x 3, uint8) -> ids, segments_info. With a classifier: the
        category of most of its pixels, their share as score; merge: each stuff is one segment."""
        if self.classifier is None:
            return ids, data.describe(ids)
        size, crop = self.settings["size"], self.settings["crop"]
        # seen at the size, or of crops at the scale, of training
        sides = [max(8, round(n * size / (crop or n))) for n in ids.shape]
        x = torch.tensor(image, device=self.unet.device).permute(2, 0, 1)[None].float()
        x = F.interpolate(x, sides, mode="bilinear", antialias=True)
        classes, _ = ae.argmax(self.classifier.logits(x)[0], *ids.shape)  # H x W
        categories, most, first, segments = self.classifier.categories, {}, {}, []
        for i, k, _ in sorted(zip(*pq.overlaps(ids, classes)), key=operator.itemgetter(2)):
            most[i] = k  # the class with the most pixels comes last
        for i in data.areas(ids):
            if merge and not categories[most[i]]["isthing"]:
                ids = np.where(ids == i, first.setdefault(most[i], i), ids)
        for s in data.describe(ids):
            k = most[s["id"]]
            score = round((classes[ids == s["id"]] == k).mean().item(), 4)
            segments.append(s | {"category_id": categories[k]["id"], "score": score})
        return ids, segments


# --------------------------------------- beyond the paper: one pass, by ids that the noise chooses
def rename(ids, other):
    """Segments of an id map (H x W) get the id of another that they overlap most (0 = none), one to
    one, largest overlap first; the rest keep their ids, or get unused ones."""
    of_ids, of_other, pixels = pq.overlaps(ids, other)
    name = {0: 0}
    for k in np.argsort(-pixels, kind="stable"):
        if of_ids[k] not in name and of_other[k] not in name.values():
            name[of_ids[k]] = of_other[k]
    unused = (n for n in itertools.count() if n not in name.values())
    for i in sorted(set(of_ids) - name.keys()):
        name[i] = next(unused) if i in name.values() else i
    return np.array([name.get(i, 0) for i in range(int(ids.max()) + 1)])[ids]


@torch.no_grad()
def noise_chooses(model, ids, image_latent, noise, passes):
    """`--distill` and completion: rename the ids of maps (B x S x S) after the model's own sample
    from this noise (B x 4 x h x w), one to one, by overlap.
    From pure noise the best estimate of z^0 is a mean over all numberings of the segments, for ids
    are random: one pass shows a blur. So let the noise choose which segment has which id."""
    found = model.likeliest(model.sample(image_latent, noise, passes))
    pairs = zip(ids.cpu().numpy(), found.cpu().numpy())
    return torch.from_numpy(np.stack([rename(*pair) for pair in pairs])).to(noise.device)


# -------------------------------------------------------------- a classifier of the masks (Table 2)
class Classifier(nn.Module):
    """For labels of the masks (4.2, Table 2): DeepLabv3's head on a ResNet-50 (sd) or four layers
    (small). `forward` is the training loss. categories: list of {id, name, isthing}."""

    def __init__(self, categories, model, pretrained=False):
        super().__init__()
        self.categories, count = categories, len(categories)
        models, layer = torchvision.models.segmentation, torchvision.ops.Conv2dNormActivation
        if model == "sd":
            weights = "DEFAULT" if pretrained else None
            net = models.deeplabv3_resnet50(num_classes=count, weights_backbone=weights)
            self.backbone, self.head = nn.Sequential(*net.backbone.children()), net.classifier
        else:  # a layer: convolution, batch norm, ReLU
            layers = [*layer(3, 32, stride=2), *layer(32, 64, stride=2), *layer(64, 64)]
            self.backbone = nn.Sequential(*layers, *layer(64, 64))
            pyramid = models.deeplabv3.ASPP(64, [2, 4, 6], 64)
            self.head = nn.Sequential(pyramid, *layer(64, 64), nn.Conv2d(64, count, 1))

    def logits(self, images):
        """Images (B x 3 x H x W, uint8) -> class logits (B x C x H/8 x W/8; small: H/4 x W/4)."""
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet
        x = torchvision.transforms.functional.normalize(images / 255, mean, std)
        return self.head(self.backbone(x))

    def forward(self, batch, *noise):
        """Cross-entropy of the cells, whose truth is their top left pixel's; noise is not used."""
        logits = self.logits(batch["image"])  # B x C x h x w
        ids = F.interpolate(batch["ids"][:, None].float(), logits.shape[2:])  # B x 1 x h x w
        truth = batch["classes"].gather(1, ids.flatten(1).long())  # B x hw, -1 = none
        total = F.cross_entropy(logits.flatten(2), truth, ignore_index=-1, reduction="sum")
        return total / (truth >= 0).sum().clamp(min=1)


# ----------------------------------------------------------------------------------- checkpoints
# Settings of the authors' files that change what the network computes, and what works here.
OFF = "clip_sample thresholding set_alpha_to_one clamp_output fuse_rgb resize_input skip_encoder"
OFF += " shared_vae_encoder separate_conv separate_encoder add_adaptor"
RELEASE = dict.fromkeys(OFF.split(), False)
RELEASE |= dict(beta_schedule="scaled_linear", num_train_timesteps=1000, parametrization="gaussian")
RELEASE |= dict(prediction_type="epsilon", act_fn="none", num_upscalers=2, fill_value=0.5)
RELEASE |= dict(image_descriptors="remove", encoding_mode="bits", backbone="unet", num_mid_blocks=0)


def from_release(content, path):
    """The authors' diffusion checkpoint as one of ours: Stable Diffusion's classes, as wide as the
    tensors tell; its settings are honoured or refused by name. Raises BadInput."""
    told, nested = {}, [content.get("p") or {}]
    for part in nested:  # the nested settings as one dict
        told |= part
        nested += [v for v in part.values() if isinstance(v, dict)]
    for key, works in RELEASE.items():
        if told.get(key, works) != works:
            raise BadInput(f"{path}: its setting {key} is {told[key]!r}; {works!r} works here")
    names = {"autoencoder": "vae_semseg", "image_encoder": "vae_image", "unet": "unet"}
    # conv_in's once more, and the half of the VAE that makes pictures
    unused = ("unet.new_conv.", "image_encoder.post_quant_conv.")
    # up to diffusers 0.16, which the release was made with, attention in a VAE had other names
    now = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    weights = {}
    for part, name in names.items():
        for key, value in content[name].items():
            words = [now.get(word, word) for word in key.removeprefix("module.").split(".")]
            key = ".".join([part, *words])
            if not key.startswith(unused):
                weights[key] = value
    shapes = []
    for side in ("unet", "image_encoder.encoder"):
        convs = fnmatch.filter(weights, f"{side}.down_blocks.*.resnets.*.conv1.weight")
        layers = len(convs) // 4
        widths = [len(weights[key]) for key in convs[::layers]]  # of its four resolutions
        shapes.append(dict(block_out_channels=widths, layers_per_block=layers))
    unet, vae = shapes
    settings = {"postprocess": "release", "autoencoder": ae.release_shape(content["vae_semseg"])}
    settings["unet"] = unet | {"in_channels": weights["unet.conv_in.weight"].shape[1]}
    settings["latent_scale"] = told.get("scaling_factor", SD_SCALE)
    vae["scale"] = told.get("image_scaling_factor", SD_SCALE)
    settings["image_encoder"] = ae.vae_config(**vae)
    settings |= {k: told[k] for k in ("size", "beta_start", "beta_end") if k in told}
    return {"settings": settings, "weights": weights}


def load_ldm(path, **changes):
    """The LDM of a checkpoint, ours or the authors', some settings changed. Raises BadInput."""
    content = data.load(path, ["ldm", "release_ldm"])
    with data.reading(path, "checkpoint whose weights fit its settings"):
        if content["kind"] == "release_ldm":
            content = from_release(content, path)
        s = content["settings"] | changes
        kind = Pixels if "factor" in s["image_encoder"] else SDEncoder
        classifier = Classifier(s["categories"], s["model"]) if "categories" in s else None
        parts = ae.build(s["autoencoder"]), kind(**s["image_encoder"]), build_unet(s["unet"])
        model = LDM(*parts, s, classifier)
        model.load_state_dict(content["weights"])
        return model.eval()


# ------------------------------------------------------------------------- sampling and evaluation
def segments(model, logits, height, width):
    """Logits (N x h x w) of an image -> ids (height x width, 0 = void) and their certainty. The
    authors' evaluation goes through the training size, and voids segments that hold less than half
    of the pixels where their own sigmoid is over 0.5."""
    if release := model.settings["postprocess"] == "release":
        logits = ae.resize(logits, model.settings["size"], model.settings["size"])
    ids, certainty = ae.argmax(logits, height, width)
    if release:
        confident = [ae.resize(l[None], height, width).ge(0).sum().item() for l in logits]
        sure = np.bincount(np.where(certainty >= 0.5, ids, 0).ravel(), minlength=len(logits))
        ids = np.where((2 * sure < confident)[ids], 0, ids)
    return (ae.connected(ids) if model.settings["connected"] else ids), certainty


@torch.no_grad()
def predict(model, samples, args):
    """Algorithm 2 on samples (see `LDM.inputs`): of each its ids and their certainty."""
    image_latent, (noise, _) = model.inputs(samples, args.seed)
    logits = model.decode(model.sample(image_latent, noise, args.steps))  # B x N x 4h x 4w
    return [segments(model, l, *s["image"].shape[:2]) for l, s in zip(logits, samples)]


def evaluate(model, dataset, find, args):
    """`ae.evaluate` of `find`, called like `predict`; with a classifier also PQ with classes."""
    categories = dataset.source.categories
    labels = model.settings.get("categories") == categories
    panoptic = pq.PanopticQuality(categories)

    def predict_batch(samples):
        """Segments of one batch, and pictures of them."""
        for sample, (raw, certainty) in zip(samples, find(model, samples, args)):
            image = sample["image"]
            found = ae.keep(raw, certainty, model.settings["min_area"])
            if labels:
                panoptic.update(sample["ids"], sample["segments_info"], *model.label(image, found))
            yield found, [data.overlay(image, ids) for ids in (raw, found, sample["ids"])]

    at_once = vars(args).get("micro_batch", args.batch_size)  # in training on each device
    figures, rows = ae.evaluate(dataset, predict_batch, at_once)
    if labels:
        result = panoptic.result()
        groups = {"pq_classes": "All", "pq_things": "Things", "pq_stuff": "Stuff"}
        figures |= pq.percent({name: result[group]["pq"] for name, group in groups.items()})
    return figures, rows


# --------------------------------------------------------------------------------------- training
def new_model(args):
    """The model that a training begins with: of --resume, of --ckpt or new. Raises BadInput."""
    if path := f"{args.out}/ldm.pt" if args.resume else args.ckpt:
        return load_ldm(path)
    autoencoder = ae.load_autoencoder(args.ae or f"{args.out}/ae.pt")
    sd, factor = args.model == "sd", autoencoder.factor
    image_encoder = SDEncoder(vae=ae.load_sd(args.sd, "vae")) if sd else Pixels(factor)
    if image_encoder.factor != factor:
        raise BadInput(f"--ae: its factor is not {image_encoder.factor}: train one with --factor")
    channels = 4 + image_encoder.channels + 4 * bool(args.self_cond)
    small = small_unet_config(channels, args.size // factor)
    unet = grow_conv_in(ae.load_sd(args.sd, "unet"), channels) if sd else build_unet(small)
    settings = {k: getattr(args, k) for k in ("prediction", "latent_scale", "steps")}
    return LDM(autoencoder, image_encoder, unet, settings)


def decay_groups(network):
    """The trained parameters for AdamW: norm layers do not decay (authors)."""
    kinds = (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d)
    decaying, norms = [], []
    for module in network.modules():
        group = norms if isinstance(module, kinds) else decaying
        group += [p for p in module.parameters(recurse=False) if p.requires_grad]
    return [{"params": decaying}, {"params": norms, "weight_decay": 0.0}]


@data.command
def main(argv=None):
    """Command line: train and evaluate stage 2."""
    parser = data.training_parser(__doc__)
    flag = parser.flag
    flag("--ae", str, "checkpoint of stage 1 (default: ae.pt in --out)")
    flag("--loss_weight", ["linear", "snr", "none"], "w_j of eq. 4")
    flag("--latent_scale", data.number(float, 1e-6), "factor on the latents of maps")
    flag("--self_cond", data.fraction, "share of samples with self-conditioning")
    flag("--micro_batch", data.positive, "images at a time on each device", default=32)
    flag("--classes", bool, "train Table 2's classifier, and only that")
    flag("--given", data.fraction, "share of samples with a partial map", default=0.0)
    flag("--distill", data.natural, "passes by which the noise chooses ids", default=0)
    flag("--augment", data.amount, "jitter, random scale, quarter turns", default=0.0)
    parser.set_defaults(schedule="cosine", clip=1.0)  # clip: the authors'
    args = data.parse(parser, MODELS, argv, "ldm")
    device, mixed = data.setup(args)
    # data, model, optimiser
    train_source, val_source = data.open_splits(args)
    model = new_model(args).train()
    model.begin_training(args, train_source)
    model.to(device, memory_format=torch.channels_last)
    more = dict(seed=args.seed, crop=args.crop, augment=args.augment, given=args.given)
    train_set = data.Training(train_source, args.size, model.autoencoder.num_ids, **more)
    val_set = ae.HeldOut(val_source, args.eval_images, args.crop)
    network = model.classifier if args.classes else model  # what is trained
    ddp = nn.parallel.DistributedDataParallel(network) if data.WORLD > 1 else network
    validation = mixed(functools.partial(evaluate, model, val_set, predict, args))
    run = data.Run("ldm", args, model, decay_groups(network), model.settings, validation)
    loss_weights = model.ddim.loss_weights(args.loss_weight).to(device)  # T
    data.say_once(f"stage 2 on {device} in {args.precision}")

    # training: Algorithm 1
    pieces = -(-args.batch_size // (data.WORLD * args.micro_batch))
    side, T = args.size // model.autoencoder.factor, model.ddim.T
    batches = iter(data.training_batches(train_set, run.left, args, pieces))
    for it in run.iterations():
        total = 0
        for batch in itertools.islice(batches, pieces):
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            b = len(batch["ids"])
            eps = torch.randn(b, 4, side, side, device=device)  # B x 4 x h x w
            j = torch.randint(0, T, (b,), device=device)  # B timesteps
            conditioned = torch.rand(b, device=device) < args.self_cond
            if args.distill and not args.classes:  # beyond the paper: a quarter as sampling begins
                j[torch.rand(b, device=device) < 0.25] = T - 1
                conditioned &= j < T - 1
                with mixed, run.averaged():
                    x = model.encode_image(batch["image"])
                    batch["ids"] = noise_chooses(model, batch["ids"], x, eps, args.distill)
            with mixed:
                loss = ddp(batch, eps, j, loss_weights, conditioned) / pieces
            run.scaler.scale(loss).backward()
            total = total + loss.detach()
        run.step(it, total)
    run.finish(COLUMNS)


if __name__ == "__main__":
    main()

"""ae.py: stage 1, a shallow autoencoder of segmentation maps (3.1).

    python ae.py                                     # the paper's run: COCO, 512 px
    torchrun --nproc_per_node=8 ae.py                # the same on eight GPUs
    python ae.py --model small --data shapes         # built-in scenes, on a laptop
    python ae.py --vae sd                            # Stable Diffusion's VAE (Table 1)
    python ae.py --ckpt checkpoints/ae.pt --iters 0  # only evaluate the reconstruction

Symbols (paper, section 3): y id map of side S, N number of ids, n = log2 N bits of an
id, z = E(y) latent of side h = S / f, f resizing factor, D(z) logits. Writes ae.pt,
ae_state.pt (for --resume), ae_log.jsonl, ae.json and ae.png to --out.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import data  # before torch: sets a variable that PyTorch reads on import
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from torch import nn
from torchvision.models.convnext import LayerNorm2d

import pq
from data import BadInput, amount, flag, natural, nonempty, positive, square

conv3 = functools.partial(nn.Conv2d, kernel_size=3, padding=1)


# ----------------------------------------------------------------------------- settings
@dataclass
class Settings(data.Settings):
    """The paper's values; where the paper is silent, those of the authors' release."""

    size: int = flag(512, "side S of the square network input, in pixels", square)
    num_ids: int = flag(
        128, "N, number of ids including 0 (void)", [4, 8, 16, 32, 64, 128, 256]
    )
    encoding: str = flag(
        "bits", "how ids are encoded", ["bits", "rgb", "onehot", "positional"]
    )
    iters: int = flag(60_000, "iterations; 0: only evaluate --ckpt", natural)
    batch_size: int = flag(16, "images per iteration, over all processes", positive)
    lr: float = flag(1e-4, "peak learning rate of AdamW", amount)
    kl: float = flag(0.0, "weight of the KL term (ablation of Fig. 9)", amount)
    vae: str = flag(
        None,
        "Table 1: train Stable Diffusion's VAE in place of the shallow autoencoder: "
        "sd, a hub id, a folder with vae/, or none for an untrained one",
        nonempty,
    )
    factor: int = 8  # f: side of the map / side of the latent
    width: int = 256  # channels at the bottleneck
    weight_decay: float = 0.05  # the penalty on the weights in eq. 2
    schedule: str = "constant"  # learning rate after the warm-up: constant or cosine
    clip: float = 3.0  # the gradient's norm is clipped to this
    points: int = 12_544  # that each loss samples, for an input of 512 x 512
    eval_images: int = 256  # the first of val_split; sample.py evaluates them all

    stage = "ae"
    NETWORK = ("num_ids", "encoding", "factor", "width", "vae")

    def stored(self):
        """The checkpoint to start from and its settings, or (None, {})."""
        if not self.ckpt:
            return None, {}
        network, _ = read_autoencoder(self.ckpt)
        stored = {"vae": None, **data.load(self.ckpt)["settings"], **network}
        if isinstance(stored["vae"], dict):
            stored["vae"] = "none"  # its config is in the checkpoint
        return self.ckpt, stored


# --model small: 64-pixel scenes with up to 15 ids; trains in minutes
SMALL = {
    "size": 64,
    "num_ids": 16,
    "factor": 4,
    "width": 64,
    "iters": 1_500,
    "batch_size": 32,
    "lr": 2e-3,
    "schedule": "cosine",
    "eval_images": 64,
}


# ---------------------------------------------------------------------------- the model
def encode_bits(ids, num_ids):
    """Id map (B x H x W) -> its bits as -1 or +1, bit k in channel k: B x n x H x W."""
    n = num_ids.bit_length() - 1
    k = torch.arange(n, device=ids.device).view(n, 1, 1)
    bits = (ids.long()[:, None] >> k) & 1  # B x n x H x W
    return 2.0 * bits - 1


class Autoencoder(nn.Module):
    """The shallow autoencoder of section 3.1; 2.02 M parameters at the paper's setting.

    num_ids: N, a power of two up to 256; encoding: see `ENCODINGS`; factor: f, 8 or 4;
    width: channels at the bottleneck.
    """

    def __init__(self, num_ids=128, encoding="bits", factor=8, width=256):
        super().__init__()
        self.settings = {
            "num_ids": num_ids,
            "encoding": encoding,
            "factor": factor,
            "width": width,
        }
        self.num_ids = num_ids
        self.encoding = encoding
        self.factor = factor

        # The nn.Identity layers keep the authors' numbering, for their checkpoints.
        c = width // factor  # doubles with each halving of the side, up to `width`
        layers = [conv3(self.input_channels(), c), nn.SiLU()]
        while c < width:  # halve the sides, double the channels
            layers += [conv3(c, c), conv3(c, 2 * c, stride=2), nn.SiLU()]
            c = 2 * c
        layers += [conv3(c, c), nn.Identity(), nn.GroupNorm(32, c, eps=1e-6), nn.SiLU()]
        layers += [conv3(c, 8)]  # mean and log-variance of 4 channels
        self.encoder = nn.Sequential(*layers)

        layers = [conv3(4, c), nn.Identity()]
        for _ in range(2):
            layers += [nn.ConvTranspose2d(c, c, 2, stride=2), LayerNorm2d(c, eps=1e-6)]
            layers += [nn.SiLU()]
        layers += [nn.GroupNorm(32, c, eps=1e-5), nn.SiLU(), conv3(c, num_ids)]
        self.decoder = nn.Sequential(*layers)

    def network_input(self, ids):
        """Ids (B x H x W) -> B x C x H x W in -1..1, with 0 in all channels on void."""
        x = ENCODINGS[self.encoding](ids, self.num_ids)  # B x C x H x W
        return x * (ids != 0)[:, None]

    def input_channels(self):
        """C, the number of channels of the input: n for bits."""
        return self.network_input(torch.zeros(1, 1, 1)).shape[1]

    def encode(self, ids):
        """Ids (B x H x W, 0 = void) -> mean, log-variance of z, each B x 4 x h x w."""
        x = self.network_input(ids)  # B x C x H x W
        mean, logvar = self.encoder(x).float().chunk(2, dim=1)  # B x 4 x H/f x W/f
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """Latent z (B x 4 x h x w) -> logits (B x N x 4h x 4w; SDAutoencoder: fh)."""
        return self.decoder(z)

    def forward(self, ids):
        """One training pass, with a sample of z: logits, mean, log-variance."""
        mean, logvar = self.encode(ids)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)  # B x 4 x h x w
        return self.decode(z), mean, logvar


# -------------------------------------- the losses of eq. 2, on points (PointRend, 3.1)
def sample_at(maps, points, mode="bilinear"):
    """Sample maps (B x C x H x W) at points (B x P x 2, in 0..1) -> B x C x P.

    A point is (x, y). Maps are 0 outside.
    """
    grid = 2 * points[:, None] - 1  # B x 1 x P x 2 in -1..1
    return F.grid_sample(maps.float(), grid, mode, align_corners=False)[:, :, 0]


@torch.no_grad()
def uncertain_points(logits, uncertainty, count):
    """PointRend's points: 75% are the most uncertain of 3 * count, 25% uniform.

    logits: B x C x h x w; uncertainty: a function of logits at points, B x C x P -> B x
    P. Returns B x count x 2 in 0..1. The logits are sampled, not their uncertainty:
    between a cell of logit +1 and one of -1 lies a boundary, where the sampled logit is
    0, but a map of uncertainties is -1 at both cells and does not show it.
    """
    b = len(logits)
    points = torch.rand(b, 3 * count, 2, device=logits.device)
    uncertain = int(0.75 * count)
    uncertainties = uncertainty(sample_at(logits, points))  # B x 3 count
    most = uncertainties.topk(uncertain, dim=1).indices  # B x uncertain
    chosen = points.take_along_dim(most[..., None], dim=1)  # B x uncertain x 2
    uniform = torch.rand(b, count - uncertain, 2, device=logits.device)
    return torch.cat([chosen, uniform], dim=1)


def ce_uncertainty(logits):
    """Second largest minus largest logit (B x N x P -> B x P): 0 is most uncertain."""
    first, second = logits.topk(2, dim=1).values.unbind(1)
    return second - first


def mask_uncertainty(logits):
    """Minus the absolute logit of a mask (K x 1 x P -> K x P): 0 is most uncertain."""
    return -logits[:, 0].abs()


def ce_loss(logits, ids, points):
    """L_ce: cross-entropy with ids (B x H x W) at points (B x P x 2), void ignored.

    Returns the sum over the points that are not void, and how many there are.
    """
    labels = sample_at(ids[:, None], points, "nearest")[:, 0].long()  # B x P
    logits = sample_at(logits, points)  # B x N x P
    loss = F.cross_entropy(logits, labels, ignore_index=0, reduction="sum")
    return loss, (labels > 0).sum()


def present_segments(ids, num_ids):
    """The K segments in id maps (B x H x W): image index and id of each (K and K)."""
    present = ids.new_zeros(len(ids), num_ids)  # B x N
    present.scatter_(1, ids.flatten(1).long(), 1)
    present[:, 0] = 0
    return present.nonzero().unbind(1)


def mask_loss(logits, masks, points):
    """L_mask: BCE + Dice of K segments' logits and masks, at points (K x P x 2).

    logits: K x h x w, for each segment the channel of its id; masks: K x H x W, bool,
    False on void. Returns the sum over segments, and how many there are.
    """
    logits = sample_at(logits[:, None], points)[:, 0]  # K x P
    masks = sample_at(masks[:, None], points)[:, 0]  # K x P
    bce = F.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean(1)
    p = logits.sigmoid()
    dice = 1 - (2 * (p * masks).sum(1) + 1) / (p.sum(1) + masks.sum(1) + 1)
    return (bce + dice).sum(), masks.new_full((), len(masks))


def reconstruction_losses(logits, ids, count):
    """L_ce and L_mask at `count` points, each as (sum, number to divide it by).

    logits: B x N x h x w; ids: B x H x W, 0 = void.
    """
    ce_points = uncertain_points(logits, ce_uncertainty, count)
    index, segment = present_segments(ids, logits.shape[1])  # K, K
    mask_logits = logits[index, segment]  # K x h x w
    masks = ids[index] == segment[:, None, None]  # K x H x W; void is in no mask
    mask_points = uncertain_points(mask_logits[:, None], mask_uncertainty, count)
    return ce_loss(logits, ids, ce_points), mask_loss(mask_logits, masks, mask_points)


def kl_loss(mean, logvar):
    """KL(N(mean, variance) || N(0, I)), summed over z, averaged over the batch."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / len(mean)


# --------------------------------------- from logits to segments (4.1, supplement B)
def resize(logits, height, width):
    """Resize N x h x w bilinearly to N x height x width."""
    return F.interpolate(logits[None].float(), (height, width), mode="bilinear")[0]


@torch.no_grad()
def likeliest(logits, height, width):
    """Logits (N x h x w) -> ids (height x width, int32), their probability; in NumPy.

    Resize, softmax, argmax, for at most 16 ids at a time: all N channels of a
    photograph might not fit into memory. (One resize; the authors go through S x S.)
    """
    best = torch.full((height, width), -math.inf, device=logits.device)
    total = best.clone()  # log of the sum of exp(logits)
    ids = torch.zeros_like(best, dtype=torch.int32)
    count = max(1, min(16, 2**26 // best.numel()))  # 1 for 50 megapixels
    for first in range(0, len(logits), count):
        part = resize(logits[first : first + count], height, width)
        top, place = part.max(0)
        ids = torch.where(top > best, place.int() + first, ids)
        best = top.maximum(best)
        total = total.logaddexp(part.logsumexp(0))
    return ids.cpu().numpy(), (best - total).exp().cpu().numpy()


def paper_min_area(pixels):
    """512 pixels (supplement B); ours: 1/512 of a picture under 512 x 512 pixels."""
    return round(min(512, pixels / 512))


def void_uncertain(ids, probability, min_area=None, threshold=0.5):
    """Uncertain pixels, then small segments of ids (H x W) become void (supplement B).

    min_area: in pixels; None: `paper_min_area`.
    """
    if min_area is None:
        min_area = paper_min_area(ids.size)
    ids = np.where(probability < threshold, 0, ids)
    small = [i for i, pixels in data.areas(ids).items() if pixels < min_area]
    return np.where(np.isin(ids, small), 0, ids)


# --------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(model, held_out, args):
    """PQ, SQ, RQ (percent) of the reconstructions of random ids, and rows to draw."""
    device = next(model.parameters()).device
    model.eval()
    score = pq.Score()
    rows = []
    for samples in held_out.batches(args.batch_size):
        truths = []
        for s in samples:
            rng = data.stream_of(s, args.seed, data.IDS)
            ids, _ = data.relabel(
                s["ids"], s["segments_info"], num_ids=model.num_ids, rng=rng
            )
            truths.append(ids)
        y = np.stack([data.resize_ids(ids, args.size, args.size) for ids in truths])
        y = torch.from_numpy(y).to(device)  # B x S x S
        mean, _ = model.encode(y)
        for s, truth, logits in zip(samples, truths, model.decode(mean)):
            found = void_uncertain(*likeliest(logits, *truth.shape))
            score.update(s, found)
            if len(rows) < data.PICTURES:
                pictures = [data.colorize(truth), data.colorize(found)]
                rows.append((s["file_name"], pictures))
    model.train()
    return {"images": len(held_out), **score.result()}, rows


# ----------------------------------------------------------------------------- training
def new_model(args):
    """The autoencoder of --ckpt or --vae, or else an untrained shallow one."""
    if args.ckpt:
        model = load_autoencoder(args.ckpt)
    elif args.vae:
        vae = load_sd(args.vae, AutoencoderKL, "vae")
        model = SDAutoencoder(vae, num_ids=args.num_ids, encoding=args.encoding)
    else:
        model = Autoencoder(
            args.num_ids, args.encoding, factor=args.factor, width=args.width
        )
    if args.size % (2 * model.factor) != 0:
        raise BadInput(f"--size {args.size}: must be a multiple of {2 * model.factor}")
    return model


@data.command
def main(argv=None):
    """Command line: train and evaluate stage 1."""
    args = data.configure(Settings, SMALL, __doc__, argv)
    device, precision = data.setup(args)
    torch.backends.cudnn.benchmark = True  # shapes stay the same
    mixed = data.autocast(device, precision)

    # data: ids only, no images
    train_source = data.open_split(args, args.train_split, images=False)
    val_source = data.open_split(args, args.val_split, images=False)
    training = data.TrainingSet(
        train_source, args.size, num_ids=args.num_ids, seed=args.seed
    )
    if args.crop:  # beyond the paper
        training = data.Augmented(training, crop=args.crop)
        val_source = data.Crops(val_source, args.crop)
    held_out = data.HeldOut(val_source, args.eval_images)
    held_out.check()

    # model; with several processes DDP averages the gradients in backward()
    model = new_model(args).to(device, memory_format=torch.channels_last).train()
    ddp = data.distributed(model)
    settings = {**data.settings_of(args), "autoencoder": model.settings}
    data.warn_of_ceiling(train_source, args, model.num_ids, factor=model.factor)
    points = max(256, round(args.points * (args.size / 512) ** 2))

    # optimiser: AdamW's weight decay is the penalty in eq. 2
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(
        weights, lr=args.lr, weight_decay=args.weight_decay, fused=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    average = data.Average(weights, args.ema)
    run = data.Run(args, model, optimizer=optimizer, scaler=scaler, average=average)
    batches = iter(data.training_batches(training, run.left, args))
    data.say_once(f"stage 1 on {device} in {precision}")

    for it in run.iterations():
        ids = next(batches)["ids"].to(device, non_blocking=True)  # B x S x S
        with mixed:
            logits, mean, logvar = ddp(ids)  # B x N x 4h x 4w, twice B x 4 x h x w

        # eq. 2. DDP averages gradients over processes. For the loss to be a mean over
        # all points and segments, each process divides by their average number.
        (ce, ce_count), (mask, mask_count) = reconstruction_losses(logits, ids, points)
        counts = torch.stack([ce_count.float(), mask_count])
        ce_count, mask_count = data.mean_over_processes(counts).clamp(min=1e-6)
        loss = ce / ce_count + mask / mask_count + args.kl * kl_loss(mean, logvar)
        scaler.scale(loss).backward()

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
            loss = data.mean_over_processes(loss.detach())
            run.log(done, loss=loss, grad_norm=grad_norm, lr=lr)
        if run.time_to_save(done):
            # save first, so that a failing evaluation loses nothing
            run.save(done, settings)
            with average.in_place():
                figures, rows = evaluate(model, held_out, args)
            run.log(done, val_pq=figures["pq"])

    if not run.left:  # --iters 0, or --resume of a finished run
        with average.in_place():
            figures, rows = evaluate(model, held_out, args)
    run.report(figures, rows, ["truth in random ids", "reconstruction"])


# ------------------------------------------------- checkpoints of this stage, read back
def release_settings(weights):
    """The settings of the authors' autoencoder, read off the shapes of its weights."""
    width = len(weights["decoder.0.weight"])
    return {
        "num_ids": len(weights["decoder.10.weight"]),
        "encoding": "bits",
        "factor": width // len(weights["encoder.0.weight"]),
        "width": width,
    }


def read_autoencoder(path):
    """Settings and weights of the autoencoder in a checkpoint of either stage.

    The authors' checkpoints will do too. Raises BadInput.
    """
    content = data.load(path)
    with data.reading(path, "checkpoint whose weights fit its settings"):
        if content["kind"].startswith("release"):
            part = "vae" if content["kind"] == "release_ae" else "vae_semseg"
            weights = content[part]
            weights = {key.removeprefix("module."): w for key, w in weights.items()}
            return release_settings(weights), weights
        settings = content["settings"]["autoencoder"]
        weights = content["weights"]
        if content["kind"] == "ldm":
            prefix = "autoencoder."
            own = [key for key in weights if key.startswith(prefix)]
            weights = {key.removeprefix(prefix): weights[key] for key in own}
        return settings, weights


def build(settings):
    """An untrained Autoencoder or SDAutoencoder of these settings."""
    if "vae" in settings:
        return SDAutoencoder(settings["vae"], settings["num_ids"], settings["encoding"])
    names = ("num_ids", "encoding", "factor", "width")  # older files hold more
    return Autoencoder(**{name: settings[name] for name in names})


def load_autoencoder(path):
    """The autoencoder in a checkpoint of either stage, ours or the authors'."""
    settings, weights = read_autoencoder(path)
    with data.reading(path, "checkpoint whose weights fit its settings"):
        model = build(settings)
        model.load_state_dict(weights)
    return model.eval()


# ---------------------------------------------------------------- other encodings (3.1)
def encode_rgb(ids, num_ids):
    """The bits of an id spread over three channels, as a colour: B x 3 x H x W."""
    n = num_ids.bit_length() - 1
    levels = 2 ** math.ceil(n / 3)
    ids = ids.long()[:, None]  # B x 1 x H x W
    channels = [ids % levels, ids // levels % levels, ids // levels**2]
    return torch.cat(channels, dim=1) * 2 / (levels - 1) - 1


def encode_onehot(ids, num_ids):
    """One channel per id: B x N x H x W."""
    return F.one_hot(ids.long(), num_ids).movedim(3, 1).float()


def encode_positional(ids, num_ids):
    """Sine and cosine of an id at n wavelengths, 2 pi .. 2 pi N: B x 2n x H x W."""
    n = num_ids.bit_length() - 1
    k = torch.arange(n, device=ids.device).view(n, 1, 1)
    angle = ids.long()[:, None] / num_ids ** (k / (n - 1))  # B x n x H x W
    return torch.cat([angle.sin(), angle.cos()], dim=1)


ENCODINGS = {
    "bits": encode_bits,
    "rgb": encode_rgb,
    "onehot": encode_onehot,
    "positional": encode_positional,
}


# ------------------------------------------ Stable Diffusion's VAE as stage 1 (Table 1)
SD_ID = "CompVis/stable-diffusion-v1-4"  # on the hub
SD_VAE = {  # the shape of its VAE; other settings are the defaults of AutoencoderKL
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


class SDAutoencoder(Autoencoder):
    """Stable Diffusion's VAE as stage 1, with a new first and a new last layer.

    84 M parameters; logits come out at f times the latent's side. vae: an AutoencoderKL
    or its config, from which f and the widths follow.
    """

    def __init__(self, vae, num_ids, encoding):
        nn.Module.__init__(self)
        if isinstance(vae, dict):
            vae = AutoencoderKL(**vae)
        config = dict(vae.config)
        channels = config["block_out_channels"]
        self.num_ids = num_ids
        self.encoding = encoding
        self.factor = 2 ** (len(channels) - 1)
        self.settings = {"num_ids": num_ids, "encoding": encoding, "vae": config}
        vae.encoder.conv_in = conv3(self.input_channels(), channels[0])
        vae.decoder.conv_out = conv3(channels[0], num_ids)
        self.encoder = nn.Sequential(vae.encoder, vae.quant_conv)
        self.decoder = nn.Sequential(vae.post_quant_conv, vae.decoder)


def load_sd(name, network, part):
    """Load Stable Diffusion's UNet or VAE: part is "unet" or "vae", network its class.

    name: sd, a hub id, a folder with unet/ and vae/, or none for untrained networks of
    version 1.4's shape. Raises BadInput.
    """
    if name == "none":
        return network(**SD_VAE) if network is AutoencoderKL else network()
    name = SD_ID if name == "sd" else name
    try:
        try:
            loaded = network.from_pretrained(name, subfolder=part)
        except OSError:  # some folders hold only half-precision weights
            loaded = network.from_pretrained(name, subfolder=part, variant="fp16")
    except Exception as error:  # of the hub, of files, of their contents
        raise BadInput(
            f"{name}: no Stable Diffusion with a folder {part}/ found "
            f"({error!r:.90}); a hub id needs network, a folder or --model small does not"
        ) from None
    loaded = loaded.float()
    if network is AutoencoderKL:
        fits = loaded.config.latent_channels == 4 and loaded.quant_conv is not None
    else:
        config = loaded.config
        fits = config.in_channels == 4 and config.addition_embed_type is None
    if not fits:
        raise BadInput(
            f"{name}: its {part}/ is not that of Stable Diffusion 1 or 2 (inpainting, "
            "XL and 3 have other inputs)"
        )
    return loaded


# --------------------------------------------------------------------- beyond the paper
def connected(ids, background):
    """Split segments into their connected parts, for objects that are in one piece.

    ids: H x W, 0 = void. The segment whose id is `background` stays whole.
    """
    top = int(ids.max())
    unused = itertools.count(top + 1)
    parts = Image.fromarray(ids.astype(np.int32))
    for y, x in np.argwhere((ids != 0) & (ids != background)).tolist():
        if parts.getpixel((x, y)) <= top:  # it belongs to no part so far
            ImageDraw.floodfill(parts, (x, y), next(unused))
    return np.asarray(parts)


if __name__ == "__main__":
    main()

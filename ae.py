"""ae.py: stage 1, a shallow autoencoder from a map of segment ids to a latent and back (paper 3.1).

    python ae.py                                          # the paper's run: COCO, 512 px, N = 128
    torchrun --nproc_per_node=8 ae.py                     # the same on eight GPUs
    python ae.py --model small --data shapes              # built-in scenes, minutes on a laptop
    python ae.py --arch sd_vae                            # Stable Diffusion's VAE instead (Table 1)
    python ae.py --ckpt checkpoints/ae.pt --iters 0       # only evaluate: PQ of the reconstruction

Symbols (section 3): y id map, N number of ids, z = E(y) its latent, y_hat = D(z) logits, f the
resizing factor. Writes to --out: ae.pt, ae_state.pt (to --resume), ae_log.jsonl, two pictures."""

import functools
import itertools
import math

import data  # before torch: it sets what PyTorch reads on loading
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image, ImageDraw
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from tqdm import tqdm

import pq
from data import BadInput

# Settings of --model. sd is the paper's, with the authors' where it is silent; small is ours.
SD = dict(size=512, num_ids=128, factor=8, width=256, iters=60_000, batch_size=16, lr=1e-4)
SMALL = dict(size=64, num_ids=16, factor=4, width=64, iters=1_500, batch_size=32, lr=2e-3)
MODELS = {"sd": SD | {"schedule": "constant"}, "small": SMALL | {"schedule": "cosine"}}
ENCODINGS = ["bits", "rgb", "onehot", "positional"]
conv3 = functools.partial(nn.Conv2d, kernel_size=3, padding=1)


# ------------------------------------------------------------------------------------- the model
def encode_ids(ids, num_ids, encoding="bits"):
    """Id map (B x H x W, integers 0..N-1) -> the network's input (B x C x H x W, -1..1).
    Section 3.1, "Encoding": bits (the paper's choice), RGB, one-hot, positional. Void is 0."""
    n, ids = num_ids.bit_length() - 1, ids.long()[:, None]  # B x 1 x H x W
    k = torch.arange(n, device=ids.device).view(n, 1, 1)
    if encoding == "bits":
        x = 2.0 * (ids >> k & 1) - 1
    elif encoding == "rgb":  # n / 3 bits of the id are a colour
        m = 2 ** math.ceil(n / 3)
        x = torch.cat([ids % m, ids // m % m, ids // m**2], 1) * 2 / (m - 1) - 1
    elif encoding == "onehot":
        x = ids == torch.arange(num_ids, device=ids.device).view(-1, 1, 1)
    else:  # sin and cos at n wavelengths from 2 pi to 2 pi N
        angle = ids / num_ids ** (k / (n - 1))
        x = torch.cat([angle.sin(), angle.cos()], 1)
    return x.float() * (ids != 0)


class Autoencoder(nn.Module):
    """The shallow autoencoder ("Architectural Design"); 2.02 M parameters at the paper's setting.
    num_ids: N, a power of two up to 256; factor: f, 8 or 4; width: channels at the bottleneck."""

    def __init__(self, num_ids=128, encoding="bits", factor=8, width=256, **unused):
        super().__init__()  # unused: what older checkpoints also say
        self.settings = dict(num_ids=num_ids, encoding=encoding, factor=factor, width=width)
        self.num_ids, self.encoding, self.factor = num_ids, encoding, factor
        c = width // factor
        channels = encode_ids(torch.zeros(1, 1, 1), num_ids, encoding).shape[1]
        # nn.Identity keeps the authors' numbering of layers, which their checkpoints use
        layers = [conv3(channels, c), nn.SiLU()]
        while c < width:  # halve the sides, double the channels
            layers += [conv3(c, c), conv3(c, 2 * c, stride=2), nn.SiLU()]
            c *= 2
        layers += [conv3(c, c), nn.Identity(), nn.GroupNorm(32, c, eps=1e-6), nn.SiLU()]
        self.encoder = nn.Sequential(*layers, conv3(c, 8))  # mean and log-variance of 4 channels
        layers = [conv3(4, c), nn.Identity()]
        for _ in range(2):
            layers += [nn.ConvTranspose2d(c, c, 2, stride=2), LayerNorm2d(c, eps=1e-6), nn.SiLU()]
        layers += [nn.GroupNorm(32, c, eps=1e-5), nn.SiLU()]
        self.decoder = nn.Sequential(*layers, conv3(c, num_ids))

    def encode(self, ids):
        """Ids (B x H x W, 0..N-1, 0 = void, unknown) -> mean, log-variance of z (B x 4 x h x w)."""
        x = encode_ids(ids, self.num_ids, self.encoding)  # B x n x H x W
        mean, logvar = self.encoder(x).float().chunk(2, dim=1)  # B x 4 x H/f x W/f
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """Latent (B x 4 x h x w) -> logits of ids (B x N x 4h x 4w; Stable Diffusion's fh x fw)."""
        return self.decoder(z)

    def forward(self, ids):
        """One training pass: logits at z ~ N(mean, variance), mean, log-variance."""
        mean, logvar = self.encode(ids)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)  # B x 4 x h x w
        return self.decode(z), mean, logvar


class SDAutoencoder(Autoencoder):
    """Stable Diffusion's VAE in its place (Table 1), 84 M parameters, with a new first and last
    layer. vae: a diffusers AutoencoderKL, or the config of one, which tells f and the widths."""

    def __init__(self, vae, num_ids, encoding, **unused):
        nn.Module.__init__(self)
        if isinstance(vae, dict):
            vae = AutoencoderKL(**vae)
        config, first, last = dict(vae.config), vae.encoder, vae.decoder
        channels = config["block_out_channels"]
        code = encode_ids(torch.zeros(1, 1, 1), num_ids, encoding)  # 1 x C x 1 x 1
        first.conv_in = conv3(code.shape[1], channels[0])
        last.conv_out = conv3(channels[0], num_ids)
        self.encoder = nn.Sequential(first, vae.quant_conv)
        self.decoder = nn.Sequential(vae.post_quant_conv, last)
        self.num_ids, self.encoding, self.factor = num_ids, encoding, 2 ** (len(channels) - 1)
        self.settings = dict(num_ids=num_ids, encoding=encoding, factor=self.factor, vae=config)


def vae_config(block_out_channels, **more):
    """Config of an AutoencoderKL with these channels at its resolutions, the highest first."""
    kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    blocks = {side: [kind] * len(block_out_channels) for side, kind in kinds.items()}
    return dict(block_out_channels=block_out_channels, **blocks, **more)


def load_sd(name, part):
    """Stable Diffusion's "unet" or "vae" of --sd; "none": 1.4's, untrained. Raises BadInput."""
    if name == "none":
        vae = vae_config([128, 256, 512, 512], layers_per_block=2)
        return UNet2DConditionModel() if part == "unet" else AutoencoderKL(**vae)
    network = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part]
    hint = "hub id (with network) or folder with unet/ and vae/ (--model small needs none)"
    with data.reading(f"--sd {name}", hint):
        return network.from_pretrained(name, subfolder=part)


def build(settings):
    """The untrained autoencoder of either kind that has these settings."""
    return (SDAutoencoder if "vae" in settings else Autoencoder)(**settings)


def release_shape(weights):
    """The shape that the tensors of the authors' autoencoder tell."""
    width, num_ids = len(weights["decoder.0.weight"]), len(weights["decoder.10.weight"])
    return dict(num_ids=num_ids, factor=width // len(weights["encoder.0.weight"]), width=width)


def load_autoencoder(path):
    """The autoencoder in a checkpoint of either stage, ours or the authors'. Raises BadInput."""
    content = data.load(path)
    prefix = "autoencoder." if content["kind"] == "ldm" else ""
    with data.reading(path, "checkpoint whose weights fit its settings"):
        weights = content.get("weights") or content.get("vae") or content["vae_semseg"]
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        weights = {k.removeprefix("module."): v for k, v in weights.items()}
        model = build(content["settings"].get("autoencoder") or release_shape(weights))
        model.load_state_dict(weights)
        return model.eval()


# -------------------------------------------------------------- the losses, on points (PointRend)
def sample_at(x, points, mode="bilinear"):
    """x (B x C x H x W) at points (B x P x 2, x and y in 0..1) -> B x C x P; zero outside."""
    return F.grid_sample(x.float(), 2 * points[:, None] - 1, mode, align_corners=False)[:, :, 0]


def uncertain_points(logits, count):
    """PointRend's points: of 3 x count uniform ones the 75% x count least certain, where the two
    largest logits (B x C x h x w) are closest, and 25% x count uniform ones: B x count x 2 in 0..1.
    Logits are sampled, and not a map of how certain they are: between a cell of logit +1 and one of
    -1 lies the boundary, at 0, which a map of certainties misses: it has 1 on both sides."""
    points = torch.rand(len(logits), 3 * count, 2, device=logits.device)
    first, second = sample_at(logits, points).topk(2, dim=1).values.unbind(1)  # B x 3 count
    keep = int(0.75 * count)
    least = (first - second).topk(keep, dim=1, largest=False).indices  # B x keep
    chosen = points.take_along_dim(least[..., None], 1)
    return torch.cat([chosen, torch.rand(len(logits), count - keep, 2, device=logits.device)], 1)


def segments_of(ids, num_ids):
    """All segments of id maps (B x H x W), by image, then by id: image index and id (K and K)."""
    present = ids.new_zeros(len(ids), num_ids).scatter_(1, ids.flatten(1).long(), 1)
    present[:, 0] = 0
    return present.nonzero().unbind(1)


@torch.no_grad()
def draw_points(logits, ids, count):
    """Uncertain points for CE, B x count x 2, and for the K segments' masks, K x count x 2."""
    own = logits[segments_of(ids, logits.shape[1])][:, None]  # K x 1 x h x w
    own = torch.cat([own, torch.zeros_like(own)], 1)  # what is not the mask has logit 0
    return uncertain_points(logits, count), uncertain_points(own, count)


def segmentation_losses(logits, ids, ce_points, mask_points):
    """L_ce and L_mask of eq. 2 as sums, and the counts that they are to be divided by (2 floats).
    logits: B x N x h x w; ids: B x H x W; points: as from `draw_points`. L_ce is summed over the
    points that are not void, L_mask (BCE + Dice of a segment's mask) over the segments."""
    labels = sample_at(ids[:, None], ce_points, "nearest")[:, 0].long()  # B x P
    ce = F.cross_entropy(sample_at(logits, ce_points), labels, ignore_index=0, reduction="sum")
    image_of, id_of = segments_of(ids, logits.shape[1])  # K, K
    own = sample_at(logits[image_of, id_of][:, None], mask_points)[:, 0]  # K x P
    masks = ids[image_of] == id_of[:, None, None]  # K x H x W
    mask = sample_at(masks[:, None], mask_points)[:, 0]  # K x P
    p = own.sigmoid()
    bce = F.binary_cross_entropy_with_logits(own, mask, reduction="none").mean(1)
    dice = 1 - (2 * (p * mask).sum(1) + 1) / (p.sum(1) + mask.sum(1) + 1)
    return ce, (bce + dice).sum(), torch.stack([(labels > 0).sum(), labels.new_tensor(len(own))])


def kl_loss(mean, logvar):
    """KL of the latent's Gaussian from N(0, I), summed over channels and cells; batch mean."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / len(mean)


# -------------------------------------------------------------------- from logits to a segmentation
def resize(logits, height, width):
    """N x h x w -> N x height x width, bilinearly."""
    return F.interpolate(logits[None].float(), (height, width), mode="bilinear")[0]


@torch.no_grad()
def argmax(logits, height, width):
    """Logits (N x h x w), resized -> the likeliest id of each pixel (height x width, int32) and its
    probability (float32), NumPy arrays. 16 ids at a time: a photo's N channels would not fit."""
    best = torch.full((height, width), -math.inf, device=logits.device)
    total, ids = best.clone(), torch.zeros_like(best, dtype=torch.int32)
    for first in range(0, len(logits), 16):
        part = resize(logits[first : first + 16], height, width)
        top, place = part.max(0)
        ids = torch.where(top > best, place.int() + first, ids)
        best, total = top.maximum(best), total.logaddexp(part.logsumexp(0))
    return ids.cpu().numpy(), (best - total).exp().cpu().numpy()


def keep(ids, certainty, min_area=None, threshold=0.5):
    """Supplement B: pixels under the threshold and segments under min_area pixels become void.
    min_area: None is 512, or 1/512 of a picture smaller than the paper's 512 x 512."""
    if min_area is None:
        min_area = round(min(512, ids.size / 512))
    ids = np.where(certainty < threshold, 0, ids)
    small = [s["id"] for s in data.describe(ids) if s["area"] < min_area]
    return np.where(np.isin(ids, small), 0, ids)


def connected(ids):
    """Beyond the paper, for objects in one piece: parts of a segment (H x W ids) that do not touch
    become segments of their own. The largest, a background, stays whole."""
    largest = np.bincount(ids[ids > 0], minlength=1).argmax()
    parts, top = Image.fromarray(ids.astype(np.int32)), int(ids.max())
    unused = itertools.count(top + 1)
    for y, x in np.argwhere((ids > 0) & (ids != largest)).tolist():
        if parts.getpixel((x, y)) <= top:  # of no part so far
            ImageDraw.floodfill(parts, (x, y), next(unused))
    return np.asarray(parts)


# ------------------------------------------------------------------------------------- evaluation
class HeldOut:
    """This rank's share of the samples of a source as they are; broken ones are named and left out.
    limit: only so many; crop: a square of each. Iterating raises BadInput if all are broken."""

    def __init__(self, source, limit=None, crop=0):
        self.source, self.crop, self.indices = source, crop, range(len(source))[:limit]

    def __len__(self):
        return len(self.indices)

    def __iter__(self):
        self.broken = []  # what is wrong with those left out
        own = self.indices[data.RANK :: data.WORLD]
        for index in tqdm(own, leave=False, disable=data.RANK > 0):
            try:
                sample = self.source[index]
            except BadInput as error:
                data.say_once(f"note: left out: {error}")
                self.broken.append(error)
                continue
            rng = np.random.default_rng((index, self.crop))
            yield data.crop_sample(sample, self.crop, rng) if self.crop else sample
        if data.RANK == 0 and len(own) == len(self.broken):
            raise BadInput(f"none of {len(own)} images can be used, the first: {self.broken[0]}")


def evaluate(dataset, predict, batch_size):
    """Figures of `pq.Score` in percent over all ranks' samples of a HeldOut, picture rows of some.
    predict: samples -> of each its id map (H x W) and a list of pictures."""
    score, rows, samples = pq.Score(), [], iter(dataset)
    while batch := list(itertools.islice(samples, batch_size)):
        for sample, (found, pictures) in zip(batch, predict(batch)):
            score.update(sample, found)
            rows += [[sample["image"], *pictures]] if len(rows) < 6 else []
    return {"images": len(dataset), **score.result()}, rows


@torch.no_grad()
def validate(model, dataset, args):
    """`evaluate` the reconstruction of a held-out set in random ids; pictures: both."""

    def predict(samples):
        """Reconstructions of one batch, and pictures of them."""
        maps = []
        for s in samples:
            rng = np.random.default_rng((args.seed, 3, *str(s["image_id"]).encode()))
            maps.append(data.relabel(s["ids"], s["segments_info"], model.num_ids, rng)[0])
        y = np.stack([data.resize_ids(m, args.size, args.size) for m in maps])
        y = torch.from_numpy(y).to(next(model.parameters()).device)  # B x S x S
        for truth, logits in zip(maps, model.decode(model.encode(y)[0])):  # N x 4h x 4w
            found = keep(*argmax(logits, *truth.shape))
            yield found, [data.colorize(truth), data.colorize(found)]

    return evaluate(dataset, predict, args.batch_size)


# --------------------------------------------------------------------------------------- training
def new_model(args):
    """The autoencoder of --ckpt, or untrained, or Stable Diffusion's. Raises BadInput."""
    shape = {k: getattr(args, k) for k in ("num_ids", "encoding", "factor", "width")}
    if args.ckpt:
        model = load_autoencoder(args.ckpt)
    elif args.arch == "sd_vae":
        model = SDAutoencoder(load_sd(args.sd, "vae"), **shape)
    else:
        model = Autoencoder(**shape)
    for name, value in shape.items():
        if model.settings.get(name, value) != value:
            raise BadInput(f"--{name} {value}: the autoencoder has {model.settings[name]}")
    if args.size % (2 * model.factor):
        raise BadInput(f"--size {args.size}: must be a multiple of {2 * model.factor}")
    return model


@data.command
def main(argv=None):
    """Command line: train and evaluate stage 1."""
    parser = data.training_parser(__doc__)
    flag = parser.flag
    flag("--arch", ["shallow", "sd_vae"], "the paper's, or Stable Diffusion's VAE")
    flag("--num_ids", [4, 8, 16, 32, 64, 128, 256], "N; id 0 is void")
    flag("--encoding", ENCODINGS, "of the ids at the input (bits)")
    flag("--factor", [4, 8], "f, image side over latent side")
    flag("--width", [32, 64, 128, 256, 512], "channels at the bottleneck")
    flag("--weight_decay", data.amount, "of AdamW: the penalty of eq. 2", default=0.05)
    flag("--kl", data.amount, "weight of a KL term (default %(default)s)", default=0.0)
    parser.set_defaults(arch="shallow", encoding="bits", clip=3.0)  # clip: the authors'
    args = data.parse(parser, MODELS, argv, "ae")
    device, mixed = data.setup(args)
    # data, model, optimiser: its weight decay is the penalty of eq. 2
    train_source, val_source = data.open_splits(args)
    stream = dict(seed=args.seed, images=False, crop=args.crop)
    train_set = data.Training(train_source, args.size, args.num_ids, **stream)
    val_set = HeldOut(val_source, args.eval_images, args.crop)
    points = max(256, round(12544 * (args.size / 512) ** 2))  # of each loss
    model = new_model(args).to(device, memory_format=torch.channels_last).train()
    ddp = nn.parallel.DistributedDataParallel(model) if data.WORLD > 1 else model
    settings = {k: getattr(args, k) for k in (*data.STORED, "arch")}
    settings["autoencoder"] = model.settings
    validation = functools.partial(validate, model, val_set, args)
    run = data.Run("ae", args, model, model.parameters(), settings, validation)
    data.say_once(f"stage 1 on {device} in {args.precision}")

    # training: eq. 2
    for it, batch in zip(run.iterations(), data.training_batches(train_set, run.left, args)):
        ids = batch["ids"].to(device)  # B x S x S
        with mixed:
            logits, mean, logvar = ddp(ids)  # B x N x 4h x 4w, B x 4 x h x w
        ce, mask, counts = segmentation_losses(logits, ids, *draw_points(logits, ids, points))
        # DDP averages the ranks' gradients
        points_of_ce, segments = (data.reduce_sum(counts) / data.WORLD).clamp(min=1e-6)
        loss = ce / points_of_ce + mask / segments + args.kl * kl_loss(mean, logvar)
        run.scaler.scale(loss).backward()
        run.step(it, loss)
    run.finish(["image", "ids", "reconstruction"])


if __name__ == "__main__":
    main()

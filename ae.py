"""ae.py: stage 1, a shallow autoencoder from a map of segment ids to a latent and back (paper 3.1).

    python ae.py                                          # the paper's run: COCO, 512 px, N = 128
    torchrun --nproc_per_node=8 ae.py                     # the same on eight GPUs
    python ae.py --model small --data shapes              # built-in scenes, minutes on a laptop
    python ae.py --arch sd_vae                            # Stable Diffusion's VAE instead (Table 1)
    python ae.py --ckpt checkpoints/ae.pt --iters 0       # only evaluate: PQ of the reconstruction

Symbols (paper section 3): y id map, N number of ids, z = E(y) the latent, f the resizing factor,
y_hat = D(z) logits. Writes to --out: ae.pt, ae_state.pt (to --resume), ae_log.jsonl, ae.png,
ae_loss.png.
"""

import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import data  # before torch: it sets what PyTorch reads on loading
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import pq
from data import BadInput, rank, world

# Settings of --model. sd is the paper's, with the authors' where it is silent; small is ours.
MODELS = {
    "sd": dict(size=512, num_ids=128, factor=8, width=256, iters=60_000, batch_size=16),
    "small": dict(size=64, num_ids=16, factor=4, width=64, iters=1_500, batch_size=32),
}
MODELS["sd"] |= dict(lr=1e-4, schedule="constant", weight_decay=0.05)
MODELS["small"] |= dict(lr=2e-3, schedule="cosine", weight_decay=0.05)
CLIP = 3.0  # largest norm of the gradient (authors)
ENCODINGS = ("bits", "rgb", "onehot", "positional")

# ------------------------------------------------------------------------------------- the model


def id_channels(encoding, num_ids):
    """Number of input channels of an encoding: bits log2 N, rgb 3, onehot N, positional 2 log2 N."""
    n = num_ids.bit_length() - 1
    return {"bits": n, "rgb": 3, "onehot": num_ids, "positional": 2 * n}[encoding]


def encode_ids(ids, num_ids, encoding="bits"):
    """Id map (B x H x W, integers 0..N-1) -> the network's input (B x C x H x W, -1..1).

    Section 3.1, "Encoding": bits (the paper's choice), RGB, one-hot, positional. Void is 0."""
    n, ids = num_ids.bit_length() - 1, ids.long()
    k = torch.arange(n, device=ids.device).view(1, n, 1, 1)
    if encoding == "onehot":
        x = F.one_hot(ids, num_ids).permute(0, 3, 1, 2).float()
    elif encoding == "positional":  # sin and cos at n wavelengths from 2 pi to 2 pi N
        angle = ids[:, None] / num_ids ** (k / max(n - 1, 1))
        x = torch.cat([angle.sin(), angle.cos()], 1)
    else:
        x = (ids[:, None] >> k & 1).float()  # B x n x H x W: bit k of the id
        if encoding == "rgb":  # bit k is binary digit k // 3 of colour k % 3, each brought to 0..1
            digit = 2.0 ** (k // 3)
            sums = [
                (x * digit)[:, c::3].sum(1) / digit[:, c::3].sum().clamp(min=1) for c in range(3)
            ]
            x = torch.stack(sums, 1)
        x = 2 * x - 1
    return x * (ids != 0)[:, None]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of B x C x H x W."""

    def forward(self, x):
        """B x C x H x W -> B x C x H x W."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Autoencoder(nn.Module):
    """The shallow autoencoder ("Architectural Design"); 2.02 M parameters at the paper's setting.

    num_ids: N, a power of two up to 256; factor: f, 8 or 4; width: channels at the bottleneck."""

    def __init__(self, num_ids=128, encoding="bits", factor=8, width=256, latent_channels=4):
        super().__init__()
        self.settings = dict(num_ids=num_ids, encoding=encoding, factor=factor, width=width)
        self.settings |= dict(latent_channels=latent_channels)
        self.num_ids, self.encoding, self.factor = num_ids, encoding, factor
        c = width // factor
        # nn.Identity keeps the authors' numbering of layers, which their checkpoints use
        layers = [nn.Conv2d(id_channels(encoding, num_ids), c, 3, padding=1), nn.SiLU()]
        while c < width:  # halve the sides, double the channels
            down = nn.Conv2d(c, 2 * c, 3, stride=2, padding=1)
            layers += [nn.Conv2d(c, c, 3, padding=1), down, nn.SiLU()]
            c *= 2
        layers += [nn.Conv2d(c, c, 3, padding=1), nn.Identity()]
        layers += [nn.GroupNorm(32, c, eps=1e-6), nn.SiLU()]
        self.encoder = nn.Sequential(*layers, nn.Conv2d(c, 2 * latent_channels, 3, padding=1))
        layers = [nn.Conv2d(latent_channels, c, 3, padding=1), nn.Identity()]
        for _ in range(2):
            layers += [nn.ConvTranspose2d(c, c, 2, stride=2), ChannelNorm(c, eps=1e-6), nn.SiLU()]
        layers += [nn.GroupNorm(32, c, eps=1e-5), nn.SiLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(c, num_ids, 3, padding=1))

    def encode(self, ids):
        """Ids (B x H x W, 0..N-1, 0 = void or unknown) -> mean, log-variance of z (B x 4 x h x w)."""
        x = encode_ids(ids, self.num_ids, self.encoding)  # B x n x H x W
        mean, logvar = self.encoder(x).float().chunk(2, dim=1)  # B x 4 x H/f x W/f
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """Latent (B x 4 x h x w) -> logits over ids (B x N x 4h x 4w; Stable Diffusion's: fh x fw)."""
        return self.decoder(z)

    def forward(self, ids):
        """One training pass: logits at z ~ N(mean, variance), mean, log-variance."""
        mean, logvar = self.encode(ids)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)  # B x 4 x h x w
        return self.decode(z), mean, logvar


class SDAutoencoder(Autoencoder):
    """Stable Diffusion's VAE in its place (Table 1), 84 M parameters: ids go in and N logits come out
    through a new first and last layer, all others are the VAE's.

    vae: a diffusers AutoencoderKL, or its config; None is a narrow one, untrained."""

    def __init__(self, num_ids=128, encoding="bits", factor=4, width=64, vae=None):
        from diffusers import AutoencoderKL

        nn.Module.__init__(self)
        if not isinstance(vae, nn.Module):
            widths = [width >> k for k in reversed(range(factor.bit_length()))]
            narrow = vae_config(widths, norm_num_groups=max(1, widths[0] // 4))
            vae = AutoencoderKL(**(vae or narrow))
        channels, first, last = vae.config.block_out_channels, vae.encoder, vae.decoder
        first.conv_in = nn.Conv2d(id_channels(encoding, num_ids), channels[0], 3, padding=1)
        last.conv_out = nn.Conv2d(channels[0], num_ids, 3, padding=1)
        self.encoder = nn.Sequential(first, vae.quant_conv)
        self.decoder = nn.Sequential(vae.post_quant_conv, last)
        self.num_ids, self.encoding, self.factor = num_ids, encoding, 2 ** (len(channels) - 1)
        self.settings = dict(num_ids=num_ids, encoding=encoding, factor=self.factor)
        self.settings |= dict(width=channels[-1], vae=plain(vae.config))


def vae_config(block_out_channels, **more):
    """Config of an AutoencoderKL with these channels at its resolutions, the highest first."""
    kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    blocks = {side: [kind] * len(block_out_channels) for side, kind in kinds.items()}
    return dict(block_out_channels=block_out_channels, **blocks, **more)


def plain(config):
    """A diffusers config as a dict of plain values, without its private entries."""
    return {k: v for k, v in dict(config).items() if not k.startswith("_")}


def load_sd(name, part):
    """Stable Diffusion's "unet" or "vae", from a hub id or a folder; "none": 1.4's shapes, untrained.

    Raises BadInput."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    network = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part]
    if name == "none" and part == "unet":
        return network(sample_size=64, cross_attention_dim=768)
    if name == "none":
        return network(**vae_config([128, 256, 512, 512], layers_per_block=2))
    try:
        return network.from_pretrained(name, subfolder=part)
    except Exception:
        hint = (
            "give a hub id (with network) or a folder with unet/ and vae/; --model small needs none"
        )
        raise BadInput(f"--sd {name}: its {part} can't be loaded; {hint}") from None


def build(settings):
    """The untrained autoencoder of either kind that has these settings."""
    return (SDAutoencoder if "vae" in settings else Autoencoder)(**settings)


def fill(model, weights, path):
    """`model` with these weights, in eval mode. Raises BadInput if they don't fit."""
    with data.reading(path, "checkpoint: its weights and settings don't fit together"):
        model.load_state_dict({k: v.float() for k, v in weights.items()})
    return model.eval()


def release_settings(weights):
    """The settings that the shapes of the authors' autoencoder tell. Raises BadInput (KeyError)."""
    first, bottleneck = weights["encoder.0.weight"], weights["decoder.0.weight"]
    num_ids, width = len(weights["decoder.10.weight"]), len(bottleneck)
    encoding = next(e for e in ENCODINGS if id_channels(e, num_ids) == first.shape[1])
    shape = dict(num_ids=num_ids, encoding=encoding, factor=width // len(first), width=width)
    return {**shape, "latent_channels": bottleneck.shape[1]}


def load_autoencoder(path):
    """Checkpoint of stage 1, or the stage 1 in one of stage 2, ours or the authors' -> Autoencoder
    in eval mode on the CPU. Raises BadInput."""
    content = data.load(path, "ae", "ldm", "release_ae", "release_ldm")
    with data.reading(path, "checkpoint"):
        weights, own = content.get("weights"), "autoencoder."
        if content["kind"].startswith("release"):
            weights = content["vae"] if "vae" in content else content["vae_semseg"]
            weights = {k.removeprefix("module."): v for k, v in weights.items()}
            shape = release_settings(weights)
        elif content["kind"] == "ldm":
            shape = content["settings"]["autoencoder"]
            weights = {k.removeprefix(own): v for k, v in weights.items() if k.startswith(own)}
        else:
            shape = content["autoencoder"]
        model = build(shape)
    return fill(model, weights, path)


# -------------------------------------------------------------- the losses, on points (PointRend)


def sample_at(x, points, mode="bilinear"):
    """x (B x C x H x W) at points (B x P x 2, x and y in 0..1) -> B x C x P; zero outside."""
    return F.grid_sample(x.float(), 2 * points[:, None] - 1, mode, align_corners=False)[:, :, 0]


def uncertain_points(uncertainty, batch, count, device):
    """PointRend's points: of 3 x count uniform ones the 75% x count most uncertain, and 25% x count
    uniform ones: batch x count x 2 in 0..1.

    uncertainty: function of points -> batch x P. It samples the logits and then looks how certain
    they are: between a cell of logit +1 and one of -1 lies the boundary, at 0. A map of
    uncertainties made first has 1 on both sides, and sampling it misses the boundary."""
    points = torch.rand(batch, 3 * count, 2, device=device)
    keep = int(0.75 * count)
    top = uncertainty(points).topk(keep, dim=1).indices  # batch x keep
    chosen = points.gather(1, top[..., None].expand(-1, -1, 2))
    return torch.cat([chosen, torch.rand(batch, count - keep, 2, device=device)], 1)


def segments_of(ids, num_ids):
    """All segments of id maps (B x H x W), by image, then by id: image index and id (K and K)."""
    present = torch.zeros(len(ids), num_ids, dtype=torch.bool, device=ids.device)
    present.scatter_(1, ids.flatten(1).long(), True)
    present[:, 0] = False
    return present.nonzero().unbind(1)


@torch.no_grad()
def draw_points(logits, ids, count):
    """Points where the logits (B x N x h x w) are least certain: for CE, B x count x 2, and for the
    masks of the K segments, K x count x 2."""
    own = logits[segments_of(ids, logits.shape[1])][:, None]  # K x 1 x h x w

    def ce_uncertainty(points):
        """Second largest less largest logit."""
        first, second = sample_at(logits, points).topk(2, dim=1).values.unbind(1)
        return second - first

    def mask_uncertainty(points):
        """How close a segment's logit is to 0."""
        return -sample_at(own, points)[:, 0].abs()

    ce_points = uncertain_points(ce_uncertainty, len(ids), count, ids.device)
    return ce_points, uncertain_points(mask_uncertainty, len(own), count, ids.device)


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
    """KL of the latent's Gaussian from N(0, I), summed over channels and cells: mean over the batch."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / len(mean)


# --------------------------------------------------------------------- from logits to a segmentation


@torch.no_grad()
def argmax(logits, height, width, through=None):
    """Logits (N x h x w), resized bilinearly -> NumPy arrays: the likeliest id of each pixel (height
    x width, int32), its probability, and of each id the pixels where its own sigmoid is over 0.5.

    through: a size to go through first; only then they are counted. 16 ids at a time, or a photo's
    N channels would not fit."""
    best = torch.full((height, width), -math.inf, device=logits.device)
    total, ids, confident = best.clone(), torch.zeros_like(best, dtype=torch.int32), []
    for first in range(0, len(logits), 16):
        part = logits[None, first : first + 16].float()
        for size in [through] * bool(through) + [(height, width)]:
            part = F.interpolate(part, size, mode="bilinear", align_corners=False)
        top, place = part[0].max(0)
        ids = torch.where(top > best, place.int() + first, ids)
        best, total = top.maximum(best), total.logaddexp(part[0].logsumexp(0))
        if through:
            confident += part[0].ge(0).sum((1, 2)).tolist()
    return ids.cpu().numpy(), (best - total).exp().cpu().numpy(), np.array(confident)


def least_area(height, width):
    """Segments under so many pixels become void: 512, or 1/512 of a picture (or tile) smaller than
    the paper's 512 x 512."""
    return round(min(512, height * width / 512))


def keep(ids, certainty, min_area, threshold=0.5):
    """Supplement B: pixels under the threshold and segments under min_area pixels become void."""
    ids = np.where(certainty < threshold, 0, ids)
    area = {s["id"]: s["area"] for s in data.describe(ids)}
    small = [i for i, a in area.items() if a < min_area]
    return np.where(np.isin(ids, small), 0, ids) if small else ids


def connected(ids):
    """Make parts of a segment that do not touch segments of their own: H x W ids -> int32, 0 = void.

    The largest stays whole: others may cut a background into pieces. Beyond the paper, for data
    whose objects are in one piece."""
    part, before = np.arange(ids.size).reshape(ids.shape), None
    while not np.array_equal(part, before):
        before = part.copy()
        for a, b in ((part, ids), (part.T, ids.T)):  # neighbours of one id take the larger number
            top = np.where(b[1:] == b[:-1], np.maximum(a[1:], a[:-1]), -1)
            np.maximum(a[1:], top, out=a[1:])
            np.maximum(a[:-1], top, out=a[:-1])
        part = part.ravel()[part]  # and then what that pixel has
    largest = np.bincount(ids[ids > 0], minlength=1).argmax()
    part = np.where(ids == 0, -1, np.where(ids == largest, ids.size, part))
    known, place = np.unique(np.append(part, -1), return_inverse=True)
    return place[:-1].reshape(ids.shape).astype(np.int32)


# ------------------------------------------------------------------------------------- evaluation


@dataclass
class HeldOut:
    """This rank's share of the samples of a source as they are; broken ones are named and left out.

    Iterating raises BadInput if none can be used."""

    source: object
    limit: int = None
    crop: int = 0  # only one square of each picture

    def __len__(self):
        return min(self.limit or len(self.source), len(self.source))

    def __iter__(self):
        good, error = 0, None
        for index in tqdm(range(rank(), len(self), world()), leave=False, disable=rank() > 0):
            try:
                sample = self.source[index]
            except BadInput as broken:
                error = broken
                tqdm.write(f"note: left out of the evaluation: {error}", file=sys.stderr)
                continue
            good += 1
            rng = np.random.default_rng((index, self.crop))
            yield data.crop_sample(sample, self.crop, rng) if self.crop else sample
        if error and not good and world() == 1:
            raise BadInput(f"{error}; nor can any other of the {len(self)} images be used")


def evaluate(samples, predict, batch_size):
    """The figures of `pq.Score` over all ranks' samples, and picture rows of the first.

    predict: list of samples -> of each its id map (H x W) and a list of pictures."""
    score, rows, samples = pq.Score(), [], iter(samples)
    while batch := list(itertools.islice(samples, batch_size)):
        for sample, (found, pictures) in zip(batch, predict(batch)):
            score.update(sample, found)
            rows += [[sample["image"], *pictures]] if len(rows) < 6 else []
    return score.result(), rows


@torch.no_grad()
def validate(model, dataset, args, device):
    """`evaluate` the reconstruction of a held-out set in random ids.

    The pictures: ids, reconstruction, where it is wrong."""

    def predict(samples):
        """Reconstructions of one batch."""
        maps = []
        for s in samples:
            rng = np.random.default_rng((args.seed, 3, *str(s["image_id"]).encode()))
            maps.append(data.relabel(s["ids"], s["segments_info"], model.num_ids, rng)[0])
        y = np.stack([data.resize_ids(m, args.size, args.size) for m in maps])
        logits = model.decode(model.encode(torch.from_numpy(y).to(device))[0])  # B x N x 4h x 4w
        for truth, logit in zip(maps, logits):
            ids, certainty, _ = argmax(logit, *truth.shape)
            found = keep(ids, certainty, least_area(*truth.shape))
            wrong = np.where((found != truth) & (truth > 0), 255, 40).astype(np.uint8)
            pictures = data.colorize(truth), data.colorize(found), np.stack([wrong] * 3, -1)
            yield found, pictures

    model.eval()
    found = evaluate(dataset, predict, args.batch_size)
    model.train()
    return found


def checkpoint(model, args):
    """What a checkpoint of stage 1 holds."""
    settings = {k: getattr(args, k) for k in (*data.STORED, "arch")}
    weights = {k: v.cpu() for k, v in model.state_dict().items()}
    return {"kind": "ae", "autoencoder": model.settings, "weights": weights, "settings": settings}


def new_model(args):
    """The autoencoder of the flags: of --ckpt, or untrained, or Stable Diffusion's. Raises BadInput."""
    shape = {k: getattr(args, k) for k in ("num_ids", "encoding", "factor", "width")}
    if args.ckpt:
        model = load_autoencoder(args.ckpt)
    elif args.arch == "sd_vae":
        vae = load_sd(args.sd, "vae") if args.model == "sd" else None
        model = SDAutoencoder(**shape, vae=vae)
    else:
        model = Autoencoder(**shape)
    for name in ("num_ids", "encoding", "factor"):
        if model.settings[name] != shape[name]:
            raise BadInput(f"--{name} {shape[name]}: the autoencoder has {model.settings[name]}")
    if args.size % (2 * model.factor):
        raise BadInput(f"--size {args.size}: must be a multiple of {2 * model.factor}")
    return model


def flags():
    """The command line."""
    parser = data.training_parser(__doc__)
    add, numbers = parser.add_argument, [4, 8, 16, 32, 64, 128, 256]
    add("--arch", choices=["shallow", "sd_vae"], help="the paper's, or Stable Diffusion's VAE")
    add("--num_ids", type=int, choices=numbers, help="N, ids and logit channels; id 0 is void")
    add("--encoding", choices=ENCODINGS, help="of the ids at the input (bits)")
    add("--factor", type=int, choices=[4, 8], help="f, image side over latent side")
    add("--width", type=int, choices=[32, 64, 128, 256, 512], help="channels at the bottleneck")
    add("--weight_decay", type=data.amount, help="of AdamW: the penalty of eq. 2")
    add("--kl", type=data.amount, default=0.0, help="weight of a KL term (default %(default)s)")
    parser.set_defaults(arch="shallow", encoding="bits")
    return parser


@data.command
def main(argv=None):
    """Command line: train and evaluate stage 1."""
    args = data.parse(flags(), MODELS, argv, "ae")
    device, out, log = data.setup(args), Path(args.out), Path(args.out, "ae_log.jsonl")
    if args.batch_size % world():
        raise BadInput(f"--batch_size {args.batch_size}: must be a multiple of {world()} processes")

    # data, model, optimiser: its weight decay is the penalty of eq. 2
    train_source, val_source = data.open_splits(args)
    stream = {"seed": args.seed, "images": False, "crop": args.crop}
    train_set = data.Training(train_source, args.size, args.num_ids, **stream)
    val_set = HeldOut(val_source, args.eval_images, args.crop)
    points = max(256, round(12544 * (args.size / 512) ** 2))  # of each loss
    model = new_model(args).to(device, memory_format=torch.channels_last).train()
    ddp = DistributedDataParallel(model) if world() > 1 else model
    mixed = data.autocast(args, device)
    optimizer = data.Optimizer([{"params": list(model.parameters())}], args, device, CLIP)
    start = data.restore(out / "ae_state.pt", model, optimizer) if args.resume else 0
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    data.say_once(f"stage 1: {args.arch}, {millions:.2f} M parameters, {device}, {args.precision}")
    if args.iters and not start:
        data.log(log, 0)

    # training: eq. 2
    its, result, bar = range(start, args.iters), None, data.progress(args, start)
    batches = data.training_batches(train_set, its, args.batch_size, 1, args.num_workers)
    for it, batch in zip(its, batches):
        data.seed_iteration(args.seed, it)
        ids = data.to_device(batch, device)["ids"]  # B x S x S
        with mixed:
            logits, mean, logvar = ddp(ids)  # B x N x 4h x 4w, B x 4 x h x w
        ce, mask, counts = segmentation_losses(logits, ids, *draw_points(logits, ids, points))
        counts = data.mean_over_ranks(counts).clamp(min=1e-6)  # DDP averages the ranks' gradients
        loss = ce / counts[0] + mask / counts[1] + args.kl * kl_loss(mean, logvar)
        optimizer.backward(loss)
        norm = optimizer.step(it)

        # once in a while: log, evaluate, save
        bar.update(args.batch_size)
        last = it + 1 == args.iters
        if (it + 1) % data.LOG_EVERY == 0 or last:
            loss = data.mean_over_ranks(loss.detach()).item()
            bar.set_postfix(loss=f"{loss:.3f}")
            data.log(log, it + 1, loss=loss, grad_norm=norm, lr=optimizer.learning_rate(it))
        if (it + 1) % args.save_every == 0 or last:
            result, rows = validate(model, val_set, args, device)
            data.log(log, it + 1, val_pq=result["pq"])
            data.save_run(out, checkpoint(model, args), args, it + 1, model, optimizer)

    # what came of it
    result, rows = (result, rows) if result else validate(model, val_set, args, device)
    if rank() == 0:
        figures = pq.percent(result)
        print(f"reconstruction of {len(val_set)} {args.val_split} images -> {out / 'ae.png'}")
        print(pq.line(figures) + "\n" + pq.line(figures.values()))
        data.picture(out / "ae.png", data.sheet(rows, ["image", "ids", "reconstruction", "error"]))
        if its:
            data.plot_log(out / "ae_loss.png", log, "loss")
        if args.json:
            data.write_json(args.json, {"images": len(val_set), **figures})
    data.leave()


if __name__ == "__main__":
    main()

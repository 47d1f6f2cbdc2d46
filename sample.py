"""sample.py: from an image to its segments with a trained model (paper section 3.2, Algorithm 2; protocol: 4.1, supplement B).

    python sample.py                                      # evaluate on the split that the checkpoint names: PQ, SQ, RQ
    python sample.py --steps 5 10 20 50                   # a table over sampling steps (paper: Fig. 9, left)
    python sample.py --votes 4 --steps 10                 # sample four times, and let the samples vote on every pixel
    python sample.py --seeds 0 1 2 3                      # several seeds side by side, and where they agree (Fig. 10)
    python sample.py --images photo.jpg                   # segment any picture, or a folder of them
    python sample.py --ckpt assets/nuclei.pt --images tile.jpg  # shipped: nuclei under the microscope, pictures of any size
    python sample.py --images photo.jpg --trajectory      # also how the masks come into being: strip and GIF (Fig. S4)
    torchrun --nproc_per_node=8 sample.py                 # evaluate on eight GPUs
    python sample.py --bench sd --steps 10 20 50          # seconds an image of the paper's model, random weights (Table S1)

Algorithm 2 itself is `LDM.sample` in diffusion.py: training evaluates with it. Here are its inputs and outputs, and the tiles
in which a model that was trained on crops sees larger pictures.
With a classifier in the checkpoint (diffusion.py --classes) segments have categories, and PQ is printed with and without them.
From Python:  model = load("checkpoints/ldm.pt");  ids, segments_info = segment(model, Image.open("photo.jpg"))
Without --ckpt: checkpoints/ldm.pt, or before any training the shipped assets/shapes.pt.
"""
import contextlib
import itertools
import math
import sys
import time
from pathlib import Path

import data
from data import BadInput, is_main

parser = data.Parser(__doc__, out="out")
data.sampling_flags(parser, renoise=False)
add = parser.add_argument
add("--images", metavar="FILE_OR_FOLDER", help="segment these pictures instead of evaluating")
add("--bench", choices=["sd", "small"], help="only time a model of this size, with random weights")
add("--steps", type=data.positive, nargs="+", default=[50], help="sampling steps; several make a table (default 50)")
add("--seeds", type=data.natural, nargs="+", metavar="SEED", help="two or more: compare what these seeds give")
add("--trajectory", action="store_true", help="also draw the estimates of z^0 of the first four images over the steps")
if __name__ == "__main__":
    parser.at_once()                                                       # --help and wrong flags need not wait for torch

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from tqdm import tqdm

import ae
import diffusion
import pq

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


def load(path=None, device="cpu"):
    """Checkpoint of diffusion.py -> LDM in eval mode on `device`. None: checkpoints/ldm.pt, else the shipped weights.

    Raises BadInput if the file is missing, cut short or of another kind."""
    if path is None:
        path = Path("checkpoints/ldm.pt")
        if not path.is_file():
            path = Path(__file__).parent / "assets" / "shapes.pt"
            if is_main():
                print(f"no checkpoints/ldm.pt yet: using the shipped {path.parent.name}/{path.name}, trained on the built-in scenes", file=sys.stderr)
    return diffusion.load_ldm(path).to(device)


def tile_corners(height, width, side, overlap):
    """(top, left) of squares that cover a picture, evenly spaced, each sharing at least `overlap` of its side with the next."""
    along = lambda n: np.linspace(0, max(n - side, 0), max(1, math.ceil((n / side - overlap) / (1 - overlap)))).round().astype(int).tolist()
    return [(top, left) for top in along(height) for left in along(width)]


def stitch(tiles, corners, shape, shared=0):
    """Join what was sampled tile by tile: every pixel is taken from the tile in whose middle it lies most, and the segments of
    two tiles become one where IoU > 0.5 in the part that both tiles see, the surest first, unless that would make two segments
    of one tile the same.

    tiles: of each its ids (side x side) and their certainty; corners: (top, left) of each, by rows; shape: H, W of the whole. Ids up to
    `shared` mean the same in every tile, all others are a tile's own. Returns ids (H x W, int32) and their certainty."""
    side, ids, count, pairs = len(tiles[0][0]), [], shared, []
    seen_in = [set() for _ in range(shared + 1)]                           # id -> the tiles that have what it was joined with
    for n, (tile, _) in enumerate(tiles):                                  # make ids distinct over all tiles
        known, place = np.unique(tile, return_inverse=True)
        own = known > shared
        ids.append(np.where(own, count + own.cumsum(), known)[place.reshape(tile.shape)])
        count += own.sum()
        seen_in += [{n} for _ in range(own.sum())]
        for i in known[~own]:
            seen_in[i].add(n)
    joined = np.arange(count + 1)                                          # id -> what it was joined with

    def root(i):
        """The id that stands for all that `i` was joined with."""
        while joined[i] != i:
            i = joined[i]
        return i
    below = lambda n: itertools.takewhile(lambda m: corners[m][0] < corners[n][0] + side, range(n + 1, len(corners)))      # by rows
    for n, m in ((n, m) for n in range(len(corners)) for m in below(n)):
        (top, left), (top2, left2) = corners[n], corners[m]
        if abs(left - left2) < side:
            a = ids[n][max(top2 - top, 0):side + min(top2 - top, 0), max(left2 - left, 0):side + min(left2 - left, 0)]
            b = ids[m][max(top - top2, 0):side + min(top - top2, 0), max(left - left2, 0):side + min(left - left2, 0)]
            of_a, of_b, iou = overlaps(a, b)
            pairs += [(-iou[i, k], of_a[i], of_b[k]) for i, k in np.argwhere(iou > 0.5)]
    for _, i, k in sorted(pairs):
        low, high = sorted((root(i), root(k)))
        if low and high > shared and not seen_in[low] & seen_in[high]:
            joined[high] = low
            seen_in[low] |= seen_in[high]
    whole, certainty, nearest = np.zeros(shape, np.int64), np.zeros(shape, np.float32), np.full(shape, np.inf)
    reach = np.abs(np.arange(side) - (side - 1) / 2)
    reach = np.maximum(reach[:, None], reach)                              # distance from the tile's middle
    for tile, (_, sure), (top, left) in zip(ids, tiles, corners):
        box = np.s_[top:top + side, left:left + side]
        seen = nearest[box].shape                                          # a picture may be smaller than the tile
        closer = reach[:seen[0], :seen[1]] < nearest[box]
        for target, value in ((whole, tile), (certainty, sure), (nearest, reach)):
            target[box][closer] = value[:seen[0], :seen[1]][closer]
    known, place = np.unique([root(i) for i in range(count + 1)], return_inverse=True)
    new = np.where(known > shared, shared + (known > shared).cumsum(), known)
    return new[place][whole].astype(np.int32), certainty


def cut(image, side, corners):
    """Tiles of an H x W[ x 3] array; where it is smaller than a tile, its edge is continued."""
    image = np.pad(image, [(0, max(side - n, 0)) for n in image.shape[:2]] + [(0, 0)] * (image.ndim - 2), "edge")
    return [image[top:top + side, left:left + side] for top, left in corners]


def overlaps(a, b):
    """IoU of every segment of one id map with every one of another: ids of the first, ids of the second, their IoU (matrix)."""
    present = [np.bincount(x.ravel()) > 0 for x in (a, b)]
    a, b = ((p.cumsum() - 1)[x.ravel()] for p, x in zip(present, (a, b)))  # ids as 0, 1, 2, ...
    of_a, of_b = map(np.flatnonzero, present)
    inter = np.bincount(a * len(of_b) + b, minlength=len(of_a) * len(of_b)).reshape(len(of_a), -1)
    return of_a, of_b, inter / (inter.sum(1)[:, None] + inter.sum(0)[None] - inter)


def agreement(maps):
    """How far several id maps (H x W) of one image agree, per pixel: H x W floats in 0..1.

    The mean, over all pairs of maps, of the IoU of the two segments that the pixel lies in; void agrees with nothing."""
    total, pairs = 0, list(itertools.combinations(maps, 2))
    for a, b in pairs:
        of_a, of_b, iou = overlaps(a, b)
        total = total + iou[of_a.searchsorted(a), of_b.searchsorted(b)] * (a > 0) * (b > 0)
    return total / len(pairs)


def consensus(found, shared=()):
    """Several samples of one picture (each its ids and their certainty) -> one, by majority: its ids (int32) and their certainty.

    Segments of different samples are the same object where IoU > 0.5, which at most one of each sample can have: they are put together
    from that on which the samples agree most downwards. Every pixel then goes to the object that most samples see there, at a tie to the
    one that they agree on most, with the mean certainty of those samples. Ids in `shared` mean the same in every sample and stay, others
    are numbered above them."""
    if len(found) == 1:
        return found[0]
    shared = sorted(set(map(int, shared)) - {0})
    top = max([int(ids.max()) for ids, _ in found] + shared) + 1
    maps = np.stack([ids.astype(np.int64) + k * top for k, (ids, _) in enumerate(found)])      # K x H x W, ids distinct over all
    alike = {int(s): {int(s): 1.0} for s in np.flatnonzero(np.bincount(maps.ravel())) if s % top}           # but for void
    for a, b in itertools.combinations(maps, 2):
        of_a, of_b, iou = overlaps(a, b)
        for i, k in np.argwhere(iou > 0.5):
            if of_a[i] in alike and of_b[k] in alike:
                alike[of_a[i]][of_b[k]] = alike[of_b[k]][of_a[i]] = iou[i, k]
    groups = [[i + k * top for k in range(len(found))] for i in shared]
    free = set(alike) - {s for group in groups for s in group}             # in no group yet
    for s in sorted(alike, key=lambda s: -sum(alike[s].values())):
        if s in free:
            groups.append([t for t in alike[s] if t in free])
            free -= set(groups[-1])
    group_of = np.full(len(found) * top, len(groups))                      # of void: the last, so that it loses a tie
    for g, group in enumerate(groups):
        group_of[group] = g
    seen = group_of[maps]                                                  # K x H x W
    chosen, most = seen[0], 0
    for group in seen:
        votes = (seen == group).sum(0) - group / (len(groups) + 1)         # how many samples see it there; at a tie the first group
        chosen, most = np.where(votes > most, group, chosen), np.maximum(votes, most)
    certainty = np.mean([sure for _, sure in found], 0, where=(seen == chosen), dtype=np.float32)
    names = shared + [max(shared, default=0) + 1 + g for g in range(len(groups) - len(shared))] + [0]
    return np.array(names, np.int32)[chosen], certainty


def vote(draw, keys, *pieces, votes, batch_size, shared=None):
    """Sample every piece `votes` times, in batches, and join its samples by `consensus`: a list of ids and certainty.

    draw: function of a batch's keys and pieces; of each further vote the key says so, which gives it noise of its own.
    shared: of each piece, the ids that mean the same in every sample."""
    found = []
    for n in tqdm(range(0, len(keys), batch_size), "tiles", leave=False, disable=not is_main() or len(keys) < 100):
        batch = [piece[n:n + batch_size] for piece in pieces]
        draws = [draw([f"{key} vote {k}" if k else key for key in keys[n:n + batch_size]], *batch) for k in range(votes)]
        found += [consensus(samples, same) for samples, same in zip(zip(*draws), shared[n:n + batch_size] if shared else itertools.repeat(()))]
    return found


def predict(model, images, keys, steps=50, seed=0, renoise=False, votes=1, overlap=0.25, batch_size=16):
    """H x W x 3 uint8 images of any sizes -> for each its ids (H x W, int32) and their certainty (H x W, 0..1).

    votes: sample so many times, and join the samples (`consensus`). A model that was trained on crops sees pictures in tiles
    of that size, each with votes of its own. Other parameters: `diffusion.sample_logits`."""
    side = model.settings["crop"]
    corners = [tile_corners(*image.shape[:2], side, overlap) if side else [None] for image in images]
    tiles = [tile for image, places in zip(images, corners) for tile in (cut(image, side, places) if side else [image])]
    names = [f"{key} at {place}" if side else key for key, places in zip(keys, corners) for place in places]
    found = vote(lambda keys, tiles: diffusion.predict(model, tiles, keys, steps, seed, renoise), names, tiles, votes=votes, batch_size=batch_size)
    if not side:
        return found
    ends = np.cumsum([len(places) for places in corners])
    return [stitch(found[end - len(places):end], places, image.shape[:2]) for image, places, end in zip(images, corners, ends)]


def segment_batch(model, images, keys, steps=50, seed=0, threshold=0.5, renoise=False, votes=1, overlap=0.25, batch_size=16):
    """Segment H x W x 3 uint8 images of any sizes: a list of id maps (H x W, int32, 0 = void). Parameters: `predict`."""
    found = predict(model, images, keys, steps, seed, renoise, votes, overlap, batch_size)
    return [ae.keep(*f, threshold, model.settings["min_area"]) for f in found]


@torch.no_grad()
def label_batch(model, images, found, merge=True):
    """Id maps of images (both lists, as `segment_batch` takes and gives them) -> list of id map, segments_info.

    With a classifier segments have their category_id and score, and with `merge` those of one stuff category become one;
    without one they are all objects (category 1)."""
    if model.classifier is None:
        return [(ids, ae.describe(ids)) for ids in found]
    return [model.classifier.label(l, ids, merge) for l, ids in zip(diffusion.class_logits(model, images), found)]


def segment(model, image, steps=50, seed=0, threshold=0.5, renoise=False, votes=1):
    """One PIL image -> its id map (H x W, int32, 0 = void) and segments_info in COCO panoptic format (`label_batch`).

    threshold: pixels less certain than this become void; segments under model.settings["min_area"] px do too."""
    array = data.to_rgb(ImageOps.exif_transpose(image))
    return label_batch(model, [array], segment_batch(model, [array], [""], steps, seed, threshold, renoise, votes))[0]


def compare_seeds(model, dataset, args, out):
    """Fig. 10: sample each image with every seed. PQ by seed, the seeds' mean agreement, and out/seeds.png.

    The sheet shows for each image the decoded noise of every seed (for pictures in tiles there is no one noise), and under it
    what was sampled from it and the agreement."""
    scores, rows, agreed, crop = {seed: ae.Score() for seed in args.seeds}, [], [], model.settings["crop"]
    side = model.settings["size"] // model.autoencoder.factor
    for samples in tqdm(data.evaluation_batches(dataset, args.batch_size, num_workers=args.num_workers), unit="batch"):
        images, keys = [s["image"] for s in samples], [s["image_id"] for s in samples]
        found = {seed: segment_batch(model, images, keys, args.steps[-1], seed, args.threshold, *choices(args)) for seed in args.seeds}
        for k, s in enumerate(samples):
            for seed in args.seeds:
                scores[seed].update(s, found[seed][k])
            certain = agreement([f[k] for f in found.values()])
            agreed.append(certain.mean())
            if len(agreed) <= 4:
                gray = np.repeat((255 * certain).astype(np.uint8)[..., None], 3, 2)
                overlays = [data.overlay(s["image"], f[k]) for f in found.values()]
                if crop:
                    rows.append([s["image"], gray, *overlays])
                    continue
                noises = [diffusion.image_noise(seed, [s["image_id"]], (4, side, side), next(model.parameters()).device) for seed in args.seeds]
                decoded = [data.colorize(ae.postprocess(model.decode(z)[0], *certain.shape, 0)) for z in noises]
                rows += [[s["image"], *decoded], [gray, *overlays]]
    data.picture(out / "seeds.png", rows, ["image", "agreement"] + [f"sample {seed}" for seed in args.seeds] if crop else
                 ["image, agreement"] + [f"noise, sample {seed}" for seed in args.seeds])
    return {seed: diffusion.percent(score.result()) for seed, score in scores.items()}, float(np.mean(agreed))


def draw_trajectory(model, images, keys, args, out):
    """Fig. S4: the estimate of z^0 after each step, decoded: out/trajectory.png (up to eight steps) and out/trajectory.gif (all)."""
    trace, timesteps, side = [], model.ddim.timesteps(args.steps[-1]), model.settings["crop"]
    if side:                                                               # the tile in the middle
        images = [cut(image, side, [[max(n - side, 0) // 2 for n in image.shape[:2]]])[0] for image in images]
    diffusion.sample_logits(model, images, keys, args.steps[-1], args.seed, args.renoise, trace)
    decoded = [[data.overlay(image, ae.argmax(l, *image.shape[:2])[0]) for image, l in zip(images, model.decode(z0))] for z0 in trace]
    shown = sorted({round(i) for i in np.linspace(0, len(trace) - 1, 8)})
    data.picture(out / "trajectory.png", [[image, *(decoded[i][k] for i in shown)] for k, image in enumerate(images)],
                 ["image"] + [f"j = {timesteps[i]}" for i in shown])
    frames = [data.sheet(list(zip(images, step))) for step in decoded]
    frames[0].save(out / "trajectory.gif", save_all=True, append_images=frames[1:], duration=[80] * (len(frames) - 1) + [2000], loop=0)
    print(f"-> {out / 'trajectory.png'}, {out / 'trajectory.gif'}")


@torch.no_grad()
def bench(args, device, precision):
    """Table S1: seconds an image by sampling steps and by part, for a model of the paper's or the small size with random weights.

    Each part is run once to warm up, then three times; the median is printed. Then how a UNet pass grows with batch and size.
    Returns the figures."""
    meter = ae.Meter(device)
    model = diffusion.untrained(args.bench, args.size).to(device, memory_format=torch.channels_last)
    size, batch, by_steps = model.settings["size"], args.batch_size, {}
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)

    def seconds(functions):
        """Median seconds an image, by name."""
        return {name: took / batch for name, took in data.side_by_side(functions, 3, device).items()}
    with ae.autocast(precision, device):
        image_latent = model.encode_image(images)
        noise = diffusion.image_noise(0, range(batch), (4, *image_latent.shape[2:]), device)
        logits = model.decode(noise)
        functions = {"image_encoder": lambda: model.encode_image(images), "unet_step": lambda: model.denoise(noise, image_latent, noise, 500),
                     "decoder": lambda: model.decode(noise),
                     "postprocess": lambda: [ae.postprocess(l, size, size, 0.5, model.settings["min_area"]) for l in logits]}
        tflop = meter.tflop(functions["unet_step"])
        if args.compile:
            compile_unet(model)
            x, j = torch.cat([noise, image_latent, noise], 1), torch.full((batch,), 500, device=device)
            functions["unet_step_not_compiled"] = lambda: model.unet.forward(x, j, encoder_hidden_states=None)
        meter.reset()
        parts, gigabytes = seconds(functions), meter.gigabytes()
        reached, rate = tflop / parts["unet_step"] / batch, meter.matmul_rate(precision)
        eager = f" ({parts['unet_step_not_compiled']:.4f} not compiled)" if args.compile else ""
        print(f"--model {args.bench}, untrained: UNet {sum(p.numel() for p in model.unet.parameters()) / 1e6:.1f} M parameters, {size} px, batch {batch}, "
              f"{device.type}, {precision}; seconds an image\n  image encoder {parts['image_encoder']:.4f}, UNet {parts['unet_step']:.4f} a step{eager}, "
              f"decoder {parts['decoder']:.4f}, post-processing {parts['postprocess']:.4f}\n"
              f"  UNet: {reached:.3f} TFLOP/s, {100 * reached / rate:.0f}% of a matrix product's {rate:.3f}; {gigabytes:.2f} GB")
        print(f"{'steps':>6}{'sampling':>10}{'UNet part':>11}{'in all':>9}{'images/s':>10}")
        for steps in args.steps:
            loop, passes = seconds({"sampling": lambda: model.sample(image_latent, noise, steps),
                                    "UNet": lambda: [functions["unet_step"]() for _ in range(steps)]}).values()
            by_steps[steps] = {"sampling": loop, "in_all": parts["image_encoder"] + loop + parts["decoder"] + parts["postprocess"]}
            print(f"{steps:6}{loop:10.3f}{100 * passes / loop:10.0f}%{by_steps[steps]['in_all']:9.3f}{1 / by_steps[steps]['in_all']:10.3f}", flush=True)
        figures = {**parts, "by_steps": by_steps, "tflops": reached, "matmul_tflops": rate, "gigabytes": gigabytes}
        if not args.compile:                                               # which would compile for every shape
            f, channels = model.autoencoder.factor, model.image_encoder.channels
            made_up = lambda batch, size: lambda: [torch.randn(batch, c, size // f, size // f, device=device) for c in (4, channels)]
            one_pass = lambda case: model.denoise(case[0], case[1], case[0], 500)
            print("a UNet pass, seconds:")
            figures["by_batch"] = meter.growth("batch", {b: (b, made_up(b, size)) for b in (1, 2, 4, 8, 16, 32, 64)}, one_pass)
            sizes = [s for s in (size // 2, size, 2 * size) if s % (4 * f) == 0]
            figures["by_size"] = meter.growth("size", {s: ((s / size) ** 2, made_up(1, s)) for s in sizes}, one_pass)
    return figures


def table_of(figures):
    """Head and row of a table of `ae.Score`'s figures, in percent."""
    names = {k: ae.FIGURES[k] for k in figures if k in ae.FIGURES}
    widths = {k: max(7, len(name) + 2) for k, name in names.items()}
    return "".join(f"{names[k]:>{w}}" for k, w in widths.items()), "".join(f"{figures[k]:{w}.1f}" for k, w in widths.items())


def find_images(path):
    """A file or a folder -> list of pictures. Raises BadInput if there is none, or if two would get the same name."""
    path = Path(path)
    if not path.exists():
        raise BadInput(f"--images {path}: no such file or folder")
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise BadInput(f"--images {path}: no picture in this folder ({' '.join(sorted(SUFFIXES))})")
    named = {}
    for file in files:
        if named.setdefault(image_id(file), file) != file:
            raise BadInput(f"--images {path}: {named[image_id(file)].name} and {file.name} would both be image {image_id(file)}; rename one")
    return files


def image_id(path):
    """COCO's convention: the file's stem as an integer where it is one, else the stem."""
    return int(path.stem) if path.stem.isdecimal() else path.stem


def predict_files(model, files, out, args, rank, world):
    """Segment picture files: out/predictions/STEM.png, out/predictions.json (COCO panoptic), out/overlays/STEM.png.

    A picture that can't be read is named and left out; the list of those is returned."""
    (out / "predictions").mkdir(parents=True, exist_ok=True)
    (out / "overlays").mkdir(exist_ok=True)
    images, annotations, broken, rows = [], [], [], []
    mine = files[rank::world]
    for start in tqdm(range(0, len(mine), args.batch_size), disable=not is_main(), unit="batch"):
        batch = []
        for file in mine[start:start + args.batch_size]:
            try:
                batch.append((file, data.read_image(file, upright=True)))
            except BadInput as error:
                broken.append(str(error))
        if not batch:
            continue
        pictures = [i for _, i in batch]
        maps = predict(model, pictures, [f.stem for f, _ in batch], args.steps[-1], args.seed, *choices(args))
        found = [ae.keep(*m, args.threshold, model.settings["min_area"]) for m in maps]
        for (raw, _), (file, image), (ids, segments_info) in zip(maps, batch, label_batch(model, pictures, found)):
            if len(rows) < 6:
                rows.append([image, data.overlay(image, raw), data.overlay(image, ids)])
            data.write_id_png(out / "predictions" / f"{file.stem}.png", ids)
            Image.fromarray(data.overlay(image, ids)).save(out / "overlays" / f"{file.stem}.png")
            images.append({"id": image_id(file), "file_name": file.name, "height": ids.shape[0], "width": ids.shape[1]})
            annotations.append({"image_id": image_id(file), "file_name": f"{file.stem}.png", "segments_info": segments_info})
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, (images, annotations, broken))
        images, annotations, broken = (sum((g[i] for g in gathered), []) for i in range(3))
    if is_main():
        if rows:
            data.picture(out / "sample.png", rows, ["image", "argmax", "over threshold"], cell=256)
        data.write_json(out / "predictions.json", {"images": images, "annotations": annotations,
                                                 "categories": model.classifier.categories if model.classifier else pq.OBJECT})
    return broken


def choices(args):
    """What the flags say, as the last parameters of `predict`."""
    return args.renoise, args.votes, args.overlap, args.batch_size


def open_model(args, device):
    """The checkpoint of the flags, with --size, --crop, --connected and --min_area applied to it. Raises BadInput."""
    model = load(args.ckpt, device).to(memory_format=torch.channels_last)
    settings, f = model.settings, model.autoencoder.factor
    if args.size and args.size % (4 * f):
        raise BadInput(f"--size {args.size}: must be a multiple of {4 * f} for this model")
    settings["size"] = args.size or settings["size"]
    for name in ("crop", "connected", "min_area"):
        settings[name] = settings[name] if getattr(args, name) is None else getattr(args, name)
    if args.compile:
        compile_unet(model)
    return model


def compile_unet(model):
    """Let torch.compile rewrite the UNet at its first pass; on CUDA into a graph, which takes the launches off the CPU."""
    cuda = next(model.parameters()).is_cuda
    model.unet.compile(mode="reduce-overhead" if cuda else "default")


def open_split(model, args):
    """The held-out images of the flags, by default those that the checkpoint names. Raises BadInput."""
    s = model.settings
    source = data.open_data(args.data or s["data"], args.split or s["val_split"], s["size"], s["seed"], args.background or s["background"])
    return data.Evaluation(source, args.limit)


@data.command
def main(argv=None):
    """Command line: evaluate a split, or segment picture files."""
    args = parser.parse_args(argv)
    for steps in args.steps:
        diffusion.DDIM().timesteps(steps)
    files = find_images(args.images) if args.images else None
    if (files or args.seeds) and len(args.steps) > 1:
        raise BadInput("--steps: one number with --images or --seeds; several are for evaluating")
    if args.seeds and (files or len(set(args.seeds)) < 2):
        raise BadInput("--seeds: two or more different ones, to compare on a split (not with --images)")
    device, rank, world = ae.setup(args)
    precision = ae.pick_precision(args.precision, device)
    if args.bench:
        ae.alone(world, "--bench")
        if args.size and args.size % (4 * ae.MODELS[args.bench]["factor"]):
            raise BadInput(f"--size {args.size}: must be a multiple of {4 * ae.MODELS[args.bench]['factor']} for --bench {args.bench}")
        figures = bench(args, device, precision)
        if args.json:
            data.write_json(args.json, figures)
        return
    model, out = open_model(args, device), Path(args.out)

    if files:
        began = time.time()
        with ae.autocast(precision, device):
            broken = predict_files(model, files, out, args, rank, world)
        done = len(files) - len(broken)
        if is_main():
            seconds = (time.time() - began) / max(done, 1)
            print(f"{done} of {len(files)} pictures segmented, {seconds:.2f} s each -> "
                  f"{out / 'predictions.json'}, {out / 'predictions'}, {out / 'overlays'}")
            if args.json:
                data.write_json(args.json, {"images": done, "seconds_per_image": seconds})
            if args.trajectory and done:
                with ae.autocast(precision, device):
                    shown = []
                    for file in files:
                        with contextlib.suppress(BadInput):                # predict_files has named it
                            shown.append((data.read_image(file, upright=True), file.stem))
                        if len(shown) == 4:
                            break
                    draw_trajectory(model, *zip(*shown), args, out)
        ae.leave()
        if broken:
            raise BadInput(f"{len(broken)} of {len(files)} pictures left out, the first: {broken[0]}")
        return

    dataset, results = open_split(model, args), {}
    if args.trajectory and is_main():
        with ae.autocast(precision, device):
            first = [dataset[i] for i in range(min(4, len(dataset)))]
            draw_trajectory(model, [s["image"] for s in first], [s["image_id"] for s in first], args, out)
    if args.seeds:
        ae.alone(world, "--seeds")
        with ae.autocast(precision, device):
            by_seed, agreed = compare_seeds(model, dataset, args, out)
        print(f"{len(dataset)} images, {args.steps[-1]} steps\n{'seed':>6}{table_of(by_seed[args.seeds[0]])[0]}")
        for seed, r in by_seed.items():
            print(f"{seed:6}{table_of(r)[1]}")
        mean = {k: float(np.mean([r[k] for r in by_seed.values()])) for k in r}
        print(f"mean agreement of the seeds {agreed:.3f} (1: the same segments everywhere) -> {out / 'seeds.png'}")
        if args.json:
            data.write_json(args.json, {**mean, "agreement": agreed, "by_seed": by_seed, "images": len(dataset)})
        return
    if is_main():
        print(f"{len(dataset)} images, seed {args.seed}, {device.type}, {precision}")
    for steps in args.steps:
        began = time.time()
        with ae.autocast(precision, device):
            segment = lambda images, keys: predict(model, images, keys, steps, args.seed, *choices(args))
            result, rows = diffusion.evaluate(model, dataset, segment, device, args.batch_size, rank, world, args.num_workers, args.threshold)
        seconds = (time.time() - began) / len(dataset)
        results[steps] = {**diffusion.percent(result), "images": len(dataset), "seconds_per_image": seconds}
        if is_main():
            r = results[steps]
            head, row = table_of(r)
            if steps == args.steps[0]:
                print(f"{'steps':>6}{head}{'s/image':>10}")
            print(f"{steps:6}{row}{seconds:10.3f}", flush=True)
    if is_main():
        if "classes" in result:
            print(diffusion.class_table(result))
        data.picture(out / "sample.png", rows, diffusion.COLUMNS)
        if len(results) > 1:
            curves = {k.upper(): (list(results), [r[k] for r in results.values()]) for k in ("pq", "sq", "rq")}
            data.plot(out / "sample_steps.png", curves, "sampling steps", "percent")
            data.plot(out / "sample_seconds.png", {"seconds an image": (list(results), [r["seconds_per_image"] for r in results.values()])},
                      "sampling steps", "seconds an image")
        print(f"-> {out / 'sample.png'}")
        if args.json:
            data.write_json(args.json, {**results[args.steps[-1]], "by_steps": results})
    ae.leave()


if __name__ == "__main__":
    main()

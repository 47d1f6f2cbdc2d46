"""sample.py: from an image to its segments with a trained model (paper 3.2; protocol: 4.1, suppl. B).

    python sample.py                                   # evaluate the checkpoint's split: PQ, SQ, RQ
    python sample.py --steps 1 2 4 10 50               # a table over sampling steps (Fig. 9, left)
    python sample.py --paper --steps 50                # Algorithm 2 exactly as printed
    python sample.py --votes 4                         # sample four times and let the samples vote
    python sample.py --seeds 0 1 2 3                   # where do several seeds agree? (Fig. 10)
    python sample.py --images photo.jpg --trajectory   # any picture, or a folder (Fig. S4)
    python sample.py --ckpt assets/nuclei.pt --images tile.jpg   # nuclei, pictures of any size
    torchrun --nproc_per_node=8 sample.py              # evaluate on eight GPUs

Algorithm 2 itself is `LDM.sample` in diffusion.py. Here are its inputs and outputs, the tiles in
which a model that was trained on crops sees larger pictures, and votes.
From Python:  model = load();  ids, segments_info = segment(model, Image.open("photo.jpg"))
"""

import argparse
import collections
import itertools
import math
import time
from pathlib import Path

import data  # before torch: it sets what PyTorch reads on loading
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from tqdm import tqdm

import ae
import diffusion
import pq
from data import BadInput, rank, world

OVERLAP = 0.25  # share of a tile's side that the next one sees too


def load(path=None, device="cpu"):
    """Checkpoint of diffusion.py, or the authors' -> LDM in eval mode. None: checkpoints/ldm.pt, or
    before any training the shipped assets/shapes.pt. Raises BadInput."""
    if path is None:
        path = Path("checkpoints/ldm.pt")
        if not path.is_file():
            path = Path(__file__).parent / "assets" / "shapes.pt"
            data.say_once("no checkpoints/ldm.pt yet: using the shipped assets/shapes.pt")
    return diffusion.load_ldm(path).to(device, memory_format=torch.channels_last)


# ------------------------------------------------------- tiles and votes (beyond the paper)


def ious(a, b):
    """IoU of each pair of ids of two maps that share pixels: id of a, id of b, IoU (P each)."""
    of_a, of_b, pixels = pq.overlaps(a, b)
    union = np.bincount(of_a, pixels)[of_a] + np.bincount(of_b, pixels)[of_b] - pixels
    return of_a, of_b, pixels / union


def tile_corners(height, width, side):
    """(top, left) of squares that cover a picture evenly, each sharing OVERLAP with the next."""

    def along(n):
        """Where the squares begin along one side."""
        count = max(1, math.ceil((n / side - OVERLAP) / (1 - OVERLAP)))
        return np.linspace(0, max(n - side, 0), count).round().astype(int).tolist()

    return list(itertools.product(along(height), along(width)))


def cut(image, side, corners):
    """Tiles of an H x W[ x 3] array; where it is smaller than a tile, its edge is continued."""
    short = [(0, max(side - n, 0)) for n in image.shape[:2]] + [(0, 0)] * (image.ndim - 2)
    image = np.pad(image, short, "edge")
    return [image[top : top + side, left : left + side] for top, left in corners]


def stitch(tiles, corners, shape, shared=0):
    """Join what was found tile by tile. A segment is one of those that are there already where IoU >
    0.5 in the part that both see; each pixel is taken from the tile in whose middle it lies most.

    tiles: ids (side x side) and certainty of each; shape: H, W of the whole. Ids up to `shared` mean
    the same in every tile. Returns ids (H x W, int32) and certainty."""
    whole, certainty = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    nearest, count = np.full(shape, np.inf), shared
    for (ids, sure), (top, left) in zip(tiles, corners):
        side = len(ids)
        box = np.s_[top : top + side, left : left + side]
        here, width = nearest[box].shape  # a picture may be smaller than the tile
        ids, sure = ids[:here, :width], sure[:here, :width]
        seen = np.isfinite(nearest[box])
        of_tile, of_whole, iou = ious(ids[seen], whole[box][seen]) if seen.any() else ([], [], [])
        name = {i: i for i in range(shared + 1)}
        name |= {i: k for i, k, v in zip(of_tile, of_whole, iou) if v > 0.5 and k > shared < i}
        for i in np.unique(ids):
            if i not in name:
                count += 1
                name[i] = count
        middle = np.abs(np.arange(side) - (side - 1) / 2)
        distance = np.maximum(middle[:here, None], middle[:width])
        closer = distance < nearest[box]
        table = np.array([name.get(i, 0) for i in range(ids.max() + 1)])
        for target, value in ((whole, table[ids]), (certainty, sure), (nearest, distance)):
            target[box][closer] = value[closer]
    return whole.astype(np.int32), certainty


def consensus(found, shared=0):
    """Several samples of one picture (ids and certainty of each) -> one, by majority of each pixel.

    A segment of one sample is an object of the others where IoU > 0.5 with theirs. Ids up to `shared`
    mean the same in every sample. Returns ids (int32) and the mean certainty of the majority."""
    if len(found) == 1:
        return found[0]
    maps, count = [], shared
    for ids, _ in found:
        name = {i: (1.0, i) for i in range(shared + 1)}  # of each id: IoU and id of what it is
        for other in maps:
            for i, k, v in zip(*ious(ids, other)):
                if v > max(0.5, name.get(i, (0,))[0]) and k > shared < i:
                    name[i] = v, k
        for i in np.unique(ids):
            if i not in name:
                count += 1
                name[i] = 1.0, count
        maps.append(np.array([name.get(i, (0, 0))[1] for i in range(ids.max() + 1)])[ids])
    maps = np.stack(maps)  # K x H x W
    votes = np.stack([(maps == one).sum(0) - 0.5 * (one == 0) for one in maps])  # void loses a tie
    chosen = np.take_along_axis(maps, votes.argmax(0)[None], 0)
    sure = np.stack([certainty for _, certainty in found])
    return chosen[0].astype(np.int32), sure.mean(0, where=maps == chosen)


def vote(draw, keys, pieces, votes, batch_size):
    """Let `draw` (lists of keys and pieces -> ids and certainty of each) see all pieces `votes` times,
    each time with other keys and so other noise. Returns the samples of each piece."""
    samples = [[] for _ in pieces]
    for k, n in itertools.product(range(votes), range(0, len(pieces), batch_size)):
        names = [f"{key} vote {k}" if k else key for key in keys[n : n + batch_size]]
        for i, one in enumerate(draw(names, pieces[n : n + batch_size]), n):
            samples[i].append(one)
    return samples


def in_tiles(model, pictures, keys, draw, args, shared=None):
    """Find segments of pictures of any sizes: of each ids (H x W, int32) and certainty. A model that
    was trained on crops sees them in tiles of that size, each with votes of its own.

    pictures: of each a tuple of arrays (H x W[ x 3]); draw: function of lists of keys and such tuples
    -> ids and certainty of each; shared: of each picture, up to which id ids mean the same in all.
    """
    side, shared = model.settings["crop"], shared or [0] * len(pictures)
    tiles, names, places = [], [], []
    for arrays, key in zip(pictures, keys):
        corners = tile_corners(*arrays[0].shape[:2], side) if side else [(0, 0)]
        tiles += zip(*(cut(x, side, corners) if side else [x] for x in arrays))
        names += [f"{key} at {corner}" if side else key for corner in corners]
        places.append(corners)
    samples, found = iter(vote(draw, names, tiles, args.votes, args.batch_size)), []
    for arrays, corners, known in zip(pictures, places, shared):
        joined = [consensus(next(samples), known) for _ in corners]
        shape = arrays[0].shape[:2]
        found.append(stitch(joined, corners, shape, known) if side else joined[0])
    return found


def predict(model, images, keys, args):
    """Algorithm 2 on images (list of H x W x 3, uint8): of each ids (H x W, int32) and certainty.

    keys: what the noise of each belongs to; args: steps, seed, votes, batch_size."""

    def draw(keys, tiles):
        """One sample of some tiles."""
        return diffusion.predict(model, [image for [image] in tiles], keys, args.steps, args.seed)

    return in_tiles(model, [(image,) for image in images], keys, draw, args)


@torch.no_grad()
def label(model, images, found, merge=True):
    """Id maps of images -> of each the ids and segments_info: with a classifier with category_id and
    score (`merge` makes those of one stuff category one), without all objects (category 1)."""
    if model.classifier is None:
        return [(ids, data.describe(ids)) for ids in found]
    logits = diffusion.class_logits(model, images)
    return [model.classifier.label(l, ids, merge) for l, ids in zip(logits, found)]


def segment(model, image, steps=None, seed=0, threshold=0.5, votes=1):
    """One PIL image -> ids (H x W, int32, 0 = void) and segments_info as COCO has it.

    steps: None is the model's usual number; threshold: less certain pixels become void."""
    array = data.to_rgb(ImageOps.exif_transpose(image))
    args = argparse.Namespace(steps=steps or model.settings["steps"], seed=seed, votes=votes)
    args.batch_size = 16
    ids, certainty = predict(model, [array], [""], args)[0]
    found = diffusion.keep(model, array, ids, certainty, threshold)
    return label(model, [array], [found])[0]


# ------------------------------------------------------------------- seeds, trajectory, files


def agreement(maps):
    """How far several id maps of one image agree: H x W floats in 0..1, the mean over pairs of maps
    of the IoU of the two segments that a pixel lies in; void agrees with nothing."""
    total, pairs = 0, list(itertools.combinations(maps, 2))
    for a, b in pairs:
        of_a, of_b, iou = ious(a, b)
        table = np.zeros((a.max() + 1, b.max() + 1))
        table[of_a, of_b] = iou * (of_a > 0) * (of_b > 0)
        total = total + table[a, b]
    return total / len(pairs)


def compare_seeds(model, dataset, args):
    """Fig. 10: PQ by seed and the seeds' mean agreement; a sheet of the first images."""
    by_seed, maps, pictures = {}, collections.defaultdict(list), {}

    def find(images, keys):
        """Segments of one batch, remembered."""
        found = predict(model, images, keys, args)
        for image, key, one in zip(images, keys, found):
            maps[key].append(diffusion.keep(model, image, *one))
            if len(maps) <= 6:
                pictures[key] = image
        return found

    for args.seed in args.seeds:
        by_seed[args.seed] = pq.percent(diffusion.evaluate(model, dataset, find, args)[0])
    agreed, rows = {key: agreement(found) for key, found in maps.items()}, []
    for key, image in pictures.items():
        grey = np.stack([(255 * agreed[key]).astype(np.uint8)] * 3, -1)
        rows.append([image, *(data.overlay(image, ids) for ids in maps[key]), grey])
    captions = ["image", *(f"seed {seed}" for seed in args.seeds), "agreement"]
    data.picture(f"{args.out}/seeds.png", data.sheet(rows, captions))
    mean = float(np.mean([a.mean() for a in agreed.values()]))
    for row in (["seed", *by_seed[args.seed]], *([k, *r.values()] for k, r in by_seed.items())):
        print(pq.line(row))
    print(f"mean agreement {mean:.3f} (1: the same segments everywhere) -> {args.out}/seeds.png")
    return {"agreement": mean, "by_seed": by_seed, "images": len(dataset)}


@torch.no_grad()
def draw_trajectory(model, images, keys, args):
    """Fig. S4: the estimates of z^0 over the steps, decoded, as a strip. Of a model that
    sees tiles, the first tile."""
    side, trace = model.settings["crop"], []
    images = [cut(i, side, [(0, 0)])[0] for i in images] if side else images
    image_latent = model.encode_image(diffusion.network_input(model, images))
    noise, fresh = diffusion.noises(model, image_latent, keys, args.seed)
    model.sample(image_latent, noise, args.steps, fresh, trace)
    frames = []
    for z0 in trace:
        maps = [ae.argmax(l, *i.shape[:2])[0] for l, i in zip(model.decode(z0), images)]
        frames.append([data.overlay(image, ids) for image, ids in zip(images, maps)])
    shown = sorted({round(i) for i in np.linspace(0, len(trace) - 1, 8)})
    captions = ["image"] + [f"j = {model.schedule(args.steps)[i][0]}" for i in shown]
    rows = [[image, *(frames[i][k] for i in shown)] for k, image in enumerate(images)]
    data.picture(f"{args.out}/trajectory.png", data.sheet(rows, captions))
    print(f"-> {args.out}/trajectory.png")


def find_images(path):
    """A file or a folder -> {image_id: file} of its pictures: a number where the stem is one, else the
    stem, or the name where a stem is there twice. Raises BadInput if there is none."""
    path = Path(path)
    if not path.exists():
        raise BadInput(f"--images {path}: no such file or folder")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    folders = [file for file in files if file.is_dir()]
    if folders:
        data.say_once(f"note: {path}: {len(folders)} folders in it are not looked into")
    if path.is_dir():
        readable = {s for s, f in Image.registered_extensions().items() if f in data.FORMATS}
        files = [f for f in files if f.suffix.lower() in readable and f.name[0] != "."]
        files = [f for f in files if f not in folders]
    if not files:
        raise BadInput(f"--images {path}: no picture in this folder (JPEG, PNG, TIFF, WebP, ...)")
    names = [int(file.stem) if file.stem.isdecimal() else file.stem for file in files]
    twice = collections.Counter(names)
    return {n if twice[n] == 1 else file.name: file for n, file in zip(names, files)}


def predict_files(model, files, args):
    """Segment picture files: predictions.json (COCO panoptic) and predictions/ID.png, overlays/ID.png.

    A picture that can't be read is named and left out. Returns the lines of those."""
    out, images, annotations, broken = Path(args.out), [], [], []
    mine = list(files.items())[rank() :: world()]
    for start in tqdm(range(0, len(mine), args.batch_size), disable=rank() > 0, unit="batch"):
        batch = []
        for name, file in mine[start : start + args.batch_size]:
            try:
                batch.append((name, file, data.read_image(file)))
            except BadInput as error:
                broken.append(str(error))
        pictures = [picture for _, _, picture in batch]
        if not batch:
            continue
        maps = predict(model, pictures, [name for name, _, _ in batch], args)
        kept = [diffusion.keep(model, image, *one) for image, one in zip(pictures, maps)]
        for (name, file, image), (ids, found) in zip(batch, label(model, pictures, kept)):
            data.write_id_png(out / "predictions" / f"{name}.png", ids)
            page = Image.fromarray(data.overlay(image, ids))
            data.picture(out / "overlays" / f"{name}.png", page)
            size = {"height": ids.shape[0], "width": ids.shape[1]}
            images.append({"id": name, "file_name": file.name, **size})
            entry = {"image_id": name, "file_name": f"{name}.png", "segments_info": found}
            annotations.append(entry)
    if world() > 1:
        gathered = [None] * world()
        dist.all_gather_object(gathered, (images, annotations, broken))
        images, annotations, broken = (sum(lists, []) for lists in zip(*gathered))
    if rank() == 0:
        known = model.classifier.categories if model.classifier else pq.OBJECT
        content = {"images": images, "annotations": annotations, "categories": known}
        data.write_json(out / "predictions.json", content)
    return broken


# ------------------------------------------------------------------------------- command line


def sampling_parser(doc):
    """A parser with the flags of sample.py and inpaint.py; what is not given is as in --ckpt."""
    parser = data.new_parser(doc, "out")
    add = parser.add_argument
    add("--ckpt", help="of diffusion.py (default: checkpoints/ldm.pt, else assets/shapes.pt)")
    add("--split", help="(default: the validation split that the checkpoint names)")
    add("--limit", type=data.positive, help="only the first so many images of the split")
    add("--min_area", type=data.natural, help="segments under so many px of the image become void")
    add("--votes", type=data.positive, default=1, help="sample so often (default %(default)s)")
    add("--renoise", action=argparse.BooleanOptionalAction, help="new noise at each step")
    add(
        "--snap",
        action=argparse.BooleanOptionalAction,
        help="each estimate's likeliest ids, encoded",
    )
    add("--td", type=data.amount, help="step on by so many intervals more")
    add("--paper", action="store_true", help="the algorithm exactly as printed")
    add("--batch_size", type=data.positive, default=16, help="pictures or tiles at a time")
    add("--device", default="auto", help="cuda, mps, cpu or auto (default %(default)s)")
    parser.set_defaults(precision="auto")
    return parser


def open_model(args, device):
    """The checkpoint of the flags, with what they say of sampling applied to it. Raises BadInput."""
    model = load(args.ckpt, device)
    for name in ("min_area", "renoise", "snap", "td", "postprocess"):
        if getattr(args, name, None) is not None:
            model.settings[name] = getattr(args, name)
    if args.paper:
        model.settings |= dict(
            snap=False, td=0.0, renoise=False, postprocess="paper", connected=False
        )
    return model


def open_split(model, args):
    """The held-out images of the flags, by default those that the checkpoint names. Raises BadInput."""
    s = model.settings
    args.data, split = args.data or s["data"], args.split or s["val_split"]
    source = data.open_data(args.data, split, s["size"], s["seed"], s["background"])
    return ae.HeldOut(source, args.limit)


def flags():
    """The command line."""
    parser = sampling_parser(__doc__)
    add = parser.add_argument
    add("--images", metavar="FILE_OR_FOLDER", help="segment these pictures instead of evaluating")
    add("--steps", type=data.positive, nargs="+", help="sampling steps; several make a table")
    add("--seeds", type=data.natural, nargs="+", help="compare what these seeds give")
    add("--trajectory", action="store_true", help="draw the estimates of z^0 over the steps")
    add("--postprocess", choices=["paper", "release"], help="supplement B, or the authors' rules")
    add("--compile", action="store_true", help="the UNet by torch.compile (needs a C++ compiler)")
    return parser


@data.command
def main(argv=None):
    """Command line: evaluate a split, or segment picture files."""
    args = flags().parse_args(argv)
    files = find_images(args.images) if args.images else None
    device = data.setup(args)
    model = open_model(args, device)
    if args.compile:
        model.unet.compile(mode="reduce-overhead" if device.type == "cuda" else "default")
    all_steps = args.steps or [model.settings["steps"]]
    for args.steps in all_steps:
        model.ddim.timesteps(args.steps)
    if args.seeds and (files or len(set(args.seeds)) < 2 or world() > 1):
        raise BadInput("--seeds: two or more, on a split, in one process")
    with data.autocast(args, device):
        if files:
            return segment_files(model, files, args)
        dataset = open_split(model, args)
        if args.trajectory and rank() == 0:
            first = list(itertools.islice(dataset, 4))
            keys = [s["image_id"] for s in first]
            draw_trajectory(model, [s["image"] for s in first], keys, args)
        if args.seeds:
            figures = compare_seeds(model, dataset, args)
        else:
            figures = compare_steps(model, dataset, all_steps, args)
    if args.json and rank() == 0:
        data.write_json(args.json, figures)
    data.leave()


def segment_files(model, files, args):
    """--images: segment them, and say how it went. Raises BadInput at the end if any is broken."""
    began, broken = time.time(), predict_files(model, files, args)
    done = len(files) - len(broken)
    seconds = (time.time() - began) / max(done, 1)
    if rank() == 0:
        told = f"{done} of {len(files)} pictures segmented, {seconds:.2f} s each"
        print(f"{told} -> {args.out}/predictions.json, {args.out}/overlays/")
        if args.json:
            data.write_json(args.json, {"images": done, "seconds_per_image": seconds})
        if args.trajectory and done and not broken:
            names = list(files)[:4]
            draw_trajectory(model, [data.read_image(files[n]) for n in names], names, args)
    data.leave()
    if broken:
        raise BadInput(f"{len(broken)} of {len(files)} pictures left out, the first: {broken[0]}")


def compare_steps(model, dataset, all_steps, args):
    """PQ, SQ, RQ and seconds by sampling steps: a table, a plot, pictures. Returns the figures."""
    results, out = {}, Path(args.out)

    def find(images, keys):
        """Segments of one batch."""
        return predict(model, images, keys, args)

    for args.steps in all_steps:
        began = time.time()
        result, rows = diffusion.evaluate(model, dataset, find, args)
        seconds = (time.time() - began) / len(dataset)
        results[args.steps] = {**pq.percent(result), "seconds_per_image": seconds}
        if rank() == 0:
            if len(results) == 1:
                print(
                    f"{len(dataset)} images, seed {args.seed}\n"
                    + pq.line(["steps", *result, "s/image"])
                )
            print(pq.line([args.steps, *pq.percent(result).values(), f"{seconds:.3f}"]), flush=True)
    if rank() == 0:
        data.picture(out / "sample.png", data.sheet(rows, diffusion.COLUMNS))
        if len(results) > 1:
            curves = {k: [(s, r[k] or 0) for s, r in results.items()] for k in ("pq", "sq", "rq")}
            data.plot(out / "sample_steps.png", curves, "sampling steps", "percent")
        print(f"-> {out / 'sample.png'}")
    return {**results[args.steps], "images": len(dataset), "by_steps": results}


if __name__ == "__main__":
    main()

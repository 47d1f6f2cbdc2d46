"""sample.py: from an image to its segments with a trained model (paper 3.2, 4.1; supplement B).

    python sample.py                                   # evaluate the checkpoint's split: PQ, SQ, RQ
    python sample.py --steps 1 2 4 10 50               # a table over sampling steps (Fig. 9, left)
    python sample.py --votes 4                         # sample four times and let the samples vote
    python sample.py --seeds 0 1 2 3 --limit 6         # where do several seeds agree? (Fig. 10)
    python sample.py --images photo.jpg --trajectory   # any picture, or a folder (Fig. S4)
    python sample.py --ckpt assets/nuclei.pt --images tile.jpg   # nuclei, pictures of any size
    torchrun --nproc_per_node=8 sample.py              # evaluate on eight GPUs

Algorithm 2 itself is `LDM.sample`; here are pictures, tiles for models of crops, and votes.
From Python:  model = load();  ids, segments_info = segment(model, Image.open("photo.jpg"))"""

import argparse
import itertools
import math
from pathlib import Path

import data  # before torch: it sets what PyTorch reads on loading
import numpy as np
import torch
from PIL import Image, ImageOps

import ae
import diffusion
import pq
from data import BadInput

OVERLAP = 0.25  # share of a tile's side that the next one sees too


def load(path=None, device="cpu", paper=False, min_area=None):
    """path (None: checkpoints/ldm.pt, else assets/shapes.pt) -> LDM in eval mode. paper: leave out
    what goes beyond supplement B after sampling; min_area: as of `ae.keep`. Raises BadInput."""
    if path is None:
        path = Path("checkpoints/ldm.pt")
        if not path.is_file():
            path = Path(__file__).parent / "assets" / "shapes.pt"
            data.say_once("no checkpoints/ldm.pt yet: using the shipped assets/shapes.pt")
    changes = {"postprocess": "paper", "connected": False} if paper else {}
    if min_area is not None:
        changes["min_area"] = min_area
    return diffusion.load_ldm(path, **changes).to(device, memory_format=torch.channels_last)


# ------------------------------------------------------- tiles and votes (beyond the paper)
def cut(image, side):
    """Squares that cover an H x W x C array evenly: {(top, left): tile}; side 0: one, all of it."""
    if not side:
        return {(0, 0): image}
    places = []  # by rows, then by columns: the pixels of each tile
    for n in image.shape[:2]:
        count = max(1, math.ceil((n / side - OVERLAP) / (1 - OVERLAP)))
        starts = np.linspace(0, max(n - side, 0), count).round().astype(int)
        places.append((starts[:, None] + np.arange(side)).clip(max=n - 1))  # an edge goes on
    pairs = itertools.product(*places)
    return {(int(rows[0]), int(cols[0])): image[np.ix_(rows, cols)] for rows, cols in pairs}


def ious(a, b):
    """IoU of each pair of ids of two maps that share pixels: id of a, id of b, IoU (P each)."""
    of_a, of_b, pixels = pq.overlaps(a, b)
    union = np.bincount(of_a, pixels)[of_a] + np.bincount(of_b, pixels)[of_b] - pixels
    return of_a, of_b, pixels / union


def name_after(others, ids, used):
    """A map (H x W) whose segments get the id of another map's where IoU > 0.5, else new ones.
    others: such maps, -1 where nothing is known; used: new ids are above it."""
    names = used + np.cumsum(np.bincount(ids.ravel()) > 0)  # all new, until one fits
    best = np.full(len(names), 0.5)
    for other in others:
        seen = other >= 0
        for i, k, iou in zip(*ious(ids[seen], other[seen])):
            if k and iou > best[i]:
                best[i], names[i] = iou, k
    names[0] = 0
    return names[ids]


def stitch(found, shape):
    """Join tiles: {(top, left): (ids, certainty)} -> ids and certainty of the whole, of a shape."""
    whole, certainty = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    backgrounds = []  # the largest segment of each tile
    for (top, left), (ids, sure) in found.items():
        box = np.s_[top : top + ids.shape[0], left : left + ids.shape[1]]
        before = whole[box]
        height, width = before.shape  # a tile may be larger than the picture
        ids = name_after([before], ids[:height, :width], max(0, whole.max()))
        area = data.areas(ids)
        largest = max(area, key=area.get, default=-1)  # -1: all of the tile is void
        for other in backgrounds:  # one where the larger part of what is shared is
            here = before == other
            if other > 0 and 2 * (here & (ids == largest)).sum() > here.sum() > 0:
                whole[whole == other] = largest
        backgrounds.append(largest)
        # of what it shares with the tiles above and on the left, the half that is nearer is its own
        above, beside = (before[:, -1] >= 0).sum() // 2, (before[-1] >= 0).sum() // 2
        own = np.s_[above:height, beside:width]
        whole[box][own], certainty[box][own] = ids[own], sure[own]
    return whole, certainty


def consensus(found):
    """Several samples of a picture (ids, certainty) -> one: of each pixel what most say."""
    maps, used = [], 0
    for ids, _ in found:
        maps.append(name_after(maps, ids, used))
        used = max(used, maps[-1].max())
    maps = np.stack(maps)  # K x H x W
    votes = np.stack([(maps == one).sum(0) - 0.5 * (one == 0) for one in maps])  # void loses a tie
    chosen = np.take_along_axis(maps, votes.argmax(0)[None], 0)  # 1 x H x W
    sure = np.stack([certainty for _, certainty in found])  # K x H x W
    return chosen[0].astype(np.int32), sure.mean(0, where=maps == chosen)


def predict(model, samples, args, draw=diffusion.predict):
    """`draw` in tiles, where the model was trained on crops, and with votes: of each sample its ids
    (H x W, int32) and certainty. args: steps, seed, votes, batch_size. Images of any channels."""
    cuts = [cut(s["image"], model.settings["crop"]) for s in samples]
    tiles, drawn = [], []
    for (s, of_image), vote in itertools.product(zip(samples, cuts), range(args.votes)):
        for corner, tile in of_image.items():
            # each tile and vote has noise of its own, the first that of the image itself
            place = f" at {corner} vote {vote}" if any((*corner, vote)) else ""
            tiles.append({"image": tile, "image_id": f"{s['image_id']}{place}"})
    for n in range(0, len(tiles), args.batch_size):
        drawn += draw(model, tiles[n : n + args.batch_size], args)
    rest = iter(drawn)  # by picture, vote and tile, as they were put in
    for s, of_image in zip(samples, cuts):
        found = [dict(zip(of_image, rest)) for _ in range(args.votes)]
        yield consensus([stitch(of_vote, s["image"].shape[:2]) for of_vote in found])


def find(model, samples, args, threshold=0.5):
    """`predict`, then segments that are uncertain or small become void: of each its ids."""
    min_area = model.settings["min_area"]
    return [ae.keep(*found, min_area, threshold) for found in predict(model, samples, args)]


def segment(model, image, steps=None, seed=0, threshold=0.5, votes=1):
    """One PIL image -> ids (H x W, int32, 0 = void) and segments_info as COCO has it.
    steps: None is the model's usual number; threshold: less certain pixels become void."""
    array, steps = data.to_rgb(ImageOps.exif_transpose(image)), steps or model.settings["steps"]
    args = argparse.Namespace(steps=steps, seed=seed, votes=votes, batch_size=16)
    [ids] = find(model, [{"image": array, "image_id": ""}], args, threshold)
    return model.label(array, ids)


# ---------------------------------------------------------------------------- picture files
class Pictures:
    """--images, a file or a folder, as a source of samples. image_id: the stem, a number if it is
    one, or the name if a stem is there again. Raises BadInput if there is none."""

    def __init__(self, path):
        path, formats, found = Path(path), Image.registered_extensions(), {}
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            picture = formats.get(file.suffix.lower()) in data.FORMATS and file.name[0] != "."
            if file.is_file() and (picture or file == path):
                # COCO's image ids are numbers, its file names 000000000042.jpg
                name = int(file.stem) if file.stem.isdecimal() else file.stem
                found[file.name if name in found else name] = file
        self.files = list(found.items())
        if not found:
            raise BadInput(f"--images {path}: no picture there (JPEG, PNG, TIFF, WebP, ...)")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        name, file = self.files[index]
        return {"image_id": name, "file_name": file.name, "image": data.read_image(file)}


def segment_files(model, dataset, args):
    """--images: writes predictions.json (COCO panoptic), predictions/ID.png, overlays/ID.png."""
    images, annotations, samples = [], [], iter(dataset)
    while batch := list(itertools.islice(samples, args.batch_size)):
        for s, ids in zip(batch, find(model, batch, args)):
            name, (ids, segments) = s["image_id"], model.label(s["image"], ids)
            data.write_id_png(f"{args.out}/predictions/{name}.png", ids)
            data.write(f"{args.out}/overlays/{name}.png", data.overlay(s["image"], ids))
            height, width = ids.shape
            images.append(dict(id=name, file_name=s["file_name"], height=height, width=width))
            annotations.append(dict(image_id=name, file_name=f"{name}.png", segments_info=segments))
    categories = model.classifier.categories if model.classifier else pq.OBJECT
    content = {"images": images, "annotations": annotations, "categories": categories}
    data.write(f"{args.out}/predictions.json", content)
    print(f"{len(images)} pictures -> {args.out}/predictions.json and overlays/")
    return {"images": len(images)}


# ------------------------------------------------------------------ evaluation, seeds, trajectory
def compare_steps(model, dataset, all_steps, args):
    """PQ, SQ, RQ by sampling steps (Fig. 9, left): table, plot, pictures."""
    results = {}
    for args.steps in all_steps:
        figures, rows = diffusion.evaluate(model, dataset, predict, args)
        if data.RANK == 0:
            if not results:
                print(pq.line(["steps", *figures]))
            print(pq.line([args.steps, *figures.values()]), flush=True)
        results[args.steps] = figures
    if data.RANK == 0:
        data.sheet(f"{args.out}/sample.png", rows, diffusion.COLUMNS)
        if len(results) > 1:
            curve = [(steps, result["pq"] or 0) for steps, result in results.items()]
            data.plot(f"{args.out}/sample_steps.png", {"PQ": curve}, "sampling steps", "PQ")
        print(f"{len(dataset)} images -> {args.out}/sample.png")
    return {**results[args.steps], "by_steps": results}


def agreement(maps):
    """How far several id maps of one image agree: H x W floats in 0..1, the mean over pairs of maps
    of the IoU of the two segments that a pixel lies in; void agrees with nothing."""
    by_pair = []
    for a, b in itertools.combinations(maps, 2):
        of_a, of_b, iou = ious(a, b)
        table = np.zeros((a.max() + 1, b.max() + 1))
        table[of_a, of_b] = iou
        by_pair.append(table[a, b] * (a > 0) * (b > 0))  # H x W
    return np.mean(by_pair, 0)


def compare_seeds(model, dataset, args):
    """Fig. 10: how far what several seeds find agrees, and a sheet of the first images."""
    means, rows = [], []
    for sample in dataset:  # one at a time, or the maps of all seeds would have to be kept
        image, maps = sample["image"], []
        for args.seed in args.seeds:
            maps += find(model, [sample], args)
        agreed = agreement(maps)
        means.append(agreed.mean())
        if len(rows) < 6:
            found = [data.overlay(image, ids) for ids in maps]
            rows.append([image, *found, (255 * agreed).astype(np.uint8)])
    captions = ["image", *(f"seed {seed}" for seed in args.seeds), "agreement"]
    data.sheet(f"{args.out}/seeds.png", rows, captions)
    mean = float(np.mean(means))
    print(f"mean agreement {mean:.3f} (1: the same segments everywhere) -> {args.out}/seeds.png")
    return {"agreement": mean, "images": len(means)}


def draw_trajectory(model, samples, args):
    """Fig. S4: the estimates of z^0 over the steps, decoded; of a tiled picture the first tile."""
    tiles = [s | {"image": cut(s["image"], model.settings["crop"])[0, 0]} for s in samples]
    image_latent, (noise, _) = model.inputs(tiles, args.seed)
    rows, captions, trace = [[tile["image"]] for tile in tiles], ["image"], []
    model.sample(image_latent, noise, args.steps, trace)
    columns = min(len(trace), 8)  # more could not be made out
    for i in np.linspace(0, len(trace) - 1, columns).round().astype(int):
        captions.append(f"j = {model.ddim.timesteps(args.steps)[i][0]}")
        for row, logits in zip(rows, model.decode(trace[i])):
            ids, _ = diffusion.segments(model, logits, *row[0].shape[:2])
            row.append(data.overlay(row[0], ids))
    data.sheet(f"{args.out}/trajectory.png", rows, captions)
    print(f"-> {args.out}/trajectory.png")


# ------------------------------------------------------------------------------- command line
def sampling_parser(doc):
    """A parser with the flags of sample.py and inpaint.py; what is not given is as in --ckpt."""
    parser = data.Parser(doc, "out")
    flag = parser.flag
    flag("--ckpt", str, "of diffusion.py (default: checkpoints/ldm.pt, else assets/shapes.pt)")
    flag("--split", str, "(default: the validation split that the checkpoint names)")
    flag("--limit", data.positive, "only so many images, the first")
    flag("--min_area", data.natural, "segments of fewer pixels become void")
    flag("--votes", data.positive, "sample so often (default %(default)s)", default=1)
    flag("--paper", bool, "the algorithm exactly as printed")
    flag("--batch_size", data.positive, "pictures or tiles at a time", default=16)
    flag("--device", str, "cuda, mps, cpu or auto (default %(default)s)", default="auto")
    parser.set_defaults(precision="auto", images=None)  # asked for, flag or not
    return parser


def open_split(model, args):
    """The images of the flags, else those that the checkpoint names. Raises BadInput."""
    s = model.settings
    if args.images:
        return ae.HeldOut(Pictures(args.images), args.limit)
    folder, split = args.data or s["data"], args.split or s["val_split"]
    return ae.HeldOut(data.open_data(folder, split, s["size"], s["seed"]), args.limit)


@data.command
def main(argv=None):
    """Command line: evaluate a split, or segment picture files."""
    parser = sampling_parser(__doc__)
    flag = parser.flag
    flag("--images", str, "segment these pictures instead of evaluating", metavar="FILE_OR_FOLDER")
    flag("--steps", data.positive, "sampling steps; several make a table", nargs="+")
    flag("--seeds", data.natural, "compare what these seeds give", nargs="+")
    flag("--trajectory", bool, "draw the estimates of z^0 over the steps")
    args = parser.parse_args(argv)
    if data.WORLD > 1 and (args.images or args.seeds or args.trajectory):
        raise BadInput("torchrun only evaluates: no --images, --seeds or --trajectory with it")
    if args.seeds and len(set(args.seeds)) < 2:
        raise BadInput("--seeds: give two or more")
    device, mixed = data.setup(args)
    model = load(args.ckpt, device, args.paper, args.min_area)
    all_steps = args.steps or [model.settings["steps"]]
    args.steps = all_steps[-1]  # for what compares none
    with mixed:
        samples = open_split(model, args)
        if args.trajectory:
            draw_trajectory(model, list(itertools.islice(samples, 4)), args)
        if args.seeds:
            figures = compare_seeds(model, samples, args)
        elif args.images:
            figures = segment_files(model, samples, args)
        else:
            figures = compare_steps(model, samples, all_steps, args)
    data.write(args.json, figures)
    if args.images and samples.broken:  # only now: what could be read is written
        raise BadInput(f"{len(samples.broken)} pictures left out, the first: {samples.broken[0]}")


if __name__ == "__main__":
    main()

"""sample.py: from an image to its segments with a trained model (paper 3.2, 4.1; supplement B).

    python sample.py                                   # evaluate the checkpoint's split: PQ, SQ, RQ
    python sample.py --steps 1 2 4 10 50               # a table over sampling steps (Fig. 9, left)
    python sample.py --votes 4                         # sample four times and let the samples vote
    python sample.py --seeds 0 1 2 3 --limit 6         # where do several seeds agree? (Fig. 10)
    python sample.py --images photo.jpg --trajectory   # any picture, or a folder (Fig. S4)
    python sample.py --ckpt assets/nuclei.pt --images tile.jpg   # nuclei, pictures of any size
    torchrun --nproc_per_node=8 sample.py              # evaluate on eight GPUs

Algorithm 2 itself is `LDM.sample` in diffusion.py. Here are its inputs and outputs, the tiles in
which a model that was trained on crops sees larger pictures, and votes.
From Python:  model = load();  ids, segments_info = segment(model, Image.open("photo.jpg"))
"""

import argparse
import itertools
import math
import time
from pathlib import Path

import data  # before torch: it sets what PyTorch reads on loading
import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import ae
import diffusion
import pq
from data import BadInput, rank, world

OVERLAP = 0.25  # share of a tile's side that the next one sees too


def load(path=None, device="cpu", paper=False, min_area=None):
    """Checkpoint of diffusion.py, or the authors' -> LDM in eval mode. Raises BadInput.
    path: None is checkpoints/ldm.pt, before any training the shipped assets/shapes.pt; paper: leave
    out what goes beyond supplement B after sampling; min_area: as of `ae.keep`."""
    if path is None:
        path = Path("checkpoints/ldm.pt")
        if not path.is_file():
            path = Path(__file__).parent / "assets" / "shapes.pt"
            data.say_once("no checkpoints/ldm.pt yet: using the shipped assets/shapes.pt")
    model = diffusion.load_ldm(path).to(device, memory_format=torch.channels_last)
    if paper:
        model.settings |= {"postprocess": "paper", "connected": False}
    if min_area is not None:
        model.settings["min_area"] = min_area
    return model


# ------------------------------------------------------- tiles and votes (beyond the paper)


def cut(image, side):
    """Squares that cover an H x W x C array evenly: {(top, left): tile}; side 0: one, all of it."""
    if not side:
        return {(0, 0): image}
    places = []  # by rows, then by columns: the pixels of each tile
    for n in image.shape[:2]:
        count = max(1, math.ceil((n / side - OVERLAP) / (1 - OVERLAP)))
        starts = np.linspace(0, max(n - side, 0), count).round().astype(int)
        tiles = starts[:, None] + np.arange(side)  # count x side
        places.append(tiles.clip(max=n - 1))  # a smaller picture's edge is continued
    pairs = itertools.product(*places)
    return {(int(rows[0]), int(cols[0])): image[np.ix_(rows, cols)] for rows, cols in pairs}


def ious(a, b):
    """IoU of each pair of ids of two maps that share pixels: id of a, id of b, IoU (P each)."""
    of_a, of_b, pixels = pq.overlaps(a, b)
    union = np.bincount(of_a, pixels)[of_a] + np.bincount(of_b, pixels)[of_b] - pixels
    return of_a, of_b, pixels / union


def name_after(others, ids, used, shared):
    """A map (H x W) whose segments get the id of another map's where IoU > 0.5, else new ones.
    others: such maps, -1 where nothing is known; used: new ids are above it; ids up to `shared`
    mean the same everywhere and stay."""
    own = np.maximum(ids - shared, 0)  # 0 where the id is void or shared
    names = used + np.cumsum(np.bincount(own.ravel()) > 0)  # all new, until one fits
    best = np.full(len(names), 0.5)
    for other in others:
        seen = other >= 0
        for i, k, iou in zip(*ious(own[seen], np.maximum(other[seen] - shared, 0))):
            if i and k and iou > best[i]:
                best[i], names[i] = iou, shared + k
    return np.where(own > 0, names[own], ids)


def stitch(found, shape, shared=0):
    """Join what was found tile by tile: {(top, left): (ids, certainty)} -> ids (H x W, int32) and
    certainty. shape: H, W; shared: as in `name_after`."""
    whole, certainty = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    backgrounds = []  # the largest segment of each tile
    for (top, left), (ids, sure) in found.items():
        box = np.s_[top : top + ids.shape[0], left : left + ids.shape[1]]
        before = whole[box]
        height, width = before.shape  # a tile may be larger than the picture
        ids = name_after([before], ids[:height, :width], max(shared, whole.max()), shared)
        area = data.areas(ids)
        largest = max(area, key=area.get, default=-1)  # -1: all of the tile is void
        for other in backgrounds:  # one where the larger part of what is shared is
            here = before == other
            if other > shared and 2 * (here & (ids == largest)).sum() > here.sum() > 0:
                whole[whole == other] = largest
        backgrounds.append(largest)
        # of what it shares with the tiles above and on the left, the half that is nearer is its own
        above, beside = (before[:, -1] >= 0).sum() // 2, (before[-1] >= 0).sum() // 2
        own = np.s_[above:height, beside:width]
        whole[box][own], certainty[box][own] = ids[own], sure[own]
    return whole, certainty


def consensus(found, shared=0):
    """Several samples of one picture (ids and certainty of each) -> one, by majority of each pixel:
    ids (H x W, int32) and the mean certainty of the majority."""
    maps, used = [], shared
    for ids, _ in found:
        maps.append(name_after(maps, ids, used, shared))
        used = max(used, maps[-1].max())
    maps = np.stack(maps)  # K x H x W
    votes = np.stack([(maps == one).sum(0) - 0.5 * (one == 0) for one in maps])  # void loses a tie
    chosen = np.take_along_axis(maps, votes.argmax(0)[None], 0)  # 1 x H x W
    sure = np.stack([certainty for _, certainty in found])  # K x H x W
    return chosen[0].astype(np.int32), sure.mean(0, where=maps == chosen)


def predict(model, images, keys, args, draw=diffusion.predict, shared=0):
    """Segments of images (list of H x W x 3, uint8) by Algorithm 2: of each ids (H x W, int32) and
    certainty. A model that was trained on crops sees larger pictures in tiles of that size.
    keys: what the noise of each belongs to; args: steps, seed, votes, batch_size; draw: in place of
    `diffusion.predict`, for arrays of any channels; shared: as in `name_after`."""
    cuts = [cut(image, model.settings["crop"]) for image in images]
    names, tiles, drawn, results = [], [], [], []
    for (key, of_image), vote in itertools.product(zip(keys, cuts), range(args.votes)):
        # each tile and vote has noise of its own, the first that of the image itself
        names += [f"{key} at {c} vote {vote}" if any((*c, vote)) else key for c in of_image]
        tiles += of_image.values()
    for n in range(0, len(tiles), args.batch_size):
        batch = np.s_[n : n + args.batch_size]
        drawn += draw(model, tiles[batch], names[batch], args)
    rest = iter(drawn)  # by picture, vote and tile, as they were put in
    for image, of_image in zip(images, cuts):
        found = [dict(zip(of_image, rest)) for _ in range(args.votes)]
        stitched = [stitch(of_vote, image.shape[:2], shared) for of_vote in found]
        results.append(consensus(stitched, shared))
    return results


def find(model, images, keys, args, threshold=0.5):
    """`predict`, then segments that are uncertain or small become void: of each its ids."""
    found, min_area = predict(model, images, keys, args), model.settings["min_area"]
    return [ae.keep(ids, certainty, min_area, threshold) for ids, certainty in found]


def segment(model, image, steps=None, seed=0, threshold=0.5, votes=1):
    """One PIL image -> ids (H x W, int32, 0 = void) and segments_info as COCO has it.
    steps: None is the model's usual number; threshold: less certain pixels become void."""
    array, steps = data.to_rgb(ImageOps.exif_transpose(image)), steps or model.settings["steps"]
    args = argparse.Namespace(steps=steps, seed=seed, votes=votes, batch_size=16)
    [ids] = find(model, [array], [""], args, threshold)
    return model.label(array, ids)


# ---------------------------------------------------------------------------- picture files


def find_images(path):
    """A file or a folder -> {image_id: file} of its pictures: a number where the stem is one, else
    the stem, or the name where a stem is there again. Raises BadInput if there is none."""
    path, formats, found = Path(path), Image.registered_extensions(), {}
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        picture = formats.get(file.suffix.lower()) in data.FORMATS and file.name[0] != "."
        if file.is_file() and (picture or file == path):
            # COCO's image ids are numbers, its file names 000000000042.jpg
            name = int(file.stem) if file.stem.isdecimal() else file.stem
            found[file.name if name in found else name] = file
    if not found:
        raise BadInput(f"--images {path}: no picture there (JPEG, PNG, TIFF, WebP, ...)")
    return found


def segment_files(model, files, args):
    """--images: writes predictions.json (COCO panoptic), predictions/ID.png and overlays/ID.png.
    Raises BadInput at the end if a picture could not be read."""
    images, annotations, broken, began = [], [], [], time.time()

    def readable():
        """Names and pictures of the files that can be read."""
        for name, file in tqdm(files.items(), unit="image"):
            try:
                yield name, data.read_image(file)
            except BadInput as error:  # it must not cost the others
                broken.append(error)

    pictures = readable()
    while batch := dict(itertools.islice(pictures, args.batch_size)):
        found = find(model, list(batch.values()), list(batch), args)
        for (name, picture), ids in zip(batch.items(), found):
            ids, segments = model.label(picture, ids)
            data.write_id_png(f"{args.out}/predictions/{name}.png", ids)
            overlay = Image.fromarray(data.overlay(picture, ids))
            data.write(f"{args.out}/overlays/{name}.png", overlay)
            size = dict(zip(("height", "width"), ids.shape))
            images.append({"id": name, "file_name": files[name].name, **size})
            entry = {"image_id": name, "file_name": f"{name}.png", "segments_info": segments}
            annotations.append(entry)
    categories = model.classifier.categories if model.classifier else pq.OBJECT
    content = {"images": images, "annotations": annotations, "categories": categories}
    data.write(f"{args.out}/predictions.json", content)
    print(f"{len(images)} of {len(files)} pictures -> {args.out}/predictions.json and overlays/")
    if broken:  # only now: what could be read is written
        raise BadInput(f"{len(broken)} of {len(files)} pictures left out, the first: {broken[0]}")
    return {"images": len(images), "seconds_per_image": (time.time() - began) / len(images)}


# ------------------------------------------------------------------ evaluation, seeds, trajectory


def compare_steps(model, dataset, all_steps, args):
    """PQ, SQ, RQ and seconds by sampling steps (Fig. 9, left): table, plot, pictures."""
    results = {}
    for args.steps in all_steps:
        began = time.time()
        figures, rows = diffusion.evaluate(model, dataset, predict, args)
        seconds = (time.time() - began) / len(dataset)
        if rank() == 0:
            if not results:
                print(pq.line(["steps", *figures, "s/image"]))
            print(pq.line([args.steps, *figures.values(), f"{seconds:.3f}"]), flush=True)
        results[args.steps] = {**figures, "seconds_per_image": seconds}
    if rank() == 0:
        data.write(f"{args.out}/sample.png", data.sheet(rows, diffusion.COLUMNS))
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
            maps += find(model, [image], [sample["image_id"]], args)
        agreed = agreement(maps)
        means.append(agreed.mean())
        if len(rows) < 6:
            found = [data.overlay(image, ids) for ids in maps]
            rows.append([image, *found, (255 * agreed).astype(np.uint8)])
    captions = ["image", *(f"seed {seed}" for seed in args.seeds), "agreement"]
    data.write(f"{args.out}/seeds.png", data.sheet(rows, captions))
    mean = float(np.mean(means))
    print(f"mean agreement {mean:.3f} (1: the same segments everywhere) -> {args.out}/seeds.png")
    return {"agreement": mean, "images": len(means)}


def draw_trajectory(model, samples, args):
    """Fig. S4: the estimates of z^0 over the steps, decoded; of a tiled picture the first tile."""
    pictures = [cut(sample["image"], model.settings["crop"])[0, 0] for sample in samples]
    keys, trace = [sample["image_id"] for sample in samples], []
    image_latent = model.encode_pictures(pictures)
    noise = model.noise(args.seed, keys, image_latent)  # B x 4 x h x w
    model.sample(image_latent, noise, args.steps, trace)
    rows, captions = [[picture] for picture in pictures], ["image"]
    columns = min(len(trace), 8)  # more could not be made out
    for i in np.linspace(0, len(trace) - 1, columns).round().astype(int):
        captions.append(f"j = {model.schedule(args.steps)[i][0]}")
        for row, logits in zip(rows, model.decode(trace[i])):
            ids, _ = diffusion.segments(model, logits, *row[0].shape[:2])
            row.append(data.overlay(row[0], ids))
    data.write(f"{args.out}/trajectory.png", data.sheet(rows, captions))
    print(f"-> {args.out}/trajectory.png")


# ------------------------------------------------------------------------------- command line


def sampling_parser(doc):
    """A parser with the flags of sample.py and inpaint.py; what is not given is as in --ckpt."""
    parser = data.new_parser(doc, "out")
    add = parser.add_argument
    add("--ckpt", help="of diffusion.py (default: checkpoints/ldm.pt, else assets/shapes.pt)")
    add("--split", help="(default: the validation split that the checkpoint names)")
    add("--limit", type=data.positive, help="only the first so many images of the split")
    add("--min_area", type=data.natural, help="segments of fewer pixels become void")
    add("--votes", type=data.positive, default=1, help="sample so often (default %(default)s)")
    add("--paper", action="store_true", help="the algorithm exactly as printed")
    add("--batch_size", type=data.positive, default=16, help="pictures or tiles at a time")
    add("--device", default="auto", help="cuda, mps, cpu or auto (default %(default)s)")
    parser.set_defaults(precision="auto")  # what `data.autocast` asks for
    return parser


def open_split(model, args):
    """The held-out images of the flags, else of the checkpoint. Raises BadInput."""
    s = model.settings
    folder, split = args.data or s["data"], args.split or s["val_split"]
    source = data.open_data(folder, split, s["size"], s["seed"])
    return ae.HeldOut(source, args.limit)


def flags():
    """The command line."""
    parser = sampling_parser(__doc__)
    add = parser.add_argument
    add("--images", metavar="FILE_OR_FOLDER", help="segment these pictures instead of evaluating")
    add("--steps", type=data.positive, nargs="+", help="sampling steps; several make a table")
    add("--seeds", type=data.natural, nargs="+", help="compare what these seeds give")
    add("--trajectory", action="store_true", help="draw the estimates of z^0 over the steps")
    return parser


@data.command
def main(argv=None):
    """Command line: evaluate a split, or segment picture files."""
    args = flags().parse_args(argv)
    files = find_images(args.images) if args.images else {}
    if world() > 1 and (files or args.seeds or args.trajectory):
        raise BadInput("torchrun only evaluates: no --images, --seeds or --trajectory with it")
    if args.seeds and (files or len(set(args.seeds)) < 2):
        raise BadInput("--seeds: give two or more, and no --images")
    device = data.setup(args)
    model = load(args.ckpt, device, args.paper, args.min_area)
    all_steps = args.steps or [model.settings["steps"]]
    args.steps = all_steps[-1]  # for what compares none
    with data.autocast(args, device):
        if files:
            figures = segment_files(model, files, args)
            samples = ({"image_id": n, "image": data.read_image(f)} for n, f in files.items())
        else:
            samples = open_split(model, args)
            if args.seeds:
                figures = compare_seeds(model, samples, args)
            else:
                figures = compare_steps(model, samples, all_steps, args)
        if args.trajectory:
            draw_trajectory(model, list(itertools.islice(samples, 4)), args)
    if args.json and rank() == 0:
        data.write(args.json, figures)
    data.leave()


if __name__ == "__main__":
    main()

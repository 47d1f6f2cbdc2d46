"""sample.py: segment images with a trained model (3.2, 4.1; supplement B).

    python sample.py                                  # evaluate: PQ, SQ, RQ
    python sample.py --steps 1 2 5 10 20 50           # over sampling steps (Fig. 9)
    python sample.py --seeds 0 1 2 3 --limit 6        # where do seeds agree? (Fig. 10)
    python sample.py --images photo.jpg --trajectory  # pictures, or folders (Fig. S4)
    python sample.py --ckpt assets/nuclei.pt --images tile.jpg
    torchrun --nproc_per_node=8 sample.py             # evaluate on eight GPUs

Algorithm 2 itself is `LDM.sample` in diffusion.py. From Python:

    from sample import load, segment
    ids, segments_info = segment(load(), "photo.jpg")
"""

import functools
import itertools
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import data  # before torch: sets a variable that PyTorch reads on import
import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

import ae
import diffusion
import pq
from data import BadInput, flag, fraction, natural, nonempty, positive
from pq import VOID


# ----------------------------------------------------------------------------- settings
@dataclass
class SamplingSettings:
    """What sample.py and inpaint.py have in common."""

    ckpt: str = flag(
        None,
        "of diffusion.py (default: checkpoints/ldm.pt, else assets/shapes.pt)",
        nonempty,
    )
    data: str = flag(
        None, "'shapes' or a folder (default: as the checkpoint)", nonempty
    )
    split: str = flag(None, "(default: the checkpoint's validation split)", nonempty)
    limit: int = flag(None, "only so many pictures, the first ones", positive)
    seed: int = flag(0, "of all that is random", natural)
    device: str = flag(
        "auto", "cuda, mps, cpu, or auto for the first that is there", nonempty
    )
    out: str = flag("out", "folder to write to", nonempty)
    precision: str = "auto"
    images: list = None
    keep_crowds: bool = False
    batch_size: int = 16  # pictures or tiles at a time


@dataclass
class Settings(SamplingSettings):
    """The settings of sample.py."""

    images: list = flag(
        None,
        "segment these pictures or folders instead of evaluating",
        nonempty,
        nargs="+",
    )
    keep_crowds: bool = flag(False, "treat objects with iscrowd 1 like others", bool)
    steps: list = flag(
        None,
        "sampling steps, several for a table (default: as the checkpoint)",
        positive,
        nargs="+",
    )
    seeds: list = flag(None, "compare the segments of these seeds", natural, nargs="+")
    trajectory: bool = flag(False, "also draw the estimates of z^0, step by step", bool)
    min_area: int = flag(
        None,
        "segments of fewer pixels become void (default: as the checkpoint)",
        natural,
    )
    min_score: float = flag(
        None,
        "segments of a lower mean probability become void (default: as the checkpoint)",
        fraction,
    )
    batch_size: int = flag(16, "pictures or tiles at a time", positive)


# --------------------------------------------------------------------- load and segment
def load(path=None, device="cpu", min_area=None, min_score=None):
    """Load a model for sampling from a checkpoint of diffusion.py or of the authors.

    path: by default checkpoints/ldm.pt, or else the shipped assets/shapes.pt; device: a
    torch.device, or a name as for --device; min_area: see `ae.void_uncertain`,
    min_score: see `doubt`, by default the checkpoint's. Raises BadInput.
    """
    assets = Path(__file__).parent / "assets"
    if path is None:
        path = "checkpoints/ldm.pt"
        if not os.path.isfile(path):
            path = assets / "shapes.pt"
            data.say_once(
                "note: no checkpoints/ldm.pt yet: using the shipped shapes.pt"
            )
    elif not os.path.isfile(path) and Path(path).parts[:1] == ("assets",):
        path = assets.parent / path  # the shipped weights, from any folder
    device = data.choose_device(str(device))
    changes = {"min_area": min_area, "min_score": min_score}
    changes = {name: value for name, value in changes.items() if value is not None}
    model = diffusion.load_model(path, **changes)
    return model.to(device, memory_format=torch.channels_last)


@torch.no_grad()
def sample_batch(model, samples, steps, seed, batch_size):
    """Algorithm 2 on samples (image: H x W x 3): (ids, probability) for each."""
    draw = functools.partial(diffusion.sample_maps, steps=steps, seed=seed)
    with data.sampling_autocast(model.unet.device):
        if model.settings["crop"]:  # beyond the paper
            found = list(sample_in_tiles(model, samples, draw, batch_size=batch_size))
        else:
            found = draw(model, samples)
    if model.settings["min_score"] > 0:  # beyond the paper
        found = [(ids, doubt(ids, p, model.settings["min_score"])) for ids, p in found]
    return found


def segment(model, image, steps=None, seed=0, threshold=0.5):
    """Segment one image: a path, a PIL image, or an array (H x W x 3, uint8).

    steps: of sampling, by default the model's; threshold: pixels of a lower probability
    become void. Returns ids (H x W, int32, 0 = void) and segments_info.
    """
    if isinstance(image, (str, os.PathLike)):
        array = data.read_image(image)
    elif isinstance(image, Image.Image):
        array = data.to_rgb(ImageOps.exif_transpose(image))
    else:
        array = np.asarray(image)
    steps = steps or model.settings["steps"]
    samples = [{"image": array, "image_id": ""}]
    [found] = sample_batch(model, samples, steps=steps, seed=seed, batch_size=16)
    ids = ae.void_uncertain(*found, model.settings["min_area"], threshold)
    return diffusion.label(model, array, ids)


# ------------------------------------------------------ evaluation, seeds, trajectory
def compare_steps(model, held_out, args):
    """PQ, SQ, RQ by sampling steps (Fig. 9, left): a table, and a picture."""
    by_steps = {}
    for steps in args.steps:
        draw = functools.partial(
            sample_batch, model, steps=steps, seed=args.seed, batch_size=args.batch_size
        )
        figures, rows = diffusion.evaluate(model, held_out, draw, args.batch_size)
        if data.RANK == 0:
            if not by_steps:
                print(pq.line(["steps", *figures]))
            print(pq.line([steps, *figures.values()]), flush=True)
        by_steps[steps] = figures
    if data.RANK == 0:
        data.sheet(f"{args.out}/sample.png", rows, data.COMPARISON)
        print(f"{len(held_out)} images -> {args.out}/sample.png")
    return {**figures, "by_steps": by_steps}


def ious(a, b):
    """IoUs of segments of two id maps, for all pairs that overlap.

    a, b: integer arrays of one shape, ids >= 0; void counts as a segment here. Returns
    [(id in a, id in b, IoU)], sorted by the ids.
    """
    overlaps = pq.overlaps(a, b)
    area_a = Counter()
    area_b = Counter()
    for id_a, id_b, pixels in overlaps:
        area_a[id_a] += pixels
        area_b[id_b] += pixels
    found = []
    for id_a, id_b, pixels in overlaps:
        union = area_a[id_a] + area_b[id_b] - pixels
        found.append((id_a, id_b, pixels / union))
    return found


def agreement(maps):
    """How far several id maps of one picture agree at each pixel: H x W in 0..1.

    maps: two or more H x W integer arrays, 0 = void. A pair of maps agrees at a pixel
    by the IoU of the two segments that hold it, or by 0 if one of them is void. The
    result is the mean over all pairs.
    """
    by_pair = []
    for a, b in itertools.combinations(maps, 2):
        values = []
        for id_a, id_b, iou in ious(a, b):
            values.append(0 if VOID in (id_a, id_b) else iou)
        # both ids in one number; np.unique sorts pairs in the order of `ious`
        pixels = a.astype(np.int64) << 32 | b
        _, place = np.unique(pixels, return_inverse=True)
        by_pair.append(np.array(values)[place].reshape(a.shape))
    return np.mean(by_pair, axis=0)


def compare_seeds(model, held_out, args):
    """Fig. 10: how far the segments of several seeds agree; prints it and draws it."""
    means = []
    rows = []
    # one picture at a time, because the maps of all seeds are kept
    for samples in held_out.batches(1):
        [s] = samples
        maps = []
        for seed in args.seeds:
            [found] = sample_batch(
                model,
                samples,
                steps=args.steps[-1],
                seed=seed,
                batch_size=args.batch_size,
            )
            maps.append(ae.void_uncertain(*found, model.settings["min_area"]))
        agreed = agreement(maps)
        means.append(agreed.mean())
        if len(rows) < data.PICTURES:
            pictures = overlays(model, s["image"], maps, like=maps[0])
            grey = (255 * agreed).astype(np.uint8)
            rows.append((s["file_name"], [s["image"], *pictures, grey]))
    captions = ["image", *(f"seed {seed}" for seed in args.seeds), "white: all agree"]
    data.sheet(f"{args.out}/seeds.png", rows, captions)
    mean = float(np.mean(means))
    print(
        f"mean agreement {mean:.3f} (1: all seeds find the same segments) -> "
        f"{args.out}/seeds.png"
    )
    return {"images": len(means), "agreement": mean}


def overlays(model, image, maps, like):
    """Overlays of id maps (H x W) of an image, in the colours of one of them, `like`."""
    background = diffusion.background_of(model)
    fixed = [] if background is None else [background]
    [like] = data.renumber(like, background=background)
    pictures = []
    for ids in maps:
        ids = data.colors_like(ids, like, fixed=fixed)
        pictures.append(data.overlay(image, ids, background))
    return pictures


@torch.no_grad()
def draw_trajectory(model, samples, args):
    """Fig. S4: draw the decoded estimates of z^0 over the steps."""
    if model.settings["crop"]:  # beyond the paper: the first tile of the first look
        tiles = tiles_of(samples, [model.settings["crop"]] * len(samples))
        first = [tile for tile in tiles if tile["place"] == (0, 0)]
        samples = [{**s, **tile} for s, tile in zip(samples, first, strict=True)]
    noise, _ = diffusion.noise_of(model, samples, args.seed)
    trace = []
    with data.sampling_autocast(model.unet.device):
        condition = model.condition(diffusion.batch_of(model, samples))
        model.sample(condition, noise, args.steps[-1], trace)
    timesteps = model.ddim.timesteps(args.steps[-1])
    columns = min(len(trace), 8)  # more would be too small to see
    shown = np.linspace(0, len(trace) - 1, columns).round().astype(int).tolist()
    maps = [[] for _ in samples]
    for i in shown:
        for own, s, logits in zip(maps, samples, model.decode(trace[i])):
            ids, _ = diffusion.to_ids(model, logits, *s["image"].shape[:2])
            own.append(ids)
    rows = []
    for own, s in zip(maps, samples):
        pictures = overlays(model, s["image"], own, like=own[-1])
        rows.append((s["file_name"], [s["image"], *pictures]))
    captions = ["image"]
    for i in shown:
        j, _ = timesteps[i]
        _, noise_left = model.ddim.scales(j, noise)  # sqrt(1 - ab_j), the noise's share
        captions.append(f"from {100 * noise_left.item():.0f}% noise")
    data.sheet(f"{args.out}/trajectory.png", rows, captions)
    print(f"-> {args.out}/trajectory.png")


# ------------------------------------------------------------------------ picture files
class Pictures:
    """Picture files and folders of them, as a source of samples.

    image_id: the file's stem if it is a number, as COCO's are, else the next unused
    number; name: of what is written for it, the stem, or the whole name if the stem was
    there before. Raises BadInput if there is no picture.
    """

    def __init__(self, paths):
        formats = Image.registered_extensions()
        files = []
        for path in map(Path, paths):
            if not path.exists():
                raise BadInput(f"--images {path}: no such file")
            if not path.is_dir():
                files.append(path)
                continue
            for file in sorted(path.iterdir()):
                if file.is_dir():
                    data.say_once(
                        f"note: {file}: pictures in sub-folders are not looked for"
                    )
                elif (
                    file.name[0] != "."
                    and formats.get(file.suffix.lower()) in data.FORMATS
                ):
                    files.append(file)
        if not files:
            raise BadInput(
                f"--images {paths[0]}: no picture there (JPEG, PNG, TIFF, WebP, ...)"
            )
        numbers = {int(f.stem) for f in files if f.stem.isdecimal()}
        unused = (n for n in itertools.count(1) if n not in numbers)
        self.files = {}  # name: (image_id, file)
        ids = set()
        for file in files:
            name = file.name if file.stem in self.files else file.stem
            while name in self.files:
                name = f"{name}_"
            image_id = int(file.stem) if file.stem.isdecimal() else next(unused)
            if image_id in ids:
                image_id = next(unused)
            ids.add(image_id)
            self.files[name] = (image_id, file)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        """A sample: image, image_id, file_name, and the name of what is written for
        it.
        """
        name = list(self.files)[index]
        image_id, file = self.files[name]
        return {
            "image": data.read_image(file),
            "image_id": image_id,
            "file_name": file.name,
            "name": name,
        }


def segment_files(model, held_out, args):
    """--images: segment Pictures.

    Writes predictions.json (COCO panoptic) with predictions/NAME.png, instances.json
    (COCO instances), and overlays/NAME.png.
    """
    forget_predictions(args.out)
    background = diffusion.background_of(model)
    images, panoptic, instances = [], [], []
    draw = functools.partial(
        sample_batch,
        model,
        steps=args.steps[-1],
        seed=args.seed,
        batch_size=args.batch_size,
    )
    for samples in held_out.batches(args.batch_size):
        for s, found in zip(samples, draw(samples)):
            ids = ae.void_uncertain(*found, model.settings["min_area"])
            ids, segments = diffusion.label(model, s["image"], ids)
            name = s["name"]
            try:
                data.write_id_png(f"{args.out}/predictions/{name}.png", ids)
                [shown] = data.renumber(ids, background=background)
                overlay = data.overlay(s["image"], shown, background=background)
                data.write(f"{args.out}/overlays/{name}.png", overlay)
            except BadInput as error:  # one bad name does not cost the others
                data.say_once(f"note: left out: {error}")
                held_out.broken.append(error)
                continue
            height, width = ids.shape
            image = {"id": s["image_id"], "file_name": s["file_name"]}
            images.append({**image, "height": height, "width": width})
            outlines = outlines_of(ids)
            for segment_info in segments:
                segment_info["bbox"] = outlines[segment_info["id"]]["bbox"]
            panoptic.append(
                {
                    "image_id": s["image_id"],
                    "file_name": f"{name}.png",
                    "segments_info": segments,
                }
            )
            instances += instances_of(model, s["image_id"], segments, outlines)
    categories = model.classifier.categories if model.classifier else pq.OBJECT
    for number, instance in enumerate(instances, 1):
        instance["id"] = number
    common = {"images": images, "categories": categories}
    data.write(f"{args.out}/instances.json", {**common, "annotations": instances})
    data.write(f"{args.out}/predictions.json", {**common, "annotations": panoptic})
    print(
        f"{len(images)} pictures -> {args.out}/overlays/, {args.out}/predictions.json, "
        f"{args.out}/instances.json"
    )
    return {"images": len(images)}


def forget_predictions(out):
    """Remove the pictures of an earlier run in this folder, which its JSON lists."""
    try:
        annotations = json.loads(Path(out, "predictions.json").read_text())[
            "annotations"
        ]
        names = [a["file_name"] for a in annotations]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name in names:
        for folder in ("predictions", "overlays"):
            Path(out, folder, Path(name).name).unlink(missing_ok=True)


def outlines_of(ids):
    """{id: {"bbox": [x, y, width, height], "segmentation": RLE}} of an id map (H x
    W).
    """
    outlines = {}
    for i in data.areas(ids):
        rle = coco_mask.encode(np.asfortranarray(ids == i, np.uint8))
        bbox = [int(n) for n in coco_mask.toBbox(rle)]
        rle["counts"] = rle["counts"].decode()
        outlines[i] = {"bbox": bbox, "segmentation": rle}
    return outlines


def instances_of(model, image_id, segments, outlines):
    """COCO's instances of a picture's segments: things, and no background."""
    stuff = set()
    if model.classifier is not None:
        stuff = {c["id"] for c in model.classifier.categories if not c["isthing"]}
    background = diffusion.background_of(model)
    instances = []
    for s in segments:
        if s["category_id"] in stuff or s["id"] == background:
            continue
        instance = {**s, "image_id": image_id, **outlines[s["id"]]}
        instances.append(instance)
    return instances


# ------------------------------------------------------------------------- command line
def open_held_out(model, args):
    """The pictures of --images, or the split of the flags or the checkpoint."""
    settings = model.settings
    if args.images:
        return data.HeldOut(Pictures(args.images), args.limit)
    source = data.open_data(
        args.data or settings["data"],
        args.split or settings["val_split"],
        size=settings["size"],
        seed=settings["seed"],
        keep_crowds=args.keep_crowds or settings["keep_crowds"],
    )
    return data.HeldOut(source, args.limit)


@data.command
def main(argv=None):
    """Command line: evaluate a split, or segment picture files."""
    args = Settings(**data.parse(Settings, __doc__, argv))
    if data.WORLD > 1 and (args.images or args.seeds or args.trajectory):
        raise BadInput(
            "torchrun only evaluates: no --images, --seeds or --trajectory with it"
        )
    if args.seeds and len(set(args.seeds)) < 2:
        raise BadInput("--seeds: give two or more")
    device, _ = data.setup(args)
    model = load(args.ckpt, device, min_area=args.min_area, min_score=args.min_score)
    args.steps = args.steps or [model.settings["steps"]]
    held_out = open_held_out(model, args)
    if args.trajectory:
        draw_trajectory(model, list(itertools.islice(held_out, 4)), args)
    if args.seeds:
        figures = compare_seeds(model, held_out, args)
    elif args.images:
        figures = segment_files(model, held_out, args)
    else:
        figures = compare_steps(model, held_out, args)
    data.write(f"{args.out}/sample.json", figures)
    if args.images and held_out.broken:  # only now: what could be read is written
        count = len(held_out.broken)
        raise BadInput(f"{count} pictures left out, the first: {held_out.broken[0]}")


# ================================================================== beyond the paper
# Tiles, for pictures larger than the crops that a model was trained on: the picture is
# cut into overlapping squares, each is segmented on its own, and segments that coincide
# in the overlaps become one.

OVERLAP = 0.25  # share of a tile's side that the next tile shows too
SAME = 0.3  # two segments can be one if their IoU is above this
UNSEEN = -1  # a pixel of the picture that no tile has filled yet


def cut(array, side):
    """Cover an array evenly with squares that overlap by at least a quarter.

    array: H x W or H x W x C. Returns {(top, left): tile}, row by row. A tile is side x
    side (x C), and a view if the array is at least as large as that in both directions;
    otherwise the array's edge is repeated. If side is 0, the only tile is the array.
    """
    if side == 0:
        return {(0, 0): array}
    height, width = array.shape[:2]
    if height < side or width < side:
        missing = [(0, max(0, side - height)), (0, max(0, side - width))]
        channels = [(0, 0)] * (array.ndim - 2)
        array = np.pad(array, missing + channels, mode="edge")
    tiles = {}
    for top in tile_starts(height, side):
        for left in tile_starts(width, side):
            tiles[top, left] = array[top : top + side, left : left + side]
    return tiles


def tile_starts(length, side):
    """Where the tiles begin along a side of a picture that is `length` pixels long."""
    count = math.ceil((length / side - OVERLAP) / (1 - OVERLAP))
    last = max(0, length - side)
    return np.linspace(0, last, max(1, count)).round().astype(int).tolist()


def tiles_of(samples, sides):
    """Cut samples into tiles, which are samples again: a list, picture by picture.

    samples: a list of dicts with `image` (H x W x 3, uint8), `image_id` and, if there
    is a partial map to complete, `given` (H x W, int32); sides: of the tiles of each,
    in pixels. A tile has its part of image and given, its `place` (top, left), the
    index `picture` of its sample, and an `image_id` of its own, so that it gets noise
    of its own.
    """
    tiles = []
    for picture, (sample, side) in enumerate(zip(samples, sides, strict=True)):
        parts = {"image": cut(sample["image"], side)}
        if "given" in sample:
            parts["given"] = cut(sample["given"], side)
        for place in parts["image"]:
            tile = {key: by_place[place] for key, by_place in parts.items()}
            tile["place"] = place
            tile["picture"] = picture
            tile["image_id"] = sample["image_id"]
            if place != (0, 0):
                tile["image_id"] = f"{sample['image_id']} at {place}"
            tiles.append(tile)
    return tiles


class Names:
    """The ids of a joined picture, some of which turn out to be of the same segment.

    A union-find table: `older[i]` is an older id of the same segment, or i itself if i
    is its oldest. To join two ids, one entry changes, and no pixel. Ids up to
    `reserved` are never handed out.
    """

    def __init__(self, reserved=VOID):
        self.older = list(range(reserved + 1))

    def new(self):
        """An id that has not been used before."""
        self.older.append(len(self.older))
        return self.older[-1]

    def oldest(self, i):
        """The oldest id of the segment that has the id i."""
        while self.older[i] != i:
            self.older[i] = self.older[self.older[i]]  # a shorter way for the next time
            i = self.older[i]
        return i

    def join(self, i, k):
        """From now on, i and k are ids of the same segment."""
        first, second = sorted([self.oldest(i), self.oldest(k)])
        self.older[second] = first


def stitch(tiles, shape, background=None):
    """Join the segmented tiles of a picture to one map.

    tiles: {(top, left): (ids, certainty)}, in the order of `cut`, of H x W integers and
    H x W floats. Ids (0 = void) need not be those of other tiles. shape: height and
    width of the picture; background: the id that a background has in all tiles, and
    will have in the picture. Returns its ids (H x W, int32, 0 = void) and its certainty
    (H x W, float32). If there is one tile, its ids stay as they are.

    Segments are joined with those of earlier tiles, one to one: the pair with the
    highest IoU first, counted where both can be seen, down to 0.3. If `background` is
    None, the largest segment of each tile counts as a background, which may consist of
    several pieces there: it is also joined with an earlier background of which it
    covers more than half, counted in the same pixels.

    Each tile looks only at its own box, and ids that are joined go into a table, which
    is applied once at the end: the work grows as the number of pixels does.
    """
    height, width = shape
    if len(tiles) == 1:
        [(ids, certainty)] = tiles.values()
        ids = ids[:height, :width].astype(np.int32)
        return ids, certainty[:height, :width].astype(np.float32)

    whole = np.full(shape, UNSEEN, np.int32)
    whole_certainty = np.zeros(shape, np.float32)
    names = Names(reserved=background or VOID)
    backgrounds = set()
    for (top, left), (ids, certainty) in tiles.items():
        box = np.s_[top : top + ids.shape[0], left : left + ids.shape[1]]
        before = whole[box]  # a view, smaller than a tile that exceeds the picture
        height, width = before.shape
        ids = ids[:height, :width]

        # what this tile and the earlier ones found in the pixels that both can see
        seen = before != UNSEEN
        here = ids[seen]  # P
        there = replace_ids(before[seen], names.oldest)  # P

        # each segment of the tile gets a name in the picture
        area = data.areas(ids)  # without void
        name_of = {VOID: VOID, background: background}
        overlaps = ious(here, there) if seen.any() else []  # none for the first tile
        for segment, earlier, iou in sorted(overlaps, key=lambda o: -o[2]):
            taken = segment in name_of or earlier in name_of.values()
            if iou > SAME and not taken:
                name_of[segment] = earlier
        for segment in area:
            if segment not in name_of:
                name_of[segment] = names.new()

        # a background without an id of its own is joined with those of earlier tiles
        oldest_first = sorted(area, key=name_of.get)  # the first wins a tie
        largest = max(oldest_first, key=area.get, default=VOID)
        if background is None and largest != VOID:
            for earlier in backgrounds.intersection(there.tolist()):
                covered = here[there == earlier] == largest
                if covered.mean() > 0.5:
                    names.join(earlier, name_of[largest])
            backgrounds.add(names.oldest(name_of[largest]))

        # of a strip that it shares with a neighbour, the tile fills the half next to it
        rows_shared = np.sum(seen[:, -1])  # with the tiles above
        columns_shared = np.sum(seen[-1])  # with the tile on the left
        own = np.s_[rows_shared // 2 :, columns_shared // 2 :]
        before[own] = replace_ids(ids[own], name_of.get)
        whole_certainty[box][own] = certainty[:height, :width][own]

    final = [names.oldest(i) for i in range(len(names.older))]
    final.append(VOID)  # the last entry is that of UNSEEN, which is -1
    return np.array(final, np.int32)[whole], whole_certainty


def replace_ids(ids, new_id):
    """Replace each id i of an integer array by new_id(i), computed once per id."""
    known, place = np.unique(ids, return_inverse=True)
    new = np.array([new_id(i) for i in known.tolist()], np.int32)
    return new[place].reshape(ids.shape)


def sample_in_tiles(model, samples, draw, batch_size):
    """Segment pictures in tiles.

    Objects in pictures of instances differ in size from one picture to the next: a
    first look in tiles of the crop's side finds how large they are, and then each
    picture is segmented in tiles of its own side (`data.tile_side`).

    samples: a list, see `tiles_of`. draw(model, tiles) returns (ids, certainty) of each
    of at most batch_size tiles, which may belong to several pictures. Yields ids and
    certainty of each picture, see `stitch`. Tiles are drawn only when they are needed
    (all first looks when the first picture is), so the results of no more than one
    picture and one batch are held.
    """
    sides = [model.settings["crop"]] * len(samples)
    if diffusion.background_of(model) is not None:
        looks = sample_sized_tiles(model, samples, sides, draw, batch_size)
        sides = [diffusion.side_of_tiles(model, ids) for ids, _ in looks]
    yield from sample_sized_tiles(model, samples, sides, draw, batch_size)


def sample_sized_tiles(model, samples, sides, draw, batch_size):
    """As `sample_in_tiles`, in tiles whose sides are given (see `tiles_of`)."""
    background = diffusion.background_of(model)
    tiles = tiles_of(samples, sides)
    starts = range(0, len(tiles), batch_size)
    batches = (tiles[n : n + batch_size] for n in starts)
    drawn = itertools.chain.from_iterable(draw(model, batch) for batch in batches)
    results = zip(tiles, drawn, strict=True)
    for picture, own in itertools.groupby(results, key=lambda r: r[0]["picture"]):
        shape = samples[picture]["image"].shape[:2]
        by_place = {tile["place"]: found for tile, found in own}
        yield stitch(by_place, shape, background=background)


def doubt(ids, probability, min_score):
    """The probability (H x W), and 0 in segments (of ids, H x W) with a lower mean.

    So a segment becomes void if its score, its mean probability, is below min_score.
    """
    place = ids.reshape(-1)
    pixels = np.bincount(place)
    total = np.bincount(place, weights=probability.reshape(-1))
    score = total / pixels.clip(min=1)
    return np.where(score[ids] < min_score, 0, probability)


if __name__ == "__main__":
    main()

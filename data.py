"""data.py: every source of data yields the same kind of sample (paper: section 4.1).

    python data.py --data shapes                      # draw some built-in scenes
    python data.py --data data/coco --split val2017   # look into a COCO-style folder
    python data.py --data mine --split train --check  # what is broken, what to expect

A sample is a dict: `image` (H x W x 3, uint8), `ids` (H x W, int32, 0 = void; crowds
have ids), `segments_info` (as in COCO: id, category_id, iscrowd, area), `image_id`,
`file_name`.

What id 0 means on the way:
    training     void: no segment, a crowd, or a segment of under 10 px
    stage 1      input: 0 in every channel. Loss: cross-entropy ignores void pixels;
                 for BCE and Dice they are outside of every segment (as in the release)
    stage 2      no loss in a latent cell whose top-left pixel is void
    sampling     an uncertain pixel, or one of a segment that is too small
    PQ           truth: the pixel is ignored; prediction: no segment
    inpainting   unknown: to be filled in

Every random choice has its own stream, so that it repeats whatever the others draw:
    a scene                            (seed, crc32 of the split, index)
    the order of an epoch              (seed, 1, epoch)
    training sample n: flip and ids    (seed, 2, n)
    ids in evaluation and completion   (seed, 3, image_id)
    dropped blocks                     (seed, 4, image_id)
    crops, colours, partial maps       (seed, 5, n)
    held-out crops                     (index, crop)
    noise for sampling                 crc32 of seed and image_id
    points, noise, timesteps           (seed, iteration, rank), by torch.manual_seed
    new weights                        seed, by torch.manual_seed
On a CPU, with as many processes and threads, a run repeats bit for bit.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import operator
import os
import re
import sys
import zlib
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

# Operations that a Mac's GPU lacks run on its CPU. PyTorch reads this on import.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, get_worker_info
from tqdm import tqdm

# torchrun tells each process its rank and the number of processes. Rank 0 prints and
# writes.
TORCHRUN = "MASTER_ADDR" in os.environ and "WORLD_SIZE" in os.environ
RANK = int(os.environ["RANK"]) if TORCHRUN else 0
WORLD = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1

EPOCHS, SAMPLES, IDS, BLOCKS, CHANGES = range(1, 6)  # random streams, see above

BACKGROUND_SEGMENT = 1  # of instances: the id of all that is no object


class BadInput(ValueError):
    """The user's input is wrong. One line says where, what is wrong, and what to do."""


# --------------------------------------------- from a sample to a training sample (4.1)
def count_values(values):
    """The distinct integers of a flat array, ascending, and their counts.

    It sorts runs of equal values, not pixels: fast, because runs in id maps are long.
    """
    changes = np.flatnonzero(values[1:] != values[:-1]) + 1
    start = np.append(0, changes)[: len(values)]  # of each run; empty if values is
    length = np.diff(start, append=len(values))
    known, place = np.unique(values[start], return_inverse=True)
    return known, np.bincount(place, length).astype(np.int64)


def areas(ids):
    """{id: pixels} of an id map (H x W), by ascending id, without void."""
    known, counts = count_values(ids.reshape(-1))
    return {i: n for i, n in zip(known.tolist(), counts.tolist()) if i != 0}


def describe(ids):
    """segments_info of an id map (H x W), by ascending id, all of category 1."""
    return [
        {"id": i, "category_id": 1, "iscrowd": 0, "area": n}
        for i, n in areas(ids).items()
    ]


def relabel(ids, segments_info, num_ids, rng, min_area=1):
    """Give the segments of an id map (H x W) random distinct ids in 1..num_ids-1 (4.1).

    Crowds and segments of fewer than min_area pixels become void. If more than N-1 are
    left, the largest are kept. Returns the new map (H x W, uint8), {old id: new id}.
    """
    kept = [s for s in segments_info if not s["iscrowd"] and s["area"] >= min_area]
    if len(kept) > num_ids - 1:
        say_once(
            f"note: of more than N - 1 = {num_ids - 1} segments the largest are kept"
        )
        kept = sorted(kept, key=operator.itemgetter("area"), reverse=True)
        kept = kept[: num_ids - 1]
    names = (rng.permutation(num_ids - 1) + 1).tolist()  # 0 stays void
    new_id = {s["id"]: name for s, name in zip(kept, names)}
    table = np.zeros(int(ids.max()) + 1, np.uint8)  # old id -> new id; at most 16 MB
    for old, new in new_id.items():
        table[old] = new
    return table[ids], new_id


def resize_ids(ids, height, width):
    """Nearest-neighbour resize of an H x W map: each takes the nearest pixel centre."""
    return np.asarray(Image.fromarray(ids).resize((width, height), Image.NEAREST))


def resize_image(image, size):
    """Resize H x W x 3 (uint8) to a square, bicubic, not cropped: 3 x S x S, uint8."""
    image = torch.tensor(image).permute(2, 0, 1)[None]  # 1 x 3 x H x W
    return F.interpolate(image, (size, size), mode="bicubic", antialias=True)[0]


def drop_blocks(size, drop, block, rng):
    """Drop each block with probability `drop`: size x size, True where kept (4.2)."""
    count = math.ceil(size / block)  # blocks along a side
    kept = rng.random((count, count)) >= drop
    return kept.repeat(block, 0).repeat(block, 1)[:size, :size]


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, count):
    """The order in which an epoch visits `count` samples."""
    return np.random.default_rng((seed, EPOCHS, epoch)).permutation(count)


@dataclass
class TrainingSet:
    """An endless stream of training samples: resized, flipped, with random ids (4.1).

    Sample n depends on (seed, n) alone, so that a run repeats with any number of
    processes and workers, and resumes in the middle of an epoch.
    """

    source: object
    size: int  # side of the network's input in pixels
    num_ids: int  # N
    seed: int = 0
    min_area: int = 10  # pixels of the file; smaller segments become void (authors)

    def __getitem__(self, n):
        """Training sample n, a dict of tensors:

        ids      S x S, uint8, 0 = void
        image    3 x S x S, uint8; absent if the source reads no pictures, as in stage 1
        classes  N, int64: index of each id's category in source.categories, -1 = none
        """
        return self.prepare(self.read(n), n)

    def read(self, n):
        """The n-th sample of the stream; if broken, says so and takes the next one."""
        if self.source.endless:
            return self.source[n]
        count = len(self.source)
        epoch, place = divmod(n, count)
        order = epoch_order(self.seed, epoch, count)
        for k in range(count):
            try:
                return self.source[int(order[(place + k) % count])]
            except BadInput as error:
                broken = error
                say_once(
                    f"note: {error}; the next picture takes its place", anywhere=True
                )
        raise BadInput(
            f"{broken}; none of the other {count - 1} pictures can be used either"
        )

    def prepare(self, sample, n):
        """A training sample from a sample: random ids, resize, flip."""
        rng = np.random.default_rng((self.seed, SAMPLES, n))
        segments = sample["segments_info"]
        ids, new_id = relabel(
            sample["ids"],
            segments,
            num_ids=self.num_ids,
            rng=rng,
            min_area=self.min_area,
        )
        flip = rng.random() < 0.5

        ids = torch.tensor(resize_ids(ids, self.size, self.size))  # S x S
        result = {"ids": ids.flip(1) if flip else ids}
        if sample["image"] is not None:
            image = resize_image(sample["image"], self.size)  # 3 x S x S
            result["image"] = image.flip(2) if flip else image

        place = {c["id"]: k for k, c in enumerate(self.source.categories)}
        classes = torch.full((self.num_ids,), -1)
        for s in segments:
            if s["id"] in new_id:
                classes[new_id[s["id"]]] = place.get(s["category_id"], -1)
        result["classes"] = classes
        return result


def training_batches(dataset, iterations, args, pieces=1):
    """This process's share of each iteration's batch, in `pieces` micro-batches.

    An iteration has the same samples for any number of processes and pieces. Raises
    BadInput if its batch cannot be divided evenly.
    """
    share, rest = divmod(args.batch_size, WORLD * pieces)
    if rest:
        raise BadInput(
            f"--batch_size {args.batch_size}: must be a multiple of {WORLD * pieces} "
            f"({WORLD} processes x {pieces} micro-batches)"
        )
    batches = []
    for it in iterations:
        for piece in range(pieces):
            first = ((it * WORLD + RANK) * pieces + piece) * share
            batches.append(range(first, first + share))
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=args.num_workers,
        pin_memory=args.device != "cpu" and torch.cuda.is_available(),
    )


class HeldOut:
    """The samples of a source to evaluate on; each process gets a share of them.

    Broken samples are reported and left out. limit: use only so many, the first ones.
    """

    def __init__(self, source, limit=None):
        self.source = source
        self.indices = range(len(source))[:limit]
        self.broken = []  # what is wrong with the samples that were left out

    def __len__(self):
        return len(self.indices)

    def __iter__(self):
        """The usable samples of this process, one by one."""
        self.broken = []
        own = self.indices[RANK::WORLD]
        for index in own:
            try:
                sample = self.source[index]
            except BadInput as error:
                say_once(f"note: left out: {error}", anywhere=True)
                self.broken.append(error)
            else:
                yield sample

    def batches(self, batch_size):
        """This process's samples in lists of at most batch_size, with a progress bar.

        Raises BadInput at the end if no process found a usable sample.
        """
        samples = iter(self)
        with progress(total=len(self)) as bar:
            while batch := list(itertools.islice(samples, batch_size)):
                yield batch
                bar.update(min(len(batch) * WORLD, bar.total - bar.n))
        if sum_over_processes(len(self.broken)) == len(self):
            raise BadInput(f"none of the {len(self)} pictures can be used")

    def check(self):
        """Raise BadInput if no sample is usable, before a long training begins."""
        if not any(True for _ in self) and WORLD == 1:
            raise BadInput(
                f"{self.broken[0]}; none of the {len(self)} pictures can be used"
            )


# ---------------------------------------------------------------------- built-in scenes
KINDS = ("background", "ellipse", "rectangle", "triangle", "cross")  # category ids 1..5
COUNT = 512  # scenes in a held-out set


def new_color(rng, taken):
    """A colour (3 floats in 0..1) unlike those in the list `taken`, which it joins."""
    for _ in range(20):
        color = rng.uniform(0.05, 0.95, 3)
        if all(np.abs(color - other).sum() > 0.6 for other in taken):
            break
    taken.append(color)
    return color.astype(np.float32)


def rotate(x, y, angle, unit=1):
    """Coordinates along an axis at this angle and across it, in units of `unit`."""
    cos = math.cos(angle) / unit
    sin = math.sin(angle) / unit
    return cos * x + sin * y, cos * y - sin * x


def paint_texture(rng, color, contrast, x, y):
    """The colour with a gradient, stripes or blotches over coordinates x, y: H x W x
    3.
    """
    along, across = rotate(x - 0.5, y - 0.5, rng.uniform(0, 2 * math.pi))
    kind = rng.integers(3)
    if kind == 0:
        pattern = along + 0.5
    elif kind == 1:
        pattern = 0.5 + 0.5 * np.sin(along * rng.uniform(15, 45))
    else:
        waves = np.sin(along * rng.uniform(10, 30) + rng.uniform(0, 6))
        pattern = 0.5 + 0.5 * waves * np.sin(across * rng.uniform(10, 30))
    strength = rng.uniform(-contrast, contrast, 3).astype(np.float32)  # of each channel
    return color + (pattern[..., None] - 0.5) * strength


def shape_mask(rng, kind, x, y):
    """Where a random ellipse, rectangle, triangle or cross (kind 1..4) lies: H x W
    bool.
    """
    angle = rng.uniform(0, 2 * math.pi)
    radius = rng.uniform(0.15, 0.34)
    center_x, center_y = rng.uniform(0.1, 0.9, 2)
    u, v = rotate(x - center_x, y - center_y, angle, radius)
    u = np.abs(u)
    v = v / rng.uniform(0.65, 1)
    if kind == 1:
        return u * u + v * v < 0.8
    if kind == 2:
        return np.maximum(u, np.abs(v)) < 0.75
    if kind == 3:
        return (v > -0.6) & (1.732 * u + v < 1.1)
    return (np.minimum(u, np.abs(v)) < 0.3) & (np.maximum(u, np.abs(v)) < 0.95)


@dataclass
class Shapes:
    """Built-in scenes. A training stream never repeats one; a held-out set has 512."""

    split: str
    size: int = 64
    seed: int = 0
    endless = True
    background_id = None
    crowds = 0
    unlisted = {}
    categories = [
        {"id": k, "name": name, "isthing": int(k > 1)}
        for k, name in enumerate(KINDS, 1)
    ]

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        """A textured background (id 1) and one to three shapes, none of them almost
        hidden.
        """
        split = zlib.crc32(self.split.encode())
        rng = np.random.default_rng((self.seed, split, index))
        size = self.size
        y, x = np.mgrid[:size, :size].astype(np.float32) / size + 0.5 / size
        colors = []
        image = paint_texture(rng, new_color(rng, colors), contrast=0.3, x=x, y=y)
        ids = np.ones((size, size), np.int32)
        categories = [1]  # of segment 1, 2, ...
        for _ in range(rng.integers(1, 4)):
            kind = int(rng.integers(1, 5))
            mask = shape_mask(rng, kind, x=x, y=y)  # size x size, bool
            painted = np.where(mask, len(categories) + 1, ids).astype(np.int32)
            visible = np.bincount(painted.ravel(), minlength=len(categories) + 2)[1:]
            if visible.min() < size * size / 60:
                continue  # it would hide another shape, or is hidden itself
            color = new_color(rng, colors)
            if rng.random() < 0.5:  # otherwise it is of one colour
                color = paint_texture(rng, color, contrast=0.25, x=x, y=y)[mask]
            image[mask] = color
            ids = painted
            categories.append(kind + 1)
        noise = rng.standard_normal(image.shape, np.float32)
        image += noise * rng.uniform(0, 0.05)

        segments = describe(ids)
        for segment, category in zip(segments, categories):
            segment["category_id"] = category
        return {
            "image": (image.clip(0, 1) * 255).astype(np.uint8),
            "ids": ids,
            "segments_info": segments,
            "image_id": index,
            "file_name": f"{index:06d}.png",
            "background": BACKGROUND_SEGMENT,
        }


# ---------------------------------------------------------------------- the sources
class CocoPanoptic:
    """A folder in COCO's panoptic layout: every pixel belongs to a segment or is void.

    annotations/panoptic_SPLIT.json lists the segments of each picture. Their ids are
    the colours of a PNG in panoptic_SPLIT/ or annotations/panoptic_SPLIT/. `find_file`
    says where pictures are looked for. images=False decodes none (stage 1 needs none).
    keep_crowds=True reads crowds as ordinary segments.

    categories: a list of {id, name, isthing}. crowds: how many segments are crowds, and
    so left out of training. unlisted: {category_id: how many segments} of categories
    that are not in the list; in samples their category_id is None. Raises BadInput if
    the JSON is missing or unusable.
    """

    endless = False  # the same pictures again in each epoch
    background_id = None

    def __init__(self, folder, split, images=True, keep_crowds=False):
        root = Path(folder)
        self.images = images
        self.json = find_json(root, [f"annotations/panoptic_{split}.json"])
        self.picture_folders = picture_folders(root, split, self.json)
        annotations = root / "annotations"
        own = [root / f"panoptic_{split}", annotations / f"panoptic_{split}"]
        self.png_folders = [*own, root, annotations]
        self.categories, items, self.crowds, self.unlisted = read_items(
            self.json, panoptic=True, keep_crowds=keep_crowds
        )
        # Pictures with crowds only are left out, in training and evaluation (authors).
        self.items = [text for text, has_objects in items if has_objects]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        """Sample `index`. Raises BadInput, naming the file, if it cannot be used.

        image (H x W x 3, uint8, or None), ids (H x W, int32, 0 = void), segments_info
        (a list of {id, category_id, iscrowd, area}), image_id, file_name,
        background_id, and faults: a line for each part that is left out.
        """
        info, png, listed = json.loads(self.items[index])
        where = f"{self.json}: image {info['id']}"
        ids, segments = read_panoptic(png, listed, self.png_folders, where=where)
        shown = {s["id"] for s in segments}
        missing = [s["id"] for s in listed if s["id"] not in shown]
        image = None
        if self.images:
            file = find_file(info["file_name"], self.picture_folders, where=where)
            image = read_image(file, size=ids.shape[::-1])
        return {
            "image": image,
            "ids": ids,
            "segments_info": segments,
            "image_id": info["id"],
            "file_name": info["file_name"],
            "background_id": None,
            "faults": [f"segment {i} has no pixel" for i in missing],
        }


class CocoInstances:
    """A folder with outlines of objects: COCO's instances, CVAT's or Roboflow's export.

    annotations/instances_SPLIT.json or SPLIT/_annotations.coco.json lists the objects.
    They are painted from large to small, so that a small one lies over a large one. All
    other pixels are one segment, whose category `background_id` no object has. Pictures
    without objects count: they are all background.

    images, keep_crowds, attributes and errors are those of CocoPanoptic. The pictures
    must be there even with images=False, because their headers are read: an outline is
    only painted at the size that its picture really has.
    """

    endless = False

    def __init__(self, folder, split, images=True, keep_crowds=False):
        root = Path(folder)
        self.images = images
        names = [
            f"annotations/instances_{split}.json",
            f"{split}/_annotations.coco.json",
        ]
        self.json = find_json(root, names)
        self.picture_folders = picture_folders(root, split, self.json)
        self.categories, items, self.crowds, self.unlisted = read_items(
            self.json, panoptic=False, keep_crowds=keep_crowds
        )
        self.items = [text for text, _ in items]
        self.background_id = 1 + max((c["id"] for c in self.categories), default=0)
        background = {"id": self.background_id, "name": "background", "isthing": 0}
        self.categories.append(background)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        """Sample `index`, as in CocoPanoptic, and `background`: its segment's id.

        Raises BadInput if it cannot be used.
        """
        info, _, objects = json.loads(self.items[index])
        where = f"{self.json}: image {info['id']}"
        file = find_file(info["file_name"], self.picture_folders, where=where)
        width, height = picture_size(file, (info["width"], info["height"]))
        ids, segments, faults = self.paint(objects, width, height=height)
        if faults:
            note = "objects without a usable outline are left out"
            say_once(f"note: {self.json}: {note} (data.py --check names them)")
        return {
            "image": read_image(file, size=(width, height)) if self.images else None,
            "ids": ids,
            "segments_info": segments,
            "image_id": info["id"],
            "file_name": info["file_name"],
            "background_id": self.background_id,
            "background": BACKGROUND_SEGMENT,
            "faults": faults,
        }

    def paint(self, objects, width, height):
        """Objects of a JSON -> ids (H x W, int32), segments_info, what is left out.

        Run lengths take far less memory than a mask of each object would. Crowds lie
        beneath all other objects.
        """
        layers, faults = [], []
        for o in objects:
            try:
                runs = outline_runs(o["segmentation"], height, width=width)
            except Exception:  # what people write there can be wrong in any way
                faults.append(f"object {o['id']} has no usable outline")
            else:
                layers.append((runs, o))
        layers.sort(key=lambda layer: (not layer[1]["iscrowd"], -layer[0][1::2].sum()))
        ids = np.ones(width * height, np.int32)  # column by column, as COCO's runs are
        background = {"category_id": self.background_id, "iscrowd": 0}
        painted = [background, *(o for _, o in layers)]  # of segment 1, 2, ...
        for i, (runs, _) in enumerate(layers, start=2):
            ends = runs.cumsum()
            for begin, end in zip(ends[::2], ends[1::2]):
                ids[begin:end] = i
        ids = ids.reshape(width, height).T
        segments = []
        for i, area in areas(ids).items():
            o = painted[i - 1]
            kind = {"category_id": o["category_id"], "iscrowd": o["iscrowd"]}
            segments.append({"id": i, "area": area, **kind})
        return ids, segments, faults


def open_data(name, split, size=64, seed=0, images=True, keep_crowds=False):
    """The source that --data names: 'shapes', or a folder in one of COCO's layouts.

    size and seed are those of the built-in scenes. Raises BadInput.
    """
    if name == "shapes":
        return Shapes(split, size, seed)
    panoptic = Path(name, "annotations", f"panoptic_{split}.json").is_file()
    source = CocoPanoptic if panoptic else CocoInstances
    return source(name, split, images=images, keep_crowds=keep_crowds)


# -------------------------------------------------------------- reading people's files
# Of the formats that Pillow knows, these are read without running another program.
# Pillow refuses pictures of more than 179 million pixels.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
MAX_ID = (1 << 24) - 1  # of a panoptic PNG: three bytes
# Some programs store their whole workflow in a PNG. Pillow stops at 1 MB a text, which
# is raised to its limit on all texts of a file together.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


@contextlib.contextmanager
def reading(path, what):
    """Whatever goes wrong while a user's file is read becomes a BadInput that names it.

    Only regular files are opened: a pipe or a device might never end.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadInput(f"{path}: is not a regular file; a {what} has to be one")
    try:
        yield
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(f"{path}: no such {what}") from None
    except Exception as error:
        raise BadInput(f"{path}: not a readable {what} ({error!r:.90})") from None


# ---------------------------------------------------------------------- finding files
def walk(folder):
    """Paths of all files below a folder, as text. Links to folders are followed, but no
    folder is entered twice. Hidden files and folders are left out.
    """
    entered = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(parent)
        if place in entered:
            folders.clear()
            continue
        entered.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.join(parent, name)


def find_json(root, names):
    """The first of these files in a data folder. Raises BadInput if none is there."""
    for name in names:
        if os.path.isfile(root / name):
            return root / name
    found = [path for path in walk(root) if path.endswith(".json")]
    there = ", ".join(os.path.relpath(path, root) for path in found[:8])
    if found:
        hint = f"the JSONs there are {there}; name the split that you want with"
        hint += " --train_split and --val_split (training) or --split, or rename one"
    else:
        hint = "see README, Data, or try --model small --data shapes (no download)"
    raise BadInput(f"--data {root}: no {' or '.join(names)}; {hint}")


def picture_folders(root, split, path):
    """The folders in which the pictures of a JSON usually lie, for `find_file`."""
    own = [root / split, root / "images" / split]
    return [*own, root / "images", path.parent, root]


@functools.cache
def files_by_name(folder):
    """{bare name: a list of paths} of the files below a folder, without those that hold
    annotations: a picture and its panoptic PNG may have the same name.
    """
    paths = defaultdict(list)
    for path in walk(folder):
        below = Path(os.path.relpath(path, folder)).parts[:-1]
        if not any(p == "annotations" or p.startswith("panoptic_") for p in below):
            paths[os.path.basename(path)].append(path)
    return paths


def find_file(name, folders, where):
    """The path of a file that a JSON names. `where` begins the message of a BadInput.

    It is where the name leads from one of the folders. Else it is the only file of its
    bare name below the split's own folders, which are the first two, or below the last
    of the folders if there are none. (If a split has a folder, a file that is missing
    there is missing: that of another split would be another picture.)
    """
    path = PureWindowsPath(str(name))  # separated by / or \
    for folder in folders:
        file = folder / path.as_posix()
        # isfile is False for a name that no file can have.
        if not path.anchor and ".." not in path.parts and os.path.isfile(file):
            return file
    below = [folder for folder in folders[:2] if folder.is_dir()] or folders[-1:]
    # Label Studio puts eight digits before the name of an uploaded picture. Cityscapes'
    # converter says X_gtFine_leftImg8bit.png for CITY/X_leftImg8bit.png.
    uploaded = re.sub("^[0-9a-f]{8}-", "", path.name)
    found = []
    for bare_name in (path.name, uploaded, path.name.replace("_gtFine_", "_")):
        places = [file for f in below for file in files_by_name(f).get(bare_name, [])]
        found = list({os.path.realpath(file): file for file in places}.values())
        if found:
            break
    if len(found) == 1:
        return Path(found[0])
    searched = ", ".join(map(str, below))
    tried = ", ".join(map(str, folders))
    line = f"{where}: {name!r:.80} leads to {len(found)} files below {searched}"
    raise BadInput(f"{line}, and to none from {tried}")


# --------------------------------------------------------------------------- pictures
def to_rgb(image):
    """PIL image of any mode -> H x W x 3, uint8. Transparency becomes white.

    What is deeper than 8 bit spans its own range, so that bit depths, exposures and
    offsets look alike. 8 bit stays as it is.
    """
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(stretch(np.asarray(image, np.float64)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        colours = image.convert("RGB")
        flat = all(low == high for low, high in colours.getextrema())
        # Some programs leave alpha at 0 everywhere. Then the colours are what is meant.
        if image.getchannel("A").getextrema() == (0, 0) and not flat:
            image = colours
        else:
            paper = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(paper, image)
    return np.asarray(image.convert("RGB"))


def stretch(values):
    """Numbers of any range -> uint8 of the same shape, 0 the darkest, 255 the lightest.

    One number in ten thousand may lie beyond either end, so that single hot pixels do
    not decide. NaN counts as the darkest.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return np.zeros(values.shape, np.uint8)
    low, high = np.percentile(finite, [0.01, 99.99])
    if low == high:  # all of the picture is in those few
        low, high = finite.min(), finite.max()
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low).clip(low, high)
    return np.round(255 * (values - low) / ((high - low) or 1)).astype(np.uint8)


def layout(image):
    """What Pillow calls the bytes of a picture that is not decoded yet: "RGB;16B"."""
    arguments = image.tile[0][3] if image.tile else ""
    return arguments if isinstance(arguments, str) else str(arguments[0])


def relaid(image, name):
    """Make Pillow take the bytes of a picture that is not decoded yet for `name`."""
    tiles = []
    for tile in image.tile:
        arguments = name if isinstance(tile[3], str) else (name, *tile[3][1:])
        make = getattr(type(tile), "_make", tuple)  # a named tuple since Pillow 11
        tiles.append(make((*tile[:3], arguments)))
    image.tile = tiles
    return image


def read_deep(image, path):
    """A picture that is not decoded yet -> PIL image, of 8 bits where Pillow would lose
    some: of colours of 16 bits it reads the high byte alone, and it takes unsigned
    numbers of 32 bits for signed ones. Other pictures are returned as they are.

    Raises BadInput for a TIFF that stores the colours of 16 bits one after the other.
    """
    name = layout(image)
    if name.startswith("I;32N"):
        values = np.asarray(image).view(np.uint32).astype(np.float64)
    elif ";16" in name and not image.mode.startswith("I"):
        # Pillow reads the high bytes, and the low ones if it is told the other order.
        low = Image.open(path, formats=FORMATS)
        low.seek(image.tell())
        if name == "LA;16B":  # it has no other order of these: take all four bytes
            values = np.asarray(relaid(low, "RGBA"), np.float64)
            values = 256 * values[..., :1] + values[..., 1:2]
            values = values.repeat(3, 2)
        else:
            other = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
            relaid(low, name[:-1] + other[name[-1]])
            high = np.asarray(image.convert("RGB"), np.float64)
            values = 256 * high + np.asarray(low.convert("RGB"))
    else:
        if getattr(image, "tag_v2", {}).get(284) == 2 and np.max(image.tag_v2[258]) > 8:
            line = "a TIFF of separate planes of over 8 bits: save it as PNG"
            raise BadInput(f"{path}: is {line}")
        return image
    shallow = Image.fromarray(stretch(values))
    if image.mode == "RGBA":
        shallow.putalpha(image.getchannel("A"))
    if "exif" in image.info:
        shallow.info["exif"] = image.info["exif"]
    return shallow


def read_image(path, size=None):
    """Any picture -> H x W x 3, uint8. Raises BadInput.

    size: (width, height) that the annotation says. EXIF rotation is applied unless only
    the unrotated picture has this size. Of several pages it is the first that is not
    empty. Colours of PPM and JPEG 2000 deeper than 8 bit span what the file declares.
    """
    with reading(path, "picture"), Image.open(path, formats=FORMATS) as image:
        # The header tells the size before anything is decoded. EXIF may turn it.
        if size is not None and size not in (image.size, image.size[::-1]):
            raise wrong_size(path, image, size=size)
        array = read_page(image, path, size=size)
        if array.min() == array.max():
            for page in range(1, getattr(image, "n_frames", 1)):
                image.seek(page)
                other = read_page(image, path, size=size)
                if other.min() < other.max():
                    say_once(f"note: {path}: page 1 is empty, page {page + 1} is read")
                    return other
        return array


def read_page(image, path, size):
    """The page at which an open picture stands -> H x W x 3, uint8. Raises BadInput."""
    image = read_deep(image, path)
    for turned in (ImageOps.exif_transpose(image), image):
        if size in (None, turned.size):  # a turn by 180 degrees keeps it
            return to_rgb(turned)
    raise wrong_size(path, image, size=size)


def wrong_size(path, image, size):
    """The error about a picture that has not the size that its annotation says."""
    return BadInput(f"{path}: is {image.size} pixels, its annotation says {size}")


def picture_size(path, size):
    """Width and height at which a picture's outlines are painted. Raises BadInput.

    size: what the JSON says, which must be what the picture's header says. Where it
    says 0 or nothing, the picture's own size counts.
    """
    if not all(size):
        height, width, _ = read_image(path).shape
        return width, height
    with reading(path, "picture"), Image.open(path, formats=FORMATS) as image:
        for own in (image.size, image.size[::-1]):  # EXIF may turn it
            if own == size:
                return own
        raise wrong_size(path, image, size=size)


def read_id_png(path, listed=()):
    """Panoptic PNG (id = R + 256 G + 65536 B) or one-channel id PNG -> H x W, int32.

    The colours of a palette are the ids if all of them are `listed`, else its indices
    are. Raises BadInput.
    """
    with reading(path, "id PNG"), Image.open(path, formats=FORMATS) as image:
        if not image.mode.startswith("I") and ";16" in layout(image):
            raise BadInput(f"{path}: has colours of 16 bits; ids are saved with 8")
        if image.mode[0] in "1LIF":
            ids = np.atleast_3d(image)[..., 0]  # H x W; of LA the first channel
        else:  # four bytes are an integer, the highest is the alpha channel
            ids = np.asarray(image.convert("RGBA")).view("<i4")[..., 0] & MAX_ID
        if image.mode == "P" and not set(np.unique(ids)) <= {0, *listed}:
            ids = np.asarray(image)
        if not 0 <= ids.min() <= ids.max() <= MAX_ID or np.any(ids % 1):
            raise BadInput(f"{path}: must hold whole numbers of 0..{MAX_ID}")
        return ids.astype(np.int32)


def write_id_png(path, ids):
    """Write H x W ids below 2^24 as a panoptic PNG."""
    write(path, ids.astype("<i4")[..., None].view(np.uint8)[..., :3])


def check_mask(path, ids):
    """Raise BadInput if an id map (H x W) that a user drew is a picture of a mask.

    JPEG and soft edges make ids that cover no square of 2 x 2 pixels. Up to 16 of them
    are taken for thin strokes. White is what is left of a sheet of paper.
    """
    corner = ids[1:, 1:]
    filled = (corner == ids[1:, :-1]) & (corner == ids[:-1, 1:])
    filled &= corner == ids[:-1, :-1]
    drawn = np.setdiff1d(ids, 0)
    thin = np.setdiff1d(drawn, corner[filled])
    advice = "save it as a PNG with one value per object, 0 (black) where unknown"
    if len(thin) > 16 and 2 * len(thin) > len(drawn):
        why = f"{len(thin)} of its {len(drawn)} ids cover no square of 2 x 2 pixels"
        raise BadInput(f"{path}: {why}, as in a JPEG or with soft edges: {advice}")
    if MAX_ID in drawn:
        raise BadInput(f"{path}: white is an id like any other: {advice}")


# ------------------------------------------------------------------------------- JSON
def read_coco(path, panoptic):
    """A COCO JSON, and its annotations by image: {image_id as text: (file name of the
    image's PNG or None, segments or objects)}. Raises BadInput.

    content["categories"] is a list of {id, name, isthing}, content["images"] of {id,
    file_name, width, height}, None where nothing is said. Segments have id, category_id
    and iscrowd, objects also segmentation. iscrowd and isthing are 0 or 1.

    What is listed twice:
    an image id         refused, unless both entries name the same file
    a file (instances)  one picture, with the objects of both entries
    an annotation (panoptic), for one image    refused
    a segment (panoptic)    one segment, unless its categories differ (`read_panoptic`
                            refuses that picture)
    """
    found = {}
    with reading(path, "COCO JSON"):
        content = json.loads(Path(path).read_bytes())  # a byte order mark is fine
        categories = content.get("categories", [])
        content["categories"] = [read_category(c) for c in categories]
        images = content.get("images", [])
        content["images"], same_as = images_once(path, images, panoptic=panoptic)
        for annotation in content["annotations"]:
            key = str(annotation["image_id"])
            key = same_as.get(key, key)
            where = f"{path}: image {key:.60}"
            if panoptic and key in found:
                raise BadInput(f"{where} has two annotations: keep one of all segments")
            with reading(where, "list of segments"):
                if panoptic:
                    segments = read_segments(annotation["segments_info"])
                    found[key] = (annotation.get("file_name"), segments)
                else:
                    found.setdefault(key, (None, []))[1].append(read_object(annotation))
    return content, found


def says_yes(value):
    """Whether a JSON's 1, true, "1" or "True" is one of these."""
    return value in (1, "1", "True", "true")


def read_category(category):
    """A category as {id, name, isthing}. It is a thing unless it says it is not."""
    number = operator.index(category["id"])  # refuses all but whole numbers
    stuff = category.get("isthing") in (0, "0", "False", "false")
    name = str(category.get("name", number))
    return {"id": number, "name": name, "isthing": int(not stuff)}


def images_once(path, images, panoptic):
    """Entries of images, each id once, and {id of a further entry of a file: the first
    one's}, ids as text. Raises BadInput if two files have the same id.
    """
    by_id, first_of, same_as = {}, {}, {}
    for entry in images:
        keys = ("id", "file_name", "width", "height")
        info = {key: entry.get(key) for key in keys}
        key, name = str(entry["id"]), info["file_name"]
        if key in by_id and by_id[key]["file_name"] != name:
            both = f"{by_id[key]['file_name']!r:.60} and {name!r:.60}"
            line = f"{both} have the same id {key:.60}: give each its own"
            raise BadInput(f"{path}: {line}")
        # Two panoptic annotations of a file are complete each, and so can't be joined.
        first = first_of.setdefault(key if panoptic or name is None else name, key)
        same_as[key] = first
        if first == key:
            by_id[key] = info
    return list(by_id.values()), same_as


def read_segments(listed):
    """segments_info of a panoptic annotation: a list of {id, category_id, iscrowd}."""
    segments = {}
    for s in listed:
        number = operator.index(s["id"])
        if number == 0:
            raise ValueError("a segment has the id 0, which means void")
        category = s.get("category_id")
        kind = {"category_id": category, "iscrowd": int(says_yes(s.get("iscrowd")))}
        segments.setdefault((number, category), {"id": number, **kind})
    return list(segments.values())


def read_object(annotation):
    """An object of an instances JSON: {id, category_id, iscrowd, segmentation}."""
    hash(annotation.get("category_id"))  # a list or dict fails here
    keys = ("id", "category_id", "segmentation")
    crowd = int(says_yes(annotation.get("iscrowd")))
    return {**{key: annotation.get(key) for key in keys}, "iscrowd": crowd}


def read_items(path, panoptic, keep_crowds):
    """What a source keeps of a JSON: its categories, its pictures, how many objects are
    crowds, and {category_id: how many objects} of those that are not listed. Their
    category_id becomes None, so that it cannot be taken for that of a background.

    A picture is (text, whether it has an object that is no crowd); the text is the JSON
    of (info, name of its PNG, segments or objects). It stays text because forked
    workers would copy a million dicts just by counting the references to them.

    Raises BadInput if no picture has an object that is no crowd.
    """
    content, found = read_coco(path, panoptic=panoptic)
    listed = {c["id"] for c in content["categories"]}
    items, crowds, unlisted = [], 0, Counter()
    for info in content["images"]:
        png, objects = found.get(str(info["id"]), (None, []))
        for o in objects:
            if keep_crowds:
                o["iscrowd"] = 0
            if o["category_id"] not in listed:
                unlisted[o["category_id"]] += 1
                o["category_id"] = None
        crowds += sum(o["iscrowd"] for o in objects)
        has_objects = not all(o["iscrowd"] for o in objects)
        items.append((json.dumps((info, png, objects)), has_objects))
    if not any(has_objects for _, has_objects in items):
        line = f"{path}: no image has an object that is not a crowd"
        hint = f"; --keep_crowds reads crowds ({crowds}) as objects" if crowds else ""
        raise BadInput(line + hint)
    return content["categories"], items, crowds, unlisted


def read_panoptic(name, segments, folders, where):
    """A panoptic annotation -> ids (H x W, int32) and segments_info of what is visible.

    name: of the PNG; segments: as `read_coco` has them; folders: for `find_file`; where
    begins the message of a BadInput. A listed segment without a pixel is left out.
    """
    listed = [s["id"] for s in segments]
    for i, times in Counter(listed).items():
        if times > 1:
            line = f"lists segment {i} in several categories: keep one"
            raise BadInput(f"{where}: {line}")
    ids = read_id_png(find_file(name, folders, where=where), listed)
    area = areas(ids)
    for i in area.keys() - listed:
        line = f"its PNG {name} holds id {i}, which the JSON does not list"
        raise BadInput(f"{where}: {line}")
    return ids, [{**s, "area": area[s["id"]]} for s in segments if s["id"] in area]


# --------------------------------------------------------------------------- outlines
def rle_counts(text):
    """Run lengths in COCO's text (bytes): five bits a character, the lowest first; from
    the fourth number on the difference from the last but one. (pycocotools would read
    beyond the end of a broken text.)
    """
    counts, value, shift = [], 0, 0
    for digit in text:
        digit -= 48
        value |= (digit & 31) << shift
        shift += 5
        if digit < 32:  # the number ends; its highest bit is the sign
            value -= (digit >> 4 & 1) << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def outline_runs(outline, height, width):
    """COCO's polygons or RLE -> run lengths (int64), column by column, outside first.

    Raises any exception if the outline is unusable or of another size.
    """
    if isinstance(outline, list):
        polygons = outline if isinstance(outline[0], list) else [outline]
        polygons = [p for p in polygons if len(p) >= 6]
        farthest = np.abs(np.concatenate(polygons)).max()
        # pycocotools walks along each edge: far ones, or NaN, would take all memory.
        if not farthest <= 2 * max(height, width):
            raise ValueError("a polygon leads far beyond the picture")
        outline = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    counts = outline["counts"]
    if not isinstance(counts, list):
        counts = rle_counts(counts.encode() if isinstance(counts, str) else counts)
    counts = np.array(counts, np.int64)
    if list(outline["size"]) != [height, width] or counts.sum() != height * width:
        raise ValueError("the run lengths are of another size")
    if counts.min() < 0:
        raise ValueError("a run length is negative")
    return counts


# =============================================================== what all scripts share
# -------------------------------------------------------- settings and the command line
def number(kind, low, high=2**32 - 1):
    """A function from a flag's text to an int or float (kind) in low..high."""

    def read_number(text):
        """Text that is no number raises ValueError, which argparse reports."""
        value = kind(text)
        if low <= value <= high:
            return value
        raise argparse.ArgumentTypeError(f"must be in {low}..{high}, not {text}")

    return read_number


def nonempty(text):
    """The text of a flag, not empty (as from an unset shell variable)."""
    if text.strip():
        return text
    raise argparse.ArgumentTypeError("is empty")


positive = number(int, 1)
natural = number(int, 0)
amount = number(float, 0)
fraction = number(float, 0, 1)
square = number(int, 8, 2**14)  # its side in pixels
square_or_none = number(int, 0, 2**14)


def flag(default, meaning, kind, nargs=None):
    """A field of a dataclass that is also a command-line flag.

    kind: a function of the flag's text, a list of choices, or bool for a switch;
    nargs: as argparse has it.
    """
    metadata = {"meaning": meaning, "kind": kind, "nargs": nargs}
    return dataclasses.field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """argparse that raises BadInput instead of exiting."""

    def error(self, message):
        """Called by argparse on a wrong flag. Raises BadInput."""
        raise BadInput(message)


def parse(settings, doc, argv):
    """The flags that were given, {name: value}; doc: the text of --help."""
    parser = Parser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # so that only what was typed is returned
        allow_abbrev=False,
    )
    for field in dataclasses.fields(settings):
        if not field.metadata:
            continue  # a setting without a flag
        kind = field.metadata["kind"]
        meaning = field.metadata["meaning"]
        default = field.default
        if isinstance(default, tuple):
            [default] = default
        if default not in (None, False):
            meaning += f" (default: {default})"
        meaning = meaning.replace("%", "%%")
        options = {"help": meaning}
        if kind is bool:
            options["action"] = "store_true"
        elif isinstance(kind, list):
            options["type"] = type(kind[0])
            options["choices"] = kind
        else:
            options["type"] = kind
        if field.metadata["nargs"]:
            options["nargs"] = field.metadata["nargs"]
        parser.add_argument(f"--{field.name}", **options)
    return vars(parser.parse_args(argv))


def default_workers():
    """The number of processes that load data: one per spare processor, at most 8."""
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    else:
        processors = os.cpu_count()
    # torchrun tells how many training processes share them
    share = processors // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, min(share - 1, 8))


@dataclass
class Settings:
    """The settings of both trainings. One without flag() is changed in the code."""

    model: str = flag(
        "sd",
        "sd: as the paper, from Stable Diffusion 1.4 on the hub; a hub id or a folder "
        "with unet/ and vae/; none: its untrained twin; small: from scratch, for a laptop",
        nonempty,
    )
    data: str = flag("data/coco", "'shapes', or a folder in COCO layout", nonempty)
    train_split: str = flag("train2017", "name of the split to train on", nonempty)
    val_split: str = flag("val2017", "name of the split to evaluate on", nonempty)
    keep_crowds: bool = flag(False, "treat objects with iscrowd 1 like others", bool)
    out: str = flag("checkpoints", "folder to write to", nonempty)
    ckpt: str = flag(None, "start from the weights in this checkpoint", nonempty)
    resume: bool = flag(False, "continue the run in --out", bool)
    seed: int = flag(0, "of all random choices", natural)
    device: str = flag(
        "auto", "cuda, mps, cpu, or auto for the first that is there", nonempty
    )
    precision: str = flag(
        "auto",
        "of the networks in training; auto: bf16 on a GPU that has it, fp16 on "
        "another, fp32 on a CPU",
        ["auto", "fp32", "bf16", "fp16"],
    )
    num_workers: int = flag(
        default_workers(), "data-loading processes per training process", natural
    )
    crop: int = flag(
        0,
        "beyond the paper: train on random squares of about so many pixels",
        square_or_none,
    )
    warmup: int = 200  # iterations over which the learning rate rises from 0 (authors)
    save_every: int = 1000  # iterations between evaluations; a short run has two
    ema: float = 0.0  # decay of a running average of the weights; 0: none (authors)

    # --resume may change these; all other settings are fixed for a run.
    FREE = (
        "data",
        "out",
        "resume",
        "device",
        "precision",
        "num_workers",
        "iters",
        "batch_size",
        "micro_batch",
        "lr",
    )
    # The data that a checkpoint is for: a training that starts from it takes them over.
    DATA = (
        "model",
        "data",
        "train_split",
        "val_split",
        "keep_crowds",
        "seed",
        "size",
        "crop",
    )


def configure(settings, small, doc, argv):
    """The settings of a training, an instance of the dataclass `settings`.

    The first of these that has a setting decides: the flags that were given; with
    --resume the run, otherwise the checkpoint to start from (its network and data
    only); with --model small the table `small`; the defaults. Raises BadInput if a flag
    contradicts the run or the network.
    """
    typed = parse(settings, doc, argv)
    call = settings(**typed)
    if call.resume:
        start = f"{call.out}/{settings.stage}_state.pt"
        stored = load(start, [f"{settings.stage}_state"])["settings"]
        fixed = {name for name in stored if name not in settings.FREE}
        unknown = stored.keys() - {f.name for f in dataclasses.fields(settings)}
        if unknown:
            raise BadInput(
                f"{start}: was written by another version of this code, which had the "
                f"setting {min(unknown)}; begin anew with another --out"
            )
    else:
        start, stored = call.stored()
        names = (*settings.DATA, *settings.NETWORK)
        stored = {name: stored[name] for name in names if name in stored}
        fixed = settings.NETWORK
    check_types(stored, settings, start)
    for name, value in typed.items():
        differs = value != stored.get(name, value)
        if name == "model":  # Stable Diffusion may lie elsewhere now
            differs = (value == "small") != (stored.get(name, value) == "small")
        if differs and (name in fixed or name == "model"):
            raise BadInput(
                f"--{name} {value}: {start} was made with {stored[name]}; leave the "
                "flag out, or begin anew with another --out"
            )
    model = typed.get("model", stored.get("model", call.model))
    table = small if model == "small" else {}
    result = settings(**{**table, **stored, **typed})
    result.resume = call.resume
    result.out = call.out
    return result


def check_types(stored, settings, origin):
    """Raise BadInput if settings read from a file are not of the dataclass's types."""
    for field in dataclasses.fields(settings):
        value = stored.get(field.name)
        kinds = (int, float) if field.type in (float, "float") else (field.type,)
        if value is None or isinstance(value, kinds):
            continue
        raise BadInput(f"{origin}: its setting {field.name} is {value!r:.40}")


def shortage(error):
    """One line on what the machine ran out of, if the error says so; else None."""
    text = str(error)
    if (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or "allocate memory" in text
    ):
        return (
            "out of memory: lower --micro_batch (stage 2), --batch_size (everywhere "
            "else), or --size"
        )
    if "shared memory" in text or "shm" in text or "Bus error" in text:
        return (
            "the data loaders ran out of shared memory: give --num_workers 0, or in a "
            "container more of it (--shm-size or --ipc=host)"
        )
    if "Too many open files" in text or "received 0 items of ancdata" in text:
        return "too many open files: give --num_workers 0, or raise `ulimit -n`"
    return None


def command(main):
    """Make `main(argv)` report bad input in one line on stderr and exit with code 2."""
    script = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def run(argv=None):
        """Call `main`; turn errors into exit codes."""
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # names of files need not be UTF-8
                stream.reconfigure(errors="backslashreplace")
        code = 2
        try:
            main(argv)
            if dist.is_initialized():
                dist.barrier()  # rank 0 may still write
                dist.destroy_process_group()
            return
        except KeyboardInterrupt:
            code = 130
            line = "interrupted; what was saved is whole, --resume continues a training"
        except (BadInput, OSError) as error:
            # a loader's worker puts its traceback in front
            line = str(error).strip().splitlines()[-1].removeprefix("data.BadInput: ")
            line = shortage(error) or line
        except (RuntimeError, MemoryError) as error:
            line = shortage(error)
            if line is None:
                raise
        print(f"{script}: error: {line}", file=sys.stderr)
        raise SystemExit(code)

    return run


def open_split(args, split, images=True):
    """The source of a split of --data. Raises BadInput."""
    return open_data(
        args.data,
        split,
        size=args.crop or args.size,
        seed=args.seed,
        images=images,
        keep_crowds=args.keep_crowds,
    )


# ---------------------------------------------------------- processes, device, progress
@functools.cache
def say_once(line, anywhere=False):
    """Print a line once, between progress bars: on rank 0, from its first worker only.

    anywhere: from every rank and worker, for what only one of them may come across.
    """
    worker = get_worker_info()
    first = RANK == 0 and (worker is None or worker.id == 0)
    if first or anywhere:
        tqdm.write(line, file=sys.stderr)


def progress(total, start=0):
    """A progress bar in pictures, on rank 0 only."""
    return tqdm(total=total, initial=start, unit="image", leave=False, disable=RANK > 0)


def why_no_gpu():
    """Why PyTorch cannot use CUDA, in its own words."""
    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).splitlines()[0]
    return "it reports no device"


def choose_device(name):
    """The torch.device that --device names. Raises BadInput."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available() and WORLD == 1:
            name = "mps"
        else:
            name = "cpu"
            if os.path.exists("/dev/nvidiactl"):  # the driver is there
                say_once(
                    f"note: on the CPU: PyTorch can't use the GPU ({why_no_gpu()})"
                )
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if TORCHRUN else "cuda:0"
    try:
        device = torch.zeros(1, device=name).device
    except Exception as error:
        reason = why_no_gpu() if name.startswith("cuda") else str(error).splitlines()[0]
        raise BadInput(
            f"--device {name}: not available here ({reason}); auto takes what there is"
        ) from None
    if device.type not in ("cuda", "mps", "cpu"):
        raise BadInput(f"--device {name}: must be cuda, mps, cpu or auto")
    return device


def setup(args):
    """Set up the device, the process group and the seed: returns device, precision.

    Raises BadInput.
    """
    device = choose_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 is asked for
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        )
    torch.manual_seed(args.seed)
    precision = args.precision
    if precision == "auto":
        precision = "fp32"
        if device.type == "cuda":
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16" if bf16 else "fp16"
    return device, precision


def autocast(device, precision):
    """A context of mixed precision: fp32, bf16 or fp16."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def sampling_autocast(device):
    """Mixed precision for sampling: on a GPU fp16, which gives the masks of fp32."""
    return autocast(device, "fp16" if device.type == "cuda" else "fp32")


def distributed(model):
    """The model, wrapped in DDP (backward() averages gradients) if WORLD > 1."""
    if WORLD == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True
    )


def sum_over_processes(value):
    """Sum of a number, tensor or NumPy array over all processes, as a tensor."""
    total = torch.as_tensor(value).clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def mean_over_processes(value):
    """Mean of a number, tensor or NumPy array over all processes, as a tensor."""
    return sum_over_processes(value) / WORLD


# ----------------------------------------------------------------------- files we write
def write(file, content):
    """Write a picture, text, checkpoint (*.pt) or JSON on rank 0, all of it or nothing.

    Raises BadInput if that is not possible; then the old file is unharmed.
    """
    if RANK > 0:
        return
    file = Path(file)
    # Not named after the file: a long name leaves no room for an ending. The process's
    # number keeps runs that write to the same folder apart.
    temporary = file.parent / f".{os.getpid()}.tmp"
    try:
        if file.exists() and not file.is_file():
            raise OSError("it is not a regular file")
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, (Image.Image, np.ndarray)):
            Image.fromarray(np.asarray(content)).save(temporary, "PNG")
        elif isinstance(content, str):
            temporary.write_text(content)
        elif file.suffix == ".pt":
            torch.save(content, temporary)
        else:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch
        reason = f"can't be written ({error}); what was there is unharmed"
        raise BadInput(f"{file}: {reason}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


# --------------------------------------------------------------- checkpoints, trainings
class Inert:
    """Stands in for any class that a foreign file names; does nothing."""

    def __init__(self, *args):
        pass

    __setstate__ = __init__


def load(file, kinds=("ae", "ldm", "release_ae", "release_ldm")):
    """A checkpoint of one of these kinds, as it was saved. Raises BadInput.

    Nothing in it is executed: for the classes that the authors' files name, PyTorch's
    restricted unpickler gets a dict or `Inert`. Weights are memory-mapped.
    """
    with reading(file, "checkpoint"):
        # executes nothing
        named = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        stand_ins = []
        for name in named:
            stand_in = OrderedDict if name.endswith("Dict") else Inert
            stand_ins.append((stand_in, name))
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(file, "cpu", weights_only=True, mmap=True)
        if "vae" in content:
            kind = "release_ae"
        elif "vae_semseg" in content:
            kind = "release_ldm"
        else:
            kind = content.get("kind")
        content = {"settings": {}, **content, "kind": kind}
        content["settings"] = dict(content["settings"])  # fails on anything else
    if kind not in kinds:
        wanted = " or ".join(kinds)
        raise BadInput(
            f"{file}: must be a checkpoint of kind {wanted}, is {kind!r:.40}"
        )
    return content


class Average:
    """A running average (EMA) of the weights, for sampling; none if decay is 0."""

    def __init__(self, weights, decay):
        self.weights = weights
        self.decay = decay
        self.values = [w.detach().clone() for w in weights] if decay else []

    def update(self, iteration):
        """Take in the weights after an iteration; early averages are over fewer."""
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        for value, weight in zip(self.values, self.weights):
            value.lerp_(weight.detach(), 1 - decay)

    @contextlib.contextmanager
    def in_place(self):
        """A context in which the network has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self):
        """Exchange the weights and their averages."""
        for value, weight in zip(self.values, self.weights):
            weight.data, value.data = value.data, weight.data


def learning_rate(iteration, args):
    """Linear warm-up, then constant or (from iteration 0) half a cosine down to 1%."""
    warmup = min(args.warmup, max(1, args.iters / 5))
    rate = args.lr * min(1, (iteration + 1) / warmup)
    if args.schedule == "cosine":
        rate *= 0.505 + 0.495 * math.cos(math.pi * iteration / args.iters)
    return rate


@dataclass
class Run:
    """The files of a training in --out: STAGE.pt, STAGE_state.pt, STAGE_log.jsonl.

    model, optimizer, scaler, average: what --resume restores.
    """

    args: Settings
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average

    def __post_init__(self):
        self.file = f"{self.args.out}/{self.args.stage}"  # how its file names begin
        self.overflows = 0  # iterations in a row with a gradient that is not finite
        start = self.restore() if self.args.resume else 0
        self.left = range(start, self.args.iters)  # the iterations that are left
        if self.left and start == 0:  # a new run replaces an older one in this folder
            write(f"{self.file}_log.jsonl", "")
            if RANK == 0:
                Path(f"{self.file}_state.pt").unlink(missing_ok=True)

    def restore(self):
        """Restore the last saved state; returns its iteration. Raises BadInput."""
        state = load(f"{self.file}_state.pt", [f"{self.args.stage}_state"])
        with reading(f"{self.file}_state.pt", "state of this run"):
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            for value, stored in zip(
                self.average.values, state["average"], strict=True
            ):
                value.copy_(stored)
            start = operator.index(state["iteration"])
        self.trim_log(start)
        return start

    def trim_log(self, start):
        """Remove log lines after iteration `start`: they will be written again."""
        lines = []
        with contextlib.suppress(FileNotFoundError):
            lines = Path(f"{self.file}_log.jsonl").read_text().splitlines()
        kept = []
        for line in lines:
            with contextlib.suppress(ValueError):  # a killed run may leave half a line
                if json.loads(line)["iteration"] <= start:
                    kept.append(line + "\n")
        write(f"{self.file}_log.jsonl", "".join(kept))

    def iterations(self):
        """The iterations that are left; seeds each from (seed, iteration, rank)."""
        size = self.args.batch_size
        self.bar = progress(self.args.iters * size, self.left.start * size)
        with self.bar:
            for it in self.left:
                # A CPU's generator uses 32 bits of a seed, so mix the three to that.
                mixed = np.random.SeedSequence((self.args.seed, it, RANK))
                torch.manual_seed(int(mixed.generate_state(1)[0]))
                yield it
                self.bar.update(size)

    def may_step(self, grad_norm):
        """Whether to make a step. Counts failures; 20 in a row raise BadInput."""
        if grad_norm.isfinite():
            self.overflows = 0
            return True
        self.overflows += 1
        if self.overflows == 20:
            raise BadInput(
                "the gradient has not been finite for 20 iterations; what was saved "
                "before is kept: lower --lr, or try --precision fp32, and --resume"
            )
        return False

    def time_to_log(self, done):
        """Whether to log after `done` iterations: rarely, as it waits for the GPU."""
        return done % 20 == 0 or done == self.args.iters

    def time_to_save(self, done):
        """Whether to evaluate and save after so many iterations."""
        every = min(self.args.save_every, math.ceil(self.args.iters / 2))
        return done % every == 0 or done == self.args.iters

    def log(self, done, **figures):
        """Append figures (numbers or tensors, not None) to the log, on rank 0."""
        known = {name: value for name, value in figures.items() if value is not None}
        figures = {name: float(value) for name, value in known.items()}
        if "loss" in figures:
            self.bar.set_postfix(loss=figures["loss"])
        if RANK == 0:
            with open(f"{self.file}_log.jsonl", "a") as file:
                file.write(json.dumps({"iteration": done, **figures}) + "\n")

    def save(self, done, settings):
        """Write the averaged weights to STAGE.pt, and STAGE_state.pt for --resume."""
        with self.average.in_place():
            content = {
                "kind": self.args.stage,
                "settings": settings,
                "weights": self.model.state_dict(),
            }
            write(f"{self.file}.pt", content)
        state = {
            "kind": f"{self.args.stage}_state",
            "settings": dataclasses.asdict(self.args),
            "iteration": done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.values,
        }
        write(f"{self.file}_state.pt", state)

    def report(self, figures, rows, captions):
        """Print the final figures; write them and the pictures to STAGE.json, .png."""
        write(f"{self.file}.json", figures)
        if RANK == 0:
            print(f"{sentence(figures)} -> {self.file}.png")
            sheet(f"{self.file}.png", rows, captions)


def settings_of(args):
    """The settings that a checkpoint stores: those of the data and the network."""
    names = (*args.DATA, *args.NETWORK)
    return {name: getattr(args, name) for name in names}


def stream_of(sample, *keys):
    """The random generator of (*keys, image_id) for a sample; keys: integers."""
    return np.random.default_rng((*keys, *str(sample["image_id"]).encode()))


def sentence(figures):
    """Figures as text: "images 256, pq 50.8"."""
    parts = []
    for name, value in figures.items():
        if value is not None:
            parts.append(f"{name} {value:.4g}")
    return ", ".join(parts)


# ----------------------------------------------------------------------------- pictures
BACKGROUND = (150, 150, 150)  # grey; void is darker
VOID = (30, 30, 30)

# The first 15 colours can be told apart with the common kinds of colour blindness. Of a
# grid of colours (steps of 15; none too dark, too light or greyish) a search chose
# those whose closest pair in CIELAB is as far apart as possible for normal vision and
# for simulated deuteranopia and protanopia (Machado et al. 2009). It began from random
# colours, took the farthest one each time, and exchanged single colours until nothing
# improved; the best of 400 trials is kept. Void, background and white counted as taken.
# Closest pair: 36 for normal vision, 21 for deuteranopia, 21 for protanopia.
DISTINCT = [
    (240, 0, 90),
    (90, 0, 255),
    (255, 225, 0),
    (0, 165, 255),
    (60, 255, 150),
    (240, 180, 240),
    (150, 45, 105),
    (120, 90, 0),
    (225, 45, 180),
    (225, 150, 0),
    (15, 105, 60),
    (30, 120, 255),
    (135, 225, 180),
    (255, 135, 90),
    (150, 0, 195),
]

# Colours of ids, 256 x 3 uint8. Beyond the 15, each hue is a golden ratio of the circle
# away from the one before it, at one of three levels of brightness.
GOLDEN_RATIO = 0.61803
ROWS = np.arange(256)[:, None]
HUES = 2 * np.pi * (ROWS * GOLDEN_RATIO + [0, 1 / 3, 2 / 3])  # of red, green, blue
PALETTE = ((140 + 110 * np.cos(HUES)) * (1 - 0.2 * (ROWS % 3))).astype(np.uint8)
PALETTE[0] = VOID
PALETTE[1:16] = DISTINCT

# A predicted segment is drawn in the colour of a true one above this IoU. It is lower
# than PQ's 0.5, so that a poor match still shows which segment was meant.
MATCHING_IOU = 0.25

# What a page may measure, in pixels.
MAX_PAGE = 2400
MAX_PICTURE = 640
GAP = 8


def palette_index(ids):
    """Row of PALETTE for each id: the id itself up to 255, then again from 1."""
    return np.where(ids > 0, (ids - 1) % 255 + 1, 0)


def colorize(ids, background=None):
    """Draw H x W integer ids as an H x W x 3 uint8 picture.

    Void (0) is dark. The segment whose id is `background`, if any, is grey.
    """
    colors = PALETTE[palette_index(ids)]
    if background is not None:
        colors[ids == background] = BACKGROUND
    return colors


def overlay(image, ids, background=None):
    """Draw segments over their image: H x W x 3 uint8 and H x W ids -> H x W x 3 uint8.

    Segments are outlined in white. Void is darkened more than the background. The image
    is shown in shades of grey, so that its own colours do not change the segments'.
    """
    opacity = np.where(ids == 0, 0.75, 0.6)[..., None]
    brightness = image.mean(-1, keepdims=True)
    colors = colorize(ids, background=background)
    mixed = ((1 - opacity) * brightness + opacity * colors).astype(np.uint8)
    mixed[:, 1:][ids[:, 1:] != ids[:, :-1]] = 255
    mixed[1:][ids[1:] != ids[:-1]] = 255
    return mixed


def overlay_completion(image, given, completed, background=None):
    """Draw a partial id map and its completion (both H x W) over their image.

    Returns two H x W x 3 uint8 pictures, in which an id has the same colour. In the
    second one, segments whose ids were not given are hatched.
    """
    before = overlay(image, given, background=background)
    after = overlay(image, completed, background=background)
    height, width = completed.shape
    step = max(6, max(height, width) // 50)
    thickness = max(1, step // 8)
    y, x = np.mgrid[:height, :width]
    diagonal = (x + y) % step
    added = (completed > 0) & ~np.isin(completed, given)
    # A white line beside a black one shows on every colour.
    after[added & (diagonal < 2 * thickness)] = 0
    after[added & (diagonal < thickness)] = 255
    return before, after


def rename(ids, names):
    """Replace each id of an H x W map by names[id]; the result is int32."""
    known, place = np.unique(ids, return_inverse=True)
    new = np.array([names[i] for i in known.tolist()], np.int32)
    return new[place].reshape(ids.shape)


def renumber(*maps, background=None):
    """Rename the ids of several H x W maps alike, for drawing: a list of int32 maps.

    The largest segment of the first map becomes 1, the next largest 2, and so on; ids
    that only later maps contain follow. So the colours that are told apart best are
    used first. Void and the background keep their ids.
    """
    names = {0: 0, background: background}  # None, for no background, is no id
    unused = (n for n in itertools.count(1) if n != background)
    for ids in maps:
        area = areas(ids)
        for i in sorted(area, key=area.get, reverse=True):
            if i not in names:
                names[i] = next(unused)
    return [rename(ids, names) for ids in maps]


def colors_like(ids, truth, fixed=()):
    """Rename predicted segments, for drawing only, so that they get the true colours.

    Takes two H x W maps and returns the first one as int32. Pairs of a predicted and a
    true segment are matched one to one, highest IoU first, down to MATCHING_IOU. All
    other predicted segments get ids whose colours no true segment has. The ids in
    `fixed`, such as those that were given to a completion, stay as they are.
    """
    area = areas(ids)
    true_area = areas(truth)
    pairs = ids.astype(np.int64) << 32 | truth
    matches = []
    for pair, shared in zip(*np.unique(pairs, return_counts=True)):
        i, t = divmod(int(pair), 1 << 32)
        if i == 0 or t == 0:
            continue
        iou = shared / (area[i] + true_area[t] - shared)
        if iou > MATCHING_IOU:
            matches.append((iou, i, t))
    names = {0: 0} | {int(i): int(i) for i in fixed}
    for _, i, t in sorted(matches, reverse=True):
        if i not in names and t not in names.values():
            names[i] = t
    reserved = {*true_area, *names}
    taken = reserved | {int(palette_index(i)) for i in reserved}
    unused = (n for n in itertools.count(1) if n not in taken)
    for i in sorted(area, key=area.get, reverse=True):
        if i not in names:
            names[i] = next(unused)
    return rename(ids, names)


def fit(array, cell, limit):
    """An H x W x 3 uint8 array as a PIL image for a page.

    A small one is enlarged by a whole factor until its longer side is at least `cell`,
    so that each of its pixels stays a sharp square. Neither side exceeds `limit`.
    """
    picture = Image.fromarray(array)
    side = max(picture.size)
    if side > limit:
        return ImageOps.contain(picture, (limit, limit))
    factor = min(-(-cell // side), limit // side)  # the first one is rounded up
    return ImageOps.scale(picture, factor, Image.Resampling.NEAREST)


def sheet(path, rows, captions, cell=160):
    """Write rows of pictures as one page, with a caption above each column.

    rows: pairs of a text to stand above the row, such as a file's name, and a list of H
    x W x 3 (or H x W, grey) uint8 arrays of any sizes; cell: least length in pixels of
    a picture's longer side.
    """
    limit = min(MAX_PICTURE, (MAX_PAGE - GAP) // len(captions) - GAP)
    names = [name for name, _ in rows]
    pictures = [[fit(array, cell, limit) for array in row] for _, row in rows]
    largest = max((p.width for row in pictures for p in row), default=cell)
    font = ImageFont.load_default(size=min(max(largest // 16, 14), 22))
    line = int(1.6 * font.size)

    widths = [int(font.getlength(caption)) for caption in captions]
    for row in pictures:
        for column, picture in enumerate(row):
            widths[column] = max(widths[column], picture.width)
    lefts = [*itertools.accumulate([GAP, *(width + GAP for width in widths)])]
    heights = [max(picture.height for picture in row) + GAP for row in pictures]
    lines = 1 + len(names)

    page = Image.new("RGB", (lefts[-1], lines * line + sum(heights) + GAP), "white")
    draw = ImageDraw.Draw(page)
    for left, caption in zip(lefts, captions):
        draw.text((left, GAP), caption, "black", font=font)
    top = line + GAP
    for number, row in enumerate(pictures):
        draw.text((GAP, top), str(names[number]), "#666666", font=font)
        top += line
        for left, picture in zip(lefts, row):
            page.paste(picture, (left, top))
        top += heights[number]
    write(path, page)


PICTURES = 6  # rows of a sheet
COMPARISON = ["image", "all pixels", "sure pixels only", "truth"]


def comparison(sample, ids, found):
    """A row of a sheet, as COMPARISON captions it: a file's name and pictures.

    ids, found: predicted maps (H x W), before and after uncertain pixels became void.
    """
    image = sample["image"]
    background = sample.get("background")
    [truth] = renumber(sample["ids"], background=background)
    maps = [colors_like(ids, truth), colors_like(found, truth), truth]
    pictures = [overlay(image, y, background=background) for y in maps]
    return sample["file_name"], [image, *pictures]


def completion(sample, given, completed):
    """A row of a sheet: image, the given part, completed maps, and the truth if there
    is one.

    given: H x W ids, 0 = unknown; completed: list of H x W ids.
    """
    image = sample["image"]
    background = sample.get("background")
    maps = [given, *completed]
    if "ids" in sample:
        maps = [sample["ids"], *maps]
    maps = renumber(*maps, background=background)
    pictures = []
    if "ids" in sample:
        truth, *maps = maps
        pictures.append(overlay(image, truth, background=background))
    given, *completed = maps
    kept = list(areas(given))
    for y in reversed(completed):
        if "ids" in sample:
            y = colors_like(y, truth, fixed=kept)
        before, after = overlay_completion(image, given, y, background=background)
        pictures.insert(0, after)
    return sample["file_name"], [image, before, *pictures]


# ------------------------------------------------ what a training can reach (--check)
def round_trips(source, size, num_ids, crop=0, factor=8, limit=256):
    """What a perfect network would make of each true segment of some samples.

    Segments get ids as in training, the map is resized as in training and then to the
    resolution of the decoder's logits, and these are decoded as in sampling. With crop
    this is done in a random square of each picture. Returns S x 3 floats: the IoU of a
    segment with itself; its area afterwards, with what lies beside the square, because
    tiles are joined before small segments become void; and the area of its picture,
    both in pixels. Crowds are left out, and the background of instances. Here `crop` is
    the side of all squares, also of instances, so that all objects count alike.
    """
    grid = 4 * size // factor  # side of the logits, four times that of the latent
    order = np.random.default_rng(0).permutation(len(source))
    results = []
    for index in order[:limit].tolist():
        try:
            sample = source[index]
        except BadInput:
            continue
        rng = np.random.default_rng((0, index))
        whole_area = {s["id"]: s["area"] for s in sample["segments_info"]}
        if crop:
            sample = crop_sample(sample, crop, rng)
        truth = sample["ids"]
        segments = [s for s in sample["segments_info"] if not s["iscrowd"]]
        ids, new_id = relabel(truth, segments, num_ids=num_ids, rng=rng)
        cells = resize_ids(resize_ids(ids, size, size), grid, grid)
        decoded = upsample(cells, *truth.shape)
        counted = np.isin(truth, [s["id"] for s in segments])  # not void, no crowd
        area_after = areas(np.where(counted, decoded, 0))
        shared = areas(np.where(counted & (decoded == ids), ids, 0))
        for s in objects_of(sample, source.background_id):
            name = new_id.get(s["id"])
            after = area_after.get(name, 0)
            both = shared.get(name, 0)
            iou = both / (s["area"] + after - both)
            beside = whole_area[s["id"]] - s["area"]
            results.append((iou, after + beside, truth.size))
    return np.array(results, np.float64).reshape(-1, 3)


def upsample(cells, height, width):
    """An id map at the resolution of the logits, decoded at height x width: the argmax
    of its one-hot maps after bilinear interpolation.
    """
    ids = np.zeros((height, width), np.int32)
    best = torch.zeros(height, width)
    for i in np.unique(cells).tolist():
        one_hot = torch.from_numpy(cells == i)[None, None].float()
        score = F.interpolate(one_hot, (height, width), mode="bilinear")[0, 0]
        ids[(score > best).numpy()] = i
        best = best.maximum(score)
    return ids


def perfect_network(source, size, num_ids, crop=0, factor=8, limit=256):
    """What training with these settings cannot exceed: {"pq", "ap50", "min_area"}.

    min_area is what a training stores (see `least_area`). Figures are in percent, None
    if there is no segment; ap50 is there for instances alone.
    """
    trips = round_trips(
        source, size, num_ids=num_ids, crop=crop, factor=factor, limit=limit
    )
    iou, area, pixels = trips.T
    min_area = None
    # supplement B, see `ae.paper_min_area`
    least = np.round(np.minimum(512, pixels / 512))
    if source.background_id is not None:
        found = np.sort(area[iou > 0.5])
        min_area = int(min(512, found[len(found) // 100])) if len(found) else 1
        least = np.full(len(area), min_area)
    survives = (area >= least) & (area > 0)
    hit = survives & (iou > 0.5)
    if len(hit) == 0:
        return {"pq": None, "ap50": None, "min_area": min_area}
    tp = hit.sum()
    fn = (~hit).sum()
    fp = (survives & ~hit).sum()
    figures = {"pq": float(100 * iou[hit].sum() / (tp + fp / 2 + fn / 2))}
    if source.background_id is not None:
        figures["ap50"] = float(100 * tp / (tp + fp + fn))
    return {**figures, "min_area": min_area}


def least_area(source, size, num_ids, crop=0, factor=8):
    """The least area in pixels that a training on a source stores.

    For instances it keeps 99% of the true segments that a perfect network finds, but is
    at most the paper's 512. Elsewhere it is None: the paper's rule (supplement B).
    """
    found = perfect_network(source, size, num_ids=num_ids, crop=crop, factor=factor)
    return found["min_area"]


def headline(figures):
    """Name and value of the figure that counts: AP50 of instances, else PQ."""
    name = "ap50" if "ap50" in figures else "pq"
    return name.upper(), figures[name] or 0.0


def warn_of_ceiling(source, args, num_ids, factor):
    """Say so if not even a perfect network would do well with a training's settings."""
    if RANK > 0:
        return
    figures = perfect_network(
        source, args.size, num_ids=num_ids, crop=args.crop, factor=factor, limit=32
    )
    name, value = headline(figures)
    if value < 80:
        say_once(
            f"note: at {args.size} px with N = {num_ids} and crops of {args.crop} px a "
            f"perfect network reaches {name} {value:.1f}; data.py --check suggests more"
        )


def suggest(source, areas_of):
    """The smallest size with which a perfect network reaches 90, else the best one.

    areas_of: of each picture its side and the areas of its objects. Instances that are
    small beside their picture are best segmented in tiles. Returns a line.
    """
    side = np.median([picture_side for picture_side, _ in areas_of])
    most = np.percentile([len(objects) for _, objects in areas_of], 99)
    crop = 0  # a scene is understood as a whole only
    if source.background_id is not None:
        tiles = [TILE * typical_side(own) for _, own in areas_of if own]
        tile = round(np.median(tiles))
        if tile < side:
            crop = tile
            most *= 2 * (crop / side) ** 2  # in a tile; its edges cut some in two
    num_ids = int(2 ** np.ceil(np.log2(most + 2)).clip(4, 8))
    best = (0.0, "")
    for size in (64, 128, 256, 512):
        factor = factor_of(size)
        if size > 64 and size > (crop or side) * factor / 4:  # finer than the picture
            continue
        figures = perfect_network(
            source, size, num_ids=num_ids, crop=crop, factor=factor, limit=64
        )
        name, value = headline(figures)
        flags = f"--size {size} --num_ids {num_ids}" + (
            f" --crop {crop}" if crop else ""
        )
        if value > best[0]:
            told = f"a perfect network: {name} {value:.1f}"
            if figures["min_area"] is not None:
                told += f"; a training will store --min_area {figures['min_area']}"
            best = (value, f"suggestion: {flags} ({told})")
        if value >= 90:
            break
    return best[1]


def factor_of(size):
    """f of the network that one would train at a size: that of --model small, or sd."""
    return 4 if size < 256 else 8


def check(source, size, num_ids, crop=0):
    """data.py --check: print what is broken in a source, and what training can reach.

    Returns {"images", "faults": a list of lines, "pq", "ap50", "min_area"}.
    """
    faults, areas_of = [], []
    for index in tqdm(range(len(source)), unit="image", leave=False):
        try:
            sample = source[index]
        except BadInput as error:
            faults.append(str(error))
            continue
        name = sample["file_name"]
        faults += [f"{name}: {fault}" for fault in sample.get("faults", ())]
        objects = objects_of(sample, source.background_id)
        picture_side = math.sqrt(sample["ids"].size)
        areas_of.append((picture_side, [s["area"] for s in objects]))
    for category, count in source.unlisted.items():
        faults.append(
            f"{source.json}: {count} objects are of category {category!r:.40}, which "
            "it does not list: they have no class in training"
        )
    print(*faults, f"{len(source)} images, {len(faults)} faults", sep="\n")
    if source.crowds:
        print(
            f"{source.crowds} objects are crowds (iscrowd 1) and not trained on; "
            "--keep_crowds reads them as objects, as painted masks of CVAT need it"
        )
    found = {"images": len(source), "faults": faults}
    counts = [len(objects) for _, objects in areas_of]
    if sum(counts) == 0:
        print("there is no object to train on")
        return found
    print(f"objects a picture: median {np.median(counts):g}, most {max(counts)}")
    sides = []  # of objects, as squares, in pixels of the network's input
    for picture_side, objects in areas_of:
        scale = size / (crop or picture_side)
        sides += [scale * math.sqrt(area) for area in objects]
    print(
        f"1% of the objects are smaller than {np.percentile(sides, 1):.1f} px a side "
        f"at --size {size}"
    )
    figures = perfect_network(
        source, size, num_ids=num_ids, crop=crop, factor=factor_of(size)
    )
    name, value = headline(figures)
    print(
        f"a perfect network with --size {size} --num_ids {num_ids} --crop {crop}: "
        f"{name} {value:.1f}"
    )
    print(suggest(source, areas_of))
    return {**found, **figures}


# =================================================================== beyond the paper
# Random squares of large pictures (--crop), other colours and quarter turns
# (--augment), parts of maps that are given (--given), and one id for the background of
# instances: the mains wrap `Augmented` around `TrainingSet`.
@dataclass
class Augmented:
    """A stream of training samples (`TrainingSet`), changed. What changes follows from
    (seed, n).
    """

    training: TrainingSet
    crop: int = 0  # side of a random square in place of the whole picture, in pixels
    augment: float = (
        0.0  # amount of other colours; with any also turns and scaled crops
    )
    given: float = 0.0  # share of samples with a partial map
    background: bool = False  # see `name_background`

    def __getitem__(self, n):
        """A training sample, and `given`: S x S, uint8, a part of its ids, 0 =
        unknown.
        """
        rng = np.random.default_rng((self.training.seed, CHANGES, n))
        sample = self.training.read(n)
        if self.crop:
            background_id = self.training.source.background_id
            side = self.crop
            if rng.random() < 0.8:  # the others have the side of sampling's first look
                side = own_crop(sample, self.crop, background_id)
            if self.augment:
                side = round(side * rng.uniform(0.6, 1.4))
            # Half of the squares aim at a random object, if possible at one that
            # touches another: most squares of a sparse picture would show nothing but
            # background.
            aim = None
            if rng.random() < 0.5:
                ids = [s["id"] for s in objects_of(sample, background_id)]
                if background_id is not None:
                    ids = touching(sample["ids"], ids) or ids
                aim = int(rng.choice(ids)) if ids else None
            sample = crop_sample(sample, side, rng, segment=aim)
        result = self.training.prepare(sample, n)
        if self.background:
            result = name_background(result, self.training.source)
        if self.augment:
            turns = int(rng.integers(4))
            result["ids"] = result["ids"].rot90(turns, (0, 1))
            if "image" in result:
                image = recolor(result["image"].numpy(), self.augment, rng)
                result["image"] = torch.from_numpy(image).rot90(turns, (1, 2))
        if self.given:
            given = torch.zeros_like(result["ids"])
            if rng.random() < self.given:
                given = torch.from_numpy(partial_map(result["ids"].numpy(), rng))
            result["given"] = given
        return result


def name_background(sample, source):
    """Swap ids of a training sample: its background gets the id BACKGROUND_SEGMENT.

    So the network learns which pixels are background, and need not choose one of N - 1
    ids for it. If there is no background, the segment that has this id gets an unused
    one, or becomes void if there is none. source: of the sample, with a background_id.
    """
    ids = sample["ids"]
    classes = sample["classes"]
    category = [c["id"] for c in source.categories].index(source.background_id)
    partners = (classes == category).nonzero().flatten().tolist()
    if not partners:
        partners = sorted(set(range(1, len(classes))) - set(ids.unique().tolist()))
    if not partners:
        ids = torch.where(ids == BACKGROUND_SEGMENT, 0, ids)
        partners = [BACKGROUND_SEGMENT]
    new_id = torch.arange(len(classes), dtype=torch.uint8)
    new_id[partners[0]] = BACKGROUND_SEGMENT
    new_id[BACKGROUND_SEGMENT] = partners[0]
    return {**sample, "ids": new_id[ids.long()], "classes": classes[new_id.long()]}


class Crops:
    """A source of random squares of another source's samples, for evaluation.

    Those of instances are as large as the truth asks for.
    """

    endless = False

    def __init__(self, source, side):
        self.source = source
        self.side = side
        self.categories = source.categories
        self.background_id = source.background_id

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        """A square of sample `index`, always the same one."""
        rng = np.random.default_rng((index, self.side))
        sample = self.source[index]
        return crop_sample(sample, own_crop(sample, self.side, self.background_id), rng)


# Side of the tiles of a picture of instances, in sides of its typical object. So a
# network sees all objects at one scale, as in Cellpose (Stringer et al. 2021).
TILE = 2.0


def own_crop(sample, crop, background_id):
    """Side of a sample's squares: `crop`, or for instances that of their tiles."""
    if background_id is None:
        return crop
    areas = [s["area"] for s in objects_of(sample, background_id)]
    return tile_side(areas, crop)


def tile_side(areas, crop):
    """Side in pixels of the tiles in which a picture of instances is segmented.

    areas: pixels of each of its objects; crop: the side if there is none. Otherwise it
    is at least half and at most four times `crop`.
    """
    if not areas:
        return crop
    side = round(TILE * typical_side(areas))
    return min(max(side, crop // 2), 4 * crop)


def typical_side(areas):
    """Side in pixels of a square with the area of a typical object.

    areas: pixels of each object, at least one. At least half of all their pixels are in
    objects as large as the typical one or larger, so that pieces of objects change it
    little.
    """
    areas = np.sort(areas)
    pixels = areas.cumsum()
    return math.sqrt(areas[np.searchsorted(pixels, pixels[-1] / 2)])


def objects_of(sample, background_id):
    """The segments_info of a sample without crowds and without the background."""
    found = []
    for s in sample["segments_info"]:
        is_background = background_id is not None and s["category_id"] == background_id
        if not s["iscrowd"] and not is_background:
            found.append(s)
    return found


def touching(ids, some):
    """Those of the ids `some` whose segments (of ids, H x W) share an edge with another
    of them.
    """
    found = set()
    for a, b in ((ids[1:], ids[:-1]), (ids[:, 1:], ids[:, :-1])):
        edge = a != b
        a, b = a[edge], b[edge]
        meet = np.isin(a, some) & np.isin(b, some)
        found.update(a[meet].tolist(), b[meet].tolist())
    return sorted(found)


def crop_sample(sample, side, rng, segment=None):
    """A random square of `side` pixels of a sample; beyond a picture its edge goes on.

    segment: an id; the square then contains a random pixel of this segment.
    """
    ids = sample["ids"]
    lowest, rightmost = [max(length - side, 0) for length in ids.shape]
    top = rng.integers(lowest + 1)
    left = rng.integers(rightmost + 1)
    if segment is not None:
        y, x = rng.choice(np.argwhere(ids == segment))
        top = min(max(y - rng.integers(side), 0), lowest)
        left = min(max(x - rng.integers(side), 0), rightmost)
    rows = np.arange(top, top + side).clip(max=ids.shape[0] - 1)
    columns = np.arange(left, left + side).clip(max=ids.shape[1] - 1)
    box = np.ix_(rows, columns)
    cropped = {**sample, "ids": ids[box]}
    if sample["image"] is not None:
        cropped["image"] = sample["image"][box]
    area = areas(cropped["ids"])
    cropped["segments_info"] = [
        {**s, "area": area[s["id"]]} for s in sample["segments_info"] if s["id"] in area
    ]
    return cropped


def recolor(image, amount, rng):
    """Another gamma, contrast, tint and brightness for a 3 x S x S uint8 image; some
    inverted.
    """
    gamma, contrast = np.exp(rng.uniform(-amount, amount, 2)).astype(np.float32)
    tint = rng.uniform(1 - amount / 2, 1 + amount / 2, (3, 1, 1)).astype(np.float32)
    brightness = rng.uniform(1 - amount, 1 + amount)
    image = image / np.float32(255)  # 0..1
    if rng.random() < 0.15:
        image = 1 - image
    image = tint * brightness * image**gamma
    image = image.mean() + contrast * (image - image.mean())
    return (255 * image).round().clip(0, 255).astype(np.uint8)


def partial_map(ids, rng):
    """A part of an id map (S x S, 0 = unknown): blocks, or clicks and strokes on
    segments.
    """
    if rng.random() < 0.5:
        drop = 1 - rng.random() ** 1.5  # mostly much
        block = 2 ** int(rng.integers(5))
        kept = drop_blocks(len(ids), drop, block=block, rng=rng)
        return np.where(kept, ids, 0).astype(np.uint8)
    given = np.zeros_like(ids)
    for i in areas(ids):
        pixels = np.argwhere(ids == i)  # P x 2
        start, end = pixels[rng.integers(len(pixels), size=2)]
        radius = rng.uniform(0.5, 6)
        if rng.random() < 0.5:
            end = start  # a click and not a stroke
        if rng.random() < 0.7:
            given[tuple(pixels[distances(pixels, start, end) <= radius].T)] = i
    return given


def distances(points, start, end):
    """Distance of points (P x 2) from the line between two of them: P floats."""
    line = end - start
    along = ((points - start) @ line / max(line @ line, 1)).clip(0, 1)  # P
    return np.linalg.norm(points - start - along[:, None] * line, axis=1)


# ------------------------------------------------------------------------- command line
@dataclass
class LookSettings:
    """What data.py can be told."""

    data: str = flag("data/coco", "'shapes', or a folder in COCO layout", nonempty)
    split: str = flag("train2017", "name of the split", nonempty)
    keep_crowds: bool = flag(
        False, "objects with iscrowd 1 are objects like others", bool
    )
    check: bool = flag(
        False,
        "read everything and say what is broken (exit code 1) and what to expect",
        bool,
    )
    size: int = flag(64, "side of the network's input, for what to expect", square)
    num_ids: int = flag(16, "N, for what to expect", positive)
    crop: int = flag(
        0, "side of the training crops, for what to expect", square_or_none
    )
    seed: int = flag(0, "of the built-in scenes", natural)
    out: str = flag("out", "folder to write to", nonempty)


@command
def main(argv=None):
    """Command line: draw some samples of a split, or check all of them."""
    args = LookSettings(**parse(LookSettings, __doc__, argv))
    source = open_data(
        args.data, args.split, seed=args.seed, keep_crowds=args.keep_crowds
    )
    if args.check:
        result = check(source, args.size, num_ids=args.num_ids, crop=args.crop)
        write(f"{args.out}/check.json", result)
        raise SystemExit(bool(result["faults"]))
    rows = []
    for s in itertools.islice(HeldOut(source), 8):
        background = s.get("background")
        [ids] = renumber(s["ids"], background=background)
        segments = colorize(ids, background=background)
        over = overlay(s["image"], ids, background=background)
        rows.append((s["file_name"], [s["image"], segments, over]))
    sheet(
        f"{args.out}/data.png", rows, ["image", "segments", "segments over the image"]
    )
    print(f"{len(source)} images -> {args.out}/data.png")


if __name__ == "__main__":
    main()

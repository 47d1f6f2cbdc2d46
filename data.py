"""data.py: every source of data becomes the same sample (paper: section 4.1).

    python data.py --data shapes                              # draw a sheet of built-in scenes
    python data.py --data data/coco --split val2017           # look into a COCO-style folder
    python data.py --data data/coco --split val2017 --check   # read all of it, name what is broken

A sample is a dict: `image` (H x W x 3, uint8), `ids` (H x W, int32, 0 = void), `segments_info` (as
COCO has it: id, category_id, iscrowd, area), `image_id`, `file_name`. What 0 means on the way:
    data         void: no segment, a crowd, or a segment of under 10 px
    stage 1      in: 0 in every channel; out: no loss there
    stage 2      no loss in a latent cell whose top left pixel is void
    sampling     the pixel is not certain enough, or its segment too small
    PQ           ignored where the truth is 0; no segment where the prediction is 0
    inpainting   unknown: to be filled in

Everything random has a stream of its own, so that each part repeats whatever the others do:
    scene (seed, crc32 of the split, index)     order of an epoch (seed, 1, epoch)
    training sample n (seed, 2, n)              ids in an evaluation (seed, 3, image_id)
    dropped blocks (seed, 4, image_id)          noise to sample from: crc32 of seed and image_id
    points, noise, timesteps: torch.manual_seed of (seed, iteration, rank); new weights: of seed"""

import argparse
import contextlib
import functools
import json
import math
import operator
import os
import sys
import zlib
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what a Mac's GPU lacks, its CPU does

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, get_worker_info
from tqdm import tqdm

RANK = int(os.environ.get("RANK", 0))  # of this process under torchrun; 0 prints and writes
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # number of processes

# ------------------------------------------------------------------------------- built-in scenes
KINDS = ("background", "ellipse", "rectangle", "triangle", "cross")  # category ids 1..5


def new_color(rng, taken):
    """A colour unlike those in `taken`, which it joins."""
    for _ in range(20):
        color = rng.uniform(0.05, 0.95, 3)
        if all(np.abs(color - other).sum() > 0.6 for other in taken):
            break
    taken.append(color)
    return color.astype(np.float32)


def turned(x, y, angle, unit=1):
    """Coordinates along an axis at this angle and across it, in units of `unit`."""
    cos, sin = math.cos(angle) / unit, math.sin(angle) / unit
    return cos * x + sin * y, cos * y - sin * x


def textured(rng, color, contrast, x, y):
    """The colour with a gradient, stripes or blotches over coordinates x and y: H x W x 3."""
    along, across = turned(x - 0.5, y - 0.5, rng.uniform(0, 2 * math.pi))
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
    """Where a random ellipse, rectangle, triangle or cross (kind 1..4) lies: H x W bool."""
    angle, radius = rng.uniform(0, 2 * math.pi), rng.uniform(0.15, 0.34)
    cx, cy = rng.uniform(0.1, 0.9, 2)  # its centre
    along, across = turned(x - cx, y - cy, angle, radius)
    u, v = np.abs(along), across / rng.uniform(0.65, 1)
    larger, smaller = np.maximum(u, np.abs(v)), np.minimum(u, np.abs(v))
    ellipse = u * u + v * v < 0.8
    rectangle = larger < 0.75
    triangle = (v > -0.6) & (1.732 * u + v < 1.1)
    cross = (smaller < 0.3) & (larger < 0.95)
    return (ellipse, rectangle, triangle, cross)[kind - 1]


@dataclass
class Shapes:
    """Built-in scenes. A training stream never repeats one; a held-out set has 512."""

    split: str
    size: int = 64
    seed: int = 0
    categories = [{"id": i, "name": k, "isthing": int(i > 1)} for i, k in enumerate(KINDS, 1)]

    def __len__(self):
        return 512

    def __getitem__(self, index):
        """A textured background (id 1) and 1..3 shapes, none of them almost hidden."""
        rng = np.random.default_rng((self.seed, zlib.crc32(self.split.encode()), index))
        size, taken, categories = self.size, [], [1]
        y, x = np.mgrid[:size, :size].astype(np.float32) / size + 0.5 / size
        ids = np.ones((size, size), np.int32)
        image = textured(rng, new_color(rng, taken), 0.3, x, y)
        for _ in range(rng.integers(1, 4)):
            kind = rng.integers(1, 5)
            mask = shape_mask(rng, kind, x, y)  # size x size, bool
            after = np.where(mask, len(categories) + 1, ids)  # size x size
            left = np.bincount(after.ravel(), minlength=len(categories) + 2)[1:]
            if left.min() < size * size / 60:
                continue
            fill = new_color(rng, taken)
            if rng.random() < 0.5:  # else in one colour
                fill = textured(rng, fill, 0.25, x, y)[mask]
            image[mask], ids = fill, after
            categories.append(kind + 1)
        image += rng.standard_normal(image.shape, np.float32) * rng.uniform(0, 0.05)
        segments = [s | {"category_id": c} for s, c in zip(describe(ids), categories)]
        sample = {"image_id": index, "file_name": f"{index:06d}.png", "segments_info": segments}
        return sample | {"image": (image.clip(0, 1) * 255).astype(np.uint8), "ids": ids}


# ---------------------------------------------------------------------- reading pictures and JSON
# On some formats Pillow would run other programs. It refuses pictures of over 179 million pixels.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
MAX_ID = (1 << 24) - 1  # of a panoptic PNG


class BadInput(ValueError):
    """The user gave something wrong. The message is one line: where, what is wrong, what to do."""


@contextlib.contextmanager
def reading(path, what):
    """Whatever goes wrong while a user's file is read becomes one line that names the file."""
    try:
        yield
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(f"{path}: no such {what}") from None
    except Exception as error:
        raise BadInput(f"{path}: not a readable {what} ({error!r:.90})") from None


def to_rgb(image):
    """PIL image of any mode -> H x W x 3 uint8; transparency becomes white. 16 and 32 bit and float
    span 0 to their brightest pixel: bit depths and exposures look alike."""
    if image.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(image, np.float64), posinf=0).clip(0)
        image = Image.fromarray((values * (255 / (values.max() or 1))).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def read_image(path, size=None):
    """Any picture -> H x W x 3 uint8, turned as its EXIF says, or unturned if only so it has the
    size (width, height) of its annotation. Raises BadInput."""
    with reading(path, "picture"), Image.open(path, formats=FORMATS) as image:
        for turned in (ImageOps.exif_transpose(image), image):  # turns that keep the size count too
            if size in (None, turned.size):
                return to_rgb(turned)
        raise BadInput(f"{path}: is {image.size} pixels, its annotation says {size}")


def read_id_png(path, listed=()):
    """Panoptic PNG (id = R + 256 G + 65536 B) or one-channel id PNG -> H x W int32. A palette's
    colours are the ids where all are `listed`, else its indices are. Raises BadInput."""
    with reading(path, "id PNG"), Image.open(path, formats=FORMATS) as image:
        if image.mode[0] in "1LIF":
            ids = np.atleast_3d(image)[..., 0]  # H x W; of LA the first channel
        else:  # four bytes are an integer, the highest is the alpha channel
            ids = np.asarray(image.convert("RGBA")).view("<i4")[..., 0] & MAX_ID
        if image.mode == "P" and not set(np.unique(ids)) <= {0, *listed}:
            ids = np.asarray(image)
        if not 0 <= ids.min() <= ids.max() <= MAX_ID:
            raise BadInput(f"{path}: holds ids outside of 0..{MAX_ID}")
        return ids.astype(np.int32)


def write_id_png(path, ids):
    """Write H x W ids below 2^24 as a panoptic PNG."""
    write(path, ids.astype("<i4")[..., None].view(np.uint8)[..., :3])


def read_coco(path, panoptic):
    """A COCO JSON, and its annotations by image: {image_id as text: (file_name of its PNG or None,
    segments or objects)}. Their iscrowd and the categories' isthing are 0 or 1. Raises BadInput."""
    found = {}
    with reading(path, "COCO JSON"):
        content = json.loads(Path(path).read_bytes())  # a byte order mark is fine
        for c in content.setdefault("categories", []):
            c["id"] = operator.index(c["id"])  # refuses all but whole numbers
            c["isthing"] = int(c.get("isthing") not in (0, "0", "False", "false"))
        for annotation in content["annotations"]:
            key = str(annotation["image_id"])
            with reading(f"{path}: image {key:.60}", "list of segments of different ids"):
                objects = annotation["segments_info"] if panoptic else [annotation]
                for o in objects:
                    o["iscrowd"] = int(o.get("iscrowd") in (1, "1", "True", "true"))
                    hash(o.setdefault("category_id"))  # None where it has none; fails on a list
                name, others = found.setdefault(key, (annotation.get("file_name"), []))
                others += objects
                if panoptic:
                    assert len({0, *(operator.index(s["id"]) for s in others)}) > len(others)
    return content, found


@functools.cache
def files_by_name(*folders):
    """{bare name: its paths} of all files below some folders."""
    paths = defaultdict(list)
    for folder in folders:
        for file in folder.rglob("*"):
            paths[file.name.replace("_gtFine_", "_")].append(file)
    return paths


def find_file(name, folders, where):
    """A file that a JSON names: there, or the only one of its bare name. Raises BadInput."""
    path = PureWindowsPath(str(name))  # separated by / or \
    for folder in folders:
        file = folder / path.as_posix()  # isfile: False for a name that no file can have
        if not path.anchor and ".." not in path.parts and os.path.isfile(file):
            return file
    # Cityscapes' converter says X_gtFine_leftImg8bit.png for CITY/X_leftImg8bit.png
    found = files_by_name(*folders[:2])[path.name.replace("_gtFine_", "_")]
    if len(found) != 1:
        raise BadInput(f"{where}: {name!r:.80} leads to {len(found)} files below {folders[0]}")
    return found[0]


def rle_counts(text):
    """Run lengths in COCO's text (bytes): 5 bits a character; from the fourth on differences."""
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
    """COCO's polygons or RLE -> run lengths by columns, outside first; fails if it is unusable."""
    if isinstance(outline, list):
        polygons = outline if isinstance(outline[0], list) else [outline]
        polygons = [p for p in polygons if len(p) >= 6]
        # pycocotools walks along every edge in C: far ones would take its memory
        assert np.abs(np.concatenate(polygons)).max() <= 2 * max(height, width)
        outline = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    counts = outline["counts"]
    if not isinstance(counts, list):
        counts = rle_counts(counts.encode() if isinstance(counts, str) else counts)
    counts = np.array(counts, np.int64)  # alternately outside and inside
    assert outline["size"] == [height, width] and counts.sum() == height * width
    assert counts.min() >= 0
    return counts


def read_panoptic(name, segments, folders, where):
    """A panoptic annotation -> ids (H x W, int32), segments with their area. Raises BadInput."""
    listed = [s["id"] for s in segments]
    ids = read_id_png(find_file(name, folders, where), listed)
    area = areas(ids)
    for i in area.keys() - listed:
        raise BadInput(f"{where}: its PNG {name} holds id {i}, which the JSON does not list")
    return ids, [s | {"area": area.get(s["id"], 0)} for s in segments]


class Folder:
    """A folder in COCO layout, whichever JSON is there:
    panoptic     annotations/panoptic_SPLIT.json, [annotations/]panoptic_SPLIT/*.png
    instances    annotations/instances_SPLIT.json; what is no instance is one background segment
    with pictures in SPLIT/, images/SPLIT/ or where the JSON says. Raises BadInput."""

    def __init__(self, folder, split):
        root, annotations = Path(folder), Path(folder, "annotations")
        self.panoptic = (annotations / f"panoptic_{split}.json").is_file()
        self.json = annotations / f"{'panoptic' if self.panoptic else 'instances'}_{split}.json"
        if not self.json.is_file():
            hint = "see README, Data, or try --model small --data shapes, which needs no download"
            raise BadInput(f"--data {folder}: no {self.json}; {hint}")
        self.pictures = [root / split, root / "images" / split, root / "images", root]
        self.pngs = [root / f"panoptic_{split}", annotations / f"panoptic_{split}", root]
        content, found = read_coco(self.json, self.panoptic)
        self.categories, self.background_id = content["categories"], None
        if not self.panoptic:
            self.background_id = max([c["id"] for c in self.categories], default=0) + 1
            self.categories.append({"id": self.background_id, "name": "background", "isthing": 0})
        # Images of crowds alone say nothing about segments. Items are kept as text: forked workers
        # would copy a million dicts just by counting references to them.
        self.items, anything = [], False
        with reading(self.json, "COCO JSON"):
            for info in content["images"]:
                name, objects = found.get(str(info["id"]), (None, []))
                shows = not all(o["iscrowd"] for o in objects)
                anything |= shows
                if shows or not self.panoptic:
                    self.items.append(json.dumps((info, name, objects)))
        if not anything:
            raise BadInput(f"{self.json}: no image has an object that is not a crowd")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index, image=True):
        """Sample `index` and all that the JSON says of it, its image only where wanted; `faults`: a
        line for each part of it that is left out. Raises BadInput if it can't be used."""
        info, name, objects = json.loads(self.items[index])
        where = f"{self.json}: image {info['id']}"
        if self.panoptic:
            ids, segments = read_panoptic(name, objects, self.pngs, where)
            faults = [f"segment {s['id']} has no pixel" for s in segments if not s["area"]]
        else:
            with reading(where, "entry with width and height"):
                ids, segments, faults = self.paint(objects, info["width"], info["height"])
        sample = info | {"ids": ids, "segments_info": segments, "image_id": info["id"]}
        sample |= {"background_id": self.background_id, "faults": faults, "image": None}
        if image:
            file = find_file(info.get("file_name"), self.pictures, where)
            sample["image"] = read_image(file, ids.shape[::-1])
        return sample

    def paint(self, objects, width, height):
        """Ids, segments_info, what is left out: from large to small, crowds beneath all."""
        layers, faults = [], []
        for o in objects:
            try:
                lengths = outline_runs(o["segmentation"], height, width)  # outside, inside, ...
                layers.append((not o["iscrowd"], -lengths[1::2].sum(), lengths, o))
            except Exception:  # what people write there can fail in any way
                say_once(f"note: {self.json}: objects without a usable outline are left out")
                faults.append(f"object {o.get('id')} has no usable outline")
        ids = np.ones(width * height, np.int32)  # by columns
        kinds = [{"category_id": self.background_id, "iscrowd": 0}]  # of segment 1, 2, ...
        for _, _, lengths, o in sorted(layers, key=operator.itemgetter(0, 1)):
            ends = lengths.cumsum()
            kinds.append({"category_id": o["category_id"], "iscrowd": o["iscrowd"]})
            for begin, end in zip(ends[::2], ends[1::2]):
                ids[begin:end] = len(kinds)
        ids = ids.reshape(width, height).T
        return ids, [s | kinds[s["id"] - 1] for s in describe(ids)], faults


def open_data(name, split, size=64, seed=0):
    """`shapes` (of this size) or a folder -> samples by index, `categories`. Raises BadInput."""
    return Shapes(split, size, seed) if name == "shapes" else Folder(name, split)


# --------------------------------------------------------------- what the network is given (4.1)
def runs(ids):
    """Runs of equal ids, fewer than pixels: the ids that occur, each run's place there, length."""
    flat = ids.reshape(-1)  # HW
    start = np.append(0, 1 + np.flatnonzero(flat[1:] != flat[:-1]))
    known, place = np.unique(flat[start], return_inverse=True)
    return known.tolist(), place, np.diff(start, append=flat.size)


def areas(ids):
    """{id: pixels} of an id map (H x W), by ascending id, without 0."""
    known, place, length = runs(ids)
    return {i: n for i, n in zip(known, np.bincount(place, length).astype(int).tolist()) if i}


def describe(ids):
    """segments_info of an id map (H x W), by ascending id, of category 1."""
    return [{"id": i, "area": n, "category_id": 1, "iscrowd": 0} for i, n in areas(ids).items()]


def resize_ids(ids, height, width):
    """Nearest-neighbour resize of an H x W map: the pixel whose centre is nearest."""
    return np.asarray(Image.fromarray(ids).resize((width, height), Image.NEAREST))


def resize_image(image, size):
    """Squash an H x W x 3 uint8 image to size x size without cropping (bicubic)."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.BICUBIC))


def relabel(ids, segments_info, num_ids, rng, min_area=1):
    """Random distinct ids in 1..num_ids-1 for the segments of a map (4.1): H x W uint8, and {old:
    new}. Crowds and those of under min_area pixels become void; of too many the largest stay."""
    kept = [s for s in segments_info if not s["iscrowd"] and s["area"] >= min_area]
    if len(kept) > num_ids - 1:
        say_once(f"note: images of more than N - 1 = {num_ids - 1} segments keep the largest")
        kept = sorted(kept, key=operator.itemgetter("area"), reverse=True)[: num_ids - 1]
    names = (rng.permutation(num_ids - 1) + 1).tolist()  # 0 stays void
    new_id = {s["id"]: name for s, name in zip(kept, names)}
    known, place, length = runs(ids)
    new = np.array([new_id.get(i, 0) for i in known], np.uint8)  # of each id that occurs
    return np.repeat(new[place], length).reshape(ids.shape), new_id


def crop_sample(sample, side, rng):
    """A random square of `side` pixels; beyond a picture its edge goes on, as in `sample.cut`."""
    ids, image = sample["ids"], sample["image"]
    starts = [rng.integers(max(n - side, 0) + 1) for n in ids.shape]
    rows, columns = (np.arange(k, k + side).clip(max=n - 1) for k, n in zip(starts, ids.shape))
    box = np.ix_(rows, columns)
    area = areas(ids[box])
    segments = [s | {"area": area[s["id"]]} for s in sample["segments_info"] if s["id"] in area]
    image = None if image is None else image[box]
    return sample | {"image": image, "ids": ids[box], "segments_info": segments}


def drop_blocks(size, drop, block, rng):
    """Which pixels stay given (size x size, bool) when a share `drop` of the blocks goes (3.3)."""
    cells = rng.random((-(-size // block),) * 2) >= drop  # as many as cover all pixels
    return cells.repeat(block, 0).repeat(block, 1)[:size, :size]


def partial_map(ids, rng):
    """A part of an id map (S x S, 0 = unknown): blocks, or a click or a stroke on some segments."""
    if rng.random() < 0.5:
        drop, block = 1 - rng.random() ** 1.5, 2 ** int(rng.integers(5))
        return np.where(drop_blocks(len(ids), drop, block, rng), ids, 0).astype(np.uint8)
    given = np.zeros_like(ids)
    for i in np.unique(ids[ids > 0]):
        pixels = np.argwhere(ids == i)  # P x 2
        start, end = pixels[rng.integers(len(pixels), size=2)]
        if rng.random() < 0.7:
            line = (end - start) * (rng.random() >= 0.5)  # a stroke, or a click
            along = ((pixels - start) @ line / max(line @ line, 1)).clip(0, 1)  # P
            distance = np.linalg.norm(pixels - start - along[:, None] * line, axis=1)
            given[tuple(pixels[distance <= rng.uniform(0.5, 6)].T)] = i
    return given


def recolor(image, amount, rng):
    """Another gamma, contrast, tint and brightness for a 3 x S x S uint8 image; some inverted."""
    gamma, contrast = np.exp(rng.uniform(-amount, amount, 2)).astype(np.float32)
    tint = rng.uniform(1 - amount / 2, 1 + amount / 2, (3, 1, 1)).astype(np.float32)
    image = image / np.float32(255)  # 0..1
    if rng.random() < 0.15:
        image = 1 - image
    image = tint * rng.uniform(1 - amount, 1 + amount) * image**gamma
    image = image.mean() + contrast * (image - image.mean())
    return (255 * image).round().clip(0, 255).astype(np.uint8)


@dataclass
class Training:
    """Sample n of an endless stream (4.1): square resize, horizontal flip, random distinct ids. All
    randomness comes from (seed, n): a run repeats over any ranks and workers and from mid-epoch."""

    source: object
    size: int  # side of the network's input
    num_ids: int  # N
    seed: int = 0
    images: bool = True  # stage 1 needs none
    min_area: int = 10  # px of the file; smaller segments are void in training
    # beyond the paper:
    crop: int = 0  # side of a random square in place of the whole picture
    augment: float = 0.0  # amount of other colours; with any also quarter turns and scaled crops
    given: float = 0.0  # share of samples with a partial map

    def read(self, n):
        """The n-th sample of the stream, in place of a broken one the next. Raises BadInput."""
        if isinstance(self.source, Shapes):
            return self.source[n]
        epoch, n = divmod(n, len(self.source))
        order = np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.source))
        for index in np.roll(order, -n):
            try:
                return self.source.__getitem__(index, self.images)
            except BadInput as error:
                line = str(error)
                say_once(f"note: {line}; the next one takes its place (data.py --check names all)")
        raise BadInput(f"{line}; nor can any other of the {len(order)} images be used")

    def __getitem__(self, n):
        """Arrays: ids (S x S, uint8, 0 = void), given (a part of them), image (3 x S x S, uint8),
        classes (N, int64: of each id, its place in the source's categories, -1 = none)."""
        sample, rng = self.read(n), np.random.default_rng((self.seed, 2, n))
        if self.crop:
            scale = rng.uniform(0.6, 1.4) if self.augment else 1
            sample = crop_sample(sample, round(self.crop * scale), rng)
        segments = sample["segments_info"]
        ids, new_id = relabel(sample["ids"], segments, self.num_ids, rng, self.min_area)
        layers = [resize_ids(ids, self.size, self.size)]
        if self.images:
            layers.extend(resize_image(sample["image"], self.size).transpose(2, 0, 1))
        layers = np.stack(layers)  # 1 or 4 x S x S: ids and image move together
        if rng.random() < 0.5:
            layers = layers[..., ::-1]
        if self.augment:
            layers = np.rot90(layers, rng.integers(4), (1, 2))
        ids, image = layers[0].copy(), layers[1:]
        if self.augment and self.images:
            image = recolor(image, self.augment, rng)
        given = partial_map(ids, rng) if rng.random() < self.given else np.zeros_like(ids)
        classes = np.full(self.num_ids, -1)
        place = {c["id"]: k for k, c in enumerate(self.source.categories)}  # of each category
        for s in segments:
            if s["id"] in new_id:
                classes[new_id[s["id"]]] = place.get(s["category_id"], -1)
        return {"ids": ids, "given": given, "image": image.copy(), "classes": classes}


def training_batches(dataset, iterations, args, pieces=1):
    """Batches of iterations: this rank's share in `pieces`, alike on any ranks. Raises BadInput."""
    share, rest = divmod(args.batch_size, WORLD * pieces)
    if rest:
        raise BadInput(f"--batch_size {args.batch_size}: no multiple of {WORLD} x {pieces} pieces")
    firsts = [(it * WORLD + RANK) * pieces + k for it in iterations for k in range(pieces)]
    batches = [range(n * share, (n + 1) * share) for n in firsts]
    pin = torch.cuda.is_available()
    return DataLoader(dataset, batch_sampler=batches, num_workers=args.num_workers, pin_memory=pin)


# ==================================================================== what all scripts share
# ------------------------------------------------------------------------------------- flags
def number(kind, low, high=2**32 - 1):
    """An argparse type: int or float in low..high."""

    def number_in_range(text):
        """The number that a flag's text says."""
        value = kind(text)  # argparse says what is wrong with the text
        if low <= value <= high:
            return value
        raise argparse.ArgumentTypeError(f"must be in {low}..{high}, not {text}")

    return number_in_range


positive, natural = number(int, 1), number(int, 0)
amount, fraction = number(float, 0), number(float, 0, 1)
STORED = ("model", "data", "train_split", "val_split", "size", "crop", "seed")  # in a checkpoint


class Parser(argparse.ArgumentParser):
    """A script's command line. doc: its docstring; out: default of --out. Errors are BadInput."""

    def __init__(self, doc, out=None):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.flag("--json", str, "also write the figures to this file")
        if out:  # all but pq.py
            self.flag("--data", str, "'shapes' or a COCO folder (default: as --ckpt, or data/coco)")
            self.flag("--seed", natural, "of everything random (default %(default)s)", default=0)
            self.flag("--out", str, "folder to write to (default %(default)s)", default=out)

    def error(self, message):
        """What argparse calls on a wrong flag. Raises BadInput."""
        raise BadInput(message)

    def flag(self, name, kind, meaning, **more):
        """Add a flag. kind: a function of its text, a list of choices, or bool for a switch."""
        if kind is bool:
            more["action"] = "store_true"
        elif isinstance(kind, list):
            more |= {"choices": kind, "type": type(kind[0])}
        else:
            more["type"] = kind
        self.add_argument(name, help=meaning, **more)


def training_parser(doc):
    """A parser with the flags of both trainings; what has no default here has it from --model."""
    parser = Parser(doc, "checkpoints")
    flag, sd = parser.flag, "CompVis/stable-diffusion-v1-4"
    flag("--model", ["sd", "small"], "the paper's, or from scratch on a laptop (sd)")
    flag("--sd", str, "Stable Diffusion: hub id, folder with unet/ and vae/, or 'none'", default=sd)
    flag("--train_split", str, "(default %(default)s)", default="train2017")
    flag("--val_split", str, "(default %(default)s)", default="val2017")
    flag("--size", positive, "side of the square that the network sees, in pixels")
    flag("--crop", natural, "train on random squares of so many pixels", default=0)
    flag("--batch_size", positive, "images an iteration, over all processes")
    flag("--iters", natural, "iterations; 0 with --ckpt only evaluates")
    flag("--lr", amount, "peak learning rate of AdamW")
    flag("--ckpt", str, "start from these weights and the settings stored with them")
    flag("--resume", bool, "go on with the run in --out, with its flags")
    flag("--save_every", positive, "iterations (default %(default)s)", default=1000)
    flag("--eval_images", positive, "in validation (default %(default)s)", default=256)
    flag("--num_workers", natural, "a rank", default=min(os.cpu_count() - 1, 8))
    flag("--device", str, "cuda, mps, cpu or auto (default %(default)s)", default="auto")
    flag("--precision", ["auto", "fp32", "bf16", "fp16"], "", default="auto")
    parser.set_defaults(data="data/coco", ema=0.0)
    return parser


def parse(parser, models, argv, stage):
    """Which of a flag's places decides: the command line, else the run of --resume, else the
    settings in --ckpt (or stage 1's), else the table of --model. Raises BadInput."""
    args, stored = parser.parse_args(argv), {}
    if args.resume:
        stored = load(f"{args.out}/{stage}_state.pt", [f"{stage}_state"])["settings"]
    elif args.ckpt or stage == "ldm":
        settings = load(args.ckpt or args.ae or f"{args.out}/ae.pt")["settings"]
        stored = settings | settings.get("autoencoder", {})
    model = args.model or stored.get("model", "sd")
    call = {k: vars(args)[k] for k in ("out", "json", "device", "num_workers", "resume", "ckpt")}
    parser.set_defaults(**{**models[model], **stored, "model": model, **call})
    return parser.parse_args(argv)


def open_splits(args):
    """The sources of --train_split and --val_split. Raises BadInput."""
    size, splits = args.crop or args.size, (args.train_split, args.val_split)
    return [open_data(args.data, split, size, args.seed) for split in splits]


def command(main):
    """Make `main(argv)` end on bad input with one line on stderr and exit code 2."""

    def run(argv=None):
        """`main`, and the end of a process."""
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
        try:
            main(argv)
            if dist.is_initialized():
                dist.barrier()  # rank 0 may still write
                dist.destroy_process_group()
            return
        except torch.OutOfMemoryError:
            line = "out of memory: give a smaller --batch_size, or --micro_batch in stage 2"
        except (BadInput, OSError) as error:  # a loader's worker puts its traceback in front
            line = str(error).strip().splitlines()[-1].removeprefix("data.BadInput: ")
        print(f"{Path(main.__code__.co_filename).name}: error: {line}", file=sys.stderr)
        raise SystemExit(2)

    return run


# ---------------------------------------------------------------------- processes, device, seeds
@functools.cache
def say_once(line):
    """Print a line once: on rank 0, beside progress bars, and in one of its loader's workers."""
    if RANK == getattr(get_worker_info(), "id", 0) == 0:
        tqdm.write(line, file=sys.stderr)


def setup(args):
    """The device, joined with those of other processes under torchrun, and a context of mixed
    precision. auto is bf16 on a GPU that has it, fp16 on an older one. Raises BadInput."""
    name = args.device
    if name == "auto":
        mps = torch.backends.mps.is_available() and WORLD == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        device = torch.zeros(1, device=name).device
    except Exception:
        raise BadInput(f"--device {name}: not available here; 'auto' takes what there is") from None
    torch.manual_seed(args.seed)  # a new network's weights
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if args.precision == "auto":
        half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        args.precision = half if device.type == "cuda" else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)
    return device, torch.autocast(device.type, dtype, enabled=dtype is not None)


def reduce_sum(value):
    """Sum of a tensor or NumPy array over all processes, as a tensor."""
    total = torch.as_tensor(value).clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


# --------------------------------------------------------------------- checkpoints and trainings
def write(path, content):
    """Write a picture, checkpoint (*.pt) or JSON on rank 0, never half of it. Raises BadInput."""
    if RANK > 0 or not path:  # no --json
        return
    path, temporary = Path(path), Path(f"{path}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if isinstance(content, (Image.Image, np.ndarray)):
            Image.fromarray(np.asarray(content)).save(temporary, "PNG")
        elif path.suffix == ".pt":
            torch.save(content, temporary)
        else:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        raise BadInput(f"{path}: can't be written ({error}); what was there is unharmed") from None
    finally:
        temporary.unlink(missing_ok=True)


class Inert:
    """Stands in for whatever class a foreign file names; takes anything and runs nothing."""

    def __init__(self, *args):
        pass

    __setstate__ = __init__


def load(path, kinds=("ae", "ldm", "release_ae", "release_ldm")):
    """A checkpoint of one of these kinds, as it was saved. Raises BadInput. Nothing in it is run:
    PyTorch's restricted unpickler gets a dict or `Inert` for each class that the authors' name."""
    with reading(path, "checkpoint"):
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)  # runs nothing
        stand_ins = [(OrderedDict if n.endswith("Dict") else Inert, n) for n in named]
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, "cpu", weights_only=True, mmap=bool(named))
        release = {"vae": "release_ae", "vae_semseg": "release_ldm"}
        kind = next((release[k] for k in content if k in release), None)
        content = {"kind": kind, "settings": {}, **content}
        content["settings"] = dict(content["settings"])  # fails on anything else
    if content["kind"] not in kinds:
        raise BadInput(f"{path}: must be of kind {' or '.join(kinds)}, is {content['kind']!r:.40}")
    return content


@dataclass
class Run:
    """What both trainings do beside their loss: step, log, evaluate, save, resume."""

    stage: str
    args: argparse.Namespace
    model: torch.nn.Module
    groups: object  # AdamW's parameters, or groups of them
    settings: dict  # what STAGE.pt keeps
    validate: object  # a function that gives figures in percent and rows of pictures
    parts = ("model", "adamw", "scaler")  # what --resume restores, beside the averages

    def __post_init__(self):
        args, self.path = self.args, f"{self.args.out}/{self.stage}"  # of files, without endings
        self.adamw = torch.optim.AdamW(self.groups, weight_decay=args.weight_decay, fused=True)
        self.weights = [p for group in self.adamw.param_groups for p in group["params"]]
        self.average = [p.detach().clone() for p in self.weights] if args.ema else []
        device = self.weights[0].device.type
        self.scaler = torch.amp.GradScaler(device, enabled=args.precision == "fp16")
        start, path = 0, f"{self.path}_state.pt"
        if args.resume:
            state = load(path, [f"{self.stage}_state"])
            with reading(path, "state of this run"):
                start = state["iteration"]
                for name in self.parts:
                    getattr(self, name).load_state_dict(dict(state[name]))
                for average, stored in zip(self.average, state["average"]):
                    average.copy_(stored)
        self.left = range(start, args.iters)
        if self.left and not start:
            self.log(0)

    def iterations(self):
        """The iterations that are left. All that one draws follows from (seed, iteration, rank)."""
        told = {"initial": self.left.start, "total": self.args.iters, "disable": RANK > 0}
        self.bar = tqdm(self.left, unit="image", unit_scale=self.args.batch_size, **told)
        for it in self.bar:
            torch.manual_seed(((self.args.seed * 1_000_003 + it) * 4096 + RANK) % 2**63)
            yield it

    def step(self, it, loss):
        """Step down the gradient and clear it; log, evaluate and save where it is time."""
        args, done, last = self.args, it + 1, it + 1 == self.args.iters
        rate = args.lr * min(max(it / 200, 5 * it / args.iters), 1)  # warms up
        if args.schedule == "cosine":  # to 1% of the peak
            rate *= 0.505 + 0.495 * math.cos(math.pi * it / args.iters)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.adamw)  # fp16's gradients
        norm = torch.nn.utils.clip_grad_norm_(self.weights, args.clip)  # before clipping
        if norm.isfinite():  # else the step is skipped
            self.scaler.step(self.adamw)
        self.scaler.update()
        self.adamw.zero_grad()
        if self.average:
            share = 1 - min(args.ema, done / (it + 10))  # early on a shorter average
            torch._foreach_lerp_(self.average, [p.data for p in self.weights], share)
        if done % 20 == 0 or last:
            self.bar.set_postfix(loss=loss.item())
            self.log(done, loss=loss.item(), grad_norm=norm.item(), lr=rate)
        if done % args.save_every == 0 or last:
            self.save(done)

    @contextlib.contextmanager
    def averaged(self):
        """For a while no training, and the averaged weights, if any, in place of the weights."""
        for p, average in zip(self.weights, self.average):
            p.data, average.data = average.data, p.data
        self.model.eval()
        yield
        self.model.train()
        for p, average in zip(self.weights, self.average):
            p.data, average.data = average.data, p.data

    def log(self, iteration, **figures):
        """Append a line of JSON to STAGE_log.jsonl, on rank 0; iteration 0 begins it anew."""
        if RANK == 0:
            os.makedirs(self.args.out, exist_ok=True)
            with open(f"{self.path}_log.jsonl", "a" if iteration else "w") as file:
                file.write(json.dumps({"iteration": iteration, **figures}) + "\n")

    def save(self, iteration):
        """Evaluate and write STAGE.pt, the averaged weights, and STAGE_state.pt, to resume."""
        content = {"kind": self.stage, "settings": self.settings}
        with self.averaged():
            self.result = self.validate()
            write(f"{self.path}.pt", content | {"weights": self.model.state_dict()})
        self.log(iteration, val_pq=self.result[0]["pq"])
        state = {"kind": f"{self.stage}_state", "settings": vars(self.args), "iteration": iteration}
        state |= {name: getattr(self, name).state_dict() for name in self.parts}
        write(f"{self.path}_state.pt", state | {"average": self.average})

    def finish(self, columns):
        """Print the last figures and write what they show: STAGE.png, STAGE_loss.png, --json."""
        if not self.left:  # nothing was trained
            with self.averaged():
                self.result = self.validate()
        figures, rows = self.result
        if RANK == 0:
            told = ", ".join(f"{k} {v:.4g}" for k, v in figures.items() if v is not None)
            print(f"{told} -> {self.path}.png")
            sheet(f"{self.path}.png", rows, columns)
            if self.args.iters:  # what a resumed run repeats replaces its first account
                entries = map(json.loads, open(f"{self.path}_log.jsonl"))
                losses = {e["iteration"]: e["loss"] for e in entries if "loss" in e}
                plot(f"{self.path}_loss.png", {"loss": [*losses.items()]}, "iteration", "loss")
            write(self.args.json, figures)


# --------------------------------------------------------------------------------------- pictures
HUES = 2 * np.pi * (np.arange(256)[:, None] * 0.61803 + [0, 1 / 3, 2 / 3])
PALETTE = (140 + 110 * np.cos(HUES)).astype(np.uint8)  # 256 x 3, colours of ids
PALETTE[0] = 46  # void is dark grey


def colorize(ids):
    """H x W ids -> H x W x 3 uint8."""
    return PALETTE[np.where(ids > 255, ids % 255 + 1, ids)]


def overlay(image, ids):
    """Image (H x W x 3, uint8) with its segments in colour and their outlines in white."""
    mixed = (0.45 * image + 0.55 * colorize(ids)).astype(np.uint8)
    mixed[:, 1:][ids[:, 1:] != ids[:, :-1]] = 255  # outlines
    mixed[1:][ids[1:] != ids[:-1]] = 255
    return mixed


def sheet(path, rows, captions, cell=160):
    """Draw rows of H x W x 3 uint8 arrays as one picture, with a caption over each column."""
    page = Image.new("RGB", (len(captions) * cell, 18 + len(rows) * cell), "white")
    for column, caption in enumerate(captions):
        ImageDraw.Draw(page).text((column * cell + 2, 2), caption, "black")
    for y, row in enumerate(rows):
        for x, array in enumerate(row):
            tile = ImageOps.contain(Image.fromarray(array), (cell - 4, cell - 4))
            page.paste(tile, (x * cell, 18 + y * cell))
    write(path, page)


def plot(path, curves, xlabel, ylabel):
    """Draw line plots with Pillow. curves: {label: [(x, y), ...]}, all finite."""
    points = np.concatenate([*curves.values()])  # P x 2
    low, high = points.min(0), points.max(0)
    page = Image.new("RGB", (560, 350), "white")
    draw = ImageDraw.Draw(page)
    draw.rectangle([30, 20, 530, 310], outline="#bbbbbb")
    ranges = [f"{name} {a:.4g} .. {b:.4g}" for name, a, b in zip((xlabel, ylabel), low, high)]
    draw.text((30, 322), ", ".join(ranges), "black")  # across, up
    for k, (label, curve) in enumerate(curves.items()):
        color = tuple(PALETTE[k + 1])
        place = (np.array(curve) - low) / np.maximum(high - low, 1e-9)  # P x 2, 0..1
        draw.line(([30, 310] + place * [500, -290]).flatten().tolist(), color, 2)
        draw.text((440, 30 + 14 * k), label, color)
    write(path, page)


def faults(source):
    """Read all samples; yields a line for each thing that is broken."""
    for index in tqdm(range(len(source)), unit="image"):
        try:
            sample = source[index]
            for fault in sample.get("faults", ()):
                yield f"{sample['file_name']}: {fault}"
        except BadInput as error:
            yield str(error)


@command
def main(argv=None):
    """Command line: write a sheet of images and their segments, or check a folder."""
    parser = Parser(__doc__, "out")
    parser.flag("--split", str, "(default %(default)s)", default="train2017")
    parser.flag("--check", bool, "exit code 1 if anything is broken")
    args = parser.parse_args(argv)
    source = open_data(args.data or "data/coco", args.split, seed=args.seed)
    broken = list(faults(source)) if args.check else []
    if args.check:
        print(*broken, f"{len(source)} images, {len(broken)} faults", sep="\n")
    else:
        samples = [source[i] for i in range(min(8, len(source)))]
        rows = [[s["image"], colorize(s["ids"]), overlay(s["image"], s["ids"])] for s in samples]
        sheet(f"{args.out}/data.png", rows, ["image", "ids", "overlay"])
        print(f"{len(source)} images -> {args.out}/data.png")
    write(args.json, {"images": len(source), "faults": len(broken)})
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()

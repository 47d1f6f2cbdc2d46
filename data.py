"""data.py: every source of data becomes the same sample (paper: section 4.1).

    python data.py --data shapes                      # draw a sheet of built-in scenes
    python data.py --data data/coco --split val2017   # look into a COCO-style folder
    python data.py --check data/coco                  # read all of it and name what is broken

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
    dropped blocks (seed, 4, image_id)          noise to sample from: sha256 of seed and image_id
    an iteration's points, noise, timesteps: torch.manual_seed of (seed, iteration, rank); new
    weights: of seed
"""

import argparse
import contextlib
import ctypes
import functools
import json
import math
import multiprocessing
import os
import random
import sys
import warnings
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what a Mac's GPU lacks, its CPU does

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, get_worker_info
from tqdm import tqdm

warnings.filterwarnings("ignore", module="PIL")  # remarks on a picture's metadata

# ------------------------------------------------------------------------------- built-in scenes

KINDS = ("background", "ellipse", "rectangle", "triangle", "cross")  # category ids 1..5


def texture(rng, x, y):
    """A pattern in 0..1 over pixel coordinates x and y: gradient, stripes or blotches."""
    angle = rng.uniform(0, 2 * math.pi)
    along = math.cos(angle) * (x - 0.5) + math.sin(angle) * (y - 0.5)
    kind = rng.integers(3)
    if kind == 0:
        return along + 0.5
    if kind == 1:
        return 0.5 + 0.5 * np.sin(along * rng.uniform(15, 45))
    across = math.cos(angle) * (y - 0.5) - math.sin(angle) * (x - 0.5)
    waves = np.sin(along * rng.uniform(10, 30) + rng.uniform(0, 6))
    return 0.5 + 0.5 * waves * np.sin(across * rng.uniform(10, 30))


def new_color(rng, taken):
    """A colour unlike those in `taken`, so that the picture shows where a segment ends."""
    for _ in range(20):
        color = rng.uniform(0.05, 0.95, 3)
        if all(np.abs(color - other).sum() > 0.6 for other in taken):
            break
    taken.append(color)
    return color.astype(np.float32)


def shape_mask(rng, kind, x, y):
    """Where a random ellipse, rectangle, triangle or cross (kind 1..4) lies: H x W bool."""
    angle, radius = rng.uniform(0, 2 * math.pi), rng.uniform(0.15, 0.34)
    cx, cy = rng.uniform(0.1, 0.9, 2)
    cos, sin = math.cos(angle) / radius, math.sin(angle) / radius
    u = cos * (x - cx) + sin * (y - cy)  # the shape's own axes, in units of its radius
    v = (cos * (y - cy) - sin * (x - cx)) / rng.uniform(0.65, 1)
    if kind == 1:
        return u * u + v * v < 0.8
    if kind == 2:
        return np.maximum(np.abs(u), np.abs(v)) < 0.75
    if kind == 3:
        return (v > -0.6) & (1.732 * np.abs(u) + v < 1.1)
    u, v = np.abs(u), np.abs(v)
    return (np.minimum(u, v) < 0.3) & (np.maximum(u, v) < 0.95)


def draw_scene(seed, split, index, size=64, max_shapes=3):
    """Scene `index` of a split: a textured background and 1..max_shapes shapes, some hidden.

    Returns the image (size x size x 3, uint8), ids (size x size, int32, 1 = background) and the
    category of each id. A shape that would leave an earlier one almost no pixel is not drawn."""
    rng = np.random.default_rng((seed, zlib.crc32(split.encode()), index))
    y, x = np.mgrid[:size, :size].astype(np.float32) / size + 0.5 / size
    ids, taken, categories = np.ones((size, size), np.int32), [], [1]
    image = new_color(rng, taken)
    pattern = texture(rng, x, y)[..., None] - 0.5
    image = image + pattern * rng.uniform(-0.3, 0.3, 3).astype(np.float32)
    for _ in range(rng.integers(1, max_shapes + 1)):
        kind = int(rng.integers(1, 5))
        mask = shape_mask(rng, kind, x, y)
        after = np.where(mask, len(categories) + 1, ids)
        if np.bincount(after.ravel(), minlength=len(categories) + 2)[1:].min() < size * size / 60:
            continue
        fill = new_color(rng, taken)
        if rng.random() < 0.5:
            pattern = texture(rng, x, y)[mask][:, None] - 0.5
            fill = fill + pattern * rng.uniform(-0.25, 0.25, 3).astype(np.float32)
        image[mask], ids = fill, after
        categories.append(kind + 1)
    image += rng.standard_normal(image.shape, np.float32) * rng.uniform(0, 0.05)
    return (image.clip(0, 1) * 255).astype(np.uint8), ids, categories


class Shapes:
    """Built-in scenes. A training stream never repeats one; `len` is the size of a held-out set."""

    endless = True

    def __init__(self, split, size=64, seed=0, length=512):
        self.split, self.size, self.seed, self.length = split, size, seed, length
        rows = enumerate(KINDS)
        self.categories = [{"id": i + 1, "name": k, "isthing": int(i > 0)} for i, k in rows]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        image, ids, categories = draw_scene(self.seed, self.split, index, self.size)
        segments = [{**s, "category_id": categories[s["id"] - 1]} for s in describe(ids)]
        sample = {"image": image, "ids": ids, "segments_info": segments}
        return {**sample, "image_id": index, "file_name": f"{index:06d}.png"}


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
    except Image.DecompressionBombError:
        raise BadInput(f"{path}: has more pixels than Pillow opens: make it smaller") from None
    except Exception:
        raise BadInput(f"{path}: not a readable {what}, or cut short") from None


def to_rgb(image):
    """PIL image of any mode -> H x W x 3 uint8; transparency is put on white.

    16 and 32 bit and float span 0 to their brightest pixel: bit depths and exposures look alike."""
    if image.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
        values = values - min(values.min(), 0)
        image = Image.fromarray((values * (255 / (values.max() or 1))).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def read_image(path, size=None):
    """Any picture -> H x W x 3 uint8, upright as its EXIF says. Raises BadInput.

    size: (width, height) that an annotation gives it; a picture that has it unturned stays so."""
    with reading(path, "picture"), Image.open(path, formats=FORMATS) as image:
        for turned in (ImageOps.exif_transpose(image), image):  # turns that keep the size count too
            if size in (None, turned.size):
                return to_rgb(turned)
        raise BadInput(
            f"{path}: is {image.width} x {image.height} pixels, "
            f"its annotation says {size[0]} x {size[1]}"
        )


def read_id_png(path, listed=None):
    """Panoptic PNG (id = R + 256 G + 65536 B) or one-channel id PNG -> H x W int32.

    A palette's colours are the ids, unless only its indices are `listed`, or nothing is listed.
    Raises BadInput."""
    with reading(path, "id PNG"), Image.open(path, formats=FORMATS) as image:
        if image.mode[0] in "1LIF":
            ids = np.atleast_3d(image)[..., 0]
        else:  # with a fourth byte, which Pillow has anyway, a pixel is an integer
            ids = np.frombuffer(image.convert("RGB").tobytes("raw", "RGBX"), "<i4") & MAX_ID
            ids = ids.reshape(image.height, image.width)
        if image.mode == "P":
            unlisted = [set(np.unique(x)) - {0, *(listed or ())} for x in (ids, np.asarray(image))]
            if listed is None or unlisted[0] and not unlisted[1]:
                ids = np.asarray(image)
        if not 0 <= ids.min() <= ids.max() <= MAX_ID:
            raise BadInput(f"{path}: holds ids outside of 0..{MAX_ID}")
        return ids.astype(np.int32, copy=False)


def write_id_png(path, ids):
    """Write H x W ids below 2^24 as a panoptic PNG."""
    rgb = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
    with replacing(path) as temporary:
        Image.fromarray(rgb).save(temporary, "PNG")


def says_yes(value, default):
    """A flag of a COCO JSON, however it is written; `default` where it says nothing."""
    return default if value is None else str(value).lower() not in ("false", "0", "0.0", "no", "")


def check_id(entry, where, low):
    """The id low..2^24-1 of a JSON's entry. Raises BadInput."""
    value = entry.get("id")
    if type(value) is not int or not low <= value <= MAX_ID:
        told = f"must be a whole number in {low}..{MAX_ID}, not {str(value)[:40]!r}"
        raise BadInput(f"{where}: id {told}")
    return value


def read_coco(path, lists=("images", "annotations", "categories")):
    """A COCO JSON with these lists of objects; categories as {id, name, isthing}. Raises BadInput."""
    with reading(path, "JSON file"):
        content = json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    for name in lists:
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise BadInput(f"{path}: not a COCO file: '{name}' must be a list of objects")
    if "categories" in lists:
        for c in content["categories"]:
            check_id(c, f"{path}: a category", 0)
            c["name"] = str(c.get("name", c["id"]))
            c["isthing"] = int(says_yes(c.get("isthing"), True))
    return content


def by_image(content, path, panoptic):
    """Annotations by image: {image_id as text: (file_name of its PNG or None, segments or objects)}.

    Raises BadInput."""
    found = {}
    for annotation in content["annotations"]:
        key, objects = str(annotation.get("image_id")), [annotation]
        where = f"{path}: image {key[:60]}"
        if panoptic:
            objects = annotation.get("segments_info")
            if key in found:
                raise BadInput(f"{where}: is annotated twice")
            if not isinstance(objects, list) or not all(isinstance(s, dict) for s in objects):
                raise BadInput(f"{where}: segments_info must be a list of segments")
            if len({check_id(s, where, 1) for s in objects}) < len(objects):
                raise BadInput(f"{where}: lists a segment id twice")
        for entry in objects:
            entry["iscrowd"] = int(says_yes(entry.get("iscrowd"), False))
            if not isinstance(entry.setdefault("category_id"), (int, float, str)):
                entry["category_id"] = None
        found.setdefault(key, (annotation.get("file_name"), []))[1].extend(objects)
    return found


@functools.cache
def names_below(folder):
    """{bare name: its paths} of all files below a folder."""
    paths = {}
    for place, _, names in os.walk(folder):
        for name in names:
            paths.setdefault(name, []).append(Path(place, name))
    return paths


def find_file(name, folders, where):
    """A file that a JSON names: where its path leads from one of the folders, else the only one of
    its bare name below the first two. Raises BadInput if there is none, or several."""
    path = PureWindowsPath(str(name))  # separated by / or \
    if path.anchor or ".." in path.parts or not path.name:
        raise BadInput(f"{where}: file_name {str(name)[:80]!r} must be a path below the folder")
    for folder in folders:
        if os.path.isfile(folder / path.as_posix()):  # False for a name that no file can have
            return folder / path.as_posix()
    # Cityscapes' converter says X_gtFine_leftImg8bit.png for CITY/X_leftImg8bit.png
    for bare in (path.name, path.name.replace("_gtFine_", "_")):
        found = [file for folder in folders[:2] for file in names_below(folder).get(bare, ())]
        if len(found) > 1:
            raise BadInput(f"{where}: {bare} may be {found[0]} or {found[1]}: say which folder")
        if found:
            return found[0]
    raise BadInput(f"{where}: no such file: {path.as_posix()!r:.80}")


def rle_counts(text):
    """Run lengths in COCO's text: 5 bits a character, low ones first; from the fourth on less the
    last but one."""
    counts, value, shift = [], 0, 0
    for digit in text.encode("ascii"):
        digit -= 48
        value |= (digit & 31) << shift
        shift += 5
        if digit < 32 or shift > 60:  # the number ends; its highest bit is the sign
            value -= (digit >> 4 & 1) << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def outline_runs(outline, height, width):
    """COCO's polygons or RLE -> run lengths, column by column: outside, inside, outside, ...

    None where it can't be used: under three points, far outside, runs that don't add up."""
    try:
        if isinstance(outline, list):
            polygons = outline if isinstance(outline[0], list) else [outline]
            polygons = [p for p in polygons if len(p) >= 6]
            if not np.abs(np.concatenate(polygons)).max() <= 2 * max(height, width):  # or NaN
                return None
            outline = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
            outline["counts"] = outline["counts"].decode()
        counts = outline["counts"]
        counts = np.array(rle_counts(counts) if isinstance(counts, str) else counts)
        fits = counts.dtype.kind == "i" and counts.ndim == 1 and counts.min() >= 0
        fits = fits and counts.sum() == height * width
        return counts if fits and list(outline["size"]) == [height, width] else None
    except Exception:  # what people write here can fail in any way
        return None


class Folder:
    """A folder in COCO layout, whichever JSON is there:

    panoptic     annotations/panoptic_SPLIT.json, [annotations/]panoptic_SPLIT/*.png
    instances    annotations/instances_SPLIT.json; samples have the background's `background_id`

    with pictures in SPLIT/, images/SPLIT/ or where the JSON says. background: what pixels of no
    instance are, one "segment" of its own category or "void". Raises BadInput if it is unusable."""

    endless = False

    def __init__(self, folder, split, background="segment"):
        root = Path(folder)
        panoptic = root / "annotations" / f"panoptic_{split}.json"
        instances = root / "annotations" / f"instances_{split}.json"
        self.panoptic, self.background_id = panoptic.is_file(), None
        self.json = panoptic if self.panoptic else instances
        if not self.json.is_file():
            raise BadInput(f"--data {folder}: neither {panoptic} nor {instances.name} is there")
        self.pictures = [root / split, root / "images" / split, root / "images", root]
        self.pngs = [root / f"panoptic_{split}", root / "annotations" / f"panoptic_{split}", root]
        content = read_coco(self.json)
        self.categories = content["categories"]
        if background == "segment" and not self.panoptic:
            self.background_id = max([c["id"] for c in self.categories], default=0) + 1
            self.categories.append({"id": self.background_id, "name": "background", "isthing": 0})
        found = by_image(content, self.json, self.panoptic)
        # Images of crowds alone say nothing about segments (method: left out). Each item is kept as
        # text: forked workers would copy a million dicts just by counting references to them.
        self.items, shown = [], []
        for info in content["images"]:
            name, objects = found.get(str(info.get("id")), (None, []))
            shown += objects
            if self.background_id or not all(o["iscrowd"] for o in objects):
                self.items.append(json.dumps((info, name, objects)))
        self.unused = len(content["images"]) - len(self.items)
        if all(o["iscrowd"] for o in shown):
            say_once(f"note: {self.json}: no object but crowds: nothing to learn or to find")
        if not self.items:
            raise BadInput(f"{self.json}: no image has an object that is not a crowd")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.sample(index)

    def sample(self, index, image=True):
        """Sample `index`, without its image if that is not wanted; `left_out` lists the objects
        that have no usable outline. Raises BadInput if it can't be used."""
        info, name, objects = json.loads(self.items[index])
        where = f"{self.json}: image {str(info.get('id')):.60}"
        size = info.get("width"), info.get("height")
        sample = {"image": None, "left_out": []}
        with reading(where, "entry (id, file_name)"):
            sample |= {"image_id": info["id"], "file_name": info["file_name"]}
        if self.panoptic:
            ids, segments = self.read_panoptic(name, objects, where)
            size = ids.shape[::-1] if None in size else size
        elif all(type(n) is int and n > 0 for n in size) and math.prod(size) < 1 << 28:
            ids, segments, sample["left_out"] = self.paint(objects, *size)
        else:
            raise BadInput(f"{where}: has no usable width and height")
        if ids.shape[::-1] != size:
            raise BadInput(f"{where}: its PNG {name} has another size")
        if image:
            path = find_file(info.get("file_name"), self.pictures, where)
            sample["image"] = read_image(path, size)
        if self.background_id:
            sample["background_id"] = self.background_id
        return sample | {"ids": ids, "segments_info": segments}

    def read_panoptic(self, name, segments, where):
        """Ids and segments_info of an image in the panoptic layout. Raises BadInput."""
        listed = [s["id"] for s in segments]
        ids = read_id_png(find_file(name, self.pngs, where), listed)
        area = {s["id"]: s["area"] for s in describe(ids)}
        for i in area.keys() - listed:
            raise BadInput(f"{where}: its PNG {name} holds id {i}, which the JSON does not list")
        return ids, [{**s, "area": area.get(s["id"], 0)} for s in segments]

    def paint(self, objects, width, height):
        """Ids, segments_info and the objects left out, of an image in the instances layout: painted
        from large to small, so that small ones lie on top; crowds beneath all."""
        ids = np.full(width * height, 1 if self.background_id else 0, np.int32)  # by columns
        segments = [{"id": 1, "category_id": self.background_id, "iscrowd": 0}]
        painted, left_out = [], []
        for o in objects:
            lengths = outline_runs(o.get("segmentation"), height, width)
            if lengths is None:
                left_out.append(o.get("id"))
            else:
                painted.append((not o["iscrowd"], -lengths[1::2].sum(), lengths, o))
        for _, _, lengths, o in sorted(painted, key=lambda p: p[:2]):
            ends, i = lengths.cumsum(), len(segments) + 1
            for begin, end in zip(ends[::2], ends[1::2]):
                ids[begin:end] = i
            segments.append({"id": i, "category_id": o["category_id"], "iscrowd": o["iscrowd"]})
        area = np.bincount(ids, minlength=len(segments) + 1).tolist()
        segments = [{**s, "area": area[s["id"]]} for s in segments if area[s["id"]]]
        if left_out:
            say_once(f"note: {self.json}: objects of no usable outline are left out, see --check")
        return np.ascontiguousarray(ids.reshape(width, height).T), segments, left_out


def open_data(name, split, size=64, seed=0, background="segment"):
    """`shapes` or a folder in COCO layout -> an indexable source of samples with `categories`.

    size: side of the built-in scenes; files keep their own size. Raises BadInput."""
    if name == "shapes":
        return Shapes(split, size, seed)
    if not Path(name).is_dir():
        hint = "see README, Data, or try --model small --data shapes, which needs no download"
        raise BadInput(f"--data {name}: no such folder; {hint}")
    return Folder(name, split, background)


def check(folder):
    """Read all splits of a folder and print what is broken. Returns numbers of images and faults.

    Raises BadInput if there is nothing to read."""
    files = [f.stem.partition("_") for f in Path(folder, "annotations").glob("*_*.json")]
    splits = sorted({split for kind, _, split in files if kind in ("panoptic", "instances")})
    if not splits:
        raise BadInput(
            f"--check {folder}: no annotations/panoptic_SPLIT.json or instances_SPLIT.json"
        )
    images, faults = 0, []
    for split in splits:
        source = Folder(folder, split)
        images += len(source)
        for index in tqdm(range(len(source)), split, unit="image"):
            try:
                sample = source[index]
                name = sample["file_name"]
                faults += [f"{name}: object {i} has no usable outline" for i in sample["left_out"]]
                empty = [s["id"] for s in sample["segments_info"] if not s["area"]]
                faults += [f"{name}: segment {i} has no pixel" for i in empty]
            except BadInput as error:
                faults.append(str(error))
        print(f"{split}: {len(source)} images; {source.unused} others show nothing but crowds")
    print("\n".join([*faults, f"{folder}: {len(faults) or 'no'} faults"]))
    return {"images": images, "faults": len(faults)}


# --------------------------------------------------------------- what the network is given (4.1)


def runs(ids):
    """An id map as runs of equal ids: value and length of each. They are few, pixels are many."""
    flat = ids.reshape(-1)
    start = np.concatenate([[0], 1 + np.flatnonzero(flat[1:] != flat[:-1])])
    return flat[start], np.diff(start, append=flat.size)


def describe(ids, category_id=1):
    """segments_info of an id map (H x W), by ascending id."""
    value, length = runs(ids)
    known, place = np.unique(value, return_inverse=True)
    found = zip(known.tolist(), np.bincount(place, length).astype(int).tolist())
    return [{"id": i, "category_id": category_id, "iscrowd": 0, "area": a} for i, a in found if i]


def resize_ids(ids, height, width):
    """Nearest-neighbour resize of an H x W map: the pixel whose centre is nearest."""
    rows = ((np.arange(height) + 0.5) * ids.shape[0] / height).astype(int)
    cols = ((np.arange(width) + 0.5) * ids.shape[1] / width).astype(int)
    return ids.take(rows, 0).take(cols, 1)


def resize_image(image, size):
    """Squash an H x W x 3 uint8 image to size x size without cropping (bicubic)."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.BICUBIC))


def relabel(ids, segments_info, num_ids, rng, min_area=0):
    """Random distinct ids in 1..num_ids-1 for the segments of a map (4.1).

    Crowds and segments of under min_area pixels become void (0); of more than num_ids - 1 segments
    the largest stay. Returns H x W uint8 and {old id: new id}."""
    listed = [s["id"] for s in segments_info if not s["iscrowd"]]
    value, length = runs(ids)
    known, place = np.unique(value, return_inverse=True)
    nth = {s: k + 1 for k, s in enumerate(listed)}
    place = np.array([nth.get(i, 0) for i in known.tolist()])[place]  # of each run in `listed`
    area = np.bincount(place, length, len(listed) + 1)
    kept = np.flatnonzero(area[1:] >= max(min_area, 1)) + 1
    if len(kept) > num_ids - 1:
        say_once(f"note: images of more than N - 1 = {num_ids - 1} segments keep the largest")
        kept = kept[np.argsort(-area[kept], kind="stable")[: num_ids - 1]]
    new = np.zeros(len(listed) + 1, np.uint8)
    new[kept] = rng.permutation(num_ids - 1)[: len(kept)] + 1
    return np.repeat(new[place], length).reshape(ids.shape), dict(zip(listed, new[1:].tolist()))


def crop_sample(sample, side, rng):
    """A random square of `side` pixels; a smaller picture's edge is continued, there ids are void.

    One that shows a single segment is drawn again, up to three times: it would teach little."""
    short = [(0, max(side - n, 0)) for n in sample["ids"].shape]
    ids = np.pad(sample["ids"], short)
    for _ in range(4):
        top, left = (int(rng.integers(n - side + 1)) for n in ids.shape)
        box = np.s_[top : top + side, left : left + side]
        if (ids[box] != ids[top, left]).any():
            break
    area = {s["id"]: s["area"] for s in describe(ids[box])}
    segments = [{**s, "area": area[s["id"]]} for s in sample["segments_info"] if s["id"] in area]
    cropped = sample | {"ids": ids[box], "segments_info": segments}
    if sample["image"] is not None:
        cropped["image"] = np.pad(sample["image"], [*short, (0, 0)], "edge")[box]
    return cropped


def drop_blocks(size, drop, block, rng):
    """Which pixels stay given (size x size, bool) where each cell of a grid of block x block pixels
    is dropped with probability `drop` (3.3)."""
    cells = rng.random((-(-size // block),) * 2) >= drop
    return cells.repeat(block, 0).repeat(block, 1)[:size, :size]


def stroke(pixels, start, end, radius):
    """Which of a segment's pixels (P x 2) lie at most `radius` from the line between two of them."""
    line = end - start
    along = ((pixels - start) @ line / max(line @ line, 1)).clip(0, 1)
    return np.linalg.norm(pixels - start - along[:, None] * line, axis=1) <= radius


def partial_map(ids, rng):
    """A part of an id map (S x S), as a user may give it: blocks of any size, most often few, or a
    click or a stroke on some of the segments; 0 = unknown."""
    if rng.random() < 0.5:
        drop, block = 1 - rng.random() ** 1.5, 2 ** int(rng.integers(5))
        return np.where(drop_blocks(len(ids), drop, block, rng), ids, 0).astype(np.uint8)
    given = np.zeros_like(ids)
    for i in np.unique(ids[ids > 0]):
        pixels = np.argwhere(ids == i)
        start, end = pixels[rng.integers(len(pixels), size=2)]
        if rng.random() < 0.7:
            end = start if rng.random() < 0.5 else end
            given[tuple(pixels[stroke(pixels, start, end, rng.uniform(0.5, 6))].T)] = i
    return given


@dataclass
class Training:
    """Sample n of an endless stream (4.1): square resize, horizontal flip, random distinct ids.

    n counts through epochs, ranks and workers, and all randomness comes from (seed, n): whoever
    draws sample n draws the same one, so that a run repeats over any workers and from mid-epoch."""

    source: object
    size: int  # side of the network's input
    num_ids: int  # N
    seed: int = 0
    images: bool = True  # stage 1 needs none
    min_area: int = 10  # px of the file; smaller segments are void in training
    # beyond the paper:
    crop: int = 0  # side of a random square in place of the whole picture
    turns: bool = False  # turn by random quarters, where no side is up
    jitter: float = 0.0  # of brightness and contrast
    given: float = 0.0  # share of samples with a partial map

    def __post_init__(self):
        self.broken = multiprocessing.RawArray(ctypes.c_bool, len(self.source))  # over all workers
        self.class_of = {c["id"]: k for k, c in enumerate(self.source.categories)}

    def read(self, n):
        """The n-th sample as the source has it, each epoch in an order of its own. One that can't
        be read is named once, and the next takes its place. Raises BadInput if none can be read."""
        if self.source.endless:
            return self.source[n]
        epoch, n = divmod(n, len(self.source))
        order = np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.source))
        for index in np.roll(order, -n).tolist():
            try:
                return self.source.sample(index, self.images)
            except BadInput as error:
                line = str(error)
                if not self.broken[index]:
                    tqdm.write(f"note: {line}; the next one takes its place", file=sys.stderr)
                self.broken[index] = True
        raise BadInput(f"{line}; nor can any other of the {len(order)} images be used")

    def __getitem__(self, n):
        """Arrays: ids (S x S, uint8, 0 = void), given (a part of them), image (3 x S x S, uint8),
        classes (N, int64: of each id, its place in the source's categories, -1 = none)."""
        sample, rng = self.read(n), np.random.default_rng((self.seed, 2, n))
        if self.crop:
            sample = crop_sample(sample, self.crop, rng)
        segments = sample["segments_info"]
        ids, new_id = relabel(sample["ids"], segments, self.num_ids, rng, self.min_area)
        arrays = {"ids": resize_ids(ids, self.size, self.size)}
        if self.images:
            arrays["image"] = resize_image(sample["image"], self.size).transpose(2, 0, 1)
        if rng.random() < 0.5:
            arrays = {k: v[..., ::-1] for k, v in arrays.items()}
        if self.turns:
            quarters = int(rng.integers(4))
            arrays = {k: np.rot90(v, quarters, (-2, -1)) for k, v in arrays.items()}
        if self.jitter and self.images:
            brightness, contrast = rng.uniform(1 - self.jitter, 1 + self.jitter, 2)
            image = arrays["image"] * np.float32(brightness)
            image = image.mean() + np.float32(contrast) * (image - image.mean())
            arrays["image"] = image.round().clip(0, 255).astype(np.uint8)
        arrays["given"] = np.zeros_like(arrays["ids"])
        if self.given and rng.random() < self.given:
            arrays["given"] = partial_map(arrays["ids"], rng)
        arrays["classes"] = np.full(self.num_ids, -1)
        for s in segments:
            arrays["classes"][new_id.get(s["id"], 0)] = self.class_of.get(s["category_id"], -1)
        arrays["classes"][0] = -1
        return {k: np.ascontiguousarray(v) for k, v in arrays.items()}


def training_batches(dataset, iterations, batch_size, pieces=1, num_workers=0):
    """Iterate over the batches of a range of iterations, this rank's share of each in `pieces`.

    batch_size counts over all ranks: any number of processes trains alike."""
    share = batch_size // (world() * pieces)
    firsts = [(it * world() + rank()) * pieces + k for it in iterations for k in range(pieces)]
    batches = [range(n * share, (n + 1) * share) for n in firsts]
    pin = torch.cuda.is_available()
    return DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, pin_memory=pin)


WARMUP, LOG_EVERY = 200, 20  # iterations

# ==================================================================== what all scripts share
# ------------------------------------------------------------------------------------- flags


def number(kind, low, high=math.inf):
    """An argparse type: int or float in low..high."""

    def parse_number(text):
        """The number that `text` says."""
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high and kind(text) < math.inf:
                return kind(text)
        span = f"{low} or more" if high == math.inf else f"in {low}..{high}"
        raise argparse.ArgumentTypeError(f"must be {kind.__name__} {span}, not '{text}'")

    return parse_number


positive, natural = number(int, 1), number(int, 0, 2**32 - 1)
amount, fraction = number(float, 0), number(float, 0, 1)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        """What argparse calls on a wrong flag."""
        raise BadInput(message)


def new_parser(doc, out):
    """A parser with the flags of all scripts."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="'shapes' or a folder in COCO layout (default: as --ckpt, or data/coco)")
    add("--seed", type=natural, default=0, help="of everything random (default %(default)s)")
    add("--out", default=out, help="folder to write to (default %(default)s)")
    add("--json", help="also write the printed figures to this file")
    return parser


def training_parser(doc):
    """A parser with the flags of both trainings; what has no default here has it from --model."""
    parser = new_parser(doc, "checkpoints")
    add, sd = parser.add_argument, "CompVis/stable-diffusion-v1-4"
    add("--model", choices=["sd", "small"], help="the paper's, or from scratch on a laptop (sd)")
    add("--sd", default=sd, help="Stable Diffusion: hub id, folder with unet/ and vae/, or 'none'")
    add("--train_split", help="(train2017)")
    add("--val_split", help="(val2017)")
    add("--background", choices=["segment", "void"], help="instances: what the other pixels are")
    add("--size", type=positive, help="side of the square that the network sees, in pixels")
    add("--crop", type=natural, help="train on random squares of so many pixels (0: on all)")
    add("--batch_size", type=positive, help="images an iteration, over all processes")
    add("--iters", type=natural, help="iterations; 0 with --ckpt only evaluates")
    add("--lr", type=amount, help="peak learning rate of AdamW")
    add("--ckpt", help="start from these weights and the settings stored with them")
    add("--resume", action="store_true", help="go on with the run in --out, with its flags")
    add("--save_every", type=positive, default=1000, help="iterations (default %(default)s)")
    add("--eval_images", type=positive, default=256, help="in validation (default %(default)s)")
    add("--num_workers", type=natural, default=min((os.cpu_count() or 1) - 1, 8), help="a rank")
    add("--device", default="auto", help="cuda, mps, cpu or auto (default %(default)s)")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.set_defaults(data="data/coco", train_split="train2017", val_split="val2017")
    parser.set_defaults(background="segment", crop=0, ema=0.0)
    return parser


def parse(parser, models, argv, kind):
    """Which of a flag's places decides: the command line, else the run of --resume, else the
    settings in --ckpt, else the table of --model. Raises BadInput."""
    args, stored = parser.parse_args(argv), {}
    if args.resume:
        path = Path(args.out) / f"{kind}_state.pt"
        with reading(path, "checkpoint"):
            stored = {**load(path, f"{kind}_state")["flags"]}
    elif args.ckpt or kind == "ldm":
        path = args.ckpt or args.ae or Path(args.out) / "ae.pt"
        stage1 = ["ae", "release_ae"] if kind == "ae" or not args.ckpt else []
        with reading(path, "checkpoint"):
            content = load(path, *stage1, "ldm", "release_ldm")
            settings = content.get("settings", {})
            shape = content.get("autoencoder", settings.get("autoencoder", {}))
            stored = {**settings, **shape}
    model = args.model or stored.get("model", "sd")
    parser.set_defaults(**{**models[model], "model": model})
    own = {"out", "json", "device", "num_workers", "resume", "ckpt"}  # of this call alone
    parser.set_defaults(**{k: v for k, v in stored.items() if k not in own})
    return parser.parse_args(argv)


STORED = ("model", "data", "train_split", "val_split", "background", "size", "crop", "seed")


def open_splits(args):
    """The sources of --train_split and --val_split. Raises BadInput."""
    size, more = args.crop or args.size, (args.seed, args.background)
    return [
        open_data(args.data, split, size, *more) for split in (args.train_split, args.val_split)
    ]


def command(main):
    """Make `main(argv)` end on bad input with one line on stderr and exit code 2."""

    @functools.wraps(main)
    def run(argv=None):
        """`main`, with errors in one line."""
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
        try:
            return main(argv)
        except BadInput as error:  # a loader's worker puts its traceback in front
            line = str(error).strip().splitlines()[-1].removeprefix("data.BadInput: ")
        except torch.OutOfMemoryError:
            line = "out of memory: give a smaller --batch_size, or --micro_batch in stage 2"
        except OSError as error:
            if error.filename is None:
                raise
            line = f"{error.filename}: {error.strerror}"
        script = Path(sys.modules[main.__module__].__file__).name
        print(f"{script}: error: {line}", file=sys.stderr)
        raise SystemExit(2)

    return run


# ---------------------------------------------------------------------- processes, device, seeds


def rank():
    """Number of this process under torchrun; 0 is the one that prints and writes."""
    return int(os.environ.get("RANK", 0))


def world():
    """Number of processes under torchrun, else 1."""
    return int(os.environ.get("WORLD_SIZE", 1))


@functools.cache
def say_once(line):
    """Print a line once: on rank 0, beside progress bars, and in one of its loader's workers."""
    if rank() == 0 and (get_worker_info() is None or get_worker_info().id == 0):
        tqdm.write(line, file=sys.stderr)


def setup(args):
    """Choose the device and, under torchrun, join the other processes. Raises BadInput."""
    name = args.device
    if name == "auto":
        mps = torch.backends.mps.is_available() and world() == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        device = torch.zeros(1, device=name).device
    except Exception:
        raise BadInput(f"--device {name}: not available here; 'auto' takes what there is") from None
    torch.manual_seed(args.seed)  # a new network's weights
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world() > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def leave():
    """Wait for the other processes and part from them."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def reduce_sum(value):
    """Sum of a number or array over all processes, as float64."""
    total = torch.as_tensor(value, dtype=torch.float64, device="cpu").clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.numpy()


def to_device(batch, device):
    """A batch of the loader on the device; a GPU does not wait for it."""
    return {k: v.to(device, non_blocking=device.type == "cuda") for k, v in batch.items()}


def mean_over_ranks(tensor):
    """Mean of a tensor over all processes, as float32 where it is."""
    tensor = tensor.float()
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor / world()


def autocast(args, device):
    """Mixed precision of --precision; auto: bf16 on a GPU that has it, fp16 on an older one."""
    bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if args.precision == "auto":
        args.precision = "bf16" if bf16 else "fp16" if device.type == "cuda" else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def seed_iteration(seed, it):
    """All that an iteration draws follows from (seed, iteration, rank): a resumed run repeats it."""
    torch.manual_seed(((seed * 1_000_003 + it) * 4096 + rank()) % 2**63)


class Optimizer:
    """AdamW as both trainings need it: learning rate, mixed precision, clipping, averaged weights.

    groups: AdamW's parameter groups; clip: largest norm of the gradient."""

    def __init__(self, groups, args, device, clip):
        self.args, self.clip = args, clip
        self.adamw = torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=True)
        self.weights = [p for group in self.adamw.param_groups for p in group["params"]]
        self.average = [p.detach().clone() for p in self.weights] if args.ema else []
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")

    def learning_rate(self, it):
        """Linear warm-up from 0, then constant, or cosine to 1% of the peak."""
        args, done = self.args, it / max(self.args.iters, 1)
        warmup = min(WARMUP, max(args.iters // 5, 1))  # shorter in a short run
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1)))
        return args.lr * min(it / warmup, 1) * (cosine if args.schedule == "cosine" else 1)

    def backward(self, loss):
        """Add the loss's gradient."""
        self.scaler.scale(loss).backward()

    def step(self, it):
        """Step down the gradient, and clear it; one that is not finite is skipped. Returns its norm."""
        for group in self.adamw.param_groups:
            group["lr"] = self.learning_rate(it)
        self.scaler.unscale_(self.adamw)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.clip)
        if norm.isfinite():
            self.scaler.step(self.adamw)
        self.scaler.update()
        self.adamw.zero_grad()
        if self.average:
            decay = min(self.args.ema, (it + 1) / (it + 10))
            torch._foreach_lerp_(self.average, [p.data for p in self.weights], 1 - decay)
        return norm.item()

    @contextlib.contextmanager
    def averaged(self):
        """The averaged weights in the place of the weights, for a while."""
        self.exchange()
        yield
        self.exchange()

    def exchange(self):
        """Swap the weights and their average."""
        for p, a in zip(self.weights, self.average):
            p.data, a.data = a.data, p.data

    def state_dict(self):
        """All that a run needs to go on."""
        return {
            "adamw": self.adamw.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average,
        }

    def load_state_dict(self, state):
        """Go on from such a state."""
        self.adamw.load_state_dict(state["adamw"])
        self.scaler.load_state_dict(state["scaler"])
        for mine, stored in zip(self.average, state["average"], strict=True):
            mine.copy_(stored)


# --------------------------------------------------------------------------- checkpoints and log


@contextlib.contextmanager
def replacing(path):
    """A file beside `path` to write to, which then takes its place: nobody sees half a file."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        why = getattr(error, "strerror", None) or "is the disk full?"
        raise BadInput(f"{path}: can't be written ({why}); what was there is unharmed") from None
    finally:
        temporary.unlink(missing_ok=True)


def save(path, content):
    """Write a checkpoint. Raises BadInput if the disk is full."""
    with replacing(path) as temporary:
        torch.save(content, temporary)


def write_json(path, content):
    """Write JSON. Raises BadInput if the disk is full."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


class Inert:
    """Stands in for whatever class a foreign file names; takes anything and runs nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def load(path, *kinds):
    """Read a checkpoint of one of these kinds without executing anything from it. Raises BadInput.

    Ours hold tensors and plain values. The authors' release pickled its settings: in place of each
    class that its file names, PyTorch's restricted unpickler gets a plain dict or `Inert`."""
    with reading(path, "checkpoint"):
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)  # runs nothing
        stand_ins = [(OrderedDict if n.endswith("Dict") else Inert, n) for n in named]
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, "cpu", weights_only=True, mmap=bool(named))
        release = {"vae": "release_ae", "vae_semseg": "release_ldm"}
        kind = content.get("kind") or next((k for m, k in release.items() if m in content), None)
        if named and "kind" in content:
            raise BadInput(f"{path}: holds more than tensors and plain values: not one of ours")
    if kind not in kinds:
        told = f"of kind {' or '.join(kinds)}, but {kind or 'something else'}"
        raise BadInput(f"{path}: no checkpoint {told}")
    return {**content, "kind": kind}


def restore(path, model, optimizer):
    """Put a saved state into its parts and return its iteration. Raises BadInput."""
    state = load(path, Path(path).stem)
    with reading(path, "state of this run"):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    return state["iteration"]


def save_run(out, content, args, iteration, model, optimizer):
    """On rank 0 write STAGE.pt (`content`, all that sampling needs) and STAGE_state.pt (to resume)."""
    if rank() == 0:
        stage = content["kind"]
        save(out / f"{stage}.pt", content)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"kind": f"{stage}_state", "iteration": iteration, "flags": vars(args)}
        save(out / f"{stage}_state.pt", state)


def progress(args, start):
    """The bar of a training, on rank 0: images/s, time left."""
    images = {"total": args.iters * args.batch_size, "initial": start * args.batch_size}
    return tqdm(**images, unit="image", disable=rank() > 0, mininterval=1)


def log(path, iteration, **figures):
    """Append a line of JSON, on rank 0."""
    if rank() == 0:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        short = {k: float(f"{float(v):.6g}") for k, v in figures.items() if v is not None}
        with open(path, "a" if iteration else "w") as file:
            file.write(json.dumps({"iteration": iteration, **short}) + "\n")


def plot_log(path, log_path, key):
    """Plot a figure over iterations; what a resumed run repeats replaces its first account."""
    entries = [json.loads(line) for line in open(log_path)]
    points = {e["iteration"]: e[key] for e in entries if key in e}
    if points:
        plot(path, {key: sorted(points.items())}, "iteration", key)


# --------------------------------------------------------------------------------------- pictures


@functools.cache
def palette():
    """256 x 3 uint8 colours for ids; 0 (void) is dark grey."""
    hue = np.arange(256)[:, None] * 0.61803 + np.array([0, 1 / 3, 2 / 3])
    colors = (150 + 105 * np.cos(2 * np.pi * hue)) * (1 - 0.2 * (np.arange(256) % 3))[:, None]
    colors[0] = 46
    return colors.astype(np.uint8)


def colorize(ids):
    """H x W ids -> H x W x 3 uint8."""
    return palette()[np.where(ids > 255, ids % 255 + 1, ids)]


def overlay(image, ids):
    """Image (H x W x 3, uint8) with its segments in colour and their outlines in white."""
    mixed = (0.45 * image + 0.55 * colorize(ids)).astype(np.uint8)
    mixed[:, 1:][ids[:, 1:] != ids[:, :-1]] = 255
    mixed[1:][ids[1:] != ids[:-1]] = 255
    return mixed


def sheet(rows, captions=(), cell=160):
    """Rows of H x W x 3 uint8 arrays as one PIL image, with a caption over each column."""
    page = Image.new("RGB", (max(map(len, rows)) * cell, 18 + len(rows) * cell), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for column, caption in enumerate(captions):
        draw.text((column * cell + 2, 1), caption, "black", font)
    for y, row in enumerate(rows):
        for x, array in enumerate(row):
            tile = ImageOps.contain(Image.fromarray(array), (cell - 4, cell - 4), Image.BICUBIC)
            page.paste(tile, (x * cell, 18 + y * cell))
    return page


def picture(path, image):
    """Write a PIL image as a PNG."""
    with replacing(path) as temporary:
        image.save(temporary, "PNG")


def plot(path, curves, xlabel, ylabel):
    """Draw line plots with Pillow. curves: {label: [(x, y), ...]}, all finite."""
    points = np.array([point for curve in curves.values() for point in curve], float)
    low, span = points.min(0), np.ptp(points, 0)
    scale = np.array([480, -280]) / np.maximum(span, 1e-9)
    page = Image.new("RGB", (560, 360), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for k in range(5):
        (x, y), across, up = low + span * k / 4, 60 + 120 * k, 320 - 70 * k
        draw.line([60, up, 540, up], "#dddddd")
        draw.text((4, up - 7), f"{y:.3g}", "black", font)
        draw.text((across - 10, 324), f"{x:.4g}", "black", font)
    draw.text((280, 342), xlabel, "black", font)
    draw.text((4, 4), ylabel, "black", font)
    for k, (label, curve) in enumerate(curves.items()):
        color = tuple(palette()[k + 1].tolist())
        draw.line((([60, 320] + (np.array(curve) - low) * scale)).flatten().tolist(), color, 2)
        draw.text((420, 30 + 14 * k), label, color, font)
    picture(path, page)


@command
def main(argv=None):
    """Command line: write a sheet of images and their segments, or check a folder."""
    parser = new_parser(__doc__, "out")
    parser.add_argument("--split", default="train2017", help="(default %(default)s)")
    parser.add_argument("--limit", type=positive, default=8, help="images (default %(default)s)")
    parser.add_argument("--check", metavar="FOLDER", help="exit code 1 if anything is broken there")
    args = parser.parse_args(argv)
    if args.check:
        figures = check(args.check)
    else:
        source = open_data(args.data or "data/coco", args.split, seed=args.seed)
        chosen = random.Random(args.seed).sample(range(len(source)), min(args.limit, len(source)))
        found = [(source[i]["image"], source[i]["ids"]) for i in chosen]
        rows = [[image, colorize(ids), overlay(image, ids)] for image, ids in found]
        picture(f"{args.out}/data.png", sheet(rows, ["image", "ids", "overlay"]))
        figures = {"images": len(source), "categories": len(source.categories), "faults": 0}
        print(f"{len(source)} images -> {args.out}/data.png")
    if args.json:
        write_json(args.json, figures)
    raise SystemExit(int(figures["faults"] > 0))


if __name__ == "__main__":
    main()

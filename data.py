"""data.py: every source of data becomes the same sample (paper: sections 4.1, and 3.1 "Encoding").

    python data.py --data shapes                                  # draw a sheet of built-in scenes
    python data.py --data data/coco --split val2017               # look into a COCO-style folder
    python data.py --check data/coco                              # read all of it, name every broken image and mask
    python data.py --bench                                        # images/s beside Pillow's own

A sample is a dict: `image` (H x W x 3, uint8), `ids` (H x W, int32, 0 = void), `segments_info` (as COCO has it:
id, category_id, iscrowd, area), `image_id`, `file_name`, and in the instances layout the background's category as
`background_id`. Sources that give it, chosen by `open_data`:

    shapes                      scenes drawn on the fly from (seed, split, index); nothing to download
    FOLDER, panoptic layout     annotations/panoptic_{split}.json, PNGs in [annotations/]panoptic_{split}/, {split}/*.jpg
    FOLDER, instances layout    annotations/instances_{split}.json, {split}/*.jpg

`Training` turns sample n into what the network sees; `encode_ids` turns ids into input channels on the device.
The end of the file holds what all scripts share: command line, one-line errors, pictures.
"""
import argparse
import contextlib
import ctypes
import errno
import functools
import json
import math
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import numpy as np  # torch is imported where it is used, since it takes seconds and --help should not
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read when torch is imported: what a Mac's GPU lacks (grid_sample's backward), its CPU does

# ---------------------------------------------------------------------------------------------------- errors


class BadInput(ValueError):
    """Something that the user gave is wrong; the message is one line: what it is, what is wrong, what to do.

    kind: for a broken image of a dataset, what `--check` counts it as."""

    def __init__(self, line, kind=None):
        super().__init__(line)
        self.kind = kind


def command(main):
    """Make `main(argv)` end on BadInput, or a file that can't be read or written, with one line on stderr and exit code 2."""
    @functools.wraps(main)
    def run(argv=None):
        """`main`, with errors in one line."""
        try:
            return main(argv)
        except ValueError as error:
            if type(error).__name__ != "BadInput":  # data.BadInput or pq.BadInput
                raise
            line = str(error).strip().splitlines()[-1].removeprefix("data.BadInput: ")  # a worker puts its traceback in front
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            if error.filename is None and not full:
                raise
            line = f"{error.filename or 'writing'}: {error.strerror}" + "; what was written before is unharmed" * full
        except RuntimeError as error:
            if type(error).__name__ == "OutOfMemoryError":
                line = "out of memory: give a smaller --batch_size; in training rather a larger --accum, or --gradient_checkpointing"
            elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                line = f"--compile: {str(error).strip().splitlines()[0][:150]}; it needs a C++ compiler: go without it"
            else:
                raise
        refuse(sys.modules[main.__module__].__file__, line)
    return run


def refuse(script, line):
    """End with one line on stderr and exit code 2."""
    print(f"{Path(script).name}: error: {line}", file=sys.stderr)
    raise SystemExit(2)


# ------------------------------------------------------------------------------------------- built-in scenes

KINDS = ("background", "ellipse", "rectangle", "triangle", "cross")  # category ids 1..5


@functools.lru_cache(maxsize=8)
def _grid(size):
    """x and y of every pixel's middle, in 0..1: 2 x size x size, float32."""
    return np.mgrid[0:size, 0:size].astype(np.float32)[::-1] / size + 0.5 / size


def _texture(rng, x, y):
    """A pattern in 0..1: gradient, stripes or blotches."""
    angle = rng.uniform(0, 2 * math.pi)
    along = math.cos(angle) * (x - 0.5) + math.sin(angle) * (y - 0.5)
    match rng.integers(3):
        case 0:
            return along + 0.5
        case 1:
            return 0.5 + 0.5 * np.sin(along * rng.uniform(15, 45))
        case _:
            across = math.cos(angle) * (y - 0.5) - math.sin(angle) * (x - 0.5)
            waves = np.sin(along * rng.uniform(10, 30) + rng.uniform(0, 6)) * np.sin(across * rng.uniform(10, 30))
            return 0.5 + 0.5 * waves


def _new_color(rng, taken):
    """A colour unlike those in use, so that the picture shows where a segment ends."""
    for _ in range(20):
        color = rng.uniform(0.05, 0.95, 3)
        if all(np.abs(color - other).sum() > 0.6 for other in taken):
            break
    taken.append(color)
    return color.astype(np.float32)


def draw_scene(seed, split, index, size=64, max_shapes=3):
    """Draw scene `index` of a split: a textured background and 1..max_shapes shapes that hide one another.

    Returns image (size x size x 3, uint8), ids (size x size, int32: 1 = background, then one id a shape) and the
    category id of each segment. A shape that would leave an earlier one almost no visible pixel is not drawn."""
    rng = np.random.default_rng((seed, zlib.crc32(split.encode()), index))
    x, y = _grid(size)
    ids, taken, categories = np.ones((size, size), np.int32), [], [1]
    image = _new_color(rng, taken) + (_texture(rng, x, y) - 0.5)[..., None] * rng.uniform(-0.3, 0.3, 3).astype(np.float32)
    for _ in range(rng.integers(1, max_shapes + 1)):
        kind, angle, radius = rng.integers(1, 5), rng.uniform(0, 2 * math.pi), rng.uniform(0.15, 0.34)
        cx, cy = rng.uniform(0.1, 0.9, 2)
        cos, sin = math.cos(angle) / radius, math.sin(angle) / radius
        u = cos * (x - cx) + sin * (y - cy)                # the shape's own axes, in units of its radius
        v = (cos * (y - cy) - sin * (x - cx)) / rng.uniform(0.65, 1)
        match kind:
            case 1:
                mask = u * u + v * v < 0.8
            case 2:
                mask = np.maximum(np.abs(u), np.abs(v)) < 0.75
            case 3:
                mask = (v > -0.6) & (1.732 * np.abs(u) + v < 1.1)
            case _:
                u, v = np.abs(u), np.abs(v)
                mask = (np.minimum(u, v) < 0.3) & (np.maximum(u, v) < 0.95)
        after = np.where(mask, len(categories) + 1, ids)
        if np.bincount(after.ravel(), minlength=len(categories) + 2)[1:].min() < size * size / 60:
            continue
        fill = _new_color(rng, taken)
        if rng.random() < 0.5:
            fill = fill + (_texture(rng, x, y)[mask][:, None] - 0.5) * rng.uniform(-0.25, 0.25, 3).astype(np.float32)
        image[mask] = fill
        ids = after
        categories.append(int(kind) + 1)
    image += rng.standard_normal(image.shape, np.float32) * rng.uniform(0, 0.05)
    return (image.clip(0, 1) * 255).astype(np.uint8), ids, categories


class Shapes:
    """Built-in scenes. A training stream never repeats one; `len` is the size of a held-out set.

    Scenes of two splits come from different random streams, so that no scene is in both."""

    def __init__(self, split, size=64, seed=0, length=512, max_shapes=3):
        self.split, self.size, self.seed, self.length, self.max_shapes = split, size, seed, length, max_shapes
        self.categories = [{"id": i + 1, "name": k, "isthing": int(i > 0)} for i, k in enumerate(KINDS)]
        self.endless = True

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.sample(index)

    def sample(self, index, side=None):
        """Sample `index`; side: its image squashed to side x side, with 0 none at all."""
        image, ids, categories = draw_scene(self.seed, self.split, index, self.size, self.max_shapes)
        image = image if side is None else resize_image(image, side) if side else None
        areas = np.bincount(ids.ravel(), minlength=len(categories) + 1)
        segments = [{"id": i + 1, "category_id": c, "iscrowd": 0, "area": int(areas[i + 1])} for i, c in enumerate(categories)]
        return {"image": image, "ids": ids, "segments_info": segments, "image_id": index, "file_name": f"{index:06d}.png"}


# ------------------------------------------------------------------------------------------- folders of files


FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")  # Pillow would run Ghostscript on others
Image.MAX_IMAGE_PIXELS = 200_000_000  # `_open_image` refuses more; --max_pixels sets it


def to_rgb(image, side=None):
    """PIL image of any mode -> H x W x 3 uint8: 16 and 32 bit are brought to 0..255, transparency is put on white.

    side: squash it to side x side."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        top = 255 if values.max() <= 255 else 65535 if values.max() <= 65535 else values.max()
        image = Image.fromarray((values.clip(0) * (255 / top)).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image if image.mode == "RGB" else image.convert("RGB")         # which would copy it
    return np.asarray(image if side is None else image.resize((side, side), Image.BICUBIC))


def _open_image(path, what, read):
    """Open a file with Pillow and `read` it, with every way in which that can fail as one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                # remarks on metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # comes before anything is decoded
            with Image.open(path, formats=FORMATS) as image:
                return read(image)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such {what}", f"missing {what}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadInput(f"{path}: has more than {Image.MAX_IMAGE_PIXELS:,} pixels; if you trust it, raise --max_pixels", f"undecodable {what}") from None
    except Exception as error:  # a broken file can make Pillow raise almost anything
        raise BadInput(f"{path}: not a readable {what} ({type(error).__name__}: {error})".splitlines()[0], f"undecodable {what}") from None


def read_image(path, upright=False):
    """Read any picture as H x W x 3 uint8; `upright` applies the EXIF rotation. Raises BadInput if it can't be read."""
    return _open_image(path, "image", lambda image: to_rgb(ImageOps.exif_transpose(image) if upright else image))


def read_id_png(path):
    """Read a panoptic PNG (id = R + 256 G + 65536 B) or a single-channel id PNG as H x W int32. Raises BadInput."""
    def read(image):
        """Ids of an opened picture, H x W int64 or int32."""
        if image.mode not in ("1", "L", "P", "RGB") and not image.mode.startswith("I"):
            image = image.convert({"LA": "L", "PA": "P", "F": "I"}.get(image.mode, "RGB"))
        if image.mode != "RGB":
            return np.asarray(image).astype(np.int64)
        image.putalpha(0)                                                  # in place: the bytes of a pixel are those of its id
        return np.frombuffer(image.tobytes(), "<i4").reshape(image.height, image.width)
    ids = _open_image(path, "id PNG", read)
    if ids.dtype == np.int64 and (ids.min() < 0 or ids.max() >= 1 << 24):
        raise BadInput(f"{path}: holds ids outside 0..{(1 << 24) - 1}", "undecodable id PNG")
    return ids.astype(np.int32, copy=False)


def write_id_png(path, ids):
    """Write H x W ids below 2^24 as a panoptic PNG."""
    ids = ids.astype(np.int32)
    rgb = np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], -1).astype(np.uint8)
    Image.fromarray(rgb).save(path)


# What the entries of a COCO JSON must hold: key -> test, what it must be. A file's name must lead to below its folder.
_PLAIN = re.compile(r"(?![/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|$))[^\0-\x1f\x7f\ud800-\udfff]+")
_KEY = lambda v: type(v) in (int, str), "a whole number or a text"
_NAME = lambda v: type(v) is str and _PLAIN.fullmatch(v), "a path without '..' below the folder"
_SIDE = lambda v: v is None or type(v) is int and v > 0, "a whole number of at least 1"
_AREA = lambda v: v is None or type(v) in (int, float) and v >= 0, "a number of at least 0"
_ID = lambda v: type(v) is int and 0 < v < 1 << 24, f"a whole number in 1..{(1 << 24) - 1}"
_CATEGORY = lambda v: type(v) is int, "a whole number"
_CROWD = lambda v: v in (None, 0, 1), "0 or 1"
_RULES = {
    "image": {"id": _KEY, "file_name": _NAME, "width": _SIDE, "height": _SIDE}, "category": {"id": _CATEGORY},
    "annotation of image": {"image_id": _KEY, "file_name": _NAME, "segments_info": (lambda v: type(v) is list, "a list of segments")},
    "segment": {"id": _ID, "category_id": _CATEGORY, "iscrowd": _CROWD, "area": _AREA},
    "annotation": {"id": _KEY, "image_id": _KEY, "category_id": _CATEGORY, "iscrowd": _CROWD,
                   "segmentation": (lambda v: type(v) in (list, dict), "polygons or RLE")}}


def _check(where, kind, entries):
    """Check a list of a COCO JSON by `_RULES`; no two entries may share the first key. Raises BadInput, naming the entry."""
    show = lambda v: type(v).__name__ if isinstance(v, (list, dict)) else repr(v)[:60]
    key, seen = next(iter(_RULES[kind])), set()
    for entry in entries:
        if not isinstance(entry, dict):
            raise BadInput(f"{where}: {kind} {show(entry)}: must be an object")
        for k, (fine, what) in _RULES[kind].items():
            if not fine(entry.get(k)):
                raise BadInput(f"{where}: {kind} {show(entry.get(key))}: {k} must be {what}, not {show(entry.get(k))}")
        if entry[key] in seen:
            raise BadInput(f"{where}: {kind} {show(entry[key])} is there twice")
        seen.add(entry[key])


def read_coco_json(path, layout):
    """Read a COCO JSON ("panoptic" or "instances") and check all of it that is used. Raises BadInput, naming the entry."""
    def no_number(text):
        """Refuse NaN and Infinity, which are no JSON."""
        raise ValueError(f"{text} is no number")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=no_number)
    except OSError as error:
        raise BadInput(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({error})") from None
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise BadInput(f"{path}: not a COCO file: '{name}' must be a list")
    _check(path, "image", content["images"])
    _check(path, "category", content["categories"])
    _check(path, "annotation of image" if layout == "panoptic" else "annotation", content["annotations"])
    for annotation in content["annotations"] if layout == "panoptic" else ():
        _check(f"{path}: image {annotation['image_id']!r}", "segment", annotation["segments_info"])
    return content


def runs(ids):
    """An id map as runs of equal ids in reading order: value and length of each. They are few, which makes maps cheap to look up."""
    flat = ids.reshape(-1)
    start = np.concatenate([[0], 1 + np.flatnonzero(flat[1:] != flat[:-1])])
    return flat[start], np.diff(start, append=flat.size)


def decode_segmentation(segmentation, shape):
    """COCO's polygons or RLE -> H x W bool. Malformed ones are refused before they reach pycocotools, which would crash; any exception."""
    from pycocotools import mask as coco_mask
    if isinstance(segmentation, list):
        polygons = [np.asarray(p, np.float64).reshape(-1, 2) for p in segmentation]
        steps = sum(np.abs(np.diff(p, axis=0)).max(1, initial=0).sum() for p in polygons)
        if not all((np.abs(p) <= 2 * max(shape)).all() for p in polygons) or steps > 10 * shape[0] * shape[1]:
            raise ValueError("a polygon far outside of the image, or far too long for it")
        polygons = [p.ravel().tolist() for p in polygons if len(p) > 2]
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *shape))).astype(bool)
    counts = segmentation["counts"]
    if isinstance(counts, str):        # numbers of 5 bits a character, low ones first; from the fourth on, differences to the last but one
        digits = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
        ends = np.flatnonzero(digits < 32)                                 # bit 5: the number goes on
        starts = np.concatenate([[0], ends[:-1] + 1])
        place = 5 * (np.arange(len(digits)) - np.repeat(starts, ends - starts + 1))
        counts = np.add.reduceat((digits & 31) << place, starts)
        counts -= (digits[ends] >> 4 & 1) << place[ends] + 5               # the highest bit is the sign
        counts[1::2], counts[2::2] = counts[1::2].cumsum(), counts[2::2].cumsum()
    counts = np.asarray(counts)
    if counts.dtype.kind != "i" or counts.min() < 0 or counts.max() > shape[0] * shape[1] or counts.sum() != shape[0] * shape[1]:
        raise ValueError("its counts do not add up to its size")
    return coco_mask.decode(coco_mask.frPyObjects({"counts": counts.tolist(), "size": list(shape)}, *shape)).astype(bool)


def _some(ids):
    """Ids for an error message: the first, and how many more."""
    return f"{ids[0]}" + f" and {len(ids) - 1} more" * (len(ids) > 1)


@contextlib.contextmanager
def _collect(wrong):
    """Put a BadInput into a list instead of raising it."""
    try:
        yield
    except BadInput as error:
        wrong.append(error)


class Folder:
    """A folder in COCO layout, panoptic or instances (which one is recognised by the JSON that is there).

    folder: holds annotations/ and {split}/; background: what pixels of no instance are in the instances layout,
    "segment" (one segment of its own category) or "void" (ignored)."""
    endless = False

    def __init__(self, folder, split, background="segment"):
        root, self.background, self.max_pixels = Path(folder), background, Image.MAX_IMAGE_PIXELS
        files = {kind: root / "annotations" / f"{kind}_{split}.json" for kind in ("panoptic", "instances")}
        found = [kind for kind, file in files.items() if file.is_file()]
        require_data(folder)
        if not found:
            raise BadInput(f"--data {folder}: neither annotations/panoptic_{split}.json nor annotations/instances_{split}.json is there")
        if len(found) == 2 and is_main():
            print(f"{folder}: both panoptic_{split}.json and instances_{split}.json exist; using the panoptic one")
        self.layout, self.json = found[0], files[found[0]]
        content = read_coco_json(self.json, self.layout)
        self.categories = content["categories"]
        self.images_dir = root / split
        if not self.images_dir.is_dir():
            raise BadInput(f"--data {folder}: the folder {split}/ with the images is missing")
        self.pngs = next((d for d in (root / f"panoptic_{split}", root / "annotations" / f"panoptic_{split}") if d.is_dir()), None)
        by_image, self.known = {}, {}
        for annotation in content["annotations"]:
            by_image.setdefault(annotation["image_id"], []).append(annotation)
        if self.layout == "panoptic":
            if self.pngs is None:
                raise BadInput(f"--data {folder}: the folder panoptic_{split}/ with the PNGs is missing")
            keep = lambda found: any(not s.get("iscrowd") for a in found for s in a["segments_info"])
        else:
            self.background_id = max([c["id"] for c in self.categories], default=0) + 1
            self.categories = self.categories + [{"id": self.background_id, "name": "background", "isthing": 0}]
            self.known = {"background_id": self.background_id} if background == "segment" else {}
            keep = lambda found: any(not a.get("iscrowd") for a in found) or background == "segment"
        # images whose segments are all crowd say nothing about segments (method: left out)
        # each item is kept as text: forked workers would copy a million little dicts just by counting references to them
        try:
            self.items = [json.dumps((i, by_image[i["id"]])) for i in content["images"] if i["id"] in by_image and keep(by_image[i["id"]])]
        except RecursionError:
            raise BadInput(f"{self.json}: nested too deep") from None
        self.unused = len(content["images"]) - len(self.items)
        if not self.items:
            raise BadInput(f"{self.json}: no image with a usable annotation")

    def __len__(self):
        return len(self.items)

    @functools.cached_property
    def _by_name(self):
        """Path of each image by its file name: Cityscapes and ADE20K keep images in sub-folders."""
        return {f: os.path.join(d, f) for d, _, names in os.walk(self.images_dir) for f in names}

    def _find(self, file_name):
        """Path of an image that the JSON names."""
        path = self.images_dir / Path(file_name).name
        if os.path.isfile(path):                                           # unlike Path's, False for any name
            return path
        # Cityscapes' own converter names X_gtFine_leftImg8bit.png what lies there as CITY/X_leftImg8bit.png
        return self._by_name.get(path.name) or self._by_name.get(path.name.replace("_gtFine_", "_")) or path

    def __getitem__(self, index):
        return self.sample(index)

    def sample(self, index, side=None):
        """Sample `index`; side: its image squashed to side x side, with 0 none at all. Raises BadInput if it can't be used."""
        sample, wrong = self.load(index, side)
        if wrong:
            raise wrong[0]
        return sample

    def load(self, index, side=None):
        """Sample `index`, its image as in `sample`, and a list of BadInput: all that makes it unusable. What can't be read is None."""
        Image.MAX_IMAGE_PIXELS = self.max_pixels                           # a spawned worker knows only the default
        info, annotations = json.loads(self.items[index])
        image, ids, segments, wrong = None, None, [], []
        shape = info.get("height"), info.get("width")                      # if the image does not say
        with _collect(wrong):
            read = lambda i: (i.size[::-1], to_rgb(i, side) if side != 0 else None)
            shape, image = _open_image(self._find(info["file_name"]), "image", read)
        with _collect(wrong):
            if self.layout == "panoptic":
                ids, segments = self._panoptic(info, annotations, shape, wrong)
            elif None not in shape:
                ids, segments = self._instances(info, annotations, shape)
        sample = {"image": image, "ids": ids, "segments_info": segments, "image_id": info["id"], "file_name": info["file_name"]}
        return {**sample, **self.known}, wrong

    def faults(self, index, num_ids):
        """Everything that is wrong with image `index`, also what training copes with: a list of (kind, line), empty if it is sound."""
        (sample, wrong), (info, _) = self.load(index), json.loads(self.items[index])
        name, ids = self.images_dir / info["file_name"], sample["ids"]
        if sample["image"] is not None:
            height, width, _ = sample["image"].shape
            said = info.get("width") or width, info.get("height") or height
            if said != (width, height):
                wrong.append(BadInput(f"{name}: is {width} x {height} pixels, {self.json.name} says {said[0]} x {said[1]}", "size mismatch"))
        if ids is not None:
            there = set(np.unique(runs(ids)[0]).tolist())
            absent = [s["id"] for s in sample["segments_info"] if s["id"] not in there]
            count = sum(not s.get("iscrowd") and s["id"] in there for s in sample["segments_info"])
            if absent:
                wrong.append(BadInput(f"{name}: its mask has no pixel of segment {_some(absent)} in {self.json.name}", "id not in the PNG"))
            if count > num_ids - 1:
                wrong.append(BadInput(f"{name}: has {count} segments, more than N - 1 = {num_ids - 1}", "too many segments"))
            if not count:
                wrong.append(BadInput(f"{name}: no pixel of its mask belongs to a segment", "empty map"))
        return [(error.kind, str(error)) for error in wrong]

    def _panoptic(self, info, annotations, shape, wrong):
        """Ids and segments_info of an image in the panoptic layout; what is wrong with them is added to `wrong`."""
        path = self.pngs / Path(annotations[0]["file_name"]).name
        ids, segments = read_id_png(path), annotations[0]["segments_info"]
        if ids.shape != shape and None not in shape:
            wrong.append(BadInput(f"{path}: is {ids.shape[1]} x {ids.shape[0]} pixels, its image {info['file_name']} {shape[1]} x {shape[0]}",
                                  "size mismatch"))
        unlisted = sorted(set(np.unique(runs(ids)[0]).tolist()) - {0, *(s["id"] for s in segments)})
        if unlisted:
            wrong.append(BadInput(f"{path}: holds id {_some(unlisted)}, which {self.json.name} does not list for image {info['id']!r}",
                                  "id not in the JSON"))
        return ids, segments

    def _instances(self, info, annotations, shape):
        """Ids and segments_info of an image in the instances layout. Raises BadInput."""
        crowd, masks = np.zeros(shape, bool), []
        for a in annotations:
            rle = a["segmentation"]
            if isinstance(rle, dict) and rle.get("size") != list(shape):
                raise BadInput(f"{self.json}: annotation {a['id']} is not of {shape[1]} x {shape[0]} pixels as its image {info['file_name']}", "size mismatch")
            try:
                mask = decode_segmentation(rle, shape)
            except Exception as error:
                raise BadInput(f"{self.json}: bad segmentation of annotation {a['id']} ({error})", "bad segmentation") from None
            if a.get("iscrowd"):
                crowd |= mask
            else:
                masks.append((mask, a.get("category_id")))
        ids = np.full(shape, 1 if self.background == "segment" else 0, np.int32)
        ids[crowd] = 0
        categories = {1: self.background_id} if self.background == "segment" else {}
        for i, (mask, category) in enumerate(sorted(masks, key=lambda m: -m[0].sum())):  # smaller instances on top
            ids[mask], categories[i + 2] = i + 2, category
        areas = np.bincount(ids.ravel(), minlength=len(masks) + 2)
        return ids, [{"id": i, "category_id": c, "iscrowd": 0, "area": int(areas[i])} for i, c in categories.items() if areas[i]]


def check(folder, splits=None, num_ids=128, background="segment", num_workers=0):
    """Read all images and masks of a folder (None: of every split that is there) and print all that is broken.

    Returns the number of images and of faults by kind. Raises BadInput if a split can't be used at all."""
    files = [*Path(folder).glob("annotations/panoptic_*.json"), *Path(folder).glob("annotations/instances_*.json")]
    splits = splits or sorted({f.stem.partition("_")[2] for f in files})
    if not splits:
        raise BadInput(f"--check {folder}: no annotations/panoptic_NAME.json or annotations/instances_NAME.json there")
    images, counts = 0, {}
    for split, source in [(s, Folder(folder, s, background)) for s in splits]:                 # structural faults come first
        read = functools.partial(source.faults, num_ids=num_ids)           # runs in the workers
        found = loader(range(len(source)), batch_size=None, collate_fn=read, num_workers=num_workers)
        for kind, line in (fault for faults in tqdm(found, split, unit="image", mininterval=1) for fault in faults):
            tqdm.write(f"{kind}: {line}")
            counts[kind] = counts.get(kind, 0) + 1
        print(f"{split}: {len(source)} images read; {source.unused} others have no annotation, or only of crowd, and are not used")
        images += len(source)
    return images, counts


def require_data(name):
    """Raise BadInput unless `name` is `shapes` or a folder that is there."""
    if name != "shapes" and not Path(name).is_dir():
        raise BadInput(f"--data {name}: no such folder; the README's section Data says how to get COCO; "
                       "--model small --data shapes needs no download")


def open_data(name, split, size=64, seed=0, background="segment"):
    """`shapes` or a folder in COCO layout -> an indexable source of samples with `categories`. Raises BadInput.

    size: side of the built-in scenes in pixels (folders keep the files' own size)."""
    return Shapes(split, size, seed) if name == "shapes" else Folder(name, split, background)


def categories_of(source):
    """A source's categories as plain {id, name, isthing}, as checkpoints keep them; a file that doesn't say has things."""
    return [{"id": c["id"], "name": str(c.get("name", c["id"])), "isthing": int(c.get("isthing", 1))} for c in source.categories]


# --------------------------------------------------------------------------------- what the network is given


def resize_ids(ids, height, width):
    """Nearest-neighbour resize of an H x W id map (the pixel whose centre is nearest, as Pillow does)."""
    rows = ((np.arange(height) + 0.5) * ids.shape[0] / height).astype(int)
    cols = ((np.arange(width) + 0.5) * ids.shape[1] / width).astype(int)
    return ids.take(rows, 0).take(cols, 1)


def resize_image(image, size):
    """Squash an H x W x 3 uint8 image to size x size without cropping (bicubic, antialiased)."""
    return image if image.shape[:2] == (size, size) else to_rgb(Image.fromarray(image), size)


def relabel(ids, segments_info, num_ids, rng, min_area=0, mapping=None):
    """Give segments random distinct ids in 1..num_ids-1 (paper 4.1): H x W ids -> H x W uint8, 0 = void.

    Crowd and segments under min_area pixels become void; of more than num_ids - 1, the largest stay (said once).
    mapping: a dict that receives the new id of each old one (0: became void)."""
    listed = [s["id"] for s in segments_info if not s.get("iscrowd")]
    index = {s: i + 1 for i, s in enumerate(listed)}                           # id -> position in `listed`, from 1
    value, length = runs(ids)
    known = np.unique(value)
    compact = np.array([index.get(i, 0) for i in known.tolist()])[known.searchsorted(value)]   # of each run
    areas = np.bincount(compact, length, len(listed) + 1)
    kept = np.flatnonzero(areas[1:] >= max(min_area, 1)) + 1
    if len(kept) > num_ids - 1:
        say_once(f"note: more segments than N - 1 = {num_ids - 1} in an image: the largest stay, the rest become void (said once)")
        kept = kept[np.argsort(-areas[kept], kind="stable")[:num_ids - 1]]
    new = np.zeros(len(listed) + 1, np.uint8)
    new[kept] = rng.permutation(num_ids - 1)[:len(kept)] + 1
    if mapping is not None:
        mapping.update(zip(listed, new[1:].tolist()))
    return np.repeat(new[compact], length).reshape(ids.shape)


def crop_sample(sample, side, rng):
    """A random square of side x side pixels of a sample; where the picture is smaller, its edge is continued and the ids are void.

    One that shows a single segment is drawn again, up to three times: it would teach little."""
    ids, image = sample["ids"], sample["image"]
    short = [(0, max(side - n, 0)) for n in ids.shape]
    if any(map(sum, short)):
        ids, image = np.pad(ids, short), None if image is None else np.pad(image, [*short, (0, 0)], "edge")
    for _ in range(4):
        top, left = (int(rng.integers(n - side + 1)) for n in ids.shape)
        part = ids[top:top + side, left:left + side]
        if (part != part[0, 0]).any():
            break
    area = dict(zip(*(v.tolist() for v in np.unique(part, return_counts=True))))
    segments = [{**s, "area": area[s["id"]]} for s in sample["segments_info"] if s["id"] in area]
    return {**sample, "ids": part, "segments_info": segments, "image": None if image is None else image[top:top + side, left:left + side]}


def jitter_image(image, amount, rng):
    """Random brightness and contrast, each times 1 - amount .. 1 + amount: 3 x H x W uint8 -> the same."""
    brightness, contrast = rng.uniform(1 - amount, 1 + amount, 2).astype(np.float32)
    image = image.astype(np.float32) * brightness
    mean = image.mean()
    return (mean + contrast * (image - mean)).round().clip(0, 255).astype(np.uint8)


@functools.cache
def say_once(line, every_rank=False):
    """Print a line once: on rank 0 (or on every one), and there in the first of its data loader workers only."""
    from torch.utils.data import get_worker_info
    worker = get_worker_info()
    if (is_main() or every_rank) and (worker is None or worker.id == 0):
        tqdm.write(line, file=sys.stderr)                                  # on a line of its own beside a progress bar


class Training:
    """Sample n of an endless training stream (paper 4.1): square resize, horizontal flip, random distinct ids.

    Not in the paper, and off by default: crop, a random square of so many pixels in place of the whole picture; turns by
    quarters; jitter of brightness and contrast. With `latents` set, images are image latents (c x h x w, float16).

    n counts through all epochs, ranks and workers, and all randomness comes from (seed, n): whoever draws sample n
    draws the same one, which makes runs reproducible over workers and resumable in mid-epoch. In place of an image that
    can't be read comes another one, which follows from (seed, n) too; `say_left_out` lists them.
    Gives arrays: image (3 x size x size, uint8; empty with images=False, which spares decoding them), ids (size x size,
    uint8, 0 = void, others distinct in 1..num_ids-1), and with `classes` the class of each id (num_ids, int64): its
    category's place in source.categories, -1 where there is none."""

    def __init__(self, source, size, num_ids, seed=0, flip=True, min_area=10, classes=False, images=True, crop=0, turns=False, jitter=0.0):
        self.crop, self.turns, self.jitter = crop, turns, jitter
        self.latents = None                                                # the file of diffusion.cache_latents
        self.source, self.size, self.num_ids, self.seed, self.images = source, size, num_ids, seed, images
        self.flip, self.min_area, self.epoch = flip, min_area, None
        self.classes = {c["id"]: i for i, c in enumerate(source.categories)} if classes else None
        self.broken = multiprocessing.RawArray(ctypes.c_bool, len(source))                     # shared with the workers, which fill it

    def _sample(self, index, n):
        """Item `index` of the source, or what takes its place, after its own index. Raises BadInput if nothing can be read."""
        side = 0 if not self.images or self.latents is not None else None if self.crop else self.size

        def read(i):
            """Item i; one that has no latents is broken."""
            if self.latents is not None and self.broken[i]:
                raise BadInput(f"{self.source.images_dir / json.loads(self.source.items[i])[0]['file_name']}: can't be read")
            return i, self.source.sample(i, side)
        try:
            return read(index)
        except BadInput as error:
            first, self.broken[index] = error, True
        for other in np.random.default_rng((self.seed, 5, n)).permutation(len(self.source)).tolist():
            try:
                found = read(other)
            except BadInput:
                self.broken[other] = True
            else:
                say_once(f"note: {first}; another image takes its place")
                return found
        raise BadInput(f"{first}; nor can any other of the {len(self.source)} images be used")

    def __getitem__(self, n):
        epoch, position = divmod(n, len(self.source))
        if epoch != self.epoch:  # every epoch has its own order
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.source))
        index, sample = self._sample(n if self.source.endless else int(self.order[position]), n)
        rng = np.random.default_rng((self.seed, 2, n))
        if self.crop:
            sample = crop_sample(sample, self.crop, rng)
        new_id = {}
        ids = relabel(sample["ids"], sample["segments_info"], self.num_ids, rng, self.min_area, new_id)
        ids, image = resize_ids(ids, self.size, self.size), np.empty((0, 0), np.uint8)
        if self.images and self.latents is None:
            image = resize_image(sample["image"], self.size).transpose(2, 0, 1)                # 3 x size x size
        flipped = self.flip and rng.random() < 0.5
        if flipped:
            image, ids = image[..., ::-1], ids[..., ::-1]
        if self.latents is not None:                                       # an encoder's latents of a flipped image are no flipped latents
            image = memory_map(self.latents)[int(flipped), index]
        if self.turns:
            quarters = int(rng.integers(4))
            image, ids = (np.rot90(x, quarters, (-2, -1)) for x in (image, ids))
        if self.jitter and self.images:
            image = jitter_image(image, self.jitter, rng)
        image, ids = np.ascontiguousarray(image), np.ascontiguousarray(ids)
        if self.classes is None:
            return image, ids
        classes = np.full(self.num_ids, -1, np.int64)
        for s in sample["segments_info"]:
            classes[new_id.get(s["id"], 0)] = self.classes.get(s.get("category_id"), -1)
        classes[0] = -1                                                    # void, crowd
        return image, ids, classes


@functools.cache
def memory_map(path):
    """The array in an .npy file, read from the disk as it is used."""
    return np.load(path, mmap_mode="c")                                    # "c": copied on a write, which PyTorch wants to be possible


def loader(dataset, **choices):
    """PyTorch's DataLoader."""
    from torch.utils.data import DataLoader
    return DataLoader(dataset, **choices)


class Images:
    """Only the images of a source, for `indices`: index and image at the network's size (3 x size x size, uint8), None if it is broken."""

    def __init__(self, source, size, indices):
        self.source, self.size, self.indices = source, size, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, k):
        try:
            return self.indices[k], self.source.sample(self.indices[k], self.size)["image"].transpose(2, 0, 1)
        except BadInput:
            return self.indices[k], None


class Mixed:
    """Sample n of several endless training streams, which take turns. parts: a Training each."""

    def __init__(self, parts):
        self.parts = parts

    def __getitem__(self, n):
        return self.parts[n % len(self.parts)][n // len(self.parts)]


def open_training(names, splits, size, num_ids, seed=0, background="segment", **options):
    """The training stream of one data set, or of several that take turns. Parameters: `open_data`, `Training`. Raises BadInput."""
    if len(splits) not in (1, len(names)):
        raise BadInput(f"--train_split: {len(splits)} names for {len(names)} sets of --data; give one name, or one for each")
    parts = [Training(open_data(name, split, options.get("crop") or size, seed, background), size, num_ids, seed, **options)
             for name, split in zip(names, splits * len(names))]
    return parts[0] if len(parts) == 1 else Mixed(parts)


def say_left_out(dataset, over_ranks):
    """At the end of a training: rank 0 prints which images could not be read. over_ranks: sums an array over all processes."""
    for part in getattr(dataset, "parts", [dataset]):
        indices = np.flatnonzero(over_ranks(np.array(part.broken, np.float64)))
        if is_main() and len(indices):
            print(f"{len(indices)} of {len(part.source)} images left out, others took their place:")
            for index in indices.tolist():
                try:
                    print(f"  {part.source[index]['file_name']}: could not be read at first")
                except BadInput as error:
                    print(f"  {error}")


class Evaluation:
    """The samples as they are; a broken one is a BadInput. crop: of each picture only one square of so many pixels, always the same."""

    def __init__(self, source, limit=None, crop=0):
        self.source, self.crop, self.length = source, crop, min(limit or len(source), len(source))

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        try:
            sample = self.source[index]
        except BadInput as error:
            return error
        if self.crop:
            sample = crop_sample(sample, self.crop, np.random.default_rng((index, self.crop)))
        return sample


def training_batches(dataset, first, last, batch_size, rank=0, world=1, accum=1, num_workers=0, pin_memory=False):
    """Iterate over training batches first..last-1, tensors: images (B x 3 x S x S, uint8), ids (B x S x S, uint8)[, classes (B x N)].

    batch_size is global: of each batch, rank r of `world` takes its share, in `accum` pieces."""
    per_rank = batch_size // world
    share = per_rank // accum
    starts = [it * batch_size + rank * per_rank + k * share for it in range(first, last) for k in range(accum)]
    return loader(dataset, batch_sampler=[range(s, s + share) for s in starts], num_workers=num_workers, pin_memory=pin_memory,
                  prefetch_factor=4 if num_workers else None)


def evaluation_batches(dataset, batch_size, rank=0, world=1, num_workers=0):
    """Iterate over lists of samples; rank r takes every world-th one, so that each is seen exactly once.

    Broken images are left out, which is said at the end. Raises BadInput if one process finds nothing but those."""
    mine, broken = list(range(rank, len(dataset), world)), []
    batches = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]
    for batch in loader(dataset, batch_sampler=batches, collate_fn=list, num_workers=num_workers):
        broken += [s for s in batch if isinstance(s, BadInput)]
        good = [s for s in batch if not isinstance(s, BadInput)]
        if good:
            yield good
    if broken and world == 1 and len(broken) == len(mine):
        raise BadInput(f"{broken[0]}; nor can any other of the {len(mine)} images be used")
    if broken:
        say_once(f"note: {len(broken)} of {len(mine)} images left out of the evaluation: " + "; ".join(map(str, broken)), every_rank=True)


ENCODINGS = ("bits", "rgb", "onehot", "positional")


def id_channels(encoding, num_ids):
    """Number of input channels of an encoding: bits log2 N, rgb 3, onehot N, positional 2 log2 N."""
    n = num_ids.bit_length() - 1
    return {"bits": n, "rgb": 3, "onehot": num_ids, "positional": 2 * n}[encoding]


def encode_ids(ids, num_ids, encoding="bits"):
    """Id map (B x H x W, integers 0..num_ids-1) -> input of the autoencoder (B x C x H x W, float in -1..1).

    Paper section 3.1, "Encoding" (1): bits (default), RGB, one-hot or positional. Void (0) is 0 in every channel."""
    import torch
    n = num_ids.bit_length() - 1
    ids = ids.long()
    if encoding == "onehot":
        x = torch.nn.functional.one_hot(ids, num_ids).permute(0, 3, 1, 2).float()
    elif encoding == "positional":                                     # sin/cos at n wavelengths from 2 pi to 2 pi N
        angle = ids[:, None] / num_ids ** (torch.arange(n, device=ids.device) / max(n - 1, 1)).view(1, n, 1, 1)
        x = torch.cat([angle.sin(), angle.cos()], 1)
    else:
        x = (ids[:, None] >> torch.arange(n, device=ids.device).view(1, n, 1, 1) & 1).float()  # B x n x H x W
        if encoding == "rgb":                                          # bit k is a binary digit of channel k mod 3
            groups = [x[:, c::3] for c in range(3)]
            weights = [2.0 ** torch.arange(g.shape[1], device=ids.device).view(1, -1, 1, 1) for g in groups]
            x = torch.stack([(g * w).sum(1) / max(float(w.sum()), 1) for g, w in zip(groups, weights)], 1)
        x = 2 * x - 1
    return x * (ids != 0)[:, None]


# ------------------------------------------------------------------------------ what all scripts have in common


def number(kind, low, high=math.inf):
    """An argparse type: int or float in low..high."""
    def parse(text):
        """The number that `text` says."""
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and value < math.inf:
                return value
        span = f"of at least {low}" if high == math.inf else f"in {low}..{high}"
        raise argparse.ArgumentTypeError(f"must be a {'whole ' if kind is int else ''}number {span}, not '{text}'")
    return parse


side = number(int, 0, 16384)  # of a crop
positive, natural, amount, fraction = number(int, 1), number(int, 0, 2**32 - 1), number(float, 0), number(float, 0, 1)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with the flags that mean the same in every script."""

    def __init__(self, doc, out, data=None, network=True, mix=False):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--data", default=data, nargs="+" if mix else None,
                          help=f"'shapes' or a folder in COCO layout{', or several to mix in training' * mix} (default: {data or 'that of --ckpt, else data/coco'})")
        self.add_argument("--background", choices=["segment", "void"], help="instances layout: what pixels of no instance are (default: one segment)")
        self.add_argument("--size", type=positive, help="side of the square that the network sees, in pixels")
        self.add_argument("--seed", type=natural, default=0, help="seed of everything random (default %(default)s)")
        self.add_argument("--out", default=out, help="folder to write to (default %(default)s)")
        self.add_argument("--json", help="also write the printed figures to this file")
        self.add_argument("--max_pixels", type=positive, default=200_000_000, help="images of more are refused as bombs (default %(default)s)")
        self.add_argument("--num_workers", type=natural, default=min(os.cpu_count() - 1, 8),
                          help="data loader processes of each rank (default %(default)s)")
        if network:
            self.add_argument("--batch_size", type=positive, help="in training samples an iteration, over all ranks; in sampling pictures (or tiles) "
                              "at a time, of each rank (16)")
            self.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default %(default)s)")
            self.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"],
                              help="(default: bf16 where the GPU has it, fp32 on CPU)")

    def error(self, message):
        """What argparse calls on a wrong flag."""
        raise BadInput(message)

    def at_once(self):
        """Answer --help and wrong flags of the command line. Scripts call it before they import torch, which takes seconds."""
        try:
            super().parse_args()
        except BadInput as error:
            refuse(sys.argv[0], error)

    def parse_args(self, args=None):
        """Parse, and make sure before any work that --out and --json can be written. Raises BadInput, OSError."""
        parsed = super().parse_args(args)
        Image.MAX_IMAGE_PIXELS = parsed.max_pixels
        if is_main():
            Path(parsed.out).mkdir(parents=True, exist_ok=True)
            if parsed.json:
                if Path(parsed.json).is_dir():
                    raise BadInput(f"--json {parsed.json}: is a folder; give a file")
                Path(parsed.json).parent.mkdir(parents=True, exist_ok=True)
        return parsed


def training_flags(parser, models):
    """The flags that both training scripts have; defaults that depend on --model stand in its table."""
    add = parser.add_argument
    add("--model", choices=list(models), help="sd: the paper's setting; small: from scratch on a laptop (default: that of --ckpt, else sd)")
    add("--sd", default="CompVis/stable-diffusion-v1-4", metavar="ID_OR_FOLDER",
        help="Stable Diffusion's weights for --model sd: hub id, folder with unet/ and vae/, or 'none' for untrained ones (default %(default)s)")
    add("--train_split", nargs="+", help="one name, or one for each set of --data (default: that of --ckpt, else train2017)")
    add("--val_split", help="(default: that of --ckpt, else val2017)")
    add("--iters", type=natural, help="iterations")
    add("--lr", type=amount, help="peak learning rate of AdamW")
    add("--schedule", choices=["constant", "cosine"], help="of the learning rate, after the warm-up")
    add("--warmup", type=natural, default=200, help="iterations of linear warm-up (default %(default)s)")
    add("--weight_decay", type=amount, default=0.05, help="of AdamW (default %(default)s)")
    add("--accum", type=positive, help="gradient accumulation steps in a batch (default 1; stage 2 of sd: 32 samples each)")
    add("--min_segment", type=natural, default=10, help="segments under so many pixels of the file are void in training (default %(default)s)")
    add("--crop", type=side, metavar="PX", help="train on random squares of so many pixels of a picture, and sample larger ones by tiles; "
        "0: on whole pictures (default: as in --ckpt, else 0)")
    add("--turns", action="store_true", help="turn training pictures by random quarters, where no side is up")
    add("--ckpt", help="start from (or with --iters 0 evaluate) these weights")
    add("--resume", action="store_true", help="continue the run in --out from its last saved state")
    add("--log_every", type=positive, default=50, help="iterations (default %(default)s)")
    add("--save_every", type=positive, default=1000, help="iterations between saved states (default %(default)s)")
    add("--eval_every", type=positive, default=1000, help="iterations between evaluations (default %(default)s)")
    add("--eval_images", type=positive, default=256, help="validation images of an evaluation (default %(default)s)")


def sampling_flags(parser, renoise):
    """The flags that sample.py and inpaint.py share."""
    add = parser.add_argument
    add("--ckpt", help="checkpoint of diffusion.py (default: checkpoints/ldm.pt, else assets/shapes.pt)")
    add("--split", help="(default: the validation split that the checkpoint names)")
    add("--limit", type=positive, help="only the first so many images of the split")
    add("--min_area", type=natural, help="segments under so many px of the image become void (default: the checkpoint's)")
    add("--threshold", type=fraction, default=0.5, help="pixels less certain than this become void (default %(default)s)")
    add("--renoise", action=argparse.BooleanOptionalAction, default=renoise,
        help="draw each step's noise anew instead of keeping DDIM's (default: sample.py off, as in the paper; inpaint.py on)")
    add("--votes", type=positive, default=1, metavar="K", help="sample K times, and let the samples vote on every pixel (default %(default)s)")
    add("--crop", type=side, metavar="PX", help="sample a picture in tiles of so many pixels and join them; 0: whole (default: as trained)")
    add("--connected", action=argparse.BooleanOptionalAction, help="make parts of a segment that do not touch segments of their own, in each sample "
        "of each tile, but for its largest segment; completions stay as they are (default: as the checkpoint says)")
    add("--overlap", type=number(float, 0, 0.9), default=0.25, help="share of a tile's side that the next one sees too (default %(default)s)")
    add("--compile", action="store_true", help="run the UNet through torch.compile, on CUDA with CUDA graphs (a minute or more at the start; needs "
        "a C++ compiler)")
    parser.set_defaults(batch_size=16, background=None)


def is_main():
    """True on the one process that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def write_json(path, content):
    """Write JSON beside its place, then move it there: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def palette(count=256):
    """count x 3 uint8 colours for ids; 0 (void) is dark grey."""
    hue, ring = np.arange(count) * 0.61803 % 1, np.arange(count) % 3
    rgb = 0.5 + 0.5 * np.cos(2 * np.pi * (hue[:, None] + np.array([0, 1 / 3, 2 / 3])))
    rgb = (0.25 + 0.75 * rgb) * np.array([1, 0.8, 0.65])[ring][:, None]
    rgb[0] = 0.18
    return (rgb * 255).astype(np.uint8)


def colorize(ids):
    """H x W ids -> H x W x 3 uint8."""
    return palette()[np.where(ids > 255, ids % 255 + 1, ids)]


def overlay(image, ids):
    """Image (H x W x 3, uint8) with its segments in colour and their contours in white."""
    mixed = (0.45 * image + 0.55 * colorize(ids)).astype(np.uint8)
    edge = np.zeros(ids.shape, bool)
    edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    edge[1:] |= ids[1:] != ids[:-1]
    mixed[edge] = 255
    return mixed


def fit(array, side):
    """An H x W x 3 uint8 array enlarged or shrunk until its longer side is `side` pixels."""
    tile = Image.fromarray(array)
    scale = side / max(tile.size)
    return np.asarray(tile.resize([max(1, round(s * scale)) for s in tile.size], Image.NEAREST if scale > 1 else Image.BICUBIC))


def sheet(rows, captions=(), cell=160, notes=()):
    """Rows of H x W x 3 uint8 arrays as one PIL image, with a caption over each column and a note beside each row."""
    top, right = (18 if captions else 0), (max(len(n) for n in notes) * 7 + 6 if notes else 0)
    sheet = Image.new("RGB", (max(map(len, rows)) * (cell + 4) + right, top + len(rows) * (cell + 4)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for c, caption in enumerate(captions):
        draw.text((c * (cell + 4) + 2, 1), caption, "black", font)
    for r, row in enumerate(rows):
        for c, array in enumerate(row):
            sheet.paste(Image.fromarray(fit(array, cell)), (c * (cell + 4), top + r * (cell + 4)))
        if notes:
            draw.text((sheet.width - right + 4, top + r * (cell + 4) + cell // 2), notes[r], "black", font)
    return sheet


def picture(path, rows, *captions, **choices):
    """Write `sheet` as a PNG; without rows nothing."""
    if rows:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        sheet(rows, *captions, **choices).save(path)


def plot(path, curves, xlabel, ylabel, log_y=False, size=(560, 360)):
    """Draw line plots with Pillow. curves: {label: (xs, ys)}; log_y: logarithmic y axis (positive values only)."""
    curves = {k: [(x, y) for x, y in zip(*c) if math.isfinite(y) and (y > 0 or not log_y)] for k, c in curves.items()}
    points = [p for c in curves.values() for p in c]
    if not points:
        return
    f = math.log10 if log_y else float
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = min(f(p[1]) for p in points), max(f(p[1]) for p in points)
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)
    (w, h), (left, top, right, bottom) = size, (56, 24, 12, 36)
    at = lambda x, y: (left + (x - x0) / (x1 - x0) * (w - left - right), h - bottom - (f(y) - y0) / (y1 - y0) * (h - top - bottom))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i in range(5):
        x, y = x0 + (x1 - x0) * i / 4, y0 + (y1 - y0) * i / 4
        y = 10 ** y if log_y else y
        draw.line([at(x0, y), at(x1, y)], "#dddddd")
        draw.text((4, at(x0, y)[1] - 7), f"{y:.3g}", "black", font)
        draw.text((at(x, 10 ** y0 if log_y else y0)[0] - 10, h - bottom + 4), f"{x:.4g}", "black", font)
    draw.text((w // 2 - 3 * len(xlabel), h - 16), xlabel, "black", font)
    draw.text((4, 4), ylabel, "black", font)
    for i, (label, curve) in enumerate(curves.items()):
        color = tuple(palette()[i + 1].tolist())
        draw.line([at(*p) for p in curve], color, 2)
        for p in curve if len(curve) <= 30 else ():
            cx, cy = at(*p)
            draw.ellipse([cx - 3, cy - 3, cx + 3, cy + 3], fill=color)
        draw.text((w - right - 150, top + 14 * i), label, color, font)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def side_by_side(functions, rounds=15, device=None):
    """Time functions in turn, so that all see the machine in the same state: {name: function} -> {name: median seconds}.

    CPU seconds of this process; with a device those on the clock, until the device is done."""
    def now():
        """The clock, once the device is done."""
        if device is None:
            return time.process_time()
        if device.type in ("cuda", "mps"):
            import torch
            getattr(torch, device.type).synchronize()
        return time.perf_counter()
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            began = now()
            function()
            times[name].append(now() - began)
    return {name: float(np.median(t[1:])) for name, t in times.items()}    # the first is the warm-up


def bench(sizes=(256, 512, 1024), count=8, rounds=15):
    """Images/s of one core from COCO-size JPEG and panoptic PNG, beside what Pillow needs to open, decode and resize the two files.

    The files are made here: `count` scenes of 640 x 480. Returns {side of the network's input: {what: images/s}}."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        root, content = Path(folder), {"images": [], "annotations": [], "categories": [{"id": i + 1} for i in range(len(KINDS))]}
        for d in ("annotations", "train", "panoptic_train"):
            (root / d).mkdir()
        for i in range(count):
            image, ids, categories = draw_scene(0, "bench", i, 640, max_shapes=16)
            colors = np.random.default_rng(i).choice(1 << 24, len(categories) + 1, replace=False)   # ids as COCO has them
            Image.fromarray(image[:480]).save(root / "train" / f"{i}.jpg", quality=90)
            write_id_png(root / "panoptic_train" / f"{i}.png", colors[ids[:480]])
            content["images"].append({"id": i, "file_name": f"{i}.jpg"})
            segments = [{"id": int(c), "category_id": k} for c, k in zip(colors[1:], categories)]
            content["annotations"].append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})
        write_json(root / "annotations" / "panoptic_train.json", content)
        source = Folder(root, "train")
        print(f"{count} scenes of 640 x 480, {np.mean([len(source[i]['segments_info']) for i in range(count)]):.0f} segments each; images/s of one core")
        print(f"{'size':>6}{'Pillow':>9}{'sample':>9}{'':7}{'ids only':>10}")
        for size in sizes:
            def floor():
                """What Pillow alone takes."""
                for i in range(count):
                    Image.open(root / "train" / f"{i}.jpg").resize((size, size), Image.BICUBIC)
                    Image.open(root / "panoptic_train" / f"{i}.png").resize((size, size), Image.NEAREST)
            sets = {"sample": Training(source, size, 128), "ids only": Training(source, size, 128, images=False)}
            run = lambda dataset: lambda: [dataset[n] for n in range(count)]
            seconds = side_by_side({"Pillow": floor, **{name: run(dataset) for name, dataset in sets.items()}}, rounds)
            rate = results[size] = {name: count / t for name, t in seconds.items()}
            print(f"{size:6}{rate['Pillow']:9.1f}{rate['sample']:9.1f}{100 * rate['sample'] / rate['Pillow']:6.0f}%{rate['ids only']:10.1f}", flush=True)
    return results


@command
def main(argv=None):
    """Command line: write a sheet of images and their segments, print what the source holds; or check a folder."""
    parser = Parser(__doc__, out="out", data="data/coco", network=False)
    add = parser.add_argument
    add("--split", nargs="+", metavar="NAME", help="(default train2017; with --check: every split that is there)")
    add("--limit", type=positive, default=8, help="images on the sheet (default %(default)s)")
    add("--check", metavar="FOLDER", help="read a whole dataset and name all that is broken in it; exit code 1 if anything is")
    add("--num_ids", type=number(int, 2, 256), default=128, help="--check: N, an image has at most N - 1 segments (default %(default)s)")
    add("--bench", action="store_true", help="time reading beside Pillow's own decoding, on files made for it")
    args = parser.parse_args(argv)
    if args.bench:
        results = bench()
        if args.json:
            write_json(args.json, results)
        return
    if args.check:
        images, counts = check(args.check, args.split, args.num_ids, args.background or "segment", args.num_workers)
        print(f"{args.check}: " + (", ".join(f"{k} {n}" for k, n in sorted(counts.items())) or "nothing is broken"))
        if args.json:
            write_json(args.json, {"images": images, "faults": counts})
        if counts:
            raise SystemExit(1)
        return
    args.split, *more = args.split or ["train2017"]
    if more:
        raise BadInput(f"--split {more[0]}: one name with --data; several are for --check")
    source = open_data(args.data, args.split, args.size or 64, args.seed, args.background or "segment")
    samples = [source[i] for i in random.Random(args.seed).sample(range(len(source)), min(args.limit, len(source)))]
    sheet = Path(args.out) / "data.png"
    picture(sheet, [[s["image"], colorize(s["ids"]), overlay(s["image"], s["ids"])] for s in samples], ["image", "ids", "overlay"])
    figures = {"images": len(source), "categories": len(source.categories),
               "segments_per_image": float(np.mean([len(s["segments_info"]) for s in samples]))}
    print(f"{args.data} {args.split}: {figures['images']} images, {figures['categories']} categories, "
          f"{figures['segments_per_image']:.1f} segments an image on the sheet -> {sheet}")
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    main()

"""pq.py: panoptic quality in plain NumPy (Kirillov et al. 2019; the paper's metric, section 4.1, Tables 1 and 2).

    python pq.py --gt gt.json --pred predictions.json                     # two COCO panoptic files and their PNGs
    python pq.py --gt gt.json --pred predictions.json --class_agnostic    # every category counts as one (Table 1)
    python pq.py --bench                                                  # speed beside the panoptic API's matching and bare decoding

A predicted and a true segment of the same category match where IoU > 0.5, which makes the match unique. Then
    SQ = mean IoU of the matches,  RQ = TP / (TP + FP/2 + FN/2),  PQ = SQ * RQ,
per category, averaged over the categories that occur. Void and crowd follow COCO's panoptic API.
"""
import argparse
import functools
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

VOID = 0
OBJECT = [{"id": 1, "name": "object", "isthing": 1}]
Image.MAX_IMAGE_PIXELS = 200_000_000  # `_ids` refuses more; --max_pixels sets it
_PLAIN = re.compile(r"(?![/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|$))[^\0-\x1f\x7f\ud800-\udfff]+")  # a name that leads to below its folder


class BadInput(ValueError):
    """Something that the user gave is wrong; the message is one line."""


class PanopticQuality:
    """Accumulates matches over images. `state` of several processes may be summed before `result`.

    categories: COCO's list of {id, isthing}; None is class-agnostic: every segment has category 1."""

    def __init__(self, categories=None):
        self.agnostic = categories is None
        self.categories = OBJECT if categories is None else categories
        self.row = {c["id"]: i for i, c in enumerate(self.categories)}
        self.counts = np.zeros((len(self.row), 3), np.int64)   # TP, FP, FN of each category
        self.iou = np.zeros(len(self.row))                     # sum of the matches' IoU

    def _rows(self, segments, what):
        """Row of each segment's category. Raises BadInput for a category that is not in the list."""
        if self.agnostic:
            return np.zeros(len(segments), np.int64)
        unknown = [s for s in segments if s.get("category_id") not in self.row]
        if unknown:
            raise BadInput(f"{what}: segment {unknown[0]['id']} has category {unknown[0].get('category_id')}, which the ground truth does not list")
        return np.array([self.row[s["category_id"]] for s in segments], np.int64)

    def update(self, gt, gt_segments, pred, pred_segments, what="image", mask=None):
        """Add one image.

        gt, pred: H x W integer id maps of the same size, 0 = void; *_segments: lists of {id, category_id[, iscrowd]}.
        Every id of pred must be listed once and every listed one must occur. mask: the bits of both maps that hold the id, None
        for all. Raises BadInput, naming `what`."""
        if gt.shape != pred.shape:
            raise BadInput(f"{what}: the prediction is {pred.shape[1]} x {pred.shape[0]} pixels, the ground truth {gt.shape[1]} x {gt.shape[0]}")
        inter = _overlaps(gt, [s["id"] for s in gt_segments], pred, [s["id"] for s in pred_segments], what, mask)
        gt_area, pred_area = inter.sum(1)[1:-1], inter.sum(0)[1:]
        void, inter = inter[0, 1:], inter[1:-1, 1:]            # the overlap with void; segments x segments
        gt_row, pred_row = self._rows(gt_segments, what), self._rows(pred_segments, what)
        crowd = np.array([bool(s.get("iscrowd")) for s in gt_segments], bool)

        union = gt_area[:, None] + pred_area[None] - inter - void[None]
        iou = inter / np.maximum(union, 1)
        match = (iou > 0.5) & (gt_row[:, None] == pred_row[None]) & ~crowd[:, None]
        # a prediction that lies mostly on void or on the crowd of its category is not counted
        ignored = void.copy()
        last_crowd = {gt_row[i]: i for i in np.flatnonzero(crowd)}          # the API keeps one crowd a category
        for row, i in last_crowd.items():
            ignored += np.where(pred_row == row, inter[i], 0)
        false_pos = ~match.any(0) & (ignored * 2 <= pred_area)
        false_neg = ~match.any(1) & ~crowd
        g, p = np.nonzero(match)
        np.add.at(self.iou, gt_row[g], iou[g, p])
        np.add.at(self.counts, (gt_row[g], 0), 1)
        np.add.at(self.counts, (pred_row[false_pos], 1), 1)
        np.add.at(self.counts, (gt_row[false_neg], 2), 1)

    def missed(self, gt_segments, what="image"):
        """Add an image without a prediction: all its segments are missed."""
        rows = self._rows([s for s in gt_segments if not s.get("iscrowd")], what)
        np.add.at(self.counts, (rows, 2), 1)

    @property
    def state(self):
        """All that was accumulated as one C x 4 float64 array (IoU sum, TP, FP, FN): sum it over processes and set it back."""
        return np.concatenate([self.iou[:, None], self.counts], 1)

    @state.setter
    def state(self, value):
        """Go on from such an array."""
        self.iou, self.counts = value[:, 0].copy(), np.rint(value[:, 1:]).astype(np.int64)

    def result(self):
        """PQ, SQ, RQ as fractions, in the panoptic API's layout: All, Things, Stuff (with n categories) and per_class."""
        tp, fp, fn = self.counts.T
        seen = (tp + fp + fn) > 0
        sq = self.iou / np.maximum(tp, 1)
        rq = tp / np.maximum(tp + 0.5 * fp + 0.5 * fn, 0.5)
        pq = self.iou / np.maximum(tp + 0.5 * fp + 0.5 * fn, 0.5)
        thing = np.array([bool(c.get("isthing", 1)) for c in self.categories])
        mean = lambda values, keep: float(values[keep].mean()) if keep.any() else 0.0
        groups = {"All": seen, "Things": seen & thing, "Stuff": seen & ~thing}
        result = {k: {"pq": mean(pq, s), "sq": mean(sq, s), "rq": mean(rq, s), "n": float(s.sum())} for k, s in groups.items()}
        result["per_class"] = {str(c["id"]): {"pq": float(pq[i]), "sq": float(sq[i]), "rq": float(rq[i])}
                               for i, c in enumerate(self.categories)}
        return result


def _overlaps(gt, gt_ids, pred, pred_ids, what, mask):
    """Pixels that each pair of segments shares: (1 + G + 1) x (1 + P), int64; first is void, the last row unlisted ids."""
    # ids come in runs along a row: look up runs of equal pairs, not pixels
    gt, pred = gt.reshape(-1), pred.reshape(-1)
    change = gt[1:] != gt[:-1]
    change |= pred[1:] != pred[:-1]
    start = np.concatenate([[0], 1 + np.flatnonzero(change)])
    gt, pred, length = gt[start], pred[start], np.append(start[1:], gt.size) - start
    gt, pred = (gt, pred) if mask is None else (gt & mask, pred & mask)
    def places(ids, listed, name):
        """Where each of `ids` stands in `listed`, from 1: 0 for void, -1 for one that is not listed."""
        if len(set(listed)) < len(listed):
            raise BadInput(f"{what}: the {name} lists a segment id twice")
        known = np.array([VOID, *listed])
        order = known.argsort()
        place = order[known.searchsorted(ids, sorter=order).clip(max=len(listed))]
        return np.where(known[place] == ids, place, -1)
    g, p = places(gt, gt_ids, "ground truth"), places(pred, pred_ids, "prediction")
    if (p < 0).any():
        raise BadInput(f"{what}: the prediction holds an id that its segments_info does not list")
    g[g < 0] = len(gt_ids) + 1
    pairs = np.bincount(g * (len(pred_ids) + 1) + p, length, (len(gt_ids) + 2) * (len(pred_ids) + 1))
    inter = pairs.reshape(len(gt_ids) + 2, len(pred_ids) + 1).astype(np.int64)
    if (inter[:, 1:].sum(0) == 0).any():
        raise BadInput(f"{what}: the prediction lists segment {pred_ids[int(inter[:, 1:].sum(0).argmin())]}, which has no pixel")
    return inter


def table(result):
    """The PQ/SQ/RQ table, in percent, as lines of text."""
    rows = [f"{'':8}{'PQ':>7}{'SQ':>7}{'RQ':>7}{'n':>5}"]
    for name in ("All", "Things", "Stuff"):
        r = result[name]
        rows.append(f"{name:8}{100 * r['pq']:7.1f}{100 * r['sq']:7.1f}{100 * r['rq']:7.1f}{int(r['n']):5}")
    return "\n".join(rows[:2] if len(result["per_class"]) == 1 else rows)


def _read(path):
    """A COCO panoptic JSON -> {image_id: (file_name, segments_info)} and its categories, unchecked. Raises BadInput, naming the entry."""
    def need(fine, line, *values):
        """Raise BadInput with this line unless it is fine."""
        if not fine:
            raise BadInput(f"{path}: " + line.format(*(type(v).__name__ if isinstance(v, (list, dict)) else repr(v)[:60] for v in values)))
    def no_number(text):
        """Refuse NaN and Infinity, which are no JSON."""
        raise ValueError(f"{text} is no number")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=no_number)
    except OSError as error:
        raise BadInput(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({error})") from None
    objects = lambda v: isinstance(v, list) and all(isinstance(e, dict) for e in v)
    need(isinstance(content, dict) and objects(content.get("annotations")), "not a COCO panoptic file: 'annotations' must be a list of objects")
    annotations = {}
    for a in content["annotations"]:
        image_id, name, segments = a.get("image_id"), a.get("file_name"), a.get("segments_info")
        need(type(image_id) in (int, str), "image_id must be a whole number or a text, not {}", image_id)
        need(image_id not in annotations, "image {} is there twice", image_id)
        need(isinstance(name, str) and _PLAIN.fullmatch(name), "image {}: file_name must be a path without '..' below the folder, not {}", image_id, name)
        need(objects(segments), "image {}: segments_info must be a list of segments", image_id)
        for s in segments:
            i, category, crowd = s.get("id"), s.get("category_id"), s.get("iscrowd")
            need(type(i) is int and 0 < i < 1 << 24, "image {}: a segment's id must be a whole number in 1..16777215, not {}", image_id, i)
            need(category is None or type(category) is int, "image {}: category_id of segment {} must be a whole number, not {}", image_id, i, category)
            need(crowd in (None, 0, 1), "image {}: iscrowd of segment {} must be 0 or 1, not {}", image_id, i, crowd)
        need(len({s["id"] for s in segments}) == len(segments), "image {}: a segment id is listed twice", image_id)
        annotations[image_id] = name, segments
    return annotations, content.get("categories")


def _ids(folder, name):
    """Read a PNG as H x W int32, whose lower 24 bits are the ids: R + 256 G + 65536 B, or a single channel. Raises BadInput."""
    path = os.path.join(folder, name)
    try:
        with Image.open(path, formats=("PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM")) as image:
            if image.mode not in ("1", "L", "RGB") and not image.mode.startswith("I"):
                image = image.convert({"LA": "L", "F": "I"}.get(image.mode, "RGB"))
            if image.mode == "RGB":                                        # as Pillow has it, with a fourth byte; to clear it would take longer
                return np.frombuffer(image.tobytes("raw", "RGBX"), "<i4").reshape(image.height, image.width)
            ids = np.asarray(image).astype(np.int32)
            if ids.min() < 0 or ids.max() >= 1 << 24:
                raise ValueError
            return ids
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadInput(f"{path}: has more than {Image.MAX_IMAGE_PIXELS:,} pixels; if you trust it, raise --max_pixels") from None
    except Exception as error:
        raise BadInput(f"{path}: no readable PNG ({type(error).__name__})") from None


def _count(images, categories, gt_dir, pred_dir, max_pixels):
    """The `state` of some images. Each: (image_id, (file_name, segments_info) of the truth, the same of the prediction or None)."""
    Image.MAX_IMAGE_PIXELS = max_pixels                                    # a spawned process knows only the default
    quality = PanopticQuality(categories)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                    # Pillow's remarks on metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)     # comes before anything is decoded
        for image_id, (name, segments), prediction in images:
            if prediction is None:
                quality.missed(segments, f"image {image_id!r}")
            else:
                quality.update(_ids(gt_dir, name), segments, _ids(pred_dir, prediction[0]), prediction[1], f"image {image_id!r}", 0xFFFFFF)
    return quality.state


def _keep_memory():
    """Let the allocator keep the memory of one map for the next: glibc does so up to the largest block that was ever given back."""
    np.empty(31 << 20, np.uint8)                                           # pages that are not touched cost nothing


def evaluate(gt, pred, gt_dir=None, pred_dir=None, class_agnostic=False, processes=1):
    """Evaluate two COCO panoptic JSON files; PNG folders default to the JSON's path without `.json`. Raises BadInput.

    processes: how many share the work; the result is the same to the last bit, since images are always summed in groups of 4."""
    truth, categories = _read(gt)
    predictions, _ = _read(pred)
    if class_agnostic:
        categories = None
    elif not isinstance(categories, list) or not all(isinstance(c, dict) and type(c.get("id")) is int for c in categories):
        raise BadInput(f"{gt}: no list of categories with whole numbers as id; add --class_agnostic to do without")
    elif len({c["id"] for c in categories}) < len(categories):
        raise BadInput(f"{gt}: lists a category twice; add --class_agnostic to do without")
    gt_dir, pred_dir = gt_dir or str(gt).removesuffix(".json"), pred_dir or str(pred).removesuffix(".json")
    count = functools.partial(_count, categories=categories, gt_dir=gt_dir, pred_dir=pred_dir, max_pixels=Image.MAX_IMAGE_PIXELS)
    images = [(i, found, predictions.get(i)) for i, found in truth.items()]
    groups = [images[k:k + 4] for k in range(0, len(images), 4)]
    quality = PanopticQuality(categories)
    if min(processes, len(groups)) > 1:
        with multiprocessing.get_context("spawn").Pool(min(processes, len(groups)), _keep_memory) as pool:     # a forked child may inherit a held lock
            quality.state = sum(pool.imap(count, groups), quality.state)
    else:
        _keep_memory()
        quality.state = sum(map(count, groups), quality.state)
    return quality.result()


def command(main):
    """Make `main(argv)` end on BadInput, or a file that can't be written, with one line on stderr and exit code 2."""
    @functools.wraps(main)
    def run(argv=None):
        """`main`, with errors in one line."""
        try:
            return main(argv)
        except (BadInput, OSError) as error:
            print(f"pq.py: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
    return run


def positive(text):
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not '{text}'")
    return int(text)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        """What argparse calls on a wrong flag."""
        raise BadInput(message)


def _blobs(count, width, height, seed):
    """A map of `count` segments with wavy outlines and ids as COCO has them (height x width, int32), for `bench`."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    y, x = y + 6 * np.sin(x / 17) + 3 * np.sin(x / 5), x + 6 * np.sin(y / 13)
    nearest, ids = np.full((height, width), np.inf, np.float32), np.zeros((height, width), np.int32)
    for i, (row, col) in zip(rng.choice((1 << 24) - 1, count, replace=False) + 1, rng.random((count, 2)) * (height, width)):
        distance = (y - row) ** 2 + (x - col) ** 2
        ids[distance < nearest], nearest = i, np.minimum(distance, nearest)
    return ids


def _decode(files):
    """Read PNGs, and nothing else."""
    for file in files:
        Image.open(file).load()


MAPS = [(640, 480, 5), (640, 480, 20), (640, 480, 60), (640, 480, 120), (320, 240, 20), (1280, 960, 20), (2560, 1920, 20)]


def bench(processes, cases=MAPS, images=256, rounds=7):
    """Time `update` beside the panoptic API's way of matching, and `evaluate` beside decoding its PNGs: medians, CPU time of one core.

    cases: width, height and number of segments of the maps; images: pairs of PNGs to evaluate, eight times as many with several processes
    (where decoding alone, in processes that run already, shows what the machine can give). Returns the figures by what they measure."""
    def side_by_side(*functions, clock=time.process_time, rounds=rounds):
        """Median seconds of each function."""
        times = []
        for _ in range(rounds + 1):                                        # in turn: all see the machine in the same state
            for function in functions:
                began = clock()
                function()
                times.append(clock() - began)
        return np.median(np.reshape(times, (rounds + 1, -1))[1:], 0)       # the first round is the warm-up
    def api(gt, pred):
        """What the panoptic API does to find the pairs."""
        np.unique(gt.astype(np.uint64) * (1 << 24) + pred.astype(np.uint64), return_counts=True)
        np.unique(pred, return_counts=True)
    describe = lambda ids: [{"id": int(i), "category_id": 1} for i in np.unique(ids)]
    rows, quality = {}, PanopticQuality()
    print(f"from arrays, one core\n{'size':>10}{'segments':>10}{'ms':>8}{'API':>8}{'times':>7}")
    for width, height, count in cases:
        gt, pred = _blobs(count, width, height, 0), _blobs(count, width, height, 1)
        segments = describe(gt), describe(pred)
        ours, theirs = 1000 * side_by_side(lambda: quality.update(gt, segments[0], pred, segments[1]), lambda: api(gt, pred))
        rows[f"{width} x {height}, {count} segments"] = {"ms": ours, "api_ms": theirs}
        print(f"{width:5} x{height:4}{count:10}{ours:8.2f}{theirs:8.2f}{theirs / ours:7.1f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        maps, files = [_blobs(12, 640, 480, seed) for seed in range(8)], [f"{folder}/{seed}.png" for seed in range(8)]
        for ids, file in zip(maps, files):
            Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)).save(file)
        for name, shift in (("gt", 0), ("pred", 1)):
            own = [{"file_name": f"{(i + shift) % 8}.png", "segments_info": describe(maps[(i + shift) % 8])} for i in range(8)]
            for count in (images, 8 * images):
                content = {"annotations": [{"image_id": i, **own[i % 8]} for i in range(count)]}
                Path(folder, f"{name}{count}.json").write_text(json.dumps(content))
        run = lambda count, n: lambda: evaluate(f"{folder}/gt{count}.json", f"{folder}/pred{count}.json", folder, folder, True, n)
        decoding, ours = images / side_by_side(lambda: _decode(files * (images // 4)), run(images, 1))
        rows["files"] = {"images_per_second": ours, "decoding": decoding}
        print(f"from files of 640 x 480, one core: {ours:.0f} images/s, {100 * ours / decoding:.0f}% of the {decoding:.0f} of decoding alone")
        print(f"by the wall clock, images/s\n{'processes':>10}{'PQ':>8}{'decoding alone':>17}")
        images *= 8
        for n in sorted({1, 2, processes // 2 or 1, processes}):
            with multiprocessing.get_context("spawn").Pool(n) as pool:
                share = [files * (images // 4 // n)] * n
                pool.map(_decode, [files] * n, 1)                          # they have begun
                seconds = side_by_side(run(images, n), lambda: pool.map(_decode, share, 1), clock=time.perf_counter, rounds=1)
            rates = np.array([images, sum(map(len, share)) / 2]) / seconds
            rows[f"files, {n} processes"] = dict(zip(("images_per_second", "decoding"), rates))
            print(f"{n:10}{rates[0]:8.0f}{rates[1]:17.0f}", flush=True)
    return rows


@command
def main(argv=None):
    """Command line: evaluate two COCO panoptic files, print the table, optionally write JSON (fractions)."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gt", help="COCO panoptic JSON of the ground truth")
    parser.add_argument("--pred", help="COCO panoptic JSON of the prediction")
    parser.add_argument("--gt_dir", help="its PNGs (default: the JSON's path without .json)")
    parser.add_argument("--pred_dir", help="its PNGs (default: the JSON's path without .json)")
    parser.add_argument("--class_agnostic", action="store_true", help="every category counts as one")
    parser.add_argument("--json", help="also write the result, as fractions, to this file")
    parser.add_argument("--max_pixels", type=positive, default=200_000_000, help="images of more are refused as bombs (default %(default)s)")
    parser.add_argument("--processes", type=positive, default=os.cpu_count(), help="that share the work (default: one for each core, %(default)s here)")
    parser.add_argument("--bench", action="store_true", help="time it on maps made for it")
    args = parser.parse_args(argv)
    Image.MAX_IMAGE_PIXELS = args.max_pixels
    if args.json and Path(args.json).is_dir():
        raise BadInput(f"--json {args.json}: is a folder; give a file")
    if args.bench:
        result = bench(args.processes)
    elif not args.gt or not args.pred:
        raise BadInput("--gt and --pred: both are needed")
    else:
        result = evaluate(args.gt, args.pred, args.gt_dir, args.pred_dir, args.class_agnostic, args.processes)
        print(table(result))
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json + ".tmp").write_text(json.dumps(result, indent=1) + "\n")
        os.replace(args.json + ".tmp", args.json)


if __name__ == "__main__":
    main()

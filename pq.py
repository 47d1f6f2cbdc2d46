"""pq.py: panoptic quality in plain NumPy (Kirillov et al. 2019; the paper's metric, section 4.1).

    python pq.py --gt gt.json --pred predictions.json                     # Table 2
    python pq.py --gt gt.json --pred predictions.json --class_agnostic    # Table 1: one category

A predicted and a true segment of the same category match where IoU > 0.5, which makes the match
unique. Per category, averaged over the categories that occur,
    SQ = mean IoU of the matches,  RQ = TP / (TP + FP/2 + FN/2),  PQ = SQ * RQ.
With categories void and crowds follow COCO's panoptic API, without them every crowd is ignored."""

from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

import data
from data import BadInput

OBJECT = [{"id": 1, "name": "object", "isthing": 1}]  # class-agnostic: the one category
NAMES = ("pq", "sq", "rq")


def overlaps(a, b):
    """Which ids of two maps of one shape share pixels: id of a, id of b, pixels (P each)."""
    a, b = a.reshape(-1), b.reshape(-1)  # H*W each
    change = np.ones(a.size, bool)
    change[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    start = np.flatnonzero(change)  # of runs of equal pairs, far fewer than pixels
    pair, place = np.unique(a[start].astype(np.int64) << 32 | b[start], return_inverse=True)
    return pair >> 32, pair & 0xFFFFFFFF, np.bincount(place, np.diff(start, append=a.size))


def places(ids, segments):
    """Where each of `ids` stands in a list of segments, from 1; 0 for void."""
    place = {0: 0} | {s["id"]: k for k, s in enumerate(segments, 1)}
    return np.array([place[i] for i in ids.tolist()])


class PanopticQuality:
    """Matches over images and processes. categories: COCO's list, None: class-agnostic."""

    def __init__(self, categories=None):
        self.agnostic = categories is None
        self.categories = OBJECT if categories is None else categories
        self.row_of = {c["id"]: row for row, c in enumerate(self.categories)}
        self.state = np.zeros((len(self.categories), 4))  # per category: sum of IoU, TP, FP, FN

    def rows(self, void, segments, what):
        """Row of void's and of each segment's category. Raises BadInput for one without a row."""
        try:
            rows = [0 if self.agnostic else self.row_of[s["category_id"]] for s in segments]
        except KeyError as missing:
            raise BadInput(f"{what}: the truth does not list category {missing}") from None
        return np.array([void, *rows])

    def update(self, gt, gt_segments, pred, pred_segments, what="image"):
        """Add an image: id maps (H x W, 0 = void), segments_info. Raises BadInput about `what`."""
        if gt.shape != pred.shape:
            raise BadInput(f"{what}: the prediction is {pred.shape} pixels, the truth {gt.shape}")
        gt_row, pred_row = self.rows(-1, gt_segments, what), self.rows(-2, pred_segments, what)
        crowd = np.array([False, *(bool(s.get("iscrowd")) for s in gt_segments)])
        g, p, n = overlaps(gt, pred)  # P each, here and below
        g, p = places(g, gt_segments), places(p, pred_segments)
        gt_area, pred_area = np.bincount(g, n, len(gt_row)), np.bincount(p, n, len(pred_row))
        void = np.bincount(p[g == 0], n[g == 0], len(pred_row))  # pixels that count for nothing
        same = gt_row[g] == pred_row[p]  # never void, whose rows differ
        g, p, n = g[same], p[same], n[same]
        # A prediction mostly on void or on a crowd of its category is not counted; with categories
        # the panoptic API knows the last crowd of each only
        crowds = {i if self.agnostic else gt_row[i]: i for i in np.flatnonzero(crowd)}
        on_crowd = np.isin(g, list(crowds.values()))
        ignored = void + np.bincount(p[on_crowd], n[on_crowd], len(pred_row))
        iou = n / (gt_area[g] + pred_area[p] - n - void[p])
        match = (iou > 0.5) & ~crowd[g]  # at most one for each segment
        g, p, iou = g[match], p[match], iou[match]
        false_positive, false_negative = 2 * ignored <= pred_area, ~crowd
        false_positive[[0, *p]] = False  # nor is void one
        false_negative[[0, *g]] = False
        np.add.at(self.state, (gt_row[g], 0), iou)
        np.add.at(self.state, (gt_row[g], 1), 1)
        np.add.at(self.state, (pred_row[false_positive], 2), 1)
        np.add.at(self.state, (gt_row[false_negative], 3), 1)

    def result(self):
        """Fractions in the panoptic API's layout; None where a group has no category (n = 0)."""
        iou, tp, fp, fn = data.reduce_sum(self.state).numpy().T
        found = np.maximum(tp + fp / 2 + fn / 2, 0.5)  # 0 only where nothing is, and all are 0
        figures = np.stack([iou / found, iou / np.maximum(tp, 1), tp / found], 1)  # C x 3
        seen = tp + fp + fn > 0
        thing = np.array([c.get("isthing", 1) for c in self.categories], bool)
        result = {}
        for name, group in (("All", seen), ("Things", seen & thing), ("Stuff", seen & ~thing)):
            means = figures[group].mean(0).tolist() if group.any() else [None] * 3
            result[name] = dict(zip(NAMES, means)) | {"n": int(group.sum())}
        rows = zip(self.categories, figures.tolist())
        result["per_class"] = {str(c["id"]): dict(zip(NAMES, row)) for c, row in rows}
        return result


class Score:
    """Class-agnostic PQ, SQ and RQ over samples of data.py. Where all that is no instance is one
    background, they are those of the instances alone: matched with it, counted without it and the
    segment that covers most of it. Then also ap50 = TP / (TP + FP + FN)."""

    def __init__(self):
        self.everything = PanopticQuality()
        self.alone = PanopticQuality([{"id": 1, "isthing": 1}, {"id": 2, "isthing": 0}])

    def update(self, sample, found):
        """Add an id map (H x W, 0 = void) for a sample."""
        truth, segments, name = sample["ids"], sample["segments_info"], sample["file_name"]
        own, quality = data.describe(found), self.everything
        if (background := sample.get("background_id")) is not None:
            back = [s["id"] for s in segments if s["category_id"] == background]
            covered = np.bincount(found[np.isin(truth, back)], minlength=found.max() + 1)
            covered[0] = 0  # void is no segment
            most = covered.argmax()  # of it most has to lie on the background
            cover = most if 2 * covered[most] > (found == most).sum() else 0
            segments = [s | {"category_id": 1 + (s["id"] in back)} for s in segments]
            own = [s | {"category_id": 1 + (s["id"] == cover)} for s in own]
            quality = self.alone
        quality.update(truth, segments, found, own, name)

    def result(self):
        """The figures by name, in percent, over all processes; None where there is nothing."""
        everything, alone = self.everything.result()["All"], self.alone.result()
        if not alone["All"]["n"]:
            return percent({k: everything[k] for k in NAMES})
        things, rq = alone["Things"], alone["Things"]["rq"]
        return percent({k: things[k] for k in NAMES} | {"ap50": rq and rq / (2 - rq)})


def percent(figures):
    """Figures by name in percent, as tables and JSON have them."""
    return {k: None if v is None else 100 * v for k, v in figures.items()}


def line(values, width=8):
    """A line of a table: numbers with one decimal, "-" for None, text as it is."""
    cells = [f"{v:.1f}" if isinstance(v, float) else "-" if v is None else str(v) for v in values]
    return "".join(cell.rjust(max(width, len(cell) + 1)) for cell in cells)


def evaluate(gt, pred, gt_dir=None, pred_dir=None, class_agnostic=False):
    """`PanopticQuality.result` of two COCO panoptic JSON files, paired by image_id; the PNGs'
    folders default to their paths without `.json`. Raises BadInput."""
    content, truth = data.read_coco(gt, panoptic=True)
    _, found = data.read_coco(pred, panoptic=True)
    paired = len(truth.keys() & found.keys())
    if not paired:
        ids = f"{next(iter(truth), '-')} in {gt}, {next(iter(found), '-')} in {pred}"
        raise BadInput(f"no image of the prediction is in the truth: image_id is {ids}")
    if not paired == len(truth) == len(found):
        images = f"{len(truth)} images in the truth, {len(found)} in the prediction"
        data.say_once(f"note: {images}, {paired} in both; what lacks a prediction is missed")
    categories = None if class_agnostic else content["categories"]
    gt_folders = [Path(gt_dir or str(gt).removesuffix(".json"))]
    pred_folders = [Path(pred_dir or str(pred).removesuffix(".json"))]

    def state_of(image_id):
        """What one image adds to the sums."""
        what, quality = f"image {image_id}", PanopticQuality(categories)
        ids, segments = data.read_panoptic(*truth[image_id], gt_folders, what)
        other = np.zeros_like(ids), []  # no prediction: all is missed
        if image_id in found:
            other = data.read_panoptic(*found[image_id], pred_folders, what)
        quality.update(ids, segments, *other, what)
        return quality.state

    quality = PanopticQuality(categories)
    with ThreadPool() as pool:  # decoding PNGs does not hold Python's lock
        quality.state += sum(pool.imap(state_of, truth))
    return quality.result()


@data.command
def main(argv=None):
    """Command line: evaluate two COCO panoptic files, print the table."""
    parser = data.Parser(__doc__)
    flag = parser.flag
    flag("--gt", str, "COCO panoptic JSON of the truth", required=True)
    flag("--pred", str, "COCO panoptic JSON of the prediction", required=True)
    flag("--gt_dir", str, "its PNGs (default: the JSON's path without .json)")
    flag("--pred_dir", str, "its PNGs (default: the JSON's path without .json)")
    flag("--class_agnostic", bool, "every category counts as one")
    args = parser.parse_args(argv)
    result = evaluate(args.gt, args.pred, args.gt_dir, args.pred_dir, args.class_agnostic)
    print(line(["", "PQ", "SQ", "RQ", "n"]))
    for name in ("All", "Things", "Stuff")[: 1 if args.class_agnostic else 3]:
        figures = percent({k: result[name][k] for k in NAMES})
        print(line([name, *figures.values(), result[name]["n"]]))
    data.write(args.json, result)


if __name__ == "__main__":
    main()

"""pq.py: panoptic quality, the paper's metric (4.1; Kirillov et al. 2019), in NumPy.

    python pq.py --gt gt.json --pred predictions.json                     # Table 2
    python pq.py --gt gt.json --pred predictions.json --class_agnostic    # Table 1

A predicted and a true segment of the same category match if their IoU is over 0.5; then
no other segment can match either of them. In each category,

    SQ = mean IoU of the matches     RQ = TP / (TP + FP / 2 + FN / 2)     PQ = SQ * RQ

and the figures are averaged over the categories that occur. Void and crowds are treated
as in COCO's panoptic API. With --class_agnostic all segments are of the same category,
and all crowds are ignored.
"""

from collections import Counter
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

import data
from data import BadInput, flag, nonempty

VOID = 0
OBJECT = [{"id": 1, "name": "object", "isthing": 1}]  # class-agnostic: the one category
FALSE_POSITIVES, FALSE_NEGATIVES = 2, 3  # columns of `PanopticQuality.sums`


def overlaps(a, b):
    """Pairs of ids in two maps that share pixels: [(id in a, id in b, pixels), ...]."""
    pairs = (a.reshape(-1).astype(np.int64) << 32) | b.reshape(-1)  # two ids in one
    pairs, pixels = data.count_values(pairs)
    first = pairs >> 32
    second = pairs & 0xFFFFFFFF
    return list(zip(first.tolist(), second.tolist(), pixels.tolist()))


class PanopticQuality:
    """Accumulates the matches of many images.

    categories: COCO's list of {id, name, isthing}, or None for class-agnostic PQ.
    """

    def __init__(self, categories=None):
        self.agnostic = categories is None
        self.categories = OBJECT if self.agnostic else categories
        self.row_of = {c["id"]: row for row, c in enumerate(self.categories)}
        self.sums = np.zeros((len(self.categories), 4))  # sum of IoU, TP, FP, FN

    def rows(self, segments, image):
        """{segment id: row of its category in `sums`}; image: for error messages."""
        rows = {}
        for segment in segments:
            category = OBJECT[0]["id"] if self.agnostic else segment["category_id"]
            if category not in self.row_of:
                raise BadInput(f"{image}: the truth does not list category {category}")
            rows[segment["id"]] = self.row_of[category]
        return rows

    def excusing(self, crowds):
        """The ids of crowds on which predictions are not counted as wrong.

        Class-agnostic: all of them; otherwise, as in the panoptic API, only the last
        crowd of each category.
        """
        if self.agnostic:
            return {s["id"] for s in crowds}
        last = {s["category_id"]: s["id"] for s in crowds}
        return set(last.values())

    def update(self, gt, gt_segments, pred, pred_segments, image="image"):
        """Add an image: id maps (H x W, 0 = void) and their segments_info.

        Raises BadInput if the shapes differ or a category is not listed.
        """
        if gt.shape != pred.shape:
            raise BadInput(
                f"{image}: the prediction has {pred.shape} pixels, the truth {gt.shape}"
            )
        gt_row = self.rows(gt_segments, image)
        pred_row = self.rows(pred_segments, image)
        crowds = [s for s in gt_segments if s.get("iscrowd")]
        excusing = self.excusing(crowds)
        crowds = {s["id"] for s in crowds}

        # areas, added up from the overlaps
        shared = overlaps(gt, pred)
        gt_area, pred_area, on_void = Counter(), Counter(), Counter()
        for true, found, pixels in shared:
            gt_area[true] += pixels
            pred_area[found] += pixels
            if true == VOID:
                on_void[found] += pixels

        # matches: same category and IoU > 0.5; void pixels of the truth do not count
        matched_gt, matched_pred = set(), set()
        ignored = Counter(on_void)
        for true, found, pixels in shared:
            if VOID in (true, found) or gt_row[true] != pred_row[found]:
                continue
            if true in crowds:
                if true in excusing:
                    ignored[found] += pixels
                continue
            union = gt_area[true] + pred_area[found] - pixels - on_void[found]
            iou = pixels / union
            if iou > 0.5:
                self.sums[gt_row[true]] += (iou, 1, 0, 0)
                matched_gt.add(true)
                matched_pred.add(found)

        # All others are errors, except predictions without pixels or mostly on void or
        # crowds, and crowds themselves.
        for found, row in pred_row.items():
            excused = 2 * ignored[found] > pred_area[found] or pred_area[found] == 0
            if found not in matched_pred and not excused:
                self.sums[row, FALSE_POSITIVES] += 1
        for true, row in gt_row.items():
            if true not in matched_gt and true not in crowds:
                self.sums[row, FALSE_NEGATIVES] += 1

    def result(self):
        """Figures over all processes, as fractions, in the panoptic API's layout.

        They are None for a group in which no category occurs (n = 0).
        """
        iou, tp, fp, fn = data.sum_over_processes(self.sums).numpy().T  # C each
        halves = np.maximum(tp + fp / 2 + fn / 2, 0.5)  # 0.5 instead of 0 / 0
        sq = iou / np.maximum(tp, 1)
        rq = tp / halves
        figures = np.stack([sq * rq, sq, rq], axis=1)  # C x 3

        occurs = tp + fp + fn > 0
        thing = np.array([bool(c.get("isthing", 1)) for c in self.categories])
        groups = {"All": occurs, "Things": occurs & thing, "Stuff": occurs & ~thing}
        result = {}
        for name, group in groups.items():
            pq, sq, rq = figures[group].mean(0).tolist() if group.any() else [None] * 3
            result[name] = {"pq": pq, "sq": sq, "rq": rq, "n": int(group.sum())}
        per_class = {}
        for category, (pq, sq, rq) in zip(self.categories, figures.tolist()):
            per_class[str(category["id"])] = {"pq": pq, "sq": sq, "rq": rq}
        return {**result, "per_class": per_class}


class Score:
    """Class-agnostic figures over samples of data.py, in percent."""

    def __init__(self):
        self.quality = PanopticQuality()
        self.instances = Instances()  # beyond the paper

    def update(self, sample, found):
        """Add an id map (H x W, 0 = void) for a sample."""
        if sample.get("background_id") is not None:  # beyond the paper
            self.instances.update(sample, found)
            return
        truth = sample["ids"], sample["segments_info"]
        self.quality.update(
            *truth, found, data.describe(found), image=sample["file_name"]
        )

    def result(self):
        """{"pq", "sq", "rq"} in percent over all processes; None without segments.

        For instances there are more, see `Instances.result`.
        """
        figures = self.instances.result()  # beyond the paper
        if figures is None:
            figures = self.quality.result()["All"]
            del figures["n"]
        return percent(figures)


def percent(figures):
    """Fractions by name -> percent, for tables and JSON; None stays None."""
    return {name: None if f is None else 100 * f for name, f in figures.items()}


def line(values, width=8):
    """A line of a table: numbers with one decimal, "-" for None, text as it is."""
    cells = []
    for value in values:
        if value is None:
            value = "-"
        elif isinstance(value, float):
            value = f"{value:.1f}"
        cells.append(str(value).rjust(max(width, len(str(value)) + 1)))
    return "".join(cells)


# --------------------------------------------------------------- files and command line
def score_files(gt, pred, gt_dir=None, pred_dir=None, class_agnostic=False):
    """`PanopticQuality.result` of two COCO panoptic JSON files, paired by image_id.

    gt_dir, pred_dir: folders of the PNGs, by default the JSON's path without .json.
    Raises BadInput.
    """
    content, truth = data.read_coco(gt, panoptic=True)
    _, found = data.read_coco(pred, panoptic=True)
    paired = len(truth.keys() & found.keys())
    if paired == 0:
        ids = f"{next(iter(truth), '-')} in {gt}, {next(iter(found), '-')} in {pred}"
        raise BadInput(f"no image of the prediction is in the truth: image_id is {ids}")
    if not paired == len(truth) == len(found):
        data.say_once(
            f"note: {len(truth)} images in the truth, {len(found)} in the prediction, "
            f"{paired} in both; what lacks a prediction counts as missed"
        )
    categories = None if class_agnostic else content["categories"]
    gt_folders = [Path(gt_dir or str(gt).removesuffix(".json"))]
    pred_folders = [Path(pred_dir or str(pred).removesuffix(".json"))]

    def sums_of(image_id):
        """What one image adds to the sums."""
        image = f"image {image_id}"
        quality = PanopticQuality(categories)
        ids, segments = data.read_panoptic(*truth[image_id], gt_folders, image)
        if image_id in found:
            prediction = data.read_panoptic(*found[image_id], pred_folders, image)
        else:
            prediction = np.zeros_like(ids), []  # every segment is missed
        quality.update(ids, segments, *prediction, image=image)
        return quality.sums

    quality = PanopticQuality(categories)
    with ThreadPool() as pool:  # decoding PNGs releases the GIL
        quality.sums += sum(pool.imap(sums_of, truth))
    return quality.result()


@dataclass
class PQSettings:
    """The settings of pq.py."""

    gt: str = flag(None, "COCO panoptic JSON of the truth", nonempty)
    pred: str = flag(None, "COCO panoptic JSON of the prediction", nonempty)
    gt_dir: str = flag(
        None, "its PNGs (default: the JSON's path without .json)", nonempty
    )
    pred_dir: str = flag(
        None, "its PNGs (default: the JSON's path without .json)", nonempty
    )
    class_agnostic: bool = flag(False, "treat all categories as one", bool)
    json: str = flag(None, "also write the figures to this file", nonempty)


@data.command
def main(argv=None):
    """Command line: score two COCO panoptic files, print the table."""
    args = PQSettings(**data.parse(PQSettings, __doc__, argv))
    if not args.gt or not args.pred:
        raise BadInput("both --gt and --pred are needed")
    result = score_files(
        args.gt,
        args.pred,
        gt_dir=args.gt_dir,
        pred_dir=args.pred_dir,
        class_agnostic=args.class_agnostic,
    )
    print(line(["", "PQ", "SQ", "RQ", "n"]))
    for name in ["All"] if args.class_agnostic else ["All", "Things", "Stuff"]:
        group = result[name]
        figures = percent({"pq": group["pq"], "sq": group["sq"], "rq": group["rq"]})
        print(line([name, *figures.values(), group["n"]]))
    if args.json:
        data.write(args.json, result)


# --------------------------------------------------------------------- beyond the paper
class Instances:
    """Figures of instances alone, where all that is no instance is one background
    segment.

    They are matched together with the background, and counted without it. The predicted
    segment that covers most of the background, and mostly background, is the predicted
    one. Beside PQ this gives AP50 = TP / (TP + FP + FN) at IoU 0.5, as the nuclei data
    uses it, and two kinds of errors as shares of the true instances. A merged one lies
    mostly inside a predicted segment that also holds most of another one (of two, one
    can match that segment all the same); a missed one lies mostly in the background or
    in void.
    """

    def __init__(self):
        self.quality = PanopticQuality(
            [{"id": 1, "isthing": 1}, {"id": 2, "isthing": 0}]
        )
        self.errors = np.zeros(3)  # true instances: all, merged, missed

    def update(self, sample, found):
        """Add an id map (H x W, 0 = void) for a sample with a background_id."""
        background = set()
        truth = []
        for s in sample["segments_info"]:
            is_background = s["category_id"] == sample["background_id"]
            truth.append({**s, "category_id": 2 if is_background else 1})
            if is_background:
                background.add(s["id"])

        shared = overlaps(sample["ids"], found)
        true_area, found_area, covered = Counter(), Counter(), Counter()
        for true, own, pixels in shared:
            true_area[true] += pixels
            found_area[own] += pixels
            if true in background and own != VOID:
                covered[own] += pixels
        cover = max(covered, key=covered.get, default=None)
        if cover is not None and 2 * covered[cover] <= found_area[cover]:
            cover = None  # most of it is not background

        prediction = data.describe(found)
        for s in prediction:
            s["category_id"] = 2 if s["id"] == cover else 1
        name = sample["file_name"]
        self.quality.update(sample["ids"], truth, found, prediction, image=name)

        instances = {s["id"] for s in truth if s["category_id"] == 1}
        instances -= {s["id"] for s in truth if s.get("iscrowd")}
        holds = Counter()  # segment: how many instances have most of their pixels in it
        for true, own, pixels in shared:
            if true in instances and 2 * pixels > true_area[true]:
                holds[own] += 1
        missed = holds.pop(VOID, 0) + holds.pop(cover, 0)
        merged = sum(count for count in holds.values() if count > 1)
        self.errors += (len(instances), merged, missed)

    def result(self):
        """Fractions {"pq", "sq", "rq", "ap50", "merged", "missed"}, or None.

        None stands for a figure that is not defined, or for all if no sample was added.
        """
        result = self.quality.result()
        if result["All"]["n"] == 0:
            return None
        figures = result["Things"]
        del figures["n"]
        rq = figures["rq"]
        figures["ap50"] = None if rq is None else rq / (2 - rq)
        count, *errors = data.sum_over_processes(self.errors).tolist()
        for name, error in zip(["merged", "missed"], errors):
            figures[name] = error / count if count > 0 else None
        return figures


if __name__ == "__main__":
    main()

"""inpaint.py: complete a partial segmentation, keeping its ids (3.3, Algorithm 3).

    python inpaint.py --drop 0.5 --block 8       # drop half of the 8 x 8 blocks
    python inpaint.py --click 4                  # one click on each object instead
    python inpaint.py --drop 0.1 0.3 0.5 0.7 0.9 --block 16 32 64 128   # 4.2, Fig. 9
    python inpaint.py --image photo.jpg --mask part.png  # yours: an id PNG, 0 = unknown

Symbols: y the partial id map (0 = unknown), known = scale * E(y), M the mask of latent
cells that count as given, because at least half of their pixels are (B x 1 x h x w);
the others as in diffusion.py. The side of a block is in pixels of the network's input,
which is 512 pixels wide for the paper's model.

In Algorithm 3 ids are kept because they are what the latent encodes, not positions in a
list of outputs: the latents of given cells are held, and given pixels are pasted. A
segmenter that matches its outputs to objects cannot do that. But which segment gets
which id is decided at high noise, where held cells say almost nothing. Beyond the paper
(`told_maps`), the given part is an input of the network, too, with ids that suit the
noise; afterwards each segment gets back the given id that it covers most.
"""

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

import data  # before torch: sets a variable that PyTorch reads on import
import numpy as np
import torch
import torch.nn.functional as F

import ae
import diffusion
import pq
import sample
from data import BadInput, flag, fraction, nonempty, positive


# ----------------------------------------------------------------------------- settings
@dataclass
class Settings(sample.SamplingSettings):
    """The settings of inpaint.py."""

    drop: tuple = flag(
        (0.5,), "share of blocks to drop; several for a table", fraction, nargs="+"
    )
    block: tuple = flag(
        (8,), "side of a block, px; several for a table", positive, nargs="+"
    )
    click: int = flag(
        None, "instead of blocks, give a click of this radius on each thing", positive
    )
    image: str = flag(None, "a picture of yours, with --mask", nonempty)
    mask: str = flag(
        None, "its partial mask: id PNG of the same size, 0 = unknown", nonempty
    )
    paper: bool = flag(
        False, "with --mask: Algorithm 3 alone, whatever the checkpoint can do", bool
    )
    steps: int = flag(None, "sampling steps (default: as the checkpoint)", positive)


# -------------------------------------------------------------------------- Algorithm 3
@torch.no_grad()
def inpaint(model, condition, known, M, noise, steps):
    """Algorithm 3: sample while given cells are held at their known latent, noised.

    condition: as in `LDM.sample`; known: B x 4 x h x w; M: B x 1 x h x w, 1 = given;
    noise: (the first z, eps0), B x 4 x h x w each.
    """
    z, eps0 = noise
    self_cond = torch.zeros_like(known)
    for j, j_prev in model.ddim.timesteps(steps):
        known_j = model.ddim.add_noise(known, eps0, j)
        z = M * known_j + (1 - M) * z  # hold given cells, noised to j
        output = model.denoise(z, condition, self_cond, j)
        z0 = model.ddim.remove_noise(z, output, j)
        z0 = M * known + (1 - M) * z0
        self_cond = z0
        z = model.ddim.step(z, z0, j, j_prev)  # eq. 5
    return z0


def random_names(model, sample_, seed):
    """A sample's partial map in random ids 1..N-1, as in training.

    Returns the map and {given id: random id}. The largest segments are kept if there
    are more than N-1.
    """
    given = sample_["given"]
    rng = data.stream_of(sample_, seed, data.IDS)
    num_ids = model.autoencoder.num_ids
    if model.settings["postprocess"] == "instances":  # beyond the paper
        return instance_names(given, num_ids, rng)
    return data.relabel(given, data.describe(given), num_ids=num_ids, rng=rng)


def given_cells(model, given, share=0.5):
    """M of partial maps (B x S x S): 1 in cells given to this share, B x 1 x h x w."""
    of_cells = F.avg_pool2d((given > 0).float()[:, None], model.autoencoder.factor)
    return (of_cells >= share).float()


def complete_maps(model, samples, steps, seed):
    """Algorithm 3 on samples with a partial map `given` (H x W, any ids, 0 = unknown).

    Returns (ids, probability) for each. Given segments keep their ids; all others get
    ids that were not given.
    """
    size = model.settings["size"]
    partial, names = [], []
    for s in samples:
        y, name_of = random_names(model, s, seed)
        partial.append(data.resize_ids(y, size, size))
        names.append(name_of)
    given = torch.from_numpy(np.stack(partial)).to(model.unet.device)  # B x S x S
    known = model.encode(given)  # B x 4 x h x w
    condition = model.condition(diffusion.batch_of(model, samples))
    noise = diffusion.noise_of(model, samples, seed)
    z0 = inpaint(model, condition, known, given_cells(model, given), noise, steps)
    completed = []
    for s, name_of, logits in zip(samples, names, model.decode(z0)):
        ids, probability = diffusion.to_ids(model, logits, *s["given"].shape)
        completed.append((restore_names(ids, name_of, s["given"]), probability))
    return completed


def restore_names(ids, name_of, given):
    """Undo `random_names`: given segments get back their ids, others get unused ones.

    name_of: {given id: random id}; given: the partial map, whose pixels are pasted.
    """
    unused = (n for n in itertools.count(1) if n not in name_of)
    id_of = {name: i for i, name in name_of.items()}
    table = np.zeros(int(ids.max()) + 1, np.int32)
    for name in data.areas(ids):
        table[name] = id_of[name] if name in id_of else next(unused)
    return np.where(given > 0, given, table[ids])


# --------------------------------------------------------------- dropped blocks, clicks
def drop_part(sample_, settings, drop, block, seed):
    """Drop blocks of a sample's ids (H x W) with probability `drop`: 0 there (4.2)."""
    ids = without_crowds(sample_)
    rng = data.stream_of(sample_, seed, data.BLOCKS)
    # blocks are squares at the network's resolution: that of a tile of --crop pixels
    size, crop = settings["size"], settings["crop"]
    height, width = [round(n * size / (crop or n)) for n in ids.shape]
    kept = data.drop_blocks(max(height, width), drop, block=block, rng=rng)
    kept = data.resize_ids(kept[:height, :width].astype(np.uint8), *ids.shape)
    return np.where(kept > 0, ids, 0)


def click_part(sample_, radius, stuff):
    """One disc of this radius in each segment whose category is not in `stuff`."""
    ids = without_crowds(sample_)
    given = np.zeros_like(ids)
    for s in sample_["segments_info"]:
        pixels = np.argwhere(ids == s["id"])  # P x 2
        if s["category_id"] in stuff or len(pixels) == 0:
            continue
        # the pixel nearest to the centroid, which may lie outside of the segment
        from_centre = np.linalg.norm(pixels - pixels.mean(0), axis=1)
        middle = pixels[from_centre.argmin()]
        from_middle = np.linalg.norm(pixels - middle, axis=1)
        given[tuple(pixels[from_middle <= radius].T)] = s["id"]
    return given


def without_crowds(sample_):
    """A sample's ids with crowds set to void."""
    crowds = [s["id"] for s in sample_["segments_info"] if s["iscrowd"]]
    return np.where(np.isin(sample_["ids"], crowds), 0, sample_["ids"])


# --------------------------------------------------------------------------- evaluation
class IdAccuracy:
    """How many of the missing pixels of partly given segments get the right id."""

    def __init__(self):
        self.right = 0
        self.pixels = 0

    def update(self, ids, given, truth):
        """Add a completed map, what was given of it, and the truth (H x W each)."""
        asked = (given == 0) & np.isin(truth, given[given > 0])
        self.right += int((ids == truth)[asked].sum())
        self.pixels += int(asked.sum())

    def result(self):
        """The share in percent; None if no pixel is missing."""
        return 100 * self.right / self.pixels if self.pixels else None


DRAWN = ("Algorithm 3", "given part told")  # of the methods that are compared


def methods_of(model, args):
    """{name: function that completes a list of samples}, the methods to compare."""
    methods = {"Algorithm 3": complete_maps}
    if model.settings["told"]:  # beyond the paper
        methods["given part told"] = told_maps
    methods["sampled and renamed"] = renamed_maps
    methods["input as it is"] = input_maps
    return {
        name: functools.partial(
            complete, model, method=method, steps=args.steps, seed=args.seed
        )
        for name, method in methods.items()
    }


@torch.no_grad()
def complete(model, samples, method, steps, seed):
    """Complete samples with a part `given`: maps (H x W, int32) with that part kept.

    method: `complete_maps`, `told_maps`, `renamed_maps` or `input_maps`.
    """
    draw = functools.partial(method, steps=steps, seed=seed)
    with data.sampling_autocast(model.unet.device):
        if model.settings["crop"] and method is not input_maps:  # beyond the paper
            found = complete_in_tiles(model, samples, draw)
        else:
            found = draw(model, samples)
    completed = []
    for s, (ids, probability) in zip(samples, found):
        ids = ae.void_uncertain(ids, probability, model.settings["min_area"])
        completed.append(np.where(s["given"] > 0, s["given"], ids).astype(np.int32))
    return completed


def evaluate(model, held_out, part_of, args):
    """Complete a held-out set by each method; part_of: a sample -> its given part.

    Returns {method: {pq, sq, rq, id_accuracy}}, in percent, and rows of pictures.
    """
    methods = methods_of(model, args)
    scores = {name: pq.Score() for name in methods}
    accuracies = {name: IdAccuracy() for name in methods}
    rows = []
    for samples in held_out.batches(args.batch_size):
        samples = [{**s, "given": part_of(s)} for s in samples]
        completed = {name: method(samples) for name, method in methods.items()}
        for name, maps in completed.items():
            for s, ids in zip(samples, maps):
                scores[name].update(s, ids)
                accuracies[name].update(ids, s["given"], s["ids"])
        for k, s in enumerate(samples[: data.PICTURES - len(rows)]):
            maps = [completed[name][k] for name in DRAWN if name in completed]
            rows.append(data.completion(s, s["given"], maps))
    figures = {}
    for name in methods:
        accuracy = accuracies[name].result()
        figures[name] = {**scores[name].result(), "id_accuracy": accuracy}
    return figures, rows


def run_experiments(model, held_out, args):
    """Evaluate every drop rate and block size, or clicks: a table, and a picture."""
    settings = model.settings
    if args.click:
        stuff = [c["id"] for c in held_out.source.categories if not c["isthing"]]
        parts = {
            f"click {args.click}": functools.partial(
                click_part, radius=args.click, stuff=stuff
            )
        }
    else:
        parts = {}
        for drop, block in itertools.product(args.drop, args.block):
            parts[f"drop {drop} block {block}"] = functools.partial(
                drop_part, settings=settings, drop=drop, block=block, seed=args.seed
            )
    print(f"{len(held_out)} pictures, {args.steps} steps; given: {', '.join(parts)}")
    results = {}
    for title, part_of in parts.items():
        figures, rows = evaluate(model, held_out, part_of, args)
        print(pq.line([title.ljust(20), *next(iter(figures.values()))], 8))
        for name, row in figures.items():
            print(pq.line([name.ljust(20), *row.values()], 8), flush=True)
        results[title] = figures
    captions = ["image", "given", "Algorithm 3 (hatched: added)"]
    if model.settings["told"]:
        captions.append("given part told")
    data.sheet(f"{args.out}/inpaint.png", rows, [*captions, "truth"])
    print(f"-> {args.out}/inpaint.png")
    return results


# ------------------------------------------------------------------------ your own mask
def complete_file(model, args):
    """--image and --mask: complete a user's own partial mask. Raises BadInput."""
    image = data.read_image(args.image)
    given = data.read_id_png(args.mask)
    if given.shape != image.shape[:2]:
        raise BadInput(
            f"--mask {args.mask}: is {given.shape} pixels, the image {image.shape[:2]}"
        )
    data.check_mask(args.mask, given)
    method = complete_maps
    if model.settings["told"] and not args.paper:  # beyond the paper
        method = told_maps
    stem = Path(args.out, Path(args.image).stem)
    samples = [{"image": image, "given": given, "image_id": stem.name}]
    [ids] = complete(model, samples, method=method, steps=args.steps, seed=args.seed)
    data.write_id_png(f"{stem}_completed.png", ids)
    shown = {"image": image, "file_name": args.image}
    shown["background"] = diffusion.background_of(model)
    row = data.completion(shown, given, [ids])
    data.sheet(
        f"{stem}_inpaint.png", [row], ["image", "given", "completed (hatched: added)"]
    )
    _, segments = diffusion.label(model, image, ids, merge=False)
    kept = len(data.areas(given))
    added = len(segments) - kept
    print(f"{kept} ids kept, {added} added -> {stem}_completed.png, {stem}_inpaint.png")
    return {"given": kept, "added": added, "segments_info": segments}


@data.command
def main(argv=None):
    """Command line: complete a held-out set given in part, or a mask of the user's."""
    args = Settings(**data.parse(Settings, __doc__, argv))
    if bool(args.image) != bool(args.mask):
        raise BadInput("--image and --mask belong together: give both")
    if data.WORLD > 1:
        raise BadInput("inpaint.py runs in one process: start it without torchrun")
    if args.paper and not args.image:
        raise BadInput("--paper is for a mask of your own; the table shows both ways")
    device, _ = data.setup(args)
    model = sample.load(args.ckpt, device)
    args.steps = args.steps or model.settings["steps"]
    if args.image:
        figures = complete_file(model, args)
    else:
        held_out = sample.open_held_out(model, args)
        figures = run_experiments(model, held_out, args)
    data.write(f"{args.out}/inpaint.json", figures)


# ===================================================================== beyond the paper
def told_maps(model, samples, steps, seed):
    """Algorithm 3 with the given part told to the network (see `diffusion.ToldLDM`).

    The given ids first get the names that the noise would choose, and afterwards
    segments the given id that they cover most. Takes and returns what `complete_maps`
    does, but leaves tiles as the network names them.
    """
    size = model.settings["size"]
    partial = []
    for s in samples:
        y, _ = random_names(model, s, seed)
        partial.append(data.resize_ids(y, size, size))
    given = torch.from_numpy(np.stack(partial)).to(model.unet.device)  # B x S x S
    noise, _ = diffusion.noise_of(model, samples, seed)
    batch = diffusion.batch_of(model, samples)
    nothing_told = model.condition(batch)
    given = diffusion.name_by_noise(
        model,
        given,
        nothing_told,
        noise=noise,
        passes=steps,
        fixed=diffusion.background_of(model),
    )
    told = model.condition({**batch, "given": given})
    # Only whole cells are held: the latent of one with a hole is not that of the map.
    # As in training, the noise that chooses the names is also that of the map.
    z0 = inpaint(
        model,
        told,
        known=model.encode(given),
        M=given_cells(model, given, share=1),
        noise=(noise, noise),
        steps=steps,
    )
    found = []
    for s, logits in zip(samples, model.decode(z0)):
        found.append(diffusion.to_ids(model, logits, *s["given"].shape))
    return named_by_cover(model, samples, found)


def renamed_maps(model, samples, steps, seed):
    """Algorithm 2, which knows nothing of the given part; then segments get given
    ids.
    """
    found = diffusion.sample_maps(model, samples, steps, seed)
    return named_by_cover(model, samples, found)


def input_maps(model, samples, steps, seed):
    """The given parts as they are."""
    return [(s["given"], np.ones(s["given"].shape, np.float32)) for s in samples]


def instance_names(given, num_ids, rng):
    """As `random_names`, for a model of instances: the background keeps its id."""
    background = data.BACKGROUND_SEGMENT  # 1, so that objects have 2..N-1
    objects = np.where(given == background, 0, given)
    y, name_of = data.relabel(
        objects, data.describe(objects), num_ids=num_ids - 1, rng=rng
    )
    y = np.where(y > 0, y + 1, 0).astype(np.uint8)
    y[given == background] = background
    name_of = {i: name + 1 for i, name in name_of.items()}
    return y, {**name_of, background: background}


def name_by_cover(ids, given, background=None):
    """Rename segments (H x W): each gets the given id (0 = unknown) that it covers
    most.

    A segment that covers nothing given gets an unused id. Less than a twentieth of what
    is given of an id is a click that touches its surroundings, and does not count.
    background: an id that only the background has, in both maps.
    """
    given_area = data.areas(given)
    best = {}  # segment -> the given id that it covers most, and how many pixels
    for segment, i, pixels in pq.overlaps(ids, given):
        if segment == 0 or i == 0 or pixels < 0.05 * given_area[i]:
            continue
        if background in (segment, i):
            continue
        if pixels > best.get(segment, (0, 0))[1]:
            best[segment] = i, pixels
    unused = (n for n in itertools.count(1) if n not in given_area and n != background)
    table = np.zeros(int(ids.max()) + 1, np.int32)
    for segment in data.areas(ids):
        if segment == background:
            table[segment] = background
        else:
            table[segment] = best[segment][0] if segment in best else next(unused)
    return table[ids]


def named_by_cover(model, samples, found):
    """(ids, probability) of samples, named by what they cover of `given`.

    Tiles keep the network's ids: the picture that they are joined to is named.
    """
    background = diffusion.background_of(model)
    named = []
    for s, (ids, probability) in zip(samples, found):
        if "place" not in s:
            ids = name_by_cover(ids, s["given"], background=background)
        named.append((ids, probability))
    return named


def complete_in_tiles(model, samples, draw):
    """`draw` on tiles of pictures, joined and named by what is covered of `given`."""
    found = sample.sample_in_tiles(model, samples, draw, batch_size=16)
    return named_by_cover(model, samples, found)


if __name__ == "__main__":
    main()

"""inpaint.py: complete a partial segmentation, with the ids that it has (paper section 3.3, Algorithm 3; Fig. 6, Fig. 9 right).

    python inpaint.py --drop 0.5 --block 8                # drop half of the 8 x 8 blocks of held-out masks, complete them
    python inpaint.py --sweep                             # PQ over drop rate x block size: table and plot
    python inpaint.py --sweep --ae ae.pt --valid 0.05     # with an encoder that ae.py --drop_input taught to read partial maps
    python inpaint.py --image photo.jpg --mask part.png   # complete your own mask (id PNG, 0 = unknown)

Symbols: y the partial id map (0 = unknown), M which latent cells count as given (B x 1 x h x w), z_known = scale * E(y);
the rest as in diffusion.py. A block is `block` pixels of the network's input wide (512 for the paper's model).

Algorithm 3 as printed is `--no-renoise`. There the unknown cells keep their first noise, which speaks for ids of its own
against those given; by default each step draws it anew, which agrees with the given ids far more often (README, Results).
"""
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import ae
import data
import diffusion
import pq
import sample
from data import BadInput


@torch.no_grad()
def inpaint(model, image_latent, z_known, M, noise, eps0, steps, fresh=None):
    """Algorithm 3: sample the latent while the given cells are held at their (noised) known value.

    image_latent: B x c x h x w; z_known, noise, eps0: B x 4 x h x w; M: B x 1 x h x w, 1 where given;
    fresh: None is Algorithm 3; a function of j that gives new noise (`diffusion.fresh_noise`) makes the steps stochastic."""
    z, self_cond = noise, torch.zeros_like(noise)
    timesteps = model.ddim.timesteps(steps)
    for j, j_prev in zip(timesteps, timesteps[1:] + [-1]):
        z = M * model.ddim.add_noise(z_known, eps0, j) + (1 - M) * z       # given cells: known latent, noised to j
        output = model.denoise(z, image_latent, self_cond, j)
        z0 = model.ddim.remove_noise(z, output, j)
        z0 = M * z_known + (1 - M) * z0
        self_cond = z0 if model.settings["self_cond"] else self_cond
        z = model.ddim.step(z, z0, j, j_prev, fresh and fresh(j))          # eq. 5
    return z0


@torch.no_grad()
def complete(model, images, partial, keys, steps=50, seed=0, valid=0.5, threshold=0.5, renoise=True):
    """Complete partial id maps: lists of images (H x W x 3, uint8) and maps (H x W, 0..N-1, 0 = unknown) -> list of H x W int32.

    valid: share of given pixels from which a latent cell counts as given. A given pixel keeps its id.
    renoise: draw the noise of unknown cells anew at each step; False is Algorithm 3 as printed."""
    device, size, f = next(model.parameters()).device, model.settings["size"], model.autoencoder.factor
    inputs = torch.stack([data.to_tensor(data.resize_image(image, size)) for image in images]).to(device)
    y = torch.from_numpy(np.stack([data.resize_ids(p, size, size) for p in partial]).astype(np.uint8)).to(device)
    z_known, image_latent = model.encode(y), model.encode_image(inputs)
    M = (F.avg_pool2d((y > 0).float()[:, None], f) >= max(valid, 1e-6)).float()                # B x 1 x h x w
    noise = diffusion.image_noise(seed, keys, (4, *z_known.shape[2:]), device)
    eps0 = diffusion.image_noise(seed, [f"{k} known" for k in keys], (4, *z_known.shape[2:]), device)
    fresh = diffusion.fresh_noise(seed, keys, (4, *z_known.shape[2:]), device) if renoise else None
    logits = model.decode(inpaint(model, image_latent, z_known, M, noise, eps0, steps, fresh))
    found = [ae.postprocess(l, *p.shape, threshold, model.settings["min_area"]) for l, p in zip(logits, partial)]
    return [np.where(p > 0, p, ids).astype(np.int32) for p, ids in zip(partial, found)]


def drop_blocks(size, drop, block, rng):
    """Which pixels stay given (size x size, bool): each cell of a block x block grid is dropped with probability `drop`."""
    cells = rng.random((-(-size // block),) * 2) >= drop
    return cells.repeat(block, 0).repeat(block, 1)[:size, :size]


def evaluate(model, dataset, drop, block, args, baselines=True):
    """Drop and complete a held-out set: PQ, SQ, RQ in percent by name (inpainting, and as baselines the input as it is
    and sampling without a mask), picture rows, seconds that inpainting took for an image."""
    names = ["inpainting", "input", "sampling"] if baselines else ["inpainting"]
    quality, rows = {n: pq.PanopticQuality() for n in names}, []
    size, num_ids, seconds = model.settings["size"], model.autoencoder.num_ids, 0.0
    for samples in data.evaluation_batches(dataset, args.batch_size, num_workers=args.num_workers):
        keys, images, truths, partial = [s["image_id"] for s in samples], [s["image"] for s in samples], [], []
        for s in samples:
            rng = np.random.default_rng((args.seed, 4, *str(s["image_id"]).encode()))
            truths.append(data.relabel(s["ids"], s["segments_info"], num_ids, rng))
            given = data.resize_ids(drop_blocks(size, drop, block, rng), *truths[-1].shape)
            partial.append(np.where(given, truths[-1], 0))
        began = time.time()
        found = {"inpainting": complete(model, images, partial, keys, args.steps, args.seed, args.valid, args.threshold, args.renoise), "input": partial}
        seconds += time.time() - began
        if baselines:
            found["sampling"] = sample.segment_batch(model, images, keys, args.steps, args.seed, args.threshold, args.renoise)
        for k, (s, truth) in enumerate(zip(samples, truths)):
            for name in names:
                quality[name].update(truth, ae.describe(truth), found[name][k], ae.describe(found[name][k]), str(s["file_name"]))
            if len(rows) < 6:
                rows.append([s["image"], data.colorize(partial[k]), data.colorize(found["inpainting"][k]), data.colorize(truth)])
    percent = {name: {k: 100 * q.result()["All"][k] for k in ("pq", "sq", "rq")} for name, q in quality.items()}
    return percent, rows, seconds / len(dataset)


def complete_file(model, args, out):
    """--image and --mask: complete a user's own partial mask, keeping its ids. Raises BadInput."""
    image, given = data.read_image(args.image, upright=True), data.read_id_png(args.mask)
    if given.shape != image.shape[:2]:
        raise BadInput(f"--mask {args.mask}: is {given.shape[1]} x {given.shape[0]} pixels, the image {image.shape[1]} x {image.shape[0]}; "
                       "they must be of one size")
    known, num_ids = [int(i) for i in np.unique(given) if i], model.autoencoder.num_ids
    if len(known) > num_ids - 1:
        raise BadInput(f"--mask {args.mask}: holds {len(known)} ids, this model knows {num_ids - 1}")
    # the model's ids are 1..N-1: translate there and back; segments that the model adds get ids above the given ones
    own = {k: n + 1 for n, k in enumerate(known)}
    partial = np.zeros(given.shape, np.int32)
    for k, n in own.items():
        partial[given == k] = n
    began = time.time()
    ids = complete(model, [image], [partial], [Path(args.image).stem], args.steps, args.seed, args.valid, args.threshold, args.renoise)[0]
    seconds = time.time() - began
    back = np.zeros(num_ids, np.int32)
    back[1:] = np.arange(num_ids - 1) + max(known, default=0) + 1
    for k, n in own.items():
        back[n] = k
    ids = back[ids]
    stem, out_ids = Path(args.image).stem, out / f"{Path(args.image).stem}_completed.png"
    data.write_id_png(out_ids, ids)
    segments_info = sample.label_batch(model, [image], [ids], merge=False)[0][1]
    data.write_json(out / f"{stem}_completed.json", {"file_name": out_ids.name, "segments_info": segments_info})
    row = [image, data.colorize(given), data.colorize(ids), data.overlay(image, ids)]
    data.picture(out / f"{stem}_inpaint.png", [row], ["image", "given", "completion", "overlay"], cell=256)
    added = len(set(np.unique(ids).tolist()) - {0, *known})
    if args.json:
        data.write_json(args.json, {"images": 1, "given": len(known), "added": added, "seconds_per_image": seconds})
    print(f"{len(known)} given ids kept, {added} added -> {out_ids}, {out / f'{stem}_inpaint.png'}")


@data.command
def main(argv=None):
    """Command line: complete dropped masks of a held-out set, sweep over them, or complete a user's mask."""
    parser = data.Parser(__doc__, out="out")
    sample.sampling_flags(parser, renoise=True)
    add = parser.add_argument
    add("--steps", type=data.positive, default=50, help="sampling steps (default %(default)s)")
    add("--drop", type=data.fraction, default=0.5, help="share of blocks that is dropped (default %(default)s)")
    add("--block", type=data.positive, default=8, help="side of a block in pixels of the network's input (default %(default)s)")
    add("--valid", type=data.fraction, default=0.5, help="share of given pixels from which a latent cell counts as given (default %(default)s)")
    add("--ae", help="read the given part with this autoencoder instead: one that ae.py --drop_input made from the model's own")
    add("--sweep", action="store_true", help="drop rates 0.1..0.9 x block sizes of 1/32..1/4 of the side")
    add("--image", help="a picture of yours, with --mask")
    add("--mask", help="its partial mask: id PNG of the same size, 0 = unknown")
    args = parser.parse_args(argv)
    diffusion.DDIM().timesteps(args.steps)
    if bool(args.image) != bool(args.mask):
        raise BadInput("--image and --mask belong together: give both")
    device, *_ = ae.setup(args)
    model, out = sample.open_model(args, device), Path(args.out)
    if args.ae:
        reader = ae.load_autoencoder(args.ae).to(device)
        own = model.autoencoder.decoder.state_dict()
        if reader.settings != model.autoencoder.settings or not all(torch.equal(v, own[k]) for k, v in reader.decoder.state_dict().items()):
            raise BadInput(f"--ae {args.ae}: its decoder is not this model's; make it with ae.py --ckpt MODEL --drop_input")
        model.autoencoder = reader
    with ae.autocast(ae.pick_precision(args.precision, device), device):
        if args.image:
            return complete_file(model, args, out)
        dataset, size = sample.open_split(model, args), model.settings["size"]
        if args.block > size:
            raise BadInput(f"--block {args.block}: larger than the network's input of {size} px")
        if not args.sweep:
            results, rows, seconds = evaluate(model, dataset, args.drop, args.block, args)
            print(f"{len(dataset)} images, drop {args.drop}, block {args.block}, {args.steps} steps, seed {args.seed}")
            print(f"{'':12}{'PQ':>7}{'SQ':>7}{'RQ':>7}")
            for name, r in results.items():
                print(f"{name:12}{r['pq']:7.1f}{r['sq']:7.1f}{r['rq']:7.1f}")
            data.picture(out / "inpaint.png", rows, ["image", "given", "completion", "truth"])
            print(f"-> {out / 'inpaint.png'}")
            figures = {**results["inpainting"], "pq_input": results["input"]["pq"], "pq_sampling": results["sampling"]["pq"],
                       "drop": args.drop, "block": args.block}
        else:
            drops, blocks = (0.1, 0.3, 0.5, 0.7, 0.9), sorted({max(1, size // d) for d in (32, 16, 8, 4)})
            lines = ["| drop \\ block |" + "".join(f" {b} |" for b in blocks), "|---|" + "---|" * len(blocks)]
            print(f"PQ of {len(dataset)} images, {args.steps} steps, seed {args.seed}\n" + "\n".join(lines))
            cells = {}
            for drop in drops:
                cells[drop] = [evaluate(model, dataset, drop, block, args, baselines=False) for block in blocks]
                lines.append(f"| {drop} |" + "".join(f" {r['inpainting']['pq']:.1f} |" for r, _, _ in cells[drop]))
                print(lines[-1], flush=True)
            (out / "inpaint_sweep.md").write_text("\n".join(lines) + "\n")
            curves = {f"block {b}": (drops, [cells[d][k][0]["inpainting"]["pq"] for d in drops]) for k, b in enumerate(blocks)}
            data.plot(out / "inpaint_sweep.png", curves, "drop rate", "PQ")
            examples = [[part for _, rows, _ in row for part in rows[0][1:3]] for row in cells.values()]     # of the first image
            data.picture(out / "inpaint_examples.png", examples, [t for b in blocks for t in (f"block {b}: given", "completion")],
                         notes=[f"drop {d}" for d in drops], cell=96)
            print(f"-> {out / 'inpaint_sweep.md'}, {out / 'inpaint_sweep.png'}, {out / 'inpaint_examples.png'}")
            every = [cell for row in cells.values() for cell in row]
            seconds = float(np.mean([s for _, _, s in every]))             # pq, sq, rq: the mean over the grid
            figures = {**{k: float(np.mean([r["inpainting"][k] for r, _, _ in every])) for k in ("pq", "sq", "rq")}, "blocks": blocks,
                       "pq_by_drop": {str(d): [r["inpainting"]["pq"] for r, _, _ in row] for d, row in cells.items()}}
    if args.json:
        data.write_json(args.json, {**figures, "images": len(dataset), "seconds_per_image": seconds})


if __name__ == "__main__":
    main()

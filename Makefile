# make demo: see it work   make test: run the tests   make train: the shipped weights   make format: black
PYTHON ?= python3
BIN = .venv/bin/python

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.12 ...") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv .venv
	$(BIN) -m pip install --quiet --upgrade pip
	$(BIN) -m pip install --quiet -r requirements.txt pytest
	touch $@

# Train both stages for a taste, then sample and complete with the shipped weights.
demo: .venv/ready
	@echo "== stage 1, a taste: the autoencoder learns to compress id maps"
	$(BIN) ae.py --model small --data shapes --iters 120 --eval_images 64 --out out/taste
	@echo "== stage 2, a taste: a UNet begins to learn to denoise them given the image (PQ stays near 0 so early)"
	$(BIN) diffusion.py --iters 60 --eval_images 32 --out out/taste
	@echo "== the shipped weights: scenes that they never saw, in one, two, four and ten passes"
	$(BIN) sample.py --ckpt assets/shapes.pt --limit 64 --steps 1 2 4 10 --json out/sample.json
	@echo "== completion: a tenth of the 8 x 8 blocks is given; then one click on each object"
	$(BIN) inpaint.py --ckpt assets/shapes.pt --limit 64 --drop 0.9 --block 8 --out out/blocks
	$(BIN) inpaint.py --ckpt assets/shapes.pt --limit 64 --click 4 --out out/clicks
	@echo "== pictures: out/sample.png out/sample_steps.png out/blocks/inpaint.png out/clicks/inpaint.png out/taste/*.png"

# The weights of the built-in scenes: stage 1, stage 2 at half the size (three times as fast) and at full size, few passes, classes.
SHAPES = checkpoints/shapes
train: .venv/ready
	$(BIN) ae.py --model small --data shapes --out $(SHAPES)
	$(BIN) diffusion.py --size 32 --iters 2500 --out $(SHAPES)
	$(BIN) diffusion.py --ckpt $(SHAPES)/ldm.pt --size 64 --given 0.4 --iters 9000 --out $(SHAPES)
	$(BIN) diffusion.py --ckpt $(SHAPES)/ldm.pt --distill 4 --given 0.4 --lr 5e-4 --iters 500 --out $(SHAPES)
	$(BIN) diffusion.py --ckpt $(SHAPES)/ldm.pt --distill 1 --given 0.4 --lr 5e-4 --iters 5000 --out $(SHAPES)
	$(BIN) diffusion.py --ckpt $(SHAPES)/ldm.pt --classes --lr 2e-3 --iters 1200 --out $(SHAPES)
	$(BIN) -c 'import torch; c = torch.load("$(SHAPES)/ldm.pt"); c["weights"] = {k: v.half() if v.is_floating_point() else v for k, v in c["weights"].items()}; torch.save(c, "assets/shapes.pt")'

test: .venv/ready
	$(BIN) -m pytest -q test_all.py

format: .venv/ready
	$(BIN) -m pip install --quiet black
	$(BIN) -m black -q -l 100 *.py

.PHONY: demo test train format

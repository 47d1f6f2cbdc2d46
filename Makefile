# make demo: see it work (three to four minutes after the installation)   make test: run the tests   make train: the shipped weights
PYTHON ?= python3
BIN = .venv/bin/python

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.12 ...") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv .venv
	$(BIN) -m pip install --quiet --upgrade pip
	$(BIN) -m pip install --quiet -r requirements.txt pytest
	touch $@

# Train both stages for a taste, then sample and inpaint with the shipped weights.
demo: .venv/ready
	@echo "== stage 1, a taste: the autoencoder learns to compress id maps"
	$(BIN) ae.py --model small --data shapes --iters 120 --log_every 20 --eval_images 64 --out out/taste
	@echo "== stage 2, a taste: a UNet begins to learn to denoise them given the image (PQ stays near 0 so early)"
	$(BIN) diffusion.py --model small --data shapes --iters 60 --warmup 20 --log_every 10 --eval_images 32 --out out/taste
	@echo "== the shipped weights: sample scenes that they never saw"
	$(BIN) sample.py --ckpt assets/shapes.pt --limit 64 --steps 5 10 20 50 --out out --json out/sample.json
	@echo "== the shipped weights: complete masks of which half of the 8 x 8 blocks is dropped"
	$(BIN) inpaint.py --ckpt assets/shapes.pt --limit 64 --drop 0.5 --block 8 --out out --json out/inpaint.json
	@echo "== pictures: out/sample.png out/sample_steps.png out/inpaint.png out/taste/ae.png out/taste/ae_loss.png out/taste/ldm_loss.png"

# The shipped weights: stage 1, stage 2 at half the size (three times as fast) and then at full size, the classifier. Hours on a laptop.
train: .venv/ready
	$(BIN) ae.py --model small --data shapes --out checkpoints/shapes
	$(BIN) diffusion.py --model small --data shapes --size 32 --latent_scale 0.36 --schedule constant --iters 2500 --out checkpoints/shapes
	$(BIN) diffusion.py --ckpt checkpoints/shapes/ldm.pt --size 64 --warmup 100 --iters 3500 --out checkpoints/shapes
	$(BIN) diffusion.py --ckpt checkpoints/shapes/ldm.pt --lr 8e-4 --warmup 100 --iters 5500 --out checkpoints/shapes
	$(BIN) diffusion.py --ckpt checkpoints/shapes/ldm.pt --classes only --lr 2e-3 --warmup 100 --iters 1200 --out checkpoints/shapes/classes --export assets/shapes.pt

test: .venv/ready
	$(BIN) -m pytest -q test_all.py

# The same with twenty kills of every training instead of three.
test-long: .venv/ready
	LDMSEG_KILLS=20 $(BIN) -m pytest -q test_all.py

.PHONY: demo test test-long train

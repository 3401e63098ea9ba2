# make demo    train a label-aware MoCo and a linear classifier on scikit-learn's digits, and plot them (minutes on a CPU)
# make test    run the tests
# make check   lint and check the format
# make report  rewrite the tables and figures of README.md and docs/ from results/
#
# Each target first creates .venv and installs this project in it. PYTHON=... chooses the interpreter.

PYTHON ?= python3
BIN = .venv/bin
DIGITS = --dataset digits --seed 0
PRETRAIN = -a resnet20 --image-size 16 -b 128 --moco-k 1024 --mlp --moco-t 0.2 --lr 0.2 --cos --epochs 60 --warm-up 2

demo: .venv/installed
	@rm -rf demo
	$(BIN)/python main_moco_out.py $(DIGITS) $(PRETRAIN) --output-dir demo
	$(BIN)/python main_lincls.py $(DIGITS) --lr 0.1 --epochs 30 --schedule 18 24 \
	  --pretrained demo/checkpoint_last.pth.tar --output-dir demo
	@$(BIN)/python scripts/picture.py demo > /dev/null
	@echo
	@echo "The result above is the linear classifier's accuracy on 360 digits it has not seen, in percent, at its best epoch."
	@echo "logs         demo/log.csv  demo/linear.csv  demo/tensorboard/"
	@echo "checkpoints  demo/checkpoint_last.pth.tar  demo/model_best.pth.tar"
	@echo "picture      demo/picture.png"

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

report: .venv/installed
	$(BIN)/python scripts/report.py

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

.PHONY: demo test check report

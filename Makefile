# All targets share the virtual environment .venv, which is updated when pyproject.toml or the tested versions change.
# With several Pythons installed: make test PYTHON=python3.13. PYTHON of make kit is that of the target machine.

DEFAULT_PYTHON := $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || echo python3)
PYTHON ?= $(DEFAULT_PYTHON)
VENV_PYTHON = $(if $(filter kit,$(MAKECMDGOALS)),$(DEFAULT_PYTHON),$(PYTHON))
BIN := .venv/bin
MEDSEG := $(BIN)/medseg-trt
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint tests/constraints.txt
PARALLEL := -n auto --dist loadfile  # one process per core; the tests of one file share their fixtures
LOWEST := .venv-lowest/bin
TORCH := tested
DATA := demo/data/organs
EXTRAS := cpu,openvino,medical
PARTS := 48M
SAMPLES :=
GIVEN :=
OPTIONS :=
TRAIN = $(MEDSEG) train --recipe organs-demo --data $(DATA) --block demo/block.safetensors

.PHONY: help demo test test-kernels test-full test-lowest kernels-check gpu-check readme-tables pictures lint types audit kit clean

help:
	@echo 'make demo           download CT scans and a LLaMA block, train, build, infer, evaluate and measure'
	@echo 'make test           run the tests that need no GPU; of the CUDA kernels, a covering selection'
	@echo 'make test-kernels   run the tests of the CUDA kernels that make test leaves out'
	@echo 'make test-full      run all of these tests, also with full-size models'
	@echo 'make test-lowest    run tests of every dependency in its lowest version'
	@echo 'make kernels-check  run all tests of the CUDA kernels and list which check catches which mutant'
	@echo 'make gpu-check      run everything that needs an NVIDIA GPU, and write down what came of it'
	@echo 'make readme-tables  update the tables of the READMEs from benchmarks/results'
	@echo 'make pictures       update the SVG pictures of toolkit/README.md from the source'
	@echo 'make lint           check style and format'
	@echo 'make types          check types'
	@echo 'make audit          list the components of a wheel, and check the tested packages for vulnerabilities'
	@echo 'make kit            collect what a machine without a network installs: PYTHON=3.12 EXTRAS=cpu,openvino,medical'
	@echo '                    PARTS=48M SAMPLES=organs GIVEN=torch==2.11.0 OPTIONS=--with-tests (medseg-trt kit --help)'
	@echo 'make clean          remove .venv, the demo and all build outputs'

# Every line is also a command to type. With --resume, a second `make demo` continues an interrupted training run.
demo: .venv/run.stamp
	$(MEDSEG) samples get organs llama-block -o demo/data
	$(MEDSEG) block extract demo/data/llama-block/SmolLM2-135M-Instruct.Q4_1.gguf -o demo/block.safetensors
	$(TRAIN) -o demo/untrained --resume --set train.epochs=0
	$(TRAIN) -o demo/trained --resume
	$(MEDSEG) build --ckpt demo/trained/best.pt --data $(DATA) -o demo/model.medseg --precision fp32,int8
	$(MEDSEG) infer $(DATA)/images/ct_B.nii.gz --bundle demo/model.medseg -o demo/masks --overlay
	$(MEDSEG) evaluate --ckpt demo/untrained/best.pt --ckpt demo/trained/best.pt --bundle demo/model.medseg \
		--data $(DATA) --split val --split test
	$(MEDSEG) bench --bundle demo/model.medseg --ckpt demo/trained/best.pt --data $(DATA) -o demo/report
	@echo 'overlay: demo/masks/overlays/ct_B.png'

test: .venv/dev.stamp
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow and not kernels'

test-kernels: .venv/dev.stamp
	$(BIN)/python -m pytest $(PARALLEL) -m 'kernels and not slow' tests/kernels tests/gpu_free

test-full: .venv/dev.stamp
	$(BIN)/python -m pytest $(PARALLEL) -m ''

test-lowest: .venv-lowest/stamp
	$(LOWEST)/python -m pytest $(PARALLEL) -W ignore::DeprecationWarning $$($(LOWEST)/python tests/lowest_versions.py)

kernels-check: .venv/dev.stamp
	$(BIN)/python -m pytest $(PARALLEL) tests/kernels tests/gpu_free -m ''
	cd tests && ../$(BIN)/python -m gpu_free.mutants

gpu-check: .venv/dev.stamp
	$(BIN)/python benchmarks/gpu_check.py

readme-tables: .venv/run.stamp
	$(BIN)/python benchmarks/readme_tables.py

pictures: .venv/dev.stamp
	cd tests && ../$(BIN)/python -m pictures

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev.stamp
	$(BIN)/python tests/typing_layout.py
	$(BIN)/pyright

audit: .venv/dev.stamp .venv-audit/stamp
	rm -rf build/audit
	$(BIN)/python -m build --wheel --no-isolation --outdir build/audit
	.venv-audit/bin/python tests/audit.py

kit: .venv/run.stamp
	$(MEDSEG) kit --python '$(PYTHON)' --extras '$(EXTRAS)' --parts '$(PARTS)' --samples '$(SAMPLES)' --given '$(GIVEN)' $(OPTIONS)

clean:
	rm -rf .venv .venv-lowest .venv-audit build dist demo *.egg-info .pytest_cache .ruff_cache

.venv/run.stamp: pyproject.toml tests/constraints.txt
	@$(VENV_PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=...") if sys.version_info < (3, 11) else None'
	$(VENV_PYTHON) -m venv .venv
	$(INSTALL) 'pip>=25.1'
	$(INSTALL) --editable '.[cpu,openvino,medical,train,export,report]'
	@touch $@

.venv/dev.stamp: .venv/run.stamp
	$(INSTALL) --group dev --editable '.[kernels,jetpack6,tensorrt-rtx,sign,serve]'
	@touch $@

# Everything that pyproject.toml names in its lowest version, but PyTorch in the tested one: pip installs the wheel that it
# is set up for, and uv leaves it as it is. With TORCH=lowest, that of PyPI: gigabytes of CUDA.
.venv-lowest/stamp: pyproject.toml tests/constraints.txt tests/lowest_versions.py
	$(PYTHON) -m venv --clear .venv-lowest
	$(LOWEST)/python -m pip install --quiet --disable-pip-version-check --constraint tests/constraints.txt --no-deps \
		uv $(if $(filter tested,$(TORCH)),torch)
	$(LOWEST)/python tests/lowest_versions.py requirements $(TORCH) > .venv-lowest/requirements.txt
	$(LOWEST)/uv pip install --quiet --python $(LOWEST)/python --resolution lowest-direct \
		--requirements .venv-lowest/requirements.txt
	@touch $@

# Tools that read package lists and have dependencies of their own; they stay out of the tested environment.
.venv-audit/stamp: pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv --clear .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check --constraint tests/constraints.txt --group audit
	@touch $@

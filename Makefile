# make demo   install into .venv, then the whole story on small models: pictures -> LoRA -> page
# make test   install into .venv, then the tests
# make docs   install into .venv, then the site in site/, with no dead link in it
# make ratio  what dropped padding and shared weights gain, as ratios that hold on any machine
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo-run

.PHONY: install demo test docs ratio lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Threads that wait spin for some microseconds and then sleep. Those that sleep at once (OMP_WAIT_POLICY=passive) took 4.3 s
# for a step of the demo's training, as its bar shows it, where these took 2.6, on two quiet cores; those that spin on (the
# default) took 3 to 17 beside two busy processes, where these took 6 to 11.
demo: install
	GOMP_SPINCOUNT=10000 $(BIN)/vflora demo --output $(DEMO)

# Memory that is freed stays with the process: to fetch it anew for every layer took a third of a training's time.
test: export MALLOC_TRIM_THRESHOLD_ = 1000000000
test: export MALLOC_MMAP_THRESHOLD_ = 1000000000
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

ratio: install
	OMP_NUM_THREADS=1 $(BIN)/vflora bench ratio --output build/ratio.json

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: install
	$(BIN)/ruff check src tests docs *.py
	$(BIN)/ruff format --check src tests docs *.py
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) $(DEMO) build site

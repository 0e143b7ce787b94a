# Everything runs inside .venv, made on first use and brought up to date when setup.py or the C++ sources change.
installed := .venv/installed

.PHONY: demo test

demo: $(installed)
	.venv/bin/python examples/06_toy_demo.py

test: $(installed)
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Each candidate is run, not only looked up: a version manager's stub can be on the path and still not start.
$(installed): setup.py $(wildcard pangu_ms/ops/cpu/*)
	@if [ ! -x .venv/bin/python ]; then \
	    for python in python3.11 python3.12 python3.10 python3; do \
	        $$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' >/dev/null 2>&1 || continue; \
	        echo "making .venv with $$(command -v $$python)"; \
	        $$python -m venv .venv || { rm -rf .venv; exit 2; }; \
	        exit 0; \
	    done; \
	    echo "No Python 3.10, 3.11 or 3.12 found (tried python3.11, python3.12, python3.10, python3), which MindSpore 2.9.0 needs:" \
	        "install it, put it on PATH and run make again." >&2; \
	    exit 2; \
	fi
	.venv/bin/python -m pip install --disable-pip-version-check -e '.[test,plot]'
	@touch $@

# aufsd: the commands of this checkout. `make help` lists them.
# Everything is installed into a virtual environment in .venv. Nothing outside of the checkout changes,
# except that the demo and the tests install the Debian packages that they use, where root runs them
# and apt is there; `make APT= test` installs none. tests/packages.py is the list.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
APT ?= apt-get
# how many tests run at a time; pytest-xdist's auto is one for each core
WORKERS ?= auto
export APT VENV

.PHONY: help demo test test-all test-crash lint format bench test-vm man dist deb test-deb install install-files clean

help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(VENV)/installed: pyproject.toml client/pyproject.toml docker/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "aufsd needs Python 3.11 or later: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -m tests.packages setup
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
		|| { echo "this Python has no venv; on Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --use-pep517 -e './client[cli,trio]' -e '.[dev]' -e ./docker
	@touch $@

demo: $(VENV)/installed ## load a root file system, stack two layers, mount, change, export, compare
	@$(BIN)/python -m tests.packages demo
	$(BIN)/python demo/demo.py

# a machine with many cores may have little memory for as many daemons
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

test: lint ## linters, then every test that this machine can run; says which tiers are off, and why
	@$(BIN)/python -m tests.packages tests
	$(PYTEST)

test-all: lint ## the same with a larger sample of crashes: what the gate runs
	@$(BIN)/python -m tests.packages tests
	AUFSD_CRASH=more $(PYTEST)

test-crash: $(VENV)/installed ## kill the daemon, and break it, at every system call of every operation
	@$(BIN)/python -m tests.packages tests
	AUFSD_CRASH=all $(PYTEST) tests/crash

lint: $(VENV)/installed ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy debian/private.py debian/mounted.py systemd/launcher.py systemd/monitoring/*.py docs/man/build.py

format: $(VENV)/installed ## rewrite the sources as ruff format wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed ## measure, each case as a ratio to a yardstick of the same run
	$(BIN)/python -m bench

test-vm: $(VENV)/installed ## run the tests in a virtual machine: make test-vm KERNEL=path/to/bzImage
	tests/vm/run $(KERNEL)

man: $(VENV)/installed ## the man pages, a commented configuration and completions, into build/doc
	$(BIN)/python docs/man/build.py build/doc

# The same sources give the same bytes: the time in them is the last commit's, or $SOURCE_DATE_EPOCH.
DISTRIBUTIONS := client . docker
dist: $(VENV)/installed ## wheels and sdists of the three distributions, into dist, for PyPI
	rm -rf dist
	epoch=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct)} || exit; \
	for each in $(DISTRIBUTIONS); do \
		(cd $$each && SOURCE_DATE_EPOCH=$$epoch '$(abspath $(BIN))/hatchling' build -d '$(CURDIR)/dist' >/dev/null) \
			|| exit; \
	done
	$(BIN)/twine check --strict dist/*

# The packages for amd64 or arm64, whichever this machine is. Wheels come from PyPI; debian/constraints.txt
# has their versions.
deb: ## the packages for Debian 12 and 13, Ubuntu 22.04 and 24.04, into build/deb
	rm -rf build/deb
	mkdir -p build/deb/aufsd
	git ls-files -z --cached --others --exclude-standard | tar -c --null -T - | tar -x -C build/deb/aufsd
	cd build/deb/aufsd && PIP_CACHE_DIR=$${PIP_CACHE_DIR:-$$HOME/.cache/pip} dpkg-buildpackage -b -us -uc
	rm -rf build/deb/aufsd
	@ls -sh build/deb/*.deb

DEB ?= bookworm trixie jammy noble
test-deb: $(VENV)/installed ## build the packages, and install, upgrade and remove them under other releases
	@$(BIN)/python -m tests.packages deb
	$(MAKE) deb
	AUFSD_DEB='$(DEB)' $(BIN)/python -m pytest -rs --durations 0 \
		-o faulthandler_timeout=1200 tests/packaging/deb

# --- Installing. PREFIX is where things go, DESTDIR a root to put in front of that. The programs are
# one directory of Python packages that touches no other, and two launchers. A packager who installs
# the two distributions by other means wants `install-files` alone, with AUFSD= where his lies.

PREFIX ?= /usr/local
AUFSD ?= $(PREFIX)/bin/aufsd
# systemd reads these below /usr/lib and /usr/local/lib
SYSTEMD ?= $(PREFIX)/lib
LIBRARY := $(PREFIX)/lib/aufsd
SHARE := $(PREFIX)/share/aufsd
PLACED = sed -e 's|@AUFSD@|$(AUFSD)|' -e 's|@PREFIX@|$(PREFIX)|'

install: $(VENV)/installed install-files ## put the programs and all below in place: DESTDIR= PREFIX=/usr/local
	rm -rf '$(DESTDIR)$(LIBRARY).new'
	$(BIN)/pip install --quiet --disable-pip-version-check --target '$(DESTDIR)$(LIBRARY).new' \
		'./client[cli]' .
	rm -rf '$(DESTDIR)$(LIBRARY).new/bin' '$(DESTDIR)$(LIBRARY)'
	mv '$(DESTDIR)$(LIBRARY).new' '$(DESTDIR)$(LIBRARY)'
	install -d '$(DESTDIR)$(PREFIX)/bin'
	$(BIN)/python systemd/launcher.py '$(LIBRARY)' aufsd.__main__ >'$(DESTDIR)$(PREFIX)/bin/aufsd'
	$(BIN)/python systemd/launcher.py '$(LIBRARY)' aufsd_client.aufsctl \
		>'$(DESTDIR)$(PREFIX)/bin/aufsctl'
	chmod 755 '$(DESTDIR)$(PREFIX)/bin/aufsd' '$(DESTDIR)$(PREFIX)/bin/aufsctl'
	@test -n '$(DESTDIR)' || { echo 'Now, as root:'; \
		echo '    systemd-sysusers && systemctl daemon-reload'; \
		echo '    systemctl enable --now aufsd.socket aufsd-monitor.socket aufsd.service'; }

install-files: man ## only the units, man pages, completions and monitoring: DESTDIR= PREFIX= AUFSD=path of the program
	install -d $(foreach directory,systemd/system sysusers.d tmpfiles.d modules-load.d,\
		'$(DESTDIR)$(SYSTEMD)/$(directory)') '$(DESTDIR)$(SHARE)'
	for unit in systemd/*.in systemd/monitoring/*.in; do \
		$(PLACED) "$$unit" | install -m 644 /dev/stdin \
			"$(DESTDIR)$(SYSTEMD)/systemd/system/$$(basename "$$unit" .in)" || exit; \
	done
	install -m 644 systemd/*.socket systemd/monitoring/*.timer '$(DESTDIR)$(SYSTEMD)/systemd/system'
	for kind in sysusers.d tmpfiles.d modules-load.d; do \
		install -m 644 systemd/$$kind/aufsd.conf "$(DESTDIR)$(SYSTEMD)/$$kind" || exit; \
	done
	install -D systemd/monitoring/check_aufsd.py '$(DESTDIR)$(PREFIX)/lib/nagios/plugins/check_aufsd'
	install -D systemd/monitoring/textfile.py '$(DESTDIR)$(PREFIX)/libexec/aufsd-textfile'
	install -m 644 systemd/monitoring/aufsd.rules.yml systemd/monitoring/grafana-aufsd.json \
		build/doc/aufsd.toml '$(DESTDIR)$(SHARE)'
	for page in build/doc/*.[158]; do \
		install -D -m 644 "$$page" "$(DESTDIR)$(PREFIX)/share/man/man$${page##*.}/$${page##*/}" || exit; \
	done
	install -D -m 644 build/doc/aufsctl.bash '$(DESTDIR)$(PREFIX)/share/bash-completion/completions/aufsctl'
	install -D -m 644 build/doc/aufsctl.zsh '$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_aufsctl'
	install -D -m 644 build/doc/aufsctl.fish '$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/aufsctl.fish'

clean: ## remove what these commands made
	rm -rf $(VENV) build dist

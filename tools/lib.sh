# shellcheck shell=bash
# What tools/demo and tools/test have in common. Sourced, not run; the caller has set -euo pipefail.

# shellcheck disable=SC2034  # most are read by the scripts that source this
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${HOSTUPDATE_VENV:-$checkout/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

# The C core and libvirt's Python binding are compiled; lab guests need libvirt's QEMU driver (a
# library: no daemon), QEMU, and a compiler for their init.
base_packages=(
	ca-certificates gcc libc6-dev libvirt-daemon-driver-qemu libvirt-dev mount pkg-config
	python3 python3-dev python3-venv qemu-system-x86
)

# ---- steps: each is announced, and ends with how long it took

step_title=
step_start_us=0

now_us() { # wall clock, microseconds
	printf '%s' "${EPOCHREALTIME/[.,]/}"
}

seconds_since() { # START_US
	local took_us=$(($(now_us) - $1))
	printf '%d.%d s' $((took_us / 1000000)) $((took_us / 100000 % 10))
}

begin() { # TITLE: ends the step before, begins this one
	end
	step_title=$1
	step_start_us=$(now_us)
	printf '\n==> %s ...\n' "$step_title"
}

end() {
	[[ -n $step_title ]] || return 0
	printf '    done in %s\n' "$(seconds_since "$step_start_us")"
	step_title=
}

die() { # MESSAGE [REMEDY]
	printf 'error: %s\n' "$1" >&2
	[[ $# -lt 2 ]] || printf 'remedy: %s\n' "$2" >&2
	exit 1
}

quietly() { # COMMAND...: its output is shown only if it fails
	local output status=0
	output=$("$@" 2>&1 </dev/null) || status=$?
	[[ $status -eq 0 ]] && return
	printf '%s\n' "$output" | tail -n 60 >&2
	die "$1 failed with exit status $status; the end of its output is above"
}

# ---- cleaning up: functions run in reverse order at the end, however it comes about

cleanups=()

conclude() { # STATUS: the last word, after cleaning up; a script may have one of its own
	:
}

at_exit() { # FUNCTION
	cleanups+=("$1")
}

finish() {
	local status=$? number
	trap - EXIT
	trap '' HUP INT TERM # nobody interrupts the cleaning up; a second Ctrl-C is ignored
	set +e
	if [[ $status -ne 0 && -n $step_title ]]; then
		printf 'FAILED (exit %d): %s, after %s\n' \
			"$status" "$step_title" "$(seconds_since "$step_start_us")" >&2
	fi
	step_title=
	for ((number = ${#cleanups[@]} - 1; number >= 0; number--)); do
		if ! "${cleanups[number]}"; then
			printf 'error: cleaning up failed: %s\n' "${cleanups[number]}" >&2
			[[ $status -ne 0 ]] || status=1
		fi
	done
	conclude "$status"
	exit "$status"
}

clean_up_at_exit() {
	trap finish EXIT
	trap 'exit 129' HUP
	trap 'exit 130' INT
	trap 'exit 141' PIPE
	trap 'exit 143' TERM
}

# ---- system packages

package_installed() { # NAME
	local states
	states=$(dpkg-query --show --showformat '${db:Status-Status} ' "$1" 2>/dev/null) || return 1
	[[ " $states" == *' installed '* ]]
}

missing_packages() { # NAME[|ALTERNATIVE...]...: those not installed, by their first name
	local wanted name
	for wanted; do
		for name in ${wanted//|/ }; do
			package_installed "$name" && continue 2
		done
		printf '%s\n' "${wanted%%|*}"
	done
}

refresh_package_lists() { # downloads apt's lists where there are none or they are a day old
	local lists=/var/lib/apt/lists fresh
	fresh=$(find "$lists/partial" -maxdepth 0 -mtime -1 2>/dev/null || true)
	if [[ -n $fresh ]] && compgen -G "$lists/*_Packages*" >/dev/null; then
		return 0
	fi
	begin "downloading lists of system packages (apt-get update)"
	apt-get -qq update </dev/null || printf '    with errors; going on with what there is\n'
	touch -c "$lists/partial"
	end
}

apt_install() { # NAME...
	DEBIAN_FRONTEND=noninteractive APT_LISTCHANGES_FRONTEND=none NEEDRESTART_SUSPEND=1 \
		quietly apt-get -q -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
		install --no-install-recommends --no-upgrade -- "$@"
}

policy=/usr/sbin/policy-rc.d
policy_is_ours=

forbid_service_starts() { # packages that are installed from here on do not start their services
	[[ -e $policy || -h $policy ]] && return
	policy_is_ours=yes
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 755 "$policy"
}

allow_service_starts() {
	[[ -n $policy_is_ours ]] || return 0
	policy_is_ours=
	rm -f "$policy"
}

need_packages() { # NAME[|ALTERNATIVE...]...: installs what is missing
	local missing
	command -v apt-get >/dev/null ||
		die "no apt-get: this script sets up Debian and its relatives only" \
			"install the equivalents of: $*"
	mapfile -t missing < <(missing_packages "$@")
	if [[ ${#missing[@]} -eq 0 ]]; then
		printf '==> system packages: all %d are installed\n' $#
		return
	fi
	[[ $EUID -eq 0 ]] ||
		die "missing system packages" "sudo apt-get install -y --no-install-recommends ${missing[*]}"
	refresh_package_lists
	begin "installing system packages, services not started: ${missing[*]}"
	at_exit allow_service_starts
	forbid_service_starts
	apt_install "${missing[@]}"
	allow_service_starts
	end
}

need_libvirt_user() { # libvirt's QEMU driver does not even load for root without it
	getent passwd libvirt-qemu >/dev/null && getent group libvirt-qemu >/dev/null && return
	[[ $EUID -eq 0 ]] ||
		die "no user libvirt-qemu" "sudo apt-get install -y libvirt-daemon-system"
	begin "adding the user and group libvirt-qemu, as Debian's libvirt-daemon-system does"
	getent group kvm >/dev/null || groupadd --system kvm
	getent group libvirt-qemu >/dev/null || groupadd --system --gid 64055 libvirt-qemu
	getent passwd libvirt-qemu >/dev/null ||
		useradd --system --uid 64055 -K SYS_UID_MAX=64055 --gid kvm --groups libvirt-qemu \
			--no-create-home --home-dir /var/lib/libvirt --shell /usr/sbin/nologin --comment 'Libvirt Qemu' \
			libvirt-qemu
	end
}

# ---- Python

python_fits() { # PROGRAM: Python 3.11 or newer that can make virtual environments
	"$1" -I -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() { # prints it. Debian's own first: python3-dev has the headers of that one
	local name
	for name in ${HOSTUPDATE_PYTHON:+"$HOSTUPDATE_PYTHON"} /usr/bin/python3 python3 \
		python3.14 python3.13 python3.12 python3.11; do
		if python_fits "$name"; then
			command -v "$name"
			return
		fi
	done
	die "no Python 3.11 or newer with venv" \
		"use Debian 12 or newer, or set HOSTUPDATE_PYTHON to such an interpreter with headers"
}

make_venv() {
	local python
	if [[ -e $venv ]]; then
		[[ -x $venv/bin/pip ]] && python_fits "$venv/bin/python" && return
		[[ -e $venv/pyvenv.cfg || -z $(ls -A "$venv") ]] ||
			die "$venv exists and is no virtual environment" "set HOSTUPDATE_VENV to another path"
	fi
	python=$(find_python)
	begin "making a virtual environment of $python in $venv"
	quietly "$python" -m venv --clear "$venv"
	end
}

digest_of() { # PATH...: of the names and contents of all source files there
	(
		cd "$checkout" || exit
		find "$@" -type f ! -name '*.so' ! -name '*.py[co]' -print0 |
			LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c 1-64
	)
}

packaging=(pyproject.toml setup.py MANIFEST.in README.md LICENSE)

install_project() { # regular|editable: into the virtual environment, if the sources changed
	local how=$1 stamp=$venv/hostupdate-installed digest scratch
	make_venv
	# Once editable (a developer's), always editable: it runs the checkout's sources as well.
	[[ -e $stamp && $(<"$stamp") == editable* ]] && how=editable
	if [[ $how == editable ]]; then
		digest="editable $(digest_of pyproject.toml setup.py csrc)"
	else
		digest="regular $(digest_of "${packaging[@]}" csrc hostupdate systemd)"
	fi
	if [[ -e $stamp && $(<"$stamp") == "$digest" ]] &&
		"$venv/bin/python" -P -c 'import hostupdate._core' 2>/dev/null; then
		printf '==> hostupdate: already installed (%s) in %s\n' "$how" "$venv"
		return
	fi
	rm -f "$stamp"
	if [[ $how == editable ]]; then
		begin "building hostupdate in place, with its test tools (pip install -e .[test])"
		HOSTUPDATE_DEVELOPER=1 HOSTUPDATE_FAULTS=1 quietly "$venv/bin/pip" install -e "${checkout}[test]"
	else
		begin "building and installing hostupdate (pip install)"
		# From a copy: a build in the checkout would leave files there, and take old ones along.
		scratch=$(mktemp -d)
		(cd "$checkout" && tar -c --exclude='*.so' --exclude=__pycache__ \
			"${packaging[@]}" csrc hostupdate systemd) | tar -x -C "$scratch" --no-same-owner
		quietly "$venv/bin/pip" install "$scratch"
		rm -rf "$scratch"
	fi
	printf '%s\n' "$digest" >"$stamp"
	give_back "$venv" "$checkout"/hostupdate/_core.abi3.so "$checkout"/*.egg-info
	end
}

give_back() { # PATH...: what root made in a user's checkout belongs to that user
	local path
	[[ $EUID -eq 0 && $(stat -c %u "$checkout") -ne 0 ]] || return 0
	for path; do
		[[ $path == "$checkout"/* && -e $path ]] || continue
		chown -hR --reference="$checkout" "$path"
	done
}

# ---- cgroup v2

cgroup2=/run/hostupdate-cgroup2

cgroup2_mounted() {
	grep -q -- ' - cgroup2 ' /proc/self/mountinfo
}

mount_cgroup2() { # where the machine has no cgroup v2 tree; taken away at the end
	cgroup2_mounted && return
	begin "mounting a cgroup v2 tree on $cgroup2: this machine has none (unmounted at the end)"
	mkdir -p "$cgroup2"
	at_exit unmount_cgroup2
	mount -t cgroup2 cgroup2 "$cgroup2" ||
		printf '    not possible here: guests will be stopped by signal instead\n'
	end
}

unmount_cgroup2() {
	! mountpoint -q "$cgroup2" || umount "$cgroup2" || return
	rmdir "$cgroup2"
}

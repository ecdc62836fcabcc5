# Booted Debian hosts, each a container with a systemd of its own: what shows are made of. Sourced.
#
# 1. Everything happens inside a cage: a mount and a PID namespace whose end, for whatever reason,
#    ends every process and every mount in it; and a control group that is removed afterwards.
# 2. A host's root file system is an overlay in memory over a cached one, so that each host is new.
# 3. Nothing of the host that this runs on is changed but the cache in BB_PACKAGE_CACHE.
#
# shellcheck shell=bash

cache=${BB_PACKAGE_CACHE:-/var/tmp/bb-package-tests}
suite=${BB_PACKAGE_SUITE:-bookworm}

say() { printf '%s\n' "$*"; }
fail() {
  printf 'FAILED: %s\n' "$*" >&2
  exit 1
}

# What the hosts have: systemd, and a Bazel with a C++ compiler, since actions use the host's.
packages=systemd,systemd-sysv,dbus,libpam-systemd,procps,iproute2,man-db,less,apt-utils
packages+=,g++,libc6-dev,bazel-bootstrap,bazel-rules-java,bazel-rules-proto,bazel-skylib
packages+=,openssl,python3,libnetty-tcnative-java,libnetty-tcnative-jni
recipe=1 # count up when `root_file_system` changes

# Makes the root file system of all hosts, if it is not there; prints where.
root_file_system() {
  local key root
  key=$(printf '%s %s %s' "$suite" "$packages" $recipe | sha256sum | cut -c1-12)
  root=$cache/root-$key
  mkdir -p "$cache"
  exec 8>"$cache/lock"
  flock 8
  if [ ! -e "$root.ok" ]; then
    local sources=/etc/apt/sources.list.d/debian.sources unit hooks=()
    [ -s "$sources" ] || sources=/etc/apt/sources.list
    # Their jobs would run in the middle of a test.
    for unit in apt-daily.timer apt-daily-upgrade.timer man-db.timer dpkg-db-backup.timer \
      e2scrub_all.timer fstrim.timer console-getty.service getty@tty1.service \
      systemd-timesyncd.service e2scrub_reap.service systemd-pstore.service; do
      hooks+=(--customize-hook="ln -sf /dev/null \"\$1/etc/systemd/system/$unit\"")
    done
    rm -rf "$root"
    # dpkg's many fsync(2) take longer than all else. There is no policy-rc.d, so that maintainer
    # scripts start units as on any host.
    mmdebstrap --quiet --variant=minbase --include="$packages" \
      --aptopt='APT::Install-Recommends "false"' --dpkgopt=force-unsafe-io \
      --customize-hook=': >"$1/etc/machine-id"; : >"$1/etc/resolv.conf"; rm -f "$1/etc/hostname"' \
      --customize-hook='echo "127.0.0.1 localhost" >"$1/etc/hosts"' \
      --customize-hook='mkdir -p "$1/etc/systemd/journald.conf.d"' \
      --customize-hook='printf "[Journal]\nStorage=volatile\nRateLimitBurst=0\n" >"$1/etc/systemd/journald.conf.d/test.conf"' \
      "${hooks[@]}" "$suite" "$root" "$sources" >&2
    touch "$root.ok"
  fi
  exec 8>&-
  printf '%s' "$root"
}

# hierarchies: where control groups are made. The old layout has two that systemd looks at.
hierarchies() {
  local hierarchy found=no
  for hierarchy in /sys/fs/cgroup/unified /sys/fs/cgroup/systemd; do
    [ ! -w "$hierarchy/cgroup.procs" ] || { found=yes; echo "$hierarchy"; }
  done
  [ $found = yes ] || echo /sys/fs/cgroup
}

# enter_group GROUP: this (sub)shell moves to a new control group.
enter_group() {
  local hierarchy
  for hierarchy in $(hierarchies); do
    mkdir "$hierarchy/$1"
    echo "$BASHPID" >"$hierarchy/$1/cgroup.procs"
  done
}

# cage SCRIPT ARGUMENT...: runs a script, for which this file is sourced, inside a cage.
cage() {
  local hierarchy result=0
  export cage_group=bb-package-test.$$
  (
    enter_group "$cage_group"
    exec unshare --mount --pid --fork --kill-child --propagation private --mount-proc \
      bash "$@"
  ) </dev/null || result=$?
  for hierarchy in $(hierarchies); do
    local _
    for _ in 1 2 3 4 5 6 7 8 9 10; do
      find "$hierarchy/$cage_group" -depth -type d -exec rmdir {} + 2>/dev/null || true
      [ -d "$hierarchy/$cage_group" ] || break
      sleep 0.2
    done
  done
  return $result
}

# enter_cage: first thing in a caged script. Scratch space is in $scratch.
enter_cage() {
  scratch=/run/bb-package
  mkdir -p /run/systemd/nspawn /run/netns "$scratch"
  # systemd-nspawn refuses to lock in a directory that is on a disk.
  mount -t tmpfs tmpfs /run/systemd/nspawn
  mount -t tmpfs tmpfs "$scratch"
  mount -t tmpfs tmpfs /run/netns
  declare -gA leader
}

# host NAME [NETWORK-NAMESPACE]: boots one, with the directory $payload read-only at /srv.
host() {
  local name=$1 nspawn directory=$scratch/$1 _ network=(--private-network)
  [ $# -lt 2 ] || network=(--network-namespace-path="/run/netns/$2")
  mkdir -p "$directory"/{upper,work,root}
  mount -t overlay overlay \
    -o "lowerdir=$root,upperdir=$directory/upper,workdir=$directory/work" "$directory/root"
  echo "$name" >"$directory/root/etc/hostname"
  # A control group of its own: systemd-nspawn makes one below its own, whose name is always the same.
  # Without SYSTEMD_SECCOMP=0 its filter forbids more than a real host does.
  (
    enter_group "$cage_group/$name"
    SYSTEMD_SECCOMP=0 SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 exec systemd-nspawn --quiet \
      --directory="$directory/root" --boot --machine="$name" --register=no --keep-unit \
      "${network[@]}" --resolv-conf=off --timezone=off --link-journal=no --capability=all \
      --bind-ro="$payload:/srv" --console=read-only
  ) </dev/null >"$directory/console.log" 2>&1 &
  nspawn=$!
  for _ in $(seq 600); do
    kill -0 $nspawn 2>/dev/null || { cat "$directory/console.log" >&2; fail "$name did not boot"; }
    leader[$name]=$(tr -d ' ' <"/proc/$nspawn/task/$nspawn/children") || true
    if [ -n "${leader[$name]}" ] && inside "$name" test -S /run/systemd/private 2>/dev/null; then
      break
    fi
    sleep 0.05
  done
  inside "$name" systemctl is-system-running --wait >"$directory/state" || true
  grep -q running "$directory/state" || {
    inside "$name" systemctl --failed --no-pager >&2
    fail "$name is $(cat "$directory/state") after its boot"
  }
}

# inside NAME COMMAND...: in the host's namespaces, but no process of its systemd's.
inside() {
  local pid=${leader[$1]}
  shift
  nsenter --target "$pid" --mount --uts --ipc --net --pid --cgroup -- "$@"
}

# on NAME SCRIPT: in a unit of its own on that host, in bash, as root; its output and exit status.
on() {
  inside "$1" systemd-run --quiet --pipe --wait --collect --property=Type=exec \
    --property=KillMode=process --setenv=DEBIAN_FRONTEND=noninteractive --setenv=HOME=/root \
    --setenv=LC_ALL=C.UTF-8 --working-directory=/root \
    bash -euo pipefail -c ". /srv/inside.sh; $2" </dev/null
}

# after_all: the journals, for whoever looks why a show failed.
keep_journals() {
  local name
  for name in "${!leader[@]}"; do
    inside "$name" journalctl --boot --no-pager --output=short-precise >"$logs/$name.journal" 2>/dev/null || true
  done
}

# What shows do on a host. Sourced by each script that `on` runs; /srv has the packages (one
# directory per version), the demo and abseil.
#
# shellcheck shell=bash

fail() {
  printf 'FAILED: %s\n' "$*" >&2
  exit 1
}

# install VERSION [PACKAGE...]: by apt, from files, as a user would; what they share comes with them.
install() {
  local version=$1 name files=("/srv/$1/bb-remote-execution-common_$1_all.deb")
  shift
  [ $# -gt 0 ] || set -- bb-scheduler bb-worker bb-runner
  for name in "$@"; do files+=("/srv/$version/${name}_${version}_$(dpkg --print-architecture).deb"); done
  apt-get install --yes --quiet --no-install-recommends --allow-downgrades \
    -o Dpkg::Use-Pty=0 -o APT::Sandbox::User=root -o Dpkg::Options::=--force-unsafe-io "${files[@]}"
}

await() {
  local what=$1 _
  shift
  for _ in $(seq 300); do
    if "$@" >/dev/null 2>&1; then return 0; fi
    sleep 0.1
  done
  fail "$what after 30 s"
}

active() { [ "$(systemctl is-active "$1")" = active ]; }
fails_active() { ! active "$1"; }
pid_of() { systemctl show --property=MainPID --value "$1"; }
restarts_of() { systemctl show --property=NRestarts --value "$1"; }

nothing_failed() {
  local failed
  failed=$(systemctl --failed --no-legend --plain)
  [ -z "$failed" ] || { systemctl status --no-pager $(cut -d' ' -f1 <<<"$failed") || true; fail "units have failed: $failed"; }
}

# no_failed_operations: none that this host's scheduler has told a client of since its boot. Bazel's
# retries hide them. A show that breaks daemons says may_fail=yes.
no_failed_operations() {
  [ -z "${may_fail-}" ] || return 0
  local failed
  failed=$(journalctl -b -u bb-scheduler -o cat --no-pager | grep 'an operation failed' || true)
  [ -z "$failed" ] || fail "$(wc -l <<<"$failed") operations failed: $(head -n 3 <<<"$failed")
$(journalctl -b -u bb-worker -u bb-runner -p warning -o cat --no-pager | tail -n 5)"
}

# The flags that every build here has: all actions run on the farm, and nothing is taken from earlier
# builds. Retries are Bazel's default.
bazel_flags() {
  printf '%s\n' --remote_executor="grpc://${1:-127.0.0.1:8980}" \
    --remote_default_exec_properties=OSFamily=linux --spawn_strategy=remote \
    --genrule_strategy=remote --remote_local_fallback=false --noremote_accept_cached \
    --color=no --curses=no --show_progress_rate_limit=5 --nosandbox_debug \
    --override_repository=remote_coverage_tools=/srv/demo/repositories/remote_coverage_tools \
    --override_repository=rules_cc=/srv/demo/repositories/rules_cc \
    --override_repository=rules_java=/usr/share/bazel/rules/java \
    --override_repository=rules_proto=/usr/share/bazel/rules/proto
}

bazel_() { bazel --output_user_root=/var/tmp/bazel --max_idle_secs=60 "$@"; }

# all_remote LOG: how many actions ran on the farm; fails when one ran elsewhere.
all_remote() {
  local summary remote
  summary=$(grep -E '^INFO: [0-9]+ process(es)?[:.]' "$1" | tail -n 1)
  remote=$(grep -oE '[0-9]+ remote[,.]' <<<"$summary" | grep -oE '[0-9]+' || echo 0)
  [ "$remote" -gt 0 ] || fail "nothing ran on the farm: $summary"
  ! grep -qE '[0-9]+ (local|linux-sandbox|processwrapper-sandbox|worker)' <<<"$summary" ||
    fail "not everything ran on the farm: $summary"
  printf '%s' "$remote"
}

# demo [HOST:PORT]: builds and tests packaging/demo; prints how many actions ran on the farm.
demo() {
  rm -rf /var/tmp/demo
  cp -r /srv/demo /var/tmp/demo
  local flags
  mapfile -t flags < <(bazel_flags "$@")
  (cd /var/tmp/demo && bazel_ clean >/dev/null 2>&1 && bazel_ test "${flags[@]}" --jobs=8 //...) \
    >/var/tmp/demo.log 2>&1 || { tail -n 25 /var/tmp/demo.log >&2; fail "Bazel failed"; }
  no_failed_operations
  all_remote /var/tmp/demo.log
}

# demo_again: what `demo` has built is found in the cache, all of it; prints Bazel's summary.
demo_again() {
  local flags summary
  mapfile -t flags < <(bazel_flags)
  (cd /var/tmp/demo && bazel_ clean >/dev/null 2>&1 &&
    bazel_ test "${flags[@]}" --remote_accept_cached --jobs=8 //...) >/var/tmp/again.log 2>&1 ||
    { tail -n 25 /var/tmp/again.log >&2; fail "Bazel failed"; }
  summary=$(grep -E '^INFO: [0-9]+ process(es)?[:.]' /var/tmp/again.log | tail -n 1)
  grep -qE '[0-9]+ remote cache hit' <<<"$summary" && ! grep -qE '[0-9]+ remote[,.]' <<<"$summary" ||
    fail "not everything was in the cache: $summary"
  printf '%s' "$summary"
}

# who PROPERTY...: what an action with these platform properties says of its user and its network
# devices.
who() {
  local flags property
  mapfile -t flags < <(bazel_flags)
  for property in "$@"; do flags+=("--remote_default_exec_properties=$property"); done
  mkdir -p /var/tmp/who
  touch /var/tmp/who/WORKSPACE
  printf 'genrule(name = "who", outs = ["o"], cmd = "{ id -u; cat /proc/net/dev | wc -l; } >$@; : %s")\n' \
    "$RANDOM$RANDOM" >/var/tmp/who/BUILD
  (cd /var/tmp/who && bazel_ build "${flags[@]}" :who) >/var/tmp/who.log 2>&1 ||
    { cat /var/tmp/who.log >&2; fail "Bazel failed"; }
  xargs </var/tmp/who/bazel-bin/o
}

# genrule COMMAND [SECONDS]: has the farm run a shell command, until Ctrl-C after so long; its result is
# Bazel's.
genrule() {
  local flags
  mapfile -t flags < <(bazel_flags)
  mkdir -p /var/tmp/genrule
  touch /var/tmp/genrule/WORKSPACE
  printf 'genrule(name = "g", outs = ["o"], cmd = "%s; : %s")\n' "$1" "$RANDOM$RANDOM" >/var/tmp/genrule/BUILD
  (cd /var/tmp/genrule && timeout -s INT "${2:-600}" bazel --output_user_root=/var/tmp/bazel --max_idle_secs=60 build "${flags[@]}" :g) \
    >/var/tmp/genrule.log 2>&1
}

# abseil: builds part of it, as many actions at a time as a user would have; prints how many ran.
abseil() {
  [ -d /var/tmp/abseil ] || cp -r /srv/abseil/abseil /var/tmp/abseil
  local flags
  mapfile -t flags < <(bazel_flags "$@")
  flags+=(--override_repository=bazel_skylib=/usr/share/bazel/tools/skylib
    --override_repository=platforms=/srv/abseil/platforms
    --override_repository=rules_python=/srv/abseil/rules_python
    --override_repository=com_google_googletest=/srv/abseil/googletest
    --override_repository=com_googlesource_code_re2=/srv/abseil/re2 --cxxopt=-std=c++17)
  local overrides=() flag
  for flag in "${flags[@]}"; do
    case $flag in --override_repository=*) overrides+=("$flag") ;; esac
  done
  local all=//absl/strings/...+//absl/numeric/...+//absl/container/...
  all=${all//+/ + }
  (cd /var/tmp/abseil &&
    bazel_ query --color=no "${overrides[@]}" \
      "kind(cc_library, $all) except attr(tags, benchmark, $all) except attr(testonly, 1, $all)" \
      >/var/tmp/abseil.targets 2>/var/tmp/abseil.query ||
      { tail -n 5 /var/tmp/abseil.query >&2; fail "bazel query failed"; }
    bazel_ build "${flags[@]}" --jobs=8 --target_pattern_file=/var/tmp/abseil.targets \
      >/var/tmp/abseil.log 2>&1 || { tail -n 40 /var/tmp/abseil.log >&2; fail "Bazel failed"; })
  no_failed_operations
  all_remote /var/tmp/abseil.log
}

# steps FILE SECTION N: the N-th block of indented lines in that section of a text, README.md or a
# page of man(1), as they are written there.
steps() {
  case $1 in
    *.md) awk -v heading="$2" '
      /^#/ { inside = $0 ~ "^#+ " heading "$" }
      inside && /^    / { print; next }
      inside { print /^$/ ? "" : "." }' "$1" | sed 's/^    //' ;;
    *) awk -v heading="$2" '
      /^(   )?[^ ]/ { inside = $0 ~ "^ *" heading "$" }
      inside && /^           / { print; next }
      inside { print /^$/ ? "" : "." }' "$1" | sed 's/^           //' ;;
  esac | awk -v wanted="$3" '
    $0 == "." { if (some) { number++; some = 0 } next }
    /[^ ]/ { some = 1 }
    number + some == wanted' | sed '/./,$!d' >/var/tmp/steps
  [ -s /var/tmp/steps ] || fail "$1 has no block $3 in $2"
  cat /var/tmp/steps
}

# The farm has begun to work: some actions are done, and not nearly all.
under_way() { [ "$(journalctl -u bb-worker -o cat --no-pager | grep -c 'action done')" -ge "${1:-10}" ]; }

# A first build: packaging/demo with Bazel on the farm; sourced by packaging/farm.
#
# shellcheck shell=bash

demo_packages=(gcc g++ libc6-dev bazel-bootstrap bazel-rules-java bazel-rules-proto)

step() { printf '\n== %s/4  %s  [%s since the start]\n' "$1" "$2" "$(elapsed $((SECONDS - began)))"; }

install_packages() {
  local package missing=() log=$target/farm-packages.log
  mkdir -p "$target"
  for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  say "    installing ${missing[*]}"
  {
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq \
      --no-install-recommends "${missing[@]}"
  } >"$log" 2>&1 || { tail -n 10 "$log" >&2; fail "apt-get could not install ${missing[*]}; all that it said is in $log"; }
}

demo() {
  local workspace log
  step 1 "Packages: a C++ compiler, and Bazel as the client; about 2 min the first time"
  install_packages "${demo_packages[@]}"
  step 2 "The farm's three programs; about $(build_minutes) the first time"
  build
  step 3 "The farm; some seconds"
  up
  step 4 "Bazel builds and tests packaging/demo on it; about 1 min, of which Bazel's start is most"
  workspace=$directory/demo
  rm -rf "$workspace"
  cp -r "$here/demo" "$workspace"
  log=$workspace/bazel.log
  # Its own output tree, so that nothing of an earlier build is taken over.
  local bazel=(bazel --output_user_root="$directory/bazel" --max_idle_secs=30)
  local flags=(
    --remote_executor=grpc://127.0.0.1:"$port" --remote_default_exec_properties=OSFamily=linux
    --spawn_strategy=remote --genrule_strategy=remote --remote_local_fallback=false
    --noremote_accept_cached --jobs=8 --color=no --curses=no --show_progress_rate_limit=1
    --nosandbox_debug
    --override_repository=remote_coverage_tools="$workspace/repositories/remote_coverage_tools"
    --override_repository=rules_cc="$workspace/repositories/rules_cc"
    --override_repository=rules_java=/usr/share/bazel/rules/java
    --override_repository=rules_proto=/usr/share/bazel/rules/proto
  )
  local lines result=0
  lines=$(wc -l <"$directory/log/bb_worker.log")
  (cd "$workspace" && "${bazel[@]}" clean >/dev/null 2>&1 || true
    cd "$workspace" && "${bazel[@]}" test "${flags[@]}" //...) 2>&1 | tee "$log" | sed 's/^/    /' || result=$?
  (cd "$workspace" && "${bazel[@]}" shutdown >/dev/null 2>&1) || true
  [ $result = 0 ] || fail "Bazel failed; its output is $log, the daemons' is in $directory/log"
  local summary remote elsewhere
  summary=$(grep -E '^INFO: [0-9]+ process(es)?[:.]' "$log" | tail -n 1)
  remote=$(grep -oE '[0-9]+ remote[,.]' <<<"$summary" | grep -oE '[0-9]+' || echo 0)
  elsewhere=$(grep -oE '[0-9]+ (local|linux-sandbox|processwrapper-sandbox|worker|sandboxed)' <<<"$summary" || true)
  [ "$remote" -gt 0 ] && [ -z "$elsewhere" ] || fail "not every action ran on the farm: $summary"
  say
  say "What ran where, from the worker's log:"
  tail -n +$((lines + 1)) "$directory/log/bb_worker.log" | what_ran
  say
  say "All $remote actions ran on the farm, $(elapsed $((SECONDS - began))) after the demo began. It runs on:"
  status
  say
  say "Your own project, from this host:"
  say "    bazel build --remote_executor=grpc://127.0.0.1:$port \\"
  say "        --remote_default_exec_properties=OSFamily=linux --jobs=8 //..."
  say "Actions see this host's compilers and libraries. Stop the farm with: $me down --dir $directory"
}

# Sums up lines such as "action done action=… worker=… exit_code=0 fetch_ms=1 run_ms=2 upload_ms=1".
what_ran() {
  awk '
    {
      worker = ""; fetch = run = upload = -1
      for (i = 1; i <= NF; i++) {
        split($i, part, "=")
        if (part[1] == "slot") worker = part[2]
        if (part[1] == "fetch_ms") fetch = part[2]
        if (part[1] == "run_ms") run = part[2]
        if (part[1] == "upload_ms") upload = part[2]
      }
      if (run < 0) next
      count[worker]++; f[worker] += fetch; r[worker] += run; u[worker] += upload
    }
    END {
      for (worker in count)
        printf "    slot %s: %d actions; on average %.1f ms input fetch, %.1f ms run, %.1f ms upload\n",
          worker, count[worker], f[worker] / count[worker], r[worker] / count[worker], u[worker] / count[worker]
    }' | sort
}


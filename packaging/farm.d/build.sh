# The three programs: built where they are missing, and copied to the farm; sourced by packaging/farm.
# With BB_FARM_PROGRAMS those of that directory are taken, and nothing is built: tests of packages have them.
#
# shellcheck shell=bash

target=$(realpath -m -- "${CARGO_TARGET_DIR:-$source_root/target}")
programs=${BB_FARM_PROGRAMS:-$target/release}
cargo=

is_built() {
  local name
  for name in "${daemons[@]}"; do [ -x "$programs/$name" ] || return 1; done
}

check_build() {
  local needed found
  cargo=$(command -v cargo || true)
  [ -n "$cargo" ] || [ ! -x "$HOME/.cargo/bin/cargo" ] || cargo=$HOME/.cargo/bin/cargo
  needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$source_root/Cargo.toml")
  [ -n "$cargo" ] || fail "cargo is missing; install Rust $needed or newer from https://rustup.rs"
  found=$(cd "$source_root" && "$cargo" --version | grep -oE '[0-9]+\.[0-9]+' | head -n 1)
  [ "$(printf '%s\n' "$needed" "$found" | sort -V | head -n 1)" = "$needed" ] ||
    fail "$cargo is Rust $found, and $needed or newer is needed: rustup update"
  command -v cc >/dev/null || [ "$command" = demo ] || fail "cc is missing, with which Rust links programs: apt install gcc libc6-dev"
  is_built || room "$target" 2500 "a build" CARGO_TARGET_DIR
}

# About ten minutes of one processor.
build_minutes() { printf '%d min' $((10 / $(nproc) + 1)); }

# cargo's lines go to a file, and a line now and then tells how far it is, so that what else is said
# stays to be seen.
build() {
  [ -z "${BB_FARM_PROGRAMS-}" ] || is_built || fail "BB_FARM_PROGRAMS, $programs, has not all of ${daemons[*]}"
  [ -z "${BB_FARM_PROGRAMS-}" ] || return 0
  local log=$target/farm-build.log began_build=$SECONDS
  mkdir -p "$target"
  (cd "$source_root" && CARGO_TARGET_DIR=$target CARGO_TERM_COLOR=never \
    "$cargo" build --release --locked 2>&1) </dev/null | tee "$log" | progress ||
    { tail -n 30 "$log" >&2; fail "cargo build failed; all that it said is in $log"; }
  say "    built in $(elapsed $((SECONDS - began_build))); cargo's lines are in $log"
}

progress() {
  local all compiled=0 line last=- told=$SECONDS began_build=$SECONDS
  all=$(grep -c '^name = ' "$source_root/Cargo.lock")
  while :; do
    if IFS= read -r -t 10 line; then
      last=$line
      case $line in *' Compiling '*) compiled=$((compiled + 1)) ;; esac
    elif [ $? -le 128 ]; then
      break
    fi
    [ $((SECONDS - told)) -ge 10 ] || continue
    told=$SECONDS
    say "    $(elapsed $((SECONDS - began_build))) of about $(build_minutes): $compiled of at most $all packages; $last"
  done
}

elapsed() { printf '%d:%02d min' $(($1 / 60)) $(($1 % 60)); }

install_programs() {
  local name
  # Copies, since the daemons' users may not be able to pass the source tree's directories.
  mkdir -p "$directory/bin"
  for name in "${daemons[@]}"; do
    if ! cmp -s "$programs/$name" "$directory/bin/$name"; then
      install -m 0755 "$programs/$name" "$directory/bin/$name.new"
      mv -f "$directory/bin/$name.new" "$directory/bin/$name"
    fi
    case $(readlink "/proc/$(pid_of "$name")/exe" 2>/dev/null) in
      *' (deleted)') say "$name runs an older program than the one that is built; to use that: down, then up" ;;
    esac
  done
}


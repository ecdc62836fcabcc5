# What must be so before a farm is built, changed or started; sourced by packaging/farm.
#
# Each check says who or what is in the way, and the remedy. Nothing is changed here.
#
# shellcheck shell=bash

# settings: options, else what the farm had last, else defaults.
settings() {
  local alive key
  alive=$(running)
  if [ -n "$alive" ]; then
    for key in port slots users; do
      [ -z "${!key}" ] || [ -z "$(recorded $key)" ] || [ "${!key}" = "$(recorded $key)" ] ||
        fail "the farm in $directory runs with --$key $(recorded $key); to change that, stop it first: $me down --dir $directory
farm: or have a farm beside it, with a --dir and a --port of its own"
    done
  fi
  local chosen=$users
  port=${port:-$(recorded port)} port=${port:-8980}
  slots=${slots:-$(recorded slots)} slots=${slots:-0}
  users=${users:-$(recorded users)}
  [ -z "$alive" ] || return 0
  if [ -n "$chosen" ]; then
    local why
    why=$(users_taken "$users")
    [ -z "$why" ] || fail "--users $users: $why; choose others"
    [ "${users#*:}" -ge 3 ] || fail "--users $users: the scheduler, the worker and each running action need one"
    local last=$((${users%:*} + ${users#*:} - 1))
    [ "${users%:*}" -ge 1000 ] || fail "--users $users: numbers below 1000 are the system's"
    [ $last -lt 61184 ] || { [ "${users%:*}" -gt 65535 ] && [ $last -lt 2147483648 ]; } ||
      fail "--users $users: numbers from 61184 to 65535 are systemd's and nobody's; choose lower ones"
  elif [ -z "$users" ] || [ -n "$(users_taken "$users")" ]; then
    pick_users
  fi
}

pick_users() {
  local first count=128
  local actions=$((slots > 0 ? slots : $(nproc)))
  while [ $count -lt $((actions + 2)) ]; do count=$((count * 2)); done
  for ((first = 50000; first + count <= 58000; first += 128)); do
    users=$first:$count
    [ -n "$(users_taken $users)" ] || return 0
  done
  fail "between 50000 and 57999 there are no $count numbers in a row that nobody uses; choose some with --users FIRST:COUNT"
}

# users_taken FIRST:COUNT: by whom, or nothing.
users_taken() {
  local first=${1%:*} last=$((${1%:*} + ${1#*:} - 1)) other theirs
  {
    getent passwd
    getent group
  } | awk -F: -v first="$first" -v last="$last" \
    '$3 >= first && $3 <= last && !told++ { print $1 " has the number " $3 }'
  while read -r other; do
    theirs=$(recorded users "$other")
    if [ -n "$theirs" ] && [ "$other" != "$directory" ] && [ "${theirs%:*}" -le "$last" ] &&
      [ $((${theirs%:*} + ${theirs#*:})) -gt "$first" ]; then
      printf 'the farm in %s has %s\n' "$other" "$theirs"
    fi
  done < <(farms)
  { stat -c '%u %n' /proc/[0-9]* 2>/dev/null || true; } | awk -v first="$first" -v last="$last" \
    '$1 >= first && $1 <= last { sub(".*/", "", $2); print $2, $1 }' |
    while read -r pid user; do
      # A zombie, which is not in the way, has no program.
      if [ -z "${told-}" ] && readlink "/proc/$pid/exe" >/dev/null; then
        told="process $pid runs as $user"
        printf '%s\n' "$told"
      fi
    done
}

# farms [PID]: the directories of farms that run, or of the one that a process belongs to.
farms() {
  local program
  { find "/proc/${1-.}" -maxdepth $((3 - $#)) -name exe -printf '%l\n' 2>/dev/null || true; } |
    sed -nE 's,/bin/bb_(scheduler|worker|runner)( \(deleted\))?$,,p' | sort -u |
    while read -r program; do [ ! -f "$program/.bb-farm" ] || printf '%s\n' "$program"; done
}

# listener PORT: the inode of a socket that is in the way of one at 127.0.0.1.
listener() {
  awk -v port="$(printf '%04X' "$1")" '
    $4 == "0A" && !told && split($2, part, ":") == 2 && part[2] == port &&
      part[1] ~ /^(0100007F|00000000|0+|0000000000000000FFFF00000100007F)$/ { told = 1; print $10 }
  ' /proc/net/tcp /proc/net/tcp6 2>/dev/null || true
}

# holder INODE: the pid of a process that has this socket, or nothing.
holder() {
  { find /proc/[0-9]*/fd -maxdepth 1 -lname "socket:\[$1\]" 2>/dev/null || true; } |
    awk -F/ '!told++ { print $3 }'
}

# port_is_free PORT: or fails, naming who has it.
port_is_free() {
  local inode pid other
  inode=$(listener "$1")
  [ -n "$inode" ] || return 0
  pid=$(holder "$inode")
  other=$([ -z "$pid" ] || farms "$pid")
  if [ -n "$other" ]; then
    fail "port $1 is that of the farm in $other; choose another with --port (workers' is 3 more), or: $me down --dir $other"
  fi
  fail "port $1 is in use${pid:+ by process $pid ($(cat "/proc/$pid/comm" 2>/dev/null))}; choose another with --port (workers' is 3 more), or stop that"
}

# Every directory on the way must let other users pass, or no action can start; and what root runs must
# not be another user's to replace.
passable() {
  local path=$directory
  while [ ! -d "$path" ]; do path=$(dirname "$path"); done
  if [ -d "$directory" ]; then
    [ "$(stat -c %u "$directory")" = 0 ] ||
      fail "$directory belongs to $(stat -c %U "$directory"), who could replace what root runs; choose another --dir, or: chown root $directory"
  fi
  while :; do
    [ $((0$(stat -c %a "$path") & 1)) = 1 ] ||
      fail "other users cannot pass $path; choose another --dir, or: chmod o+x $path"
    [ "$path" != / ] || break
    path=$(dirname "$path")
  done
}

# A directory that is there may have what is to be part of the farm, drop-ins and mounts, and nothing
# else: it is somebody's.
vacant() {
  is_farm && return 0
  [ -e "$directory" ] || return 0
  [ -d "$directory" ] || fail "$directory is no directory; choose another --dir"
  local path
  while read -r path; do
    case ${path#"$directory"/} in
      lost+found | etc | etc/bb_*.toml.d | etc/bb_*.toml.d/*) ;;
      storage | worker) [ -z "$(find "$path" -mindepth 1 ! -name lost+found -print -quit)" ] || fail "$path is not empty; choose another --dir" ;;
      storage/lost+found | worker/lost+found) ;;
      *) fail "$directory has files that are no farm's, such as $path; choose an empty or a new directory with --dir" ;;
    esac
  done < <(find "$directory" -mindepth 1 -maxdepth 3)
}

room() {
  local path=$1
  while [ ! -d "$path" ]; do path=$(dirname "$path"); done
  local free
  free=$(df -Pk "$path" | awk 'NR == 2 { print int($4 / 1024) }')
  [ "$free" -ge "$2" ] || fail "$path has $free MiB free, and $3 needs $2 MiB; make room, or choose another $4"
}

check() {
  need_root
  local tool
  for tool in setpriv perl flock find awk getent; do
    command -v "$tool" >/dev/null || fail "$tool is missing; apt install util-linux perl-base findutils mawk libc-bin"
  done
  # sockaddr_un(7) ends at 108 bytes.
  [ ${#directory} -le 85 ] || fail "$directory is too long for the names of sockets in it; choose another --dir"
  passable
  vacant
  settings
  # Of daemons that do not run: the others' ports are theirs.
  [ -n "$(pid_of bb_scheduler)" ] || { port_is_free "$port"; port_is_free $((port + 3)); port_is_free $((port + 4)); port_is_free $((port + 2)); }
  [ -n "$(pid_of bb_worker)" ] || port_is_free $((port + 5))
  [ -n "$(pid_of bb_runner)" ] || port_is_free $((port + 6))
  # What there is already has taken its part.
  [ -n "$(running)" ] || [ -d "$directory/storage" ] || room "$directory" 1500 "a farm" --dir
  [ "$command" != demo ] || command -v apt-get >/dev/null ||
    fail "demo installs Bazel and a C++ compiler by apt-get, which is missing; elsewhere, see up"
  if [ "$command" = demo ] || ! is_built; then check_build; fi
}


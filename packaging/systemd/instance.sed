# Makes bb-runner@.service and bb-runner@.socket, the units of further runners, of bb-runner.service
# and bb-runner.socket: packaging/debian/rules runs it over both.
#
# An instance has a configuration, a directory in /run and a control group of its own. The worker, which
# knows no instances, starts after them and stops before them.
# Metrics and a control socket are the first runner's; others listen where their configurations say.
/^Wants=bb-runner-metrics/d
/^After=bb-runner-metrics/d
s/ bb-runner-metrics\.socket bb-runner-control\.socket//
/^\[Unit\]/a Before=bb-worker.service
s/^Description=Build farm runner/& %i/
s/bb-runner\.socket/bb-runner@%i.socket/g
s,/run/bb-runner/,/run/bb-runner-%i/,
s,^\(Exec[A-Za-z]*=/usr/bin/bb_runner\),\1 --config /etc/bb-remote-execution/bb_runner@%i.toml,

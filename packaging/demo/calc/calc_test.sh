#!/bin/sh
set -eu
[ "$(calc/calc '2*(3+4)')" = 14 ]
[ "$(calc/calc 'prime(100)')" = 541 ]
if calc/calc '1+'; then exit 1; fi

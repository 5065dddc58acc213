#!/usr/bin/env bash
# Installs what a test needs from Debian's packages, where that is possible.
#   scripts/install_debian.sh COMMAND PACKAGE...
# Does nothing where COMMAND is there already; says so where there is no root, no apt-get or no network.
set -euo pipefail
command=$1
shift
if command -v "$command" > /dev/null; then
  exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "no $command here, and no root or apt-get to install it with ($*): the tests that need it are skipped" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
options=(-qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120)
if ! { apt-get "${options[@]}" update && apt-get "${options[@]}" install -y --no-install-recommends "$@" > /dev/null; }; then
  echo "$* could not be installed: the tests that need $command are skipped" >&2
fi

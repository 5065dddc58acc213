#!/usr/bin/env bash
# Installs a command that some tests need from Debian's packages, unless it is there; as root.
#   scripts/install_debian.sh COMMAND PACKAGE...
#   scripts/install_debian.sh chromium chromium fonts-dejavu-core
#   scripts/install_debian.sh pdflatex texlive-latex-recommended
set -euo pipefail
command=$1
shift
if command -v "$command" > /dev/null; then
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
options=(-qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120)
apt-get "${options[@]}" update
apt-get "${options[@]}" install -y --no-install-recommends "$@" > /dev/null

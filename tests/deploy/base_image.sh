#!/bin/sh
# Packs a base image out of this machine, for hosts that can pull none: libraries, a shell, Python and its packages.
# usage: base_image.sh ARCHIVE PYTHON_PREFIX SITE_PACKAGES; `docker import` makes the image of it (docker_engine.py)
set -eu
archive=$1 prefix=$2 site=$3
cd /
# ld.so finds /opt/python/lib by its variable; everything else lies where it lay.
{
  printf '%s\n' bin sbin lib lib64 usr/lib64 usr/lib64/ld-linux-x86-64.so.2 etc/passwd etc/group etc/nsswitch.conf etc/ld.so.conf etc/ld.so.conf.d etc/ld.so.cache
  for name in sh dash bash env mkdir chmod cat ls tail head id sleep kill grep; do echo "usr/bin/$name"; done
  find usr/lib/x86_64-linux-gnu -maxdepth 1 \( -name '*.so' -o -name '*.so.*' \) ! -name 'libLLVM*' ! -name 'libclang*' ! -name 'libicudata*'
} | tar --create --ignore-failed-read --no-recursion --files-from - --file "$archive"
tar --append --file "$archive" --transform "s,^${prefix#/},opt/python," --transform "s,^${site#/},opt/site," \
  --exclude='__pycache__' --exclude='*/python3.11/test' --exclude="${prefix#/}/lib/python3.11/site-packages/*" --exclude='*.a' \
  --exclude='*/site-packages/compose' --exclude='*/site-packages/transformers' --exclude='*/site-packages/mypy*' \
  --exclude='*/site-packages/matplotlib*' --exclude='*/site-packages/nvidia*' --exclude='*/site-packages/triton*' \
  --exclude='*/site-packages/torch/include' --exclude='*/site-packages/torch/test' \
  "${prefix#/}/bin" "${prefix#/}/lib" "${site#/}"

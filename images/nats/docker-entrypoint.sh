#!/bin/sh
# Entry point with the contract of the nats image: arguments that begin with a
# hyphen are for nats-server.
set -eu

case "${1-}" in
  -*) set -- nats-server "$@" ;;
esac
exec "$@"

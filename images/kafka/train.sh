#!/bin/bash
# Runs inside a container of the fresh Kafka image: formats a data folder,
# starts the broker, sends it one record, reads it as a group and stops it, and
# has the Java runtime write down the classes that took. The archives halve the
# time of each start.
set -euo pipefail

docker=/etc/kafka/docker
config=/opt/kafka/config
log=/tmp/kafka.log
cp "$docker"/*.yaml "$docker/server.properties" "$config/"
export CLUSTER_ID=5L6g3nShT-eMCtK--X86sw

# The archive of the runtime's own classes, which the other two build upon.
"$JAVA_HOME/bin/java" -Xshare:dump >/dev/null

KAFKA_JVM_PERFORMANCE_OPTS=-XX:ArchiveClassesAtExit=/opt/kafka/storage.jsa \
  kafka-run-class.sh kafka.docker.KafkaDockerWrapper setup \
  --default-configs-dir "$docker" \
  --mounted-configs-dir /mnt/shared/config \
  --final-configs-dir "$config"

KAFKA_JVM_PERFORMANCE_OPTS=-XX:ArchiveClassesAtExit=/opt/kafka/kafka.jsa \
  KAFKA_HEAP_OPTS=-Xmx1g \
  kafka-server-start.sh "$config/server.properties" >"$log" 2>&1 &
broker=$!
for ((tenths = 0; tenths < 600; tenths++)); do
  ! grep -q "Kafka Server started" "$log" || break
  sleep 0.1
done
echo hello | kafka-console-producer.sh --bootstrap-server localhost:9092 --topic train
kafka-console-consumer.sh --bootstrap-server localhost:9092 --topic train \
  --group train --from-beginning --max-messages 1
kill -TERM "$broker"
# Java ends with 143 after SIGTERM, archive written or not.
wait "$broker" || true
rm -rf /tmp/*
ls /opt/kafka/storage.jsa /opt/kafka/kafka.jsa

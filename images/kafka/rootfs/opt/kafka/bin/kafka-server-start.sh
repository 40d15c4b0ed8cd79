#!/bin/bash
# Starts the broker: kafka-server-start.sh server.properties
set -euo pipefail

logging="-Dlog4j2.configurationFile=/opt/kafka/config/log4j2.yaml"
export KAFKA_HEAP_OPTS="${KAFKA_HEAP_OPTS:--Xms256m -Xmx1g}"
export KAFKA_LOG4J_OPTS="${KAFKA_LOG4J_OPTS:-$logging}"
exec /opt/kafka/bin/kafka-run-class.sh kafka.Kafka "$@"
